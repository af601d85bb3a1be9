"""An order of packs for data parallelism: every global batch costs nearly the same.

A pack's attention costs Σ n² over its sequences: 512² for one of 512 tokens, half of that for two of 256. Ranks wait
for one another, so a step takes as long as its costliest part. Steps cost alike if each has packs of all costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from packing.assignment import Assignment, checked_seed
from packing.draws import fisher_yates, make_key, shuffle
from packing.files.errors import whole_number
from packing.histogram import as_lengths
from packing.numba_tools import njit

# Streams of draws; assign() uses those from 0 on, one per length.
ORDER, STEPS, IN_STEP = (np.uint64(2**64 - i) for i in (1, 2, 3))


@dataclass(frozen=True)
class StepCosts:
    """Σ n² of the global batches of an order of packs, without an incomplete one at the end.

    max_over_mean: cost of the costliest batch / mean cost, 1.0 at best.
    std_over_mean: standard deviation of their costs / mean cost, 0.0 at best.
    """

    num_steps: int
    mean: float
    max_over_mean: float
    std_over_mean: float

    def __str__(self) -> str:
        return f"costliest / mean {self.max_over_mean:.4f}, standard deviation / mean {self.std_over_mean:.5f}"


def balance_packs(assignment: Assignment, lengths: ArrayLike, packs_per_step: int, seed: int = 0) -> Assignment:
    """The same packs in another order: every packs_per_step packs in a row have nearly equal Σ n².

    1. Shuffle the packs. The last num_packs % packs_per_step stay at the end, as an incomplete step.
    2. Sort the others by cost; equal ones stay shuffled. Cut them into strata, with one pack for each step.
    3. Deal the strata, the widest first: the costliest pack goes to the step that has cost least so far, and so on.
    4. Shuffle the steps, and the packs in each step.

    Every pack is equally likely at every place; cost decides only which packs share a step. If packs_per_step is the
    packs per device, device batches are balanced, and so is every global batch.

    lengths: (num_sequences,) as given to assign().
    Raises ValueError if packs_per_step is below 1 or above the number of packs.
    """
    packs_per_step = checked_packs_per_step(packs_per_step, assignment.num_packs)
    key = checked_seed(seed)
    costs = attention_cost(assignment, lengths)
    order = np.arange(len(costs))
    shuffle(order, np.empty_like(order), np.uint64(make_key(key, ORDER)))
    num_steps = len(order) // packs_per_step
    complete = order[: num_steps * packs_per_step]  # a view: what follows writes into order
    complete[:] = complete[np.argsort(costs[complete], kind="stable")]
    steps = _deal_strata(complete.reshape(packs_per_step, num_steps), costs)

    order_of_steps = np.arange(num_steps)
    shuffle(order_of_steps, np.empty_like(order_of_steps), np.uint64(make_key(key, STEPS)))
    complete[:] = steps[order_of_steps].ravel()
    _shuffle_in_steps(complete, packs_per_step, np.uint64(make_key(key, IN_STEP)))
    return reordered(assignment, order)


def attention_cost(assignment: Assignment, lengths: ArrayLike) -> np.ndarray:
    """(num_packs,) int64: Σ n² over the sequences of each pack. [[3, 1], [2]] -> [10, 4]"""
    lengths = as_lengths(lengths)
    if len(lengths) != assignment.num_sequences:
        what = f"the assignment has {assignment.num_sequences} sequences, but there are {len(lengths)} lengths"
        raise ValueError(f"{what}; give the lengths that it was made for")
    costs = np.empty(assignment.num_packs, np.int64)
    _cost_of_packs(assignment.sequence_indices, assignment.pack_offsets, lengths, costs)
    return costs


def step_costs(assignment: Assignment, lengths: ArrayLike, packs_per_step: int) -> StepCosts:
    """How evenly the global batches cost attention, if each takes the next packs_per_step packs."""
    packs_per_step = checked_packs_per_step(packs_per_step, assignment.num_packs)
    costs = attention_cost(assignment, lengths)
    num_steps = len(costs) // packs_per_step
    per_step = costs[: num_steps * packs_per_step].reshape(num_steps, packs_per_step).sum(1)
    mean = float(per_step.mean())
    return StepCosts(num_steps, mean, float(per_step.max()) / mean, float(per_step.std()) / mean)


def checked_packs_per_step(packs_per_step: int, num_packs: int | None = None) -> int:
    """The number as an int. Raises ValueError below 1 and above num_packs; None: not known yet."""
    packs_per_step = whole_number("packs_per_step", packs_per_step)
    if num_packs is not None and packs_per_step > num_packs:
        what = f"packs_per_step={packs_per_step} is more than the {num_packs} packs, so no batch would be whole"
        raise ValueError(f"{what}; give at most {num_packs} as balance, or leave it out")
    return packs_per_step


def _deal_strata(strata: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Step 3. strata: (packs_per_step, num_steps) packs, ascending in cost. Returns (num_steps, packs_per_step)."""
    steps = np.empty(strata.shape[::-1], strata.dtype)
    so_far = np.zeros(len(steps), np.int64)
    widths = costs[strata[:, -1]] - costs[strata[:, 0]]
    for stratum in np.argsort(-widths, kind="stable"):
        cheapest_first = np.argsort(so_far, kind="stable")
        steps[cheapest_first, stratum] = strata[stratum, ::-1]
        so_far[cheapest_first] += costs[strata[stratum, ::-1]]
    return steps


def reordered(assignment: Assignment, order: np.ndarray) -> Assignment:
    """Pack p of the result is pack order[p] of the assignment."""
    pack_offsets = np.zeros_like(assignment.pack_offsets)
    np.cumsum(np.diff(assignment.pack_offsets)[order], out=pack_offsets[1:])
    sequence_indices = np.empty_like(assignment.sequence_indices)
    _copy_packs(assignment.sequence_indices, assignment.pack_offsets, order, sequence_indices, pack_offsets)
    return Assignment(sequence_indices, pack_offsets)


@njit(cache=True, nogil=True)
def _cost_of_packs(sequence_indices, pack_offsets, lengths, costs):
    for pack in range(len(costs)):
        cost = np.int64(0)
        for place in range(pack_offsets[pack], pack_offsets[pack + 1]):
            length = np.int64(lengths[sequence_indices[place]])
            cost += length * length
        costs[pack] = cost


@njit(cache=True, nogil=True)
def _shuffle_in_steps(order, packs_per_step, key):
    for start in range(0, len(order), packs_per_step):
        step = order[start : start + packs_per_step]
        fisher_yates(step, step, make_key(key, np.uint64(start)))


@njit(cache=True, nogil=True)
def _copy_packs(old_indices, old_offsets, order, new_indices, new_offsets):
    """Fills new_indices: pack p of the new is pack order[p] of the old."""
    for pack in range(len(order)):
        shift = np.int64(old_offsets[order[pack]]) - np.int64(new_offsets[pack])
        for place in range(np.int64(new_offsets[pack]), np.int64(new_offsets[pack + 1])):
            new_indices[place] = old_indices[place + shift]
