"""A function in a forked process that is killed, with worker processes of its own, once some files are finished."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 120  # seconds for what takes a few


def killed_once(is_reached: Callable[[], bool], function: Callable[[], object]) -> bool:
    """Whether the process was killed; False: it ended before. All processes that it had started end, too."""
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            function()
            status = 0
        os._exit(status)
    started: set[int] = set()
    begin = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        started |= children(child)
        if ended:
            assert status == 0, status
            return False
        if started and is_reached():
            break
        assert time.monotonic() < begin + PATIENCE
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while any(map(is_running, started)):
        assert time.monotonic() < begin + PATIENCE, started
        time.sleep(0.01)
    return True


def children(parent: int) -> set[int]:
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(_fields(file)[1]) == parent:
                found.add(int(file.parent.name))
    return found


def is_running(process: int) -> bool:
    try:
        return _fields(Path(f"/proc/{process}/stat"))[0] != "Z"
    except OSError:
        return False


def _fields(file: Path) -> list[str]:
    """Those behind the name, which may hold spaces: the state, the parent, …"""
    return file.read_text().rpartition(")")[2].split()
