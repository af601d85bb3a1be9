"""Shortest-pack-first histogram packing (arXiv 2107.02027, section 3.1), compiled.

1. Walk the lengths from the longest to the shortest; n sequences have the length at hand.
2. Find the open packs with the most space left: a group of packs with equal content, and their number.
3. If the length fits, give every pack of the group as many copies as it takes and as n allows; if n is smaller than the
   group, only n packs of it get one, and the others stay a group of their own.
4. If it fits nowhere, open as few new packs as hold all n, each with as many copies as the next, give or take one.
5. A pack that is full or as deep as max_sequences_per_pack is closed. Stop when no length is left.
6. Do it again, but open a pack per sequence in step 4. Keep what has fewer packs.

The published listing is variant 6 alone, with one copy a visit in step 3: there a corpus of equal short lengths is not
packed at all. On both published histograms step 4 needs fewer packs at every depth; on a few dozen sequences variant 6
sometimes saves one.

Cost: a visit leaves a pack less than half of its space (what remains is less than a copy), and a length starts at most
three groups, so there are O(distinct lengths * log max_sequence_length) steps whatever the counts. The fullest group is
found by a bitmap over remaining space: 64-bit words in four levels reach 64**4 = 16,777,216.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .plan import PackPlan


def spfhp(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None) -> PackPlan:
    """Pack a checked histogram, longest lengths first, into the emptiest open packs.

    {5: 1, 3: 2, 1: 1} into 6 slots -> 5 | 3 3 | then 1 goes to the pack of 5: (1, 5) x 1, (3, 3) x 1
    """
    depth_limit = max_sequences_per_pack or max_sequence_length
    variants = [_pack_histogram(histogram, max_sequence_length, depth_limit, share) for share in (True, False)]
    nodes, groups = min(variants, key=lambda variant: variant[1][:, COUNT].sum())
    lengths, offsets = _unroll(nodes, groups)
    return PackPlan(max_sequence_length, max_sequences_per_pack, lengths, offsets, groups[:, COUNT].copy(), "spfhp")


# A pack's content is a chain of nodes (length, copies, the node before), so that groups share their beginnings.
# A group is (number of packs, space left, depth, last node, next group with as much space).
LENGTH, COPIES, BEFORE = 0, 1, 2
COUNT, SPACE, DEPTH, LAST, NEXT = 0, 1, 2, 3, 4
NONE = -1


@njit(cache=True)
def _pack_histogram(histogram, max_sequence_length, depth_limit, share):
    """Steps 1 to 5; share: new packs take more than one copy. Returns nodes (…, 3) and groups (…, 5).

    A group stays in the table when its packs are closed: in the end, every pack is in exactly one group."""
    nodes, num_nodes = np.empty((256, 3), np.int64), 0
    groups, num_groups = np.empty((256, 5), np.int64), 0
    heads = np.full(max_sequence_length + 1, NONE, np.int64)  # space -> first open group with that much space
    bits = np.zeros((4, max_sequence_length // 64 + 1), np.uint64)
    for length in range(max_sequence_length, 0, -1):
        left = histogram[length]
        while left > 0:
            nodes, groups = _with_room(nodes, num_nodes + 2), _with_room(groups, num_groups + 2)
            space = _most_space(bits)
            if space >= length:
                group = heads[space]
                packs, depth, before = groups[group, COUNT], groups[group, DEPTH], groups[group, LAST]
                if left < packs:  # the rest of the group stays open as it is
                    groups[group, COUNT] -= left
                    packs, group = left, num_groups
                    num_groups += 1
                else:
                    _take_out(group, groups, heads, bits)
                copies = min(space // length, depth_limit - depth, left // packs)
                _write_node(nodes, num_nodes, length, copies, before)
                _write_group(groups, group, packs, space - copies * length, depth + copies, num_nodes)
                _keep_open(group, groups, heads, bits, depth_limit)
                num_nodes += 1
                left -= packs * copies
            else:
                most = min(max_sequence_length // length, depth_limit) if share else 1
                packs = (left + most - 1) // most
                copies, more = left // packs, left % packs  # `more` packs hold one copy more
                for packs, copies in ((more, copies + 1), (packs - more, copies)):  # noqa: B020
                    if packs > 0:
                        _write_node(nodes, num_nodes, length, copies, NONE)
                        space = max_sequence_length - copies * length
                        _write_group(groups, num_groups, packs, space, copies, num_nodes)
                        _keep_open(num_groups, groups, heads, bits, depth_limit)
                        num_nodes, num_groups = num_nodes + 1, num_groups + 1
                left = 0
    return nodes[:num_nodes], groups[:num_groups]


@njit(cache=True)
def _unroll(nodes, groups):
    """Write out every group's lengths, last node first, which is ascending: strategy_lengths, strategy_offsets."""
    offsets = np.zeros(len(groups) + 1, np.int64)
    for group in range(len(groups)):
        offsets[group + 1] = offsets[group] + groups[group, DEPTH]
    lengths = np.empty(offsets[-1], np.int32)
    for group in range(len(groups)):
        filled, node = offsets[group], groups[group, LAST]
        while node != NONE:
            copies = nodes[node, COPIES]
            for slot in range(filled, filled + copies):
                lengths[slot] = nodes[node, LENGTH]
            filled, node = filled + copies, nodes[node, BEFORE]
    return lengths, offsets


