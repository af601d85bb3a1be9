"""`persistent`: full attention within each sequence, and to learned keys and values that every token sees.

    context_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j,    j over i's own sequence and m persistent vectors

The persistent vectors are parameters of the layer, other ones for each head: they stand for what does not depend on the
text. Their keys and values start with variance 1, like those of a token.

Cost: sum of n (n + m) K over the sequences; memory N, and m keys and values for each sequence.
Source: all-attention (Sukhbaatar et al. 2019, arXiv 1907.01470, section 3.2), which drops the feed-forward layers for
them. Here these stay, as in x-transformers (attn_num_mem_kv).

Isolation: every sequence has its own copy of the vectors before its keys, so no two sequences meet in a product. They
have no position. On a GPU in 32 bits, or with dropout, a pack has one copy and a mask keeps its sequences apart.

Shape letters: M persistent vectors.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretrain.attention.head import AttentionHead
from bert_pretrain.attention.options import HeadOptions, whole
from collate.isolation.exact_attention import bias_of_packs, takes_one_by_one
from collate.isolation.pieces import OneByOne, Pieces, spans, windowed_pieces
from collate.isolation.varlen import attend_bounds, takes_varlen
from collate.layout import PackLayout


@dataclass(frozen=True)
class PersistentOptions(HeadOptions):
    """What `use_attention(model, "persistent", …)` takes."""

    vectors: int = whole(16, 1, "without persistent vectors take sdpa attention")
    """Learned keys and values of each head. In place of feed-forward layers the paper has 1,024 and more."""


class PersistentAttention(AttentionHead):
    """Softmax attention over the own sequence and learned vectors, `key_HMK` and `value_HMK`."""

    Options = PersistentOptions
    is_full = True
    supports_dropout = True

    def __init__(self, num_heads: int, head_width: int, max_sequence_length: int, layer_index: int = 0, **options: Any):
        super().__init__(num_heads, head_width, max_sequence_length, layer_index, **options)
        shape = (num_heads, self.options.vectors, head_width)
        self.key_HMK, self.value_HMK = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for vectors in (self.key_HMK, self.value_HMK):
            nn.init.normal_(vectors)

    @property
    def shared_keys(self) -> int:
        return self.options.vectors

    def is_one_graph(self, layout: PackLayout) -> bool:
        return layout.runs_on.type != "cpu"

    def prepare(self, layout: PackLayout) -> None:
        if layout.runs_on.type == "cpu":
            self.pieces(layout)
        else:
            layout.cu_seqlens  # noqa: B018

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        vectors = self.key_HMK.to(k_THK.dtype), self.value_HMK.to(v_THK.dtype)
        if not dropout and takes_varlen(q_THK):
            return self.attend_varlen(q_THK, k_THK, v_THK, vectors, layout)
        if q_THK.device.type != "cpu":
            return attend_packs(q_THK, k_THK, v_THK, vectors, layout, dropout)
        if takes_one_by_one(q_THK, self.num_heads, dropout) and not torch.compiler.is_compiling():
            return self.attend_one_by_one(q_THK, k_THK, v_THK, vectors, layout)
        return attend_groups(q_THK, k_THK, v_THK, vectors, layout, dropout)

    def attend_varlen(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, vectors: tuple[Tensor, Tensor], layout: PackLayout
    ) -> Tensor:
        before = self.before(layout)
        key, value = (Before.apply(x, own, *before) for x, own in zip((k_THK, v_THK), vectors, strict=True))
        longest, number = layout.sequence_ids_BL.shape[1], self.options.vectors
        bounds = layout.derived(
            ("bounds with vectors", number),
            lambda: layout.cu_seqlens + number * torch.arange(layout.num_sequences + 1, device=q_THK.device).int(),
        )
        return attend_bounds(q_THK, key, value, layout.cu_seqlens, bounds, longest, longest + number)

    def attend_one_by_one(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, vectors: tuple[Tensor, Tensor], layout: PackLayout
    ) -> Tensor:
        before = self.before(layout)
        key, value = (Before.apply(x, own, *before) for x, own in zip((k_THK, v_THK), vectors, strict=True))
        rows = (x.transpose(0, 1).unsqueeze(0) for x in (q_THK, key, value))
        return OneByOne.apply(*rows, self.pieces(layout)).squeeze(0).transpose(0, 1)

    def before(self, layout: PackLayout) -> tuple[Tensor, Tensor, Tensor]:
        """What `Before` needs to know of the layout."""
        return layout.derived(("before", self.options.vectors), lambda: places_before(layout, self.options.vectors))

    def pieces(self, layout: PackLayout) -> Pieces:
        """The queries of each sequence, with its persistent vectors and its own keys."""
        number = self.options.vectors

        def make() -> Pieces:
            own = zip(layout.is_real_sequence.tolist(), spans(layout), strict=True)
            pieces = [
                piece
                for index, (is_real, (start, length)) in enumerate(own)
                if is_real
                for piece in windowed_pieces(0, start, length, start + index * number, length + number, None)
            ]
            num_keys = layout.num_tokens + layout.num_sequences * number
            return Pieces(pieces, 1, layout.num_tokens, None, num_keys)

        return layout.derived(("pieces with vectors", number), make)


def places_before(layout: PackLayout, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where `number` vectors before each sequence and its tokens stand: (N, M), (T,); is_real_sequence (N,).

    lengths 3, 2, one vector    m . . . m . .    ->    vectors 0, 4; tokens 1, 2, 3, 5, 6
    """
    own = torch.arange(number, device=layout.lengths.device)
    sequence = torch.arange(layout.num_sequences, device=own.device)
    first = layout.cu_seqlens[:-1].long() + sequence * number
    token = torch.arange(layout.num_tokens, device=own.device) + (layout.sequence_of_token + 1) * number
    return first[:, None] + own, token, layout.is_real_sequence


