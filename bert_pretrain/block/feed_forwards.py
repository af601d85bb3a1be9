"""FEED_FORWARDS: the branch G of a layer.

feed_forward = FEED_FORWARDS[name](config, options, layer_index)
feed_forward.from_dense(intermediate, output)         stock BERT's modules
out_TD, sums = feed_forward(hidden_TD, layout)
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
    """Stock BERT's: two projections with an activation between them."""

    loss_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, options: "BlockOptions", layer_index: int):
        super().__init__()
        self.chunk_size = options.chunk_size

    def from_dense(self, intermediate: nn.Module, output: nn.Module) -> None:
        self.intermediate, self.output = intermediate, output

    def forward(self, hidden_TD: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
        if self.chunk_size is None:
            return self._run(hidden_TD), no_sums(hidden_TD)
        parts = [checkpoint(self._run, part, use_reentrant=False) for part in hidden_TD.split(self.chunk_size)]
        return torch.cat(parts), no_sums(hidden_TD)

    def _run(self, hidden_TD: Tensor) -> Tensor:
        output: Any = self.output
        return output.dropout(output.dense(self.intermediate(hidden_TD)))

    def is_one_graph(self, layout: PackLayout) -> bool:
        """Whether one graph of torch.compile holds for all batches: chunks are as many as the tokens ask for."""
        return self.chunk_size is None or isinstance(layout, SlotLayout)

    def output_weights(self) -> list[nn.Parameter]:
        """The projections that write to the residual sum."""
        output: Any = self.output
        return [output.dense.weight]


FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {"dense": DenseFeedForward}
"""Name -> a module, built from the config, the block's options and the index of the layer."""
