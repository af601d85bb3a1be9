"""Packing that is provably near the optimum: the cutting-stock linear program, then a dive to whole numbers.

1. Pack longest-first, shortest-first and, up to PRICED_SLOTS, by least squares. As soon as packs meet a cheap lower
   bound, they are optimal: done.
2. Solve the linear program over strategies (Gilmore & Gomory 1961), beginning with those of step 1: price, add the best
   strategies, solve again, until the lower bound that the prices prove cannot get better. The strategies of nnlshp are
   often all that is missing: from the others alone it takes a hundred rounds where lengths and depth both limit.
3. Dive: take the whole part of the solution and round a few of the largest fractions up; fill the slots, longest first;
   solve for what is left, and so on. After each step best fit packs what is left: keep the fewest packs seen.
4. While they exceed the bound: take some packs apart, those that waste most and some at random, and dive again.
5. A pack of more than PRICED_SLOTS tokens is planned in coarser units, with lengths rounded up; rounded down they prove
   a bound. That is done only where step 1 misses the cheap bound by more than TOLERANCE.

The linear program's bound, rounded up, is nearly always met or missed by one pack (the modified integer round-up
property); plan.lower_bound says what is proven for this histogram. Up to PRICED_SLOTS no other packer here needs fewer
packs; beyond, spfhp and lpfhp do not. The time does not depend on the counts: up to 512 tokens 2 seconds, up to 1024
and in coarser units some seconds. Budgets count simplex steps, so that a plan is the same every time; only a
time_limit looks at the clock.

The first call ever compiles: 21 to 28 seconds of CPU time were measured, on two busy cores. The first one in a later
process loads that and HiGHS, which takes about a second.
"""

from __future__ import annotations

import math
from time import monotonic

import numpy as np
from tqdm import tqdm

from packing.bounds import lower_bound
from packing.packers.filling import Packs, add_packs, best_fit, fill_slots
from packing.packers.linear_program import DUAL, LinearProgram
from packing.packers.lpfhp import lpfhp
from packing.packers.nnlshp import nnlshp
from packing.packers.pricing import Slots, value_strategies, whole_prices
from packing.packers.spfhp import spfhp
from packing.plan import PackPlan

PRICED_SLOTS = 1024
"""Token slots of the longest packs that are priced token by token."""

TOLERANCE = 1 / 500
"""Packs above the cheap bound, as a part of it, that make step 5 not worth its seconds."""

STRATEGIES_PER_ROUND, STRATEGIES_PER_LENGTH = 200, 3
ROUNDS, DIVES = 300, 40
SOLVING_WORK = 60_000_000
"""Simplex steps * lengths of step 2, about eight seconds' worth; Wikipedia's 512 lengths take 1 million."""

CLOSING_WORK = 14
"""The same for steps 3 and 4, in parts of max_sequence_length ** 2; three times that while the gap is above 1."""

APART = 100
"""Packs that step 4 takes apart: enough to come out otherwise, few enough to be solved in a tenth of the time."""

PRICED_AGAIN = 4
"""Rounds of pricing for what is left in a dive, before it is given up."""

