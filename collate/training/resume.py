"""Checkpoints that are complete or not there, and a resumed run that ends as the uninterrupted one, bit for bit.

That holds on processors of one kind with one number of threads: others may compute the same products by other kernels.

Trainer restores parameters, optimizer, schedule and random state, and skips the batches that were seen. What it leaves
inexact (transformers 5.23), and the cure here:

* Dropout comes from one stream of random numbers, which epochs and evaluations draw from, too. So each optimizer step
  has a seed of its own, made of (seed, step, rank).
* Trainer loses metrics that it has summed since the last log. Checkpoints have these sums.
* A run that had finished, and was killed before the last save, would train one more step. It stops.
* logging_steps, save_steps and eval_steps would be those of the checkpoint. They are those of now.
* A run that is made longer would take its first step with the learning rate of the old schedule, often 0.

Figures by the clock, such as tokens per second, and Trainer's last line with train_loss cover the time since the
resume. A run that a signal stops skips the evaluation that was due at that step.
"""

import logging
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from collate.training import checkpoints
from collate.training.agreement import agreed, one_run
from collate.training.hooks import overrides_callback, overrides_trainer
from collate.training.progress import RunningSums
from collate.training.refused import refuse_data_skip
from packing.files.metadata import read_json

logger = logging.getLogger(__name__)

RUNNING_FILE = "since_last_log.json"
"""Sums of the interval that the next log reports, of each rank."""


