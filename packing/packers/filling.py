"""Sequences into slots, and best fit into whatever space the slots leave.

A slot takes the longest sequence that is left and no longer than the slot. Slots are nested (what fits the shorter fits
the longer), so in whatever order they choose, they place as many sequences as any choice does.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from packing.numba_tools import njit
from packing.packers.lpfhp import fill_longest_first
from packing.packers.open_packs import (
    COUNT,
    NONE,
    keep_open,
    no_open_packs,
    unroll,
    with_room,
    write_group,
    write_node,
)

Packs = dict[tuple[int, ...], int]  # ascending lengths in a pack -> packs


def fill_slots(slots: Mapping[tuple[int, ...], int], left: np.ndarray) -> Packs:
    """Fill packs of slots, {slots: packs}, from a histogram. In place on left; empty packs are dropped.

    {(3, 3): 2} with left = {3: 1, 2: 2} -> {(2, 3): 1, (2,): 1}
    """
    below = np.arange(len(left)) - 1  # where to look for a length when this one is used up; shortened on the way
    most = len(slots) + 2 * np.count_nonzero(left)  # a content ends a strategy or all but ends a length
    return _as_packs(*_fill_slots(*_as_arrays(slots), left, below, most))


def best_fit(packs: Packs, left: np.ndarray, depth: int) -> Packs:
    """Place what is left, longest first, into the fullest packs with room and into new ones; `packs` stays as it is."""
    if not left.any():
        return dict(packs)
    limit, shortest = len(left) - 1, int(np.argmax(left > 0))
    roomy = {pack: n for pack, n in packs.items() if len(pack) < depth and sum(pack) + shortest <= limit}
    placed = {pack: n for pack, n in packs.items() if pack not in roomy}
    nodes, groups, heads, bits, num_nodes = _open_packs(*_as_arrays(roomy), depth, limit)
    nodes, groups = fill_longest_first(left, depth, nodes, groups, heads, bits, num_nodes, len(roomy))
    groups = groups[groups[:, COUNT] > 0]
    lengths, offsets = unroll(nodes, groups)
    return add_packs(placed, _as_packs(lengths, offsets, groups[:, COUNT]))


def add_packs(packs: Packs, more: Packs) -> Packs:
    """Packs of equal content are counted together. In place on packs, which is returned."""
    for pack, number in more.items():
        packs[pack] = packs.get(pack, 0) + number
    return packs


def _as_arrays(packs: Mapping[tuple[int, ...], int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """lengths, offsets, repeats: int64, flat."""
    lengths = np.array([length for pack in packs for length in pack], np.int64)
    return lengths, np.cumsum([0, *map(len, packs)]), np.array(list(packs.values()), np.int64)


def _as_packs(lengths: np.ndarray, offsets: np.ndarray, repeats: np.ndarray) -> Packs:
    flat, packs = lengths.tolist(), Packs()
    for (first, end), number in zip(pairwise(offsets.tolist()), repeats.tolist(), strict=False):
        pack = tuple(flat[first:end])
        packs[pack] = packs.get(pack, 0) + number
    return packs


@njit(cache=True)
def _fill_slots(slots, offsets, repeats, left, below, most):
    """One content is written at a time, for as many packs as there are sequences: lengths, offsets, repeats."""
    filled, ends, times = np.empty(1024, np.int64), np.zeros(most + 1, np.int64), np.empty(most, np.int64)
    count = 0
    for strategy in range(len(repeats)):
        packs = repeats[strategy]
        while packs > 0:
            first = end = ends[count]
            filled = _longer(filled, first + offsets[strategy + 1] - offsets[strategy])
            for slot in range(offsets[strategy + 1] - 1, offsets[strategy] - 1, -1):
                length = _longest_left(slots[slot], left, below)
                if length > 0:
                    left[length] -= 1
                    filled[end] = length
                    end += 1
            if end == first:  # nothing is left for these slots
                break
            times[count] = _repeat_content(filled, first, end, left, packs)
            packs -= times[count]
            count += 1
            ends[count] = end
    return filled[: ends[count]], ends[: count + 1], times[:count]


@njit(cache=True)
def _longest_left(slot, left, below):
    """The longest length up to `slot` of which a sequence is left; 0 if there is none."""
    length = slot
    while length > 0 and left[length] == 0:
        length = below[length]
    while slot > length:  # the next search from here need not walk
        following = below[slot]
        below[slot] = length
        slot = following
    return max(length, 0)


@njit(cache=True)
def _repeat_content(filled, first, end, left, packs):
    """How many of `packs` can have the content filled[first:end], which was taken from `left` once, longest first.

    Takes the others too, and turns the content around. In place."""
    times, copies = packs, 0
    for slot in range(first, end):
        length = filled[slot]
        copies = copies + 1 if slot > first and filled[slot - 1] == length else 1
        times = min(times, left[length] // copies + 1)  # exact at the last copy; before that it is no less
    for slot in range(first, end):
        left[filled[slot]] -= times - 1
    for slot in range((end - first) // 2):
        filled[first + slot], filled[end - 1 - slot] = filled[end - 1 - slot], filled[first + slot]
    return times


@njit(cache=True)
def _longer(values, size):
    """The values, or a copy twice as long as asked for if they are fewer than `size`."""
    if size <= len(values):
        return values
    longer = np.empty(2 * size, np.int64)
    for i in range(len(values)):  # longer[:n] = values takes Numba five seconds to compile
        longer[i] = values[i]
    return longer


@njit(cache=True)
def _open_packs(lengths, offsets, repeats, depth, limit):
    """The packs as groups: nodes, groups, heads, bits and the number of nodes, for fill_longest_first to go on with."""
    nodes, groups, heads, bits = no_open_packs(limit)
    num_nodes = 0
    for group in range(len(repeats)):
        sequences, last, tokens = offsets[group + 1] - offsets[group], NONE, 0
        nodes, groups = with_room(nodes, num_nodes + sequences), with_room(groups, group + 1)
        for slot in range(offsets[group + 1] - 1, offsets[group] - 1, -1):
            write_node(nodes, num_nodes, lengths[slot], 1, last)
            last, num_nodes, tokens = num_nodes, num_nodes + 1, tokens + lengths[slot]
        write_group(groups, group, repeats[group], limit - tokens, sequences, last)
        keep_open(group, groups, heads, bits, depth)
    return nodes, groups, heads, bits, num_nodes
