"""Many source shards: one plan for all of them, or one for each, and an assignment made part by part.

    shard 0: lengths 2 3 3, histogram [. . 1 2]                                      part 0: (2 3)
                                                   sum [. . 2 3] -> (2 3) x 2, (3) ->
    shard 1: lengths 3 2,   histogram [. . 1 1]                                      part 1: (2 3), (3)

assign() holds all indices at once, 12 bytes a sequence. Where they are too many for one machine, or many machines shall
make them, the packs of the plan are dealt to parts at random, and so are the sequences of each length; then assign()
makes each part by itself. Nobody ever holds more than one shard's lengths, or one part's indices:

    plan = plan_packs(add_histograms(histograms))
    parts = deal_packs(plan, num_parts, seed)
    for shard, share in enumerate(deal_shares(histograms, parts, seed)):     # counts alone
        of_parts = deal_lengths(lengths[shard], share, shard, seed)          # on any machine
    assignment = assign_part(parts, part, taken, seed)                       # on any machine, from all shards' of_parts

Every assignment is as likely as with assign(), as every way to deal is equally likely; for one seed it is another one.

Packing each shard by itself would need none of this. pack_dataset never does it: the whole costs 30 to 150 ns and 12
bytes a sequence (benchmarks/scale.py), little beside what its tokens cost, while shards that are not alike lose. With
10^7 sequences of Wikipedia's lengths in 8 shards (scale.py --apart 8) it is 6 packs of 5 million where rows lie by
chance, 4.1 % where like lengths lie together (efficiency 96.0 %), and 6.7 % where they are sorted (93.7 %). Who has
shards on machines that do not see each other's asks plan_each, with their histograms, before packing each for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from packing.assignment import Assignment, assign, checked_seed
from packing.draws import ONE, STEP, make_key, mix
from packing.histogram import as_lengths
from packing.numba_tools import njit
from packing.packers.table import Packer, plan_packs
from packing.plan import PackPlan

TOLERANCE = 0.001  # more packs, as a share of them

# Streams of random numbers; assign() has those of the lengths, and hands its seed's on.
PACKS, SHARES, SHARDS, PARTS = (np.uint64(2**63 + i) for i in range(4))


def add_histograms(histograms: Iterable[ArrayLike]) -> np.ndarray:
    """The histogram of all shards together: [0 2 1] + [0 1 0 5] -> [0 3 1 5]"""
    total = np.zeros(1, np.int64)
    for histogram in histograms:
        histogram = np.asarray(histogram, np.int64)
        if len(histogram) > len(total):
            total = np.pad(total, (0, len(histogram) - len(total)))
        total[: len(histogram)] += histogram
    return total


def plan_each(
    histograms: Sequence[ArrayLike],
    max_sequence_length: int,
    max_sequences_per_pack: int | None = None,
    packer: str | Packer = "optimal",
    tolerance: float = TOLERANCE,
) -> list[PackPlan]:
    """A plan for each shard, to be packed by itself; only where that costs hardly more packs than one plan for all.

    shards in random order: nearly the same histograms, nearly no loss
    shards sorted by length: long sequences find no short ones in theirs, and lie alone

    tolerance: packs more than of one plan for all, as a share of those.
    Raises ValueError where it would be more; then pack the shards together.
    """
    limits = max_sequence_length, max_sequences_per_pack, packer
    together = plan_packs(_fit(add_histograms(histograms), max_sequence_length), *limits)
    plans = [plan_packs(_fit(histogram, max_sequence_length), *limits) for histogram in histograms]
    packs = sum(plan.num_packs for plan in plans)
    if packs > together.num_packs * (1 + tolerance):
        worst = int(np.argmin([plan.packing_efficiency for plan in plans]))
        efficiency = together.num_tokens / (packs * max_sequence_length)
        raise ValueError(
            f"the {len(plans)} shards packed each by itself take {packs:,} packs (efficiency {efficiency:.3%}), "
            f"{packs / together.num_packs - 1:.2%} more than together ({together.packing_efficiency:.3%}), and "
            f"tolerance={tolerance} allows {tolerance:.2%}; the worst is shard {worst} "
            f"({plans[worst].packing_efficiency:.3%}): its lengths are not those of the whole. Pack the shards "
            "together (datasets.concatenate_datasets), or shuffle the rows across them before"
        )
    return plans


def deal_packs(plan: PackPlan, num_parts: int, seed: int = 0) -> list[PackPlan]:
    """Deal the packs of a plan to parts, each pack to any of them with equal chance; so parts are about equally large.

    strategies (1 2) x 3, (5) x 2 in 2 parts -> (1 2) x 2, (5) x 1 and (1 2) x 1, (5) x 1
    """
    if isinstance(num_parts, bool) or not isinstance(num_parts, int | np.integer) or not 1 <= num_parts <= 2**16:
        raise ValueError(f"num_parts={num_parts!r} must be a whole number, 1 to 65,536")
    repeats = np.zeros((int(num_parts), len(plan.repeats)), np.int64)
    _deal_repeats(plan.repeats, _key(seed, PACKS), repeats)
    if not repeats.any(axis=1).all():
        part = int(np.argmin(repeats.any(axis=1)))
        raise ValueError(f"part {part} gets none of {plan.num_packs} packs; take fewer than num_parts={num_parts}")
    return [_with_repeats(plan, of_part) for of_part in repeats]


def deal_shares(histograms: Iterable[ArrayLike], parts: Sequence[PackPlan], seed: int = 0) -> Iterator[np.ndarray]:
    """How many sequences of each length each part takes from each shard: (max_sequence_length + 1, parts) int64 of one
    shard after the other; at random, as if each sequence had drawn one of the places that the parts have for it.

    Raises ValueError where histograms and parts are not of the same sequences.
    """
    places = np.stack([part.histogram() for part in parts], axis=1)
    key, total = _key(seed, SHARES), 0
    for histogram in histograms:
        histogram = _fit(np.asarray(histogram, np.int64), len(places) - 1)
        if (short := histogram > places.sum(1)).any():
            _refuse_other(int(np.argmax(short)))
        share = np.zeros_like(places)
        _deal_counts(histogram, np.uint64(total), key, places, share)
        total += int(histogram.sum())
        yield share
    if places.any():
        _refuse_other(int(np.argmax(places.any(1))))


def deal_lengths(lengths: ArrayLike, share: np.ndarray, shard: int, seed: int = 0) -> np.ndarray:
    """The part that takes each sequence of a shard: (sequences,) uint16. share: what deal_shares says of this shard."""
    lengths, left = as_lengths(lengths), share.copy()
    parts = np.empty(len(lengths), np.uint16)
    if not _deal_sequences(lengths, _key(seed, SHARDS, shard), left, parts) or left.any():
        raise ValueError(f"shard {shard} has other lengths than its histogram said; count it anew")
    return parts


def assign_part(
    parts: Sequence[PackPlan], part: int, taken: Iterable[tuple[int, ArrayLike, np.ndarray]], seed: int = 0
) -> Assignment:
    """The packs of one part, with the numbers that sequences have among all.

    taken: of one shard after the other, the number of its first sequence among all, its lengths, and the part of each
        sequence, as deal_lengths says.
    Memory: 14 bytes for each sequence of the part while at work, if lengths are uint16.
    """
    chosen, lengths = [], []
    for first, of_shard, of_parts in taken:
        here = np.flatnonzero(of_parts == part)
        chosen.append((here + first).astype(np.uint32 if first + len(of_parts) <= 2**32 else np.int64))
        lengths.append(np.asarray(of_shard)[here])
    local = assign(parts[part], np.concatenate(lengths), int(_key(seed, PARTS, part)))
    return Assignment(np.concatenate(chosen)[local.sequence_indices], local.pack_offsets)


def _key(seed: int, stream: np.uint64, number: int = 0) -> np.uint64:
    of_stream = np.uint64(make_key(checked_seed(seed), stream))  # called from Python, kernels return Python's integers
    return np.uint64(make_key(of_stream, np.uint64(number)))


def _fit(histogram: np.ndarray, max_sequence_length: int) -> np.ndarray:
    """As long as the others; what is longer than a pack is left for the packer to refuse."""
    return np.pad(histogram, (0, max(0, max_sequence_length + 1 - len(histogram))))


def _with_repeats(plan: PackPlan, repeats: np.ndarray) -> PackPlan:
    used = repeats > 0
    lengths = plan.strategy_lengths[np.repeat(used, plan.depths)]
    offsets = np.concatenate([[0], np.cumsum(plan.depths[used])])
    limits = plan.max_sequence_length, plan.max_sequences_per_pack
    return PackPlan(*limits, lengths, offsets, repeats[used], plan.packer)


def _refuse_other(length: int) -> None:
    raise ValueError(
        f"the plan was made for another number of sequences of length {length}; make it from the sum of these "
        "histograms"
    )


@njit(cache=True, nogil=True)
def _below(bound, state):
    """A number below the bound, each equally likely: a draw from an incomplete last round of them is drawn again."""
    word = mix(state)
    number = word % bound
    while word - number > np.uint64(0) - bound:
        word = mix(word + STEP)
        number = word % bound
    return number


@njit(cache=True, nogil=True)
def _deal_repeats(repeats, key, dealt):
    """dealt: (parts, strategies), zeros; how many packs of each strategy each part gets."""
    number, parts = np.uint64(0), np.uint64(len(dealt))
    for strategy in range(len(repeats)):
        for _ in range(repeats[strategy]):
            dealt[_below(parts, key + number * STEP), strategy] += 1
            number += ONE


@njit(cache=True, nogil=True)
def _take(left, total, state):
    """Draw one of `total` places of the parts, of which each has left[part], and take it away."""
    number, part = _below(np.uint64(total), state), 0
    while number >= np.uint64(left[part]):
        number -= np.uint64(left[part])
        part += 1
    left[part] -= 1
    return part


@njit(cache=True, nogil=True)
def _deal_counts(histogram, first, key, left, share):
    """left, share: (lengths, parts). Moves as many places of each length as the shard has sequences."""
    number = np.uint64(first)
    for length in range(len(histogram)):
        total = left[length].sum()
        for _ in range(histogram[length]):
            share[length, _take(left[length], total, key + number * STEP)] += 1
            total -= 1
            number += ONE


@njit(cache=True, nogil=True)
def _deal_sequences(lengths, key, left, parts):
    """Returns whether there was a place for each. Consumes left."""
    totals = left.sum(axis=1)
    for i in range(len(lengths)):
        length = np.uint64(lengths[i])
        if length >= np.uint64(len(left)) or totals[length] == 0:
            return False
        parts[i] = _take(left[length], totals[length], key + np.uint64(i) * STEP)
        totals[length] -= 1
    return True
