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

from packing.numba_tools import njit
from packing.packers.filling import add_longest_first, fill_longest_first
from packing.packers.open_packs import COUNT, no_open_packs, unroll
from packing.plan import PackPlan


def lpfhp(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None) -> PackPlan:
    """Pack a checked histogram, longest lengths first, into the fullest open packs that they fit.

    {4: 1, 3: 1, 2: 2, 1: 1} into 6 slots -> 4 | 3 | 4 2 | 3 2 | 3 2 1: (2, 4) x 1, (1, 2, 3) x 1
    """
    arrays = fill_longest_first(histogram, max_sequences_per_pack or max_sequence_length, {})
    return PackPlan(max_sequence_length, max_sequences_per_pack, *arrays, "lpfhp")


def lpfhp_each(
    lengths: np.ndarray, cell_offsets: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pack every cell apart, as lpfhp does: lengths, offsets and repeats of all strategies, and how many a cell has.

    lengths: of the sequences, cell after cell, ascending in each. cell_offsets: (cells + 1,) where each begins.
    """
    depth_limit = max_sequences_per_pack or max_sequence_length
    flat, ends = np.empty(len(lengths), np.int32), np.empty(len(lengths) + 1, np.int64)
    repeats, counts = np.empty(len(lengths), np.int64), np.empty(len(cell_offsets) - 1, np.int64)
    filled, strategies = _pack_each(
        lengths, cell_offsets, max_sequence_length, depth_limit, flat, ends, repeats, counts
    )
    return flat[:filled], ends[: strategies + 1], repeats[:strategies], counts


@njit(cache=True, nogil=True)
def _pack_each(lengths, cell_offsets, max_sequence_length, depth_limit, flat, ends, repeats, counts):
    """Fills flat, ends, repeats and counts; returns how many slots and strategies there are."""
    different, of_each = np.empty(max_sequence_length, np.int64), np.empty(max_sequence_length, np.int64)
    filled, strategies = 0, 0
    ends[0] = 0
    for cell in range(len(counts)):
        before, kinds = strategies, 0
        for i in range(cell_offsets[cell + 1] - 1, cell_offsets[cell] - 1, -1):
            if kinds > 0 and different[kinds - 1] == lengths[i]:
                of_each[kinds - 1] += 1
            else:
                different[kinds], of_each[kinds] = lengths[i], 1
                kinds += 1
        if kinds > 0:
            nodes, groups, heads, bits = no_open_packs(max_sequence_length)
            nodes, groups = add_longest_first(
                different[:kinds], of_each[:kinds], depth_limit, nodes, groups, heads, bits, 0, 0
            )
            content, offsets = unroll(nodes, groups)
            for group in range(len(groups)):
                if groups[group, COUNT] > 0:  # all packs of the others moved on
                    for slot in range(offsets[group], offsets[group + 1]):
                        flat[filled] = content[slot]
                        filled += 1
                    repeats[strategies] = groups[group, COUNT]
                    strategies += 1
                    ends[strategies] = filled
        counts[cell] = strategies - before
    return filled, strategies
