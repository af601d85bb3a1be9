"""`performer`: softmax's kernel estimated by positive random features.

    exp(q . k / sqrt(K)) = E[phi(q) . phi(k)],    phi(x)_f = (exp(w_f . y - |y|^2 / 2 - c) + epsilon) / sqrt(m)
    y = x / K^(1/4);   w_1 ... w_m: random, orthogonal within blocks of K, of the lengths that Gaussian vectors have

    context_i = phi(q_i)^T (sum_j phi(k_j) v_j^T) / phi(q_i)^T (sum_j phi(k_j)),    j over i's own sequence

c is the largest w_f . y, of a query, or of all keys of a sequence. It keeps exp in range, and cancels in the quotient
except beside epsilon. The error falls as 1/sqrt(m) and grows with exp(|q|^2) and exp(|k|^2): with queries and keys of
variance 1 and K = 64, 256 features are no nearer to the softmax than the plain mean of all values. The gradient treats
c as a constant, like the authors' code: with epsilon above 0 it lacks the small part that c has in the quotient.

Cost: N m K over the batch's N tokens; memory N m. Source: Choromanski et al., Rethinking attention with Performers
(2009.14794), section 2.4 (positive and orthogonal features); c and epsilon as in the authors' code.

Isolation: sums and c are taken per sequence. The features are drawn once, when the layer is built, and saved with it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_pretrain.attention.heads.linear import kernel_attention
from bert_pretrain.attention.options import HeadOptions, choice, number, seed_option, whole
from bert_pretrain.attention.parts.pieces import SequencePieces
from bert_pretrain.attention.parts.whole_sequences import WholeSequenceHead


@dataclass(frozen=True)
class PerformerOptions(HeadOptions):
    """What `use_attention(model, "performer", …)` takes."""

    features: int = whole(256, 1, "give the number of random features")
    """Random features, m. Four times as many halve the error and cost four times as much."""
    epsilon: float = number(1e-4, "from 0 to below 1", "keep it small beside the largest feature, which is 1")
    """Added to every feature: no weight is ever 0, but all are a little more alike."""
    stabiliser: str = choice("product", ("product", "exponent"))
    """What c is the largest of. "product": w . y, as in the authors' code; epsilon outweighs the features of long
    queries and keys, whose weights become equal. "exponent": w . y - |y|^2 / 2; epsilon stays small beside the largest
    feature, so peaked attention stays peaked, and is noisier."""
    seed: int = seed_option()
    """Draws the features, together with the layer's index; a loaded head keeps its own."""


class PerformerAttention(WholeSequenceHead):
    """FAVOR+; `projection_FK` holds the random vectors w, for all heads of the layer."""

    Options = PerformerOptions
    precise = True
    projection_FK: Tensor

    def __init__(self, num_heads: int, head_width: int, max_sequence_length: int, layer_index: int = 0, **options: Any):
        super().__init__(num_heads, head_width, max_sequence_length, layer_index, **options)
        self.register_at_least_float32("projection_FK", (self.options.features, head_width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the features again: the same ones."""
        seed = self.options.seed * 1_000_003 + self.layer_index
        self.projection_FK.copy_(orthogonal_features(self.options.features, self.head_width, seed))

    def mix(
        self, q_PHWK: Tensor, k_PHWK: Tensor, v_PHWK: Tensor, pieces: SequencePieces, dropout: float = 0.0
    ) -> Tensor:
        query_PHWF, key_PHWF = self.features(q_PHWK), pieces.hide_padding(self.features(k_PHWK, pieces))
        return kernel_attention(query_PHWF, key_PHWF, v_PHWK, pieces)

    def features(self, x_PHWK: Tensor, pieces: SequencePieces | None = None) -> Tensor:
        """phi(x) (P, H, W, F), with c the maximum of a token; with pieces, that of a sequence.

        Padding slots repeat one of the sequence's own tokens, so that they cannot raise its maximum.
        """
        y_PHWK = x_PHWK * self.head_width**-0.25
        projection_KF = self.projection_FK.T.to(y_PHWK.dtype)
        product_PHWF = y_PHWK @ projection_KF.expand(*y_PHWK.shape[:2], -1, -1)
        exponent_PHWF = product_PHWF - y_PHWK.square().sum(3, keepdim=True) / 2
        largest = (exponent_PHWF if self.options.stabiliser == "exponent" else product_PHWF).detach()
        c_PH11 = largest.amax(3, keepdim=True)
        if pieces is not None:
            c_PH11 = pieces.largest(c_PH11.amax(2, keepdim=True))
        features_PHWF = (exponent_PHWF - c_PH11).exp() + self.options.epsilon
        return features_PHWF * self.options.features**-0.5


def orthogonal_features(num_features: int, width: int, seed: int) -> Tensor:
    """(F, K) float64: rows orthogonal within each block of K, with the lengths of Gaussian vectors."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    blocks = [_random_rotation(gaussian(width, width)) for _ in range(0, num_features, width)]
    lengths_F1 = gaussian(num_features, width).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:num_features] * lengths_F1


def _random_rotation(gaussian_KK: Tensor) -> Tensor:
    """Orthogonal and uniformly distributed: of the many QR decompositions, the one with a positive diagonal in R."""
    q_KK, r_KK = torch.linalg.qr(gaussian_KK)
    return (q_KK * r_KK.diagonal().sign()).T
