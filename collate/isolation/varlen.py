"""Full attention within each sequence on CUDA in 16 bits, by FlashAttention's kernels for any lengths."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from collate.layout import PackLayout

WIDEST_HEAD, AMPERE = 256, (8, 0)


def attend_varlen(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout) -> Tensor:
    """The context (T, H, K), scores scaled by 1/sqrt(K); each sequence of the layout by itself."""
    longest = layout.sequence_ids_BL.shape[1]  # an upper bound is enough, and needs no wait for the device
    inputs = (x.contiguous() for x in (q_THK, k_THK, v_THK))
    return varlen_kernel()(*inputs, layout.cu_seqlens, layout.cu_seqlens, longest, longest)


@cache
def varlen_kernel() -> Callable[..., Any]:
    """(query, key, value, cu_seqlens of queries, of keys, longest query, longest key) -> context, both directions."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func
    return varlen_attn


def varlen_obstacle(dtype: torch.dtype, head_width: int, capability: tuple[int, int]) -> str | None:
    """Why the kernel cannot run; None if it can. capability: the CUDA device's."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"wants bfloat16 or float16, not {dtype}"
    if capability < AMPERE:
        return f"wants an Ampere GPU or newer, compute capability 8.0, not {capability[0]}.{capability[1]}"
    if head_width % 8 or head_width > WIDEST_HEAD:
        return f"wants a head width that is a multiple of 8, at most {WIDEST_HEAD}, not {head_width}"
    if not has_varlen_kernel():
        return "is missing in this torch (2.10 or newer has it), and flash-attn is not installed"
    return None


@cache
def has_varlen_kernel() -> bool:
    """Whether torch's own varlen_attn, with the kernel behind it, or flash-attn is there."""
    own = find_spec("torch.nn.attention.varlen") and torch.backends.cuda.is_flash_attention_available()
    return bool(own or find_spec("flash_attn"))
