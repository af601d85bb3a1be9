"""How deep JSON is nested, looked at before a parser: Arrow's ends the process at great depths, Python's gives up."""

from __future__ import annotations

import numpy as np

from packing.numba_tools import njit

MOST = 60  # lists and objects around a value; Arrow hands on types of 64 at most


def check_depth(data: bytes, first_line: int = 1) -> None:
    """Raise ValueError, naming the line, where brackets are nested too deep. Brackets in strings do not count."""
    place = _first_deeper(np.frombuffer(data, np.uint8), MOST)
    if place >= 0:
        line = first_line + data.count(b"\n", 0, place)
        raise ValueError(f"line {line} is nested more than {MOST} deep; rows of a table are not: flatten them")


@njit(cache=True, nogil=True)
def _first_deeper(data, most):
    """Where the bracket lies that is nested deeper than `most`, or -1. A string never reaches over a line's end."""
    depth, in_string, i = 0, False, 0
    while i < len(data):
        byte = data[i]
        if in_string:
            if byte == 92:  # backslash
                i += 1
            elif byte == 34 or byte == 10:
                in_string = False
        elif byte == 34:
            in_string = True
        elif byte == 91 or byte == 123:
            depth += 1
            if depth > most:
                return i
        elif byte == 93 or byte == 125:
            depth = max(0, depth - 1)
        i += 1
    return -1
