"""What a verification finds: problems with their places, all of them counted and the first ones listed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from packing.files.metadata import shown

CHECKS = {
    "files": "every file is there, with the bytes that were written",
    "columns": "columns and types are those that packing made",
    "packs": "lengths add up, no pack is over its limits, and there are as many as were made",
    "sequences": "every source row exactly once",
    "source": "every value is the source's",
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where.

    check: a name in CHECKS. pack: number of the pack. sequence, position: the slot and the token in it, from 0.
    row: row of the source. None: does not apply.
    """

    check: str
    what: str
    file: str | None = None
    pack: int | None = None
    sequence: int | None = None
    position: int | None = None
    row: int | None = None
    column: str | None = None
    expected: object = None
    found: object = None

    def __str__(self) -> str:
        named = {"file": self.file, "pack": self.pack, "sequence": self.sequence, "position": self.position}
        named |= {"source row": self.row, "column": self.column}
        place = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
        values = ""
        if self.expected is not None or self.found is not None:
            values = f": {shown(self.found)} found, {shown(self.expected)} expected"
        return f"{place}: {self.what}{values}" if place else f"{self.what}{values}"


class Findings:
    """Counts all problems, and keeps the first `limit` of each check."""

    def __init__(self, limit: int):
        self.limit = limit
        self.counts = dict.fromkeys(CHECKS, 0)
        self.problems: list[Problem] = []

    def add(self, check: str, what: str, **where: Any) -> None:
        self.counts[check] += 1
        if self.counts[check] <= self.limit:
            self.problems.append(Problem(check=check, what=what, **where))

    def add_all(
        self, check: str, what: str, wrong: np.ndarray, where: Callable[[int], dict] = lambda i: {}, **fields: Any
    ) -> None:
        """Add a problem for each i with wrong[i]; where(i) is called only for those that are kept.

        fields: more fields of a Problem, each an array with its values for all i, or one value.
        """
        places = np.flatnonzero(wrong)
        room = max(0, self.limit - self.counts[check])
        self.counts[check] += len(places)
        for i in places[:room].tolist():
            own = {name: value[i].item() if isinstance(value, np.ndarray) else value for name, value in fields.items()}
            self.problems.append(Problem(check=check, what=what, **where(i) | own))

    @contextmanager
    def reading(self, file: str) -> Iterator[None]:
        """Add a problem of this file where it cannot be read."""
        try:
            yield
        except FileNotFoundError:
            self.add("files", "is missing; pack the source again", file=file)
        except (ValueError, OSError) as error:
            self.add("files", f"cannot be read: {error}", file=file)


@dataclass(frozen=True, eq=False)
class Verification:
    """The outcome; str() is a table with the problems under it.

    looked_at: for each check, what it looked at, or why at nothing.
    counts: all problems of each check. problems: the first ones of each check.
    """

    looked_at: dict[str, str]
    counts: dict[str, int]
    problems: tuple[Problem, ...]

    @property
    def num_problems(self) -> int:
        return sum(self.counts.values())

    @property
    def ok(self) -> bool:
        return not self.num_problems

    def __str__(self) -> str:
        width = max(map(len, [*self.looked_at.values(), "looked at"]))
        lines = [f"{'check':9}  {'looked at':{width}}  problems"]
        lines += [f"{check:9}  {self.looked_at[check]:{width}}  {self.counts[check]:8,}" for check in CHECKS]
        for check in CHECKS:
            listed = [problem for problem in self.problems if problem.check == check]
            lines += [f"{check}: {problem}" for problem in listed]
            if more := self.counts[check] - len(listed):
                lines.append(f"{check}: … and {more:,} more")
        total = f"{self.num_problems:,} problem{'s' if self.num_problems != 1 else ''}"
        return "\n".join([*lines, "verified: nothing is wrong" if self.ok else f"not verified: {total}"])
