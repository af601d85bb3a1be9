"""Non-negative least squares histogram packing (arXiv 2107.02027, section 3.2), without its matrix.

1. A strategy is a multiset of lengths that sum exactly to max_sequence_length. With x packs of each, A x counts the
   slots for every length, and should equal the histogram b.
2. Minimise |w (A x - b)| over x >= 0, where w is 0.09 for lengths up to 8: what is so short finds a place anyway.
3. Round x to whole packs: once to the nearest, once down.
4. Deal the sequences to the slots, strategy by strategy. Slots that get none are space, in packs that stay open.
5. Pack the sequences that got no slot longest-pack-first, into the open packs and then into new ones.
6. Keep the rounding that needs fewer packs.

The paper lists every strategy as a column of A: 22,102 at 512 tokens and depth 3, out of reach beyond. Here nnls.py
finds the same minimum from the few hundred columns that it needs, at any depth. Time grows somewhat faster than the
cube of max_sequence_length: 0.1 to 0.2 s at 512, 1 s at 1024, 5 to 10 s at 2048, where it ends. Counts do not matter.

It knows strategies without padding only, and minimises a sum of squares, not packs. Where few strategies sum exactly
(few distinct lengths, or fewer sequences than lengths) x rounds to little or to what wastes slots, and lpfhp may need
fewer packs; so may it under a tight depth limit, where most packs cannot be full.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .groups import COUNT, DEPTH, NONE, deal, keep_open, no_open_packs, unroll, with_room, write_group
from .lpfhp import fill_longest_first, lpfhp
from .nnls import fit_strategies
from .plan import PackPlan, Strategies

SHORT, SHORT_WEIGHT = 8, 0.09
LONGEST = 2048


def nnlshp(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None) -> PackPlan:
    """Pack a checked histogram by the strategies that fit it best in the sense of least squares.

    {5: 2, 4: 1, 2: 1, 1: 2} into 6 slots -> x: (1, 5) 2.0, (2, 4) 1.0: as they are, with nothing left over

    Raises ValueError if max_sequence_length is above 2048.
    """
    if max_sequence_length > LONGEST:
        raise ValueError(
            f"max_sequence_length={max_sequence_length} is more than the {LONGEST} that nnlshp can solve for: its time "
            "grows with the cube, and is 5 to 10 s there; use packer='lpfhp', which takes any length"
        )
    depth_limit = max_sequences_per_pack or max_sequence_length
    slots, x, _ = fit_histogram(histogram, max_sequence_length, max_sequences_per_pack)
    rounded = [np.rint(x).astype(np.int64), np.floor(x).astype(np.int64)]
    packed = [_pack_slots(histogram.copy(), depth_limit, slots, repeats) for repeats in rounded]
    nodes, groups = min(packed, key=lambda pair: pair[1][:, COUNT].sum())
    groups = groups[groups[:, COUNT] > 0]  # some have none left
    merged: dict[tuple[int, ...], int] = {}  # a pack may come out alike by its slots and by step 5
    for strategy, packs in zip(Strategies(*unroll(nodes, groups)), groups[:, COUNT].tolist(), strict=True):
        merged[strategy] = merged.get(strategy, 0) + packs
    limits = max_sequence_length, max_sequences_per_pack
    return PackPlan.from_strategies(merged, list(merged.values()), *limits, "nnlshp")


def fit_histogram(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None):
    """Step 2: slots, x and the norm, as nnls.fit_strategies returns them.

    The search starts at the full packs of lpfhp: that saves more than half of it, at depth 3 a tenth."""
    start = lpfhp(histogram, max_sequence_length, max_sequences_per_pack)
    weights = np.where(np.arange(max_sequence_length + 1) <= SHORT, SHORT_WEIGHT, 1.0)
    depth_limit = max_sequences_per_pack or max_sequence_length
    return fit_strategies(
        histogram, weights, depth_limit, start.strategy_lengths, start.strategy_offsets, start.repeats
    )


@njit(cache=True)
def _pack_slots(left, depth_limit, slots, repeats):
    """Steps 4 and 5. Consumes left, the histogram; returns nodes (…, 3) and groups (…, 5)."""
    nodes, groups, heads, bits = no_open_packs(len(left) - 1)
    num_nodes, num_groups = np.int64(0), np.int64(0)  # not 0: Numba compiles all over again for a literal
    for strategy in range(len(repeats)):
        first = num_groups
        groups = with_room(groups, num_groups + 1)
        write_group(groups, first, repeats[strategy], len(left) - 1, 0, NONE)
        num_groups += 1
        for length in range(len(left) - 1, 0, -1):
            copies = slots[strategy, length]
            for group in range(first, num_groups):  # those that this adds have the length already
                if copies > 0 and left[length] > 0 and groups[group, COUNT] > 0:
                    nodes, groups = with_room(nodes, num_nodes + 2), with_room(groups, num_groups + 2)
                    left[length], num_nodes, num_groups = deal(
                        length, copies, left[length], group, nodes, groups, num_nodes, num_groups
                    )
        for group in range(first, num_groups):
            if groups[group, DEPTH] == 0:
                groups[group, COUNT] = 0  # a pack without a sequence is none
            elif groups[group, COUNT] > 0:
                keep_open(group, groups, heads, bits, depth_limit)
    return fill_longest_first(left, depth_limit, nodes, groups, heads, bits, num_nodes, num_groups)
