"""Kernels that only GPUs have, on a CPU and in any type, as operators that torch.compile takes into a graph.

Their values and gradients are right, so a model that is compiled with them can be compared with one that is not.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

HEADS = "bert_pretrain.attention.heads"


@contextmanager
def varlen_in_graph() -> Iterator[None]:
    """torch's own varlen_attn, whose operator gets a kernel for CPUs; `auto` and `local` take it, too."""
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu")(attend)
    varlen._varlen_attn_backward.register_kernel("cpu")(attend_backward)
    seams = {
        f"{HEADS}.varlen.refuse_elsewhere": lambda query: None,
        f"{HEADS}.local.takes_varlen": lambda query, has_window: True,
        "bert_pretrain.attention.choice.choose_attention": lambda *_: ("varlen", "a stand-in"),
        "bert_pretrain.attention.parts.pattern.PatternAttention.is_one_graph": lambda self, layout: True,
    }
    with ExitStack() as stack:
        for name, stand_in in seams.items():
            stack.enter_context(patch(name, stand_in))
        yield


@contextmanager
def flex_in_graph() -> Iterator[None]:
    """torch's own flex_attention, as the mathematics that it stands for where no kernel is made of it."""
    from torch.nn.attention.flex_attention import flex_attention

    seams = {
        "torch.nn.attention.flex_attention._validate_device": lambda *_: None,  # it refuses gradients on CPUs
        "bert_pretrain.attention.parts.pattern.refuse_gradient": lambda *_: None,
        "bert_pretrain.attention.parts.blocks.compiled_flex_attention": lambda: flex_attention,
        "bert_pretrain.attention.parts.pattern.PatternAttention.is_one_graph": lambda self, layout: True,
    }
    with ExitStack() as stack:
        for name, stand_in in seams.items():
            stack.enter_context(patch(name, stand_in))
        yield


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Any = None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> context (T, H, K), log sums of exponents (H, T), the state of no generator."""
    context, log_sums = torch.zeros_like(query), query.new_zeros(query.shape[1], len(query), dtype=torch.float32)
    for own, _, qkv, weights, log_sum in sequences(query, key, value, cu_seq_q, cu_seq_k, window_size):
        context[own] = (weights @ qkv[2]).transpose(0, 1)
        log_sums[:, own] = log_sum
    return context, log_sums, torch.zeros(2, dtype=torch.uint64)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: Tensor,
    log_sums: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for own, keys, (q, k, v), weights, _ in sequences(query, key, value, cu_seq_q, cu_seq_k, window_size):
        of_context = grad[own].transpose(0, 1)
        of_weights = of_context @ v.mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(2, keepdim=True)) * q.shape[2] ** -0.5
        for place, part, found in zip(
            grads, (own, keys, keys), (of_scores @ k, of_scores.mT @ q, weights.mT @ of_context), strict=True
        ):
            place[part] = found.transpose(0, 1)
    return grads[0], grads[1], grads[2]


def sequences(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, window_size: Any
) -> Iterator[tuple[slice, slice, list[Tensor], Tensor, Tensor]]:
    """Of each sequence: its queries and keys among the tokens; q, k and v (H, n, K); weights and log sums."""
    left, right = window_size or (-1, -1)
    for (start, stop), (first, last) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        own, keys = slice(start, stop), slice(first, last)
        if start == stop or first == last:
            continue
        q, k, v = (x[part].transpose(0, 1) for x, part in ((query, own), (key, keys), (value, keys)))
        distance = torch.arange(last - first) - torch.arange(stop - start)[:, None] - (last - first) + (stop - start)
        hidden = ((distance < -left) & (left >= 0)) | ((distance > right) & (right >= 0))
        scores = (q @ k.mT * q.shape[2] ** -0.5).masked_fill(hidden, -torch.inf)
        yield own, keys, [q, k, v], scores.softmax(2), scores.logsumexp(2)
