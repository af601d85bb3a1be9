"""Pieces of a batch for torch's CPU kernel of attention: queries of one sequence, and the keys that they see."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from collate.layout import PackLayout


class Piece(NamedTuple):
    """Queries of one sequence, and the keys that they see: slots of one row.

    offset: the place of the first query in its own sequence of keys, counted from key_start.
    """

    row: int
    start: int
    length: int
    key_start: int
    key_length: int
    offset: int


class Pieces:
    """All pieces of a batch, row by row and from left to right. No slot is a query of two.

    num_key_slots: of a row of keys, if keys are not the queries.
    """

    def __init__(
        self,
        pieces: list[Piece],
        num_rows: int,
        num_slots: int,
        window: int | None = None,
        num_key_slots: int | None = None,
    ):
        self.pieces, self.window = pieces, window
        self.cuts = Cuts([piece[:3] for piece in pieces], num_rows, num_slots)
        self.key_cuts = self.cuts
        if num_key_slots is not None and window is None:
            self.key_cuts = Cuts([(piece.row, piece.key_start, piece.key_length) for piece in pieces], 1, num_key_slots)

    def queries(self, x_BHLK: Tensor) -> list[Tensor]:
        """The queries of each piece (1, H, n, K), as views."""
        return self.cuts.of(x_BHLK)

    def keys(self, x_BHLK: Tensor) -> list[Tensor]:
        if self.window is None:
            return self.queries(x_BHLK) if self.key_cuts is self.cuts else self.key_cuts.of(x_BHLK)
        rows = x_BHLK.split(1)  # pieces share keys
        return [rows[piece.row].narrow(2, piece.key_start, piece.key_length) for piece in self.pieces]


class Cuts:
    """Where rows are cut into parts: row, start and length of each, in order."""

    def __init__(self, parts: Iterable[tuple[int, int, int]], num_rows: int, num_slots: int):
        self.sizes: list[list[int]] = [[] for _ in range(num_rows)]  # for each row: gap, part, gap, part, …, gap
        ends = [0] * num_rows
        filled = 0
        for row, start, length in parts:
            self.sizes[row] += [start - ends[row], length]
            ends[row] = start + length
            filled += length
        for sizes, end in zip(self.sizes, ends, strict=True):
            sizes.append(num_slots - end)
        self.fill_rows = filled == num_rows * num_slots

    def of(self, x_BHLK: Tensor) -> list[Tensor]:
        """The parts (1, H, n, K), as views. One split: a call for each would cost a short sequence."""
        rows = zip(x_BHLK.split(1), self.sizes, strict=True)
        return [part for row, sizes in rows for part in row.split(sizes, 2)[1::2]]


def pieces_of_tokens(layout: PackLayout, key_layout: PackLayout | None = None, window: int | None = None) -> Pieces:
    """The sequences of a batch whose tokens are one row (1, H, T, K); padding that counts as a sequence is in no piece.

    key_layout: of the keys, if they are not the queries: sequence by sequence, ends side by side.
    """
    keys = key_layout or layout
    real = layout.is_real_sequence.tolist()
    bounds = (spans(layout), spans(keys))
    pieces = [
        piece
        for is_real, (start, length), (key_start, key_length) in zip(real, *bounds, strict=True)
        if is_real
        for piece in windowed_pieces(0, start, length, key_start, key_length, window)
    ]
    return Pieces(pieces, 1, layout.num_tokens, window, None if key_layout is None else keys.num_tokens)


def pieces_of_rows(layout: PackLayout, window: int | None = None) -> Pieces:
    """The sequences of a batch of padded rows (B, H, L, K), those much longer than a window in several pieces."""
    real = layout.is_real_sequence
    starts, lengths = layout.token_index[layout.cu_seqlens[:-1].long()[real]].tolist(), layout.lengths[real].tolist()
    num_rows, num_slots = layout.sequence_ids_BL.shape
    pieces: list[Piece] = []
    for index, length in zip(starts, lengths, strict=True):
        row, start = divmod(index, num_slots)
        pieces += windowed_pieces(row, start, length, start, length, window)
    return Pieces(pieces, num_rows, num_slots, window)


def spans(layout: PackLayout) -> Iterator[tuple[int, int]]:
    """Start and length of each sequence among the tokens."""
    return zip(layout.cu_seqlens[:-1].tolist(), layout.lengths.tolist(), strict=True)


def windowed_pieces(
    row: int, start: int, length: int, key_start: int, key_length: int, window: int | None
) -> Iterator[Piece]:
    """One sequence in pieces, without queries that see no key.

    window 64, 200 tokens    ->    queries 0..63 with keys 0..127, 64..127 with 0..191, 128..191 with 64..199, …
    """
    if not (length and key_length):
        return
    shift = key_length - length  # the last query stands beside the last key
    if window is None:
        yield Piece(row, start, length, key_start, key_length, shift)
        return
    size = length if key_length <= 2 * window else max(window, SMALLEST_PIECE)
    for first in range(max(0, -shift - window), length, size):
        stop = min(first + size, length)
        low, high = max(first + shift - window, 0), min(stop + shift + window, key_length)
        yield Piece(row, start + first, stop - first, key_start + low, high - low, first + shift - low)


SMALLEST_PIECE = 64
"""Queries of a piece under a narrow window: fewer would meet fewer keys that they do not see, but take more calls."""


class OneByOne(torch.autograd.Function):
    """(B, H, L, K) x 3, pieces, scale -> (B, H, L, K), 0 where there is no piece.

    It calls the kernels that scaled_dot_product_attention itself calls on a CPU: through that function, every sequence
    would cost a dozen nodes of the graph. Each result goes to its place at once, while it is in the cache.
    """

    @staticmethod
    def forward(ctx, query, key, value, pieces, scale=None):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        context, log_sums, masks = _space_like(query, pieces.cuts.fill_rows), [], masks_of(pieces, query.dtype)
        inputs = zip(pieces.queries(query), pieces.keys(key), pieces.keys(value), strict=True)
        for parts, place, mask in zip(inputs, pieces.queries(context), masks, strict=True):
            result, log_sum = kernel(*parts, attn_mask=mask, scale=scale)
            place.copy_(result)
            log_sums.append(log_sum)
        ctx.pieces, ctx.scale, ctx.masks = pieces, scale, masks
        ctx.save_for_backward(query, key, value, context, *log_sums)
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        query, key, value, context, *log_sums = ctx.saved_tensors
        pieces, overlap = ctx.pieces, ctx.pieces.window is not None
        of_query = _space_like(query, pieces.cuts.fill_rows)
        of_key, of_value = (_space_like(x, pieces.key_cuts.fill_rows and not overlap) for x in (key, value))
        inputs = pieces.queries(grad), pieces.queries(query), pieces.keys(key), pieces.keys(value)
        more = pieces.queries(context), log_sums, ctx.masks
        places = pieces.queries(of_query), pieces.keys(of_key), pieces.keys(of_value)
        for *parts, mask, to_query, to_key, to_value in zip(*inputs, *more, *places, strict=True):
            results = kernel(*parts, 0.0, False, attn_mask=mask, scale=ctx.scale)
            to_query.copy_(results[0])
            for place, result in zip((to_key, to_value), results[1:], strict=True):
                place.add_(result) if overlap else place.copy_(result)
        return of_query, of_key, of_value, None, None


def masks_of(pieces: Pieces, dtype: torch.dtype) -> list[Tensor | None]:
    """What a window hides in each piece (n, m), to add to its scores: 0 or -inf; None where nothing is hidden."""
    window = pieces.window
    if window is None:
        return [None] * len(pieces.pieces)

    @cache  # pieces of the same shape share it
    def mask(offset: int, length: int, key_length: int) -> Tensor | None:
        if offset >= 0 and key_length <= window + 1:
            return None
        hidden = (torch.arange(length)[:, None] + offset - torch.arange(key_length)).abs() > window
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))

    return [mask(piece.offset, piece.length, piece.key_length) for piece in pieces.pieces]


def _space_like(x_BHLK: Tensor, is_filled: bool) -> Tensor:
    """Where results of pieces go, in memory (B, L, H, K) as layers want it; zeros where they leave gaps or add up."""
    packs, heads, slots, width = x_BHLK.shape
    make = x_BHLK.new_empty if is_filled else x_BHLK.new_zeros
    return make(packs, slots, heads, width).transpose(1, 2)
