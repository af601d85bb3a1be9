"""The tokens of a batch cut into pieces of equal width, and sums over all pieces of a sequence.

    lengths 3, 20, 5      whole:   width 16: [3] [5]     width 32: [20]            a part for each width
                          chunks:  width 16: [3] [20] [20] [5]                     one part

Whole sequences cost little padding, which is best on a CPU. An accelerator takes chunks: there each part costs a few
dozen launches, however small it is, so it must not matter how many different lengths a batch has. What is a sum over a
sequence is then the sum over its chunks, each of which is a product of its own; no product joins two sequences.

Shape letters: P pieces of a part, W its width, S its sequences.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.layout import PackLayout, SlotLayout
from collate.length_groups import Gather, Scatter
from collate.views import in_ordinary_mode, view


class Runs(NamedTuple):
    """Which pieces are chunks of one sequence: they stand side by side.

    number: (P,) int64, a piece's number in its sequence, from 0. sequence: (P,) int64, which of the S sequences it
    belongs to, ascending. bounds: (S + 1,) int64, where each sequence begins among the pieces.
    """

    number: Tensor
    sequence: Tensor
    bounds: Tensor


@dataclass(frozen=True, eq=False)
class SequencePieces:
    """P pieces of W slots. Padding slots, at a sequence's end, show its last token.

    shape: (P, W). is_real: (P, 1, 1, W) bool, False in padding slots; None where there are none.
    length: (P,) int64, tokens of each piece's sequence. runs: None where each piece is a sequence.
    """

    shape: tuple[int, int]
    is_real: Tensor | None
    length: Tensor
    runs: Runs | None = None

    @view
    def positions(self) -> Tensor:
        """(P, W) int64: each slot's position in its sequence; those of padding follow the last token's."""
        count, width = self.shape
        start = self.length.new_zeros(count) if self.runs is None else self.runs.number * width
        return start[:, None] + torch.arange(width, device=start.device)

    def add_up(self, x: Tensor) -> Tensor:
        """(P, …) -> (S, …): the sum over the pieces of each sequence."""
        return x if self.runs is None else AddUp.apply(x, *self.runs[1:])

    def spread(self, x: Tensor) -> Tensor:
        """(S, …) -> (P, …): what belongs to a sequence, at each of its pieces."""
        return x if self.runs is None else Spread.apply(x, *self.runs[1:])

    def total(self, x: Tensor) -> Tensor:
        """(P, …) -> (P, …): the sum over all pieces of a piece's own sequence."""
        return x if self.runs is None else Total.apply(x, *self.runs[1:])

    @torch.no_grad()
    def largest(self, x: Tensor) -> Tensor:
        """(P, …) -> (P, …): the maximum over all pieces of a piece's own sequence, without a gradient."""
        if self.runs is None:
            return x.detach()
        _, sequence, bounds = self.runs
        return over_sequences(x.detach(), sequence, bounds, "max").index_select(0, sequence)

    def kept(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, made once for all layers."""
        if key not in self._kept:
            self._kept[key] = in_ordinary_mode(make)
        return self._kept[key]

    @view
    def _kept(self) -> dict[Hashable, Tensor]:
        return {}

    def hide_padding(self, x_PHWK: Tensor) -> Tensor:
        """0 in padding slots, along W."""
        return x_PHWK if self.is_real is None else x_PHWK.masked_fill(~self.is_real.transpose(2, 3), 0)


@dataclass(frozen=True, eq=False)
class Cut:
    """Where T tokens stand in the slots of all parts, part after part.

    source: (slots,) int64, the token that a slot shows. slot_of_token: (T,) int64.
    """

    source: Tensor
    slot_of_token: Tensor
    parts: list[SequencePieces]

    def gather(self, x_T: Tensor) -> list[Tensor]:
        """(T, …) -> of each part (P, W, …). The gradient of padding slots is taken for 0."""
        slots = Gather.apply(x_T, self.source, self.slot_of_token)
        if len(self.parts) == 1:
            return [slots.unflatten(0, self.parts[0].shape)]
        sizes = [pieces * width for pieces, width in (part.shape for part in self.parts)]
        return [x.unflatten(0, part.shape) for x, part in zip(slots.split(sizes), self.parts, strict=True)]

    def scatter(self, x: list[Tensor]) -> Tensor:
        """Of each part (P, W, …) -> (T, …): the inverse of `gather`."""
        slots = [part.flatten(0, 1) for part in x]
        return Scatter.apply(slots[0] if len(slots) == 1 else torch.cat(slots), self.slot_of_token)


def takes_chunks(layout: PackLayout) -> bool:
    """Whether sequences are cut into chunks. It follows from the device and the layout's form alone."""
    return isinstance(layout, SlotLayout) or layout.runs_on.type != "cpu"


def whole_sequences(layout: PackLayout) -> Cut:
    """Sequences of like length side by side, a part for each width."""
    return layout.derived("whole sequences", lambda: _whole_sequences(layout))


def _whole_sequences(layout: PackLayout) -> Cut:
    groups = layout.length_groups
    parts = [
        SequencePieces(shape, mask, layout.lengths[members])
        for shape, mask, members in zip(groups.shapes, groups.key_masks, groups.members, strict=True)
    ]
    return Cut(groups.source, groups.slot_of_token, parts)


def in_chunks(layout: PackLayout, size: int, apart: bool = False) -> Cut:
    """Sequences in chunks of `size` tokens.

    apart: sequences of one chunk are a part of their own, the first, where each piece is a sequence.
    """
    table = chunk_table(layout, size, apart)
    return layout.derived(("pieces", size, apart), lambda: _in_chunks(layout, size, table))


def chunk_table(layout: PackLayout, size: int, apart: bool) -> "ChunkTable":
    return layout.table(("pieces", size, apart), lambda on_host: _chunk_table(on_host, size, apart))


@dataclass(frozen=True, eq=False)
class ChunkTable:
    """What `in_chunks` must know of the sizes.

    counts: chunks of each part. order: (NC,) int64, the chunks part by part; None: as they are. runs: of each part.
    """

    counts: list[int]
    order: Tensor | None
    runs: list[Runs | None]


def _chunk_table(layout: PackLayout, size: int, apart: bool) -> ChunkTable:
    chunks = layout.chunks(size)
    if not apart:
        return ChunkTable([chunks.num_chunks], None, [_runs(chunks.number, chunks.sequence)])
    is_long = chunks.chunks_per_sequence[chunks.sequence] > 1
    num_short = len(is_long) - int(is_long.sum())
    order = is_long.int().argsort(stable=True)
    long = order[num_short:]
    runs = _runs(chunks.number[long], chunks.sequence[long])
    return ChunkTable([num_short, len(long)], order, [None, runs])


def _runs(number: Tensor, sequence: Tensor) -> Runs:
    """sequence 5 5 5 7 8 8 -> 0 0 0 1 2 2, bounds 0 3 4 6"""
    _, own, counts = sequence.unique_consecutive(return_inverse=True, return_counts=True)
    return Runs(number, own, F.pad(counts.cumsum(0), (1, 0)))


def _in_chunks(layout: PackLayout, size: int, table: ChunkTable) -> Cut:
    chunks = layout.chunks(size)
    index, valid, slot_of_token = chunks.index, chunks.valid, chunks.slot_of_token
    length = layout.lengths[chunks.sequence]
    if table.order is not None:
        index, valid, length = (x[table.order] for x in (index, valid, length))
        place = table.order.argsort()
        slot_of_token = place[slot_of_token // size] * size + slot_of_token % size
    parts = zip(valid[:, None, None].split(table.counts), length.split(table.counts), table.runs, strict=True)
    pieces = [SequencePieces((len(own), size), valid, own, runs) for valid, own, runs in parts if len(own)]
    return Cut(index.flatten(), slot_of_token, pieces)


def over_sequences(x: Tensor, sequence: Tensor, bounds: Tensor, reduce: str) -> Tensor:
    """(P, …) -> (S, …): the sum or the maximum over the pieces of each sequence, in their order."""
    if x.is_cuda or reduce == "max":  # index_add adds up in any order there: the rounding would differ from run to run
        return torch.segment_reduce(x, reduce, offsets=bounds, axis=0, unsafe=True)
    return x.new_zeros(len(bounds) - 1, *x.shape[1:]).index_add_(0, sequence, x)


class AddUp(torch.autograd.Function):
    """(P, …), sequence (P,), bounds (S + 1,) -> (S, …)"""

    @staticmethod
    def forward(ctx, x, sequence, bounds):
        ctx.save_for_backward(sequence)
        return over_sequences(x, sequence, bounds, "sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


class Spread(torch.autograd.Function):
    """(S, …), sequence (P,), bounds (S + 1,) -> (P, …)"""

    @staticmethod
    def forward(ctx, x, sequence, bounds):
        ctx.save_for_backward(sequence, bounds)
        return x.index_select(0, sequence)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        sequence, bounds = ctx.saved_tensors
        return over_sequences(grad, sequence, bounds, "sum"), None, None


class Total(torch.autograd.Function):
    """(P, …), sequence (P,), bounds (S + 1,) -> (P, …): AddUp and then Spread, which are each other's gradient."""

    @staticmethod
    def forward(ctx, x, sequence, bounds):
        ctx.save_for_backward(sequence, bounds)
        return totals(x, sequence, bounds)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return totals(grad, *ctx.saved_tensors), None, None


def totals(x: Tensor, sequence: Tensor, bounds: Tensor) -> Tensor:
    return over_sequences(x, sequence, bounds, "sum").index_select(0, sequence)