@overrides_trainer
class ResumesExactly(Trainer):
    """Part of a Trainer: it saves whole checkpoints, refuses damaged ones, and continues from them exactly.

    Trainer writes a checkpoint into _get_output_dir(trial)/checkpoint-N; meanwhile that is the _unfinished folder.
    Whatever Trainer derives from the folder's place comes after the rename: which checkpoint is the best, uploads, and
    how many to keep.
    """

    run_record: dict | None = None
    """The run's configuration: JSON for run.json in each checkpoint."""
    checked_checkpoint: str | None = None
    """One that is known to be complete, on all ranks: its files are not read again."""
    _train_sums: RunningSums
    """Metrics since the last log."""
    _is_saving = False
    _loaded_from: str | os.PathLike = ""
    _resumed_from: str | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_ExactSteps(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        saves = self.args.save_strategy != "no"
        with one_run(self.args, self._get_output_dir(trial)) if saves else nullcontext():
            if isinstance(resume_from_checkpoint, os.PathLike):
                resume_from_checkpoint = os.fspath(resume_from_checkpoint)
            if resume_from_checkpoint not in (None, False, self.checked_checkpoint):
                resume_from_checkpoint = agreed(self.args, lambda: self._checked(resume_from_checkpoint))
            if self.args.should_save:
                checkpoints.remove_unfinished(self._run_folder)
            self.accelerator.wait_for_everyone()
            return super().train(resume_from_checkpoint, trial, *args, **kwargs)

    @property
    def _run_folder(self) -> Path:
        return Path(self.args.output_dir or ".")

    def _checked(self, checkpoint: str | bool | None) -> str | bool | None:
        """The checkpoint to resume from, complete. True: the last one, or Trainer says that there is none."""
        if checkpoint is True:
            checkpoint = next(map(str, checkpoints.newest_first(self._run_folder)), True)
        if not isinstance(checkpoint, str):
            return checkpoint
        if os.path.exists(os.path.join(checkpoint, checkpoints.MANIFEST)):
            checkpoints.check_checkpoint(checkpoint)
        elif os.path.isfile(state := os.path.join(checkpoint, TRAINER_STATE_NAME)):  # a plain Trainer has written it
            try:
                read_json(Path(state))
            except ValueError as error:
                raise checkpoints.DamagedCheckpoint(
                    f"{checkpoint} is damaged: {TRAINER_STATE_NAME} cannot be read ({error}); resume from another "
                    "checkpoint"
                ) from None
        return checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._loaded_from = resume_from_checkpoint
        with checkpoints.names_damaged(resume_from_checkpoint, (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.names_damaged(checkpoint, (OPTIMIZER_NAME, SCHEDULER_NAME)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with checkpoints.names_damaged(checkpoint, (SCALER_NAME,)):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.names_damaged(checkpoint, ("rng_state.pth", f"rng_state_{self.args.process_index}.pth")):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self._loaded_from = self.state.best_model_checkpoint or ""
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks parameters, or has others: Trainer would warn, and train random ones.

        A checkpoint has parameters that are tied to each other once.
        """
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing, unknown = set(load_result.missing_keys) - tied, set(load_result.unexpected_keys)
        for what, names in (("lacks parameters of the model", missing), ("has parameters of another model", unknown)):
            if names:
                raise ValueError(
                    f"{self._loaded_from} {what}: {', '.join(sorted(names))}; resume with the model that it was saved "
                    "of, or start again in another output_dir"
                )

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """The best checkpoint is beside the one that training resumes from, wherever the run's folder lies now."""
        if resume_from_checkpoint is not None:
            refuse_data_skip(self.args)
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            beside = Path(resume_from_checkpoint).with_name("its name is that of its step")
            self.state.best_model_checkpoint = self._best_checkpoint(beside, self.state.best_model_checkpoint)
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        self._resumed_from = resume_from_checkpoint
        return found

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _restore_running_sums(self) -> None:
        """Restore this rank's sums; after a change of ranks the first takes all sums, and each the mean loss."""
        self._train_sums.total = None
        file = None if self._resumed_from is None else Path(self._resumed_from) / RUNNING_FILE
        if file is None or not file.exists():
            return
        running: Any = read_json(file)
        ranks, own = running["ranks"], self.args.process_index
        sums_of_ranks = [
            None if rank["sums"] is None else torch.tensor(rank["sums"], dtype=getattr(torch, rank["dtype"]))
            for rank in ranks
        ]
        mean_loss = sum(rank["loss"] for rank in ranks) / len(ranks)
        if len(ranks) == self.args.world_size:
            loss, sums = ranks[own]["loss"], sums_of_ranks[own]
        else:
            known = [sums for sums in sums_of_ranks if sums is not None]
            loss, sums = mean_loss, torch.stack(known).sum(0) * (own == 0) if known else None
        self._tr_loss += loss
        self._total_loss_scalar -= mean_loss  # train_loss is about this run's steps
        self._globalstep_last_logged = running["last_logged_step"]
        if sums is not None:
            self._train_sums.total = sums.to(self.args.device)

    def _get_output_dir(self, trial: Any) -> str:
        run_folder = super()._get_output_dir(trial)
        return os.path.join(run_folder, checkpoints.UNFINISHED_CHECKPOINTS) if self._is_saving else run_folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = Path(self._get_output_dir(trial))
        target = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            self._write_checkpoint(model, trial, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "writ" not in str(error):
                raise  # torch.save says of a full disk "… failed writing file …"
            free = shutil.disk_usage(run_folder).free if run_folder.is_dir() else 0
            raise OSError(
                f"{target} could not be written: {error}; {free:,} bytes are free there; make room; "
                f"{checkpoints.what_is_saved(run_folder)}"
            ) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _write_checkpoint(self, model: nn.Module, trial: Any, target: Path) -> None:
        best = self.state.best_model_checkpoint
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        folder = target.parent / checkpoints.UNFINISHED_CHECKPOINTS / target.name
        self.state.best_model_checkpoint = self._best_checkpoint(target, best)
        self._save_running_sums(folder)
        self.accelerator.wait_for_everyone()  # each rank has written its part
        if self.args.should_save:
            if self.run_record is not None:
                checkpoints.write_json(folder / checkpoints.RUN_FILE, self.run_record)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            self._check_parts(folder)
            checkpoints.publish(folder, target)
            logger.info("%s is complete", target)
            checkpoints.delete_old(target.parent, self.args.save_total_limit, self.state.best_model_checkpoint, target)
        self.accelerator.wait_for_everyone()

    def _best_checkpoint(self, target: Path, before: str | None) -> str | None:
        if not self.state.best_global_step:
            return before
        best = target.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        return str(best) if best == target or best.exists() else before

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_running_sums(self, folder: Path) -> None:
        sums = self._train_sums.total
        own = {
            "loss": self._tr_loss.item(),
            "sums": None if sums is None else sums.tolist(),
            "dtype": None if sums is None else str(sums.dtype).removeprefix("torch."),
        }
        ranks = gather_object([own])
        if self.args.should_save:
            checkpoints.write_json(
                folder / RUNNING_FILE, {"last_logged_step": self._globalstep_last_logged, "ranks": ranks}
            )

    def _check_parts(self, folder: Path) -> None:
        """Refuse a folder that lacks a rank's part: this rank is about to rename it."""
        if self.args.world_size == 1 or self.args.save_only_model or self.args.save_on_each_node:
            return
        for rank in range(self.args.world_size):
            if not (folder / f"rng_state_{rank}.pth").exists():
                raise OSError(
                    f"rank {rank} has not written into {folder}: not all nodes share output_dir; put it on a shared "
                    "file system, or set --save_on_each_node True"
                )


@overrides_callback
class _ExactSteps(TrainerCallback):
    def __init__(self, trainer: ResumesExactly):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore_running_sums()
        if state.global_step and isinstance(self.trainer.lr_scheduler, LambdaLR):
            _follow_schedule(self.trainer.lr_scheduler)

    def on_step_begin(self, args, state, control, **kwargs):
        seeds = np.random.SeedSequence([args.seed, state.global_step, args.process_index])
        torch.manual_seed(int(seeds.generate_state(1)[0]))  # the CPU's generator takes only 32 bits


def _follow_schedule(scheduler: LambdaLR) -> None:
    """Set the learning rate of the step to come, by the schedule as it is now."""
    factors = [schedule(scheduler.last_epoch) for schedule in scheduler.lr_lambdas]
    rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
