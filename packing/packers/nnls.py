"""Non-negative least squares over strategies that are priced, not listed: an active set with an updated triangle.

min |w (A x - b)|, x >= 0, where a column of A counts the slots of one strategy, which fills a pack exactly, and b is
the histogram. The method is Lawson and Hanson's (Solving Least Squares Problems, 1974, chapter 23):

1. Some strategies are in use; their least squares solution z comes from R z = t, where R'R = A'WA and R't = A'Wb.
2. If some z <= 0, move x towards z until the first x is 0, drop its strategy, and solve again; else x = z.
3. The gradient w w (b - A x) is the worth of a slot of each length; pricing finds the strategy that is worth most.
4. Use it and continue at 1, unless it is worth nothing: then x is the optimum.

R and t stay from round to round: a new strategy adds a column, a dropped one is rotated out. Inner loops run along
rows of R, which are contiguous, and add in one order, so that every machine gets the same bits.

Moving x can gain at most (greatest worth) * (packs): the search stops when that is TOLERANCE of the squared norm. A
round costs O(max_sequence_length**2), and there are one to two rounds a length: O(max_sequence_length**3) in all, and
8 * max_sequence_length**2 bytes.
"""

from __future__ import annotations

import numpy as np

from packing.numba_tools import njit
from packing.packers.pricing import ENDLESS, fill_tables, find_parts, table_parts

TOLERANCE = 1e-9
NOISE = 1e-14  # share of |w b| below which a worth is rounding
DEPENDENT = 1e-10  # share of a column's square: with less outside the span of those in use, it depends on them
TINY = 1e-150  # numbers in R below this become 0: below 1e-308 a processor takes a hundred times as long
ROUNDS_PER_LENGTH = 20  # strategies tried at most; one to two are usual
STUCK = 50  # rounds in a row that gain nothing


def fit_strategies(histogram, weights, depth_limit, lengths, offsets, repeats):
    """Find how many packs of which strategies come closest to the histogram.

    histogram, weights: (max_sequence_length + 1,). depth_limit: lengths in a strategy.
    lengths, offsets, repeats: packs to start from, as in a PackPlan.

    Returns slots (strategies, max_sequence_length + 1) int64, x (strategies,) float64, and the norm |w (A x - b)|.
    (1, 5) and (2, 2, 2), 6 slots -> slots [[0, 1, 0, 0, 0, 1, 0], [0, 0, 3, 0, 0, 0, 0]]
    """
    goal, squares, longest = histogram.astype(np.float64), weights * weights, len(histogram) - 1
    parts = table_parts(depth_limit, longest)
    tables = np.zeros((len(parts), longest + 1))
    columns, triangle, x = _nothing_in_use(longest)
    packs, noise = goal.sum(), NOISE * np.sqrt(_write_worth(goal, squares, columns, x, 0, np.empty(longest + 1)))
    start = lengths.astype(np.int64), offsets, repeats
    size = _fit(goal, squares, parts, tables, columns, triangle, x, start, np.array([packs, noise]))

    slot_lengths, slot_counts, entries, used = columns
    slots = np.zeros((len(used), longest + 1), np.int64)
    row, entry = np.nonzero(np.arange(slot_lengths.shape[1]) < entries[:, None])
    slots[row, slot_lengths[row, entry]] = slot_counts[row, entry]
    return slots[used[:size]], *_refined(goal, squares, columns, triangle, x[:size])


def _nothing_in_use(longest):
    """columns: slot_lengths, slot_counts, entries, used; triangle: R, t; x.

    used[:size] are the rows of the strategies in use, in the order of R and x; used[size:] are free. No more are in use
    than there are lengths, and a strategy has at most n different ones, where 1 + 2 + … + n fit into a pack.
    """
    rows, width = longest + 1, int((np.sqrt(8 * longest + 1) - 1) / 2)
    slot_lengths, slot_counts = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.int64)
    columns = (slot_lengths, slot_counts, np.zeros(rows, np.int64), np.arange(rows))
    return columns, (np.zeros((rows, rows)), np.zeros(rows)), np.zeros(rows)


