"""The files of a dataset folder, which load_from_disk reads: shards, dataset_info.json and state.json.

data-00000-of-00003.arrow     an Arrow stream, not compressed, so that a loaded dataset is a memory map of it
data-00000-of-00003.parquet   a row group for each batch
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from packing.files.hashed import HashedFile, hashed_file
from packing.files.paths import RemotePath
from packing.files.saved import STATE, STATE_AS_WRITTEN

if TYPE_CHECKING:
    import datasets

ARROW, PARQUET = ".arrow", ".parquet"
ENDINGS = {"arrow": ARROW, "parquet": PARQUET}  # of each format in options.FORMATS
SHARD_BYTES = 500_000_000  # of a shard of write_dataset


def shard_names(count: int, ending: str = ARROW) -> list[str]:
    """["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]"""
    return [f"data-{i:05d}-of-{count:05d}{ending}" for i in range(count)]


def write_batches(
    path: Path | RemotePath,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    advance: Callable[[int], None] | None = None,
) -> HashedFile:
    """Write one shard, in the format that its ending says. The file appears when it is whole.

    advance: called with the rows of each batch that is written; what it raises ends the writing.
    Returns the closed file, which knows its size and hash. Raises OSError where the disk is full or fails.
    """
    with hashed_file(path) as file:
        with closing(_open_writer(file, schema, path.suffix)) as writer:
            for batch in batches:
                writer.write_batch(batch)
                if advance is not None:
                    advance(batch.num_rows)
        file.publish()
    return file


def _open_writer(file: HashedFile, schema: pa.Schema, ending: str) -> Any:
    if ending != PARQUET:
        return pa.ipc.new_stream(file, schema)
    import pyarrow.parquet as pq

    return pq.ParquetWriter(file, schema)


def write_dataset(
    folder: Path,
    batches: Iterable[pa.RecordBatch],
    info: datasets.DatasetInfo,
    fingerprint: str | Callable[[], str],
    split: str | None,
) -> None:
    """Write a dataset into an existing folder, in shards of SHARD_BYTES.

    fingerprint: by which datasets keeps what it makes of this one; a function is called after the last batch.
    """
    batches, count = iter(batches), 0
    for batch in batches:
        write_batches(folder / f"{count}{ARROW}", info.features.arrow_schema, _one_shard(batch, batches))
        count += 1
    names = shard_names(count)  # how many there are is known now
    for i, name in enumerate(names):
        (folder / f"{i}{ARROW}").rename(folder / name)
    fingerprint = fingerprint if isinstance(fingerprint, str) else fingerprint()
    for name, data in state_files(names, info, fingerprint, split).items():
        (folder / name).write_bytes(data)


def _one_shard(batch: pa.RecordBatch | None, others: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """This batch, and as many of the others as fit into a shard with it."""
    written = 0
    while batch is not None:
        yield batch
        written += batch.nbytes
        batch = next(others, None) if written < SHARD_BYTES else None


def state_files(shards: list[str], info: datasets.DatasetInfo, fingerprint: str, split: str | None) -> dict[str, bytes]:
    """What makes a dataset of these Arrow files: LICENSE if the source has one, dataset_info.json, state.json last."""
    state = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": fingerprint,
        **STATE_AS_WRITTEN,
        "_split": split,
    }
    with tempfile.TemporaryDirectory() as folder:
        info.write_to_directory(folder, pretty_print=True)
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    return files | {STATE: json.dumps(state, indent=2).encode()}
