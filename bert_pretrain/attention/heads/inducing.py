"""`inducing`: a few learned queries summarise each sequence, and its tokens attend to these summaries.

    a_mj  = softmax_j(p_m . k_j / sqrt(K))          p_m: m inducing points per head, parameters
    k'_m  = sum_j a_mj k_j,   v'_m = sum_j a_mj v_j                j over the tokens of one sequence
    context_i = sum_m softmax_m(q_i . k'_m / sqrt(K)) v'_m         i in the same sequence

A summary is a mean of tokens, sum_j a_mj x_j. The layer's key projection of it, W sum_j a_mj x_j + b, is the same mean
of the tokens' keys, as the weights add up to 1; so k' and v' are what the layer would make of the summaries.

Cost: N m K over the batch's N tokens; memory N m. Source: the induced set attention block of Lee et al., Set
Transformer (1810.00825), section 3.1, without the residual and feed-forward parts, which are the encoder layer's.

Isolation: the points are shared, the summaries are made per sequence, from its own tokens alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretrain.attention.head import without_autocast
from bert_pretrain.attention.options import HeadOptions, whole
from bert_pretrain.attention.parts.pieces import SequencePieces
from bert_pretrain.attention.parts.whole_sequences import WholeSequenceHead, softmax_means
from collate.views import at_least_float32


@dataclass(frozen=True)
class InducingOptions(HeadOptions):
    """What `use_attention(model, "inducing", …)` takes."""

    points: int = whole(64, 1, "give the number of summaries of a sequence")
    """Summaries of each sequence. More keep finer detail and cost in proportion."""


class InducingAttention(WholeSequenceHead):
    """Attention through summaries; `points_HMK` are the inducing points."""

    Options = InducingOptions
    supports_dropout = True

    def __init__(self, num_heads: int, head_width: int, max_sequence_length: int, layer_index: int = 0, **options: Any):
        super().__init__(num_heads, head_width, max_sequence_length, layer_index, **options)
        self.points_HMK = nn.Parameter(torch.empty(num_heads, self.options.points, head_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw with variance 1: summaries differ from each other, and none shows a single token only."""
        nn.init.normal_(self.points_HMK)

    def mix(
        self, q_PHWK: Tensor, k_PHWK: Tensor, v_PHWK: Tensor, pieces: SequencePieces, dropout: float = 0.0
    ) -> Tensor:
        wide_key, wide_value = map(at_least_float32, (k_PHWK, v_PHWK))
        with without_autocast(q_PHWK):
            points_HMK = self.points_HMK.to(wide_key.dtype) / self.head_width**0.5
            points_PHMK = points_HMK.expand(len(q_PHWK), -1, -1, -1)
            scores_PHMW = points_PHMK @ wide_key.transpose(2, 3)
            summaries = softmax_means(scores_PHMW, pieces, wide_key, wide_value, dropout=dropout, spread=True)
            key_PHMK, value_PHMK = (x.to(q_PHWK.dtype) for x in summaries)
        return F.scaled_dot_product_attention(q_PHWK, key_PHMK, value_PHMK, dropout_p=dropout)
