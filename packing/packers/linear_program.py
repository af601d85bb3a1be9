"""The cutting-stock linear program over strategies, kept warm in HiGHS (Huangfu & Hall 2018).

    minimize   sum of x[strategy]                                  packs
    such that  slots of each length, as many as sequences          one row a length
               x >= 0, and y[i] >= 0: slots of lengths[i] that hold a sequence of lengths[i - 1]

With y a longer slot stands in for a shorter one, so that a few hundred strategies replace thousands. The row duals are
the prices of the lengths, and y keeps them from falling with the length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sized

import numpy as np
from numpy.typing import ArrayLike

PRIMAL, DUAL = 4, 1  # HiGHS's numbers of the simplex methods


class LinearProgram:
    """Strategies are tuples of ascending indices into the lengths; counts[i] sequences of the i-th length are placed.

    work: simplex steps * lengths so far; time is proportional to it.
    """

    def __init__(self, counts: np.ndarray) -> None:
        import highspy  # takes half a second

        self.strategies: list[tuple[int, ...]] = []
        self.work = 0
        self._known: set[tuple[int, ...]] = set()
        self._rows = np.arange(len(counts), dtype=np.int32)
        self._highs = highspy.Highs()
        for option, value in (("output_flag", False), ("presolve", "off"), ("threads", 1)):
            self._highs.setOptionValue(option, value)
        free = np.full(len(counts), np.inf)
        self._highs.addRows(len(counts), -free, free, 0, 0 * self._rows, np.empty(0, np.int32), np.empty(0))
        self._add_stand_ins()
        self.demand(counts)

    def demand(self, counts: np.ndarray) -> None:
        """Place these counts from now on, with the same strategies; the old solution stays dual feasible."""
        self._method = DUAL
        self._scale = max(1.0, float(counts.max()) / 1e5)  # HiGHS's tolerances are absolute
        free = np.full(len(counts), np.inf)
        self._highs.changeRowsBounds(len(counts), self._rows, counts / self._scale, free)

    def add(self, strategies: Iterable[tuple[int, ...]]) -> int:
        """Add the strategies that are new; returns how many there are."""
        new = [strategy for strategy in dict.fromkeys(strategies) if strategy not in self._known]
        columns = [Counter(strategy) for strategy in new]
        if new:
            starts = np.cumsum([0, *map(len, columns[:-1])])
            cells = [row for column in columns for row in column]
            copies = [count for column in columns for count in column.values()]
            self._add_columns(1.0, starts, cells, copies)
        self.strategies += new
        self._known.update(new)
        return len(new)

    def solve(self, method: int | None = None) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns the packs needed, repeats (strategies,) and prices (lengths,): floats.

        New strategies leave the old solution primal feasible, so PRIMAL starts from it; after a new demand, DUAL."""
        self._highs.setOptionValue("simplex_strategy", method or self._method)
        self._highs.run()
        self._method = PRIMAL
        self.work += self._highs.getInfo().simplex_iteration_count * len(self._rows)
        solution = self._highs.getSolution()
        repeats = np.array(solution.col_value)[len(self._rows) - 1 :] * self._scale
        return self._highs.getObjectiveValue() * self._scale, repeats, np.array(solution.row_dual)

    def _add_stand_ins(self) -> None:
        """y: a slot less for a length, a slot more for the next shorter."""
        below = self._rows[:-1]
        cells = np.stack([below, below + 1], axis=1).ravel()
        if len(below):
            self._add_columns(0.0, 2 * below, cells, np.tile([1.0, -1.0], len(below)))

    def _add_columns(self, cost: float, starts: np.ndarray, cells: Sized, values: ArrayLike) -> None:
        n = len(starts)
        arrays = np.asarray(starts, np.int32), np.asarray(cells, np.int32), np.asarray(values, np.float64)
        self._highs.addCols(n, np.full(n, cost), np.zeros(n), np.full(n, np.inf), len(cells), *arrays)
