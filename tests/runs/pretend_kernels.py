"""Stand-ins on the CPU for kernels that only GPUs have; they check what the kernels want of their inputs.

They count as one launch in either direction, whatever they do here.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from pretend_cuda import DeviceTensor, PretendCuda, on_device, on_host
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from collate.isolation.varlen import WIDEST_HEAD

NARROWEST_FLEX_HEAD = 16


@contextmanager
def pretend_kernels(gpu: PretendCuda) -> Iterator[None]:
    flex = lambda *args, **kwargs: flex_attention(gpu, *args, **kwargs)  # noqa: E731
    seams = {
        "collate.isolation.varlen.varlen_kernel": lambda: lambda *args, **kw: varlen_attn(gpu, *args, **kw),
        "collate.isolation.varlen.has_varlen_kernel": lambda: True,
        "collate.isolation.varlen.varlen_takes_window": lambda: True,
        "bert_pretrain.attention.parts.blocks.flex_attention": lambda: flex,
    }
    with ExitStack() as stack:
        for name, stand_in in seams.items():
            stack.enter_context(patch(name, stand_in))
        yield


class Kernel(torch.autograd.Function):
    """A function of ordinary tensors, as one kernel forwards and one backwards."""

    @staticmethod
    def forward(ctx, gpu, name, function, *inputs):
        gpu.launched(name)
        ctx.gpu, ctx.name = gpu, name
        with gpu.unseen(), torch.enable_grad():
            ctx.inputs = [on_host(x).requires_grad_() for x in inputs]
            ctx.output = function(*ctx.inputs)
            return on_device(ctx.output.detach())

    @staticmethod
    def backward(ctx, grad):
        ctx.gpu.launched(f"{ctx.name} backward")
        with ctx.gpu.unseen():
            grads = torch.autograd.grad(ctx.output, ctx.inputs, on_host(grad))
        return None, None, None, *map(on_device, grads)


def varlen_attn(
    gpu: PretendCuda,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] | list[int] = (-1, -1),
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn: (T, H, K) each, boundaries (N + 1,) int32; sequences may be empty."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check(isinstance(x, DeviceTensor), f"{name} is on the host")
        check(x.dtype in (torch.bfloat16, torch.float16), f"{name} is {x.dtype}")
        check(x.dim() == 3 and x.stride(-1) == 1, f"{name}: {tuple(x.shape)} with strides {x.stride()}")
        check(x.shape[-1] % 8 == 0 and x.shape[-1] <= WIDEST_HEAD, f"heads of {x.shape[-1]}")
        check(x.dtype == query.dtype, f"{name} is {x.dtype}, query {query.dtype}")
    for name, x in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        check(isinstance(x, DeviceTensor) and x.dtype == torch.int32 and x.is_contiguous(), f"{name}: {x.dtype}")
    check(isinstance(max_q, int) and isinstance(max_k, int), "the longest sequence is no int")
    of_queries, of_keys = (on_host(x).tolist() for x in (cu_seq_q, cu_seq_k))
    check(len(of_queries) == len(of_keys), "boundaries of queries and keys differ in number")
    for bounds, x, longest in ((of_queries, query, max_q), (of_keys, key, max_k)):
        lengths = [b - a for a, b in pairwise(bounds)]
        check(bounds[0] == 0 and bounds[-1] == len(x), f"boundaries {bounds} of {len(x)} tokens")
        check(min(lengths) >= 0 and max(lengths) <= longest, f"lengths {lengths}, at most {longest}")
    left, right = window_size

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [query[:0] + key.sum() * 0 + value.sum() * 0]
        for i in range(len(of_queries) - 1):
            q, k, v = (
                x[bounds[i] : bounds[i + 1]].transpose(0, 1)
                for x, bounds in ((query, of_queries), (key, of_keys), (value, of_keys))
            )
            if not (q.shape[1] and k.shape[1]):
                parts.append(torch.zeros_like(q).transpose(0, 1))
                continue
            mask = None
            if (left, right) != (-1, -1):
                distance = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
                mask = (left < 0) | (distance >= -left)
                mask = mask & ((right < 0) | (distance <= right))
            parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
        return torch.cat(parts)

    return Kernel.apply(gpu, "varlen", attend, query, key, value)


BLOCK = 128


def flex_attention(
    gpu: PretendCuda,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
) -> Tensor:
    """torch.nn.attention.flex_attention.flex_attention: (B, H, Q, K) each."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check(isinstance(x, DeviceTensor), f"{name} is on the host")
        check(x.dim() == 4 and x.dtype == query.dtype, f"{name}: {tuple(x.shape)} {x.dtype}, query {query.dtype}")
        check(x.dtype != torch.float64, f"{name} is float64")
        check(x.shape[-1] >= NARROWEST_FLEX_HEAD, f"heads of {x.shape[-1]}")
    check(score_mod is None and block_mask is not None, "no stand-in for score_mod, or without a mask")
    seen: Any = getattr(block_mask, "seen", None)
    if not seen:
        with gpu.unseen():
            seen = [rows_seen(block_mask, query, key, start) for start in range(0, query.shape[2], BLOCK)]
        setattr(block_mask, "seen", seen)  # noqa: B010

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        for start, (columns, mask) in zip(range(0, query.shape[2], BLOCK), seen, strict=True):
            rows = query[:, :, start : start + BLOCK]
            found = scaled_dot_product_attention(
                rows, key[:, :, columns], value[:, :, columns], attn_mask=mask, scale=scale
            )
            parts.append(torch.where(mask.any(-1, keepdim=True), found, 0))  # who sees nothing gets 0
        return torch.cat(parts, 2)

    return Kernel.apply(gpu, "flex", attend, query, key, value)


