"""The tokens of a batch cut into pieces of equal width, and sums over all pieces of a sequence.

    lengths 3, 20, 5      whole:   width 16: [3] [5]     width 32: [20]            a part for each width
                          chunks:  width 16: [3] [20] [20] [5]                     one part

Whole sequences cost little padding, which is best on a CPU. An accelerator takes chunks: there each part costs a few
dozen launches, however small it is, so it must not matter how many different lengths a batch has. What is a sum over a
sequence is then the sum over its chunks, each of which is a product of its own; no product joins two sequences.

Shape letters: P pieces of a part, W its width, S its sequences.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.layout import PackLayout
from collate.length_groups import Gather, Scatter
from collate.views import at_least_float32, in_ordinary_mode, view


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

    shape: (P, W). is_padding: (P, 1, 1, W) bool, True in padding slots; None where there are none.
    length: (P,) int64, tokens of each piece's sequence. runs: None where each piece is a sequence.
    """

    shape: tuple[int, int]
    is_padding: Tensor | None
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

    def largest(self, x: Tensor) -> Tensor:
        """(P, …) -> (P, …): the maximum over all pieces of a piece's own sequence, without a gradient."""
        return x.detach() if self.runs is None else largest(x.detach(), *self.runs[1:])

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
        return x_PHWK if self.is_padding is None else x_PHWK.masked_fill(self.is_padding.transpose(2, 3), 0)


@dataclass(frozen=True, eq=False)
class Cut:
    """Which tokens the slots of all parts show, part after part.

    source: (slots,) int64, the token that a slot shows. num_tokens: T.
    """

    source: Tensor
    num_tokens: int
    parts: list[SequencePieces]

    def gather(self, x_THK: Tensor, widens: bool = False) -> list[Tensor]:
        """(T, H, K) -> of each part (P, H, W, K), contiguous. The gradient of padding slots is taken for 0.

        widens: to float32 at least.
        """
        num_heads = x_THK.shape[1]
        rows = Gather.apply(x_THK.flatten(0, 1), *self._rows(num_heads))
        if widens:  # before they are split, as each part costs a launch
            rows = at_least_float32(rows)
        shapes = [(count, num_heads, width) for count, width in (part.shape for part in self.parts)]
        parts = [rows] if len(shapes) == 1 else rows.split([math.prod(shape) for shape in shapes])
        return [x.unflatten(0, shape) for x, shape in zip(parts, shapes, strict=True)]

    def scatter(self, x_PHWK: list[Tensor]) -> Tensor:
        """Of each part (P, H, W, K) -> (T, H, K): the inverse of `gather`."""
        num_heads = x_PHWK[0].shape[1]
        rows = [x.flatten(0, 2) for x in x_PHWK]
        _, slot_of_row = self._rows(num_heads)
        context = Scatter.apply(rows[0] if len(rows) == 1 else torch.cat(rows), slot_of_row)
        return context.unflatten(0, (self.num_tokens, num_heads))

    def _rows(self, num_heads: int) -> tuple[Tensor, Tensor]:
        """Which row of (T * H, K) each row of all (P, H, W, K) shows, and where each of the former stands."""
        if num_heads not in self._kept:
            self._kept[num_heads] = in_ordinary_mode(lambda: self._make_rows(num_heads))
        return self._kept[num_heads]

    def _make_rows(self, num_heads: int) -> tuple[Tensor, Tensor]:
        heads, rows, is_real = torch.arange(num_heads, device=self.source.device)[:, None], [], []
        sources = self.source.split([math.prod(part.shape) for part in self.parts])
        for part, source in zip(self.parts, sources, strict=True):
            rows.append((source.view(part.shape)[:, None] * num_heads + heads).flatten())
            shown = torch.ones_like(rows[-1], dtype=torch.bool).view(part.shape[0], num_heads, -1)
            is_real.append(shown if part.is_padding is None else shown & ~part.is_padding[:, 0])
        row = torch.cat(rows)
        num_rows = self.num_tokens * num_heads
        # padding slots show a token that has a slot of its own: they write where nothing reads
        target = torch.where(torch.cat([x.flatten() for x in is_real]), row, num_rows)
        slot_of_row = row.new_empty(num_rows + 1)
        slot_of_row.scatter_(0, target, torch.arange(len(row), device=row.device))
        return row, slot_of_row[:num_rows]

    @view
    def _kept(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}


def whole_sequences(layout: PackLayout) -> Cut:
    """Sequences of like length side by side, a part for each width."""
    return layout.derived("whole sequences", lambda: _whole_sequences(layout))


def _whole_sequences(layout: PackLayout) -> Cut:
    groups = layout.length_groups
    parts = [
        SequencePieces(shape, None if mask is None else ~mask, layout.lengths[members])
        for shape, mask, members in zip(groups.shapes, groups.key_masks, groups.members, strict=True)
    ]
    return Cut(groups.source, layout.num_tokens, parts)


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
    """What `in_chunks` must know of the sizes. It holds no number, for which torch.compile would make another graph.

    chunks: of each part (P,) int64, which of the NC; None: all. runs: of each part.
    """

    chunks: list[Tensor | None]
    runs: list[Runs | None]


def _chunk_table(layout: PackLayout, size: int, apart: bool) -> ChunkTable:
    chunks = layout.chunks(size)
    if not apart:
        return ChunkTable([None], [_runs(chunks.number, chunks.sequence)])
    is_long = chunks.chunks_per_sequence[chunks.sequence] > 1
    short, long = (which.nonzero().squeeze(1) for which in (~is_long, is_long))
    return ChunkTable([short, long], [None, _runs(chunks.number[long], chunks.sequence[long])])


def _runs(number: Tensor, sequence: Tensor) -> Runs:
    """sequence 5 5 5 7 8 8 -> 0 0 0 1 2 2, bounds 0 3 4 6"""
    _, own, counts = sequence.unique_consecutive(return_inverse=True, return_counts=True)
    return Runs(number, own, F.pad(counts.cumsum(0), (1, 0)))


def _in_chunks(layout: PackLayout, size: int, table: ChunkTable) -> Cut:
    chunks = layout.chunks(size)
    of_all = chunks.index, ~chunks.valid[:, None, None], layout.lengths[chunks.sequence]
    indices, pieces = [], []
    for own, runs in zip(table.chunks, table.runs, strict=True):
        index, is_padding, length = of_all if own is None else (x.index_select(0, own) for x in of_all)
        if len(index):
            indices.append(index.flatten())
            pieces.append(SequencePieces((len(index), size), is_padding, length, runs))
    return Cut(torch.cat(indices), layout.num_tokens, pieces)


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


def largest(x: Tensor, sequence: Tensor, bounds: Tensor) -> Tensor:
    return over_sequences(x, sequence, bounds, "max").index_select(0, sequence)
