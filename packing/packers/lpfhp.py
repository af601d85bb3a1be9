"""Longest-pack-first histogram packing (arXiv 2107.02027, appendix), compiled: best fit, longest lengths first.

1. Walk the lengths from the longest to the shortest; n sequences have the length at hand.
2. Find the open packs with the least space that still holds the length: a group of packs with equal content.
3. Fill them one after the other, each with as many copies as it takes: after a copy it is fuller, so the next choice.
   The last pack may get fewer, and packs of the group that get none stay a group of their own.
4. If the length fits nowhere, open new packs and fill them the same way.
5. A pack that is full or as deep as max_sequences_per_pack is closed. Stop when no length is left.

That is best fit over single sequences, pack for pack, at the cost of a histogram: a visit leaves a pack less than half
of its space, and a length starts at most four groups, so there are O(distinct lengths * log max_sequence_length) steps
whatever the counts. The group is found by a bitmap over remaining space.
"""

from __future__ import annotations

import numpy as np

from packing.numba_tools import njit
from packing.packers.open_packs import (
    COUNT,
    DEPTH,
    NONE,
    SPACE,
    give_copies,
    keep_open,
    least_space,
    no_open_packs,
    take_out,
    unroll,
    with_room,
    write_group,
)
from packing.plan import PackPlan


def lpfhp(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None) -> PackPlan:
    """Pack a checked histogram, longest lengths first, into the fullest open packs that they fit.

    {4: 1, 3: 1, 2: 2, 1: 1} into 6 slots -> 4 | 3 | 4 2 | 3 2 | 3 2 1: (2, 4) x 1, (1, 2, 3) x 1
    """
    depth_limit = max_sequences_per_pack or max_sequence_length
    nodes, groups, heads, bits = no_open_packs(max_sequence_length)
    nodes, groups = fill_longest_first(histogram, depth_limit, nodes, groups, heads, bits, 0, 0)
    groups = groups[groups[:, COUNT] > 0]  # some have none left
    lengths, offsets = unroll(nodes, groups)
    return PackPlan(max_sequence_length, max_sequences_per_pack, lengths, offsets, groups[:, COUNT].copy(), "lpfhp")


@njit(cache=True)
def fill_longest_first(histogram, depth_limit, nodes, groups, heads, bits, num_nodes, num_groups):
    """Steps 1 to 5, into packs that may be open already. Returns nodes (…, 3) and groups (…, 5) with the new ones."""
    max_sequence_length = len(heads) - 1
    for length in range(max_sequence_length, 0, -1):
        left = histogram[length]
        while left > 0:
            nodes, groups = with_room(nodes, num_nodes + 2), with_room(groups, num_groups + 3)
            space = least_space(bits, length)
            group = heads[space] if space > 0 else num_groups
            if space == 0:  # as many new packs as need be
                write_group(groups, group, left, max_sequence_length, 0, NONE)
                num_groups += 1
            first = num_groups
            copies = min(groups[group, SPACE] // length, depth_limit - groups[group, DEPTH])
            left, num_nodes, num_groups = give_copies(length, copies, left, group, nodes, groups, num_nodes, num_groups)
            if space == 0:
                groups[group, COUNT] = 0
            elif groups[group, COUNT] == 0:
                take_out(group, groups, heads, bits)
            for group in range(first, num_groups):
                keep_open(group, groups, heads, bits, depth_limit)
    return nodes[:num_nodes], groups[:num_groups]
