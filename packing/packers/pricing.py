"""Pricing: the strategies that are worth most, when every length has a price (Gilmore & Gomory 1961).

price: (lengths,) int64, what a slot for each distinct length is worth; it never falls with the length. A strategy is
worth the sum of its slots' prices. The best one for each length is that length and the best completion by a slot less:

    value[i] = price[i] + best of depth - 1 slots in max_sequence_length - lengths[i] tokens

by the tables of exact_sums. Prices are integers, so the greatest value is exact: that makes a lower bound a proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from packing.numba_tools import njit
from packing.packers.exact_sums import fill_tables, find_parts, table_parts


@dataclass(frozen=True, eq=False)
class Slots:
    """What a pack offers: lengths (n,) ascending and distinct, the slots that it can have, at most `depth` in one."""

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
    values: np.ndarray
    tables: np.ndarray
    parts: np.ndarray
    row_of_slot: np.ndarray

    @property
    def best(self) -> int:
        return int(self.values.max())

    def strategies(self, above: int, at_most: int, per_length: int) -> list[tuple[int, ...]]:
        """Up to at_most different strategies of a value above `above`, best first, as tuples of indices into lengths.

        A strategy is left out if one of its lengths lies in per_length of them already."""
        order = np.argsort(-self.values, kind="stable")
        order = order[self.values[order] > above]
        most = min(at_most, len(order))
        # one more: a slot that turns out to hold nothing is written before it is seen to be so
        rows, offsets = np.empty(most * self.slots.depth + 1, np.int64), np.zeros(most + 1, np.int64)
        count = _complete(
            order, self.slots.lengths, self.row_of_slot, self.tables, self.parts, rows, offsets, per_length
        )
        flat = rows.tolist()
        found = (tuple(sorted(flat[a:b])) for a, b in pairwise(offsets[: count + 1].tolist()))
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
    return Valuation(slots, values, tables, parts, row_of_slot)


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
