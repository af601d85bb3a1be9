"""Open packs, grouped by content and filed by the space that they have left: the table of best and worst fit.

A pack's content is a chain of nodes (length, copies, the node before), so that groups share their beginnings.
A group is (number of packs, space left, depth, last node, next group with as much space). It stays in the table when
its packs are closed: in the end, every pack is in exactly one group. A group whose packs all moved on has none left.

A bitmap over space finds the group with the most space, or with the least that fits. It has a 1 for each space that an
open pack has, in 64-bit words; words above them tell which words hold a 1. Four levels reach 64**4 = 16,777,216.
"""

from __future__ import annotations

import numpy as np

from packing.numba_tools import njit

LENGTH, COPIES, BEFORE = 0, 1, 2
COUNT, SPACE, DEPTH, LAST, NEXT = 0, 1, 2, 3, 4
NONE = -1


@njit(cache=True)
def no_open_packs(max_sequence_length):
    """nodes (…, 3), groups (…, 5), heads: space -> first open group with that much space, and the bitmap over heads."""
    nodes, groups = np.empty((256, 3), np.int64), np.empty((256, 5), np.int64)
    heads = np.empty(max_sequence_length + 1, np.int64)
    for space in range(len(heads)):  # np.full takes Numba half a second to compile
        heads[space] = NONE
    return nodes, groups, heads, np.zeros((4, max_sequence_length // 64 + 1), np.uint64)


@njit(cache=True)
def unroll(nodes, groups):
    """Write out every group's lengths, ascending: strategy_lengths, strategy_offsets."""
    offsets = np.zeros(len(groups) + 1, np.int64)
    for group in range(len(groups)):
        offsets[group + 1] = offsets[group] + groups[group, DEPTH]
    lengths = np.empty(offsets[-1], np.int32)
    for group in range(len(groups)):
        filled, node = offsets[group], groups[group, LAST]
        while node != NONE:
            length, copies = nodes[node, LENGTH], nodes[node, COPIES]
            for slot in range(filled, filled + copies):
                while slot > offsets[group] and lengths[slot - 1] > length:  # only where a pack was reopened
                    lengths[slot] = lengths[slot - 1]
                    slot -= 1
                lengths[slot] = length
            filled, node = filled + copies, nodes[node, BEFORE]
    return lengths, offsets


@njit(cache=True)
def write_node(nodes, node, length, copies, before):
    """Fill one row of nodes, in place."""
    nodes[node, LENGTH], nodes[node, COPIES], nodes[node, BEFORE] = length, copies, before


@njit(cache=True)
def write_group(groups, group, packs, space, depth, last):
    """Fill one row of groups, in place; no group comes after it yet."""
    groups[group, COUNT], groups[group, SPACE], groups[group, DEPTH] = packs, space, depth
    groups[group, LAST], groups[group, NEXT] = last, NONE


@njit(cache=True)
def keep_open(group, groups, heads, bits, depth_limit):
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
def take_out(group, groups, heads, bits):
    """Take the first group out of its space, and clear the bits above a word that becomes empty. In place."""
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
def most_space(bits):
    """The most space that any open pack has; 0 if no pack is open (a full pack is not)."""
    index = 0
    if bits[3, 0] != 0:
        for level in (3, 2, 1, 0):
            index = (index << 6) + _top_bit(bits[level, index])
    return index


@njit(cache=True)
def least_space(bits, length):
    """The least space of at least `length` that any open pack has; 0 if none has as much."""
    index = length
    for level in range(4):
        word = bits[level, index >> 6] >> np.uint64(index & 63)
        if word != 0:
            index += _top_bit(word & (~word + np.uint64(1)))
            for below in range(level - 1, -1, -1):
                word = bits[below, index]
                index = (index << 6) + _top_bit(word & (~word + np.uint64(1)))
            return index
        index = (index >> 6) + 1
    return 0


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
def with_room(table, rows):
    """The table, or a copy with twice so many rows if it has fewer."""
    if rows <= len(table):
        return table
    longer = np.empty((2 * rows, table.shape[1]), np.int64)
    for row in range(len(table)):  # longer[:rows] = table is one line, but takes Numba five seconds to compile
        for column in range(table.shape[1]):
            longer[row, column] = table[row, column]
    return longer
