"""Shortest-pack-first histogram packing (arXiv 2107.02027, section 3.1), compiled.

1. Walk the lengths from the longest to the shortest; n sequences have the current length.
2. Find the open packs with the most space left. They are a group: packs of equal content.
3. If the length fits, give every pack of the group as many copies as it takes and as n allows. If n is smaller than the
   group, n of its packs get one copy each, and the others stay in their group.
4. If it fits nowhere, open as few new packs as hold all n, and spread the copies evenly over them.
5. Close a pack that is full or as deep as max_sequences_per_pack. Stop when no length is left.
6. Do it again, but open a pack per sequence in step 4. Keep the result with fewer packs.

The published listing is variant 6 alone, with one copy a visit in step 3: it does not pack a corpus of equal short
lengths at all. On both published histograms step 4 needs fewer packs at every depth; on a few dozen sequences variant 6
sometimes saves one.

Cost: a visit leaves a pack less than half of its space (less than a copy), and a length starts at most three groups:
O(distinct lengths * log max_sequence_length) steps, whatever the counts. A bitmap over space finds the emptiest group.
"""

from __future__ import annotations

import numpy as np

from packing.numba_tools import njit
from packing.packers.open_packs import (
    COUNT,
    DEPTH,
    LAST,
    NONE,
    keep_open,
    most_space,
    no_open_packs,
    take_out,
    unroll,
    with_room,
    write_group,
    write_node,
)
from packing.plan import PackPlan


def spfhp(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None) -> PackPlan:
    """Pack a checked histogram, longest lengths first, into the emptiest open packs.

    {5: 1, 3: 2, 1: 1} into 6 slots -> 5 | 3 3 | then 1 goes to the pack of 5: (1, 5) x 1, (3, 3) x 1
    """
    depth_limit = max_sequences_per_pack or max_sequence_length
    variants = [_pack_histogram(histogram, max_sequence_length, depth_limit, share) for share in (True, False)]
    nodes, groups = min(variants, key=lambda variant: variant[1][:, COUNT].sum())
    lengths, offsets = unroll(nodes, groups)
    return PackPlan(max_sequence_length, max_sequences_per_pack, lengths, offsets, groups[:, COUNT].copy(), "spfhp")


@njit(cache=True)
def _pack_histogram(histogram, max_sequence_length, depth_limit, share):
    """Steps 1 to 5; share: new packs take more than one copy. Returns nodes (…, 3) and groups (…, 5)."""
    nodes, groups, heads, bits = no_open_packs(max_sequence_length)
    num_nodes = num_groups = 0
    for length in range(max_sequence_length, 0, -1):
        left = histogram[length]
        while left > 0:
            nodes, groups = with_room(nodes, num_nodes + 2), with_room(groups, num_groups + 2)
            space = most_space(bits)
            if space >= length:
                group = heads[space]
                packs, depth, before = groups[group, COUNT], groups[group, DEPTH], groups[group, LAST]
                if left < packs:  # the rest of the group stays open as it is
                    groups[group, COUNT] -= left
                    packs, group = left, num_groups
                    num_groups += 1
                else:
                    take_out(group, groups, heads, bits)
                copies = min(space // length, depth_limit - depth, left // packs)
                write_node(nodes, num_nodes, length, copies, before)
                write_group(groups, group, packs, space - copies * length, depth + copies, num_nodes)
                keep_open(group, groups, heads, bits, depth_limit)
                num_nodes += 1
                left -= packs * copies
            else:
                most = min(max_sequence_length // length, depth_limit) if share else 1
                packs = (left + most - 1) // most
                copies, more = left // packs, left % packs  # `more` packs hold one copy more
                for packs, copies in ((more, copies + 1), (packs - more, copies)):  # noqa: B020
                    if packs > 0:
                        write_node(nodes, num_nodes, length, copies, NONE)
                        space = max_sequence_length - copies * length
                        write_group(groups, num_groups, packs, space, copies, num_nodes)
                        keep_open(num_groups, groups, heads, bits, depth_limit)
                        num_nodes, num_groups = num_nodes + 1, num_groups + 1
                left = 0
    return nodes[:num_nodes], groups[:num_groups]