def _refined(goal, squares, columns, triangle, x):
    """x after one correction by its residual, for the digits that R'R = A'WA cost, and the norm.

    Loops and not `@`: NumPy's products differ in their last bits from processor to processor.
    """
    worth, change = np.empty(len(goal)), np.zeros(len(x))
    _write_worth(goal, squares, columns, x, len(x), worth)
    _write_change(columns, worth, change)
    _solve_forward(triangle[0], change)
    missing = change.copy()
    _solve_backward(triangle[0], missing, change)
    x = np.maximum(x + change, 0.0)
    return x, np.sqrt(_write_worth(goal, squares, columns, x, len(x), worth))


@njit(cache=True)
def _write_change(columns, worth, change):
    """change = A' worth, in place."""
    slot_lengths, slot_counts, entries, used = columns
    for i in range(len(change)):
        for k in range(entries[used[i]]):
            change[i] += worth[slot_lengths[used[i], k]] * slot_counts[used[i], k]


@njit(cache=True)
def _fit(goal, squares, parts, tables, columns, triangle, x, start, limits):
    """Steps 1 to 4 in columns, triangle and x; returns how many strategies are then in use.

    start: lengths, offsets, repeats. limits: packs and noise, which decide when a worth is nothing."""
    size, longest = np.int64(0), len(goal) - 1  # np.int64: Numba compiles all over again for a literal 0
    lengths, offsets, repeats = start
    for pack in range(len(repeats)):
        full = lengths[offsets[pack] : offsets[pack + 1]]
        if full.sum() == longest and _use(full, goal, squares, columns, triangle, size):
            x[size] = repeats[pack]
            size += 1
    strategy = np.empty(longest, np.int64)
    least, stuck = np.inf, 0
    for _ in range(ROUNDS_PER_LENGTH * longest):
        size = _descend(columns, triangle, x, size)
        norm = _write_worth(goal, squares, columns, x, size, tables[0])
        best = _price(tables, parts)
        stuck = 0 if norm < least else stuck + 1
        least = min(norm, least)
        if best * limits[0] <= TOLERANCE * norm or best <= limits[1] or stuck > STUCK:
            break
        count = find_parts(tables, parts, longest, strategy)
        if not _use(strategy[:count], goal, squares, columns, triangle, size):
            break
        x[size] = 0.0
        size += 1
    return size


@njit(cache=True)
def _price(tables, parts):
    """Fill the tables from the first; the last only for a full pack, whose worth is returned."""
    last, longest = len(parts) - 1, tables.shape[1] - 1
    left, right = parts[last, 0], parts[last, 1]
    if last == 0 or left == ENDLESS:
        fill_tables(tables, parts)
    else:
        fill_tables(tables[:last], parts[:last])
        best = tables[left, longest]
        for part in range(longest):
            best = max(best, tables[left, part] + tables[right, longest - part])
        tables[last, longest] = best
    return tables[last, longest]


@njit(cache=True)
def _write_worth(goal, squares, columns, x, size, worth):
    """worth = w w (b - A x), in place; returns the squared norm |w (A x - b)|**2."""
    slot_lengths, slot_counts, entries, used = columns
    for length in range(len(worth)):
        worth[length] = goal[length]
    for i in range(size):
        for k in range(entries[used[i]]):
            worth[slot_lengths[used[i], k]] -= x[i] * slot_counts[used[i], k]
    norm = 0.0
    for length in range(len(worth)):
        norm += squares[length] * worth[length] * worth[length]
        worth[length] *= squares[length]
    return norm


@njit(cache=True)
def _use(strategy, goal, squares, columns, triangle, size):
    """Add a strategy to R and t, in place; the caller sets its x.

    Returns False, and changes nothing, if R has no room or the strategy depends on those in use."""
    slot_lengths, slot_counts, entries, used = columns
    factor, targets = triangle
    if size == len(factor) - 1:
        return False
    row = used[size]
    _write_column(strategy, slot_lengths[row], slot_counts[row], entries[row : row + 1])
    own = np.zeros(len(goal))
    square = target = 0.0
    for k in range(entries[row]):
        length, count = slot_lengths[row, k], slot_counts[row, k]
        own[length] = squares[length] * count
        square += own[length] * count
        target += own[length] * goal[length]
    column = np.zeros(size)
    for i in range(size):
        for k in range(entries[used[i]]):
            column[i] += own[slot_lengths[used[i], k]] * slot_counts[used[i], k]
    _solve_forward(factor, column)
    beyond = square
    for i in range(size):
        beyond -= column[i] * column[i]
        target -= column[i] * targets[i]
    if beyond <= DEPENDENT * square:
        return False
    for i in range(size):
        factor[i, size] = column[i] if abs(column[i]) > TINY else 0.0
    factor[size, size] = np.sqrt(beyond)
    targets[size] = target / factor[size, size]
    return True


