"""Python's garbage collector, for a command that imports much and ends soon."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 50_000  # objects that are new when the collector looks at them, instead of some hundred


@contextmanager
def few_collections() -> Iterator[None]:
    """For the whole of a process: the collector runs seldom, and not at the end.

    Importing makes a million objects that stay. To walk over them again and again takes a third of the time of
    importing them; so does one more walk when the process ends.
    """
    before = gc.get_threshold()
    gc.set_threshold(YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.freeze()