class Before(torch.autograd.Function):
    """x (T, H, K), vectors (H, M, K), places -> (T + N M, H, K): the vectors before each sequence.

    The gradient of vectors is added up over the real sequences, in their order. What has no query has none: a kernel
    may leave anything there.
    """

    @staticmethod
    def forward(ctx, x, vectors, vector_place, token_place, is_real):
        ctx.save_for_backward(vector_place, token_place, is_real)
        made = x.new_empty(len(x) + vector_place.numel(), *x.shape[1:])
        made.index_copy_(0, token_place, x)
        copies = vectors.transpose(0, 1).expand(len(vector_place), -1, -1, -1)
        return made.index_copy_(0, vector_place.flatten(), copies.flatten(0, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        vector_place, token_place, is_real = ctx.saved_tensors
        of_copies = grad.index_select(0, vector_place.flatten()).unflatten(0, vector_place.shape)
        of_vectors = of_copies.masked_fill(~is_real[:, None, None, None], 0).sum(0)
        return grad.index_select(0, token_place), of_vectors.transpose(0, 1), None, None, None


def attend_groups(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    vectors: tuple[Tensor, Tensor],
    layout: PackLayout,
    dropout: float,
) -> Tensor:
    """Sequences of like length side by side."""
    groups, number = layout.length_groups, vectors[0].shape[1]
    contexts = []
    inputs = map(groups.gather, (q_THK, k_THK, v_THK))
    for mask, query, *key_value in zip(groups.key_masks, *inputs, strict=True):
        key, value = (with_vectors(x.transpose(1, 2), own) for x, own in zip(key_value, vectors, strict=True))
        if mask is not None:
            mask = F.pad(mask, (number, 0), value=True).expand(-1, -1, query.shape[1], -1)
        context = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask, dropout_p=dropout)
        contexts.append(context.transpose(1, 2))
    return groups.scatter(contexts)


def attend_packs(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    vectors: tuple[Tensor, Tensor],
    layout: PackLayout,
    dropout: float,
) -> Tensor:
    """All packs in one call; those of a pack share the vectors."""
    number = vectors[0].shape[1]
    bias = layout.derived(
        ("bias with vectors", number, q_THK.dtype), lambda: F.pad(bias_of_packs(layout, q_THK.dtype), (number, 0))
    )
    query, *key_value = (layout.in_rows(x).transpose(1, 2) for x in (q_THK, k_THK, v_THK))
    key, value = (with_vectors(x, own) for x, own in zip(key_value, vectors, strict=True))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    return layout.unpad(context.transpose(1, 2))


def with_vectors(x: Tensor, vectors_HMK: Tensor) -> Tensor:
    """(S, H, n, K) -> (S, H, M + n, K)"""
    return torch.cat([vectors_HMK.expand(len(x), -1, -1, -1), x], dim=2)
