"""`sdpa`: full softmax attention within each sequence, by torch's kernels; the exact attention of CPUs.

    context_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j,    j over the tokens of i's own sequence

Cost: sum of n^2 K over the sequences; memory N. On a GPU in 32 bits, or with dropout, all of a pack: L^2 K.

Isolation: no two sequences meet in a product, so not even a NaN can pass from one to the other; on a GPU in 32 bits, or
with dropout, a mask keeps them apart. See `collate.isolation.exact_attention`, which isolated stock encoders run, too.
"""

from torch import Tensor

from bert_pretrain.attention.head import AttentionHead
from collate.isolation.exact_attention import attend_tokens, prepare_tokens
from collate.isolation.other_keys import attend_other_keys
from collate.layout import PackLayout


class SdpaAttention(AttentionHead):
    """Softmax attention over the tokens of the same sequence; no parameters, no options."""

    is_full = True
    supports_dropout = True
    takes_key_layout = True

    def is_one_graph(self, layout: PackLayout) -> bool:
        return True

    def prepare(self, layout: PackLayout) -> None:
        prepare_tokens(layout)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        return attend_tokens(q_THK, k_THK, v_THK, layout, dropout)

    def attend_others(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, key_layout: PackLayout, dropout: float
    ) -> Tensor:
        return attend_other_keys(q_THK, k_THK, v_THK, layout, key_layout, dropout)
