"""Projections that a head owns: of the layer's input, started from the layer's own."""

import torch
from torch import Tensor, nn

OWN_NAMES = {
    "query": ("query", "q_lin", "q_proj"),
    "key": ("key", "k_lin", "k_proj"),
    "value": ("value", "v_lin", "v_proj"),
}
"""What the layers of transformers' encoders call them."""


class Projection(nn.Linear):
    """(…, D) -> (…, H, K)"""

    def __init__(self, hidden_size: int, num_heads: int, head_width: int):
        super().__init__(hidden_size, num_heads * head_width)
        self.num_heads = num_heads

    def reset_parameters(self) -> None:
        """Draw it so that it keeps the size of its input, for a head whose layer has none to start from."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).unflatten(-1, (self.num_heads, -1))

    @torch.no_grad()
    def start_from(self, layer: nn.Module, *kinds: str) -> None:
        """Copy the layer's projections of these kinds, query, key or value, one after the other.

        One that the layer lacks, or has in another form, as where heads share keys, is left as it is.
        """
        weights, biases = (x.unflatten(0, (len(kinds), -1)) for x in (self.weight, self.bias))
        for kind, weight, bias in zip(kinds, weights, biases, strict=True):
            source = next(
                (s for name in OWN_NAMES[kind] if isinstance(s := getattr(layer, name, None), nn.Linear)), None
            )
            if source is not None and source.weight.shape == weight.shape:
                weight.copy_(source.weight)
                bias.zero_() if source.bias is None else bias.copy_(source.bias)
