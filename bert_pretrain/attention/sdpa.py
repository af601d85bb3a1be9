"""`sdpa`: full softmax attention within each sequence, sequences of like length side by side.

    context_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j,    j over the tokens of i's own sequence

Cost: sum of n^2 K over the sequences, each n rounded up to a multiple of 16. Memory N; but where a group is padded to
its width, torch's CPU kernel makes a float of every query and key of it: n^2 per sequence, never L^2 per row.

A block-diagonal mask would cost L^2 K for each row and multiply other sequences' values by 0. Here the sequences are
regrouped by length (`collate.length_groups`), and each group is one call of torch's scaled_dot_product_attention. No
two sequences ever meet in a product, so not even a NaN can pass from one to the other.
"""

import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead
from collate.layout import PackLayout


class SdpaAttention(AttentionHead):
    """Softmax attention over the tokens of the same sequence; no parameters, no options."""

    is_full = True
    supports_dropout = True

    def attend(
        self, query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, layout: PackLayout, dropout: float = 0.0
    ) -> Tensor:
        groups = layout.length_groups
        contexts = []
        for query, key, value, mask in zip(
            *map(groups.gather, (query_THK, key_THK, value_THK)), groups.key_masks, strict=True
        ):
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if mask is not None:
                mask = mask.expand(-1, -1, mask.shape[-1], -1)  # torch's fast CPU kernel wants a row per query
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
            contexts.append(context.transpose(1, 2))
        return groups.scatter(contexts)
