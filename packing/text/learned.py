"""What several processes learn: each tells the others the units that it met, and what the tokenizer made of them.

    process 1   reads "we must" by the tokenizer, and appends  we 57, must 92  to its file
    process 2   finds them there before it needs them

A process writes to a file of its own, in a folder that all have, and reads those of the others. Nobody waits: what is
not told in time, two processes learn. The folder is for one tokenizer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

HEAD = np.dtype([("units", np.int64), ("bytes", np.int64), ("ids", np.int64)])


class News(NamedTuple):
    """Units one after the other, UTF-8 as uint8, and how many bytes each has; ids, int32, and how many each has."""

    data: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    counts: np.ndarray


class Learned:
    """One process's end."""

    _own: FileIO | None
    _others: dict[str, FileIO | None]

    def __init__(self, folder: Path):
        self._folder, self._own, self._others = folder, None, {}
        folder.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        self._own, self._others[name] = FileIO(handle, "ab"), None

    def meet(self) -> None:
        """Look which processes there are."""
        for file in os.scandir(self._folder):
            if file.path not in self._others:
                self._others[file.path] = FileIO(file.path)

    def tell(self, news: News) -> None:
        """On a full disk it is silent from then on: what follows half a message could not be read."""
        if self._own is None:
            return
        head = np.array([(len(news.lengths), len(news.data), len(news.ids))], HEAD)
        parts = head, news.lengths.astype(np.int32), news.counts.astype(np.int32), news.ids.astype(np.int32), news.data
        message = b"".join(part.tobytes() for part in parts)
        try:
            is_told = self._own.write(message) == len(message)
        except OSError:
            is_told = False
        if not is_told:
            self._own.close()
            self._own = None

    def hear(self) -> Iterator[News]:
        """What the others have told since the last time."""
        for file in filter(None, self._others.values()):
            rest = file.read()
            while len(rest) >= HEAD.itemsize:
                units, size, ids = np.frombuffer(rest, HEAD, 1)[0].tolist()
                end = HEAD.itemsize + 4 * (2 * units + ids) + size
                if len(rest) < end:
                    break
                numbers = np.frombuffer(rest, np.int32, 2 * units + ids, HEAD.itemsize)
                lengths, counts, found = np.split(numbers, [units, 2 * units])
                yield News(np.frombuffer(rest, np.uint8, size, end - size), lengths, found, counts)
                rest = rest[end:]
            if rest:  # half of what is being written
                file.seek(-len(rest), os.SEEK_CUR)

    def __del__(self) -> None:
        for file in (self._own, *self._others.values()):
            if file is not None:
                file.close()
