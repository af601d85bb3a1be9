"""Files that are made once and kept: in HF_DATASETS_CACHE/pack-dataset, under a key of all that they are made from.

    KEY/rows.arrow, …     Arrow streams, or an unpacked text
    KEY/seal.json         {"rows.arrow": {"rows": 6000, "bytes": 131072, "xxh3": "9f2c…"}}

The folder gets its name when it is whole and on the disk. Files that are used again are hashed first. Where one is
damaged, even if it looks whole, the folder is made again, and a warning says so.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import uuid4

import xxhash

from packing.files.folder import writing_errors
from packing.files.hashed import UNFINISHED, checksum, sync, write_file
from packing.files.locks import held
from packing.files.metadata import read_json
from packing.files.names import checked_name, file_in

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

SEAL = "seal.json"
CACHE_CURE = "set HF_DATASETS_CACHE to a folder that you can write to"


def cache_folder() -> Path:
    """Where pack-dataset keeps what it has converted, tokenized or copied."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "pack-dataset"


def key_of(*made_from: object) -> str:
    """The key of files that are made from this."""
    return xxhash.xxh3_128_hexdigest(repr(made_from).encode())


@contextmanager
def new_cache() -> Iterator[Path]:
    """An empty cache, deleted at the end: for a check that must not trust what an earlier run has read.

    The folder appears with the first thing that is kept: a source that is read where it lies needs none."""
    folder = cache_folder() / f".anew-{uuid4().hex}"
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kept_rows(
    key: str, make: Callable[[Path], object], cache: Path | None = None, *, resumes: bool = False
) -> datasets.Dataset:
    """The rows of the Arrow files that make(folder) writes, one file after the other by name.

    cache, resumes: see `kept_folder`."""
    import datasets

    folder = kept_folder(key, make, cache, resumes=resumes)
    files = [
        datasets.Dataset.from_file(str(folder / name)) for name in sorted(_seal(folder)) if name.endswith(".arrow")
    ]
    return datasets.concatenate_datasets(files) if len(files) > 1 else files[0]


def kept_folder(key: str, make: Callable[[Path], object], cache: Path | None = None, *, resumes: bool = False) -> Path:
    """A folder of files that make(folder) writes, unless they are kept under this key and whole.

    cache: None is cache_folder().
    resumes: whether make() takes what is in the folder for finished: after a run that was killed, it starts there."""
    cache = cache or cache_folder()
    folder = cache / key
    damage = _damage(folder) if os.path.lexists(folder) else None
    if damage is not None:
        logger.warning("%s, which is made again", damage)
        _remove(folder)
    if not folder.exists():
        with writing_errors(cache, CACHE_CURE):
            cache.mkdir(parents=True, exist_ok=True)
            (_resume if resumes else _make)(folder, make)
    return folder


def _remove(path: Path) -> None:
    """Delete a folder, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _make(folder: Path, make: Callable[[Path], object]) -> None:
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        fresh = Path(temporary) / "files"
        fresh.mkdir()
        _fill(fresh, folder, make)


def _resume(folder: Path, make: Callable[[Path], object]) -> None:
    """As `_make`, in a folder with a name of its own, which one process at a time fills."""
    fresh = folder.with_name(f".{folder.name}.unfinished")
    with held(folder.with_name(f".{folder.name}.lock"), wait=True):
        if folder.exists():
            return
        fresh.mkdir(exist_ok=True)
        (fresh / SEAL).unlink(missing_ok=True)
        _fill(fresh, folder, make)


def _fill(fresh: Path, folder: Path, make: Callable[[Path], object]) -> None:
    """Make the files, seal them, and give their folder its name."""
    make(fresh)
    for file in fresh.glob(f".*{UNFINISHED}"):  # a process that died was writing it
        file.unlink(missing_ok=True)
    seal = {path.name: _measured(path) for path in sorted(fresh.iterdir())}
    for name in seal:
        sync(fresh / name)
    write_file(fresh / SEAL, json.dumps(seal).encode())
    try:
        os.rename(fresh, folder)
    except OSError:
        if not folder.exists() or _damage(folder) is not None:
            raise
        # another process has made the same meanwhile
    sync(folder.parent)


def _measured(path: Path) -> dict:
    import pyarrow as pa

    measured = {"bytes": path.stat().st_size, "xxh3": checksum(path)}
    if path.suffix != ".arrow":
        return measured
    with pa.memory_map(str(path)) as mapped:
        return {"rows": sum(batch.num_rows for batch in pa.ipc.open_stream(mapped)), **measured}


def _seal(folder: Path) -> dict[str, dict]:
    seal = read_json(file_in(folder, SEAL, SEAL))
    if not isinstance(seal, dict) or not seal:
        raise ValueError("it names no files")
    return {checked_name(name, folder / SEAL): expected for name, expected in seal.items()}


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a folder; None: nothing."""
    try:
        seal = _seal(folder)
    except (OSError, ValueError) as error:
        return f"{str(folder / SEAL)!r} is damaged ({error})"
    for name, expected in seal.items():
        path = folder / name
        try:
            file_in(folder, name, SEAL)
            if path.stat().st_size != expected["bytes"] or checksum(path) != expected["xxh3"]:
                return f"{str(path)!r} in the cache is damaged: it is no longer what was written"
        except (OSError, ValueError, TypeError, KeyError) as error:
            return f"{str(path)!r} in the cache is damaged ({error})"
    return None
