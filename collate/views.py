"""Views that are made once and kept; where parts begin; values widened for sums."""

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def view(make: Callable[[Any], Made]) -> cached_property[Made]:
    """A cached_property that holds ordinary tensors.

    Without it, a batch that is evaluated first and trained on later would keep tensors of torch.inference_mode(), which
    cannot be saved for a backward pass.
    """
    return cached_property(wraps(make)(lambda self: in_ordinary_mode(lambda: make(self))))


def in_ordinary_mode(make: Callable[[], Made]) -> Made:
    """What `make` returns, made outside of inference mode."""
    if torch.compiler.is_compiling():  # a graph ends where sizes are read, and it must not end within a mode
        return make()
    with torch.inference_mode(False), torch.no_grad():
        return make()


def starts_of(counts: Tensor) -> Tensor:
    """Where each part begins: [3, 2, 4] -> [0, 3, 5]"""
    return counts.cumsum(0) - counts


def at_least_float32(values: Tensor) -> Tensor:
    """16 bits widened to 32, since sums need more digits than what they add up; others as they are."""
    return values.float() if values.dtype.itemsize < 4 else values
