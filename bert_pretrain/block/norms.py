"""NORMS: what normalizes a token's vector.

    layer   (x - mean) / √(variance + ε) · weight + bias
    rms     x / √(mean of x² + ε) · weight                      Gopher (2112.11446)

Both compute in float32 at least. Their names end as transformers' do, which keeps their weights out of weight decay.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collate.views import at_least_float32


class BlockLayerNorm(nn.LayerNorm):
    """nn.LayerNorm, which also takes a float32 sum where its weights are in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        weight_D, bias_D = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight_D, bias_D, self.eps)


class BlockRMSNorm(nn.RMSNorm):
    """nn.RMSNorm, whose sum of squares is in float32 at least: 16 bits overflow, or lose what is small."""

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        return F.rms_norm(wide, self.normalized_shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "layer": lambda width, eps: BlockLayerNorm(width, eps=eps),
    "rms": lambda width, eps: BlockRMSNorm(width, eps=eps),
}
"""Name -> a module for vectors of this width, with this ε."""


def norm_like(name: str, given: nn.Module, is_new: bool = False) -> nn.Module:
    """A norm of this name for the vectors of a given one.

    is_new: with weights of its own. Otherwise with the same parameters, as far as it has them.
    """
    old: nn.LayerNorm = given  # type: ignore[assignment]
    norm = NORMS[name](old.normalized_shape[0], float(old.eps or 0.0)).to(old.weight)
    if not is_new:
        for parameter, _ in norm.named_parameters():
            if getattr(old, parameter, None) is not None:
                setattr(norm, parameter, getattr(old, parameter))
    return norm