@njit(cache=True)
def _write_column(strategy, slot_lengths, slot_counts, entries):
    """[2, 1, 2] -> slot_lengths [2, 1, …], slot_counts [2, 1, …], entries [2]. In place."""
    count = 0
    for length in strategy:
        entry = 0
        while entry < count and slot_lengths[entry] != length:
            entry += 1
        if entry == count:
            slot_lengths[entry], slot_counts[entry] = length, 0
            count += 1
        slot_counts[entry] += 1
    entries[0] = count


@njit(cache=True)
def _descend(columns, triangle, x, size):
    """Steps 1 and 2. In place; returns how many strategies are then in use."""
    used = columns[3]
    z = np.empty(size)
    while size > 0:
        _solve_backward(triangle[0], triangle[1], z[:size])
        step, blocking = 1.0, -1
        for i in range(size):
            if z[i] <= 0:
                reach = x[i] / (x[i] - z[i]) if x[i] > 0 else 0.0
                if blocking < 0 or reach < step:
                    step, blocking = reach, i
        for i in range(size):
            x[i] += step * (z[i] - x[i])
        if blocking < 0:
            break
        x[blocking] = 0.0
        for i in range(size - 1, -1, -1):
            if z[i] <= 0 and x[i] <= 0:
                _drop(triangle[0], triangle[1], size, i)
                row, size = used[i], size - 1
                for k in range(i, size):
                    used[k], x[k], z[k] = used[k + 1], x[k + 1], z[k + 1]
                used[size] = row
    return size


@njit(cache=True)
def _drop(factor, targets, size, gone):
    """Take a column out of R and t, in place: rotate its row into the rows below."""
    spare, target = factor[gone, gone + 1 : size].copy(), targets[gone]
    for i in range(gone + 1, size):
        here, above, rest = factor[i][i:size], factor[i - 1][i - 1 : size - 1], spare[i - gone - 1 :]
        diagonal = np.sqrt(here[0] * here[0] + rest[0] * rest[0])
        c, s = here[0] / diagonal, rest[0] / diagonal
        for k in range(len(rest)):
            value = c * rest[k] - s * here[k]
            above[k] = c * here[k] + s * rest[k]
            rest[k] = value if abs(value) > TINY else 0.0
        targets[i - 1], target = c * targets[i] + s * target, c * target - s * targets[i]
    for i in range(gone):
        row = factor[i]
        for k in range(gone, size - 1):
            row[k] = row[k + 1]


@njit(cache=True)
def _solve_forward(factor, values):
    """R' v = values, in place."""
    for i in range(len(values)):
        value = values[i] / factor[i, i]
        values[i] = value
        if value != 0.0:
            row, rest = factor[i][i + 1 : len(values)], values[i + 1 :]
            for k in range(len(rest)):
                rest[k] -= value * row[k]


@njit(cache=True)
def _solve_backward(factor, targets, z):
    """R z = t, in place. Four sums at once: one would wait for each addition."""
    size = len(z)
    for i in range(size - 1, -1, -1):
        row, known = factor[i][i + 1 : size], z[i + 1 :]
        a = b = c = d = 0.0
        whole = len(row) // 4 * 4
        for k in range(0, whole, 4):
            a += row[k] * known[k]
            b += row[k + 1] * known[k + 1]
            c += row[k + 2] * known[k + 2]
            d += row[k + 3] * known[k + 3]
        for k in range(whole, len(row)):
            a += row[k] * known[k]
        z[i] = (targets[i] - ((a + b) + (c + d))) / factor[i, i]
