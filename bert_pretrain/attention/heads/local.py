"""`local`: every token sees the tokens at most `window` positions from it.

    context_i = sum_{|i - j| <= w} softmax_j(q_i . k_j / sqrt(K)) v_j,    i, j positions in one sequence

Cost: N (2 w + C) K with chunks of C <= 64 tokens; memory grows alike.
Source: the sliding window of Longformer (Beltagy et al. 2020, arXiv 2004.05150, section 3.1), without its global
tokens; by blocks, as in local-attention (its exact_windowsize=True).

Isolation: positions are the sequence's own, and a chunk's neighbours are chunks of the same sequence. With w >= n - 1
this is full softmax attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretrain.attention.options import whole
from bert_pretrain.attention.parts.blocks import within
from bert_pretrain.attention.parts.pattern import PatternAttention, PatternOptions, Sees
from bert_pretrain.attention.parts.windows import Windows, attend, keys_per_query, windows_of_tokens
from collate.isolation.other_keys import attend_other_keys
from collate.isolation.varlen import attend_varlen, takes_varlen
from collate.layout import PackLayout


@dataclass(frozen=True)
class LocalOptions(PatternOptions):
    """What `use_attention(model, "local", …)` takes."""

    window: int = whole(128, 0, "0 lets a token see itself, and no neighbour")
    """Tokens that a query sees on each side. More reach further, and cost in proportion."""


class WindowPattern(PatternAttention):
    """The window, for patterns that have one."""

    Options = LocalOptions

    def sees(self, device: torch.device) -> Sees:
        window = self.options.window

        def sees(head, query, key, length, window=window):
            return (query - key).abs() <= window

        return sees

    def seen_blocks(self, layout: PackLayout) -> Tensor:
        ids = layout.sequence_ids_BL
        return within(self.options.window, ids.shape[1], ids.shape[1], ids.device)

    def longest_whole(self) -> int:
        return keys_per_query(self.options.window) * 3 // 2  # here the two cost about the same


class LocalAttention(WindowPattern):
    """Softmax attention over a window in own positions; no parameters."""

    takes_key_layout = True

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        fits = not dropout and self.options.execution == "auto" and takes_varlen(q_THK, has_window=True)
        if fits:
            return attend_varlen(q_THK, k_THK, v_THK, layout, window=self.options.window)
        return super().attend(q_THK, k_THK, v_THK, layout, dropout)

    def attend_others(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, key_layout: PackLayout, dropout: float
    ) -> Tensor:
        return attend_other_keys(q_THK, k_THK, v_THK, layout, key_layout, dropout, self.options.window)

    def prepare(self, layout: PackLayout) -> None:
        super().prepare(layout)
        if layout.runs_on.type != "cpu":
            layout.cu_seqlens  # noqa: B018

    def prepare_chunks(self, layout: PackLayout) -> None:
        windows_of_tokens(layout, self.options.window)

    def attend_chunks(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        view = windows_of_tokens(layout, self.options.window)
        mask = layout.derived((*self.cache_key(), "mask"), lambda: window_mask(view, self.options.window))
        context = attend(view.queries(q_THK), view.keys(k_THK), view.keys(v_THK), mask, dropout)
        return view.to_tokens(context)


def window_mask(view: Windows, window: int) -> Tensor:
    """(NC, 1, C, M) bool: the window, among the slots of each chunk."""
    near = (view.query_position[:, :, None] - view.key_position[:, None]).abs() <= window
    return (near & view.key_valid[:, None])[:, None]
