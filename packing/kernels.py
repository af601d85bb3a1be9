"""njit, with a cache on disk that notices a change in any file of kernels.

Numba stamps what it caches with the file of the function alone. A kernel that calls one of another file would then go
on with the old machine code of that, after an upgrade just as after an edit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numba


def njit(**options) -> Callable[[Callable], Callable]:
    """numba.njit with options; with cache=True the stamp covers this whole package."""

    def decorate(function: Callable) -> Callable:
        dispatcher = numba.njit(**options)(function)
        file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)  # none under NUMBA_DISABLE_JIT
        if hasattr(file, "_source_stamp"):
            file._source_stamp = (file._source_stamp, stamp())
        return dispatcher

    return decorate


@cache
def stamp() -> str:
    """A digest of the sources of this package."""
    digest = blake2b(digest_size=16)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()
