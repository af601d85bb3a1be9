"""Cohorts: packs in an order in which every document's pieces come one after the other, for memory along a document.

A model with memory reads piece 1 of a document after piece 0, and never two pieces of one document in a step. So the
documents, in random order, are taken G at a time. A cohort has rounds: round j packs piece j of those that have one.

    documents    A: a0 a1 a2   B: b0   C: c0 c1   D: d0 d1        G = 3
    cohort 0     round 0: a0 b0 c0     round 1: a1 c1     round 2: a2
    cohort 1     round 0: d0           round 1: d1

A cohort is cut into W lanes, each packed apart; all pieces of a document lie in its lane. A lane stays on one rank, and
with it the memory of its documents. The pieces of one cohort, round and lane are a cell: any packer plans it, and its
packs lie in random order. Cells follow one another by cohort, round, lane.

1. cut_cohorts: which cell each piece is in. Documents are dealt to lanes by their number of pieces, so that in every
   round all lanes have the same number of pieces, give or take one.
2. plan_cohorts: a plan for every cell, and the plan without cohorts beside it.
3. fill_cells: which sequences lie in which pack, at random under the seed. EpochPacks deals anew in each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from packing.assignment import Assignment, checked_seed
from packing.balance import reordered
from packing.draws import make_key, shuffle
from packing.histogram import index_type, length_histogram, offsets_of
from packing.numba_tools import njit
from packing.packers.each import plan_each
from packing.packers.table import Packer, plan_packs
from packing.plan import PackPlan, Row

# Streams of draws beside those of assign (lengths), balance (2**64 - 1 to - 3) and EpochPacks (2**64 - 4).
DOCUMENTS, SEQUENCES, PACKS, COHORTS = (np.uint64(2**64 - i) for i in (5, 6, 7, 8))

MOST_RADIX = 2**16  # NumPy's stable sort of smaller numbers takes two passes


@dataclass(frozen=True, eq=False)
class Cohorts:
    """The cell of every sequence.

    cohort: documents in a cohort. lanes: of a cohort.
    round_offsets: (cohorts + 1,) the rounds of all cohorts before each one.
    cells: (sequences,) the cell of each: lanes * (round_offsets[its cohort] + its round) + its lane.
    """

    cohort: int
    lanes: int
    round_offsets: np.ndarray
    cells: np.ndarray

    @property
    def num_rounds(self) -> int:
        """Rounds of all cohorts."""
        return int(self.round_offsets[-1])

    @property
    def num_cells(self) -> int:
        return self.num_rounds * self.lanes

    def places(self, cells: np.ndarray) -> np.ndarray:
        """(n, 3) int32: cohort, round and lane of these cells."""
        rounds, lane = np.divmod(cells.astype(np.int64), self.lanes)
        cohort = np.searchsorted(self.round_offsets, rounds, side="right") - 1
        return np.stack([cohort, rounds - self.round_offsets[cohort], lane], 1).astype(np.int32)


@dataclass(frozen=True, eq=False)
class CohortPlan:
    """A plan for every cell.

    plan: all of them as one, cell after cell. strategy_cells: (strategies,) the cell of each strategy.
    plain: what the packer makes of the same sequences without cohorts.
    """

    cohorts: Cohorts
    plan: PackPlan
    strategy_cells: np.ndarray
    plain: PackPlan

    def assign(self, lengths: np.ndarray, seed: int) -> tuple[Assignment, np.ndarray]:
        """Which sequences lie in which pack, under the seed, and (packs, 3) cohort, round and lane of each."""
        plan = self.plan
        strategies = np.repeat(np.arange(len(plan.repeats)), plan.repeats)
        pack_offsets = offsets_of(plan.depths[strategies])
        slots = np.repeat(plan.strategy_offsets[strategies] - pack_offsets[:-1], plan.depths[strategies])
        slots += np.arange(pack_offsets[-1])
        packs = PacksOfCells(plan.strategy_lengths[slots], pack_offsets, self.strategy_cells[strategies])
        assignment, order = fill_cells(packs, lengths, self.cohorts.cells, checked_seed(seed))
        return assignment, self.cohorts.places(packs.cells[order])

    def rows(self) -> list[Row]:
        """What the plan's table says of cohorts, and what they cost."""
        cohorts, num = self.cohorts, len(self.cohorts.round_offsets) - 1
        more = self.plan.num_packs / self.plain.num_packs - 1
        plain = f"efficiency {self.plain.packing_efficiency:.5f}; cohorts take {more:.2%} more packs"
        return [
            ("cohorts", f"{num:,}", f"of {cohorts.cohort:,} documents in {cohorts.lanes:,} lanes"),
            ("rounds", f"{cohorts.num_rounds:,}", f"{cohorts.num_rounds / num:.1f} a cohort"),
            ("packs without cohorts", f"{self.plain.num_packs:,}", plain),
        ]