def rows_seen(block_mask: Any, query: Tensor, key: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """For the queries from `start` on: the keys that any sees, and the mask (B, H or 1, queries, those keys)."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    stop = min(start + BLOCK, num_queries)
    batch, heads = query.shape[:2]  # a mask for all heads alike is asked for each, too
    check(block_mask.shape[2:] == (num_queries, num_keys), f"a mask of {block_mask.shape}")
    grid = (
        torch.arange(batch)[:, None, None, None],
        torch.arange(heads)[:, None, None],
        torch.arange(start, stop)[:, None],
        torch.arange(num_keys),
    )
    with_device = [on_device(index) for index in grid]
    mask = on_host(block_mask.mask_mod(*with_device)).expand(batch, heads, stop - start, num_keys)
    mask = by_blocks(block_mask, mask, start, stop, num_keys)
    columns = mask.flatten(0, 2).any(0).nonzero().squeeze(1)
    if not len(columns):
        columns = torch.zeros(1, dtype=torch.int64)
    return columns, mask[..., columns]


def by_blocks(block_mask: BlockMask, mask: Tensor, start: int, stop: int, num_keys: int) -> Tensor:
    """The mask as the kernel reads it: mask_mod in partial blocks, everything in full ones, nothing elsewhere."""
    of_queries, of_keys = block_mask.BLOCK_SIZE
    seen = torch.zeros(mask.shape, dtype=torch.bool)
    tables: list[tuple[Any, Any, bool]] = [(block_mask.kv_num_blocks, block_mask.kv_indices, False)]
    if block_mask.full_kv_num_blocks is not None:
        tables.append((block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True))
    for counts, indices, is_full in tables:
        check(isinstance(counts, DeviceTensor) and counts.dtype == torch.int32, f"a table of {counts.dtype}")
        counts, indices = (on_host(x).expand(*mask.shape[:2], *x.shape[2:]) for x in (counts, indices))
        for b in range(mask.shape[0]):
            for h in range(mask.shape[1]):
                for block in range(start // of_queries, -(-stop // of_queries)):
                    rows = slice(max(block * of_queries - start, 0), min((block + 1) * of_queries, stop) - start)
                    for at in indices[b, h, block, : int(counts[b, h, block])].tolist():
                        keys = slice(at * of_keys, min((at + 1) * of_keys, num_keys))
                        seen[b, h, rows, keys] = True if is_full else mask[b, h, rows, keys]
    return seen


def check(holds: bool, otherwise: str) -> None:
    """Raise what a kernel would refuse, or answer wrongly."""
    if not holds:
        raise AssertionError(otherwise)
