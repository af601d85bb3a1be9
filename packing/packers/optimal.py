"""Packing that is provably near the optimum: the cutting-stock linear program, then a dive to whole numbers.

1. Pack longest-first, shortest-first and, up to PRICED_SLOTS, by least squares. Stop as soon as the packs meet a cheap
   lower bound: they are optimal.
2. Solve the linear program over strategies (Gilmore & Gomory 1961), beginning with those of step 1. Price, add the best
   strategies and solve again, until the prices can prove no better lower bound. Where lengths and depth both limit, the
   strategies of nnlshp save a hundred rounds.
3. Dive: take the whole part of the solution and round a few of the largest fractions up; fill the slots, longest first;
   solve for what is left, and so on. After each step, best fit packs what is left. Keep the fewest packs seen.
4. While they exceed the bound, take some packs apart, those that waste most and some at random, and dive again.
5. Plan a pack of more than PRICED_SLOTS tokens in coarser units: lengths rounded up make packs, lengths rounded down
   prove a bound. Do so only where step 1 misses the cheap bound by more than TOLERANCE.

A plan nearly always meets the linear program's bound, rounded up, or misses it by one pack (the modified integer
round-up property); plan.lower_bound is what is proven for this histogram. Up to PRICED_SLOTS no other packer here needs
fewer packs; beyond, spfhp and lpfhp need no fewer. The time does not depend on the counts: 2 seconds up to 512 tokens,
some seconds above. Budgets count simplex steps, so that a plan is always the same; only a time_limit uses the clock.
"""

from __future__ import annotations

import math
from time import monotonic

import numpy as np
from tqdm import tqdm

from packing.bounds import lower_bound
from packing.files.progress import progress_bar
from packing.packers.filling import Packs, Strategy, as_packs, best_fit, fill_slots
from packing.packers.linear_program import DUAL, LinearProgram
from packing.packers.lpfhp import lpfhp
from packing.packers.nnlshp import nnlshp
from packing.packers.pricing import Slots, value_strategies, whole_prices
from packing.packers.spfhp import spfhp
from packing.plan import PackPlan

PRICED_SLOTS = 1024  # token slots of the longest packs that are priced token by token
TOLERANCE = 1 / 500  # share of packs above the cheap bound up to which step 5 is not worth its seconds
STRATEGIES_PER_ROUND, STRATEGIES_PER_LENGTH = 200, 3
ROUNDS, DIVES = 300, 40
SOLVING_WORK = 60_000_000  # simplex steps * lengths of step 2: eight seconds; Wikipedia's 512 lengths take 1 million
CLOSING_WORK = 14  # the same for steps 3 and 4, per max_sequence_length ** 2; three times that while the gap is above 1
APART = 100  # packs that step 4 takes apart: enough for another result, few enough to solve in a tenth of the time
PRICED_AGAIN = 4  # rounds of pricing for what is left in a dive, before the dive stops
DISSOLVED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # shares of the emptiest packs that step 5 places again by best fit
ROUND_UP, LARGEST_PART = 0.7, 8  # a dive rounds up fractions above the first, one in 8 of them a step, and always one


def optimal(
    histogram: np.ndarray,
    max_sequence_length: int,
    max_sequences_per_pack: int | None,
    time_limit: float | None = None,
    progress: bool = False,
) -> PackPlan:
    """Pack a checked histogram into the fewest packs, or at most plan.num_packs - plan.lower_bound more.

    {4: 1, 3: 2, 2: 3} into 8 slots -> (2, 3, 3) x 1, (2, 2, 4) x 1; best fit begins with 4 + 3 and needs three packs

    time_limit: seconds after which no further step starts; the plan then depends on the machine. None: budgets of work.
    progress: show a bar on stderr once it takes more than two seconds.
    """
    deadline = None if time_limit is None else monotonic() + time_limit
    with progress_bar(desc="planning", unit=" steps", delay=2, disable=not progress) as bar:
        search = Search(histogram, (max_sequence_length, max_sequences_per_pack), deadline, bar)
        if max_sequence_length <= PRICED_SLOTS:
            search.run()
        else:
            search.run_coarsely()
        return search.plan()