@dataclass(frozen=True, eq=False)
class PacksOfCells:
    """Packs as slots to be filled.

    slot_lengths: (sequences,) pack after pack. pack_offsets: (packs + 1,) where each begins. cells: (packs,) of each.
    """

    slot_lengths: np.ndarray
    pack_offsets: np.ndarray
    cells: np.ndarray

    @cached_property
    def slot_cells(self) -> np.ndarray:
        return np.repeat(self.cells, np.diff(self.pack_offsets))


def cut_cohorts(pieces: np.ndarray, cohort: int, lanes: int, seed: int) -> Cohorts:
    """Deal documents to cohorts and lanes, and their pieces to cells.

    pieces: (documents,) pieces of each, at least 1; the sequences are all pieces, document after document.
    """
    num_documents = len(pieces)
    order = _shuffled(num_documents, make_key(checked_seed(seed), DOCUMENTS))
    cohorts = np.empty(num_documents, np.int64)
    cohorts[order] = np.arange(num_documents) // cohort
    round_offsets = offsets_of(np.maximum.reduceat(pieces[order], np.arange(0, num_documents, cohort)))
    most = int(pieces.max())
    order = _sorted(order, most - pieces, most, cohorts, len(round_offsets) - 1)  # most pieces first in each cohort
    document_lanes = np.empty(num_documents, np.int64)
    document_lanes[order] = np.arange(num_documents) % cohort % lanes
    first_cells = round_offsets[cohorts] * lanes + document_lanes
    cells: np.ndarray = np.empty(int(pieces.sum(dtype=np.int64)), index_type(int(round_offsets[-1]) * lanes))
    _place_pieces(pieces, first_cells, lanes, cells)
    return Cohorts(cohort, lanes, round_offsets, cells)


def plan_cohorts(
    cohorts: Cohorts,
    lengths: np.ndarray,
    max_sequence_length: int,
    max_sequences_per_pack: int | None,
    packer: str | Packer,
    progress: bool = False,
) -> CohortPlan:
    """Plan every cell by itself, and all sequences together for comparison. Raises what plan_packs raises."""
    limits = max_sequence_length, max_sequences_per_pack
    plain = plan_packs(length_histogram(lengths, max_sequence_length), *limits, packer, progress=progress)
    order: np.ndarray = np.arange(len(lengths), dtype=index_type(len(lengths)))
    order = _sorted(order, lengths, max_sequence_length, cohorts.cells, cohorts.num_cells)
    cell_offsets = offsets_of(np.bincount(cohorts.cells, minlength=cohorts.num_cells))
    each = plan_each(lengths[order], cell_offsets, *limits, packer, progress)
    arrays = each.strategy_lengths, each.strategy_offsets, each.repeats
    plan = PackPlan(*limits, *arrays, each.packer, proven_bound=plain.lower_bound)
    strategy_cells = np.repeat(np.arange(cohorts.num_cells), each.strategy_counts)
    return CohortPlan(cohorts, plan, strategy_cells, plain)


