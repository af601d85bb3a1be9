"""njit, with a cache on disk that notices a change in any file of kernels, and that needs no folder of its own.

Numba stamps what it caches with the file of the function alone. A kernel that calls one of another file would then keep
the old machine code of that, after an upgrade just as after an edit.

Numba caches beside the sources or in the user's home, and raises where it can write to neither. Then the cache lies in
a temporary folder of this user; where even that fails, each process compiles anew.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numba

Kernel = TypeVar("Kernel", bound=Callable)


def njit(**options: Any) -> Callable[[Kernel], Kernel]:
    """numba.njit with options; with cache=True the stamp covers this whole package, and the function's own."""

    def decorate(function: Kernel) -> Kernel:
        dispatcher = _njit(function, options)
        file: Any = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)  # none under NUMBA_DISABLE_JIT
        if hasattr(file, "_source_stamp"):
            own = _package(Path(function.__code__.co_filename))
            file._source_stamp = (file._source_stamp, stamp(), stamp(own))
        return dispatcher

    return decorate


def _njit(function: Kernel, options: dict) -> Kernel:
    try:
        return numba.njit(**options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    folder = _temporary_folder()
    if folder is None:
        return numba.njit(**options | {"cache": False})(function)
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        return numba.njit(**options)(function)
    finally:
        numba.config.CACHE_DIR = before


@cache
def _temporary_folder() -> Path | None:
    """A folder that only this user can write to, or None. What others could write there, Numba would execute."""
    folder = Path(tempfile.gettempdir()) / f"dataset-packing-kernels-{getattr(os, 'getuid', int)()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_ours = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
    return folder if is_ours and not folder.is_symlink() else None


def _package(file: Path) -> Path:
    """The outermost folder of the package that a file is in."""
    folder = file.parent
    while (folder.parent / "__init__.py").exists():
        folder = folder.parent
    return folder


@cache
def stamp(folder: Path = Path(__file__).parent) -> str:
    """A digest of the Python files in a folder and the folders inside it, by default this package."""
    digest = blake2b(digest_size=16)
    for source in sorted(folder.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
