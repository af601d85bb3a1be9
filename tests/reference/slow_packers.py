"""Packers and bounds, one Python object a sequence or a strategy at a time."""

import itertools
from functools import cache

import numpy as np
from scipy.optimize import lsq_linear, nnls


def worst_fit_decreasing(lengths, max_sequence_length, max_sequences_per_pack=None):
    """Textbook: longest first, each into the open pack with the most space, a new pack if it does not fit there."""
    packs = []
    for length in sorted(lengths, reverse=True):
        roomy = [pack for pack in packs if max_sequences_per_pack is None or len(pack) < max_sequences_per_pack]
        emptiest = min(roomy, key=sum, default=None)
        if emptiest is not None and sum(emptiest) + length <= max_sequence_length:
            emptiest.append(length)
        else:
            packs.append([length])
    return packs


def best_fit_decreasing(lengths, max_sequence_length, max_sequences_per_pack=None):
    """Textbook: longest first, each into the fullest open pack that it fits, a new pack if it fits nowhere."""
    packs = []
    for length in sorted(lengths, reverse=True):
        fits = [pack for pack in packs if sum(pack) + length <= max_sequence_length]
        fits = [pack for pack in fits if max_sequences_per_pack is None or len(pack) < max_sequences_per_pack]
        if fits:
            max(fits, key=sum).append(length)
        else:
            packs.append([length])
    return packs


def pack_histogram(histogram, max_sequence_length, max_sequences_per_pack=None, emptiest=True):
    """The paper's SPFHP (emptiest) and LPFHP in plain Python: alike packs are counted, not listed. Returns the packs.

    Longest first; sequences of one length go into alike packs at once: one each into those with the most space, or as
    many as fit into those with the least space that is enough.
    """
    depth = max_sequences_per_pack or max_sequence_length
    open_packs = {}  # space left -> {lengths: packs}
    closed = 0
    for length in range(max_sequence_length, 0, -1):
        left = int(histogram[length])
        while left:
            spaces = [space for space in open_packs if space >= length]
            if spaces:
                space = max(spaces) if emptiest else min(spaces)
                lengths, packs = open_packs[space].popitem()
            else:
                space, lengths, packs = max_sequence_length, (), left
            copies = 1 if emptiest else min(space // length, depth - len(lengths), left)
            placed = min(packs, left // copies)
            if spaces and placed < packs:
                open_packs[space][lengths] = packs - placed
            elif spaces and not open_packs[space]:
                del open_packs[space]
            left, lengths, space = left - copies * placed, (*lengths, *[length] * copies), space - copies * length
            if len(lengths) == depth or not space:
                closed += placed
            else:
                alike = open_packs.setdefault(space, {})
                alike[lengths] = alike.get(lengths, 0) + placed
    return closed + sum(sum(alike.values()) for alike in open_packs.values())


def strategies_that_fill(total, depth, shortest=1):
    """Ascending lengths, at most `depth`, that sum to total exactly: 4, 3 -> (1, 1, 2), (1, 3), (2, 2), (4,)."""
    if depth > 1:
        for length in range(shortest, total // 2 + 1):
            for others in strategies_that_fill(total - length, depth - 1, length):
                yield (length, *others)
    if total >= shortest:
        yield (total,)


def dense_nnls(histogram, depth):
    """Every strategy a column of A: min |w (A x - b)| over x >= 0, w = 0.09 up to length 8. Returns x and the norm."""
    strategies = list(strategies_that_fill(len(histogram) - 1, depth))
    columns = np.zeros((len(histogram), len(strategies)))
    for column, strategy in enumerate(strategies):
        for length in strategy:
            columns[length, column] += 1
    weights = np.array([0.09 if length <= 8 else 1.0 for length in range(len(histogram))])
    matrix, goal = weights[:, None] * columns, weights * histogram
    x, norm = nnls(matrix, goal)
    if not np.isclose(norm, np.linalg.norm(matrix @ x - goal), rtol=1e-6, atol=1e-9 * np.linalg.norm(goal)):
        # SciPy 1.17 returns, now and then, an x that is not the minimum, and a norm that is not that x's.
        x = lsq_linear(matrix, goal, (0, np.inf), method="bvls", tol=1e-15).x
        norm = np.linalg.norm(matrix @ x - goal)
    return x, norm


def best_exact_sum(worth, depth):
    """The greatest worth of at most `depth` lengths with each sum, one length after the other."""
    best = np.array([0, *worth[1:]])
    for _ in range(depth - 1):
        longer = best.copy()
        for length in range(1, len(worth)):
            longer[length:] = np.maximum(longer[length:], worth[length] + best[:-length])
        if np.array_equal(longer, best):
            break
        best = longer
    return best


def fewest_packs(lengths, max_sequence_length, max_sequences_per_pack=None):
    """The true optimum: try every set of companions for the longest sequence that is left. For ten sequences or so."""

    @cache
    def fewest(left):
        if not left:
            return 0
        longest, rest = left[0], left[1:]
        depth = min(len(rest), (max_sequences_per_pack or len(left)) - 1)
        companions = {chosen for size in range(depth + 1) for chosen in itertools.combinations(rest, size)}
        fitting = [chosen for chosen in companions if longest + sum(chosen) <= max_sequence_length]
        return 1 + min(fewest(without(rest, chosen)) for chosen in fitting)

    return fewest(tuple(sorted(lengths, reverse=True)))


def without(values, taken):
    """(5, 3, 3, 2) without (3, 2) -> (5, 3)"""
    left = list(values)
    for value in taken:
        left.remove(value)
    return tuple(left)


def martello_toth(lengths, limit):
    """L2 as in the book: three classes of lengths for every threshold."""
    best = 0
    for k in range(1, limit // 2 + 1):
        large = [x for x in lengths if x > limit - k]
        middle = [x for x in lengths if limit - k >= x > limit / 2]
        small = [x for x in lengths if limit / 2 >= x >= k]
        beside = len(middle) * limit - sum(middle)
        best = max(best, len(large) + len(middle) + max(0, -(-(sum(small) - beside) // limit)))
    return best
