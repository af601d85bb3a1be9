"""Buffers that move after each optimizer step, by what all its micro-batches and all ranks saw.

Such are the centroids of `routing` and the bias of a mixture of experts. Whoever trains lets them move:

    trainer.add_callback(AfterStepCallback())        # under Trainer
    update_after_step(optimizer, model)              # in your own loop: once, before training

A module that has such buffers has a method `after_step()`; nothing else is asked of it. `MovesAfterStep` gives it what
it needs for that. The backward pass takes the statistics, once in each micro-batch: gradient checkpointing, which runs
forward twice, counts nothing twice, and evaluation counts nothing.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

MOST_MICRO_BATCHES = 1000
"""After so many micro-batches without an update such a module refuses: somebody forgot it."""


def moves_after_step(model: nn.Module) -> bool:
    """Whether any module of the model has buffers that move after a step."""
    return any(hasattr(module, "after_step") for module in model.modules())


def after_step(model: nn.Module) -> None:
    """Move the buffers of all modules: once after each optimizer step, on every rank."""
    for module in model.modules():
        move: Any = getattr(module, "after_step", None)
        if move is not None:
            move()


def update_after_step(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Move the model's buffers whenever the optimizer has stepped; returns a handle, `.remove()` ends it."""
    return optimizer.register_step_post_hook(lambda *_: after_step(model))


class AfterStepCallback(TrainerCallback):
    """Trainer's optimizer steps move the buffers."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        after_step(model)


class KeepsWideBuffers(nn.Module):
    """A module with buffers that `.to`, `.half()` and `.cuda()` leave in float32 at least.

    In 16 bits a moving average loses its small steps, and draws would stay rounded for good.
    """

    def register_at_least_float32(self, name: str, shape: tuple[int, ...]) -> None:
        """Give the module an empty buffer that is saved with it and keeps its precision."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        wide = {name: x for name, x in self.named_buffers(recurse=False) if x.is_floating_point() and x.itemsize >= 4}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            after = getattr(self, name)
            if after.itemsize < 4:
                setattr(self, name, before.to(after.device, torch.float32))
        return self


class MovesAfterStep(KeepsWideBuffers):
    """A module that collects statistics until `after_step`. They are no buffers: each rank has its own.

    out = self.collected(out, statistics)        in forward: the backward pass adds them up
    self.over_ranks(*statistics)                 in after_step: of all ranks; then self.forget()
    """

    _statistics: tuple[Tensor, ...] | None = None
    _micro_batches: int = 0

    def collected(self, out: Tensor, *statistics: Tensor) -> Tensor:
        """The same output. When, and only when, its gradient is computed, the statistics of this pass count."""
        return _Collect.apply(out, self, *statistics)

    def collect(self, *statistics: Tensor) -> None:
        """Add what one micro-batch saw."""
        if self._statistics is not None:
            statistics = tuple(a + b for a, b in zip(self._statistics, statistics, strict=True))
        self._statistics = statistics
        self._micro_batches += 1

    def forget(self) -> None:
        """Statistics begin anew."""
        self._statistics, self._micro_batches = None, 0

    def over_ranks(self, statistics: Tensor) -> Tensor:
        """The sum over all ranks; every rank must call it, also one without any."""
        if dist.is_available() and dist.is_initialized():
            statistics = statistics.clone()
            dist.all_reduce(statistics)
        return statistics


class _Collect(torch.autograd.Function):
    """out, module, *statistics -> out. The module gets the statistics when, and only when, backward runs."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, module: MovesAfterStep, *statistics: Tensor) -> Tensor:
        ctx.module, ctx.statistics = module, statistics
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.module.collect(*ctx.statistics)
        return grad, None, *(None for _ in ctx.statistics)
