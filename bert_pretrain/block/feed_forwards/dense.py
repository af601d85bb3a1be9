"""The dense feed-forward: two projections with an activation between them; gated, or some tokens at a time.

    dense     W₂ act(W₁ x + b₁) + b₂                      stock BERT
    gated     W₂ (act(W₁ x + b₁) · (V x + c)) + b₂        gated linear units (2002.05202); act="silu": SwiGLU

With `chunk_size` the backward pass computes the inner width of one chunk of tokens at a time, and keeps none.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_pretrain.block.branches import no_sums
from collate.layout import PackLayout, SlotLayout

if TYPE_CHECKING:
    from bert_pretrain.block.options import BlockOptions


class DenseFeedForward(nn.Module):
    """Stock BERT's modules, or with `gated` another factor in the first. Tensor names are stock BERT's."""

    loss_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, options: "BlockOptions", layer_index: int):
        super().__init__()
        self.options, self.initializer_range = options, config.initializer_range

    def from_dense(self, intermediate: nn.Module, output: nn.Module) -> None:
        """Take over stock BERT's modules. A new gate is 1, so that the function stays as it is."""
        self.intermediate = gated_like(intermediate, self.options.gated, self.initializer_range)
        self.output = output

    def forward(self, hidden_TD: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        output: Any = self.output
        out_TD = chunk_by_chunk(self._project, self.options.chunk_size, hidden_TD)
        return output.dropout(out_TD), no_sums(hidden_TD)

    def _project(self, hidden_TD: Tensor) -> Tensor:
        output: Any = self.output
        return output.dense(self.intermediate(hidden_TD))

    def is_one_graph(self, layout: PackLayout) -> bool:
        """Whether one graph of torch.compile holds for all batches: the number of chunks must not change."""
        return self.options.chunk_size is None or isinstance(layout, SlotLayout)

    def output_weights(self) -> list[nn.Parameter]:
        """The projections that write to the residual sum."""
        output: Any = self.output
        return [output.dense.weight]


class GatedIntermediate(nn.Module):
    """act(dense x) · up x; `dense` and act are those of stock BERT's first projection.

    `up` begins as 1, whatever x is. reset_parameters draws it for a new model.
    """

    def __init__(self, intermediate: Any, initializer_range: float):
        super().__init__()
        self.dense, self.intermediate_act_fn = intermediate.dense, intermediate.intermediate_act_fn
        self.initializer_range = initializer_range
        weight_FD = self.dense.weight
        inner, width = weight_FD.shape
        self.up = nn.Linear(width, inner, device=weight_FD.device, dtype=weight_FD.dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.ones_(self.up.bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.up.weight.normal_(0, self.initializer_range)
        self.up.bias.zero_()

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_TD)) * self.up(hidden_TD)


def gated_like(intermediate: nn.Module, gated: bool, initializer_range: float) -> nn.Module:
    """The first projection, with a gate if it shall have one. Raises ValueError where one would have to go."""
    if isinstance(intermediate, GatedIntermediate):
        if not gated:
            raise ValueError("gated=False cannot take a gate out of a trained feed-forward; make the model anew")
        return intermediate
    return GatedIntermediate(intermediate, initializer_range) if gated else intermediate


def chunk_by_chunk(compute: Callable[..., Tensor], size: int | None, *tensors: Tensor) -> Tensor:
    """compute(*tensors), for `size` tokens at a time, which backward computes again; None: all at once.

    The first dimension of each tensor is tokens; the last chunk may be short. `compute` draws nothing at random.
    """
    if size is None:
        return compute(*tensors)
    parts = zip(*(x.split(size) for x in tensors), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([compute(*part) for part in parts])
    return torch.cat([checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
