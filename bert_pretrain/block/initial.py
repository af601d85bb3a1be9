"""INITIAL: by how much a new model shrinks the output projections of its branches.

Each of 2N branches adds to the residual sum. Sparse Transformer (1904.10509) and GPT-2 draw what writes to it smaller
by 1/√(2N), so that the sum has the variance of one branch at any depth N.
"""

from collections.abc import Callable

INITIAL: dict[str, Callable[[int], float]] = {
    "bert": lambda num_layers: 1.0,
    "deep": lambda num_layers: (2 * num_layers) ** -0.5,
}
"""Name -> factor, for so many layers."""
