"""`local`: every token sees the tokens at most `window` positions from it, or those of its own block.

    context_i = sum_{j in A_i} softmax_j(q_i . k_j / sqrt(K)) v_j,    i, j positions in one sequence
    A_i = {j : |i - j| <= w},    with block=b instead    A_i = {j : floor(i / b) = floor(j / b)}

Cost: N (2 w + C) K with chunks of C <= 64 tokens, of blocks N b K; memory grows alike.
Source: the sliding window of Longformer (Beltagy et al. 2020, arXiv 2004.05150, section 3.1), without its global
tokens; by blocks, as in local-attention (its exact_windowsize=True). Blocks without overlap: BlockBERT (Qiu et al.
2019, arXiv 1911.02972), with each block's own keys in all heads.

Isolation: positions are the sequence's own, and a chunk's neighbours are chunks of the same sequence. With w >= n - 1
or b >= n this is full softmax attention. Blocks are full attention, in sequences that are cut apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretrain.attention.options import whole
from bert_pretrain.attention.parts.blocks import within
from bert_pretrain.attention.parts.pattern import PatternAttention, PatternOptions, Sees
from bert_pretrain.attention.parts.windows import Windows, attend, keys_per_query, windows, windows_of_tokens
from collate.isolation.exact_attention import attend_tokens, prepare_tokens
from collate.isolation.other_keys import attend_other_keys
from collate.isolation.varlen import attend_varlen, takes_varlen
from collate.layout import PackLayout, SlotLayout


@dataclass(frozen=True)
class WindowOptions(PatternOptions):
    """The options of all heads with a window."""

    window: int = whole(128, 0, "0 lets a token see itself, and no neighbour")
    """Tokens that a query sees on each side. More reach further, and cost in proportion."""


@dataclass(frozen=True)
class LocalOptions(WindowOptions):
    """What `use_attention(model, "local", …)` takes."""

    block: int | None = whole(None, 1, "give the number of tokens of a block, or None for a window")
    """Tokens of a block, counted from the sequence's start: a query sees its own block instead of a window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None and self.window != WindowOptions.window:
            raise ValueError(
                f"{type(self).__name__}: window={self.window} has no effect beside block={self.block}, which replaces "
                "the window; give one of the two"
            )


class WindowPattern(PatternAttention):
    """The window, for patterns that have one."""

    Options = WindowOptions

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
    """Softmax attention over a window in own positions, or over blocks; no parameters."""

    Options = LocalOptions
    takes_key_layout = True

    def sees(self, device: torch.device) -> Sees:
        size = self.options.block
        if size is None:
            return super().sees(device)

        def sees(head, query, key, length, size=size):
            return query // size == key // size

        return sees

    def seen_blocks(self, layout: PackLayout) -> Tensor:
        if self.options.block is None:
            return super().seen_blocks(layout)
        ids = layout.sequence_ids_BL
        return within(self.options.block - 1, ids.shape[1], ids.shape[1], ids.device)

    def longest_whole(self) -> int:
        return super().longest_whole() if self.options.block is None else self.options.block * 3 // 2

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        size, is_auto = self.options.block, self.options.execution == "auto"
        by_kernel = is_auto and not dropout and takes_varlen(q_THK, has_window=size is None)
        if size is not None and (by_kernel or (is_auto and q_THK.device.type == "cpu")):
            return attend_tokens(q_THK, k_THK, v_THK, cut_apart(layout, size), dropout)
        if by_kernel:
            return attend_varlen(q_THK, k_THK, v_THK, layout, window=self.options.window)
        return super().attend(q_THK, k_THK, v_THK, layout, dropout)

    def attend_others(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, key_layout: PackLayout, dropout: float
    ) -> Tensor:
        if self.options.block is not None:
            raise ValueError(
                f"local attention in blocks (block={self.options.block}) takes no keys that are not the queries "
                "(key_layout): where would their blocks begin? give a window instead of block"
            )
        return attend_other_keys(q_THK, k_THK, v_THK, layout, key_layout, dropout, self.options.window)

    def prepare(self, layout: PackLayout) -> None:
        if self.options.block is not None and self.options.execution == "auto":
            prepare_tokens(cut_apart(layout, self.options.block))
            return
        super().prepare(layout)
        if layout.runs_on.type != "cpu":
            layout.cu_seqlens  # noqa: B018

    def prepare_chunks(self, layout: PackLayout) -> None:
        self.windows(layout)

    def attend_chunks(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        view = self.windows(layout)
        mask = layout.derived((*self.cache_key(), "mask"), lambda: self.chunk_mask(view))
        context = attend(view.queries(q_THK), view.keys(k_THK), view.keys(v_THK), mask, dropout)
        return view.to_tokens(context)

    def windows(self, layout: PackLayout) -> Windows:
        """Chunks with their neighbours, or blocks without."""
        size = self.options.block
        return windows_of_tokens(layout, self.options.window) if size is None else windows(layout, size, reach=0)

    def chunk_mask(self, view: Windows) -> Tensor:
        if self.options.block is None:
            return window_mask(view, self.options.window)
        return view.key_valid[:, None, None]


def window_mask(view: Windows, window: int) -> Tensor:
    """(NC, 1, C, M) bool: the window, among the slots of each chunk."""
    near = (view.query_position[:, :, None] - view.key_position[:, None]).abs() <= window
    return (near & view.key_valid[:, None])[:, None]


def cut_apart(layout: PackLayout, size: int) -> PackLayout:
    """The layout in which every block of `size` tokens is a sequence of its own.

    [[1, 1, 1, 2, 2, 0]], blocks of 2    ->    [[1, 1, 2, 3, 3, 0]]
    """
    return layout.derived(("blocks as sequences", size), lambda: _cut_apart(layout, size))


def _cut_apart(layout: PackLayout, size: int) -> PackLayout:
    is_start = layout.is_real_BL & (layout.positions % size == 0)
    ids = torch.where(layout.is_real_BL, is_start.cumsum(1), 0).int()
    host = None if layout.host is None else cut_apart(layout.host, size)
    made = PackLayout(ids, host)
    if isinstance(layout, SlotLayout):
        made = SlotLayout(ids, host, layout.sequence_slots + ids.shape[1] // size)
    made.__dict__["runs_on"] = layout.runs_on
    return made
