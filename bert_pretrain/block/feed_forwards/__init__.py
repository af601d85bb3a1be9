"""The branch G of a layer.

    feed_forward = FEED_FORWARDS[name](config, options, layer_index)
    feed_forward.from_dense(intermediate, output)         stock BERT's modules
    out_TD, sums = feed_forward(hidden_TD, layout)

table     FEED_FORWARDS
dense     stock BERT's, with a gate, or some tokens at a time
moe       a mixture of experts
grouped   all experts' products at once, on a GPU

Others import what is named below.
"""

from bert_pretrain.block.feed_forwards.dense import DenseFeedForward
from bert_pretrain.block.feed_forwards.moe import BALANCE, MixtureOfExperts
from bert_pretrain.block.feed_forwards.table import FEED_FORWARDS

__all__ = ["BALANCE", "FEED_FORWARDS", "DenseFeedForward", "MixtureOfExperts"]
