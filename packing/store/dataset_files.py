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
from packing.files.paths import Place
from packing.files.saved import NO_VIEW, STATE

if TYPE_CHECKING:
    import datasets

ARROW, PARQUET = ".arrow", ".parquet"
ENDINGS = {"arrow": ARROW, "parquet": PARQUET}  # one a format in options.OUTPUT_FORMATS
SHARD_BYTES = 500_000_000  # a shard's size, roughly, before Parquet compresses it


def shard_names(count: int, ending: str = ARROW) -> list[str]:
    """["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]"""
    return [f"data-{i:05d}-of-{count:05d}{ending}" for i in range(count)]


def write_batches(
    path: Place, schema: pa.Schema, batches: Iterable[pa.RecordBatch], advance: Callable[[int], None] | None = None
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
    into: Path, batches: Iterable[pa.RecordBatch], info: datasets.DatasetInfo, key: Callable[[], str], split: str | None
) -> None:
    """Write a dataset into an existing folder, in shards of SHARD_BYTES.

    key: gives the fingerprint, by which datasets keeps what it makes of this one; called after the last batch.
    """
    batches, count = iter(batches), 0
    for batch in batches:
        write_batches(into / f"{count}{ARROW}", info.features.arrow_schema, _one_shard(batch, batches))
        count += 1
    names = shard_names(count)  # their names hold the count
    for i, name in enumerate(names):
        (into / f"{i}{ARROW}").rename(into / name)
    for name, data in state_files(names, info, key(), split).items():
        (into / name).write_bytes(data)


def _one_shard(batch: pa.RecordBatch | None, others: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """This batch, and as many of the others as fit into a shard with it."""
    written = 0
    while batch is not None:
        yield batch
        written += batch.nbytes
        batch = next(others, None) if written < SHARD_BYTES else None


def state_files(shards: list[str], info: datasets.DatasetInfo, fingerprint: str, split: str | None) -> dict[str, bytes]:
    """What makes a dataset of these Arrow files: LICENSE if the source has one, dataset_info.json, state.json last."""
    files = [{"filename": name} for name in shards]
    state = {"_data_files": files, "_fingerprint": fingerprint, **NO_VIEW, "_split": split}
    with tempfile.TemporaryDirectory() as folder:
        info.write_to_directory(folder, pretty_print=True)
        others = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    return others | {STATE: json.dumps(state, indent=2).encode()}
