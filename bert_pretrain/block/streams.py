"""STREAMS: what the backward pass keeps of the layers.

    plain        everything
    checkpoint   what enters each layer, and what it chose; backward computes the layer again (1604.06174)
    reversible   nothing: two streams, whose inputs backward gets from the outputs; see bert_pretrain.block.reversible

A stream is `stream(layers, placement, hidden_TD, layout) -> (state, sums)`. layers: in the order of their passes, one
layer several times where they are shared. state: of the placement, after the last. sums: (k,) over all layers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bert_pretrain.attention.parts.choices import recording, replaying
from bert_pretrain.block.branches import added_up
from bert_pretrain.block.placements import Post, State
from bert_pretrain.block.reversible import reversed_layers
from collate.layout import PackLayout

Layers = Sequence[Callable[..., tuple[Tensor, ...]]]
Stream = Callable[[Layers, Post, Tensor, PackLayout], tuple[State, Tensor]]


def plain(layers: Layers, placement: Post, hidden_TD: Tensor, layout: PackLayout) -> tuple[State, Tensor]:
    state, found = placement.begin(hidden_TD[None]), []
    for layer in layers:
        *state, sums = layer(*state, layout=layout)  # type: ignore[assignment]
        found.append(sums)
    return tuple(x_1TD[0] for x_1TD in state), added_up(found)


def checkpointed(layers: Layers, placement: Post, hidden_TD: Tensor, layout: PackLayout) -> tuple[State, Tensor]:
    if not torch.is_grad_enabled():
        return plain(layers, placement, hidden_TD, layout)

    def again(layer: Callable) -> Callable:
        return lambda *state, layout: checkpoint(_handing_on(layer), *state, layout=layout, use_reentrant=False)

    return plain([again(layer) for layer in layers], placement, hidden_TD, layout)


def _handing_on(layer: Callable) -> Callable:
    """For one pass of the layer: its first call chooses, and each later call gets these choices.

    The inputs are the same, but on a GPU what adds up in any order may differ in the last bit, and so may a choice.
    """
    if torch.compiler.is_compiling():
        return layer
    kept: list[Tensor] | None = None

    def run(*state: Tensor, layout: PackLayout) -> tuple[Tensor, ...]:
        nonlocal kept
        if kept is not None:
            with replaying(kept):
                return layer(*state, layout=layout)
        with recording() as choices:
            out = layer(*state, layout=layout)
        kept = choices
        return out

    return run


STREAMS: dict[str, Stream] = {"plain": plain, "checkpoint": checkpointed, "reversible": reversed_layers}
NOT_ONE_GRAPH = {"reversible"}
"""Streams that torch.compile cannot take into a graph."""
