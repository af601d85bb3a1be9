"""A scheduler that takes the machine away sends a signal first: training saves a checkpoint and ends.

Ctrl-C ends training after the pass that runs. Python's own handler raises KeyboardInterrupt in the middle of anything.
Compiled code that calls back loses it, and the run goes on: llvmlite does while Numba compiles.

with SaveOnSignal() as stop:
    trainer.add_callback(stop)
    trainer.train()
stop.end_if_received()
"""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from collate.training.hooks import overrides_callback

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Schedulers, containers and torchrun send SIGTERM before they kill; Slurm often SIGUSR1, which Windows lacks."""


class Stopped(SystemExit):
    """Training ended by a signal, its checkpoint saved; code: 128 + the signal's number, as shells have it."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(128 + signal_number)
        self.signal_number, self.step = signal_number, step

    def __str__(self) -> str:
        name = signal.Signals(self.signal_number).name
        return (
            f"{name} received: saved checkpoint-{self.step} and stopped; run the same command again to resume from it"
        )


@overrides_callback
class SaveOnSignal(TrainerCallback):
    """At the end of the optimizer step in which any rank got a signal, all ranks save and stop.

    The ranks agree by one number that they reduce over gloo, on the host, without a wait for a GPU.
    They skip the evaluation at that step: there may not be time for it.

    Ctrl-C raises KeyboardInterrupt at the end of a pass; pressed again, at once.
    """

    def __init__(self) -> None:
        self.received = self.agreed = self.step = 0
        self._is_interrupted = False
        self._group: dist.ProcessGroup | None = None
        self._is_over = torch.zeros(1, dtype=torch.int8).share_memory_()

    def __enter__(self) -> "SaveOnSignal":
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background ignores it
                self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._is_over.fill_(1)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt
        self._is_interrupted = True

    def end_if_received(self) -> None:
        self._end_if_interrupted()
        if self.agreed:
            raise Stopped(self.agreed, self.step)

    def _end_if_interrupted(self) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt

    def on_substep_end(self, args, state, control, **kwargs):
        self._end_if_interrupted()

    def on_prediction_step(self, args, state, control, **kwargs):
        self._end_if_interrupted()

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")
        if train_dataloader is not None:
            loader = getattr(train_dataloader, "base_dataloader", train_dataloader)  # accelerate wraps the loader
            loader.worker_init_fn = _WorkersStay(loader.worker_init_fn, self._is_over)

    def on_step_end(self, args, state, control, **kwargs):
        self._end_if_interrupted()
        self.agreed = self.received
        if self._group is not None:
            highest = torch.tensor(self.received)
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
            self.agreed = int(highest)
        if self.agreed:
            self.step = state.global_step
            logger.info("%s: saving at step %d", signal.Signals(self.agreed).name, self.step)
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.agreed:  # everything is saved, and the epoch may not have ended
            control.should_save = control.should_evaluate = control.should_log = False


class _WorkersStay:
    """A signal to the whole process group must not end the dataloader's workers, or the step would have no data.

    Once training is over, a signal may end them like any process. Ctrl-C reaches the whole group, too.
    """

    def __init__(self, worker_init_fn: Callable[[int], None] | None, is_over: torch.Tensor):
        self.worker_init_fn, self.is_over = worker_init_fn, is_over

    def __call__(self, worker_id: int) -> None:
        for number in SIGNALS:
            signal.signal(number, self._receive)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_over.item():
            os._exit(0)  # torch's handler does so, too, when the parent ends its workers; else it looks like a failure
