"""BlockLayer: one layer, made of both branches, their norms and a placement."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bert_pretrain.block.branches import AttentionBranch
from bert_pretrain.block.feed_forwards import FEED_FORWARDS, DenseFeedForward
from bert_pretrain.block.norms import norm_like
from bert_pretrain.block.options import BlockOptions
from bert_pretrain.block.placements import PLACEMENTS
from collate.layout import PackLayout


class _NormOnly(nn.Module):
    """Where stock BERT has a norm, beside a feed-forward of another kind."""


class BlockLayer(GradientCheckpointingLayer):
    """(*state, layout) -> (*state, sums), where a placement says what the state is: tensors (1, T, D).

    Not (T, D): queries, keys and values read the very tensor that the residual sum reads, as in stock BERT. So autograd
    adds up their gradients in its order, and no bit differs.

    Tensors have the names of stock BERT's layer: attention.self.…, attention.output.…, intermediate.…, output.…; the
    norm of each branch is the LayerNorm in its output. A feed-forward that is not dense is called feed_forward.

    layer: a stock layer, or one of these, whose parameters this takes over.
    """

    def __init__(self, config: Any, options: BlockOptions, layer: Any, index: int):
        super().__init__()
        self.placement = PLACEMENTS[options.placement]
        if layer.gradient_checkpointing:
            self.gradient_checkpointing = True
            self._gradient_checkpointing_func = layer._gradient_checkpointing_func
        norms = [norm_like(options.norm, output.LayerNorm) for output in (layer.attention.output, layer.output)]
        self.attention = AttentionBranch(layer.attention)
        feed_forward = _feed_forward(config, options, layer, index)
        if isinstance(feed_forward, DenseFeedForward):
            # its parts are the layer's own, as in stock BERT; so the module itself is not registered
            self.intermediate, self.output = feed_forward.intermediate, feed_forward.output
            self.__dict__["feed_forward"] = feed_forward
        else:
            self.feed_forward, self.output = feed_forward, _NormOnly()
        self.attention.output.LayerNorm, self.output.LayerNorm = norms

    @property
    def branches(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """(F, its norm), (G, its norm)"""
        outputs: tuple[Any, Any] = self.attention.output, self.output
        return (self.attention, outputs[0].LayerNorm), (self.feed_forward, outputs[1].LayerNorm)

    @property
    def loss_names(self) -> tuple[str, ...]:
        return tuple(name for branch, _ in self.branches for name in branch.loss_names)

    def forward(self, *state: Tensor, layout: PackLayout) -> tuple[Tensor, ...]:
        (attend, norm), (feed_forward, second_norm) = self.branches
        out_1TD, sums = attend(self.placement.enter(state, norm), layout)
        state = self.placement.leave(state, norm, out_1TD)
        out_TD, second_sums = feed_forward(self.placement.enter(state, second_norm)[0], layout)
        state = self.placement.leave(state, second_norm, out_TD[None])
        found = sums, second_sums
        some = [of_branch for of_branch in found if len(of_branch)]
        return *state, torch.cat(some) if len(some) > 1 else (some or found)[0]

    def train(self, mode: bool = True) -> "BlockLayer":
        super().train(mode)
        self.feed_forward.train(mode)
        return self


def _feed_forward(config: Any, options: BlockOptions, layer: Any, index: int) -> nn.Module:
    before: nn.Module | None = getattr(layer, "feed_forward", None)
    is_dense = before is None or isinstance(before, DenseFeedForward)
    made = FEED_FORWARDS[options.feed_forward](config, options, index)
    if is_dense:
        made.from_dense(layer.intermediate, layer.output)  # type: ignore[operator]
        return made
    if type(made) is not type(before):
        raise ValueError(
            f"feed_forward={options.feed_forward!r} cannot be made of {type(before).__name__}; make the model anew"
        )
    made.from_own(before)  # type: ignore[operator]
    return made
