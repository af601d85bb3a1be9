"""Plan + lengths -> Assignment: which sequence lies in which pack."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numba import config
from numpy.typing import ArrayLike

from packing.draws import BUCKETS, BYTE, EIGHT, LINE, ONE, STEP, collect, count_buckets, deal, make_key, mix, shuffle
from packing.files.errors import whole_number
from packing.histogram import as_lengths, check_lengths, index_type, offsets_of
from packing.numba_tools import njit, prefetch
from packing.plan import PackPlan

EIGHT_PLACES = np.uint64(7)
NO_LENGTH = np.uint64(0)  # the stream of the order of packs: no sequence has length 0
SEQUENCES_PER_THREAD = 1 << 18  # a thread is not worth its start for fewer
PACKS_AT_A_TIME = 1024


@dataclass(frozen=True, eq=False)
class Assignment:
    """The sequences of every pack, flat.

    pack 0 holds sequences 4 and 1, pack 1 holds sequence 0, pack 2 holds 2 and 3:
    sequence_indices = [4, 1, 0, 2, 3]    pack_offsets = [0, 2, 3, 5]

    sequence_indices: (num_sequences,) every sequence exactly once; uint32, int64 from 2**32 sequences on.
    pack_offsets: (num_packs + 1,) where each pack begins in sequence_indices; uint32, int64 from 2**32 sequences on.
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
        pairs = (self.pack_offsets, other.pack_offsets), (self.sequence_indices, other.sequence_indices)
        return all(np.array_equal(*pair) for pair in pairs)


