"""Sequences into slots, and best fit into the space that packs have left: what `lpfhp` and `optimal` share.

A slot takes the longest sequence that is left and fits it. Slots are nested (what fits the shorter one fits the longer
one), so they place as many sequences as any choice does, in whatever order they choose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from packing.numba_tools import njit
from packing.packers.open_packs import (
    COUNT,
    DEPTH,
    LAST,
    NONE,
    SPACE,
    keep_open,
    least_space,
    no_open_packs,
    take_out,
    unroll,
    with_room,
    write_group,
    write_node,
)

Strategy = tuple[int, ...]  # ascending lengths
Packs = Counter[Strategy]  # how many packs have this content


def fill_slots(slots: Mapping[Strategy, int], left: np.ndarray) -> Packs:
    """Fill packs of slots, {slots: packs}, from a histogram. In place on left; packs that stay empty are left out.

    {(3, 3): 2} with left = {3: 1, 2: 2} -> {(2, 3): 1, (2,): 1}
    """
    below = np.arange(len(left)) - 1  # look there next when a length is used up; paths get shorter on the way
    most = len(slots) + 2 * np.count_nonzero(left)  # a content ends a strategy, or all but ends a length
    return as_packs(*_fill_slots(*_as_arrays(slots), left, below, most))


def best_fit(packs: Mapping[Strategy, int], left: np.ndarray, depth: int) -> Packs:
    """Place what is left, longest first, into the fullest packs with room and into new ones; `packs` stays as it is."""
    if not left.any():
        return Packs(packs)
    limit, shortest = len(left) - 1, int(np.argmax(left > 0))
    roomy = {pack: n for pack, n in packs.items() if len(pack) < depth and sum(pack) + shortest <= limit}
    placed = Packs({pack: n for pack, n in packs.items() if pack not in roomy})
    placed.update(as_packs(*fill_longest_first(left, depth, roomy)))
    return placed


def fill_longest_first(
    histogram: np.ndarray, depth_limit: int, packs: Mapping[Strategy, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best fit, longest lengths first, into packs that have room and into new ones: lengths, offsets, repeats."""
    nodes, groups, heads, bits, num_nodes = _open_packs(*_as_arrays(packs), depth_limit, len(histogram) - 1)
    lengths = np.flatnonzero(histogram)[::-1].copy()
    nodes, groups = add_longest_first(
        lengths, histogram[lengths], depth_limit, nodes, groups, heads, bits, num_nodes, len(packs)
    )
    groups = groups[groups[:, COUNT] > 0]  # all packs of the others moved on
    return *unroll(nodes, groups), groups[:, COUNT].copy()


def as_packs(lengths: np.ndarray, offsets: np.ndarray, repeats: np.ndarray) -> Packs:
    """Packs of equal content are counted together."""
    flat, packs = lengths.tolist(), Packs()
    for (first, end), number in zip(pairwise(offsets.tolist()), repeats.tolist(), strict=True):
        packs[tuple(flat[first:end])] += number
    return packs


def _as_arrays(packs: Mapping[Strategy, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = np.array([length for pack in packs for length in pack], np.int64)
    return lengths, np.cumsum([0, *map(len, packs)]), np.array(list(packs.values()), np.int64)


@njit(cache=True)
def _fill_slots(slots, offsets, repeats, left, below, most):
    """Write each content once, with the number of packs that can have it: lengths, offsets, repeats."""
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
    """How many of `packs` can have the content filled[first:end], which `left` has already lost once, longest first.

    Takes the sequences of the other packs too, and reverses the content. In place."""
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
    """The values, or a copy twice as long as `size` if they are fewer than that."""
    if size <= len(values):
        return values
    longer = np.empty(2 * size, np.int64)
    for i in range(len(values)):  # longer[:n] = values takes Numba five seconds to compile
        longer[i] = values[i]
    return longer


@njit(cache=True)
def _open_packs(lengths, offsets, repeats, depth, limit):
    """The packs as groups: nodes, groups, heads, bits and the number of nodes."""
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


@njit(cache=True)
def add_longest_first(lengths, counts, depth_limit, nodes, groups, heads, bits, num_nodes, num_groups):
    """The steps of lpfhp, into packs that may be open already. Returns nodes (…, 3) and groups (…, 5) of all packs.

    lengths: different ones, the longest first. counts: sequences of each."""
    max_sequence_length = len(heads) - 1
    for kind in range(len(lengths)):  # not all lengths up to the longest: a turn of this loop costs 20 ns
        length, left = lengths[kind], counts[kind]
        while left > 0:
            nodes, groups = with_room(nodes, num_nodes + 2), with_room(groups, num_groups + 3)
            space = least_space(bits, length)
            group = heads[space] if space > 0 else num_groups
            if space == 0:  # open a pack for each sequence; those that get none are dropped below
                write_group(groups, group, left, max_sequence_length, 0, NONE)
                num_groups += 1
            first = num_groups
            copies = min(groups[group, SPACE] // length, depth_limit - groups[group, DEPTH])
            left, num_nodes, num_groups = _give(length, copies, left, group, nodes, groups, num_nodes, num_groups)
            if space == 0:
                groups[group, COUNT] = 0
            elif groups[group, COUNT] == 0:
                take_out(group, groups, heads, bits)
            for group in range(first, num_groups):
                keep_open(group, groups, heads, bits, depth_limit)
    return nodes[:num_nodes], groups[:num_groups]


@njit(cache=True)
def _give(length, copies, left, group, nodes, groups, num_nodes, num_groups):
    """Give packs of a group `copies` sequences of a length each, as far as `left` sequences of it go. In place.

    5 packs, copies=2, left=5 -> 2 packs get 2, one gets 1: two new groups at the end; 2 packs stay in the group.
    Returns what is then left, num_nodes and num_groups; there must be room for two more of each."""
    packs, space = groups[group, COUNT], groups[group, SPACE]
    depth, before = groups[group, DEPTH], groups[group, LAST]
    full = min(packs, left // copies)
    fewer = left - full * copies if full < packs else 0
    for packs, copies in ((full, copies), (1 if fewer > 0 else 0, fewer)):  # noqa: B020
        if packs > 0:
            write_node(nodes, num_nodes, length, copies, before)
            write_group(groups, num_groups, packs, space - copies * length, depth + copies, num_nodes)
            num_nodes, num_groups = num_nodes + 1, num_groups + 1
            groups[group, COUNT] -= packs
            left -= packs * copies
    return left, num_nodes, num_groups
