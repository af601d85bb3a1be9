"""Blocks: what stands around attention in a layer of BERT, in five choices that do not depend on each other.

    use_block(model, placement="pre", norm="rms", stream="checkpoint")

A layer has two branches, attention F and feed-forward G. Both read and write the T real tokens of a batch, without a
norm and without a sum: `branch(hidden_TD, layout) -> (out_TD, sums)`. Around them stand

    placement   how branches, norms and residual sums combine          PLACEMENTS     post, pre, residual
    norm        what normalizes                                        NORMS          layer, rms
    stream      what the backward pass keeps of the layers             STREAMS        plain, checkpoint, reversible
    feed_forward  the branch G                                         FEED_FORWARDS  dense, moe
    initial     how output projections of a new model are drawn        INITIAL        bert, deep

and `share_layers`, one layer for all passes. The default is stock BERT's block. Every choice works on packed rows, with
every attention head, and keeps sequences apart as heads do: see bert_pretrain.attention.

options        BlockOptions: the choices, checked
use            use_block: a block in a transformers model
config         BlockBertConfig: a type of its own for what stock BERT would misread
models         stock BERT with a block, which transformers' Auto classes find
published      weights of models that have one of these blocks
encoder        BlockEncoder in the place of stock BERT's
layer          BlockLayer: both branches and their norms
branches       the branch F, and what a branch is
reversible     layers that keep nothing for the backward pass
placements, norms, streams, initial    the tables
feed_forwards/ the branch G: dense, with a gate, in chunks; a mixture of experts

Others import what is named below. AutoModelForPreTraining finds its model once `bert_pretrain.model` is imported: that
module imports this one.
"""

import bert_pretrain.block.models  # noqa: F401  (transformers' Auto classes find blocks from now on)
from bert_pretrain.block.config import BlockBertConfig
from bert_pretrain.block.encoder import BlockEncoder
from bert_pretrain.block.feed_forwards import FEED_FORWARDS
from bert_pretrain.block.initial import INITIAL
from bert_pretrain.block.norms import NORMS
from bert_pretrain.block.options import BlockOptions
from bert_pretrain.block.placements import PLACEMENTS
from bert_pretrain.block.streams import STREAMS
from bert_pretrain.block.use import place_block, use_block

__all__ = [
    "FEED_FORWARDS",
    "INITIAL",
    "NORMS",
    "PLACEMENTS",
    "STREAMS",
    "BlockBertConfig",
    "BlockEncoder",
    "BlockOptions",
    "place_block",
    "use_block",
]