DISSOLVED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of the emptiest packs that step 5 tries to place by best fit, which sees the tokens that rounding hides."""

ROUND_UP, LARGEST_PART = 0.7, 8
"""A dive rounds up fractions above ROUND_UP, at most one in LARGEST_PART of them a step, and always one."""


def optimal(
    histogram: np.ndarray,
    max_sequence_length: int,
    max_sequences_per_pack: int | None,
    time_limit: float | None = None,
    progress: bool = False,
) -> PackPlan:
    """Pack a checked histogram into the fewest packs, or nearly: plan.num_packs - plan.lower_bound says how nearly.

    {4: 1, 3: 2, 2: 3} into 8 slots -> (2, 3, 3) x 1, (2, 2, 4) x 1; best fit begins with 4 + 3 and needs three packs

    time_limit: seconds after which no further step begins; the plan then depends on the machine. None: budgets of work.
    progress: show a bar on stderr, if it takes more than two seconds.
    """
    deadline = None if time_limit is None else monotonic() + time_limit
    with tqdm(desc="planning", unit=" steps", delay=2, disable=not progress) as bar:
        search = Search(histogram, (max_sequence_length, max_sequences_per_pack), deadline, bar)
        if max_sequence_length <= PRICED_SLOTS:
            search.run()
        else:
            search.run_coarsely()
        return search.plan()


class Search:
    """The fewest packs and the greatest lower bound found so far for one histogram."""

    def __init__(
        self, histogram: np.ndarray, limits: tuple[int, int | None], deadline: float | None, bar: tqdm
    ) -> None:
        self.histogram, self.limits = histogram, limits
        self.deadline, self.bar = deadline, bar
        self.slots = Slots.of(histogram, *self.limits)
        self.counts = histogram[self.slots.lengths]
        self.bound = lower_bound(histogram, *self.limits)
        self.packs: Packs = {}
        self.num_packs = sum(self.counts.tolist()) + 1
        self.simple: list[PackPlan] = []
        self.random = np.random.default_rng(0)

    @property
    def gap(self) -> int:
        return self.num_packs - self.bound

    def keep(self, packs: Packs) -> None:
        """Remember the packs if they are the fewest."""
        num_packs = sum(packs.values())
        if num_packs < self.num_packs:
            self.packs, self.num_packs = packs, num_packs
        self.tell()

    def tell(self) -> None:
        self.bar.set_postfix_str(f"{self.num_packs:,} packs, {self.gap:,} above the bound", refresh=False)
        self.bar.update()

    def plan(self) -> PackPlan:
        lengths = np.array([length for pack in self.packs for length in pack])
        offsets = np.cumsum([0, *map(len, self.packs)])
        return PackPlan(*self.limits, lengths, offsets, np.array(list(self.packs.values())), "optimal", self.bound)

    def run(self) -> None:
        """Steps 1 to 4."""
        self.pack_simply()
        if not self.gap or self.is_late():
            return
        self.solve()
        self.closing_work = self.program.work
        self.dive({}, self.repeats)
        for _ in range(DIVES):
            if self.is_done():
                return
            self.dive(self.without_wasteful())

    def pack_simply(self) -> None:
        """Step 1. Without nnlshp, which takes more than milliseconds, if it is late or there are many lengths."""
        slow = self.is_late() or self.limits[0] > PRICED_SLOTS
        for pack in (lpfhp, spfhp) if slow else (lpfhp, spfhp, nnlshp):
            if self.gap:
                self.simple.append(pack(self.histogram, *self.limits))
                self.keep(_packs_of(self.simple[-1]))

    def without_wasteful(self) -> Packs:
        """Step 4: the packs, less APART of those that are worth least by the program's prices.

        Most packs are worth exactly a pack; among these chance decides."""
        price = np.zeros(len(self.histogram))
        price[self.slots.lengths] = self.prices
        kept, strategies = dict(self.packs), list(self.packs)
        waste = 1 - np.array([price[list(strategy)].sum() for strategy in strategies])
        waste, apart = np.maximum(waste, 1e-3 * self.random.random(len(waste))), 0
        for number in np.argsort(-waste, kind="stable").tolist():
            taken = min(2, kept[strategies[number]])
            kept[strategies[number]] -= taken
            apart += taken
            if apart >= APART:
                break
        return {strategy: packs for strategy, packs in kept.items() if packs}

    def run_coarsely(self) -> None:
        """Step 5. What fits in coarser units, rounded up, fits; what does not fit, rounded down, does not."""
        self.pack_simply()
        if self.gap <= TOLERANCE * self.bound:
            return
        length, depth = self.limits
        unit = -(-length // PRICED_SLOTS)
        capacity, lengths = length // unit, np.arange(length + 1)
        at_least = _regroup(self.histogram, lengths // unit)
        if at_least.any():  # no length may have a whole unit
            down = Search(at_least, (capacity, depth), self.deadline, self.bar)
            down.pack_simply()
            down.solve()
            self.bound = max(self.bound, down.bound)
        rounded = np.minimum(-(-lengths // unit), capacity)
        up = Search(_regroup(self.histogram, rounded), (capacity, depth), self.deadline, self.bar)
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
        """Step 2. Leaves the program, its repeats and prices, and the bound."""
        self.program = LinearProgram(self.counts)
        row = {length: row for row, length in enumerate(self.slots.lengths.tolist())}
        longest, depth = self.limits[0], self.slots.depth
        self.program.add((row[length],) * min(depth, longest // length) for length in row)
        for plan in self.simple:
            self.program.add(tuple(row[length] for length in strategy) for strategy in plan.strategies)
        for _ in range(ROUNDS):
            packs, self.repeats, self.prices = self.program.solve()
            found, bound = self.price(self.prices, self.counts)
            self.bound = max(self.bound, bound)
            self.tell()
            settled = math.ceil(packs * (1 - 1e-13) - 1e-7) <= self.bound
            if settled or not self.program.add(found) or self.program.work > SOLVING_WORK or self.is_late():
                break

    def price(self, prices: np.ndarray, counts: np.ndarray) -> tuple[list[tuple[int, ...]], int]:
        """The strategies that the program lacks most, and the lower bound for these counts that the prices prove."""
        valuation = value_strategies(self.slots, whole_prices(self.slots, prices))
        above = self.slots.unit + (self.slots.unit >> 30)
        found = valuation.strategies(above, STRATEGIES_PER_ROUND, STRATEGIES_PER_LENGTH)
        return found, valuation.bound(counts)

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
                repeats = self.solve_rest(left, self.num_packs - 1 - sum(packs.values()))
                if repeats is None:
                    return
                chosen = self.round_up(repeats)
            add_packs(packs, fill_slots(self.slots_of(chosen), left))
            self.keep(best_fit(packs, left, self.slots.depth))
            repeats = None

    def solve_rest(self, left: np.ndarray, most: int) -> np.ndarray | None:
        """The program's repeats for what is left, or None if it finds none of at most so many packs."""
        counts = left[self.slots.lengths]
        self.program.demand(counts)
        packs, repeats, prices = self.program.solve(DUAL)
        for _ in range(PRICED_AGAIN):
            if math.ceil(packs - 1e-6) <= most:
                return repeats
            found, bound = self.price(prices, counts)
            if bound > most or not self.program.add(found):
                return None
            packs, repeats, prices = self.program.solve()
        return repeats if math.ceil(packs - 1e-6) <= most else None

    def round_up(self, repeats: np.ndarray) -> np.ndarray:
        """Whole repeats: all are rounded down, a few of the largest fractions up; at least one is not 0."""
        chosen = np.floor(repeats + 1e-6).astype(np.int64)
        fractions: np.ndarray = repeats - chosen
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
        budget = CLOSING_WORK * self.limits[0] ** 2
        return not self.gap or spent > (budget if self.gap == 1 else 3 * budget) or self.is_late()

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