@njit(cache=True)
def _write_node(nodes, node, length, copies, before):
    nodes[node, LENGTH], nodes[node, COPIES], nodes[node, BEFORE] = length, copies, before


@njit(cache=True)
def _write_group(groups, group, packs, space, depth, last):
    groups[group, COUNT], groups[group, SPACE], groups[group, DEPTH] = packs, space, depth
    groups[group, LAST], groups[group, NEXT] = last, NONE


@njit(cache=True)
def _keep_open(group, groups, heads, bits, depth_limit):
    """File the group under its space, unless its packs are full or deep enough. In place."""
    space = groups[group, SPACE]
    if space == 0 or groups[group, DEPTH] >= depth_limit:
        return
    groups[group, NEXT] = heads[space]
    heads[space] = group
    index = space
    for level in range(4):
        bits[level, index >> 6] |= np.uint64(1) << np.uint64(index & 63)
        index >>= 6


@njit(cache=True)
def _take_out(group, groups, heads, bits):
    """Take the first group out of its space; levels above a word that is empty now hear of it. In place."""
    index = groups[group, SPACE]
    heads[index] = groups[group, NEXT]
    if heads[index] != NONE:
        return
    for level in range(4):
        bits[level, index >> 6] ^= np.uint64(1) << np.uint64(index & 63)
        if bits[level, index >> 6] != 0:
            return
        index >>= 6


@njit(cache=True)
def _most_space(bits):
    """The most space that any open pack has; 0 if no pack is open (a full pack is not)."""
    index = 0
    if bits[3, 0] != 0:
        for level in (3, 2, 1, 0):
            index = (index << 6) + _top_bit(bits[level, index])
    return index


@njit(cache=True)
def _top_bit(word):
    """Number of the highest 1 in a 64-bit word: 0b100 -> 2."""
    number = 0
    for step in (32, 16, 8, 4, 2, 1):
        if word >> np.uint64(step):
            word >>= np.uint64(step)
            number += step
    return number


@njit(cache=True)
def _with_room(table, rows):
    """The table, or a copy twice as long if it has fewer rows than asked for."""
    if rows <= len(table):
        return table
    longer = np.empty((2 * len(table), table.shape[1]), np.int64)
    for row in range(len(table)):  # longer[:rows] = table is one line, but takes Numba five seconds to compile
        for column in range(table.shape[1]):
            longer[row, column] = table[row, column]
    return longer
