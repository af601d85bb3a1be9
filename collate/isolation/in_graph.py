"""One sequence at a time on CPUs, as one operator that torch.compile takes into its graph without looking inside.

Inside is a loop whose length depends on the batch, which a graph cannot hold: it would be compiled for each batch.
Outside of graphs `collate.isolation.pieces` does the same without an operator's cost.

Shape letters as in collate.layout; H heads, K head width.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LIBRARY = "dataset_packing"


def attend_in_graph(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The context (T, H, K), scores scaled by 1/sqrt(K)."""
    context_THK, _ = _attend(q_THK, k_THK, v_THK, cu_seqlens)
    return context_THK


@torch.library.custom_op(f"{LIBRARY}::attend_one_by_one", mutates_args=())
def _attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """-> context (T, H, K); log_sums (H, T) of the scores, which the gradient needs."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    context_THK, log_sums_HT = _fake_attend(q_THK, k_THK, v_THK, cu_seqlens)
    for start, end in _bounds(cu_seqlens):
        result, log_sums = kernel(*(_heads(x_THK, start, end) for x_THK in (q_THK, k_THK, v_THK)))
        context_THK[start:end] = result[0].transpose(0, 1)
        log_sums_HT[:, start:end] = log_sums[0]
    return context_THK, log_sums_HT


@_attend.register_fake
def _fake_attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q_THK.shape
    wide = torch.float64 if q_THK.dtype == torch.float64 else torch.float32
    return v_THK.new_empty(v_THK.shape), q_THK.new_empty((heads, tokens), dtype=wide)


@torch.library.custom_op(f"{LIBRARY}::attend_one_by_one_backward", mutates_args=())
def _attend_backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    context_THK: Tensor,
    log_sums_HT: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    grads = _fake_attend_backward(grad_THK, q_THK, k_THK, v_THK, context_THK, log_sums_HT, cu_seqlens)
    for start, end in _bounds(cu_seqlens):
        parts = (_heads(x_THK, start, end) for x_THK in (grad_THK, q_THK, k_THK, v_THK, context_THK))
        results = kernel(*parts, log_sums_HT[None, :, start:end].contiguous(), 0.0, False)
        for place_THK, result in zip(grads, results, strict=True):
            place_THK[start:end] = result[0].transpose(0, 1)
    return grads


@_attend_backward.register_fake
def _fake_attend_backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    context_THK: Tensor,
    log_sums_HT: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), k_THK.new_empty(k_THK.shape), v_THK.new_empty(v_THK.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    *qkv, cu_seqlens = inputs
    ctx.save_for_backward(*qkv, *output, cu_seqlens)


def _gradient(ctx: Any, grad_THK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attend_backward(grad_THK, *ctx.saved_tensors), None)


_attend.register_autograd(_gradient, setup_context=_keep)


def _bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """Where each sequence begins and ends; empty ones are left out, which the kernels do not take."""
    return [(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]


def _heads(x_THK: Tensor, start: int, end: int) -> Tensor:
    """(1, H, n, K): one sequence."""
    return x_THK[start:end].transpose(0, 1)[None]
