"""The strategies of greatest worth that sum exactly to max_sequence_length, found by dynamic programming.

worth: (max_sequence_length + 1,), what each length is worth in a strategy; worth[0] = 0. A table holds for every sum
the greatest worth of at most k lengths with that sum; tables of i and j lengths combine to one of i + j:

    best_i+j[sum] = max over part of best_i[part] + best_j[sum - part]        (best_1 = worth, best_k[0] = 0)

so depth d takes log2(d) to 2 log2(d) combinations of O(max_sequence_length**2) steps each. The lengths themselves are
not kept: they are found again, for the few sums that are asked for, by looking for the parts that give the same number.
"""

from __future__ import annotations

import numpy as np

from packing.numba_tools import njit

ENDLESS = -1


def table_parts(depth: int, max_sequence_length: int) -> np.ndarray:
    """(tables, 2) int64: from which two tables each comes, for strategies of at most `depth` lengths; row 0 is worth.

    6 -> 1, 2 = 1 + 1, 3 = 2 + 1, 6 = 3 + 3.    A depth that limits nothing needs one table, which extends itself.
    """
    if depth >= max_sequence_length:
        return np.array([(0, 0), (ENDLESS, ENDLESS)], np.int64)
    parts = [(0, 0)]
    for bit in bin(depth)[3:]:
        parts.append((len(parts) - 1, len(parts) - 1))
        if bit == "1":
            parts.append((len(parts) - 1, 0))
    return np.array(parts, np.int64)


@njit(cache=True)
def fill_tables(tables, parts):
    """Every table from the first, which holds worth. In place; tables: (tables, max_sequence_length + 1)."""
    for table in range(1, len(parts)):
        left, right = parts[table, 0], parts[table, 1]
        best, first = tables[table], tables[max(left, 0)]
        for total in range(len(best)):  # best[:] = first takes Numba three seconds to compile
            best[total] = first[total]
        for part in range(1, len(best)):
            if left == ENDLESS:  # whatever sums to `part` is known by now
                _raise(best[part + 1 :], best[part], tables[0][1:])
            elif left == right:  # the smaller part first, so that each pair comes once
                _raise(best[2 * part :], tables[left, part], tables[right][part:])
            else:
                _raise(best[part:], tables[left, part], tables[right])


@njit(cache=True)
def _raise(best, value, added):
    """best[s] = max(best[s], value + added[s]). In place."""
    for s in range(len(best)):
        worth = value + added[s]
        best[s] = worth if worth > best[s] else best[s]


@njit(cache=True)
def find_parts(tables, parts, total, lengths):
    """Write lengths, not in order, that sum to `total` and are worth tables[-1, total]; returns how many they are."""
    count, waiting = 0, 0
    stack = np.empty((len(lengths) + 2 * len(parts), 2), np.int64)
    table = len(parts) - 1
    while total > 0 or waiting > 0:
        if total == 0:  # nothing is left of this part: take up one that waits
            waiting -= 1
            table, total = stack[waiting, 0], stack[waiting, 1]
        elif table == 0:
            lengths[count] = total
            count, total = count + 1, 0
        else:
            left, right = parts[table, 0], parts[table, 1]
            part = 0
            if left == ENDLESS:
                left, right, part = 0, table, 1
            while tables[left, part] + tables[right, total - part] != tables[table, total]:
                part += 1
            stack[waiting, 0], stack[waiting, 1] = left, part
            waiting += 1
            table, total = right, total - part
    return count
