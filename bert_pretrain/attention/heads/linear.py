"""`linear`: a product of features replaces softmax's kernel, so one sum over a sequence serves all of its queries.

    context_i = phi(q_i)^T (sum_j phi(k_j) v_j^T) / phi(q_i)^T (sum_j phi(k_j)),    phi(x) = elu(x) + 1

    j over the tokens of i's own sequence, to both sides. No 1/sqrt(K): phi is not a softmax, and the source has none.

Cost: N K^2 over the batch's N tokens; memory N K. Source: Katharopoulos et al., Transformers are RNNs (2006.16236),
section 3.2, the non-causal form.

Isolation: both sums are taken per sequence.
"""

import torch
from torch import Tensor

from bert_pretrain.attention.parts.whole_sequences import Real, WholeSequenceHead, zero_padding


class LinearAttention(WholeSequenceHead):
    """Linear attention with the features elu(x) + 1; no parameters, no options."""

    precise = True

    def mix(self, q_SHWK: Tensor, k_SHWK: Tensor, v_SHWK: Tensor, real_S11W: Real, dropout: float = 0.0) -> Tensor:
        return kernel_attention(elu_plus_one(q_SHWK), elu_plus_one(k_SHWK), v_SHWK, real_S11W)


def elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 above 0, exp(x) below: written out, as exp(x) - 1 + 1 is 0 from -17 on in float32."""
    return x.relu() + x.clamp(max=0).exp()


def kernel_attention(query_SHWF: Tensor, key_SHWF: Tensor, v_SHWK: Tensor, real_S11W: Real) -> Tensor:
    """Attention with the weights query_i . key_j, divided by their sum over j: features (S, H, W, F) -> (S, H, W, K).

    The weights are at least 0. Where all weights of a query are 0, its context is 0.
    """
    key_SHWF = zero_padding(key_SHWF, real_S11W)
    sums_SHKF = v_SHWK.transpose(2, 3) @ key_SHWF
    context_SHWK = query_SHWF @ sums_SHKF.transpose(2, 3)
    weight_SHW1 = query_SHWF @ key_SHWF.sum(2)[..., None]
    return context_SHWK / weight_SHW1.clamp_min(torch.finfo(weight_SHW1.dtype).tiny)
