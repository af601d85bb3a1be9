"""`linear`: a product of features replaces softmax's kernel, so one sum over a sequence serves all of its queries.

    context_i = phi(q_i)^T (sum_j phi(k_j) v_j^T) / phi(q_i)^T (sum_j phi(k_j)),    phi(x) = elu(x) + 1

    j over the tokens of i's own sequence, to both sides. No 1/sqrt(K): phi is not a softmax, and the source has none.

Cost: N K^2 over the batch's N tokens; memory N K. Source: Katharopoulos et al., Transformers are RNNs (2006.16236),
section 3.2, the non-causal form.

Isolation: both sums are taken per sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretrain.attention.parts.pieces import SequencePieces
from bert_pretrain.attention.parts.whole_sequences import WholeSequenceHead

WEIGHT_COLUMNS = 4
"""One would do; the fast kernels of GPUs want rows of a multiple of 16 bytes."""


class LinearAttention(WholeSequenceHead):
    """Linear attention with the features elu(x) + 1; no parameters, no options."""

    precise = True

    def mix(
        self, q_PHWK: Tensor, k_PHWK: Tensor, v_PHWK: Tensor, pieces: SequencePieces, dropout: float = 0.0
    ) -> Tensor:
        padding = None if pieces.is_padding is None else pieces.is_padding.transpose(2, 3)
        return kernel_attention(elu_plus_one(q_PHWK), elu_plus_one(k_PHWK, padding), v_PHWK, pieces)


def elu_plus_one(x: Tensor, padding: Tensor | None = None) -> Tensor:
    """x + 1 above 0, exp(x) below: written out, as exp(x) - 1 + 1 is 0 from -17 on in float32; 0 in padding."""
    return EluPlusOne.apply(x, padding)


class EluPlusOne(torch.autograd.Function):
    """Its slope is 1 above 0, exp(x) below, 0 in padding: the smaller one of 1 and the result."""

    @staticmethod
    def forward(ctx, x, padding):
        result = x.clamp(max=0).exp_().add_(x.relu())
        if padding is not None:
            result.masked_fill_(padding, 0)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (result,) = ctx.saved_tensors
        return grad * result.clamp(max=1), None


def kernel_attention(query_PHWF: Tensor, key_PHWF: Tensor, v_PHWK: Tensor, pieces: SequencePieces) -> Tensor:
    """Attention with the weights query_i . key_j, divided by their sum over j: features (P, H, W, F) -> (P, H, W, K).

    The weights are at least 0. Where all weights of a query are 0, its context is 0. The keys of padding are 0.
    """
    value = F.pad(v_PHWK, (0, WEIGHT_COLUMNS), value=1.0)  # the sum of all weights is one more value
    context = query_PHWF @ pieces.total(value.transpose(2, 3) @ key_PHWF).transpose(2, 3)
    context_PHWK, weights = context.split([v_PHWK.shape[3], WEIGHT_COLUMNS], dim=3)
    return context_PHWK * (weights[..., :1] + torch.finfo(weights.dtype).tiny).reciprocal()
