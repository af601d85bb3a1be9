"""Packing that is provably near the optimum: the cutting-stock linear program, then a dive to whole numbers.

1. Pack shortest-first and longest-first. If the fewer packs meet a cheap lower bound, they are optimal: done.
2. Solve the linear program over strategies (Gilmore & Gomory 1961), beginning with those of step 1: price, add the best
   strategies, solve again, until the lower bound that the prices prove cannot get better.
3. Dive: take the whole part of the solution and round a few of the largest fractions up; fill the slots, longest first;
   solve for what is left, and so on. After each step best fit packs what is left: keep the fewest packs seen.
4. While they exceed the bound: take one or two packs of every strategy apart, and dive again.
5. A pack of more than PRICED_SLOTS tokens is planned in coarser units, with lengths rounded up; rounded down they prove
   a bound. That is done only where step 1 misses the cheap bound by more than TOLERANCE.

The linear program's bound, rounded up, is nearly always met or missed by one pack (the modified integer round-up
property); plan.lower_bound says what is proven for this histogram. The time does not depend on the counts: up to 512
tokens 2 seconds, up to 1024 and in coarser units some seconds. Budgets count simplex steps, so that a plan is the same
every time; only a time_limit looks at the clock.
"""

from __future__ import annotations

import math
from time import monotonic

import numpy as np

from .bounds import lower_bound
from .columns import Slots, value_strategies, whole_prices
from .filling import Packs, add_packs, best_fit, fill_slots
from .linear_program import DUAL, LinearProgram
from .lpfhp import lpfhp
from .plan import PackPlan
from .spfhp import spfhp

PRICED_SLOTS = 1024
"""Token slots of the longest packs that are priced token by token."""

TOLERANCE = 1 / 500
"""Packs above the cheap bound, as a part of it, that make step 5 not worth its seconds."""

STRATEGIES_PER_ROUND, STRATEGIES_PER_LENGTH = 200, 3
ROUNDS, DIVES = 300, 12
SOLVING_WORK = 60_000_000
"""Simplex steps * lengths of step 2, about eight seconds' worth; Wikipedia's 512 lengths take 2 million."""

CLOSING_WORK = 3_000_000
"""The same for steps 3 and 4 once packs are one above the bound; ten times as much while they are further above it."""

