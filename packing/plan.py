"""PackPlan: the strategies of a packing, how often each repeats, and the numbers that follow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from packing.bounds import lower_bound
from packing.files.metadata import read_json

FILE_FORMAT = "dataset-packing plan 1"
INT64_SUMS = 2.0**62  # sums that are lower cannot overflow on their way

Row = tuple[str, str, str]  # of a table: name, value, note


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Which lengths share a pack, and how many packs are built that way. It knows lengths, not sequences.

    strategies      repeats      packs (max_sequence_length=6)
    (1, 2, 3)       2            [1 2 2 3 3 3] [1 2 2 3 3 3]
    (5,)            1            [5 5 5 5 5 .]

    stored flat:  strategy_lengths = [1, 2, 3, 5]    strategy_offsets = [0, 3, 4]    repeats = [2, 1]

    max_sequence_length: token slots in a pack.
    max_sequences_per_pack: the depth limit of the plan; None = no limit.
    strategy_lengths: lengths of all strategies, end to end, ascending in each; int32.
    strategy_offsets: (strategies + 1,) where each strategy begins in strategy_lengths; int64.
    repeats: (strategies,) packs built from each strategy, at least 1; int64.
    packer: the name of the packer that made the plan.
    proven_bound: packs that the packer proved necessary; lower_bound is at least as high.

    Raises ValueError if a strategy does not fit into a pack.
    """

    max_sequence_length: int
    max_sequences_per_pack: int | None
    strategy_lengths: np.ndarray
    strategy_offsets: np.ndarray
    repeats: np.ndarray
    packer: str
    proven_bound: int = 0

    def __post_init__(self) -> None:
        for name, dtype in (("strategy_lengths", np.int32), ("strategy_offsets", np.int64), ("repeats", np.int64)):
            object.__setattr__(self, name, _frozen_array(name, getattr(self, name), dtype))
        _check_shape(self)
        _check_fit(self)

    @classmethod
    def from_strategies(
        cls,
        strategies: Iterable[Sequence[int]],
        repeats: Sequence[int],
        max_sequence_length: int,
        max_sequences_per_pack: int | None = None,
        packer: str = "custom",
        proven_bound: int = 0,
    ) -> PackPlan:
        """A plan from tuples of lengths: from_strategies([(1, 2, 3), (5,)], [2, 1], 6)."""
        rows = [sorted(strategy) for strategy in strategies]
        offsets = np.cumsum([0, *map(len, rows)])
        flat = np.array([length for row in rows for length in row])
        limits = max_sequence_length, max_sequences_per_pack
        return cls(*limits, flat, offsets, np.array(list(repeats)), packer, proven_bound)

    # Sums are Python integers: counts of 1e12 times lengths of 1e5 are more than float64 holds exactly.

    @property
    def strategies(self) -> Strategies:
        """The strategies as tuples of ascending lengths, each made on access."""
        return Strategies(self.strategy_lengths, self.strategy_offsets)

    @cached_property
    def depths(self) -> np.ndarray:
        """(strategies,) sequences in a pack of each strategy."""
        return np.diff(self.strategy_offsets)

    @cached_property
    def num_packs(self) -> int:
        return sum(self.repeats.tolist())

    @cached_property
    def num_sequences(self) -> int:
        return _dot(self.repeats, self.depths)

    @cached_property
    def num_tokens(self) -> int:
        return _dot(self.repeats, _tokens(self))

    @property
    def packing_efficiency(self) -> float:
        """Real tokens / token slots, in 0..1."""
        return self.num_tokens / (self.num_packs * self.max_sequence_length)

    @property
    def packing_factor(self) -> float:
        """Mean sequences per pack."""
        return self.num_sequences / self.num_packs

    @property
    def max_depth(self) -> int:
        """Sequences in the deepest pack: the sequence slots that a batch needs."""
        return int(self.depths.max())

    @cached_property
    def lower_bound(self) -> int:
        """The packs that these lengths need at least, exact: what the packer proved, or a better cheap bound."""
        cheap = lower_bound(self.histogram(), self.max_sequence_length, self.max_sequences_per_pack)
        return max(cheap, self.proven_bound)

    def histogram(self) -> np.ndarray:
        """(max_sequence_length + 1,) int64: the sequences of each length that the plan places."""
        histogram = np.zeros(self.max_sequence_length + 1, np.int64)
        # add.at and not bincount(weights=): weights are float64 and lose counts above 2**53.
        np.add.at(histogram, self.strategy_lengths, np.repeat(self.repeats, self.depths))
        return histogram

    def equals(self, other: PackPlan) -> bool:
        """Same strategies, repeats, limits, packer and bound."""
        names = [field.name for field in fields(self)]
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    def rows(self) -> list[Row]:
        """What the plan's table says."""
        limit = "no limit" if self.max_sequences_per_pack is None else f"{self.max_sequences_per_pack:,}"
        gap = self.num_packs - self.lower_bound
        verdict = f"{gap:,} {'pack' if gap == 1 else 'packs'} above it" if gap else "met: no packing has fewer packs"
        return [
            ("packer", self.packer, ""),
            ("max_sequence_length", f"{self.max_sequence_length:,}", "token slots in a pack"),
            ("max_sequences_per_pack", limit, f"the deepest pack has {self.max_depth:,}"),
            ("sequences", f"{self.num_sequences:,}", ""),
            ("tokens", f"{self.num_tokens:,}", ""),
            ("packs", f"{self.num_packs:,}", f"from {len(self.repeats):,} strategies"),
            ("lower bound", f"{self.lower_bound:,}", verdict),
            ("packing efficiency", f"{self.packing_efficiency:.5f}", "real tokens / token slots"),
            ("packing factor", f"{self.packing_factor:.4f}", "sequences per pack"),
        ]

    def __str__(self) -> str:
        return table(self.rows())

    def save(self, path: str | PathLike) -> None:
        """Write the plan as JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        content = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        Path(path).write_text(json.dumps({"format": FILE_FORMAT} | content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike) -> PackPlan:
        """Read what save() wrote."""
        try:
            content = read_json(Path(path))
        except ValueError:
            content = None
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError(f"{path} is not a saved plan; give a file that PackPlan.save() wrote")
        found = content.pop("format")
        if found != FILE_FORMAT:
            raise ValueError(f"{path} has format {found!r}, this version reads {FILE_FORMAT!r}; make the plan again")
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{path} is not a whole plan: {error}; make the plan again") from None


class Strategies(Sequence[tuple[int, ...]]):
    """A view of flat strategies as tuples: strategies[0] -> (1, 2, 3)."""

    def __init__(self, lengths: np.ndarray, offsets: np.ndarray) -> None:
        self._lengths, self._offsets = lengths, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[int, ...], ...]: ...

    def __getitem__(self, index: int | slice) -> tuple:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"strategy {index} of a plan with {len(self)} strategies")
        index %= len(self)
        return tuple(self._lengths[self._offsets[index] : self._offsets[index + 1]].tolist())

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"<{len(self):,} strategies: {shown}{', …' if len(self) > 3 else ''}>"


def _frozen_array(name: str, values: ArrayLike, dtype: DTypeLike) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a flat array of integers, got {array.dtype} of shape {array.shape}")
    own = array.astype(dtype)  # a copy: the plan's arrays belong to the plan
    if not np.array_equal(own, array):
        culprit = int(np.argmax(own != array))
        raise ValueError(f"{name}[{culprit}] is {array[culprit]}, more than {np.dtype(dtype).name} can hold")
    own.flags.writeable = False
    return own


def _check_shape(plan: PackPlan) -> None:
    """The three arrays describe at least one strategy, none of them empty or unused."""
    offsets, strategies = plan.strategy_offsets, len(plan.repeats)
    if not strategies:
        raise ValueError("a plan has at least one strategy; an empty histogram cannot be packed")
    if len(offsets) != strategies + 1 or offsets[0] != 0 or offsets[-1] != len(plan.strategy_lengths):
        what = f"strategy_offsets must be {strategies + 1} numbers from 0 to {len(plan.strategy_lengths)}"
        raise ValueError(f"{what}, one more than there are repeats; got {len(offsets)}")
    if (np.diff(offsets) < 1).any():
        raise ValueError(f"strategy {int(np.argmax(np.diff(offsets) < 1))} is empty; leave it out")
    if (plan.repeats < 1).any():
        culprit = int(np.argmax(plan.repeats < 1))
        raise ValueError(f"strategy {culprit} repeats {plan.repeats[culprit]} times; leave it out")


def _check_fit(plan: PackPlan) -> None:
    """Every strategy fits into a pack and keeps to the depth limit."""
    if plan.strategy_lengths.min() < 1:
        culprit = int(np.argmax(plan.strategy_lengths < 1))
        strategy = int(np.searchsorted(plan.strategy_offsets, culprit, side="right")) - 1
        raise ValueError(f"strategy {strategy} holds length {plan.strategy_lengths[culprit]}; a length is at least 1")
    tokens = _tokens(plan)
    if tokens.max() > plan.max_sequence_length:
        culprit = int(np.argmax(tokens > plan.max_sequence_length))
        what = f"strategy {culprit} {plan.strategies[culprit][:8]} has {tokens[culprit]} tokens"
        most = f"max_sequence_length={plan.max_sequence_length}"
        raise ValueError(f"{what}, more than {most}; the packer must not fill a pack beyond that")
    limit = plan.max_sequences_per_pack
    if limit is not None and plan.max_depth > limit:
        culprit = int(np.argmax(plan.depths > limit))
        what = f"strategy {culprit} {plan.strategies[culprit][:8]} has {plan.depths[culprit]} sequences"
        raise ValueError(f"{what}, more than max_sequences_per_pack={limit}; the packer must keep to it")


def _tokens(plan: PackPlan) -> np.ndarray:
    """(strategies,) int64: tokens in a pack of each strategy."""
    return np.add.reduceat(plan.strategy_lengths, plan.strategy_offsets[:-1], dtype=np.int64)


def table(rows: Iterable[Row]) -> str:
    """Names and notes flush left, values flush right."""
    rows = list(rows)
    width = max(len(value) for _, value, _ in rows)
    return "\n".join(f"{name:<23} {value:>{width}}  {note}".rstrip() for name, value, note in rows)


def _dot(left: np.ndarray, right: np.ndarray) -> int:
    if float(np.dot(left.astype(np.float64), right)) < INT64_SUMS:
        return int(np.dot(left.astype(np.int64), right))
    return sum(a * b for a, b in zip(left.tolist(), right.tolist(), strict=True))
