"""Longest-pack-first histogram packing (arXiv 2107.02027, appendix), compiled: best fit, longest lengths first.

1. Walk the lengths from the longest to the shortest; n sequences have the current length.
2. Find the open packs with the least space that still holds the length. They are a group: packs of equal content.
3. Fill them one after the other with as many copies as each takes: after a copy a pack is fuller, so it is next again.
   The last pack may get fewer copies. Packs that get none stay in their group.
4. If the length fits nowhere, open new packs and fill them the same way.
5. Close a pack that is full or as deep as max_sequences_per_pack. Stop when no length is left.

This is best fit over single sequences, pack for pack, at the cost of a histogram. A visit leaves a pack less than half
of its space, and a length starts at most four groups: O(distinct lengths * log max_sequence_length) steps, whatever the
counts. A bitmap over space finds the group. The steps run in filling.py, where `optimal` starts them with open packs.
"""

from __future__ import annotations

import numpy as np

from packing.packers.filling import fill_longest_first
from packing.plan import PackPlan


def lpfhp(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None) -> PackPlan:
    """Pack a checked histogram, longest lengths first, into the fullest open packs that they fit.

    {4: 1, 3: 1, 2: 2, 1: 1} into 6 slots -> 4 | 3 | 4 2 | 3 2 | 3 2 1: (2, 4) x 1, (1, 2, 3) x 1
    """
    arrays = fill_longest_first(histogram, max_sequences_per_pack or max_sequence_length, {})
    return PackPlan(max_sequence_length, max_sequences_per_pack, *arrays, "lpfhp")
