"""Which exact attention is the fastest here: `auto` -> a name in ATTENTION, and the reason, for the log.

    CUDA, bfloat16 or float16        varlen   FlashAttention's kernels: only sequences' own n^2, memory N
    CUDA, float32                    flex     tiles that hold no pair of tokens of one sequence are skipped
    CPU                              sdpa     one sequence at a time, measured: see collate.isolation.exact_attention
    what these cannot do, elsewhere  sdpa     sequences of like length side by side

The choice follows from the device, the type, the head width and dropout alone, never from timings: a resumed run
chooses again, and must choose the same.
"""

from importlib.util import find_spec

import torch

from collate.isolation.varlen import varlen_obstacle

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
