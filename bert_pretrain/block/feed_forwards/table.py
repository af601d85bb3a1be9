"""FEED_FORWARDS: one row a feed-forward."""

from collections.abc import Callable

from torch import nn

from bert_pretrain.block.feed_forwards.dense import DenseFeedForward
from bert_pretrain.block.feed_forwards.moe import MixtureOfExperts

FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {"dense": DenseFeedForward, "moe": MixtureOfExperts}
"""Name -> a module, built from the config, the block's options and the index of the layer."""
