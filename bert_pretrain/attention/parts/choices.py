"""What a head chose in the forward pass, handed on to the pass that computes it again.

    with recording() as choices:
        context = head(query, key, value, layout)
    with replaying(choices):
        context = head(nearly_query, key, value, layout)     the same buckets, clusters, experts

Going back, a stream computes its branches again, from inputs that differ in the last bit. What is continuous in them
then differs as little. A choice does not: a token would change its bucket, and the gradient would be that of another
function. So whatever chooses by comparing numbers asks `chosen`. Outside of both contexts it costs nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Make = Callable[[], Tensor]
Tape = Callable[[Make, int | None], Tensor]

_TAPE: ContextVar[Tape | None] = ContextVar("choices", default=None)
"""What answers in this thread; a backward pass has a thread of its own on GPUs, and enters its context there."""


def chosen(make: Make, below: int | None = None) -> Tensor:
    """What `make` returns, or what it returned in the pass that is now computed again.

    below: the tensor is int64, from 0 to below this number; so a record needs one byte or two for each choice.
    """
    tape = None if torch.compiler.is_compiling() else _TAPE.get()  # nothing in a graph is computed again by us
    return make() if tape is None else tape(make, below)


@contextmanager
def recording() -> Iterator[list[Tensor]]:
    """Record choices into the list that it gives. Within another context it records what that one answers."""
    choices: list[Tensor] = []
    outer = _TAPE.get()

    def record(make: Make, below: int | None) -> Tensor:
        made = make() if outer is None else outer(make, below)
        choices.append(made.detach() if below is None else made.to(narrowest(below)))
        return made

    with _answering(record):
        yield choices


@contextmanager
def replaying(choices: Sequence[Tensor]) -> Iterator[None]:
    """Answer with recorded choices, in their order. Raises RuntimeError where the pass chooses more or less often."""
    left = iter(choices)

    def replay(make: Make, below: int | None) -> Tensor:
        kept = next(left, None)
        if kept is None:
            raise RuntimeError(
                f"a pass that is computed again chooses more often than the {len(choices)} times recorded; "
                "a branch must take the same steps in both"
            )
        return kept if below is None else kept.long()

    with _answering(replay):
        yield
    unused = len(list(left))
    if unused:
        raise RuntimeError(
            f"a pass that is computed again left {unused} of {len(choices)} recorded choices unused; "
            "a branch must take the same steps in both"
        )


@contextmanager
def _answering(tape: Tape) -> Iterator[None]:
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


def narrowest(below: int) -> torch.dtype:
    """The smallest type of integers that holds 0 to below this number."""
    return next(d for d in (torch.uint8, torch.int16, torch.int32, torch.int64) if below - 1 <= torch.iinfo(d).max)
