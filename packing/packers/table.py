"""The table of packers, and plan_packs: histogram -> checked plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from packing.files.errors import Option, OptionError, check_known, whole_number
from packing.packers.lpfhp import lpfhp
from packing.packers.nnlshp import nnlshp
from packing.packers.optimal import optimal
from packing.packers.spfhp import spfhp
from packing.plan import PackPlan

# histogram (max_sequence_length + 1,) int64, max_sequence_length, max_sequences_per_pack (None = no limit) -> plan
Packer = Callable[[np.ndarray, int, int | None], PackPlan]

PACKERS: dict[str, Packer] = {"spfhp": spfhp, "lpfhp": lpfhp, "nnlshp": nnlshp, "optimal": optimal}

LONGEST_PACK = 64**4 - 1  # token slots; the packers' tables are indexed by space


def plan_packs(
    histogram: ArrayLike,
    max_sequence_length: int | None = None,
    max_sequences_per_pack: int | None = None,
    packer: str | Packer = "optimal",
    *,
    progress: bool = False,
) -> PackPlan:
    """Decide which lengths share a pack.

    histogram: sequences per length, indexed by length; index 0 is unused. [0, 1, 0, 2] is one of length 1, two of 3.
    max_sequence_length: token slots in a pack; None: len(histogram) - 1.
    max_sequences_per_pack: None = no limit.
    packer: a name in PACKERS, or a callable of the same form.
    progress: let a packer that has a parameter `progress`, as optimal has, show a bar once it takes two seconds.

    The first use of a packer compiles it, and keeps that on disk: 21 to 28 seconds of CPU time for optimal on two busy
    cores, 16 for nnlshp, 6 for spfhp or lpfhp.

    Raises ValueError for what is no histogram, and for a plan that does not place exactly its sequences.
    """
    pack = find_packer(packer)
    given = _checked_histogram(histogram)
    longest = checked_length(len(given) - 1 if max_sequence_length is None else max_sequence_length)
    depth = checked_depth(max_sequences_per_pack)
    fitted = _fitted(given, longest)
    options = {"progress": True} if progress and _shows_progress(pack) else {}
    plan = pack(fitted.copy(), longest, depth, **options)
    _check_plan(plan, fitted, longest, depth, packer)
    return plan


def find_packer(packer: str | Packer) -> Packer:
    """The packer of that name; a callable is its own answer."""
    if callable(packer):
        return packer
    check_known("packer", packer, PACKERS)
    return PACKERS[packer]


def _shows_progress(pack: Packer) -> bool:
    """Whether it has a parameter `progress`; a callable that is not written in Python may not tell."""
    try:
        return "progress" in inspect.signature(pack).parameters
    except (TypeError, ValueError):
        return False


def _checked_histogram(histogram: ArrayLike) -> np.ndarray:
    array = np.asarray(histogram)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"a histogram is one flat array of counts, indexed by length; got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"a histogram holds integer counts; got {array.dtype}: make it with length_histogram(lengths)")
    if (array < 0).any():
        culprit = int(np.argmax(array < 0))
        raise ValueError(f"the histogram counts {array[culprit]} sequences of length {culprit}; a count is at least 0")
    if array[0]:
        raise ValueError(f"the histogram counts {array[0]} sequences of length 0 (index 0); leave empty sequences out")
    if not array.any():
        raise ValueError("the histogram is empty: it counts no sequence of any length, so there is nothing to pack")
    tokens = int(array.astype(np.float64) @ np.arange(len(array)))
    if tokens >= 2**62:  # near the limit a float is not exact enough
        tokens = sum(length * count for length, count in enumerate(array.tolist()))
    if tokens >= 2**63:
        raise ValueError(f"the histogram counts {tokens} tokens, more than 2**63 - 1; pack it in several parts")
    return array.astype(np.int64)


def checked_length(max_sequence_length: int) -> int:
    """The limit as an int. Raises ValueError for one that no packer can handle."""
    length = whole_number("max_sequence_length", max_sequence_length)
    if length > LONGEST_PACK:
        what = f"{Option('max_sequence_length', length)} is more than packers can handle"
        raise OptionError(f"{what}; give at most {LONGEST_PACK}")
    return length


def checked_depth(max_sequences_per_pack: int | None) -> int | None:
    """The limit as an int; None is no limit. Raises ValueError for anything else."""
    if max_sequences_per_pack is None:
        return None
    depth = whole_number("max_sequences_per_pack", max_sequences_per_pack)
    if depth >= 2**63:
        raise OptionError(
            f"{Option('max_sequences_per_pack', depth)} is more than 2**63 - 1; leave it out for no limit"
        )
    return depth


def _fitted(histogram: np.ndarray, max_sequence_length: int) -> np.ndarray:
    beyond = histogram[max_sequence_length + 1 :]
    if beyond.any():
        culprit = max_sequence_length + 1 + int(np.argmax(beyond > 0))
        limit = f"max_sequence_length={max_sequence_length}; truncate or split them before packing"
        raise ValueError(f"the histogram counts {histogram[culprit]} sequences of length {culprit}, more than {limit}")
    fitted = np.zeros(max_sequence_length + 1, np.int64)
    kept = min(len(histogram), len(fitted))
    fitted[:kept] = histogram[:kept]
    return fitted


def _check_plan(plan: object, histogram: np.ndarray, longest: int, deepest: int | None, packer: object) -> None:
    """Raise unless the plan is one, keeps to the limits, and places every sequence of the histogram exactly once."""
    who = f"packer {packer!r}" if isinstance(packer, str) else f"packer {getattr(packer, '__name__', repr(packer))}"
    if not isinstance(plan, PackPlan):
        raise TypeError(f"{who} returned {type(plan).__name__}; a packer returns a PackPlan")
    if (found := plan.max_sequence_length) != longest:
        raise ValueError(f"{who} made a plan for max_sequence_length={found}, but was given {longest}")
    if deepest is not None and plan.max_depth > deepest:
        what = f"{who} put {plan.max_depth} sequences into a pack, more than max_sequences_per_pack={deepest}"
        raise ValueError(f"{what}; it must keep to the given limit")
    placed = plan.histogram()
    if not np.array_equal(placed, histogram):
        length = int(np.argmax(placed != histogram))
        what = f"{who} placed {placed[length]} sequences of length {length}, the histogram counts {histogram[length]}"
        raise ValueError(f"{what}; a plan must place each sequence exactly once")
    if plan.lower_bound > plan.num_packs:
        raise ValueError(f"{who} claims proven_bound={plan.proven_bound}, more than its own {plan.num_packs} packs")
