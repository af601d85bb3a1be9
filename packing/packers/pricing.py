"""Pricing: the strategies that are worth most, when every length has a price (Gilmore & Gomory 1961).

price: (lengths,) int64, what a slot for each distinct length is worth; it never falls with the length. A strategy is
worth the sum of its slots' prices. The best one for a length is that length and the best completion with a slot less:

    value[i] = price[i] + best of depth - 1 slots in max_sequence_length - lengths[i] tokens

by dynamic programming. worth: (max_sequence_length + 1,), what a slot of each length is worth; worth[0] = 0. A table
holds for every sum the greatest worth of at most k slots with that sum; tables of i and j slots give one of i + j:

    best_i+j[sum] = max over part of best_i[part] + best_j[sum - part]        (best_1 = worth, best_k[0] = 0)

So depth d takes log2(d) to 2 log2(d) combinations of O(max_sequence_length**2) steps each. Tables do not keep the
slots: the few sums that need them look for the parts that give the same number. Prices are integers, so the greatest
value is exact, and a lower bound is a proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from packing.numba_tools import njit

ENDLESS = -1


@dataclass(frozen=True, eq=False)
class Slots:
    """What a pack offers: lengths (n,) of its slots, ascending and distinct, and at most `depth` slots in one pack."""

    lengths: np.ndarray
    max_sequence_length: int
    depth: int

    @classmethod
    def of(cls, histogram: np.ndarray, max_sequence_length: int, max_sequences_per_pack: int | None) -> Slots:
        lengths = np.flatnonzero(histogram).astype(np.int64)
        deepest = max_sequence_length // int(lengths[0])
        return cls(lengths, max_sequence_length, min(max_sequences_per_pack or deepest, deepest))

    @property
    def unit(self) -> int:
        """The price of a whole pack: as fine as depth * unit leaves sums far below 2**63."""
        return 1 << min(52, 60 - self.depth.bit_length())


@dataclass(frozen=True, eq=False)
class Valuation:
    """The strategies of greatest value under one price.

    values: (lengths,) int64, the value of the best strategy that holds each length.
    """

    slots: Slots
    price: np.ndarray
    values: np.ndarray
    tables: np.ndarray
    parts: np.ndarray
    row_of_slot: np.ndarray

    @property
    def best(self) -> int:
        return int(self.values.max())

    def bound(self, counts: np.ndarray) -> int:
        """The packs that these counts (lengths,) need at least: ceil(sum of count * price / best).

        No pack is worth more than the best strategy. Any prices prove a bound; only good ones prove a good bound."""
        worth = sum(a * b for a, b in zip(counts.tolist(), self.price.tolist(), strict=True))
        return -(-worth // self.best) if self.best else 0

    def strategies(self, above: int, at_most: int, per_length: int) -> list[tuple[int, ...]]:
        """Up to at_most different strategies of a value above `above`, best first, as tuples of indices into lengths.

        A length lies in at most per_length of them."""
        order = np.argsort(-self.values, kind="stable")
        order = order[self.values[order] > above]
        most = min(at_most, len(order))
        # one more, since a slot that holds nothing is written before it is dropped
        rows, edges = np.empty(most * self.slots.depth + 1, np.int64), np.zeros(most + 1, np.int64)
        count = _complete(order, self.slots.lengths, self.row_of_slot, self.tables, self.parts, rows, edges, per_length)
        flat = rows.tolist()
        found = (tuple(sorted(flat[a:b])) for a, b in pairwise(edges[: count + 1].tolist()))
        return list(dict.fromkeys(found))


def value_strategies(slots: Slots, price: np.ndarray) -> Valuation:
    """Price all strategies at once; price (lengths,) int64, not falling, at most slots.unit each."""
    longest = slots.max_sequence_length
    completion = longest if slots.depth * slots.lengths[0] > longest - slots.lengths[0] else slots.depth - 1
    parts = table_parts(completion, longest)
    tables = np.zeros((len(parts), longest + 1), np.int64)
    row_of_slot = np.searchsorted(slots.lengths, np.arange(longest + 1), side="right") - 1  # -1: holds nothing
    tables[0] = np.append(price, 0)[row_of_slot]
    if slots.depth > 1:
        fill_tables(tables, parts)
        values = price + tables[-1, longest - slots.lengths]
    else:
        tables[:] = 0
        values = price
    return Valuation(slots, price, values, tables, parts, row_of_slot)


def whole_prices(slots: Slots, prices: np.ndarray) -> np.ndarray:
    """Prices per length, of any scale, as integers: none above slots.unit, none falling, none negative."""
    prices = np.maximum.accumulate(np.maximum(prices, 0.0))
    return np.floor(prices / max(1.0, prices[-1]) * slots.unit).astype(np.int64)


@njit(cache=True)
def _complete(order, lengths, row_of_slot, tables, parts, rows, offsets, per_length):
    """Write out the best strategy of each length in `order`, in place: rows (indices into lengths), offsets.

    Returns how many there are."""
    longest = tables.shape[1] - 1
    uses, last_use = np.zeros(len(lengths), np.int64), np.full(len(lengths), -1)
    slots, count = np.empty(longest + 1, np.int64), 0
    for row in order:
        if count + 1 == len(offsets):
            break
        first = offsets[count]
        rows[first], end, fresh = row, first + 1, uses[row] < per_length
        found = find_parts(tables, parts, longest - lengths[row], slots) if fresh else 0
        for slot in range(found):
            rows[end] = row_of_slot[slots[slot]]
            if rows[end] >= 0:
                fresh = fresh and uses[rows[end]] < per_length
                end += 1
        if fresh:
            for used in rows[first:end]:
                uses[used] += last_use[used] != count  # copies count once
                last_use[used] = count
            count += 1
            offsets[count] = end
    return count


# Tables


def table_parts(depth: int, max_sequence_length: int) -> np.ndarray:
    """(tables, 2) int64: the two tables that make each one, for strategies of at most `depth` lengths; row 0 is worth.

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
    """Fill every table from the first, which holds worth. In place; tables: (tables, max_sequence_length + 1)."""
    for table in range(1, len(parts)):
        left, right = parts[table, 0], parts[table, 1]
        best, first = tables[table], tables[max(left, 0)]
        for total in range(len(best)):  # best[:] = first takes Numba three seconds to compile
            best[total] = first[total]
        for part in range(1, len(best)):
            if left == ENDLESS:  # best[part] is final by now
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
        if total == 0:  # nothing is left of this part: take one that waits
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
