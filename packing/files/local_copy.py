"""Files at a URL -> the same files in the cache: copied once, and again once they have changed.

s3://bucket/rows.parquet      one file
s3://bucket/data/*.parquet    a glob
s3://bucket/tokenized         a folder, with its subfolders; hidden files are left where they are

They lie in HF_DATASETS_CACHE/pack-dataset, under the URL and what the file system says of each file (size, time, ETag).
A file has its name there when it is whole: a copy that was killed continues with the files that are missing or damaged.
Where the file system tells only a file's size, a change that keeps it is not seen.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from packing.files.cache import cache_folder
from packing.files.hashed import checksum, sync, write_file
from packing.files.locks import held
from packing.files.names import checked_path, is_hidden
from packing.files.paths import is_file_in, named_errors, open_store

if TYPE_CHECKING:
    import fsspec

OF_ACCESS = re.compile("^(atime|time|ino|nlink)$|access", re.I)  # changes without the file, or differs by machine
WILDCARD = re.compile(r"[*\[]")

Wanted = Callable[[set[str]], set[str]]


def local_copy(url: str, storage_options: dict | None = None, wanted: Wanted = set, cache: Path | None = None) -> Path:
    """Where the file, or the folder of the files, lies now. Raises FileNotFoundError where there is none.

    wanted: of the names in a folder or a glob, those to copy. cache: None is cache_folder()."""
    with named_errors(url):
        fs, path = open_store(url, storage_options)
        root, found = _find(fs, path, wanted)
    if not found:
        raise FileNotFoundError(f"{url!r} matches no file" if WILDCARD.search(path) else f"there is no file at {url!r}")
    stamps = _stamps(found)
    digest = xxhash.xxh3_128_hexdigest(json.dumps([url, stamps], sort_keys=True).encode())
    folder = (cache or cache_folder()) / f"{re.sub(r'[^A-Za-z0-9]+', '-', url)[-60:].strip('-')}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder.with_name(f"{folder.name}.lock"), wait=True):  # one process copies, others of this machine wait
        missing = [name for name in found if not _is_whole(folder / name)]
        for name in missing:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            with named_errors(f"{url} (copied into {folder}; HF_DATASETS_CACHE says where)"):
                fs.get_file(root + name, str(part))
                copied, size = part.stat().st_size, found[name].get("size")
                if size is not None and copied != size:
                    raise OSError(errno.EIO, f"{copied:,} of {size:,} bytes of {name!r} have come")
            sync(part)
            write_file(_seal(target), checksum(part).encode())
            os.replace(part, target)
            sync(target.parent)
        if missing:
            with named_errors(url):
                changed = _stamps(_find(fs, path, wanted)[1]) != stamps
            if changed:
                raise ValueError(f"{url!r} was changed while it was copied; start again once nobody writes to it")
    return folder / path.removeprefix(root) if path.removeprefix(root) in found else folder


def _find(fs: fsspec.AbstractFileSystem, path: str, wanted: Wanted) -> tuple[str, dict[str, dict]]:
    """The folder that all lie in, with a slash at its end; names in it -> what the file system says of them."""
    fs.invalidate_cache()
    if magic := WILDCARD.search(path):
        found = fs.glob(path, detail=True)
        root = path[: magic.start()].rpartition("/")[0]
    elif not path.endswith("/") and fs.isfile(path):
        found = {path: fs.info(path)}
        root = path.rpartition("/")[0]
    else:
        found = fs.find(path, detail=True)
        root = path.rstrip("/")
        if not found:  # is it that there is nothing, or can it not be asked?
            with suppress(FileNotFoundError):
                fs.info(path)
    root += "/"
    found = {name: info for name, info in found.items() if info.get("type") == "file" and is_file_in(root, name)}
    files = {checked_path(name.removeprefix(root), root): info for name, info in found.items()}  # an archive's, say
    if path not in found:
        chosen = wanted({name for name in files if not is_hidden(name)})
        files = {name: info for name, info in files.items() if name in chosen}
    return root, dict(sorted(files.items()))


def _stamps(found: dict[str, dict]) -> dict[str, dict]:
    """What changes when a file does."""
    return {n: {k: str(v) for k, v in info.items() if not OF_ACCESS.search(k)} for n, info in found.items()}


def _seal(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.xxh3")


def _is_whole(copy: Path) -> bool:
    """Whether a copy is there, and what was copied: if not, it is copied again."""
    try:
        return checksum(copy) == _seal(copy).read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return False
