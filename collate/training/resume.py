"""A resumed run ends with the parameters, and logs the figures, of the run that was never interrupted, bit for bit.

That holds on processors of one kind with one number of threads: others may compute the same products by other kernels.

Trainer restores parameters, optimizer, schedule and random state, and skips the batches that were seen. What it leaves
inexact (transformers 5.23), and the cure here:

* Dropout comes from one stream of random numbers. The start of each epoch and each evaluation draw from it, too, and
  how often depends on persistent workers. So each optimizer step has a seed of its own, made of (seed, step, rank):
  nothing before it matters.
* Trainer loses metrics that it has summed since the last log. Checkpoints have these sums.
* A run that had finished, and was killed before the last save, would train one more step. It stops.
* logging_steps, save_steps and eval_steps would be those of the checkpoint. They are those of now.
* A run that is made longer would take its first step with the learning rate of the old schedule, often 0.
* ignore_data_skip would repeat the start of the epoch. It is refused, as are restore_callback_states_from_checkpoint,
  which replaces callbacks that the trainer holds, and dataloader_in_order=False: see collate.training.refused.

The trainer's own callback saves the counts of packs and tokens. Figures by the clock, such as tokens per second, and
Trainer's last line with train_loss cover the time since the resume. A run that a signal stops skips the evaluation that
was due at that step.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from collate.training.checkpoints import SavesWhole
from collate.training.hooks import overrides_callback, overrides_trainer
from collate.training.progress import RunningSums
from collate.training.refused import refuse_data_skip
from packing.files.metadata import read_json

RUNNING_FILE = "since_last_log.json"
"""Sums of the interval that the next log reports, of each rank."""


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of an optimizer step's random numbers, such as dropout's; torch's CPU generator takes only 32 bits."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


@overrides_trainer
class ResumesExactly(SavesWhole):
    """Part of a Trainer: see above."""

    _train_sums: RunningSums
    """Metrics since the last log."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._resumed_from: str | None = None
        self.add_callback(_ExactSteps(self))

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        if resume_from_checkpoint is not None:
            refuse_data_skip(self.args)
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        self._resumed_from = resume_from_checkpoint
        return found

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _add_to_checkpoint(self, folder: Path) -> None:
        super()._add_to_checkpoint(folder)
        sums = self._train_sums.total
        own = {
            "loss": self._tr_loss.item(),
            "sums": None if sums is None else sums.tolist(),
            "dtype": None if sums is None else str(sums.dtype).removeprefix("torch."),
        }
        ranks = gather_object([own])
        if self.args.should_save:
            running = {"last_logged_step": self._globalstep_last_logged, "ranks": ranks}
            (folder / RUNNING_FILE).write_text(json.dumps(running) + "\n", encoding="utf-8")

    def _restore_running_sums(self) -> None:
        """Restore this rank's sums; after a change of ranks the first takes all sums, and each the mean loss."""
        self._train_sums.total = None
        file = None if self._resumed_from is None else Path(self._resumed_from) / RUNNING_FILE
        if file is None or not file.exists():
            return
        running: Any = read_json(file)
        ranks, own = running["ranks"], self.args.process_index
        as_tensor = [
            None if rank["sums"] is None else torch.tensor(rank["sums"], dtype=getattr(torch, rank["dtype"]))
            for rank in ranks
        ]
        if len(ranks) == self.args.world_size:
            loss, sums = ranks[own]["loss"], as_tensor[own]
        else:
            loss = sum(rank["loss"] for rank in ranks) / len(ranks)
            known = [sums for sums in as_tensor if sums is not None]
            sums = torch.stack(known).sum(0) * (own == 0) if known else None
        self._tr_loss += loss
        self._total_loss_scalar -= sum(rank["loss"] for rank in ranks) / len(
            ranks
        )  # train_loss is about this run's steps
        self._globalstep_last_logged = running["last_logged_step"]
        if sums is not None:
            self._train_sums.total = sums.to(self.args.device)


@overrides_callback
class _ExactSteps(TrainerCallback):
    def __init__(self, trainer: ResumesExactly):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore_running_sums()
        if state.global_step and isinstance(self.trainer.lr_scheduler, LambdaLR):
            _follow_schedule(self.trainer.lr_scheduler)

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(step_seed(args.seed, state.global_step, args.process_index))


def _follow_schedule(scheduler: LambdaLR) -> None:
    """Set the learning rate of the step to come, by the schedule as it is now."""
    factors = [schedule(scheduler.last_epoch) for schedule in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
