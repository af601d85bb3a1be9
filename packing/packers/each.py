"""Plans of many small histograms: the cells of cohorts, each packed apart.

A call of a packer costs a tenth of a millisecond, of which its steps take a hundredth. So lpfhp, which is for those in
a hurry, walks over all cells in one kernel. Other packers are called once for each histogram that is new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from packing.files.progress import progress_bar
from packing.histogram import offsets_of
from packing.packers.lpfhp import lpfhp, lpfhp_each
from packing.packers.table import Packer, find_packer, plan_packs

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

AT_ONCE: dict[Packer, Callable[[np.ndarray, np.ndarray, int, int | None], Arrays]] = {lpfhp: lpfhp_each}


@dataclass(frozen=True, eq=False)
class EachPlan:
    """A plan for each cell, end to end.

    cells [1 2 3 3] [] [3]   ->   strategies (1, 3) (2, 3) | | (3,)

    strategy_lengths, strategy_offsets, repeats: as in PackPlan. strategy_counts: (cells,) strategies of each cell.
    packer: the name that the plans have.
    """

    strategy_lengths: np.ndarray
    strategy_offsets: np.ndarray
    repeats: np.ndarray
    strategy_counts: np.ndarray
    packer: str


def plan_each(
    lengths: np.ndarray,
    cell_offsets: np.ndarray,
    max_sequence_length: int,
    max_sequences_per_pack: int | None,
    packer: str | Packer,
    progress: bool = False,
) -> EachPlan:
    """Plan every cell by itself. lengths: ascending in each cell. cell_offsets: (cells + 1,) where each begins.

    Raises what plan_packs raises. Plans made at once are not checked here: PackPlan and who assigns them do it.
    """
    limits, pack = (max_sequence_length, max_sequences_per_pack), find_packer(packer)
    if pack in AT_ONCE:
        return EachPlan(*AT_ONCE[pack](lengths, cell_offsets, *limits), pack.__name__)
    known, found, name = {}, [], ""
    for first, end in progress_bar(list(pairwise(cell_offsets.tolist())), desc="planning", disable=not progress):
        cell = lengths[first:end]
        if (key := cell.tobytes()) not in known:
            plan = plan_packs(np.bincount(cell, minlength=max_sequence_length + 1), *limits, packer) if key else None
            name = name if plan is None else plan.packer
            known[key] = None if plan is None else (plan.strategy_lengths, plan.depths, plan.repeats)
        found.append(known[key])
    plans = [arrays for arrays in found if arrays is not None]
    flat, depths, repeats = (np.concatenate(arrays) for arrays in zip(*plans, strict=True))
    counts = np.array([0 if arrays is None else len(arrays[2]) for arrays in found])
    return EachPlan(flat, offsets_of(depths), repeats, counts, name)
