"""Random numbers that are the same on every machine, and the shuffle made from them.

NumPy may change the stream of its Generator between versions, but a seed must always mean the same assignment. Hence
splitmix64 (Steele, Lea, Flood, OOPSLA 2014): number i of a key is mix(key + i * STEP), and needs no number before it.
"""

from __future__ import annotations

import numpy as np

from packing.numba_tools import njit, prefetch

STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
ONE, TWO = np.uint64(1), np.uint64(2)
HALF = np.uint64(32)
LOW_HALF = np.uint64(0xFFFFFFFF)
EIGHT = np.uint64(8)
BYTE = np.uint64(255)

IN_CACHE = 1 << 16  # values that a plain Fisher-Yates shuffle may jump about in: 256 KB of uint32
BUCKETS = 256
LINE = np.uint64(16)  # uint32 in a cache line


@njit(cache=True, nogil=True)
def mix(state):
    """splitmix64's output function: 64 well-mixed bits from 64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@njit(cache=True, nogil=True)
def make_key(seed, stream):
    """A different key for each (seed, stream); both uint64."""
    return mix(mix(seed + STEP) ^ (stream * STEP))


@njit(cache=True, nogil=True)
def shuffle(values, scratch, key):
    """Put values into uniformly random order, in place. scratch: as long as values, same dtype; its content is lost.

    1. Shuffle few values by Fisher and Yates.
    2. Deal many values to 256 buckets at random, and shuffle each bucket (Rao 1961, Sandelius 1962). This is just as
       uniform, and touches memory in order.
    """
    if len(values) <= IN_CACHE:
        fisher_yates(values, values, key)
        return
    first = np.int64(0)  # Numba would compile the three kernels again for a plain 0
    counts, free, starts = np.zeros(BUCKETS, np.int64), np.empty(BUCKETS, np.int64), np.empty(BUCKETS + 1, np.int64)
    count_buckets(first, len(values), key, counts)
    starts[0] = 0
    for bucket in range(BUCKETS):
        free[bucket] = starts[bucket]
        starts[bucket + 1] = starts[bucket] + counts[bucket]
    deal(values, first, key, free, scratch)
    collect(scratch, starts, first, key, values)


@njit(cache=True, nogil=True)
def count_buckets(first, end, key, counts):
    """Add to counts (256,) the bucket of each number first..end - 1.

    The bucket of number i is byte i of the key's stream, so threads can deal parts at the same time. A draw has 8
    bytes, so first is a multiple of 8."""
    for start in range(first, end, 8):
        word = mix(key + np.uint64(start >> 3) * STEP)
        for _ in range(min(8, end - start)):
            counts[word & BYTE] += 1
            word >>= EIGHT


@njit(cache=True, nogil=True)
def deal(values, first, key, free, dealt):
    """Put each value at the next free place of its bucket; values[0] is number `first`. Consumes free; fills dealt."""
    for start in range(0, len(values), 8):
        word = mix(key + np.uint64((first + start) >> 3) * STEP)
        for i in range(start, min(start + 8, len(values))):
            bucket = word & BYTE
            place = np.uint64(free[bucket])
            prefetch(dealt, place + LINE)
            dealt[place] = values[i]
            free[bucket] = place + ONE
            word >>= EIGHT


@njit(cache=True, nogil=True)
def collect(dealt, starts, first, key, values):
    """Shuffle each bucket of dealt, bucket `first` from starts[0] to starts[1] and so on, into values. Spoils dealt."""
    for bucket in range(len(starts) - 1):
        start, end = starts[bucket], starts[bucket + 1]
        fisher_yates(dealt[start:end], values[start:end], make_key(key, np.uint64(first + bucket + 1)))


@njit(cache=True, nogil=True)
def fisher_yates(values, shuffled, key):
    """Shuffle values into `shuffled`; spoils values. Both may be the same array, whose values are then swapped.

    Lemire's method (2019) draws below a bound by a product, without a remainder; it draws again only where the first
    draw would favour small numbers. A word of 64 bits makes two draws."""
    state = key
    bound = np.uint64(len(values))
    while bound > ONE:
        state += STEP
        word = mix(state)
        for _ in range(1 if bound == TWO else 2):
            product = (word >> HALF) * bound
            if (product & LOW_HALF) < bound:
                unfair = (ONE << HALF) % bound
                while (product & LOW_HALF) < unfair:
                    state += STEP
                    product = (mix(state) >> HALF) * bound
            other = product >> HALF
            bound -= ONE
            chosen = values[other]
            values[other] = values[bound]
            shuffled[bound] = chosen
            word <<= HALF
    if len(values) > 0:
        shuffled[0] = values[0]
