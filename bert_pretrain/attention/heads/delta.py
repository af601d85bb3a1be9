"""`delta`: a fast memory that each token corrects by the delta rule; one pass reads forwards, one backwards.

    S_0 = 0;   S_t = S_(t-1) + beta_t (v_t - S_(t-1) k_t) k_t^T;   o_t = S_t q_t
    context_t = (o_t read from the sequence's start + o_t read from its end) / 2
    beta_t = sigmoid(w . k_t + b) in 0 .. 1, of the layer's keys; w (K,), b: parameters of each head

q and k stand for features phi(q), phi(k). By default x / |x|: asking for a key just stored with beta = 1 gives its
value. Or elu(x) + 1 divided by its sum, as in the source. No 1/sqrt(K): the features have length 1 already.

Cost: N (C K + K^2) over the batch's N tokens, in chunks of C tokens; memory N (C + K + K^2 / C). Source: Schlag et al.,
Linear Transformers Are Secretly Fast Weight Programmers (2102.11174), section 4; chunks as in Yang et al.,
Parallelizing Linear Transformers with the Delta Rule (2406.06484), section 3.2:

    A = tril(diag(beta) K K^T, -1),  [U W] = (I + A)^-1 diag(beta) [V K]       within a chunk, all chunks at once
    S' = (I - K^T W) S + K^T U                                                 from chunk to chunk
    O  = Q S + tril(Q K^T) (U - W S)                                           all chunks at once

On CUDA, flash-linear-attention computes where it is installed.

Isolation: the memory is empty at each sequence's start, and for the way back at its end; chunks are cut from there. The
loop runs over the chunk numbers within a sequence, all sequences side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretrain.attention.head import AttentionHead, without_autocast
from bert_pretrain.attention.heads.linear import elu_plus_one
from bert_pretrain.attention.options import HeadOptions, choice, whole
from collate.chunks import Chunks
from collate.layout import PackLayout
from collate.length_groups import Gather
from collate.views import at_least_float32

WIDEST_KERNEL_HEAD = 256


def unit_norm(x: Tensor) -> Tensor:
    """Features of length 1: 3, 4 -> 0.6, 0.8."""
    return F.normalize(x, dim=-1)


def unit_sum(x: Tensor) -> Tensor:
    """Features of the linear head, their sum 1."""
    return F.normalize(elu_plus_one(x), p=1, dim=-1)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"norm": unit_norm, "elu": unit_sum}


@dataclass(frozen=True)
class DeltaOptions(HeadOptions):
    """What `use_attention(model, "delta", …)` takes."""

    chunk: int = whole(64, 1, "give the number of tokens in a chunk")
    """Tokens of a chunk. It changes the time only: larger chunks do more work in fewer steps."""
    features: str = choice("norm", FEATURES)
    """phi. "norm": x / |x|; "elu": elu(x) + 1 divided by its sum, as in the source: reads mix several values."""


class DeltaAttention(AttentionHead):
    """The delta rule in both directions; `strength_weight_HK` and `strength_bias_H` make beta."""

    Options = DeltaOptions

    def __init__(self, num_heads: int, head_width: int, max_sequence_length: int, layer_index: int = 0, **options: Any):
        super().__init__(num_heads, head_width, max_sequence_length, layer_index, **options)
        self.strength_weight_HK = nn.Parameter(torch.empty(num_heads, head_width))
        self.strength_bias_H = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """beta around 1/2, different from token to token."""
        nn.init.normal_(self.strength_weight_HK, std=self.head_width**-0.5)
        nn.init.zeros_(self.strength_bias_H)

    def is_one_graph(self, layout: PackLayout) -> bool:
        return False

    def prepare(self, layout: PackLayout) -> None:
        chunks_by_number(layout, self.options.chunk)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        with without_autocast(q_THK):
            query, key, value = (at_least_float32(x) for x in (q_THK, k_THK, v_THK))
            weight_HK, bias_H = (x.to(key.dtype) for x in (self.strength_weight_HK, self.strength_bias_H))
            beta_TH1 = ((key * weight_HK).sum(2) + bias_H).sigmoid()[..., None]
            features = FEATURES[self.options.features]
            there_and_back = Reversal.of(layout)
            inputs = (features(query), features(key), value, beta_TH1)
            query, key, value, beta = map(there_and_back.both, inputs)
            if takes_fla(q_THK):
                query, key, value, beta = (x.to(q_THK.dtype) for x in (query, key, value, beta))
                context = by_fla(query, key, value, beta, layout)
            else:
                context = delta_rule(query, key, value, beta, *chunks_by_number(layout, self.options.chunk))
            return there_and_back.mean(context).to(q_THK.dtype)


@dataclass(frozen=True, eq=False)
class Reversal:
    """Both directions as twice the heads: sequences read from their start, and from their end.

    lengths 3, 2: tokens 0 1 2 3 4 beside 2 1 0 4 3
    """

    mirrored: Tensor

    @classmethod
    def of(cls, layout: PackLayout) -> "Reversal":
        return layout.derived("reversal", lambda: cls(mirrored_tokens(layout)))

    def mirror(self, x_T: Tensor) -> Tensor:
        return Gather.apply(x_T, self.mirrored, self.mirrored)  # a permutation that is its own inverse

    def both(self, x_TH: Tensor) -> Tensor:
        """(T, H, …) -> (T, 2 H, …)"""
        return torch.cat([x_TH, self.mirror(x_TH)], dim=1)

    def mean(self, x_TH: Tensor) -> Tensor:
        """(T, 2 H, …) -> (T, H, …)"""
        forwards, backwards = x_TH.chunk(2, dim=1)
        return (forwards + self.mirror(backwards)) / 2


def mirrored_tokens(layout: PackLayout) -> Tensor:
    """(T,) int64: the token that stands as far from its sequence's end as this one from its start."""
    from_end_T = layout.lengths[layout.sequence_of_token] - 1 - layout.positions_T
    tokens_T = torch.arange(layout.num_tokens, device=from_end_T.device)
    return tokens_T - layout.positions_T + from_end_T


