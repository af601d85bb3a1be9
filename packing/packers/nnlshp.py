"""Non-negative least squares histogram packing (arXiv 2107.02027, section 3.2), without its matrix.

1. A strategy is a multiset of lengths that sum exactly to max_sequence_length. With x packs of each, A x counts the
   slots for every length, and should equal the histogram b.
2. Minimise |w (A x - b)| over x >= 0, where w is 0.09 for lengths up to 8: so short a sequence finds a place anyway.
3. Round x to whole packs: once to the nearest, once down.
4. Build them, strategy by strategy, as long as there is a sequence for every slot: every pack built is full.
5. Pack the sequences that are left longest-pack-first.
6. Keep the rounding that needs fewer packs.

The paper lists every strategy as a column of A: 22,102 at 512 tokens and depth 3, too many beyond. Here nnls.py finds
the same minimum from the few hundred columns that it needs, at any depth. The paper also builds packs with empty slots,
which takes 10,000 packs more at 512 tokens and depth 3. Time grows somewhat faster than the cube of
max_sequence_length: 0.05 to 0.3 s at 512, 0.5 to 2 s at 1024, 3 to 15 s at 2048, the limit. Counts do not matter.

It knows strategies without padding only, and minimises a sum of squares, not packs. Where lengths cannot fill packs
exactly (few distinct lengths, or too many long ones) it may need one or two percent more packs than lpfhp.
"""

from __future__ import annotations

import numpy as np

from packing.files.errors import Option, OptionError
from packing.packers.filling import Packs, as_packs
from packing.packers.lpfhp import lpfhp
from packing.packers.nnls import fit_strategies
from packing.plan import PackPlan

SHORT, SHORT_WEIGHT = 8, 0.09
LONGEST = 2048


def nnlshp(histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None) -> PackPlan:
    """Pack a checked histogram by the strategies that fit it best in the sense of least squares.

    {5: 2, 4: 1, 2: 1, 1: 2} into 6 slots -> x: (1, 5) 2.0, (2, 4) 1.0: already whole, and nothing is left over

    Raises ValueError if max_sequence_length is above 2048.
    """
    if max_sequence_length > LONGEST:
        what = f"{Option('max_sequence_length', max_sequence_length)} is more than the {LONGEST} that nnlshp solves"
        cure = f"use {Option('packer', 'lpfhp')}, which takes any length"
        raise OptionError(f"{what}: its time grows with the cube, up to 15 s there; {cure}")
    slots, x, _ = fit_histogram(histogram, max_sequence_length, max_sequences_per_pack)
    packings = []
    for repeats in (np.rint(x), np.floor(x)):
        packs, left = _build(slots, repeats.astype(np.int64), histogram)
        if left.any():
            rest = lpfhp(left, max_sequence_length, max_sequences_per_pack)
            packs.update(as_packs(rest.strategy_lengths, rest.strategy_offsets, rest.repeats))
        packings.append(packs)
    fewest = min(packings, key=Packs.total)
    limits = max_sequence_length, max_sequences_per_pack
    return PackPlan.from_strategies(fewest, list(fewest.values()), *limits, "nnlshp")


def fit_histogram(
    histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Step 2: slots, x and the norm, as nnls.fit_strategies returns them.

    The search starts at the full packs of lpfhp, which saves more than half of it (a tenth at depth 3)."""
    plan = lpfhp(histogram, max_sequence_length, max_sequences_per_pack)
    weights = np.where(np.arange(max_sequence_length + 1) <= SHORT, SHORT_WEIGHT, 1.0)
    depth_limit = max_sequences_per_pack or max_sequence_length
    return fit_strategies(histogram, weights, depth_limit, plan.strategy_lengths, plan.strategy_offsets, plan.repeats)


def _build(slots: np.ndarray, repeats: np.ndarray, histogram: np.ndarray) -> tuple[Packs, np.ndarray]:
    """Step 4: packs, and the histogram of the sequences that are left.

    slots: (strategies, max_sequence_length + 1). repeats: (strategies,) packs wanted."""
    packs, left = Packs(), histogram.copy()
    for row in np.flatnonzero(repeats):
        lengths = np.flatnonzero(slots[row])
        counts = slots[row, lengths]
        full = min(int(repeats[row]), int((left[lengths] // counts).min()))
        if full:
            packs[tuple(np.repeat(lengths, counts).tolist())] = full
            left[lengths] -= full * counts
    return packs, left
