"""`strided`: a window of l tokens to each side, and every l-th token.

    window  W_i = {j : |i - j| <= l}        columns  C_i = {j : j = i mod l}        i, j positions in one sequence
    heads="split":  the first half of the heads attends over W_i, the other over C_i
    heads="merged": every head attends over the union of W_i and C_i, in one softmax

Cost: N (l + n / l) K, so N sqrt(n) K with l near sqrt(n); memory grows alike.
Source: Sparse Transformer (Child et al. 2019, arXiv 1904.10509, sections 4.2 and 4.3), there causal. Here both
directions: the window to both sides, the columns up and down.

Isolation: positions are the sequence's own, and l comes from the options or from the model's max_sequence_length, never
from the length of a pack. Columns are those of the sequence's own table (`bert_pretrain.attention.parts.fold`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_pretrain.attention.heads.local import window_mask
from bert_pretrain.attention.options import choice, whole
from bert_pretrain.attention.parts.fold import along_columns, column_masks, default_stride, fold, from_columns
from bert_pretrain.attention.parts.pattern import PatternAttention, PatternOptions, Sees, attend_part, join_parts
from bert_pretrain.attention.parts.windows import attend, windows_of_tokens
from collate.layout import PackLayout


@dataclass(frozen=True)
class StrideOptions(PatternOptions):
    """What `use_attention(model, "strided", …)` takes."""

    stride: int | None = whole(None, 1, "None takes the rounded root of max_sequence_length")
    """l: rows get longer and columns shorter as it grows. None: the rounded root of max_sequence_length."""
    heads: str = choice("split", ("split", "merged"))
    """"split" gives each pattern half of the heads (the first gets one more where they are odd); "merged" gives every
    head both patterns, at about twice the cost."""


Found = tuple[Tensor, ...]
"""The context of a pattern; if the patterns are merged, also its log sum."""


class StridePattern(PatternAttention):
    """What `strided` and `fixed` share: a near pattern and a far one, on separate heads or merged."""

    Options = StrideOptions

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stride = self.options.stride or default_stride(self.max_sequence_length)
        self.split = self.options.heads == "split"
        self.per_head = self.split
        self.num_near = (self.num_heads + 1) // 2  # heads of the near pattern, when split
        if self.split and self.num_heads < 2:
            raise ValueError(f"{type(self).__name__}: heads='split' needs 2 heads, got 1; set heads='merged'")

    def longest_whole(self) -> int:
        return self.stride * (2 if self.split else 8)  # here the two cost about the same

    def attend_chunks(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        inputs = (q_THK, k_THK, v_THK)
        if not self.split:
            return join_parts(self.near(*inputs, layout, dropout), self.far(*inputs, layout, dropout))
        query, key, value = (x.tensor_split([self.num_near], 1) for x in inputs)
        near = self.near(query[0], key[0], value[0], layout, dropout)
        return torch.cat([*near, *self.far(query[1], key[1], value[1], layout, dropout)], 1)

    def near(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Found:
        """The near pattern."""
        raise NotImplementedError

    def far(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Found:
        """The far pattern; if merged, only what the near pattern lacks."""
        raise NotImplementedError

    def softmax(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float) -> Found:
        inputs = query, key, value, mask, dropout
        return (attend(*inputs),) if self.split else attend_part(*inputs)


class StridedAttention(StridePattern):
    """Softmax attention over a window and every l-th token; no parameters."""

    def sees(self, device: torch.device) -> Sees:
        stride, num_near, split = self.stride, self.num_near, self.split

        def sees(head, query, key, length, stride=stride, num_near=num_near):
            near = (query - key).abs() <= stride
            far = (query - key) % stride == 0
            return torch.where(head < num_near, near, far) if split else near | far

        return sees

    def near(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Found:
        view = windows_of_tokens(layout, self.stride)
        mask = layout.derived((*self.cache_key(), "near"), lambda: window_mask(view, self.stride))
        found = self.softmax(view.queries(q_THK), view.keys(k_THK), view.keys(v_THK), mask, dropout)
        return tuple(map(view.to_tokens, found))

    def prepare_chunks(self, layout: PackLayout) -> None:
        windows_of_tokens(layout, self.stride)
        fold(layout, self.stride)

    def far(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Found:
        tables = fold(layout, self.stride)
        masks = layout.derived((*self.cache_key(), "far"), lambda: column_masks(tables))
        found = []
        inputs = map(tables.gather, (q_THK, k_THK, v_THK))
        for mask, query, key, value in zip(masks, *inputs, strict=True):
            if not self.split:
                mask = mask & beyond_next_row(mask.shape[-1], mask.device)
            parts = self.softmax(along_columns(query), along_columns(key), along_columns(value), mask, dropout)
            found.append([from_columns(x, self.stride) for x in parts])
        return tables.scatter_each(found)


def beyond_next_row(rows: int, device: torch.device) -> Tensor:
    """(R, R) bool: rows further than one apart; the token one row up or down is in the window already."""
    row = torch.arange(rows, device=device)
    return (row[:, None] - row).abs() > 1
