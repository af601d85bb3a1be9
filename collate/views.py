"""Views that are made once and kept; where parts begin; values widened for sums."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Made = TypeVar("Made")


def view(make: Callable[[Any], Made]) -> cached_property[Made]:
    """A cached_property that holds ordinary tensors.

    Without it, a batch that is evaluated first and trained on later would keep tensors of torch.inference_mode(), which
    cannot be saved for a backward pass.
    """
    return cast(Any, _View(make))


class _View:
    """functools.cached_property without its lock, which Python 3.11 has, and which torch.compile cannot take."""

    def __init__(self, make: Callable[[Any], Any]):
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        made = in_ordinary_mode(lambda: self.make(instance))
        instance.__dict__[self.name] = made
        return made


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
