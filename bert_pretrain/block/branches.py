"""A layer's two branches. Each is `branch(hidden_TD, layout) -> (out_TD, sums)`.

hidden_TD: (T, D) the tokens of a layout. out_TD: the output after its dropout, without norm and residual sum.
sums: (k,) what the branch adds to the loss, one sum for each of its `loss_names`; float32 at least, in the graph.

The branch G is a row of FEED_FORWARDS. Tensor names are stock BERT's.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from collate.layout import PackLayout
from collate.views import at_least_float32


class AttentionBranch(nn.Module):
    """F: queries, keys and values, the attention head, the output projection and its dropout.

    attention: stock BERT's module, whose parts this takes over. The norm of the branch keeps its place in `output`.
    """

    loss_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, attention: Any):
        super().__init__()
        self.self, self.output = attention.self, attention.output

    def forward(self, hidden_TD: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        """hidden_TD may also be (1, T, D), as stock BERT has it; then so is the output."""
        is_one_row = hidden_TD.dim() == 3
        context_1TD, _ = self.self(hidden_TD if is_one_row else hidden_TD[None], layout=layout)
        out_1TD = self.output.dropout(self.output.dense(context_1TD))
        return out_1TD if is_one_row else out_1TD[0], no_sums(hidden_TD)

    def output_weights(self) -> list[nn.Parameter]:
        """The projections that write to the residual sum."""
        return [self.output.dense.weight]


def no_sums(x: Tensor) -> Tensor:
    """(0,) for a branch that adds nothing to the loss."""
    return at_least_float32(x.new_empty(0))


def added_up(sums: list[Tensor]) -> Tensor:
    """(k,) each -> (k,): the sums of all layers."""
    return sums[0] if len(sums) == 1 or not len(sums[0]) else torch.stack(sums).sum(0)
