"""`longformer`: a window, and global tokens: the first ones of each sequence, such as [CLS].

    context_i = sum_{j in A_i} softmax_j(q_i . k_j / sqrt(K)) v_j
    A_i = {j : |i - j| <= w  or  i < g  or  j < g}                  i, j positions in one sequence

Symmetric: global tokens see all of their sequence, and all of it sees them.

Cost: N (2 w + g) K, and g n K for the global tokens of each sequence; memory grows alike. Own projections cost two more
products of the width of the model for every token.
Source: Longformer (Beltagy et al. 2020, arXiv 2004.05150, section 3.1). There queries, keys and values of global
attention, i < g, have projections of their own, and those are copies of the layer's at first. projections="own" does
the same. "shared" takes the layer's for all, without parameters.

Isolation: positions are the sequence's own, and each sequence has its own global tokens. With w >= n - 1 or g >= n this
is full softmax attention, if the projections are shared.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bert_pretrain.attention.heads.local import WindowOptions, WindowPattern, window_mask
from bert_pretrain.attention.options import choice, whole
from bert_pretrain.attention.parts.blocks import hold
from bert_pretrain.attention.parts.global_tokens import (
    GlobalTokens,
    attend_from_global,
    global_tokens,
    prepare_global,
)
from bert_pretrain.attention.parts.pattern import Sees
from bert_pretrain.attention.parts.projections import Projection
from bert_pretrain.attention.parts.windows import Windows, attend, keys_per_query, windows_of_tokens
from collate.layout import PackLayout


@dataclass(frozen=True)
class LongformerOptions(WindowOptions):
    """What `use_attention(model, "longformer", …)` takes. The paper's window is 2 w."""

    global_tokens: int = whole(1, 1, "without global tokens take local attention")
    """How many tokens at the start of each sequence are global; 1 is [CLS]."""
    projections: str = choice("shared", ("shared", "own"))
    """"own": global attention has projections of its own, as in the paper; they start as copies of the layer's."""


class LongformerAttention(WindowPattern):
    """Softmax attention over a window and the global tokens of the own sequence.

    Parameters with projections="own" only: query_global, key_global, value_global, as transformers names them.
    """

    Options = LongformerOptions

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.needs_hidden = self.options.projections == "own"
        if self.needs_hidden:
            sizes = self.hidden_size, self.num_heads, self.head_width
            self.query_global, self.key_global, self.value_global = (Projection(*sizes) for _ in range(3))

    def projections(self) -> dict[str, Projection]:
        return {name: module for name, module in self.named_children() if isinstance(module, Projection)}

    def reset_parameters(self) -> None:
        for projection in self.projections().values():
            projection.reset_parameters()

    def start_from(self, layer: nn.Module) -> None:
        for name, projection in self.projections().items():
            projection.start_from(layer, name.removesuffix("_global"))

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

    def prepare(self, layout: PackLayout) -> None:
        super().prepare(layout)
        if self.needs_hidden:
            prepare_global(layout, self.options.global_tokens)

    def prepare_chunks(self, layout: PackLayout) -> None:
        windows_of_tokens(layout, self.options.window)
        prepare_global(layout, self.options.global_tokens)

    def attend(
        self,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THK: Tensor,
        layout: PackLayout,
        dropout: float = 0.0,
        hidden_TD: Tensor | None = None,
    ) -> Tensor:
        context_THK = super().attend(q_THK, k_THK, v_THK, layout, dropout)
        if hidden_TD is None:
            return context_THK
        tokens = global_tokens(layout, self.options.global_tokens)
        query, key, value = (
            self.query_global(tokens.gather(hidden_TD)),
            self.key_global(hidden_TD),
            self.value_global(hidden_TD),
        )
        return attend_from_global(context_THK, tokens, query, key, value, layout, dropout)

    def attend_chunks(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        view = windows_of_tokens(layout, self.options.window)
        tokens = global_tokens(layout, self.options.global_tokens)
        mask = layout.derived((*self.cache_key(), "mask"), lambda: self.chunk_mask(view, tokens))
        key, value = (torch.cat([view.keys(x), tokens.of_chunks(x, view.chunks.sequence)], 2) for x in (k_THK, v_THK))
        context_THK = view.to_tokens(attend(view.queries(q_THK), key, value, mask, dropout))
        if self.needs_hidden:
            return context_THK  # `attend` replaces what global tokens see
        return attend_from_global(context_THK, tokens, tokens.gather(q_THK), k_THK, v_THK, layout, dropout)

    def chunk_mask(self, view: Windows, tokens: GlobalTokens) -> Tensor:
        """(NC, 1, C, M + G) bool: the window without global tokens, then these."""
        in_window = ~tokens.is_global(view.key_position, view.length[:, None])[:, None, None]
        near = window_mask(view, self.options.window) & in_window
        far = tokens.valid[view.chunks.sequence][:, None, None]
        return torch.cat([near, far.expand(-1, -1, near.shape[2], -1)], -1)
