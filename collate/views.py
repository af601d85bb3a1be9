"""Views that are made once and kept: their tensors serve every later use, in inference and in training."""

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


def view(make: Callable[[Any], Made]) -> cached_property[Made]:
    """A cached_property that holds ordinary tensors.

    A tensor made under torch.inference_mode() cannot be saved for a backward pass. A batch that is evaluated first and
    trained on later would keep such tensors in its views.
    """
    return cached_property(wraps(make)(lambda self: in_ordinary_mode(lambda: make(self))))


def in_ordinary_mode(make: Callable[[], Made]) -> Made:
    """What `make` returns, made outside of inference mode."""
    if torch.compiler.is_compiling():  # a graph ends where sizes are read, which it may not do within a mode
        return make()
    with torch.inference_mode(False), torch.no_grad():
        return make()
