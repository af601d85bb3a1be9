"""Lengths -> histogram, how many sequences have each length; and lengths -> offsets, where each one begins."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

BLOCK = 1 << 20


def length_histogram(lengths: ArrayLike, max_sequence_length: int | None = None) -> np.ndarray:
    """Count the sequences of each length: (max_sequence_length + 1,) int64, indexed by length.

    [2, 5, 2] with max_sequence_length=6 -> [0, 0, 2, 0, 0, 1, 0]

    max_sequence_length: None takes the longest length. Histograms with the same one add up, shard by shard.
    Raises ValueError, naming the index, for a length that is not an integer, below 1 or above max_sequence_length.
    """
    lengths = as_lengths(lengths)
    if max_sequence_length is None:
        if not len(lengths):
            raise ValueError("no lengths to count: give at least one sequence, or say max_sequence_length=")
        max_sequence_length = max(int(lengths.max()), 1)
    check_lengths(lengths, max_sequence_length)
    histogram = np.zeros(max_sequence_length + 1, np.int64)
    for first in range(0, len(lengths), BLOCK):  # bincount copies what it is given to int64
        histogram += np.bincount(lengths[first : first + BLOCK], minlength=max_sequence_length + 1)
    return histogram


def offsets_of(counts: ArrayLike) -> np.ndarray:
    """(n + 1,) int64, where each part begins and the last one ends: [2, 0, 3] -> [0, 2, 2, 5]"""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def index_type(count: int) -> type:
    """The type that can number `count` things."""
    return np.uint32 if count <= 2**32 else np.int64


def as_lengths(lengths: ArrayLike) -> np.ndarray:
    """Any flat list of whole numbers as an integer array, with any values."""
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"lengths must be flat, one number per sequence; got an array of shape {array.shape}")
    if not len(array):
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        is_wrong = [isinstance(x, bool) or not isinstance(x, int | np.integer) for x in np.asarray(lengths, object)]
        culprit = is_wrong.index(True) if any(is_wrong) else 0
        found = array[culprit : culprit + 1].tolist()[0]
        what = f"lengths must be integers: index {culprit} holds {found!r} (dtype {array.dtype})"
        raise ValueError(f"{what}; give the number of tokens of each sequence")
    return array.astype(array.dtype.newbyteorder("="), copy=False)  # files may hold the other byte order


def check_lengths(lengths: np.ndarray, max_sequence_length: int) -> None:
    """Raise ValueError for the first length outside 1..max_sequence_length."""
    if not len(lengths):
        return
    if lengths.min() < 1:
        culprit = int(np.argmax(lengths < 1))
        raise ValueError(f"sequence {culprit} has length {lengths[culprit]}, but a length is at least 1; leave it out")
    if lengths.max() > max_sequence_length:
        culprit = int(np.argmax(lengths > max_sequence_length))
        what = f"sequence {culprit} has {lengths[culprit]} tokens, more than max_sequence_length={max_sequence_length}"
        raise ValueError(f"{what}; truncate or split it before packing, or raise max_sequence_length")