DISSOLVED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of the emptiest packs that step 5 tries to place by best fit, which sees the tokens that rounding hides."""

ROUND_UP, LARGEST_PART = 0.7, 8
"""A dive rounds up fractions above ROUND_UP, at most one in LARGEST_PART of them a step, and always one."""


def optimal(
    histogram: np.ndarray,
    max_sequence_length: int,
    max_sequences_per_pack: int | None,
    time_limit: float | None = None,
) -> PackPlan:
    """Pack a checked histogram into the fewest packs, or nearly: plan.num_packs - plan.lower_bound says how nearly.

    {4: 1, 3: 2, 2: 3} into 8 slots -> (2, 3, 3) x 1, (2, 2, 4) x 1; best fit begins with 4 + 3 and needs three packs

    time_limit: seconds after which no further step begins; the plan then depends on the machine. None: budgets of work.
    """
    limits = max_sequence_length, max_sequences_per_pack
    simple = min((pack(histogram, *limits) for pack in (lpfhp, spfhp)), key=lambda plan: plan.num_packs)
    search = Search(histogram, *limits, None if time_limit is None else monotonic() + time_limit)
    search.keep(_packs_of(simple))
    if max_sequence_length <= PRICED_SLOTS:
        search.run()
    elif search.gap > TOLERANCE * search.bound:
        search.run_coarsely()
    return search.plan()


class Search:
    """The fewest packs and the greatest lower bound found so far for one histogram."""

    def __init__(self, histogram, max_sequence_length, max_sequences_per_pack, deadline: float | None = None) -> None:
        self.histogram, self.limits, self.deadline = histogram, (max_sequence_length, max_sequences_per_pack), deadline
        self.slots = Slots.of(histogram, *self.limits)
        self.counts = histogram[self.slots.lengths]
        self.bound = lower_bound(histogram, *self.limits)
        self.packs: Packs = {}
        self.num_packs = sum(self.counts.tolist()) + 1

    @property
    def gap(self) -> int:
        return self.num_packs - self.bound

    def keep(self, packs: Packs) -> None:
        """Remember the packs if they are the fewest."""
        num_packs = sum(packs.values())
        if num_packs < self.num_packs:
            self.packs, self.num_packs = packs, num_packs

    def plan(self) -> PackPlan:
        lengths = [length for pack in self.packs for length in pack]
        offsets = np.cumsum([0, *map(len, self.packs)])
        return PackPlan(*self.limits, lengths, offsets, list(self.packs.values()), "optimal", self.bound)

    def run(self) -> None:
        """Steps 2 to 4."""
        if not self.gap:
            return
        self.solve()
        self.random, self.closing_work = np.random.default_rng(0), self.program.work
        self.dive({}, self.repeats)
        for number in range(DIVES):
            if self.is_done():
                return
            apart = 1 + number % 2
            self.dive({pack: packs - apart for pack, packs in self.packs.items() if packs > apart})

    def run_coarsely(self) -> None:
        """Step 5. What fits in coarser units, rounded up, fits; what does not fit, rounded down, does not."""
        length, depth = self.limits
        unit = -(-length // PRICED_SLOTS)
        capacity, lengths = length // unit, np.arange(length + 1)
        down = Search(_regroup(self.histogram, lengths // unit), capacity, depth, self.deadline)
        down.solve()
        self.bound = max(self.bound, down.bound)
        up = Search(_regroup(self.histogram, np.minimum(-(-lengths // unit), capacity)), capacity, depth, self.deadline)
        up.keep(_packs_of(lpfhp(up.histogram, *up.limits)))
        up.run()
        slots = {tuple(unit * slot if slot < capacity else length for slot in pack): n for pack, n in up.packs.items()}
        packs = fill_slots(slots, self.histogram.copy())
        self.keep(packs)
        for share in DISSOLVED:
            self.keep(self.without_emptiest(packs, share))

    def without_emptiest(self, packs: Packs, share: float) -> Packs:
        """Take apart the emptiest packs, this share of them all, and place their sequences by best fit."""
        dissolved, left = int(share * sum(packs.values())), np.zeros_like(self.histogram)
        kept: Packs = {}
        for pack, number in sorted(packs.items(), key=lambda item: (sum(item[0]), item[0])):
            apart = min(number, dissolved)
            dissolved -= apart
            for length in pack:
                left[length] += apart
            if number > apart:
                kept[pack] = number - apart
        return best_fit(kept, left, self.slots.depth)

    def solve(self) -> None:
        """Step 2. Leaves the program, its repeats and the bound."""
        self.program = LinearProgram(self.counts)
        row = {length: row for row, length in enumerate(self.slots.lengths.tolist())}
        longest, depth = self.limits[0], self.slots.depth
        self.program.add((row[length],) * min(depth, longest // length) for length in row)
        for pack in (lpfhp, spfhp):
            plan = pack(self.histogram, *self.limits)
            self.program.add(tuple(row[length] for length in strategy) for strategy in plan.strategies)
        for _ in range(ROUNDS):
            packs, self.repeats, prices = self.program.solve()
            found, bound = self.price(prices, self.counts)
            self.bound = max(self.bound, bound)
            settled = math.ceil(packs * (1 - 1e-13) - 1e-7) <= self.bound
            if settled or not self.program.add(found) or self.program.work > SOLVING_WORK or self.is_late():
                break

    def price(self, prices: np.ndarray, counts: np.ndarray) -> tuple[list[tuple[int, ...]], int]:
        """The strategies that the program lacks most, and the lower bound for these counts that the prices prove."""
        prices = whole_prices(self.slots, prices)
        valuation = value_strategies(self.slots, prices)
        worth = sum(a * b for a, b in zip(counts.tolist(), prices.tolist(), strict=True))
        above = self.slots.unit + (self.slots.unit >> 30)
        found = valuation.strategies(above, STRATEGIES_PER_ROUND, STRATEGIES_PER_LENGTH)
        return found, -(-worth // valuation.best) if valuation.best else 0

    def dive(self, packs: Packs, repeats: np.ndarray | None = None) -> None:
        """Step 3, from packs that are settled; repeats: the program's solution for all others, if it is known."""
        left = self.histogram.copy()
        for pack, number in packs.items():
            for length in pack:
                left[length] -= number
        while left.any() and not self.is_done():
            if repeats is not None:
                chosen = np.floor(repeats + 1e-6).astype(np.int64)
            else:
                self.program.demand(left[self.slots.lengths])
                needed, repeats, _ = self.program.solve(DUAL)
                if sum(packs.values()) + math.ceil(needed - 1e-6) >= self.num_packs:
                    return
                chosen = self.round_up(repeats)
            add_packs(packs, fill_slots(self.slots_of(chosen), left))
            self.keep(best_fit(packs, left, self.slots.depth))
            repeats = None

    def round_up(self, repeats: np.ndarray) -> np.ndarray:
        """Whole repeats: all are rounded down, a few of the largest fractions up; at least one is not 0."""
        chosen = np.floor(repeats + 1e-6).astype(np.int64)
        fractions = repeats - chosen
        fractional = fractions > 1e-6
        fractions += 0.05 * fractional * self.random.random(len(fractions))  # so that no two dives are alike
        largest = np.argsort(-fractions, kind="stable")[: max(1, fractional.sum() // LARGEST_PART)]
        chosen[largest[fractions[largest] > ROUND_UP]] += 1
        if not chosen.any():
            chosen[largest[0]] = 1
        return chosen

    def slots_of(self, chosen: np.ndarray) -> Packs:
        """The chosen strategies as {slots: packs}."""
        lengths = self.slots.lengths.tolist()
        strategies = ((self.program.strategies[number], number) for number in np.flatnonzero(chosen).tolist())
        return {tuple(lengths[row] for row in strategy): int(chosen[number]) for strategy, number in strategies}

    def is_done(self) -> bool:
        """The bound is met, or the budget is spent."""
        spent = self.program.work - self.closing_work
        return not self.gap or spent > CLOSING_WORK * (1 if self.gap == 1 else 10) or self.is_late()

    def is_late(self) -> bool:
        return self.deadline is not None and monotonic() > self.deadline


def _packs_of(plan: PackPlan) -> Packs:
    packs: Packs = {}
    for strategy, repeats in zip(plan.strategies, plan.repeats.tolist(), strict=True):
        packs[strategy] = packs.get(strategy, 0) + repeats
    return packs


def _regroup(histogram: np.ndarray, group_of_length: np.ndarray) -> np.ndarray:
    """Sequences per group; group 0 is left out, as no room is needed for it."""
    regrouped = np.zeros(group_of_length[-1] + 1, np.int64)
    np.add.at(regrouped, group_of_length, histogram)
    regrouped[0] = 0
    return regrouped
