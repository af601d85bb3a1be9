"""The files that a dataset lies in, mapped into memory: whoever reads them looks first whether they have changed.

A read behind the new end of a mapped file that was cut short ends the process (SIGBUS), and Python cannot catch that.
So each step of reading looks at the files before. It misses a cut within the step, of some hundredths of a second.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

from packing.files.errors import SourceError

PAUSE_S = 0.02  # many files on a slow file system are not asked for each batch


class SourceChangedError(SourceError):
    """A file of the source is no longer what it was."""


@dataclass(eq=False)
class SourceFiles:
    """stamps: {name: size, time of modification and number}; None: it has gone."""

    stamps: dict[str, tuple | None]
    _asked: float = field(default=float("-inf"))

    @classmethod
    def of(cls, dataset: datasets.Dataset) -> SourceFiles:
        return cls({name: _stamp(name) for name in sorted({file["filename"] for file in dataset.cache_files})})

    def changed(self) -> str | None:
        """The first file that is another one now. One that has gone has not changed: who has it open reads on."""
        found = ((name, _stamp(name)) for name in self.stamps)
        return next((name for name, stamp in found if stamp not in (self.stamps[name], None)), None)

    def check(self) -> None:
        """refuse_changed, unless that was asked a moment ago."""
        now = time.monotonic()
        if now - self._asked >= PAUSE_S:
            self._asked = now
            self.refuse_changed()

    def refuse_changed(self, cure: str = "start again once nobody writes to it") -> None:
        """Raise SourceChangedError where a file has changed."""
        name = self.changed()
        if name is not None:
            raise SourceChangedError("of the source was changed while it was packed", file=name, cure=cure)


def _stamp(name: str) -> tuple | None:
    try:
        found = os.stat(name)
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
