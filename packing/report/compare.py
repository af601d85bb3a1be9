"""Every packer at every depth on one histogram, as numbers: what to expect of a corpus before anything is packed.

The predicted speed-up assumes that a token slot costs the same wherever it is:

    speed-up = (1 - OVERHEAD) * token slots of the padded rows / token slots of the packs

Rows are padded to max_sequence_length, or to the longest of ROWS_PER_BATCH random sequences. For the latter it promises
too much: attention makes short rows cheaper, and batches of like lengths have less padding. It knows nothing of the
optimizer, of communication or of a slow data loader.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from packing.files.progress import progress_bar
from packing.packers.table import PACKERS, Packer, plan_packs
from packing.plan import PackPlan

DEPTHS = (2, 3, 4, 8, 16, None)  # None = no limit
OVERHEAD = 0.043  # masks and per-sequence losses, arXiv 2107.02027: 1.913 times as fast at a packing factor of 2.00
ROWS_PER_BATCH = 32
NEARLY = 0.001  # share of packs that a shallower plan may need more and still be recommended


@dataclass(frozen=True, eq=False)
class Attempt:
    """The plan of one packer under one depth limit. seconds: wall time of the packer, without compilation."""

    packer: str
    max_sequences_per_pack: int | None
    plan: PackPlan
    seconds: float


@dataclass(frozen=True)
class Refusal:
    """Why a packer makes no plan under a depth limit, in the words of its error."""

    packer: str
    max_sequences_per_pack: int | None
    reason: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """What each packer makes of one histogram. str() is a table.

    padded: the plan without packing, one sequence in a row.
    attempts: packer by packer, from the least depth limit to none.
    """

    histogram: np.ndarray
    padded: PackPlan
    attempts: tuple[Attempt | Refusal, ...]

    @property
    def max_sequence_length(self) -> int:
        return self.padded.max_sequence_length

    @cached_property
    def plans(self) -> tuple[Attempt, ...]:
        """The attempts that made a plan."""
        return tuple(attempt for attempt in self.attempts if isinstance(attempt, Attempt))

    @cached_property
    def recommended(self) -> Attempt | None:
        """The shallowest plan within NEARLY of the fewest packs; of equally deep ones, the one with the fewest packs.

        Depth costs: every batch has as many sequence slots as the deepest pack has sequences.
        """
        if not self.plans:
            return None
        fewest = min(attempt.plan.num_packs for attempt in self.plans)
        good = [attempt for attempt in self.plans if attempt.plan.num_packs <= fewest * (1 + NEARLY)]
        return min(good, key=lambda a: (_limit(a.max_sequences_per_pack), a.plan.num_packs))

    def lower_bound(self, max_sequences_per_pack: int | None) -> int:
        """The best bound that any plan here proves: a bound under a looser limit also holds under a tighter one."""
        limit = _limit(max_sequences_per_pack)
        bounds = [a.plan.lower_bound for a in self.plans if _limit(a.max_sequences_per_pack) >= limit]
        return max([-(-self.padded.num_tokens // self.max_sequence_length), *bounds])

    def packs_above_bound(self, attempt: Attempt) -> int:
        return attempt.plan.num_packs - self.lower_bound(attempt.max_sequences_per_pack)

    def speedup(self, plan: PackPlan) -> float:
        """The predicted speed-up over rows padded to max_sequence_length."""
        return (1 - OVERHEAD) * self.padded.num_packs / plan.num_packs

    def speedup_over_batches(self, plan: PackPlan) -> float:
        """The predicted speed-up over rows padded to the longest of ROWS_PER_BATCH sequences drawn at random."""
        slots = plan.num_packs * self.max_sequence_length / plan.num_sequences
        return (1 - OVERHEAD) * expected_longest(self.histogram, ROWS_PER_BATCH) / slots

    def summary(self) -> str:
        """One line on the corpus, and how much of it would be padding."""
        longest = int(np.flatnonzero(self.histogram)[-1])
        return (
            f"{self.padded.num_sequences:,} sequences, {self.padded.num_tokens:,} tokens, longest {longest:,}; "
            f"one in a row of {self.max_sequence_length:,}: {1 - self.padded.packing_efficiency:.1%} padding"
        )

    def rows(self) -> list[tuple[Attempt | Refusal, dict[str, str]]]:
        """The table: each row's attempt, and its cells by the names in COLUMNS. A refusal has packer, depth, refusal.

        A packer that refuses every depth for one reason has one row.
        """
        padded = Attempt("padded", 1, self.padded, 0.0)
        no_plan = dict.fromkeys(("above bound", "time", "vs padded", "vs batches"), "")
        rows: list[tuple[Attempt | Refusal, dict[str, str]]] = []
        for attempt in (padded, *self.attempts):
            if isinstance(attempt, Attempt):
                cells = {name: cell(self, attempt) for name, cell in COLUMNS.items()}
                rows.append((attempt, cells | no_plan if attempt is padded else cells))
                continue
            siblings = [other for other in self.attempts if other.packer == attempt.packer]
            is_any = len(siblings) > 1 and all(getattr(other, "reason", "") == attempt.reason for other in siblings)
            if attempt is siblings[0] or not is_any:
                depth = "any" if is_any else depth_name(attempt.max_sequences_per_pack)
                rows.append((attempt, {"packer": attempt.packer, "depth": depth, "refusal": attempt.reason}))
        return rows

    def __str__(self) -> str:
        rows = [row for _, row in self.rows()]
        widths = {name: max(len(row.get(name, "")) for row in [*rows, {name: name}]) for name in COLUMNS}
        heading = {name: name for name in COLUMNS}
        return "\n".join([self.summary(), *(_line(row, widths) for row in [heading, *rows]), *NOTES])


COLUMNS: dict[str, Callable[[Comparison, Attempt], str]] = {
    "packer": lambda comparison, attempt: attempt.packer,
    "depth": lambda comparison, attempt: depth_name(attempt.max_sequences_per_pack),
    "packs": lambda comparison, attempt: f"{attempt.plan.num_packs:,}",
    "efficiency": lambda comparison, attempt: f"{attempt.plan.packing_efficiency:.5f}",
    "factor": lambda comparison, attempt: f"{attempt.plan.packing_factor:.4f}",
    "deepest": lambda comparison, attempt: f"{attempt.plan.max_depth:,}",
    "above bound": lambda comparison, attempt: _above(comparison, attempt),
    "time": lambda comparison, attempt: _seconds(attempt.seconds),
    "vs padded": lambda comparison, attempt: f"{comparison.speedup(attempt.plan):.2f} x",
    "vs batches": lambda comparison, attempt: f"{comparison.speedup_over_batches(attempt.plan):.2f} x",
}

NOTES = (
    "depth: sequences in a pack at most; deepest: in the deepest pack; factor: sequences per pack on average",
    "above bound: packs more than the best lower bound proven here; no packing can save more than these",
    f"vs padded: predicted training speed-up, {1 - OVERHEAD:.3f} x padded slots / packed slots",
    f"vs batches: the same against rows padded to the longest of {ROWS_PER_BATCH} random sequences",
)


def compare_packers(
    histogram: ArrayLike,
    max_sequence_length: int | None = None,
    depths: Iterable[int | None] = DEPTHS,
    packers: dict[str, Packer] | None = None,
    progress: bool = False,
) -> Comparison:
    """Plan the histogram with every packer under every depth limit.

    histogram: sequences per length, indexed by length. max_sequence_length: None: len(histogram) - 1.
    depths: with a None among them, limits that no pack can reach are left out.
    packers: {name: packer}; None: PACKERS. One that raises ValueError is listed with its reason.
    progress: show a bar on stderr.
    """
    padded = plan_packs(histogram, max_sequence_length, 1, "spfhp")  # also refuses a bad histogram
    packers = PACKERS if packers is None else packers
    depths = _distinct(depths, padded)
    cases = [(name, depth) for name in packers for depth in depths]
    attempts = []
    with progress_bar(cases, desc="planning", unit="plan", disable=not progress) as bar:
        for name, depth in bar:
            bar.set_postfix_str(f"{name}, depth {depth_name(depth)}")
            attempt = _attempt(name, packers[name], padded, depth)
            if depth == depths[0] and isinstance(attempt, Attempt):  # it may have compiled the packer: again
                attempt = _attempt(name, packers[name], padded, depth)
            attempts.append(attempt)
    return Comparison(padded.histogram(), padded, tuple(attempts))


def expected_longest(histogram: np.ndarray, sequences: int) -> float:
    """Mean length of the longest of `sequences` sequences drawn at random, with replacement; in tokens.

    P(longest <= l) = P(length <= l) ** sequences
    """
    at_most = np.cumsum(histogram / histogram.sum())
    return float((1 - np.minimum(at_most, 1.0) ** sequences).sum())


def depth_name(max_sequences_per_pack: int | None) -> str:
    """A depth limit in words: None -> "no limit", 1000 -> "1,000"."""
    return "no limit" if max_sequences_per_pack is None else f"{max_sequences_per_pack:,}"


def _attempt(name: str, packer: Packer, padded: PackPlan, depth: int | None) -> Attempt | Refusal:
    histogram = padded.histogram()
    start = time.perf_counter()
    try:
        plan = plan_packs(histogram, padded.max_sequence_length, depth, packer)
    except (ValueError, MemoryError) as error:
        return Refusal(name, depth, str(error) or type(error).__name__)
    return Attempt(name, depth, plan, time.perf_counter() - start)


def _distinct(depths: Iterable[int | None], padded: PackPlan) -> tuple[int | None, ...]:
    depths = sorted(set(depths), key=_limit)
    if not depths:
        raise ValueError("no depth to compare: give at least one; None is no limit")
    deepest = padded.max_sequence_length // int(padded.strategy_lengths.min())
    return tuple(depth for depth in depths if depth is None or None not in depths or depth < deepest)


def _limit(max_sequences_per_pack: int | None) -> float:
    return float("inf") if max_sequences_per_pack is None else max_sequences_per_pack


def _above(comparison: Comparison, attempt: Attempt) -> str:
    above, bound = comparison.packs_above_bound(attempt), comparison.lower_bound(attempt.max_sequences_per_pack)
    return f"{above:,} ({above / bound:.3%})" if above else "0"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _line(row: dict[str, str], widths: dict[str, int]) -> str:
    if "refusal" in row:
        head = f"{row['packer']:<{widths['packer']}}  {row['depth']:>{widths['depth']}}  "
        width = max(sum(widths.values()) + 2 * len(widths), len(head) + 40)
        return textwrap.fill(
            "refused: " + row["refusal"], width, initial_indent=head, subsequent_indent=" " * len(head)
        )
    cells = [f"{row[name]:{'<' if name == 'packer' else '>'}{width}}" for name, width in widths.items()]
    return "  ".join(cells).rstrip()
