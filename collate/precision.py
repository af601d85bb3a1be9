"""Sums need more digits than what they add up."""

from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """16 bits widened to 32; others as they are."""
    return values.float() if values.dtype.itemsize < 4 else values
