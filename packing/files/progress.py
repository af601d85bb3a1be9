"""Progress on stderr: a bar in a terminal or a notebook; lines anywhere else, such as in a log file.

packing:  46% 12288/26624 [01:00<01:10, 204.80pack/s]
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import auto, std

SECONDS = 60.0  # wait this long after each line


def progress_bar(*arguments: Any, **options: Any) -> std.tqdm:
    """tqdm with these arguments, for where stderr goes."""
    has_bars = sys.stderr.isatty() or auto.notebook_tqdm is not std.tqdm
    return (auto.tqdm if has_bars else _Lines)(*arguments, **options)


class _Lines(std.tqdm):
    """A line a minute and one at the end: no carriage returns, no bar, nothing before there is progress."""

    def __init__(self, *arguments: Any, **options: Any):
        lines = {"ncols": 0, "leave": False, "mininterval": SECONDS, "maxinterval": SECONDS}
        super().__init__(*arguments, **options | lines)

    printed = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.n != self.printed:
            self.fp.write(f"{self}\n")
            self.printed = self.n
        return False  # there is nothing to clear

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        super().set_postfix_str(s, refresh=False)
