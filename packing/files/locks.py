"""A lock that the system takes back when its holder ends, however it ends: a file that one process at a time holds.

    with held(Path("packed.lock")):      # another process that tries gets BlockingIOError, or waits
        ...
    holder(Path("packed.lock"))          # " (process 4711 on node7)", for the error of that other process

A process that is forked meanwhile does not hold it: a worker that outlives its parent keeps nobody out.

fcntl where there is one, msvcrt on Windows. Importing this needs neither.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def _module(name: str) -> Any:
    with suppress(ImportError):
        return importlib.import_module(name)


fcntl, msvcrt = _module("fcntl"), _module("msvcrt")

TRIES = 100  # a holder that ends takes its file along: so often another one may have been first
PAUSE = 0.05  # seconds between two looks, where the system cannot wait
FAR = 0x7FFF0000  # msvcrt locks bytes, and nobody may read those: this one lies behind all data
HOLDER_BYTES = 300  # the longest line that names the holder
LOOK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # no link is followed, no pipe is waited for


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock; its file is there meanwhile.

    Raises BlockingIOError where another process holds it and `wait` is False; OSError where the file cannot be made.
    """
    descriptor = _open_locked(path, wait)
    _own.add(descriptor)
    try:
        _sign(descriptor)
        yield
    finally:
        if descriptor in _own:  # a forked process has closed it
            _own.discard(descriptor)
            with suppress(OSError):  # delete it, then free it: those who wait see that it has gone
                path.unlink()
            os.close(descriptor)
            if msvcrt is not None:  # Windows keeps a file that is open
                with suppress(OSError):
                    path.unlink()


def holder(path: Path) -> str:
    """ " (process 4711 on node7)", or "" where that is not known: for a message."""
    try:
        descriptor = os.open(path, os.O_RDONLY | LOOK)
    except OSError:
        return ""
    try:
        said = os.read(descriptor, HOLDER_BYTES).decode("utf-8", "replace").strip()
    except OSError:
        said = ""
    finally:
        os.close(descriptor)
    return f" ({said})" if said.isprintable() and said else ""


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node() or 'this machine'}\n".encode())


_own: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _close_in_child() -> None:
    for descriptor in _own:
        with suppress(OSError):
            os.close(descriptor)
    _own.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _open_locked(path: Path, wait: bool) -> int:
    for _ in range(TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | LOOK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is no file, so it cannot be a lock; remove it", str(path))
            lock(descriptor, wait)
            if _names(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    what = "it is removed again and again; its file system may know no locks: choose another place"
    raise OSError(errno.ENOLCK, what, str(path))


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path leads to this file still: the one that was held before is removed."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def lock(descriptor: int, wait: bool = False) -> None:
    """Lock an open file until it is closed. Raises BlockingIOError where another has it and `wait` is False."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    elif msvcrt is not None:
        while not _lock_byte(descriptor):
            if not wait:
                raise BlockingIOError("another process holds this lock")
            time.sleep(PAUSE)
    else:
        what = "this system has no locks for files, neither fcntl nor msvcrt; write on another one"
        raise OSError(errno.ENOLCK, what)


def _lock_byte(descriptor: int) -> bool:
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, FAR, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)
    return True
