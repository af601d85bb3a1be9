"""Lower bounds: the packs that a histogram needs at least. All are exact, in integers.

counting    ceil(tokens / max_sequence_length)
depth       ceil(sequences / max_sequences_per_pack)
l2          for each threshold k: lengths above L - k share no pack with k or longer, and lengths above L / 2 share
            none with each other; all others from k on need packs of their own (Martello & Toth 1990), and no pack
            holds more than L // k of these

A fourth bound comes from the prices of optimal's linear program: `Valuation.bound` in packers/pricing.py.
"""

from __future__ import annotations

import numpy as np


def lower_bound(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None) -> int:
    """The best of the counting, depth and L2 bounds: O(max_sequence_length), a millisecond at 131,072.

    {4: 3, 2: 1} into 6 slots -> 3: no two of length 4 fit together, and the 2 has room beside one
    """
    return max(
        counting_bound(histogram, max_sequence_length),
        depth_bound(histogram, max_sequences_per_pack),
        l2_bound(histogram, max_sequence_length, max_sequences_per_pack),
    )


def counting_bound(histogram: np.ndarray, max_sequence_length: int) -> int:
    """ceil(tokens / max_sequence_length)."""
    tokens = int((_exact(histogram, max_sequence_length) * np.arange(max_sequence_length + 1)).sum())
    return -(-tokens // max_sequence_length)


def depth_bound(histogram: np.ndarray, max_sequences_per_pack: int | None) -> int:
    """ceil(sequences / max_sequences_per_pack); 0 without a limit."""
    if max_sequences_per_pack is None:
        return 0
    return -(-sum(histogram[np.flatnonzero(histogram)].tolist()) // max_sequences_per_pack)


def l2_bound(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None = None) -> int:
    """Martello & Toth's L2 over all thresholds, with the depth limit where that is tighter.

    For each k, it counts lengths >= k only. Those above L - k need a pack each. The others need the largest of three:
    how many are above L / 2; ceil(their tokens / L); ceil(their number / d), d = min(L // k, max_sequences_per_pack).
    {5: 2, 3: 2, 2: 1} into 6 slots -> 4: for k = 2, two 5s alone, and 3 + 3 + 2 = 8 tokens in ceil(8 / 6) = 2 packs.
    {3: 6} into 8 slots -> 3: for k = 3, two sequences a pack.
    """
    limit = max_sequence_length
    counts = _exact(histogram[: limit + 1], limit)
    above = _sums_from(counts)  # above[k]: sequences of k tokens or more
    tokens_above = _sums_from(counts * np.arange(limit + 1))
    threshold = np.arange(1, limit // 2 + 1)  # a higher one proves nothing more
    if not len(threshold):
        return int(above[1])
    alone = above[limit - threshold + 1]
    sequences, tokens = above[threshold] - alone, tokens_above[threshold] - tokens_above[limit - threshold + 1]
    packs = np.maximum(above[limit // 2 + 1] - alone, -(-tokens // limit))
    depth = np.minimum(limit // threshold, max_sequences_per_pack or limit).astype(counts.dtype)
    return int((alone + np.maximum(packs, -(-sequences // depth))).max())


def _exact(histogram: np.ndarray, limit: int) -> np.ndarray:
    """Counts whose sums cannot overflow: int64 if twice the tokens fit, else Python integers."""
    counts = np.zeros(limit + 1, np.int64)
    counts[: len(histogram)] = histogram
    return counts if float(counts.sum(dtype=np.float64)) * limit < 2.0**61 else counts.astype(object)


def _sums_from(values: np.ndarray) -> np.ndarray:
    """[a, b, c] -> [a + b + c, b + c, c, 0]"""
    return np.append(np.cumsum(values[::-1])[::-1], 0)