class Search:
    """The fewest packs and the greatest lower bound found so far for one histogram."""

    def __init__(self, histogram: np.ndarray, limits: tuple[int, int | None], deadline: float | None, bar: tqdm):
        self.histogram, self.limits = histogram, limits
        self.deadline, self.bar = deadline, bar
        self.slots = Slots.of(histogram, *self.limits)
        self.counts = histogram[self.slots.lengths]
        self.bound = lower_bound(histogram, *self.limits)
        self.packs = Packs()
        self.num_packs = sum(self.counts.tolist()) + 1
        self.simple: list[PackPlan] = []
        self.random = np.random.default_rng(0)

    @property
    def gap(self) -> int:
        return self.num_packs - self.bound

    def keep(self, packs: Packs) -> None:
        """Remember the packs if they are the fewest."""
        if packs.total() < self.num_packs:
            self.packs, self.num_packs = packs, packs.total()
        self.tell()

    def tell(self) -> None:
        self.bar.set_postfix_str(f"{self.num_packs:,} packs, {self.gap:,} above the bound", refresh=False)
        self.bar.update()

    def plan(self) -> PackPlan:
        return PackPlan.from_strategies(self.packs, list(self.packs.values()), *self.limits, "optimal", self.bound)

    def run(self) -> None:
        """Steps 1 to 4."""
        self.pack_simply()
        if not self.gap or self.is_late():
            return
        self.solve()
        self.closing_work = self.program.work
        self.dive(Packs(), self.repeats)
        for _ in range(DIVES):
            if self.is_done():
                return
            self.dive(self.without_wasteful())

    def pack_simply(self) -> None:
        """Step 1, without the slow nnlshp if it is late or packs are long."""
        slow = self.is_late() or self.limits[0] > PRICED_SLOTS
        for pack in (lpfhp, spfhp) if slow else (lpfhp, spfhp, nnlshp):
            if self.gap:
                plan = pack(self.histogram, *self.limits)
                self.simple.append(plan)
                self.keep(as_packs(plan.strategy_lengths, plan.strategy_offsets, plan.repeats))

    def without_wasteful(self) -> Packs:
        """Step 4: the packs without the APART that are worth least by the program's prices.

        Most packs are worth exactly a pack; chance decides among these."""
        price = np.zeros(len(self.histogram))
        price[self.slots.lengths] = self.prices
        kept, strategies = self.packs.copy(), list(self.packs)
        waste = 1 - np.array([price[list(strategy)].sum() for strategy in strategies])
        waste, apart = np.maximum(waste, 1e-3 * self.random.random(len(waste))), 0
        for number in np.argsort(-waste, kind="stable").tolist():
            taken = min(2, kept[strategies[number]])
            kept[strategies[number]] -= taken
            apart += taken
            if apart >= APART:
                break
        return +kept  # + drops strategies that have no pack left

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
        """Take apart this share of the packs, the emptiest, and place their sequences by best fit.

        Best fit sees the tokens that rounding hides."""
        dissolved, left, kept = int(share * packs.total()), np.zeros_like(self.histogram), Packs()
        for pack, number in sorted(packs.items(), key=lambda item: (sum(item[0]), item[0])):
            apart = min(number, dissolved)
            dissolved -= apart
            for length in pack:
                left[length] += apart
            if number > apart:
                kept[pack] = number - apart
        return best_fit(kept, left, self.slots.depth)

    def solve(self) -> None:
        """Step 2: sets the program, its repeats and prices, and the bound."""
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
        """The strategies that the program lacks most, and the lower bound that the prices prove for these counts."""
        valuation = value_strategies(self.slots, whole_prices(self.slots, prices))
        above = self.slots.unit + (self.slots.unit >> 30)
        found = valuation.strategies(above, STRATEGIES_PER_ROUND, STRATEGIES_PER_LENGTH)
        return found, valuation.bound(counts)

    def dive(self, packs: Packs, repeats: np.ndarray | None = None) -> None:
        """Step 3, beginning with finished packs. repeats: the program's solution for the rest, if it is known."""
        left = self.histogram.copy()
        for pack, number in packs.items():
            for length in pack:
                left[length] -= number
        while left.any() and not self.is_done():
            if repeats is not None:
                chosen = np.floor(repeats + 1e-6).astype(np.int64)
            else:
                repeats = self.solve_rest(left, self.num_packs - 1 - packs.total())
                if repeats is None:
                    return
                chosen = self.round_up(repeats)
            packs.update(fill_slots(self.slots_of(chosen), left))
            self.keep(best_fit(packs, left, self.slots.depth))
            repeats = None

    def solve_rest(self, left: np.ndarray, most: int) -> np.ndarray | None:
        """The program's repeats for what is left, or None if they take more packs than `most`."""
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
        """Whole repeats: a few of the largest fractions rounded up, all others down; at least one is not 0."""
        chosen = np.floor(repeats + 1e-6).astype(np.int64)
        fractions: np.ndarray = repeats - chosen
        fractional = fractions > 1e-6
        fractions += 0.05 * fractional * self.random.random(len(fractions))  # no two dives are alike
        largest = np.argsort(-fractions, kind="stable")[: max(1, fractional.sum() // LARGEST_PART)]
        chosen[largest[fractions[largest] > ROUND_UP]] += 1
        if not chosen.any():
            chosen[largest[0]] = 1
        return chosen

    def slots_of(self, chosen: np.ndarray) -> dict[Strategy, int]:
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


def _regroup(histogram: np.ndarray, group_of_length: np.ndarray) -> np.ndarray:
    """Sequences per group, without group 0, which needs no room."""
    regrouped = np.zeros(group_of_length[-1] + 1, np.int64)
    np.add.at(regrouped, group_of_length, histogram)
    regrouped[0] = 0
    return regrouped
