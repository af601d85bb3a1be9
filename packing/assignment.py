"""Plan + lengths -> Assignment: which sequence lies in which pack."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import ArrayLike

from .draws import make_key, shuffle
from .histogram import as_lengths, check_lengths
from .plan import PackPlan

NONE = -1


@dataclass(frozen=True, eq=False)
class Assignment:
    """The sequences of every pack, flat.

    pack 0 holds sequences 4 and 1, pack 1 holds sequence 0, pack 2 holds 2 and 3:
    sequence_indices = [4, 1, 0, 2, 3]    pack_offsets = [0, 2, 3, 5]

    sequence_indices: (num_sequences,) every sequence exactly once; uint32, int64 from 2**32 sequences on.
    pack_offsets: (num_packs + 1,) where each pack begins in sequence_indices; int64.
    """

    sequence_indices: np.ndarray
    pack_offsets: np.ndarray

    @property
    def num_packs(self) -> int:
        return len(self.pack_offsets) - 1

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_indices)

    def pack(self, index: int) -> np.ndarray:
        """The sequences of one pack, in their order in it."""
        if not -self.num_packs <= index < self.num_packs:
            raise IndexError(f"pack {index} of an assignment with {self.num_packs} packs")
        index %= self.num_packs
        return self.sequence_indices[self.pack_offsets[index] : self.pack_offsets[index + 1]]

    def equals(self, other: Assignment) -> bool:
        """Same sequences in the same packs, in the same order."""
        return np.array_equal(self.pack_offsets, other.pack_offsets) and np.array_equal(
            self.sequence_indices, other.sequence_indices
        )


def assign(plan: PackPlan, lengths: ArrayLike, seed: int = 0) -> Assignment:
    """Choose the sequences of every pack, at random under the seed.

    1. Sort the sequences by length (stable counting sort).
    2. Shuffle the sequences of each length, by a generator keyed by (seed, length).
    3. Lay out each strategy as often as it repeats, and shuffle that: the order of the packs.
    4. Go through the packs and take for each length the next sequence of that length.

    So every choice of equally long sequences and every order of packs is equally likely, and the same seed gives the
    same assignment on any machine. lengths: (num_sequences,), in any order.
    Raises ValueError for lengths that the plan was not made for, naming the first length that differs.
    """
    lengths = as_lengths(lengths)
    seed = checked_seed(seed)
    bucket_starts = _checked_buckets(plan, lengths)
    # Arrays are allocated here, not in the kernels: numpy.empty gets huge pages, which the scattered writes need.
    # What counts sequences is uint32 while that suffices: tables that are looked up at random stay in the cache.
    index_type = np.uint32 if len(lengths) < 2**32 else np.int64
    by_length = np.empty(len(lengths), index_type)
    sequence_indices = np.empty(len(lengths), index_type)
    _sort_by_length(lengths, bucket_starts[:-1].astype(index_type), by_length)
    _shuffle_each_length(by_length, bucket_starts, sequence_indices, seed)

    pack_order = np.repeat(np.arange(len(plan.repeats), dtype=np.uint32), plan.repeats)
    _shuffle_packs(pack_order, np.empty_like(pack_order), seed)
    pack_offsets = np.zeros(len(pack_order) + 1, np.int64)
    strategies = (plan.strategy_lengths.astype(np.uint32), plan.strategy_offsets.astype(index_type))
    next_of_length = bucket_starts[:-1].astype(index_type)
    _fill_packs(pack_order, strategies, by_length, next_of_length, sequence_indices, pack_offsets)
    return Assignment(sequence_indices, pack_offsets)


def checked_seed(seed: int) -> np.uint64:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r} must be a whole number, 0 to 2**64 - 1")
    return np.uint64(seed)


def _checked_buckets(plan: PackPlan, lengths: np.ndarray) -> np.ndarray:
    """(max_sequence_length + 2,) where the sequences of each length begin once sorted; the plan must agree."""
    counts = np.zeros(plan.max_sequence_length + 1, np.int64)
    if _count_lengths(lengths, counts) != NONE:
        check_lengths(lengths, plan.max_sequence_length)
    planned = plan.histogram()
    if not np.array_equal(counts, planned):
        culprit = int(np.argmax(counts != planned))
        raise ValueError(
            f"the plan was made for other lengths: it places {planned[culprit]} sequences of length {culprit}, "
            f"here there are {counts[culprit]}; make it from length_histogram(lengths)"
        )
    return np.concatenate([[0], np.cumsum(counts)])


@njit(cache=True, nogil=True)
def _count_lengths(lengths, counts):
    """Add to counts, by length. Returns the first index whose length counts has no place for, or NONE."""
    for i in range(len(lengths)):
        length = np.int64(lengths[i])
        if length < 1 or length >= len(counts):
            return i
        counts[length] += 1
    return NONE


@njit(cache=True, nogil=True)
def _sort_by_length(lengths, free, by_length):
    """Put each sequence at the next free place of its length. Consumes free; fills by_length."""
    for i in range(len(lengths)):
        length = np.uint64(lengths[i])
        by_length[np.uint64(free[length])] = i
        free[length] += 1


@njit(cache=True, nogil=True)
def _shuffle_each_length(by_length, bucket_starts, scratch, seed):
    """Shuffle the sequences of each length, in place."""
    for length in range(len(bucket_starts) - 1):
        start, end = bucket_starts[length], bucket_starts[length + 1]
        shuffle(by_length[start:end], scratch[start:end], make_key(seed, np.uint64(length)))


@njit(cache=True, nogil=True)
def _shuffle_packs(pack_order, scratch, seed):
    """Shuffle the packs, in place. Stream 0 is theirs: no sequence has length 0."""
    shuffle(pack_order, scratch, make_key(seed, np.uint64(0)))


@njit(cache=True, nogil=True)
def _fill_packs(pack_order, strategies, by_length, next_of_length, sequence_indices, pack_offsets):
    """Take sequences off their length, pack by pack. Consumes next_of_length; fills the last two."""
    strategy_lengths, strategy_offsets = strategies
    filled, one = np.uint64(0), np.uint64(1)
    for pack in range(len(pack_order)):
        strategy = np.uint64(pack_order[pack])
        for slot in range(np.uint64(strategy_offsets[strategy]), np.uint64(strategy_offsets[strategy + one])):
            length = np.uint64(strategy_lengths[slot])
            sequence_indices[filled] = by_length[np.uint64(next_of_length[length])]
            next_of_length[length] += 1
            filled += one
        pack_offsets[pack + 1] = filled
