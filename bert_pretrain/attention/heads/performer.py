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

from bert_pretrain.attention.head import without_autocast
from bert_pretrain.attention.heads.linear import kernel_attention
from bert_pretrain.attention.options import HeadOptions, choice, number, seed_option, whole
from bert_pretrain.attention.parts.pieces import SequencePieces
from bert_pretrain.attention.parts.whole_sequences import WholeSequenceHead
from collate.views import at_least_float32


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
    widens = False
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
        query_PHWF, key_PHWF = self.features(q_PHWK, k_PHWK, pieces)
        return kernel_attention(query_PHWF, key_PHWF, at_least_float32(v_PHWK), pieces)

    def features(self, q_PHWK: Tensor, k_PHWK: Tensor, pieces: SequencePieces) -> tuple[Tensor, ...]:
        """phi(q), phi(k) (P, H, W, F), without the factor 1/sqrt(m), which cancels; 0 for keys of padding."""
        dtype = torch.promote_types(q_PHWK.dtype, torch.float32)
        epsilon = pieces.kept(("epsilon", self.options.epsilon, dtype), lambda: self._epsilon(pieces, dtype))
        by_exponent = self.options.stabiliser == "exponent"
        scale, projection_FK = self.head_width**-0.25, self.projection_FK.to(dtype)
        return Features.apply(q_PHWK, k_PHWK, projection_FK, scale, by_exponent, pieces, epsilon)

    def _epsilon(self, pieces: SequencePieces, dtype: torch.dtype) -> Tensor:
        """(2, P, 1, W, 1): epsilon, and 0 for keys of padding."""
        epsilon = torch.full((2, *pieces.shape), self.options.epsilon, dtype=dtype, device=pieces.length.device)
        if pieces.is_padding is not None:
            epsilon[1].masked_fill_(pieces.is_padding[:, 0, 0], 0)
        return epsilon[:, :, None, :, None]


class Features(torch.autograd.Function):
    """q, k (P, H, W, K), w (F, K) -> exp(w_f . y - |y|^2 / 2 - c) + epsilon of both (P, H, W, F), where y = scale x.

    c is the maximum of a query's features, and of the keys of a whole sequence. Padding slots repeat one of the
    sequence's own tokens, so that they cannot raise its maximum.
    """

    @staticmethod
    def forward(ctx, q, k, projection_FK, scale, by_exponent, pieces, epsilon):
        x = at_least_float32(torch.stack([q, k]))
        rows = x.flatten(0, 2)
        projection = projection_FK.expand(len(rows), -1, -1)
        exponent = torch.baddbmm(x.new_empty(()), rows, projection.transpose(1, 2), beta=0, alpha=scale)
        exponent = exponent.unflatten(0, x.shape[:3])
        largest = exponent.amax(4, keepdim=True)
        length = torch.linalg.vector_norm(x, dim=4, keepdim=True)
        exponent.addcmul_(length, length, value=-(scale**2) / 2)
        if by_exponent:
            largest = exponent.amax(4, keepdim=True)
        of_keys = pieces.largest(largest[1].amax(2, keepdim=True))
        if pieces.is_padding is not None:
            of_keys = of_keys.expand(largest[1].shape).masked_fill(pieces.is_padding.transpose(2, 3), torch.inf)
        largest[1] = of_keys
        features = exponent.sub_(largest).exp_()
        ctx.save_for_backward(x, projection_FK, features)
        ctx.scale = scale
        return tuple((features + epsilon).unbind(0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        inputs, projection_FK, both = ctx.saved_tensors
        found = []
        with without_autocast(grads[0]):
            for grad, x, features in zip(grads, inputs, both, strict=True):
                grad = (grad * features).flatten(0, 1)
                shrinking = grad.sum(2, keepdim=True) * x.flatten(0, 1)
                projection = projection_FK.expand(len(grad), -1, -1)
                grad = torch.baddbmm(shrinking, grad, projection, beta=-(ctx.scale**2), alpha=ctx.scale)
                found.append(grad.view_as(x))
        return *found, None, None, None, None, None


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
