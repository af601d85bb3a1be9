"""BlockEncoder: layers with a block in the place of stock BERT's encoder."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from bert_pretrain.attention import AttentionHead
from bert_pretrain.attention.head import prepare_heads
from bert_pretrain.block.initial import INITIAL
from bert_pretrain.block.layer import BlockLayer
from bert_pretrain.block.norms import norm_like
from bert_pretrain.block.options import BlockOptions
from bert_pretrain.block.placements import PLACEMENTS
from bert_pretrain.block.streams import NOT_ONE_GRAPH, STREAMS
from collate.layout import PackLayout, one_slot

NOT_RECORDED = ("output_hidden_states", "output_attentions")


@dataclass
class BlockOutput(BaseModelOutputWithPastAndCrossAttentions):
    """loss_sums: what the layers add to the loss, by the names of the terms, summed over layers."""

    loss_sums: dict[str, Tensor] | None = None


class BlockEncoder(nn.Module):
    """Takes the place of `bert.encoder`, and keeps its tensor names; a norm at the end is `encoder.LayerNorm`.

    Two callers. Our model gives (1, T, D) with its `layout`. A stock model gives padded rows (B, L, D) with
    `sequence_ids`: they are unpadded once before the layers, and padded after.

    before: stock BERT's encoder, or a BlockEncoder; its parameters are taken over, with share_layers those of the first
        layer.
    """

    gives_loss_sums = True
    """For collate.heads.loss_rows: the output has `loss_sums`."""

    def __init__(self, config: Any, before: Any, options: BlockOptions):
        super().__init__()
        self.config, self.options, self.is_shrunk = config, options, False
        self.placement, self.stream = PLACEMENTS[options.placement], STREAMS[options.stream]
        sources: list[Any] = list(before.layer)[:1] if options.share_layers else list(before.layer)
        self.layer = nn.ModuleList(BlockLayer(config, options, layer, i) for i, layer in enumerate(sources))
        if self.placement.has_final_norm:
            last = getattr(before, "LayerNorm", None)
            of_layer = sources[0].output.LayerNorm
            self.LayerNorm = norm_like(options.norm, of_layer if last is None else last, is_new=last is None)

    @property
    def passes(self) -> list[Any]:
        """The layers in the order of their passes."""
        return [*self.layer] * (self.config.num_hidden_layers if self.options.share_layers else 1)

    @property
    def gradient_checkpointing(self) -> bool:
        """The switch that transformers sets on every module that has it; layers have their own, too."""
        return any(layer.gradient_checkpointing for layer in self.layer)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, is_on: bool) -> None:
        """Raises ValueError for a stream that keeps less already; transformers comes here before it sets a layer."""
        if is_on:
            refuse_checkpointing(self.options)

    def not_one_graph(self, layout: PackLayout) -> set[str]:
        """The names of what no graph of torch.compile holds for all batches: the stream, or feed-forwards."""
        branches = {type(layer.feed_forward).__name__: layer.feed_forward for layer in self.passes}
        left_out = {name for name, branch in branches.items() if not branch.is_one_graph(layout)}
        return left_out | ({self.options.stream} & NOT_ONE_GRAPH)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layout: PackLayout | None = None,
        sequence_ids: Tensor | None = None,
        **others: Any,
    ) -> BlockOutput:
        if layout is not None:
            hidden_TD, sums = self._run(hidden_states[0], layout)
            return BlockOutput(last_hidden_state=hidden_TD[None], loss_sums=sums)
        for name in NOT_RECORDED:
            if others.get(name) or getattr(self.config, name, False):
                raise ValueError(f"a model with a block cannot give what {name}=True asks for; leave it out")
        if sequence_ids is None:
            raise ValueError(
                "a block needs to know which tokens belong together: call the model with sequence_ids=, 1, 2, 3… "
                "within each row and 0 on padding"
            )
        layout = PackLayout.of(sequence_ids)
        if layout.num_tokens == 0:  # layers cannot run on no token: run on a slot of padding, and keep nothing of it
            hidden_TD, sums = self._run(hidden_states[:1, 0], one_slot(layout))
            hidden_TD, sums = hidden_TD[:0], {name: value * 0 for name, value in sums.items()}
        else:
            prepare_heads([module for module in self.modules() if isinstance(module, AttentionHead)], layout)
            hidden_TD, sums = self._run(layout.unpad(hidden_states), layout)
        return BlockOutput(last_hidden_state=layout.pad(hidden_TD), loss_sums=sums)

    def _run(self, hidden_TD: Tensor, layout: PackLayout) -> tuple[Tensor, dict[str, Tensor]]:
        state, sums = self.stream(self.passes, self.placement, hidden_TD, layout)
        names = self.passes[0].loss_names
        hidden_TD = self.placement.end(state, getattr(self, "LayerNorm", None))
        return hidden_TD, dict(zip(names, sums.unbind(), strict=True)) if names else {}

    @torch.no_grad()
    def shrink_outputs(self) -> None:
        """Apply INITIAL to the output projections of new layers: those that no checkpoint gave; once."""
        if self.is_shrunk or next(self.parameters()).is_meta:
            return
        self.is_shrunk = True
        factor = INITIAL[self.options.initial](self.config.num_hidden_layers)
        for layer in dict.fromkeys(self.passes):
            for branch, _ in layer.branches:
                for weight in branch.output_weights():
                    if factor != 1 and not getattr(weight, "_is_hf_initialized", False):
                        weight.mul_(factor)


def refuse_checkpointing(options: BlockOptions) -> None:
    """Raise ValueError for a reversible stream: transformers' gradient checkpointing adds nothing to it."""
    if options.stream == "reversible":
        raise ValueError(
            "gradient checkpointing keeps what enters each layer, and stream='reversible' keeps nothing of them; "
            "leave either out"
        )
