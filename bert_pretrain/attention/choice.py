"""`auto`: full attention by the kernel that is fastest here. The config keeps "auto", so a checkpoint loads anywhere.

    CUDA, bfloat16 or float16        varlen   FlashAttention's kernels: only sequences' own n^2, memory N
    CUDA, float32                    flex     tiles that hold no pair of tokens of one sequence are skipped
    CPU                              sdpa     one sequence at a time, measured: see collate.isolation.exact_attention
    what these cannot do, elsewhere  sdpa     sequences of like length side by side

The choice follows from the device, the type, the head width and dropout alone, never from timings: a resumed run
chooses again, and must choose the same. Each call chooses: a model that trains in bfloat16 may evaluate in float32.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead
from bert_pretrain.attention.heads.flex import FlexAttention
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from bert_pretrain.attention.heads.varlen import VarlenAttention
from collate.isolation.varlen import varlen_obstacle
from collate.layout import PackLayout

AUTO_ATTENTION = "auto"
FULL: dict[str, type[AttentionHead]] = {"sdpa": SdpaAttention, "varlen": VarlenAttention, "flex": FlexAttention}
NARROWEST_FLEX_HEAD = 16
VOLTA = (7, 0)


def choose_attention(device: torch.device, dtype: torch.dtype, head_width: int, dropout: float = 0) -> tuple[str, str]:
    """The name of an exact attention head, and the reason.

    dtype: of queries, keys and values; under mixed precision the 16-bit one. dropout: of attention weights.
    """
    if device.type == "cpu":
        return "sdpa", "on CPUs one sequence at a time is faster than a mask"
    if device.type != "cuda":
        return "sdpa", f"{device.type} has neither varlen nor flex"
    if dropout:
        return "sdpa", f"varlen and flex cannot drop attention weights, but attention_probs_dropout_prob={dropout}"
    capability = torch.cuda.get_device_capability(device)
    number = ".".join(map(str, capability))
    obstacle = varlen_obstacle(dtype, head_width, capability)
    if obstacle is None:
        return "varlen", f"FlashAttention's kernels, {dtype}, compute capability {number}"
    if head_width >= NARROWEST_FLEX_HEAD and capability >= VOLTA and find_spec("triton"):
        return "flex", f"varlen {obstacle}"
    return "sdpa", f"varlen {obstacle}; flex wants Triton, heads of {NARROWEST_FLEX_HEAD} or wider and Volta or newer"


@torch.compiler.assume_constant_result
def _chosen(device: torch.device, dtype: torch.dtype, head_width: int, dropout: float) -> str:
    """The name alone. A compiled graph takes it as a constant: it cannot ask for a device's capability."""
    return choose_attention(device, dtype, head_width, dropout)[0]


class AutoAttention(AttentionHead):
    """`auto`: full attention by the head that `choose_attention` names for the inputs of each call."""

    is_full = True
    supports_dropout = True
    survives_nan = False  # flex does not
    takes_key_layout = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        sizes = self.num_heads, self.head_width, self.max_sequence_length, self.layer_index
        self.full = {name: head(*sizes) for name, head in FULL.items()}  # they have no parameters: no submodules

    def is_one_graph(self, layout: PackLayout) -> bool:
        return True

    def prepare(self, layout: PackLayout) -> None:
        self._expected(layout).prepare(layout)

    def before_graph(self, layout: PackLayout) -> None:
        self._expected(layout).before_graph(layout)

    def _expected(self, layout: PackLayout) -> AttentionHead:
        """The head that `attend` will choose, as far as autocast tells the type."""
        device = layout.runs_on
        has_autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if has_autocast else torch.float32
        return self.full[_chosen(device, dtype, self.head_width, 0.0)]

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        head: Any = self.full[_chosen(q_THK.device, q_THK.dtype, self.head_width, dropout)]
        return head.attend(q_THK, k_THK, v_THK, layout, dropout)

    def attend_others(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, key_layout: PackLayout, dropout: float
    ) -> Tensor:
        head: Any = self.full[_chosen(q_THK.device, q_THK.dtype, self.head_width, dropout)]
        head = head if head.takes_key_layout else self.full["sdpa"]
        return head.attend_others(q_THK, k_THK, v_THK, layout, key_layout, dropout)
