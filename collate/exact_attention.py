"""Full softmax attention within each sequence of a batch, by torch's kernels; no mask of L x L.

    context_i = sum_j softmax_j(scale q_i . k_j) v_j,    j over the tokens of i's own sequence

Two executions. In neither do two sequences meet in a product, so not even a NaN passes from one to the other. A
block-diagonal mask would cost L^2 K for each row and multiply other sequences' values by 0.

one by one   On CPUs, without dropout: each sequence is a slice of the batch, handed to torch's CPU kernel as it lies.
             Nothing is gathered, padded or masked. Cost: sum of n^2 K over the sequences; memory N. Alone or packed, a
             sequence meets the same products of the same shapes, so not even rounding knows of other sequences. Under a
             window w a long one is cut into pieces of C queries, each with the keys that it reaches: n (2 w + C) K.
grouped      Elsewhere: sequences of like length side by side (`collate.length_groups`), each group one call of
             scaled_dot_product_attention, n rounded up to a multiple of 16. Where a group is padded to its width,
             torch's CPU kernel makes a float of every query and key of it: n^2 per sequence, never L^2 per row.

Measured with `python benchmarks/exact_attention.py`. One by one parallelizes over the heads of one sequence
only, so with more threads than heads, groups take its place. The choice follows from the device, dropout, heads and
threads alone: neither timings nor pack mates have a say, and a resumed run repeats it.

Shape letters as in collate.layout; H heads, K head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.layout import PackLayout


def attend_tokens(query_THK, key_THK, value_THK, layout: PackLayout, dropout: float = 0.0) -> Tensor:
    """The context (T, H, K) of queries, keys and values (T, H, K) of real tokens, scores scaled by 1/sqrt(K)."""
    inputs = (query_THK, key_THK, value_THK)
    if not takes_one_by_one(query_THK, num_heads=query_THK.shape[1], dropout=dropout):
        return attend_grouped(*inputs, layout, dropout)
    pieces = layout.derived("pieces of tokens", lambda: pieces_of_tokens(layout))
    return OneByOne.apply(*(x.transpose(0, 1)[None] for x in inputs), pieces)[0].transpose(0, 1)


def attend_rows(
    query_BHLK, key_BHLK, value_BHLK, layout: PackLayout, dropout: float = 0.0, scale=None, window: int | None = None
) -> Tensor:
    """The context (B, H, L, K) of padded rows; 0 in padding slots.

    scale: of the scores; None: 1/sqrt(K). window: a token sees those of its sequence at most so many tokens away.
    """
    inputs = (query_BHLK, key_BHLK, value_BHLK)
    if takes_one_by_one(query_BHLK, num_heads=query_BHLK.shape[1], dropout=dropout):
        pieces = layout.derived(("pieces of rows", window), lambda: pieces_of_rows(layout, window))
        return OneByOne.apply(*inputs, pieces, scale, window)
    if layout.num_sequences == 0:  # no token, but a part of the graph
        return (query_BHLK + key_BHLK + value_BHLK) * 0
    inputs = (layout.unpad(x.transpose(1, 2)) for x in inputs)
    return layout.pad(attend_grouped(*inputs, layout, dropout, scale, window)).transpose(1, 2)


def takes_one_by_one(query: Tensor, num_heads: int, dropout: float) -> bool:
    """Whether sequences are attended to one by one; if not, in groups."""
    return query.device.type == "cpu" and not dropout and torch.get_num_threads() <= num_heads


# In groups


def attend_grouped(
    query_THK, key_THK, value_THK, layout: PackLayout, dropout: float = 0.0, scale=None, window: int | None = None
) -> Tensor:
    """(T, H, K) each -> the context (T, H, K), sequences of like length together."""
    groups = layout.length_groups
    masks = layout.derived(("masks of groups", window), lambda: _group_masks(layout, window))
    contexts = []
    for query, key, value, mask in zip(*map(groups.gather, (query_THK, key_THK, value_THK)), masks, strict=True):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
        contexts.append(context.transpose(1, 2))
    return groups.scatter(contexts)


def _group_masks(layout: PackLayout, window: int | None) -> list[Tensor | None]:
    """Of each length group (sequences, 1, width, width) bool, True = attend; None where all attend to all."""
    groups, masks = layout.length_groups, []
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


# One by one


class Piece(NamedTuple):
    """Queries of one sequence, and the keys that they see: slots of one row."""

    row: int
    start: int
    length: int
    key_start: int
    key_length: int

    def queries(self, rows: tuple[Tensor, ...]) -> Tensor:
        """(1, H, n, K) of rows (1, H, L, K): a view."""
        return rows[self.row].narrow(2, self.start, self.length)

    def keys(self, rows: tuple[Tensor, ...]) -> Tensor:
        return rows[self.row].narrow(2, self.key_start, self.key_length)


def pieces_of_tokens(layout: PackLayout) -> list[Piece]:
    """The sequences of a batch whose tokens are one row (1, H, T, K)."""
    starts, lengths = layout.cu_seqlens[:-1].tolist(), layout.lengths.tolist()
    return [Piece(0, start, length, start, length) for start, length in zip(starts, lengths, strict=True)]


def pieces_of_rows(layout: PackLayout, window: int | None = None) -> list[Piece]:
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
    return pieces


SMALLEST_PIECE = 64
"""Queries of a piece under a narrow window: fewer would meet fewer keys that they do not see, but take more calls."""


class OneByOne(torch.autograd.Function):
    """(B, H, L, K) x 3, pieces, scale, window -> (B, H, L, K), 0 where there is no piece.

    Written out, with the kernels that scaled_dot_product_attention itself calls on a CPU: through it, every sequence
    would cost a dozen nodes of the graph. What a kernel returns is copied to its place at once, while it is in the
    cache; concatenated at the end it would have gone to memory and back, and would be kept twice.
    """

    @staticmethod
    def forward(ctx, query, key, value, pieces, scale=None, window=None):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        context, log_sums, band = _space_like(value, pieces), [], Band(window, query.dtype)
        queries, keys, values, contexts = (x.split(1) for x in (query, key, value, context))
        for piece in pieces:
            inputs = piece.queries(queries), piece.keys(keys), piece.keys(values)
            result, log_sum = kernel(*inputs, attn_mask=band.mask(piece), scale=scale)
            piece.queries(contexts).copy_(result)
            log_sums.append(log_sum)
        ctx.pieces, ctx.scale, ctx.band = pieces, scale, band
        ctx.save_for_backward(query, key, value, context, *log_sums)
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        query, key, value, context, *log_sums = ctx.saved_tensors
        pieces, band = ctx.pieces, ctx.band
        gradients = _space_like(query, pieces), _space_like(key, pieces, band), _space_like(value, pieces, band)
        grads, queries, keys, values, contexts = (x.split(1) for x in (grad, query, key, value, context))
        of_query, of_key, of_value = (x.split(1) for x in gradients)
        for piece, log_sum in zip(pieces, log_sums, strict=True):
            inputs = piece.queries(grads), piece.queries(queries), piece.keys(keys), piece.keys(values)
            more = {"attn_mask": band.mask(piece), "scale": ctx.scale}
            results = kernel(*inputs, piece.queries(contexts), log_sum, 0.0, False, **more)
            piece.queries(of_query).copy_(results[0])
            for place, result in zip((piece.keys(of_key), piece.keys(of_value)), results[1:], strict=True):
                place.copy_(result) if band.window is None else place.add_(result)  # pieces share keys
        return *gradients, None, None, None


class Band:
    """What a window hides in a piece, added to its scores: 0 or -inf. Pieces of the same shape share it."""

    def __init__(self, window: int | None, dtype: torch.dtype):
        self.window, self.dtype, self.made = window, dtype, {}

    def mask(self, piece: Piece) -> Tensor | None:
        """(n, m); None where all queries see all keys."""
        if self.window is None or piece.key_length <= self.window + 1:
            return None
        shape = (piece.start - piece.key_start, piece.length, piece.key_length)
        if shape not in self.made:
            self.made[shape] = self._make(*shape)
        return self.made[shape]

    def _make(self, offset: int, length: int, key_length: int) -> Tensor:
        distance = torch.arange(length)[:, None] + offset - torch.arange(key_length)
        hidden = distance.abs() > self.window
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf"))


def _space_like(x_BHLK: Tensor, pieces: list[Piece], band: Band | None = None) -> Tensor:
    """Where results of pieces go, in memory (B, L, H, K) as layers want it; zeros where they leave gaps or add up."""
    packs, heads, slots, width = x_BHLK.shape
    is_filled = sum(piece.length for piece in pieces) == packs * slots and (band is None or band.window is None)
    make = x_BHLK.new_empty if is_filled else x_BHLK.new_zeros
    return make(packs, slots, heads, width).transpose(1, 2)
