"""`longformer`: a window, and global tokens: the first ones of each sequence, such as [CLS].

    context_i = sum_{j in A_i} softmax_j(q_i . k_j / sqrt(K)) v_j
    A_i = {j : |i - j| <= w  or  i < g  or  j < g}                  i, j positions in one sequence

Symmetric: global tokens see all of their sequence, and all of it sees them.

Cost: N (2 w + g) K, and g n K for the global tokens of each sequence; memory grows alike.
Source: Longformer (Beltagy et al. 2020, arXiv 2004.05150, section 3.1), there with separate projections for global
attention, which a head cannot have: it gets one set of queries, keys and values. So it equals the paper's where the
global projections are copies of the local ones, as the paper initialises them.

Isolation: positions are the sequence's own, and each sequence has its own global tokens. With w >= n - 1 or g >= n this
is full softmax attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretrain.attention.heads.local import LocalOptions, WindowPattern, window_mask
from bert_pretrain.attention.options import whole
from bert_pretrain.attention.parts.blocks import hold
from bert_pretrain.attention.parts.global_tokens import GlobalTokens, global_tokens, prepare_global, replace_global
from bert_pretrain.attention.parts.pattern import Sees
from bert_pretrain.attention.parts.windows import Windows, attend, keys_per_query, windows_of_tokens
from collate.layout import PackLayout


@dataclass(frozen=True)
class LongformerOptions(LocalOptions):
    """What `use_attention(model, "longformer", …)` takes. The paper's window is 2 w."""

    global_tokens: int = whole(1, 1, "without global tokens take local attention")
    """How many tokens at the start of each sequence are global; 1 is [CLS]."""


class LongformerAttention(WindowPattern):
    """Softmax attention over a window and the global tokens of the own sequence; no parameters."""

    Options = LongformerOptions

    def sees(self, device: torch.device) -> Sees:
        near, number = super().sees(device), self.options.global_tokens

        def sees(head, query, key, length, number=number):
            return near(head, query, key, length) | (query < number) | (key < number)

        return sees

    def seen_blocks(self, layout: PackLayout) -> Tensor:
        is_global = layout.is_real_BL & (layout.positions < self.options.global_tokens)
        return (super().seen_blocks(layout) | hold(is_global))[:, None]

    def longest_whole(self) -> int:
        return keys_per_query(self.options.window) * 5 // 2  # here the two cost about the same

    def prepare_chunks(self, layout: PackLayout) -> None:
        windows_of_tokens(layout, self.options.window)
        prepare_global(layout, self.options.global_tokens)

    def attend_chunks(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        view = windows_of_tokens(layout, self.options.window)
        tokens = global_tokens(layout, self.options.global_tokens)
        mask = layout.derived((*self.cache_key(), "mask"), lambda: self.chunk_mask(view, tokens))
        key, value = (torch.cat([view.keys(x), tokens.of_chunks(x, view.chunks.sequence)], 2) for x in (k_THK, v_THK))
        context_THK = view.to_tokens(attend(view.queries(q_THK), key, value, mask, dropout))
        return replace_global(context_THK, tokens, q_THK, k_THK, v_THK, layout, dropout)

    def chunk_mask(self, view: Windows, tokens: GlobalTokens) -> Tensor:
        """(NC, 1, C, M + G) bool: the window without global tokens, then these."""
        in_window = ~tokens.is_global(view.key_position, view.length[:, None])[:, None, None]
        near = window_mask(view, self.options.window) & in_window
        far = tokens.valid[view.chunks.sequence][:, None, None]
        return torch.cat([near, far.expand(-1, -1, near.shape[2], -1)], -1)
