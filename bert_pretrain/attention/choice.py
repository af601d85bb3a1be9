"""Which exact attention is the fast one here? `auto` -> a name in ATTENTION, and the reason, for the log.

    CUDA, bfloat16 or float16        varlen   FlashAttention's kernels: only sequences' own n^2, memory N
    CUDA, float32                    flex     tiles that hold no pair of tokens of one sequence are skipped
    CPU                              sdpa     one sequence at a time, measured: see bert_pretrain.attention.sdpa
    what these cannot do, elsewhere  sdpa     sequences of like length side by side

The choice follows from the device, the type, the head width and dropout alone, never from timings: a run that is
resumed chooses again, and must choose the same.
"""

from importlib.util import find_spec

import torch

WIDEST_FLASH_HEAD, NARROWEST_FLEX_HEAD = 256, 16
AMPERE, VOLTA = (8, 0), (7, 0)


def choose_attention(
    device: torch.device, dtype: torch.dtype, head_width: int, dropout: float = 0.0
) -> tuple[str, str]:
    """The name of an exact attention head, and why it.

    dtype: that of queries, keys and values: under mixed precision the 16-bit one. dropout: of attention weights.
    """
    if device.type == "cpu":
        return "sdpa", "on CPUs one sequence at a time is faster than a mask"
    if device.type != "cuda":
        return "sdpa", f"{device.type} has neither varlen nor flex"
    if dropout:
        return "sdpa", f"varlen and flex cannot drop attention weights, but attention_probs_dropout_prob={dropout}"
    capability = torch.cuda.get_device_capability(device)
    number = ".".join(map(str, capability))
    obstacle = _varlen_obstacle(dtype, head_width, capability)
    if obstacle is None:
        return "varlen", f"FlashAttention's kernels, {dtype}, compute capability {number}"
    if head_width >= NARROWEST_FLEX_HEAD and capability >= VOLTA and find_spec("triton"):
        return "flex", f"varlen {obstacle}"
    return "sdpa", f"varlen {obstacle}; flex wants Triton, heads of {NARROWEST_FLEX_HEAD} or wider and Volta or newer"


def _varlen_obstacle(dtype: torch.dtype, head_width: int, capability: tuple[int, int]) -> str | None:
    """Why varlen cannot run; None if it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"wants bfloat16 or float16, not {dtype}"
    if capability < AMPERE:
        return f"wants an Ampere GPU or newer, compute capability 8.0, not {capability[0]}.{capability[1]}"
    if head_width % 8 or head_width > WIDEST_FLASH_HEAD:
        return f"wants a head width that is a multiple of 8, at most {WIDEST_FLASH_HEAD}, not {head_width}"
    if not has_varlen_kernel():
        return "is neither in this torch (2.10 or newer has it) nor is flash-attn installed"
    return None


def has_varlen_kernel() -> bool:
    """Whether torch's own varlen_attn, with the kernel behind it, or flash-attn is there."""
    own = find_spec("torch.nn.attention.varlen") and torch.backends.cuda.is_flash_attention_available()
    return bool(own or find_spec("flash_attn"))
