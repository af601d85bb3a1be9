"""`sdpa`: full softmax attention within each sequence, by torch's kernels; the exact attention of CPUs.

    context_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j,    j over the tokens of i's own sequence

Two executions, and no two sequences ever meet in a product, so not even a NaN can pass from one to the other. A
block-diagonal mask would cost L^2 K for each row and multiply other sequences' values by 0.

one by one   On CPUs, without dropout: each sequence is a slice of the batch, handed to torch's CPU kernel as it lies.
             Nothing is gathered, padded or masked. Cost: sum of n^2 K over the sequences; memory N. Alone or packed, a
             sequence meets the same products of the same shapes, so not even rounding knows of other sequences.
grouped      Elsewhere: sequences of like length side by side (`collate.length_groups`), each group one call of
             scaled_dot_product_attention, n rounded up to a multiple of 16. Where a group is padded to its width,
             torch's CPU kernel makes a float of every query and key of it: n^2 per sequence, never L^2 per row.

Measured with `python benchmarks/exact_attention.py`. One by one parallelizes over the heads of one sequence
only, so with more threads than heads, groups take its place. The choice follows from the device, dropout, heads and
threads alone: neither timings nor pack mates have a say, and a resumed run repeats it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.head import AttentionHead
from collate.layout import PackLayout


class SdpaAttention(AttentionHead):
    """Softmax attention over the tokens of the same sequence; no parameters, no options."""

    is_full = True
    supports_dropout = True

    def attend(
        self, query_THK: Tensor, key_THK: Tensor, value_THK: Tensor, layout: PackLayout, dropout: float = 0.0
    ) -> Tensor:
        inputs = (query_THK, key_THK, value_THK)
        if query_THK.device.type == "cpu" and not dropout and torch.get_num_threads() <= self.num_heads:
            lengths = layout.derived("lengths as a list", layout.lengths.tolist)
            return OneByOne.apply(*(x.contiguous() if x.stride(-1) != 1 else x for x in inputs), lengths)
        return attend_grouped(*inputs, layout, dropout)


def attend_grouped(query_THK, key_THK, value_THK, layout: PackLayout, dropout: float = 0.0) -> Tensor:
    """(T, H, K) each -> the context (T, H, K), sequences of like length together."""
    groups = layout.length_groups
    contexts = []
    for query, key, value, mask in zip(
        *map(groups.gather, (query_THK, key_THK, value_THK)), groups.key_masks, strict=True
    ):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if mask is not None:
            mask = mask.expand(-1, -1, mask.shape[-1], -1)  # torch's fast CPU kernel wants a row per query
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        contexts.append(context.transpose(1, 2))
    return groups.scatter(contexts)


class OneByOne(torch.autograd.Function):
    """(T, H, K) x 3, lengths of the sequences -> (T, H, K)

    Written out, with the kernels that scaled_dot_product_attention itself calls on a CPU: through it, every sequence
    would cost a dozen nodes of the graph. What a kernel returns is copied to its place at once, while it is in the
    cache; concatenated at the end it would have gone to memory and back, and would be kept twice.
    """

    @staticmethod
    def forward(ctx, query, key, value, lengths):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        context, log_sums = torch.empty(value.shape, dtype=value.dtype), []
        for *inputs, place in zip(*(_sequences(x, lengths) for x in (query, key, value, context)), strict=True):
            result, log_sum = kernel(*inputs)
            place.copy_(result)
            log_sums.append(log_sum)
        ctx.lengths = lengths
        ctx.save_for_backward(query, key, value, context, *log_sums)
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        query, key, value, context, *log_sums = ctx.saved_tensors
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
        inputs = zip(*(_sequences(x, ctx.lengths) for x in (grad, query, key, value, context)), strict=True)
        places = zip(*(_sequences(x, ctx.lengths) for x in gradients), strict=True)
        for parts, log_sum, three in zip(inputs, log_sums, places, strict=True):
            for place, result in zip(three, kernel(*parts, log_sum, 0.0, False), strict=True):
                place.copy_(result)
        return *gradients, None


def _sequences(x_THK: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """(T, H, K) -> (1, H, n, K) of each sequence: views."""
    return x_THK.transpose(0, 1)[None].split(lengths, 2)