def fill_cells(
    packs: PacksOfCells, lengths: np.ndarray, cells: np.ndarray, key: np.uint64
) -> tuple[Assignment, np.ndarray]:
    """Fill the packs of each cell with its sequences, and order them by cell: both at random otherwise.

    lengths, cells: (sequences,) of each. Every choice of equally long sequences of a cell is equally likely, and every
    order of its packs.

    Returns the assignment, and the order: pack p of it is packs' pack order[p].
    Raises ValueError where the cells have other sequences than the packs have slots for.
    """
    num_cells = int(max(packs.cells.max(), cells.max())) + 1
    longest = int(max(packs.slot_lengths.max(), lengths.max()))
    sequences = _shuffled(len(lengths), make_key(key, SEQUENCES))
    sequences = _sorted(sequences, lengths, longest, cells, num_cells)
    slots: np.ndarray = np.arange(len(packs.slot_lengths), dtype=sequences.dtype)
    slots = _sorted(slots, packs.slot_lengths, longest, packs.slot_cells, num_cells)
    is_same = len(slots) == len(sequences) and np.array_equal(packs.slot_lengths[slots], lengths[sequences])
    if not is_same or not np.array_equal(packs.slot_cells[slots], cells[sequences]):
        raise ValueError("the packs of some cell have slots for other lengths than its sequences have; plan it again")
    filled = np.empty_like(sequences)
    filled[slots] = sequences
    order = _shuffled(len(packs.cells), make_key(key, PACKS))
    order = _sorted_by(packs.cells, num_cells, order)
    pack_offsets: np.ndarray = packs.pack_offsets.astype(index_type(len(lengths)))
    return reordered(Assignment(filled, pack_offsets), order), order


def in_other_order(cohorts: np.ndarray, key: np.uint64) -> np.ndarray:
    """The cohorts' numbers, each replaced by its place in a random order: [3 3 5 8] -> [1 1 2 0], say."""
    found, number = np.unique(cohorts, return_inverse=True)
    return _shuffled(len(found), make_key(key, COHORTS))[number].astype(np.int64)


def cell_numbers(places: np.ndarray) -> np.ndarray:
    """(n,) the cells of these cohorts, rounds and lanes (n, 3), numbered in their order: 0, 1, 2…

    [[0 0 1] [3 0 0] [0 0 1] [0 2 0]] -> [0 2 0 1]
    """
    order = np.lexsort(places.T[::-1])
    is_new = (np.diff(places[order], axis=0) != 0).any(1)
    numbers = np.empty(len(places), np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(is_new)])
    return numbers


def _shuffled(count: int, key: int) -> np.ndarray:
    values: np.ndarray = np.arange(count, dtype=index_type(count))
    shuffle(values, np.empty_like(values), np.uint64(key))
    return values


def _sorted(order: np.ndarray, values: np.ndarray, most: int, cells: np.ndarray, num_cells: int) -> np.ndarray:
    """`order`, sorted by cells and, in each, by values up to `most`; equal ones stay in order."""
    keys = values[order]
    keys = keys.astype(np.uint16) if most < MOST_RADIX else keys
    return _sorted_by(cells, num_cells, order[np.argsort(keys, kind="stable")])


def _sorted_by(cells: np.ndarray, num_cells: int, order: np.ndarray) -> np.ndarray:
    free = offsets_of(np.bincount(cells, minlength=num_cells))
    placed = np.empty_like(order)
    _place(order, cells, free, placed)
    return placed


@njit(cache=True, nogil=True)
def _place(order, cells, free, placed):
    """Put each number at the next free place of its cell. Consumes free; fills placed."""
    for number in order:
        cell = cells[number]
        placed[free[cell]] = number
        free[cell] += 1


@njit(cache=True, nogil=True)
def _place_pieces(pieces, first_cells, lanes, cells):
    """Piece j of a document lies j rounds after its first. Fills cells."""
    sequence = 0
    for document in range(len(pieces)):
        cell = first_cells[document]
        for _ in range(pieces[document]):
            cells[sequence] = cell
            sequence += 1
            cell += lanes
