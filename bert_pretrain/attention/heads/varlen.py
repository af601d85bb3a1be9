"""`varlen`: full softmax attention within each sequence, by FlashAttention's kernels: CUDA, 16 bits.

    context_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j,    j over the tokens of i's own sequence

Cost: sum of n^2 K over the sequences; memory N. FlashAttention-2 (Dao 2023, arXiv 2307.08691), as
torch.nn.attention.varlen.varlen_attn; where torch lacks it, as flash_attn.flash_attn_varlen_func.

Isolation: the kernel takes the boundaries of the sequences (cu_seqlens) and works on one sequence at a time.
"""

from torch import Tensor, bfloat16, float16

from bert_pretrain.attention.head import AttentionHead
from collate.isolation.other_keys import attend_other_keys
from collate.isolation.varlen import attend_varlen
from collate.layout import PackLayout


class VarlenAttention(AttentionHead):
    """Softmax attention over the tokens of the same sequence; no parameters, no options, no attention dropout."""

    is_full = True
    takes_key_layout = True

    def is_one_graph(self, layout: PackLayout) -> bool:
        return True

    def prepare(self, layout: PackLayout) -> None:
        layout.cu_seqlens  # noqa: B018

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        refuse_elsewhere(q_THK)
        return attend_varlen(q_THK, k_THK, v_THK, layout)

    def attend_others(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, key_layout: PackLayout, dropout: float
    ) -> Tensor:
        refuse_elsewhere(q_THK)
        return attend_other_keys(q_THK, k_THK, v_THK, layout, key_layout)


def refuse_elsewhere(query: Tensor) -> None:
    """Raise ValueError unless the kernel can take these queries."""
    if not query.is_cuda or query.dtype not in (float16, bfloat16):
        raise ValueError(
            f"varlen runs on CUDA in bfloat16 or float16, not on {query.device.type} in {query.dtype}; "
            "train with bf16=True, or use attention 'auto', which runs anywhere: from_pretrained(…, "
            "packed_attention='auto'), or --attention auto"
        )
