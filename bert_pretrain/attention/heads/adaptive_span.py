"""`adaptive_span`: a soft window in own positions; each head learns how far it reaches.

    m_h(x) = clamp((R + z_h - x) / R, 0, 1)                       z_h from 0 to S, learned; R the ramp
    weights_ij = m_h(|i - j|) exp(s_ij) / sum_l m_h(|i - l|) exp(s_il),    s_ij = q_i . k_j / sqrt(K)
    term of the loss = penalty * (sum over layers of the mean of z_h over the heads)

A head sees z_h tokens on each side in full, and R more ever less. The penalty makes it see no farther than helps. The
source looks back only; an encoder looks both ways.

Cost: sum of n^2 K over the sequences, on an accelerator L^2 of a pack; memory: the scores. With `span` S, long ones
cost N (2 (S + R) + C) K, in chunks of C <= 64 tokens. What a head has learned saves no time: its shapes may not depend
on it. Set `span` once you know what is needed.

Source: Sukhbaatar et al., Adaptive Attention Span in Transformers (1905.07799), section 3.

Isolation: distances are those of one sequence's own positions; see `parts.all_scores`, and `parts.windows` for chunks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bert_pretrain.attention.head import prefers_few_launches
from bert_pretrain.attention.options import HeadOptions, number, whole
from bert_pretrain.attention.parts.all_scores import AllScoresHead
from bert_pretrain.attention.parts.pattern import LengthSplit, split_by_length
from bert_pretrain.attention.parts.windows import chunk_and_reach, keys_per_query, windows_of_tokens
from collate.layout import PackLayout
from collate.losses import Mean
from collate.views import at_least_float32

SPANS = "attention_spans"
"""The name of the sum that the penalty is a multiple of."""


@dataclass(frozen=True)
class AdaptiveSpanOptions(HeadOptions):
    """What `use_attention(model, "adaptive_span", …)` takes."""

    span: int | None = whole(None, 1, "give the most tokens that a head may see on each side, or None for any number")
    """S: the most tokens that a head may learn to see on each side, the ramp apart. Less makes long sequences cheaper.
    None: max_sequence_length."""
    ramp: int = whole(32, 1, "give the number of tokens over which a window fades")
    """R: tokens over which a window fades. The gradient of a span comes from these tokens alone."""
    initial: float = number(0.0, "from 0 to 1", "0 starts with the ramp alone, 1 sees all that span allows")
    """The first span of all heads, as a share of S. 1 is the attention of a stock checkpoint, unless S is too short."""
    penalty: float = number(2e-6, "of at least 0", "0 adds nothing to the loss")
    """What a token of span costs, as a mean over heads, added up over layers."""


class AdaptiveSpanAttention(AllScoresHead):
    """Softmax under a soft window; `span_bias_H` is z / S."""

    Options = AdaptiveSpanOptions

    def __init__(self, num_heads: int, head_width: int, max_sequence_length: int, layer_index: int = 0, **options: Any):
        super().__init__(num_heads, head_width, max_sequence_length, layer_index, **options)
        self.longest_span = self.options.span or max_sequence_length
        # as a share, so that steps of the usual size move it; what is called bias has no weight decay
        self.span_bias_H = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.span_bias_H, self.options.initial)

    @torch.no_grad()
    def after_step(self) -> None:
        """Back into 0 to 1, after an optimizer step."""
        self.span_bias_H.clamp_(0, 1)

    @property
    def spans_H(self) -> Tensor:
        """(H,) z: the tokens that each head sees in full on each side."""
        return self.longest_span * Within.apply(at_least_float32(self.span_bias_H))

    @property
    def loss_rows(self) -> tuple[Mean, ...]:
        """The term that the loss gets: see `collate.heads.loss_rows`."""
        return (Mean("attention_span", SPANS, "sequences", self.options.penalty),) if self.options.penalty else ()

    def penalties(self) -> dict[str, Tensor]:
        """The mean span. Its gradient ends at 0: nothing pushes a span farther."""
        span_H = self.longest_span * at_least_float32(self.span_bias_H).clamp(min=0)
        return {SPANS: span_H.mean()} if self.loss_rows else {}

    def weigh(self, scores_GHCM: Tensor, mask: Tensor | None) -> Tensor:
        num_queries, num_keys = scores_GHCM.shape[2:]
        scores = scores_GHCM + self.log_window(num_queries, num_keys, scores_GHCM.dtype)
        if mask is not None:
            scores = torch.where(mask, scores, least(scores.dtype))  # not -inf: a query of padding may see nothing
        return scores.softmax(3)

    def log_window(self, num_queries: int, num_keys: int, dtype: torch.dtype) -> Tensor:
        """(H, C, M): log m, which added to scores is m as a factor; the queries stand in the middle of the keys."""
        first = (num_keys - num_queries) // 2 + 1 - num_keys  # the first query, seen from the last key
        distances = torch.arange(first, first + num_queries + num_keys - 1, device=self.span_bias_H.device).abs()
        distance = distances.unfold(0, num_keys, 1).flip(1)
        share = (self.options.ramp + self.spans_H.to(dtype)[:, None, None] - distance) / self.options.ramp
        # below the smallest number, where log has no gradient, it is hidden
        return share.clamp(torch.finfo(dtype).tiny, 1).log().masked_fill(share <= 0, least(dtype))

    # Chunks, where S makes them cheaper than whole sequences

    @property
    def window(self) -> int:
        """How far any head may ever see."""
        return self.longest_span + self.options.ramp - 1

    @property
    def longest_whole(self) -> int:
        """Up to which length a sequence costs less whole than in chunks."""
        return keys_per_query(self.window) * 3 // 2

    def prepare(self, layout: PackLayout) -> None:
        if self.longest_whole >= self.max_sequence_length:
            super().prepare(layout)
        elif prefers_few_launches(layout):
            layout.chunks(chunk_and_reach(self.window)[0])
        else:
            split = self.by_length(layout)
            if split.short is not None:
                super().prepare(split.short)
            if split.long is not None:
                windows_of_tokens(split.long, self.window)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        inputs = (q_THK, k_THK, v_THK)
        if self.longest_whole >= self.max_sequence_length:
            return super().attend(*inputs, layout, dropout)
        if prefers_few_launches(layout):  # all alike: which are longer, only the batch knows
            return self.attend_chunks(*inputs, layout, dropout)
        split, parts = self.by_length(layout), []
        (q_short, q_long), (k_short, k_long), (v_short, v_long) = map(split.gather, inputs)
        if split.short is not None:
            parts.append(super().attend(q_short, k_short, v_short, split.short, dropout))
        if split.long is not None:
            parts.append(self.attend_chunks(q_long, k_long, v_long, split.long, dropout))
        return split.scatter(parts)

    def by_length(self, layout: PackLayout) -> LengthSplit:
        longest = self.longest_whole
        return layout.derived(("split by length", longest), lambda: split_by_length(layout, longest))

    def attend_chunks(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Tensor:
        view = windows_of_tokens(layout, self.window)
        mask = view.key_valid[:, None, None]
        context = self.attend_keys(view.queries(q_THK), view.keys(k_THK), view.keys(v_THK), mask, dropout)
        return view.to_tokens(context)


class Within(torch.autograd.Function):
    """A share, made one from 0 to 1. Between a step and `after_step`, or without it, it may lie outside. The gradient
    passes nevertheless: with none it would stay there for good."""

    @staticmethod
    def forward(ctx, share):
        return share.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        return grad


def least(dtype: torch.dtype) -> float:
    """As good as -inf, and finite when scores are added to it."""
    return torch.finfo(dtype).min / 2
