"""Packs with cohorts: each in one cohort, round and lane, in their order; and a document's pieces, one a round.

pack   cohort  round  lane   sequences of documents
0      0       0      0      a0 c0                     sound
1      0       0      1      b0
2      0       1      1      a1                        a0 lies in another lane
3      0       3      0      c1                        round 3 holds piece 1
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from packing.store.info import CELL, PackedInfo
from packing.verify.findings import Findings

if TYPE_CHECKING:
    from packing.verify.packs import PackedSequences

COHORTS, ROUNDS, LANES = CELL


class CohortCheck:
    """Checks the order of packs, block by block, and at the end how many documents the cohorts have."""

    def __init__(self, facts: PackedInfo, findings: Findings):
        assert facts.cohort and facts.cohort_lanes and facts.source_rows is not None
        self.cohort, self.lanes, self.findings = facts.cohort, facts.cohort_lanes, findings
        self._last = np.zeros((1, 3), np.int64)  # cohort, round and lane of the sequence before
        self._last_pack = -1
        self._documents = np.zeros(-(-facts.source_rows // facts.cohort), np.int64)  # of each cohort

    def check(self, sequences: PackedSequences) -> None:
        """Look at the sequences of one block; cells: (n, 3) cohort, round and lane of each."""
        places, packs = sequences.cells, sequences.packs
        if places is None or not len(places):
            return
        add = partial(self.findings.add_all, "packs", where=sequences.where)
        outside = (places < 0) | (places >= [len(self._documents), 2**31, self.lanes])
        for column, wrong, found in zip(CELL, outside.T, places.T, strict=True):
            add("a number that no cohort, round or lane has", wrong, column=column, found=found)
        step = np.diff(places, axis=0, prepend=self._last)
        first = step[np.arange(len(step)), (step != 0).argmax(1)]  # that of the cohort, else of the round, else …
        is_mate = packs == np.append(self._last_pack, packs[:-1])
        add("lies in another cohort, round or lane than its pack", is_mate & (first != 0), column=COHORTS)
        add("lies before a pack of an earlier cohort, round or lane", ~is_mate & (first < 0), column=COHORTS)
        self._last, self._last_pack = places[-1:], int(packs[-1])
        begin = places[~outside.any(1) & (places[:, 1] == 0), 0]
        self._documents += np.bincount(begin, minlength=len(self._documents))

    def finish(self) -> None:
        what = f"documents begin in cohort {{}}, more than cohort={self.cohort}"
        for number in np.flatnonzero(self._documents > self.cohort).tolist():
            found = int(self._documents[number])
            self.findings.add("packs", what.format(number), column=COHORTS, found=found, expected=self.cohort)


def check_order(places: np.ndarray, is_first: np.ndarray, add: Callable[..., Any]) -> None:
    """Pieces of one document after the other, in order: round 0, 1, 2…, all in its cohort and lane.

    places: (pieces, 3). is_first: (pieces,) where a document begins. add(what, wrong, column=, found=, expected=)
    """
    begins = np.flatnonzero(is_first)
    number = np.arange(len(is_first)) - np.repeat(begins, np.diff(np.append(begins, len(is_first))))
    before = np.roll(places, 1, axis=0)
    for axis, column in ((0, COHORTS), (2, LANES)):
        wrong = ~is_first & (places[:, axis] != before[:, axis])
        values = {"found": places[:, axis], "expected": before[:, axis]}
        add("another cohort or lane than that of the piece before", wrong, column=column, **values)
    rounds = places[:, 1]
    add("another round than the piece's number", rounds != number, column=ROUNDS, found=rounds, expected=number)