def chunks_by_number(layout: PackLayout, size: int) -> tuple[Chunks, list[int]]:
    """The chunks in the order of their number, those of long sequences first, and how many have each number.

    sequences of 1, 3, 2 chunks: [0] [1 2 3] [4 5]  ->  [1 4 0] [2 5] [3], and 3, 2, 1

    So a state goes from chunk to chunk of all sequences at once: those that continue are always the first ones. Only
    `gather`, `scatter` and `valid` of the result speak of the new order.
    """

    def make(on_host: PackLayout) -> tuple[Tensor, list[int]]:
        chunks = on_host.chunks(size)
        rank = chunks.chunks_per_sequence.argsort(descending=True, stable=True).argsort()
        return (chunks.number * len(rank) + rank[chunks.sequence]).argsort(), torch.bincount(chunks.number).tolist()

    order, active = layout.table(("chunks by number", size), make)

    def put_in_order() -> Chunks:
        chunks = layout.chunks(size)
        chunk_of_token, place = chunks.slot_of_token // size, chunks.slot_of_token % size
        return replace(
            chunks,
            index=chunks.index[order],
            valid=chunks.valid[order],
            slot_of_token=order.argsort()[chunk_of_token] * size + place,
        )

    return layout.derived(("chunks by number", size), put_in_order), active


def delta_rule(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, beta_TH1: Tensor, chunks: Chunks, active: list[int]
) -> Tensor:
    """The delta rule along every sequence from its start: (T, H, K) each -> o (T, H, K). See `chunks_by_number`."""
    query, key, value, beta = (chunks.gather(x).transpose(1, 2) for x in (q_THK, k_THK, v_THK, beta_TH1))
    beta = beta.masked_fill(~chunks.valid[:, None, :, None], 0)  # padding writes nothing
    back = key.transpose(2, 3)
    added_and_removed = torch.linalg.solve_triangular(  # reads what is below the diagonal only
        (beta * key) @ back, beta * torch.cat([value, key], dim=3), upper=False, unitriangular=True
    )
    added, removed = added_and_removed.chunk(2, dim=3)
    before = states(-(back @ removed), back @ added, active)
    context = query @ before + (query @ back).tril() @ (added - removed @ before)
    return chunks.scatter(context.transpose(1, 2))


def states(change: Tensor, new: Tensor, active: list[int]) -> Tensor:
    """(NC, H, K, K) each, step by step -> S before each chunk, where S' = S + change @ S + new.

    active: how many chunks each step has; they belong to as many sequences, the longest ones, which come first.
    """
    before = [torch.zeros_like(new[: active[0]])]
    steps = active[:-1]  # nothing reads what the last chunks leave
    change, new = change[: sum(steps)], new[: sum(steps)]
    for step_change, step_new, continued in zip(change.split(steps), new.split(steps), active[1:], strict=True):
        after = before[-1] + step_change @ before[-1] + step_new
        before.append(after[:continued])
    return torch.cat(before)


# flash-linear-attention has the same rule as kernels for CUDA.


def takes_fla(q_THK: Tensor) -> bool:
    """Whether fla computes: where it is installed, on CUDA in 16 bits. It cannot be a part of a compiled graph."""
    in_16_bits = q_THK.is_cuda and q_THK.dtype in (torch.bfloat16, torch.float16)
    return in_16_bits and q_THK.shape[2] <= WIDEST_KERNEL_HEAD and not torch.compiler.is_compiling() and has_fla()


@cache
def has_fla() -> bool:
    return find_spec("fla") is not None and find_spec("triton") is not None


@cache
def fla_kernel() -> Callable[..., Any]:
    from fla.ops.delta_rule import chunk_delta_rule

    return chunk_delta_rule


def by_fla(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, beta_TH1: Tensor, layout: PackLayout) -> Tensor:
    """`delta_rule` by fla, which cuts chunks itself. It would wait for the boundaries, so it gets the host's, too."""
    boundaries = boundaries_of(layout)  # the same tensors in each layer: fla keeps what it made of the last ones
    of_host = None if layout.host is None else boundaries_of(layout.host)
    inputs = (x[None] for x in (q_THK, k_THK, v_THK, beta_TH1.squeeze(2)))
    context, _ = fla_kernel()(*inputs, scale=1.0, cu_seqlens=boundaries, cu_seqlens_cpu=of_host)
    return context[0]


def boundaries_of(layout: PackLayout) -> Tensor:
    """cu_seqlens in int64, as fla wants them."""
    return layout.derived("cu_seqlens of fla", lambda: layout.cu_seqlens.long())
