"""Random numbers that are the same on every machine, and the shuffle made from them.

A generator of our own, because NumPy may change the stream of its Generator between versions, and then one seed would
no longer mean one assignment. splitmix64 (Steele, Lea, Flood, OOPSLA 2014): number i of a key is mix(key + i * STEP),
so any number can be drawn without drawing those before it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
ONE = np.uint64(1)
HALF = np.uint64(32)
LOW_HALF = np.uint64(0xFFFFFFFF)

IN_CACHE = 1 << 16  # values that a plain Fisher-Yates shuffle may jump about in: 256 KB of uint32
BUCKETS = 256


@njit(cache=True, nogil=True)
def mix(state):
    """splitmix64's output function: 64 well-mixed bits from 64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@njit(cache=True, nogil=True)
def make_key(seed, stream):
    """A key of its own for each (seed, stream); both uint64."""
    return mix(mix(seed + STEP) ^ (stream * STEP))


@njit(cache=True, nogil=True)
def shuffle(values, scratch, key):
    """Put values into uniformly random order, in place. scratch: as long as values, same dtype; its content is lost.

    1. Few values: Fisher and Yates.
    2. Many: deal them to 256 buckets at random and shuffle each bucket (Rao 1961, Sandelius 1962). It is as uniform,
       and touches memory in order.
    """
    if len(values) <= IN_CACHE:
        _fisher_yates(values, key)
        return
    starts = np.zeros(BUCKETS + 1, np.int64)
    for i in range(len(values)):
        starts[_bucket(key, i) + 1] += 1
    starts = np.cumsum(starts)
    free = starts.copy()
    for i in range(len(values)):
        bucket = _bucket(key, i)
        scratch[free[bucket]] = values[i]
        free[bucket] += 1
    for bucket in range(BUCKETS):
        _fisher_yates(scratch[starts[bucket] : starts[bucket + 1]], make_key(key, np.uint64(bucket + 1)))
    for i in range(len(values)):  # values[:] = scratch is shorter, but takes Numba seconds to compile
        values[i] = scratch[i]


@njit(cache=True, nogil=True)
def _bucket(key, i):
    """Byte i of the key's stream: eight buckets a draw."""
    word = mix(key + np.uint64(i >> 3) * STEP)
    return np.int64((word >> np.uint64((i & 7) << 3)) & np.uint64(BUCKETS - 1))


@njit(cache=True, nogil=True)
def _fisher_yates(values, key):
    """Swap each value with one at or before it. Draws below a bound by Lemire's method (2019): a product, no remainder,
    and a second draw only where the first would favour small numbers."""
    state = key
    bound = np.uint64(len(values))
    while bound > ONE:
        state += STEP
        product = (mix(state) >> HALF) * bound
        if (product & LOW_HALF) < bound:
            unfair = (ONE << HALF) % bound
            while (product & LOW_HALF) < unfair:
                state += STEP
                product = (mix(state) >> HALF) * bound
        other = product >> HALF
        bound -= ONE
        values[bound], values[other] = values[other], values[bound]
