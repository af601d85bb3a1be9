"""The order of packs with cohorts: round after round, no step in two rounds, all pieces of a document on one rank.

    cohort 0   round 0  packs a b c d e    round 1  f g          3 packs a step
    steps      (a b c) (d e .)             (f g .)               empty packs fill short steps

A model with memory needs a document's pieces in order, at most one a step, on the rank that has its memory. So each
epoch draws the order of the cohorts, and of the packs inside a round, and leaves the rounds in order. Lane l goes to
rank l % ranks. Which packs share a step depends on the number of slots, and not on how many ranks fill them:

packs a step       the slots of a step are shared out to gcd(lanes, slots) groups of lanes. A round takes as many steps
                   as its largest group needs, and every group spreads its packs evenly over them.
sequences a step   plan_steps runs for every round and lane, with a lane's share of the sequences.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from collate.training.order import (
    StepPlan,
    deal_packs,
    lay_out_steps,
    pack_costs,
    pack_depths,
    pack_lengths,
    plan_steps,
)
from packing import EpochPacks, packed_info
from packing.files.errors import Option, OptionError
from packing.histogram import offsets_of
from packing.unpack import stored_numbers

logger = logging.getLogger(__name__)

COHORT, ROUND, LANE = 0, 1, 2
Cell = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class RoundPlan:
    """How many steps each round takes, for a constant number of sequences; the same in every epoch.

    plans: of each cell's packs. most_packs: slots that a step needs, over all ranks. num_steps: in an epoch.
    """

    plans: dict[Cell, StepPlan]
    most_packs: int
    num_steps: int


def plan_rounds(dataset: Any, sequences_per_step: int, ranks: int) -> RoundPlan:
    """Share out the packs of every cell to steps. Raises ValueError where the lanes cannot share the sequences."""
    lanes = _lanes(dataset, ranks)
    given = Option("sequences_per_step", sequences_per_step)
    if sequences_per_step % lanes:
        near = max(lanes, round(sequences_per_step / lanes) * lanes)
        what = f"{given} cannot be shared out to the {lanes} lanes of the cohorts"
        raise OptionError(f"{what}; set it to {near}, or pack with another number of {Option('cohort_lanes')}")
    places, depths = _places(dataset), pack_depths(dataset)
    if (deepest := int(depths.max())) > sequences_per_step // lanes:
        what = f"{given} is {sequences_per_step // lanes} for each of {lanes} lanes, and a pack has {deepest} sequences"
        cure = f"set it to {deepest * lanes} or more, or pack with fewer {Option('cohort_lanes')}"
        raise OptionError(f"{what}; {cure}")
    plans: dict[Cell, StepPlan] = {}
    of_rank: dict[Cell, int] = {}
    steps: dict[tuple[int, int], int] = {}
    for cell, packs in _cells(places):
        plan = plans[cell] = plan_steps(depths[packs], sequences_per_step // lanes)
        cohort, number, lane = cell
        on_rank = cohort, number, lane % ranks
        of_rank[on_rank] = of_rank.get(on_rank, 0) + plan.most_packs
        steps[cohort, number] = max(steps.get((cohort, number), 0), plan.num_steps)
    return RoundPlan(plans, ranks * max(of_rank.values()), sum(steps.values()))


class RoundSteps(Sampler):
    """Packs of a dataset with cohorts in the order of training; empty packs have number len(dataset).

    accelerate deals batches of packs_per_pass to the ranks in turns, see SequencesPerStep.

    sequences_per_step: None: as many packs a step as there are slots. shuffle: draw the order of cohorts, and of packs
        in a round; else they stay as they lie. width: the model's, see pack_costs.

    Raises ValueError where ranks do not divide the lanes, where slots are too few, and where a piece is missing.
    """

    def __init__(
        self,
        dataset: Any,
        sequences_per_step: int | None,
        packs_per_pass: int,
        passes: int,
        ranks: int,
        seed: int,
        width: int,
        shuffle: bool = True,
    ):
        self.dataset, self.seed, self.width, self.shuffle, self.epoch = dataset, seed, width, shuffle, 0
        self._packs = dataset if isinstance(dataset, EpochPacks) else EpochPacks(dataset)
        self.packs_per_pass, self.passes, self.ranks = packs_per_pass, passes, ranks
        self.slots = packs_per_pass * passes * ranks
        self.groups = math.gcd(_lanes(dataset, ranks), self.slots)
        refuse_missing_pieces(self._packs)
        self.plan = None if sequences_per_step is None else plan_rounds(dataset, sequences_per_step, ranks)
        if self.plan is not None and self.plan.most_packs > self.slots:
            needed = -(-self.plan.most_packs // (packs_per_pass * ranks))
            raise ValueError(
                f"{sequences_per_step} sequences take up to {self.plan.most_packs} packs over the ranks, a step has "
                f"{self.slots} slots: per_device_train_batch_size={packs_per_pass}, {passes} passes "
                f"(gradient_accumulation_steps), {ranks} ranks; set gradient_accumulation_steps={needed}"
            )
        self._say_short_steps(sequences_per_step)

    def _say_short_steps(self, sequences_per_step: int | None) -> None:
        packs, steps = self._steps_of_packs()
        self.num_steps = int(steps.max()) + 1
        depths = None if sequences_per_step is None else pack_depths(self._packs)[packs]
        held = np.bincount(steps, depths, self.num_steps)
        full = self.slots if sequences_per_step is None else sequences_per_step
        self.num_short_steps = int((held < full).sum())
        unit = "packs" if sequences_per_step is None else "sequences"
        logger.warning(
            "the packs have cohorts, and a step never spans two rounds: of %d steps in an epoch, %d have fewer than "
            "%d %s; on average %.1f",
            *(self.num_steps, self.num_short_steps, full, unit, held.mean()),
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if isinstance(self.dataset, EpochPacks):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self.num_steps * self.slots

    def __iter__(self) -> Iterator[int]:
        lengths, offsets = pack_lengths(self._packs)
        costs = pack_costs(lengths, offsets, self.width)
        packs, steps = self._steps_of_packs()
        rank = _places(self._packs)[packs, LANE] % self.ranks
        by_rank = steps * self.ranks + rank
        number = _numbered(by_rank)
        table = np.full((self.num_steps * self.ranks, self.passes * self.packs_per_pass), len(costs))
        table[by_rank, number] = packs
        of_ranks = table.reshape(self.num_steps, self.ranks, -1).transpose(1, 0, 2)
        dealt = [deal_packs(steps_of_rank, costs, self.passes, self.packs_per_pass) for steps_of_rank in of_ranks]
        for step in np.stack(dealt, 2):  # (steps, passes, ranks, packs_per_pass)
            yield from step.ravel().tolist()

    def _steps_of_packs(self) -> tuple[np.ndarray, np.ndarray]:
        """All packs in the order of the epoch, and the step of each."""
        places = _places(self._packs)
        packs = order_of_rounds(places, self.seed, self.epoch, self.shuffle)
        if self.plan is None:
            return packs, steps_by_packs(places[packs], self.groups, self.slots // self.groups)
        depths = pack_depths(self._packs)[packs]
        return packs, steps_by_sequences(places[packs], depths, self.plan.plans, self.seed, self.epoch)


def order_of_rounds(places: np.ndarray, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The packs, cohort by cohort and round by round. places: (packs, 3) cohort, round and lane."""
    cohorts, packs = places[:, COHORT], np.arange(len(places))
    if shuffle:
        draw = np.random.default_rng([seed, epoch])
        found, number = np.unique(cohorts, return_inverse=True)
        cohorts, packs = draw.permutation(len(found))[number], draw.permutation(len(places))
    return packs[np.lexsort((places[packs, ROUND], cohorts[packs]))]


