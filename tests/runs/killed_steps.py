"""A function in a forked process that kills itself at one of its steps on files: between them nothing changes."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from unittest.mock import patch

STEPS = ("write", "fsync", "rename", "unlink", "mkdir", "rmdir")


@contextlib.contextmanager
def steps(last: int = 0) -> Iterator[Callable[[], int]]:
    """-> how many steps there were. last: at which the process dies; 0: none."""
    numbers, taken = count(1), [0]

    def counted(real):
        def call(*arguments, **options):
            taken[0] = next(numbers)
            if taken[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    with contextlib.ExitStack() as stack:
        for name in STEPS:
            stack.enter_context(patch.object(os, name, counted(getattr(os, name))))
        yield lambda: taken[0]


def killed_at(last: int, function: Callable[[], object]) -> bool:
    """Whether it was killed there; False: it ended before."""
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            with steps(last):
                function()
            status = 0
        os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, -signal.SIGKILL), ended
    return ended != 0


def contents(folder: Path) -> dict[str, bytes]:
    """All files but locks: one that a killed process held stays until somebody else holds it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def identities(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """{name: what changes when a file is made again}"""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob(pattern)}
