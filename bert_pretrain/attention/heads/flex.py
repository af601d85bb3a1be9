"""`flex`: full softmax attention within each sequence, by FlexAttention, on CUDA; on CPUs forward only.

    context_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j,    j over the tokens of i's own sequence

Cost: the tiles of 128 x 128 that meet a sequence: sum of n^2 K, each n rounded up by at most two tiles; memory N. Dong
et al. 2024 (arXiv 2412.05496), torch.nn.attention.flex_attention. The first call compiles for half a minute.

Isolation: one BlockMask for the batch, shared by all layers, says "same sequence". A tile may hold several sequences
and multiplies what is hidden by 0: a huge number stays in its sequence, a NaN does not.
"""

import torch
from torch import Tensor

from bert_pretrain.attention.options import HeadOptions
from bert_pretrain.attention.parts.pattern import PatternAttention, Sees
from collate.layout import PackLayout


class FlexAttention(PatternAttention):
    """Softmax attention over the tokens of the same sequence; no parameters, no options, no attention dropout."""

    is_full = True
    Options = HeadOptions
    supports_dropout = False
    survives_nan = False

    def sees(self, device: torch.device) -> Sees:
        return lambda head, query, key, length: (query >= 0) & (key >= 0)

    def prepare(self, layout: PackLayout) -> None:
        """Its mask follows from what the layout has anyway."""

    def before_graph(self, layout: PackLayout) -> None:
        self.kept_block_mask(layout)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        return self.attend_flex(q_THK, k_THK, v_THK, layout)
