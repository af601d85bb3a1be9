"""Pattern heads: softmax attention over a fixed pattern of own positions. One definition, several executions.

    context_i = sum_{j in A_i} softmax_j(q_i . k_j / sqrt(K)) v_j,    A_i = {j of i's own sequence: sees(h, i, j, n)}

The definition is a predicate in own positions, sees(head, query, key, n) with n the sequence's own length. The same
predicate makes

    flex    FlexAttention with one mask per batch, shared by all layers: CUDA (`bert_pretrain.attention.parts.blocks`)
    chunks  the tokens that a chunk of queries may see, side by side, and batched products: everywhere, any dtype
    whole   sequences so short that chunks would not pay: side by side in full, with a mask over what is not seen

Isolation: positions and n are the sequence's own, and flex adds the predicate "same sequence". A chunk never holds two
sequences, so a NaN stays where it is. A block of flex may hold several and hides what is not seen: a huge number stays
where it is, a NaN does not. Only a sequence's own length decides whether it is taken whole.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead, without_autocast
from bert_pretrain.attention.options import HeadOptions, choice
from bert_pretrain.attention.parts import blocks
from bert_pretrain.attention.parts.pieces import SequencePieces
from bert_pretrain.attention.parts.windows import attend
from collate.chunks import Chunks
from collate.layout import PackLayout
from collate.length_groups import Gather
from collate.views import at_least_float32

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(head, query position, key position, length), integer tensors that broadcast -> bool."""


@dataclass(frozen=True)
class PatternOptions(HeadOptions):
    """The options of all pattern heads."""

    execution: str = choice("auto", ("auto", "flex", "chunks", "whole"))
    """"auto": flex for CUDA tensors of 32 bits or fewer, without dropout, and chunks for others there; on CPUs short
    sequences whole and long ones by chunks. "chunks" and "whole" do so with all sequences, in float64 too, and confine
    NaN. "flex" never copies keys, but has no gradient on CPUs."""


