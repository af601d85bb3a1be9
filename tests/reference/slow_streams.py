"""Two reversible streams under ordinary autograd, which keeps everything; and small layers to run on them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bert_pretrain.block.reversible import Step
from collate import PackLayout


def two_streams(steps: Sequence[Step], hidden_TD: Tensor, layout: PackLayout) -> tuple[Tensor, list[Tensor]]:
    """y1 = x1 + F(x2), y2 = x2 + G(y1), in each layer; the mean of both, in float64, and the sums of each step."""
    first = second = hidden_TD.double()
    all_sums = []
    for f, g in zip(steps[::2], steps[1::2], strict=True):
        out, sums_of_f = f.run(second, layout)
        first = first + out
        out, sums_of_g = g.run(first, layout)
        second = second + out
        all_sums += [sums_of_f, sums_of_g]
    return (first + second) / 2, all_sums


class Attention(nn.Module):
    """F: norm, projections, an attention head, dropout. It adds one term to the loss, a sum over its context."""

    def __init__(self, build: Callable[..., nn.Module], width: int, heads: int, index: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.attention_head = build(
            num_heads=heads, head_width=width // heads, max_sequence_length=64, layer_index=index
        )
        self.num_heads, self.dropout = heads, nn.Dropout(dropout)

    def forward(self, hidden_TD: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        x_TD = self.norm(hidden_TD)
        heads = (project(x_TD).unflatten(-1, (self.num_heads, -1)) for project in (self.query, self.key, self.value))
        hidden = {"hidden_TD": x_TD} if getattr(self.attention_head, "needs_hidden", False) else {}
        context_TD = self.attention_head(*heads, layout, **hidden).flatten(1)
        return self.dropout(self.dense(context_TD)), context_TD.square().sum(dtype=hidden_TD.dtype)[None] / 100


class FeedForward(nn.Module):
    """G: norm, two projections, dropout; no term of the loss."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_TD: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        out_TD = self.dropout(self.down(nn.functional.gelu(self.up(self.norm(hidden_TD)))))
        return out_TD, out_TD.new_zeros(0)


def small_layers(
    build: Callable[..., nn.Module], num_layers: int, dropout: float = 0.0, width: int = 16, heads: int = 2
) -> nn.ModuleList:
    """F, G, F, G, … in float64, drawn under a fixed seed."""
    torch.manual_seed(0)
    branches: list[Any] = []
    for index in range(num_layers):
        branches += [Attention(build, width, heads, index, dropout), FeedForward(width, dropout)]
    return nn.ModuleList(branches).double().train()


def small_steps(branches: nn.ModuleList) -> list[Step]:
    return [small_step(branch) for branch in branches]


def small_step(branch: Any) -> Step:
    return Step(lambda x_TD, layout: branch(x_TD.to(branch.norm.weight.dtype), layout), list(branch.parameters()))