def steps_by_packs(places: np.ndarray, groups: int, slots_per_group: int) -> np.ndarray:
    """(packs,) the step of each. places: of the packs in the order of rounds.

    A round of 5 packs in group 0 and 3 in group 1, with 2 slots a group: 3 steps of (2 1), (2 1), (1 1).
    """
    rounds = _round_numbers(places)
    group = rounds * groups + places[:, LANE] % groups
    counts = np.bincount(group, minlength=(int(rounds[-1]) + 1) * groups)
    num_steps = -(-counts.reshape(-1, groups).max(1) // slots_per_group)
    return offsets_of(num_steps)[rounds] + _numbered(group) * num_steps[rounds] // counts[group]


def steps_by_sequences(
    places: np.ndarray, depths: np.ndarray, plans: dict[Cell, StepPlan], seed: int, epoch: int
) -> np.ndarray:
    """(packs,) the step of each. places, depths: of the packs in the order of rounds. plans: see RoundPlan."""
    rounds = _round_numbers(places)
    within, num_steps = np.empty(len(places), np.int64), np.zeros(int(rounds[-1]) + 1, np.int64)
    for cell, packs in _cells(places):
        plan, number = plans[cell], rounds[packs[0]]
        table = lay_out_steps(plan, depths[packs], seed, epoch)
        step, slot = np.nonzero(table < len(packs))
        within[packs[table[step, slot]]] = step
        num_steps[number] = max(num_steps[number], plan.num_steps)
    return offsets_of(num_steps)[rounds] + within


def refuse_missing_pieces(dataset: Any) -> None:
    """Raise ValueError where a document's piece is there and the one before is not: memory would have a hole."""
    packed = dataset.packed if isinstance(dataset, EpochPacks) else dataset
    rows, rounds = (stored_numbers(packed, name) for name in ("sequence_indices", "sequence_rounds"))
    order = np.lexsort((rounds, rows))
    rows, rounds = rows[order], rounds[order]
    expected = _numbered(rows)
    if len(wrong := np.flatnonzero(rounds != expected)):
        row, piece = int(rows[wrong[0]]), int(expected[wrong[0]])
        raise ValueError(
            f"source row {row} has no piece {piece} in the training dataset, or one twice: a model with memory needs "
            "all pieces before; take whole cohorts, or split the source and not its packs"
        )


def _lanes(dataset: Any, ranks: int) -> int:
    """Lanes of the dataset's cohorts. Raises ValueError where ranks do not divide them."""
    lanes = packed_info(dataset).cohort_lanes
    assert lanes is not None
    if lanes % ranks:
        good = [number for number in range(1, lanes + 1) if lanes % number == 0]
        raise OptionError(
            f"{ranks} ranks do not divide the {lanes} lanes of the cohorts, and a lane stays on one rank; train on "
            f"{', '.join(map(str, good))} ranks, or pack with {Option('cohort_lanes', ranks)}"
        )
    return lanes


def _places(dataset: Any) -> np.ndarray:
    """(packs, 3) cohort, round and lane of each pack of this epoch."""
    places = (dataset if isinstance(dataset, EpochPacks) else EpochPacks(dataset)).places
    assert places is not None
    return places


def _cells(places: np.ndarray) -> Iterator[tuple[Cell, np.ndarray]]:
    """Each cohort, round and lane, and the numbers of its packs, in their order."""
    order = np.lexsort(places.T[::-1])
    begins = np.flatnonzero((np.diff(places[order], axis=0, prepend=-1) != 0).any(1))
    for packs in np.split(order, begins[1:]):
        cohort, number, lane = places[packs[0]].tolist()
        yield (cohort, number, lane), packs


def _round_numbers(places: np.ndarray) -> np.ndarray:
    """Rounds of all cohorts in the order in which they come: 0, 1, 2…"""
    return np.cumsum((np.diff(places[:, :LANE], axis=0, prepend=places[:1, :LANE]) != 0).any(1))


def _numbered(keys: np.ndarray) -> np.ndarray:
    """Equal keys, numbered: [4 7 4 4 7] -> [0 0 1 2 1]"""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    begins = np.append(True, sorted_keys[1:] != sorted_keys[:-1])
    numbers = np.empty(len(keys), np.int64)
    numbers[order] = np.arange(len(keys)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]
    return numbers