class PatternAttention(AttentionHead):
    """Base of pattern heads. A subclass defines `sees` and `attend_chunks`."""

    Options: ClassVar[type] = PatternOptions
    supports_dropout = True

    per_head: bool = False
    """Whether the pattern differs between heads."""
    per_layer: ClassVar[bool] = False
    """Whether the pattern differs between layers."""

    def sees(self, device: torch.device) -> Sees:
        """The pattern, a closure that does not hold self: flex compiles it once for all layers.

        Numbers are defaults of its parameters: torch.compile takes those for constants, but numbers of a closure for
        variables as soon as they differ between two heads.
        """
        raise NotImplementedError

    def attend_chunks(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        """The pattern by batched products over chunks of own tokens."""
        raise NotImplementedError

    def longest_whole(self) -> int:
        """Up to which length "auto" takes a sequence whole; only the options decide it."""
        raise NotImplementedError

    def extra_keys(self, k_THK: Tensor, v_THK: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys and values (N, G, H, K) that are no tokens, and which of them exist (N, G); `sees` has them at -1."""
        return None

    def is_one_graph(self, layout: PackLayout) -> bool:
        return super().is_one_graph(layout) and layout.runs_on.type != "cpu"  # CPUs take short and long ones apart

    def prepare(self, layout: PackLayout) -> None:
        if layout.runs_on.type == "cpu" and self.options.execution == "auto":
            split = self.by_length(layout)
            if split.short is not None:
                split.short.length_groups  # noqa: B018
            if split.long is not None:
                self.prepare_chunks(split.long)

    def prepare_chunks(self, layout: PackLayout) -> None:
        """Ask a layout for each table that `attend_chunks` needs."""

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        inputs, execution = (q_THK, k_THK, v_THK), self.options.execution
        if execution == "flex" and dropout:
            raise ValueError(f"flex cannot drop attention weights, but dropout={dropout}; set execution='chunks'")
        if execution == "auto" and q_THK.device.type != "cpu":
            fits = q_THK.is_cuda and q_THK.dtype != torch.float64 and not dropout
            execution = "flex" if fits else "chunks"
        if execution == "flex":
            return self.attend_flex(*inputs, layout)
        if execution != "auto":
            return (self.attend_chunks if execution == "chunks" else self.attend_whole)(*inputs, layout, dropout)
        split = self.by_length(layout)
        query, key, value = map(split.gather, inputs)
        parts = []
        if split.short is not None:
            parts.append(self.attend_whole(query[0], key[0], value[0], split.short, dropout))
        if split.long is not None:
            parts.append(self.attend_chunks(query[1], key[1], value[1], split.long, dropout))
        return split.scatter(parts)

    def by_length(self, layout: PackLayout) -> "LengthSplit":
        longest = self.longest_whole()
        return layout.derived(("split by length", longest), lambda: split_by_length(layout, longest))

    def attend_whole(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        """The pattern by masks of (n, n), sequences of like length side by side."""
        groups = layout.length_groups
        extra = self.extra_keys(k_THK, v_THK, layout)
        masks = layout.derived((*self.cache_key(), "whole"), lambda: self.group_masks(layout, extra))
        contexts = []
        inputs = map(groups.gather, (q_THK, k_THK, v_THK))
        for members, mask, query, *key_value in zip(groups.members, masks, *inputs, strict=True):
            if extra is not None:
                key_value = [torch.cat([x, y[members]], 1) for x, y in zip(key_value, extra[:2], strict=True)]
            query, key, value = (x.transpose(1, 2) for x in (query, *key_value))
            contexts.append(attend(query, key, value, mask, dropout).transpose(1, 2))
        return groups.scatter(contexts)

    def group_masks(self, layout: PackLayout, extra: tuple | None) -> list[Tensor]:
        """For each length group (S, H or 1, width, width + G) bool."""
        device = layout.lengths.device
        sees = self.sees(device)
        head = torch.arange(self.num_heads if self.per_head else 1, device=device)[:, None, None]
        masks = []
        for members, (_, width) in zip(layout.length_groups.members, layout.length_groups.shapes, strict=True):
            length = layout.lengths[members, None, None, None]
            position = torch.arange(width, device=device)
            query = torch.minimum(position, length - 1).transpose(2, 3)  # a padding query shows the last token
            mask = sees(head, query, position, length) & (position < length)
            if extra is not None:
                exists = extra[2][members, None, None].expand(-1, mask.shape[1], width, -1)
                mask = torch.cat([mask, exists], -1)
            masks.append(mask)
        return masks

    def attend_flex(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout) -> Tensor:
        refuse_gradient(q_THK, k_THK, v_THK)
        block_mask = self.kept_block_mask(layout)
        query, *key_value = (layout.in_rows(x).transpose(1, 2) for x in (q_THK, k_THK, v_THK))
        more = (self.extra_rows(x, layout) for x in (k_THK, v_THK))
        key, value = (x if y is None else torch.cat([x, y], 2) for x, y in zip(key_value, more, strict=True))
        context = blocks.flex_attention()(query, key, value, block_mask=block_mask)
        return layout.unpad(context.transpose(1, 2))

    def before_graph(self, layout: PackLayout) -> None:
        if self.options.execution == "flex" or (self.options.execution == "auto" and layout.runs_on.type != "cpu"):
            self.kept_block_mask(layout)

    def kept_block_mask(self, layout: PackLayout) -> "BlockMask":
        return layout.derived((*self.cache_key(), "flex"), lambda: self.block_mask(layout))

    def block_mask(self, layout: PackLayout) -> "BlockMask":
        """FlexAttention's mask of the packs: (B, H or 1, L, L + E)."""
        ids = layout.sequence_ids_BL
        extra_ids = self.extra_ids(layout)
        key_ids = ids if extra_ids is None else torch.cat([ids, extra_ids], 1)
        seen = blocks.share_sequence(ids, key_ids)[:, None]
        pattern = self.seen_blocks(layout)
        if pattern is not None:
            seen = seen & pattern
        full = blocks.are_one_sequence(ids)[:, None] if self.is_full else None
        return blocks.block_mask(seen, full, self.mask_mod(layout), ids.shape[1], key_ids.shape[1])

    def seen_blocks(self, layout: PackLayout) -> Tensor | None:
        """(B, H or 1, R, R) bool, or what broadcasts to it: blocks where a query may see a key; None: all."""
        return None

    def extra_rows(self, x_THK: Tensor, layout: PackLayout) -> Tensor | None:
        """(B, H, E, K): for flex, keys or values of each pack that are no tokens."""
        return None

    def extra_ids(self, layout: PackLayout) -> Tensor | None:
        """(B, E): the sequences that they belong to."""
        return None

    def mask_mod(self, layout: PackLayout) -> blocks.MaskMod:
        """FlexAttention's predicate: same sequence, and seen."""
        sees, spans = self.sees(layout.token_index.device), blocks.spans_of(layout)
        starts, stops = spans.start, spans.stop

        def mask_mod(pack: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            start, stop = starts[pack, query], stops[pack, query]
            return (key >= start) & (key < stop) & sees(head, query - start, key - start, stop - start)

        return mask_mod

    def cache_key(self) -> tuple[Hashable, ...]:
        """What the pattern depends on, besides the layout."""
        layer = self.layer_index if self.per_layer else None
        return (type(self).__name__, self.options, self.num_heads, self.max_sequence_length, layer)


def refuse_gradient(*inputs: Tensor) -> None:
    """Raise ValueError where flex would have to compute a gradient and cannot."""
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if has_gradient and not inputs[0].is_cuda:
        raise ValueError(
            "flex has no gradient on CPUs; set execution='chunks' there (for attention 'flex' take 'sdpa'), or use "
            "torch.no_grad()"
        )


@dataclass(frozen=True, eq=False)
class LengthSplit:
    """A batch's short sequences and its long ones, each as a batch of its own; None where there are none.

    order: (T,) int64, the tokens, those of short sequences first. place: (T,) int64, its inverse.
    """

    short: PackLayout | None
    long: PackLayout | None
    order: Tensor
    place: Tensor

    def gather(self, x_T: Tensor) -> tuple[Tensor, Tensor]:
        """(T, …) -> the tokens of short sequences, those of long ones."""
        if self.short is None or self.long is None:
            return x_T, x_T  # only one of the two is used
        number = self.short.num_tokens
        x_T = Gather.apply(x_T, self.order, self.place)
        return x_T[:number], x_T[number:]

    def scatter(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `gather`."""
        return parts[0] if len(parts) == 1 else Gather.apply(torch.cat(parts), self.place, self.order)


def split_by_length(layout: PackLayout, longest_short: int) -> LengthSplit:
    """The sequences of up to longest_short tokens apart from the others."""
    lengths = layout.lengths
    is_long, is_short = lengths > longest_short, (lengths > 0) & (lengths <= longest_short)
    order = is_long[layout.sequence_of_token].sort(stable=True).indices
    if not is_long.any():
        short, long = layout, None
    elif not is_short.any():
        short, long = None, layout
    else:
        short, long = in_one_row(lengths[is_short]), in_one_row(lengths[is_long])
    return LengthSplit(short, long, order, order.argsort())


def in_one_row(lengths: Tensor) -> PackLayout:
    """Sequences of these lengths (N,), one after the other."""
    numbers = torch.arange(1, len(lengths) + 1, device=lengths.device)
    return PackLayout.of(torch.repeat_interleave(numbers, lengths)[None])


# Softmax over a part of what a query sees, to be joined with other parts


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float = 0.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over these keys only, (…, Q, K) and mask (…, Q, M): the context (…, Q, K) and log sum exp (…, Q).

    bias: (…, Q, M), added to the scores.
    """
    with without_autocast(query):
        weights, log_sum = SoftmaxWithLogSum.apply(masked_scores(query, key, mask, bias))
        context = F.dropout(weights, dropout) @ at_least_float32(value)
        return context.to(value.dtype), log_sum


def attend_biased(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor, dropout: float = 0.0
) -> Tensor:
    """Attention with a bias that is learned.

    Not torch's fused attention: where the bias has a gradient it takes another kernel than where it has none, which
    rounds differently. A pass that is computed again must give what it gave.
    """
    with without_autocast(query):
        weights = masked_scores(query, key, mask, bias).softmax(-1)
        return (F.dropout(weights, dropout) @ at_least_float32(value)).to(value.dtype)


def masked_scores(query: Tensor, key: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """(…, Q, M), wide: 16 bits would overflow, or round a log sum so that a join goes wrong.

    The least number hides a key, not -inf: a query may see nothing of a part, and then has a tiny log sum exp.
    """
    scores = at_least_float32(query) * query.shape[-1] ** -0.5 @ at_least_float32(key).transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)


class SoftmaxWithLogSum(torch.autograd.Function):
    """scores (…, M) -> softmax (…, M), log sum exp (…): one pass over the scores each way, where torch's two functions
    take two forwards and three backwards."""

    @staticmethod
    def forward(ctx, scores):
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights)
        return weights, scores.amax(-1) - weights.amax(-1).log()  # the largest weight is exp(0) / sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_weights, grad_log_sum):
        (weights,) = ctx.saved_tensors
        mean = (grad_weights * weights).sum(-1, keepdim=True)
        return weights * (grad_weights - mean + grad_log_sum[..., None])


def join_parts(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
    """The softmax over the keys of both parts; their keys must be disjoint. Contexts (…, K), log sums (…)."""
    shares = torch.stack([first[1], second[1]], -1).softmax(-1)
    return (first[0] * shares[..., :1] + second[0] * shares[..., 1:]).to(first[0].dtype)


def join_chunks(context: Tensor, log_sum: Tensor, pieces: SequencePieces, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Parts that are the chunks of each sequence, (NC, …, K) and (NC, …) -> one part, (N, …, K) and (N, …)."""
    largest = pieces.largest(log_sum)
    weights = (log_sum - largest).exp()[..., None]
    totals = pieces.total(torch.cat([weights * context, weights], -1))
    first = chunks.first.clamp(max=chunks.num_chunks - 1)  # an empty sequence has none
    totals, largest = (x.index_select(0, first) for x in (totals, largest))
    return totals[..., :-1] / totals[..., -1:], largest + totals[..., -1].log()
