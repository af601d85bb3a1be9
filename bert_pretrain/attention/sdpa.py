"""`sdpa`: full softmax attention within each sequence, by one dense block-diagonal mask per batch.

    context_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j,    j over the tokens of i's own sequence

Cost: B L^2 K whatever the packs hold: exact, simple, and the fastest of the dense forms on a CPU while L is a few
hundred. The mask is a view of the layout, built once per batch and shared by all layers.

Other sequences enter as products with a weight of exactly 0. A finite pack mate therefore changes nothing; a NaN would.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from collate.layout import PackLayout


class SdpaAttention(nn.Module):
    """Softmax attention over the tokens of the same sequence; no parameters, no options."""

    supports_dropout = True

    def __init__(self, num_heads: int, head_width: int, max_sequence_length: int, layer_index: int = 0):
        super().__init__()

    def forward(
        self, query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, layout: PackLayout, dropout: float = 0.0
    ) -> Tensor:
        query_BHLK, key_BHLK, value_BHLK = (layout.pad(x).transpose(1, 2) for x in (query_THK, key_THK, value_THK))
        context_BHLK = F.scaled_dot_product_attention(
            query_BHLK, key_BHLK, value_BHLK, attn_mask=layout.attention_mask, dropout_p=dropout
        )
        return layout.unpad(context_BHLK.transpose(1, 2))
