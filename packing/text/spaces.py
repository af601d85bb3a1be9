"""Runs of white space -> one space, where the tokenizer makes that of them: a unit is the same behind each.

"if x:\\n    return"   ->   "if x: return"
"""

from __future__ import annotations

import numpy as np

from packing.numba_tools import njit
from packing.text.table import class_at
from packing.text.units import EDGE, SPACE, UNSAFE


def squeeze(data: np.ndarray, offsets: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The texts with one space for each run of white space that has something visible behind it, and before it, too,
    unless it starts the text."""
    if not _has_runs(data):
        return data, offsets
    squeezed, ends = np.empty(len(data), np.uint8), np.zeros_like(offsets)
    return squeezed[: _squeeze(data, offsets, classes, squeezed, ends)], ends


@njit(nogil=True, cache=True)
def _has_runs(data):
    found = False
    for at in range(1, len(data)):
        found |= (data[at] == 0x20) & (data[at - 1] == 0x20)
    for byte in data:
        found |= (byte >= 0x09) & (byte <= 0x0D)
    return found


@njit(nogil=True, cache=True)
def _squeeze(data, offsets, classes, squeezed, ends):
    place = 0
    for text in range(len(offsets) - 1):
        at, end, before = offsets[text], offsets[text + 1], EDGE
        while at < end:
            kind, size = class_at(data, at, classes)
            start = at
            at += size
            if kind == SPACE:
                after = SPACE
                while at < end and after == SPACE:
                    after, size = class_at(data, at, classes)
                    at += size if after == SPACE else 0
                if before != UNSAFE and after != UNSAFE and after != SPACE:
                    squeezed[place] = 0x20
                    place += 1
                    before = SPACE
                    continue
            for k in range(start, at):
                squeezed[place] = data[k]
                place += 1
            before = kind
        ends[text + 1] = place
    return place
