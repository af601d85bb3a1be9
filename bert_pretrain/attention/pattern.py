"""Pattern heads: softmax attention over a fixed pattern of own positions. One definition, two executions.

    context_i = sum_{j in A_i} softmax_j(q_i . k_j / sqrt(K)) v_j,    A_i = {j of i's own sequence: sees(h, i, j, n)}

The definition is a predicate in own positions, sees(head, query, key, n) with n the sequence's own length. The same
predicate makes

    flex    FlexAttention with one BlockMask per batch, shared by all layers: CUDA
    chunks  the tokens that a chunk of queries may see, side by side, and batched products: everywhere, any dtype
    mask(n) the whole matrix of one sequence: for tests

The rule that keeps sequences apart: positions and n are the sequence's own, and in flex the predicate is AND-ed with
"same sequence". Chunks never hold two sequences, so that a NaN stays where it is; flex computes in tiles that may hold
several and hides what is not seen, so a huge number stays where it is, but a NaN does not.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead
from collate.layout import PackLayout

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(head, query position, key position, length), integer tensors that broadcast -> bool."""


@dataclass(frozen=True)
class PatternOptions:
    """What all pattern heads can be told."""

    execution: str = "auto"
    """"auto" takes flex for CUDA tensors of 32 bits or fewer, without dropout, and chunks elsewhere. "chunks" is exact
    in float64 too and confines NaN; "flex" never copies keys, but has no gradient on CPUs."""

    def __post_init__(self) -> None:
        check_choice(self, "execution", ("auto", "flex", "chunks"))


def check_choice(options: object, name: str, choices: tuple) -> None:
    value = getattr(options, name)
    if value not in choices:
        raise ValueError(f"{type(options).__name__}: {name}={value!r} is unknown; choose from {', '.join(choices)}")


def check_at_least(options: object, name: str, limit: int, cure: str) -> None:
    value = getattr(options, name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < limit):
        raise ValueError(f"{type(options).__name__}: {name}={value!r} must be an integer of at least {limit}; {cure}")


class PatternAttention(AttentionHead):
    """Base of pattern heads. A subclass defines `sees` and `attend_chunks`."""

    Options = PatternOptions
    supports_dropout = True

    per_head: ClassVar[bool] = False
    """Whether the pattern differs between heads."""

    per_layer: ClassVar[bool] = False
    """Whether the pattern differs between layers."""

    def sees(self, device: torch.device) -> Sees:
        """The pattern. A closure over numbers and tensors, not over self: flex compiles it once for all layers."""
        raise NotImplementedError

    def attend_chunks(self, query_THK, key_THK, value_THK, layout: PackLayout, dropout: float) -> Tensor:
        """The pattern by batched products over chunks of own tokens."""
        raise NotImplementedError

    def extra_keys(self, key_THK, value_THK, layout: PackLayout) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys and values (E, H, K) that are no tokens, and the sequence of each (E,), -1 for none: in `sees` at -1."""
        return None

    def attend(self, query_THK, key_THK, value_THK, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        execution = self.options.execution
        if execution == "flex" and dropout:
            raise ValueError(f"flex cannot drop attention weights, but dropout={dropout}; set execution='chunks'")
        fits = query_THK.is_cuda and query_THK.dtype != torch.float64 and not dropout
        if execution == "flex" or (execution == "auto" and fits):
            return self.attend_flex(query_THK, key_THK, value_THK, layout)
        return self.attend_chunks(query_THK, key_THK, value_THK, layout, dropout)

    def attend_flex(self, query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, layout: PackLayout) -> Tensor:
        extra = self.extra_keys(key_THK, value_THK, layout)
        if extra is not None:
            key_THK, value_THK = torch.cat([key_THK, extra[0]]), torch.cat([value_THK, extra[1]])
        extra_sequence = None if extra is None else extra[2]
        block_mask = layout.derived((*self.cache_key(), "flex"), lambda: self.block_mask(layout, extra_sequence))
        flex_attention, _ = flex_functions()
        query, key, value = (x.transpose(0, 1)[None] for x in (query_THK, key_THK, value_THK))
        return flex_attention(query, key, value, block_mask=block_mask)[0].transpose(0, 1)

    def block_mask(self, layout: PackLayout, extra_sequence: Tensor | None):
        """FlexAttention's mask of the batch: (1, H or 1, T, T + E)."""
        mask_mod = self.mask_mod(layout, extra_sequence)
        num_tokens = layout.num_tokens
        num_extra = 0 if extra_sequence is None else len(extra_sequence)
        _, create_block_mask = flex_functions()
        num_heads = self.num_heads if self.per_head else None
        device = layout.token_index.device
        return create_block_mask(mask_mod, None, num_heads, num_tokens, num_tokens + num_extra, device=device)

    def mask_mod(self, layout: PackLayout, extra_sequence: Tensor | None = None) -> Callable:
        """FlexAttention's predicate over tokens: (batch, head, query, key) -> same sequence, and seen."""
        sees = self.sees(layout.token_index.device)
        sequence, position = layout.sequence_of_token, layout.positions_T
        length = layout.lengths[sequence]
        key_sequence, key_position = sequence, position
        if extra_sequence is not None:
            key_sequence = torch.cat([sequence, extra_sequence])
            key_position = torch.cat([position, torch.full_like(extra_sequence, -1)])

        def mask_mod(batch, head, query, key):
            same = sequence[query] == key_sequence[key]
            return same & sees(head, position[query], key_position[key], length[query])

        return mask_mod

    def mask(self, length: int, device: torch.device | str = "cpu") -> Tensor:
        """(H, n, n) bool: the pattern of one sequence in full, True = attend."""
        device = torch.device(device)
        head = torch.arange(self.num_heads, device=device)[:, None, None]
        position = torch.arange(length, device=device)
        seen = self.sees(device)(head, position[:, None], position, torch.tensor(length, device=device))
        return seen.expand(self.num_heads, length, length)

    def cache_key(self) -> tuple[Hashable, ...]:
        """What the pattern depends on, besides the layout."""
        layer = self.layer_index if self.per_layer else None
        return (type(self).__name__, self.options, self.num_heads, self.max_sequence_length, layer)


@cache
def flex_functions() -> tuple[Callable, Callable]:
    """flex_attention and create_block_mask, compiled once and only when first asked for."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


# Softmax over a part of what a query sees, to be joined with other parts


def attend_part(query, key, value, mask, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Attention over these keys only, (…, Q, K) and mask (…, Q, M): the context (…, Q, K) and log sum exp (…, Q).

    The least number hides and not -inf: a query may see none of this part. It then has a log sum exp far below any.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2)
    log_sum = scores.logsumexp(-1)
    weights = F.dropout((scores - log_sum[..., None]).exp(), dropout)
    return weights @ value, log_sum


def join_parts(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """The softmax over the keys of both parts; their keys must be disjoint. Contexts (…, K), log sums (…)."""
    share = (second[1] - first[1]).sigmoid()[..., None]  # of the second part
    return torch.lerp(first[0], second[0], share)
