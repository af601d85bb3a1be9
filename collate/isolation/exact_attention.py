"""Full softmax attention within each sequence of a batch, by torch's kernels, without a mask of L x L.

    context_i = sum_j softmax_j(scale q_i . k_j) v_j,    j over the tokens of i's own sequence

There are two executions. In neither do two sequences meet in a product, so not even a NaN passes between them.

one by one   On CPUs, without dropout: torch's CPU kernel gets each sequence as a slice of the batch. Nothing is
             gathered, padded or masked. Cost: sum of n^2 K over the sequences; memory N. Other sequences do not even
             change rounding. A window w cuts a long sequence into pieces of C queries, each with the keys that it
             reaches: n (2 w + C) K.
grouped      Elsewhere: sequences of like length side by side (`collate.length_groups`), each group one call of
             scaled_dot_product_attention, n rounded up to a multiple of 16.

One by one works in parallel on the heads of one sequence only, so with more threads than heads groups take its place.
The choice depends on the device, dropout, heads and threads alone, so a resumed run repeats it.
`python benchmarks/exact_attention.py` measures both.

Shape letters as in collate.layout; H heads, K head width.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.layout import PackLayout


def attend_tokens(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
    """The context (T, H, K) of queries, keys and values (T, H, K) of real tokens, scores scaled by 1/sqrt(K)."""
    inputs = (q_THK, k_THK, v_THK)
    if not takes_one_by_one(q_THK, num_heads=q_THK.shape[1], dropout=dropout):
        return attend_grouped(*inputs, layout, dropout)
    pieces = layout.derived("pieces of tokens", lambda: pieces_of_tokens(layout))
    rows = (x.transpose(0, 1).unsqueeze(0) for x in inputs)
    return OneByOne.apply(*rows, pieces).squeeze(0).transpose(0, 1)  # [0] would copy the gradient


def attend_rows(
    query_BHLK: Tensor,
    key_BHLK: Tensor,
    value_BHLK: Tensor,
    layout: PackLayout,
    dropout: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The context (B, H, L, K) of padded rows; 0 in padding slots.

    scale: of the scores; None: 1/sqrt(K). window: a token sees those of its sequence at most so many tokens away.
    """
    rows, layout = (query_BHLK, key_BHLK, value_BHLK), layout.exact
    if takes_one_by_one(query_BHLK, num_heads=query_BHLK.shape[1], dropout=dropout):
        pieces = layout.derived(("pieces of rows", window), lambda: pieces_of_rows(layout, window))
        return OneByOne.apply(*rows, pieces, scale)
    if layout.num_sequences == 0:  # no token, but a part of the graph
        return (query_BHLK + key_BHLK + value_BHLK) * 0
    q_THK, k_THK, v_THK = (layout.unpad(x.transpose(1, 2)) for x in rows)
    return layout.pad(attend_grouped(q_THK, k_THK, v_THK, layout, dropout, scale, window)).transpose(1, 2)


def takes_one_by_one(query: Tensor, num_heads: int, dropout: float) -> bool:
    """Whether sequences attend one by one; if not, in groups."""
    return query.device.type == "cpu" and not dropout and torch.get_num_threads() <= num_heads


