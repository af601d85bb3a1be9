"""`entmax`: weights that are exactly 0 for most tokens; each head learns how many.

    weights_i = alpha_h-entmax_j(q_i . k_j / sqrt(K)) = [(alpha_h - 1) s_ij - tau_i]_+ ^ (1 / (alpha_h - 1))
    tau_i so that they add up to 1;    alpha_h = 1.01 + 0.99 sigmoid(a_h), a_h a parameter of each head

alpha = 1 is the softmax, which gives every token a weight; 2 is the sparsemax, the sparsest. A head between them learns
whether to look at few tokens or at many. The source has 1 + sigmoid(a), down to the softmax itself. There the gradient
of alpha is 0 / 0 as the package computes it, so alpha stops at 1.01 here.

The package `entmax` computes the weights, by bisection, and their gradients: pip install 'dataset-packing[entmax]'.

Cost: as `sdpa`, sum of n^2 K over the sequences, plus some 25 passes over the scores; memory: the scores. On an
accelerator all of a pack: L^2. With `top_k` the passes are over k scores of each query.

Source: Correia, Niculae, Martins, Adaptively Sparse Transformers (1909.00015), section 3.

Isolation: no two sequences meet in a product, or a mask keeps them apart: see `parts.all_scores`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bert_pretrain.attention.options import HeadOptions, number, whole
from bert_pretrain.attention.parts.all_scores import AllScoresHead

LEAST_ALPHA, MOST_ALPHA = 1.01, 2.0
HALVINGS = {8: 50, 4: 24}
"""How often the interval of tau is halved, by bytes of a number: until its digits are used up."""


@dataclass(frozen=True)
class EntmaxOptions(HeadOptions):
    """What `use_attention(model, "entmax", …)` takes."""

    alpha: float = number(1.5, "between 1.01 and 2", "near 1 all tokens have weight, near 2 few have")
    """The alpha that every head starts with. Near 1 it begins like the softmax of a stock checkpoint."""
    top_k: int | None = whole(None, 1, "give the number of keys that a query may weigh, or None for all")
    """Keys of each query, those of its largest scores, that get a weight at all. The same as None, and faster, where no
    more than that many have weight."""


class EntmaxAttention(AllScoresHead):
    """alpha-entmax over the tokens of the same sequence; `alpha_bias_H` is a."""

    Options = EntmaxOptions

    def __init__(self, num_heads: int, head_width: int, max_sequence_length: int, layer_index: int = 0, **options: Any):
        super().__init__(num_heads, head_width, max_sequence_length, layer_index, **options)
        load_package()
        self.alpha_bias_H = nn.Parameter(torch.empty(num_heads))  # what is called bias has no weight decay
        self.reset_parameters()

    def reset_parameters(self) -> None:
        share = (self.options.alpha - LEAST_ALPHA) / (MOST_ALPHA - LEAST_ALPHA)
        nn.init.constant_(self.alpha_bias_H, math.log(share / (1 - share)))

    @property
    def alpha_H(self) -> Tensor:
        """(H,) the alpha of each head, 1.01 to 2."""
        return LEAST_ALPHA + (MOST_ALPHA - LEAST_ALPHA) * self.alpha_bias_H.sigmoid()

    def weigh(self, scores_GHCM: Tensor, mask: Tensor | None) -> Tensor:
        scores = scores_GHCM if mask is None else scores_GHCM.masked_fill(~mask, -torch.inf)
        kept, num_keys = self.options.top_k, scores.shape[3]
        if kept is None or kept >= num_keys:
            return self._entmax(scores)
        # no choice to hand on to a pass that is computed again: those near the limit have the least weights
        index = scores.detach().topk(kept).indices
        return torch.zeros_like(scores).scatter(3, index, self._entmax(scores.gather(3, index)))

    def _entmax(self, scores_GHCM: Tensor) -> Tensor:
        if not _PACKAGE:  # a head that was unpickled
            load_package()
        bias_H11 = self.alpha_bias_H.to(scores_GHCM.dtype)[:, None, None]
        alpha_H11 = LEAST_ALPHA + (MOST_ALPHA - LEAST_ALPHA) * bias_H11.sigmoid()
        alpha_GHC1 = alpha_H11.expand(*scores_GHCM.shape[:3], 1)
        return AlphaEntmax.apply(scores_GHCM, alpha_GHC1, HALVINGS[scores_GHCM.itemsize])


class AlphaEntmax(torch.autograd.Function):
    """scores (…, M), alpha (…, 1), halvings -> weights (…, M): what the package's entmax_bisect computes.

    The package's own class has class methods, which torch.compile (2.13) cannot trace in one graph.
    """

    @staticmethod
    def forward(ctx, scores, alpha, halvings):
        return _PACKAGE["forward"](_PACKAGE["class"], ctx, scores, alpha, -1, halvings)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *_PACKAGE["backward"](_PACKAGE["class"], ctx, grad)[:2], None


_PACKAGE: dict[str, Any] = {}


def load_package() -> None:
    """Find the package's functions. Raises ImportError without the package."""
    try:
        from entmax.root_finding import EntmaxBisectFunction as Bisect
    except ImportError as error:
        raise ImportError(
            f"the attention head 'entmax' needs the package entmax ({error}): pip install 'dataset-packing[entmax]'"
        ) from None
    functions = {name: getattr(Bisect, name).__func__ for name in ("forward", "backward")}
    _PACKAGE.update(functions, **{"class": Bisect})
