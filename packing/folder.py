"""Writing a dataset folder that load_from_disk reads: batch by batch, and all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

SHARD_BYTES = 500_000_000


def check_target(target: str | os.PathLike) -> Path:
    """The folder to write, which must not exist yet."""
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"output {str(target)!r} exists already; choose another folder or remove it first")
    return target


@contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder beside the target that becomes the target at the end; an error leaves neither.

    with new_folder("packed") as folder:     # .packed.writing-a1b2c3
        ...                                  # at the end renamed to packed
    """
    target = check_target(target).absolute()
    made = [parent for parent in target.parents if not parent.exists()]  # the parents that we make, nearest first
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
    folder.chmod(0o777 & ~_umask())  # mkdtemp keeps others out
    try:
        yield folder
        check_target(target)
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # a parent that someone else writes to by now is not empty, and stays
            for parent in made:
                parent.rmdir()
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_dataset(folder: Path, batches: Iterable[pa.RecordBatch], info, fingerprint: str, split: str | None) -> None:
    """Write data-00000-of-00003.arrow …, dataset_info.json and state.json into an existing folder.

    Shards are Arrow streams, not compressed, so that a loaded dataset is a memory map of them.
    """
    shards = _write_shards(folder, batches, info.features.arrow_schema)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    info.write_to_directory(str(folder), pretty_print=True)
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def _write_shards(folder: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> list[Path]:
    """Begin a new shard once one has SHARD_BYTES. How many there will be is known at the end only."""
    shards, writer, written = [], None, 0
    try:
        for batch in batches:
            if writer is None:
                shards.append(folder / f"{len(shards)}.writing")
                writer, written = pa.ipc.new_stream(str(shards[-1]), schema), 0
            writer.write_batch(batch)
            written += batch.nbytes
            if written >= SHARD_BYTES:
                writer.close()
                writer = None
    finally:
        if writer is not None:
            writer.close()
    return shards