def assign(plan: PackPlan, lengths: ArrayLike, seed: int = 0, num_threads: int | None = None) -> Assignment:
    """Choose the sequences of every pack, at random under the seed.

    1. Sort the sequences by length (stable counting sort).
    2. Shuffle the sequences of each length, by a generator keyed by (seed, length).
    3. Lay out each strategy as often as it repeats, and shuffle that: the order of the packs.
    4. Give each slot of a strategy its share of the sequences of that length; each pack takes the next from its slots.

    Every choice of equally long sequences and every order of packs is equally likely, and the same seed gives the same
    assignment on any machine and with any number of threads.

    A lone length always stands alone in its packs. It skips step 2: step 3 lays out its sequences themselves, instead
    of their strategy. The shuffle there makes every order equally likely, whatever the order before.

    lengths: (num_sequences,), in any order.
    num_threads: None = as many as Numba takes (the cores of this process, or NUMBA_NUM_THREADS).
    Memory: 4 bytes a sequence and 4 a pack for the result, and meanwhile 4 a sequence of a shared length; 8 instead of
    4 from 2**32 sequences on.
    Raises ValueError for lengths that the plan was not made for, naming the first length that differs.
    """
    lengths = as_lengths(lengths)
    key = checked_seed(seed)
    if num_threads is None:
        num_threads = config.NUMBA_NUM_THREADS
    num_threads = whole_number("num_threads", num_threads, cure=", or None for all cores")
    num_threads = min(num_threads, 1 + len(lengths) // SEQUENCES_PER_THREAD)
    with ThreadPoolExecutor(num_threads) as pool:
        team = _Team(pool, num_threads)
        counts = _checked_counts(plan, lengths, team)
        is_lone = _lone_lengths(plan)
        # numpy.empty gets huge pages, which scattered writes need, so no kernel allocates arrays. They are few, since
        # fresh memory takes a good part of the time, and uint32 where that suffices, to keep tables in the cache.
        type_ = index_type(len(lengths) + len(plan.repeats))
        num_packs = plan.num_packs
        shared_starts = offsets_of(np.where(is_lone, 0, counts.sum(0)))
        lone_starts = offsets_of(np.where(is_lone, counts.sum(0), 0))
        # [ | packs: sequences of lone lengths, then the other strategies | sequences of shared lengths]
        # The first two parts become pack_offsets while the last one is read.
        work = np.empty(1 + num_packs + shared_starts[-1], type_)
        packs, by_length = work[1 : 1 + num_packs], work[1 + num_packs :]
        sequence_indices: np.ndarray = np.empty(len(lengths), type_)

        starts = np.where(is_lone, 1 + lone_starts[:-1], 1 + num_packs + shared_starts[:-1])
        _sort_by_length(lengths, (starts + _before(counts)).astype(index_type(len(work))), work, team)
        _shuffle_lengths(by_length, shared_starts, sequence_indices, key, team)
        strategy_starts = lone_starts[-1] + offsets_of(_shared_repeats(plan, is_lone))
        _shuffle_packs(packs, strategy_starts, sequence_indices, np.uint64(make_key(key, NO_LENGTH)), team)
        _fill_packs(plan, is_lone, work[: 1 + num_packs], by_length, sequence_indices, team)
        del packs, by_length  # views of work, which is cut now
    work.resize(1 + num_packs, refcheck=False)
    return Assignment(sequence_indices, pack_offsets=work)


@dataclass(frozen=True)
class _Team:
    """Threads that each take a part of an array.

    Python threads run kernels that release the GIL. Unlike those of numba.prange they end with the call, so a process
    may fork (as for DataLoader workers), and several threads may assign at once.
    """

    pool: ThreadPoolExecutor
    size: int

    def parts(self, count: int) -> list[tuple[int, int]]:
        """(first, end) of a part for each thread; parts begin at multiples of 8."""
        bounds = [count * i // self.size // 8 * 8 for i in range(self.size)] + [count]
        return list(pairwise(bounds))

    def run(self, kernel: Callable, calls: list[tuple]) -> list:
        """Call the kernel with each of the argument lists; one call needs no thread."""
        if len(calls) == 1:
            return [kernel(*calls[0])]
        return list(self.pool.map(lambda arguments: kernel(*arguments), calls))


def checked_seed(seed: int) -> np.uint64:
    """The seed as the kernels take it. Raises ValueError for anything but a whole number of 64 bits."""
    return np.uint64(whole_number("seed", seed, 0, 2**64 - 1))


def _checked_counts(plan: PackPlan, lengths: np.ndarray, team: _Team) -> np.ndarray:
    """(threads, max_sequence_length + 1) sequences of each length in each part. Raises if they are not the plan's."""
    parts = team.parts(len(lengths))
    counts = np.zeros((team.size, plan.max_sequence_length + 1), np.int64)
    if not all(team.run(_count_lengths, [(lengths[a:b], counts[i]) for i, (a, b) in enumerate(parts)])):
        check_lengths(lengths, plan.max_sequence_length)
    found, planned = counts.sum(0), plan.histogram()
    if not np.array_equal(found, planned):
        culprit = int(np.argmax(found != planned))
        what = f"the plan was made for other lengths: it places {planned[culprit]} sequences of length {culprit}"
        raise ValueError(f"{what}, here there are {found[culprit]}; make it from length_histogram(lengths)")
    return counts


def _lone_lengths(plan: PackPlan) -> np.ndarray:
    """(max_sequence_length + 1,) bool: lengths that always stand alone in their packs."""
    is_alone = np.repeat(plan.depths == 1, plan.depths)
    is_lone = np.zeros(plan.max_sequence_length + 1, bool)
    is_lone[plan.strategy_lengths[is_alone]] = True
    is_lone[plan.strategy_lengths[~is_alone]] = False
    return is_lone


def _shared_repeats(plan: PackPlan, is_lone: np.ndarray) -> np.ndarray:
    """(strategies,) repeats; 0 for those of a lone length, whose sequences are packs themselves."""
    return np.where(is_lone[plan.strategy_lengths[plan.strategy_offsets[:-1]]], 0, plan.repeats)


def _before(counts: np.ndarray) -> np.ndarray:
    """(threads, n) the sum of the parts before each part: [[1, 2], [5, 5]] -> [[0, 0], [1, 2]]"""
    return np.cumsum(counts, axis=0) - counts


def _sort_by_length(lengths: np.ndarray, free: np.ndarray, by_length: np.ndarray, team: _Team) -> None:
    parts = team.parts(len(lengths))
    team.run(_sort_part, [(lengths[a:b], a, free[i], by_length) for i, (a, b) in enumerate(parts)])


def _shuffle_lengths(by_length: np.ndarray, starts: np.ndarray, spare: np.ndarray, key: np.uint64, team: _Team) -> None:
    """Each thread takes neighbouring lengths with its share of the sequences, give or take a length."""
    bounds = np.searchsorted(starts, [first for first, _ in team.parts(starts[-1])] + [starts[-1]])
    shares = [(by_length, starts[: b + 1], a, spare, key) for a, b in pairwise(bounds.tolist())]
    team.run(_shuffle_each_length, shares)


def _shuffle_packs(packs: np.ndarray, first_packs: np.ndarray, spare: np.ndarray, key: np.uint64, team: _Team) -> None:
    """draws.shuffle by several threads, always by buckets.

    The packs of strategy s are numbers first_packs[s] to first_packs[s + 1]; lone sequences stand before them.
    """
    parts = team.parts(len(packs))
    counts = np.zeros((team.size, BUCKETS), np.int64)
    team.run(count_buckets, [(a, b, key, counts[i]) for i, (a, b) in enumerate(parts)])
    starts = offsets_of(counts.sum(0))
    free = starts[:-1] + _before(counts)
    dealt = [(packs[a:b], a, first_packs, key, free[i], spare) for i, (a, b) in enumerate(parts)]
    team.run(_deal_packs, dealt)
    shares = [(spare, starts[a : b + 1], a, key, packs) for a, b in team.parts(BUCKETS)]
    team.run(collect, shares)


def _fill_packs(
    plan: PackPlan, is_lone: np.ndarray, offsets: np.ndarray, by_length: np.ndarray, indices: np.ndarray, team: _Team
) -> None:
    """Each thread fills a part of the packs. Counting strategies first shows what the parts before each one take.

    offsets: (1 + packs,) holds the packs from its second place on, and in the end the offsets.
    """
    packs, depths = offsets[1:], np.append(plan.depths, 1)  # one more "strategy": a lone sequence
    parts = team.parts(len(packs))
    before = np.zeros((team.size, len(depths)), np.int64)
    for i, (start, end) in enumerate(parts[:-1]):
        counts = np.zeros_like(before)
        shares = [packs[start + a : start + b] for a, b in team.parts(end - start)]
        team.run(_count_strategies, [(share, len(indices), counts[j]) for j, share in enumerate(shares)])
        before[i + 1] = before[i] + counts.sum(0)
    slot_starts = _slot_starts(plan, _shared_repeats(plan, is_lone))
    strategies = [a.astype(packs.dtype) for a in (slot_starts, plan.strategy_offsets, depths)]
    calls = [
        (packs[a:b], before[i] @ depths, *strategies, before[i].astype(packs.dtype), by_length, indices)
        for i, (a, b) in enumerate(parts)
    ]
    offsets[0] = 0
    team.run(_fill_part, calls)


def _slot_starts(plan: PackPlan, repeats: np.ndarray) -> np.ndarray:
    """(slots,) where the sequences for each slot of each strategy begin, once they are sorted by length.

    strategies (1, 2) x 3 and (2, 2) x 5: slots 1 2 2 2 take 3, 3, 5 and 5 sequences -> [0, 3, 6, 11]
    """
    by_length = np.argsort(plan.strategy_lengths, kind="stable")
    starts = np.empty(len(by_length), np.int64)
    starts[by_length] = offsets_of(np.repeat(repeats, plan.depths)[by_length])[:-1]
    return starts


@njit(cache=True, nogil=True)
def _count_lengths(lengths, counts):
    """Add to counts, by length. Returns whether counts has a place for every length.

    Two tables count half of them each, in turns: additions to the same counter have to wait for one another.
    """
    half = np.uint64(len(lengths) // 2)
    first, second = np.zeros(len(counts), np.int64), np.zeros(len(counts), np.int64)
    longest = np.uint64(len(counts) - 1)
    for i in range(half):
        length, other = np.uint64(lengths[i]), np.uint64(lengths[i + half])
        if length - ONE >= longest or other - ONE >= longest:  # 0 and negative lengths wrap to huge numbers
            return False
        first[length] += 1
        second[other] += 1
    if len(lengths) % 2:
        length = np.uint64(lengths[-1])
        if length - ONE >= longest:
            return False
        first[length] += 1
    for i in range(len(counts)):
        counts[i] += first[i] + second[i]
    return True


@njit(cache=True, nogil=True)
def _sort_part(lengths, first, free, by_length):
    """Put each sequence at the next free place of its length; lengths[0] is sequence `first`'s. Consumes free."""
    for i in range(len(lengths)):
        length = np.uint64(lengths[i])
        place = np.uint64(free[length])
        prefetch(by_length, place + LINE)
        by_length[place] = first + i
        free[length] = place + ONE


@njit(cache=True, nogil=True)
def _shuffle_each_length(by_length, starts, first, scratch, seed):
    """Shuffle the sequences of each length from `first` on, in place."""
    for length in range(first, len(starts) - 1):
        start, end = starts[length], starts[length + 1]
        shuffle(by_length[start:end], scratch[start:end], make_key(seed, np.uint64(length)))


@njit(cache=True, nogil=True)
def _deal_packs(packs, first, starts, key, free, dealt):
    """draws.deal, but packs starts[s] to starts[s + 1] are dealt as len(dealt) + s, unread.

    packs[0] is number `first`."""
    lone = min(max(np.int64(starts[0]) - first, 0), len(packs)) // 8 * 8
    deal(packs[:lone], first, key, free, dealt)
    strategy = np.int64(np.searchsorted(starts, first + lone, side="right")) - 1  # -1: still a lone sequence
    for start in range(lone, len(packs), 8):
        word = mix(key + np.uint64((first + start) >> 3) * STEP)
        for i in range(start, min(start + 8, len(packs))):
            while strategy + 1 < len(starts) and first + i >= starts[strategy + 1]:
                strategy += 1
            bucket = word & BYTE
            place = np.uint64(free[bucket])
            prefetch(dealt, place + LINE)
            dealt[place] = packs[i] if strategy < 0 else len(dealt) + strategy
            free[bucket] = place + ONE
            word >>= EIGHT


@njit(cache=True, nogil=True)
def _count_strategies(packs, num_sequences, counts):
    """Add to counts, by strategy. The last one counts lone sequences, in 8 places in turns, so that none waits."""
    lone = np.uint64(len(counts) - 1)
    found = np.zeros(len(counts) + 7, np.int64)
    for pack in packs:
        found[min(np.uint64(pack) - np.uint64(num_sequences), lone + np.uint64(pack & EIGHT_PLACES))] += 1
    for strategy in range(len(found)):
        counts[min(strategy, len(counts) - 1)] += found[strategy]


@njit(cache=True, nogil=True)
def _fill_part(packs, filled, slot_starts, strategy_offsets, depths, used, by_length, sequence_indices):
    """Pack by pack, take the next sequence for each slot, from place `filled` on. Consumes used; writes ends to packs.

    A processor that guesses wrong whether a pack is a lone sequence loses the time of a pack. So write some packs as if
    all were lone, with their ends, and then write the others again.
    """
    num_sequences, lone = np.uint64(len(sequence_indices)), np.uint64(len(depths) - 1)
    strategies, places = np.empty(PACKS_AT_A_TIME, np.uint32), np.empty(PACKS_AT_A_TIME, sequence_indices.dtype)
    filled = np.uint64(filled)
    for first in range(0, len(packs), PACKS_AT_A_TIME):
        num_shared = np.uint64(0)
        for pack in range(first, min(first + PACKS_AT_A_TIME, len(packs))):
            sequence_indices[filled] = packs[pack]
            # below num_sequences it wraps to a huge number
            strategy = min(np.uint64(packs[pack]) - num_sequences, lone)
            strategies[num_shared] = strategy
            places[num_shared] = filled
            num_shared += np.uint64(strategy < lone)
            filled += np.uint64(depths[strategy])
            packs[pack] = filled
        for i in range(num_shared):
            strategy, place = np.uint64(strategies[i]), np.uint64(places[i])
            repeat = np.uint64(used[strategy])
            used[strategy] = repeat + ONE
            for slot in range(np.uint64(strategy_offsets[strategy]), np.uint64(strategy_offsets[strategy + ONE])):
                source = np.uint64(slot_starts[slot]) + repeat
                prefetch(by_length, source + LINE)
                sequence_indices[place] = by_length[source]
                place += ONE
