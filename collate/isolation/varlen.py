"""Full attention within each sequence on CUDA in 16 bits, by FlashAttention's kernels for any lengths."""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from collate.layout import PackLayout

WIDEST_HEAD, AMPERE = 256, (8, 0)


def attend_varlen(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    layout: PackLayout,
    key_layout: PackLayout | None = None,
    window: int | None = None,
) -> Tensor:
    """The context (T, H, K), scores scaled by 1/sqrt(K); each sequence of the layout by itself.

    key_layout: of the keys, if they are not the queries: sequence by sequence. Who finds no key gets 0.
    window: a token sees those at most so many tokens away. Keys end where queries end: the last stand side by side.
    """
    keys = key_layout or layout
    # an upper bound of the lengths is enough, and needs no wait for the device
    longest, longest_key = layout.sequence_ids_BL.shape[1], keys.sequence_ids_BL.shape[1]
    options = {} if window is None else {"window_size": (window, window)}
    return attend_bounds(q_THK, k_THK, v_THK, layout.cu_seqlens, keys.cu_seqlens, longest, longest_key, **options)


def attend_bounds(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_key: int,
    **options: Any,
) -> Tensor:
    """The same, given where each sequence of queries and of keys begins, (N + 1,) int32 each, and their longest."""
    inputs = (x.contiguous() for x in (q_THK, k_THK, v_THK))
    return varlen_kernel()(*inputs, bounds, key_bounds, longest, longest_key, **options)


def takes_varlen(query: Tensor, has_window: bool = False) -> bool:
    """Whether the kernel runs here, for these queries (…, K)."""
    return query.is_cuda and _takes_varlen(query.device, query.dtype, query.shape[-1], has_window)


@torch.compiler.assume_constant_result
def _takes_varlen(device: torch.device, dtype: torch.dtype, head_width: int, has_window: bool) -> bool:
    """A compiled graph takes it as a constant: it cannot ask for a device's capability."""
    obstacle = varlen_obstacle(dtype, head_width, torch.cuda.get_device_capability(device))
    return obstacle is None and (not has_window or varlen_takes_window())


def varlen_kernel() -> Callable[..., Any]:
    """(query, key, value, cu_seqlens of queries, of keys, longest query, longest key) -> context, both directions.

    Without a cache of its own, which torch.compile would warn of; Python keeps modules.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        from flash_attn import flash_attn_varlen_func
    else:
        return varlen_attn  # its backward pass asks torch.are_deterministic_algorithms_enabled() itself

    @wraps(flash_attn_varlen_func)
    def attend(*inputs: Any, **options: Any) -> Tensor:
        return flash_attn_varlen_func(*inputs, deterministic=torch.are_deterministic_algorithms_enabled(), **options)

    return attend


@cache
def varlen_takes_window() -> bool:
    """Torch's kernel learned it after 2.10."""
    return "window_size" in inspect.signature(varlen_kernel()).parameters


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