def attend_grouped(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    layout: PackLayout,
    dropout: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(T, H, K) each -> the context (T, H, K), sequences of like length together."""
    groups = layout.length_groups
    masks = layout.derived(("masks of groups", window), lambda: _group_masks(layout, window))
    contexts = []
    for query, key, value, mask in zip(*map(groups.gather, (q_THK, k_THK, v_THK)), masks, strict=True):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
        contexts.append(context.transpose(1, 2))
    return groups.scatter(contexts)


def _group_masks(layout: PackLayout, window: int | None) -> list[Tensor | None]:
    """For each length group (sequences, 1, width, width) bool, True = attend; None where all attend to all."""
    groups = layout.length_groups
    masks: list[Tensor | None] = []
    for (_, width), mask in zip(groups.shapes, groups.key_masks, strict=True):
        if window is not None and width > window + 1:
            lengths = layout.lengths[groups.members[len(masks)], None, None, None]
            place = torch.arange(width, device=lengths.device)
            query = torch.minimum(place, lengths - 1).transpose(2, 3)  # a padding query shows the last token
            mask = ((query - place).abs() <= window) & (place < lengths)
        elif mask is not None:
            mask = mask.expand(-1, -1, width, -1)  # torch's fast CPU kernel wants a row per query
        masks.append(mask)
    return masks


class Piece(NamedTuple):
    """Queries of one sequence, and the keys that they see: slots of one row."""

    row: int
    start: int
    length: int
    key_start: int
    key_length: int


class Pieces:
    """All pieces of a batch, row by row and from left to right. No slot is a query of two."""

    def __init__(self, pieces: list[Piece], num_rows: int, num_slots: int, window: int | None = None):
        self.pieces, self.window = pieces, window
        self.fills_rows = sum(piece.length for piece in pieces) == num_rows * num_slots
        self.sizes: list[list[int]] = [[] for _ in range(num_rows)]  # for each row: gap, piece, gap, piece, …, gap
        ends = [0] * num_rows
        for piece in pieces:
            self.sizes[piece.row] += [piece.start - ends[piece.row], piece.length]
            ends[piece.row] = piece.start + piece.length
        for sizes, end in zip(self.sizes, ends, strict=True):
            sizes.append(num_slots - end)

    def queries(self, x_BHLK: Tensor) -> list[Tensor]:
        """The queries of each piece (1, H, n, K), as views. One split: a call for each would cost a short sequence."""
        rows = zip(x_BHLK.split(1), self.sizes, strict=True)
        return [part for row, sizes in rows for part in row.split(sizes, 2)[1::2]]

    def keys(self, x_BHLK: Tensor) -> list[Tensor]:
        if self.window is None:
            return self.queries(x_BHLK)
        rows = x_BHLK.split(1)  # pieces share keys
        return [rows[piece.row].narrow(2, piece.key_start, piece.key_length) for piece in self.pieces]


def pieces_of_tokens(layout: PackLayout) -> Pieces:
    """The sequences of a batch whose tokens are one row (1, H, T, K)."""
    starts, lengths = layout.cu_seqlens[:-1].tolist(), layout.lengths.tolist()
    pieces = [Piece(0, start, length, start, length) for start, length in zip(starts, lengths, strict=True) if length]
    return Pieces(pieces, 1, layout.num_tokens)


def pieces_of_rows(layout: PackLayout, window: int | None = None) -> Pieces:
    """The sequences of a batch of padded rows (B, H, L, K), those much longer than a window in several pieces.

    window 64, 200 tokens    ->    queries 0..63 with keys 0..127, 64..127 with 0..191, 128..191 with 64..199, …
    """
    starts, lengths = layout.token_index[layout.cu_seqlens[:-1].long()].tolist(), layout.lengths.tolist()
    pieces = []
    for index, length in zip(starts, lengths, strict=True):
        row, start = divmod(index, layout.sequence_ids_BL.shape[1])
        size = length if window is None or length <= 2 * window else max(window, SMALLEST_PIECE)
        for first in range(0, length, size):
            stop, low, high = min(first + size, length), 0, length
            if window is not None:
                low, high = max(first - window, 0), min(stop + window, length)
            pieces.append(Piece(row, start + first, stop - first, start + low, high - low))
    num_rows, num_slots = layout.sequence_ids_BL.shape
    return Pieces(pieces, num_rows, num_slots, window)


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
        context, log_sums, masks = _space_like(value, pieces.fills_rows), [], masks_of(pieces, query.dtype)
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
        of_query = _space_like(query, pieces.fills_rows)
        of_key, of_value = (_space_like(x, pieces.fills_rows and not overlap) for x in (key, value))
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
        if key_length <= window + 1:
            return None
        hidden = (torch.arange(length)[:, None] + offset - torch.arange(key_length)).abs() > window
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))

    return [mask(piece.start - piece.key_start, piece.length, piece.key_length) for piece in pieces.pieces]


def _space_like(x_BHLK: Tensor, is_filled: bool) -> Tensor:
    """Where results of pieces go, in memory (B, L, H, K) as layers want it; zeros where they leave gaps or add up."""
    packs, heads, slots, width = x_BHLK.shape
    make = x_BHLK.new_empty if is_filled else x_BHLK.new_zeros
    return make(packs, slots, heads, width).transpose(1, 2)
