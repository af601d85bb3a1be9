"""PackedTrainer: what transformers' Trainer cannot know about packs.

Here a row is several sequences, and their number, and that of predicted tokens, differs from batch to batch. Trainer
averages a mean per micro-batch, which weights sequences unequally. PackedTrainer counts the denominators of a loss over
the whole optimizer step, all micro-batches and all ranks, before the first forward pass. Then the result does not
depend on packing, accumulation or the number of processes. (Dropout does: each forward pass draws for its own rows.)

A task (collate.heads) says what to count, and what the loss is; the class of a stock model tells its task. A model with
a loss of its own has

    forward(**batch, denominators=Tensor(k)) -> output.loss, divided by these instead of by the batch's own counts
    output.sums                              -> 1-D tensor of additive statistics
    metrics(sums) -> dict[str, float]        -> what they mean, for the log: "loss", "sequences", "tokens" and others
    pair_columns: tuple[str, ...]            -> columns that forward takes by **; a model may leave this out
    count_denominators(batch) -> Tensor(k)   -> what divides its loss, if that is not the three of collate.losses

Modules of either kind of model may add terms to its loss: see collate.heads.loss_rows.
"""

import logging
from copy import copy
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from transformers import Trainer

from collate.collator import DataCollatorWithPacking
from collate.heads import prepare_head, task_for
from collate.heads.table import with_rows_of
from collate.layout import PADDING
from collate.training.dataloaders import packs_per_pass, refuse_torn_steps, said_packs_per_pass, slots_per_pack
from collate.training.hooks import overrides_trainer
from collate.training.own_loss import OwnLoss, has_own_loss
from collate.training.plain_trainer import SetEpoch, check_forward, check_model
from collate.training.predictions import EvaluatesSequences
from collate.training.progress import PackingProgress, RunningSums, count_packs, drop_figures_of_rows
from collate.training.refused import refuse_arguments, wanted_on_gpu

logger = logging.getLogger(__name__)


@overrides_trainer
class PackedTrainer(EvaluatesSequences):
    """`transformers.Trainer` for packed datasets: stock models and their heads, or models with a loss of their own.

    It isolates stock models, divides losses by counts over the step, keeps all columns, and evaluates sequences instead
    of rows. docs/training.md lists the differences to Trainer.

    task: what the head learns, `collate.heads`; None: the model's class tells.
    sequences_per_step: sequences per optimizer step, over all ranks, except the last step of an epoch; None: as many
        as the packs of a step hold.
    tokens_per_pass: token slots in one forward pass of a device: as many whole packs as fit; None: as many packs as
        args.per_device_train_batch_size says. The caller's args stay as they are, `trainer.args` is a copy.

    A subclass may override compute_loss: evaluation uses it, too. It sees a row per label, see
    collate.training.own_loss. Then evaluation averages the losses of batches by their labels.

    It raises ValueError for what it cannot honour: models that cannot be isolated, a class with a forward (and so
    perhaps a loss) of its own without a `task`, transformers' own collators, nn.DataParallel (it splits packs
    without their counts), iterable datasets over several ranks (accelerate would repeat packs), compute_loss_func,
    prediction_step, the arguments in collate.training.refused, and labels and ids that the model has no place for.
    """

    def __init__(
        self,
        *args: Any,
        task: Any = None,
        sequences_per_step: int | None = None,
        tokens_per_pass: int | None = None,
        **kwargs: Any,
    ):
        self._given_task, self.sequences_per_step = task, sequences_per_step
        self._compiles_with: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        self.task = self._find_task(self.model)
        self._compile(self.model)
        self._train_sums = RunningSums()
        self._no_objective = {"num_input_tokens_seen"}  # Trainer.log adds it; evaluations add ours
        self._progress = PackingProgress()
        self.add_callback(self._progress)
        # compute_loss divides by the step's counts, and Trainer must not divide again; an override may say otherwise
        self.loss_is_scaled_for_ga = self._override is None or self.loss_is_scaled_for_ga is not False
        self.model_accepts_loss_kwargs = True  # so that the step's counts reach compute_loss
        if isinstance(self.data_collator, DataCollatorWithPacking):
            self.data_collator = self.data_collator.for_model(self.model)
            check_model(self.data_collator, self.model)
        if tokens_per_pass is not None:
            self._size_passes(tokens_per_pass)
        self.add_callback(SetEpoch(self))
        if wanted := wanted_on_gpu(self.args):
            logger.info("TrainingArguments that make training on a GPU faster, and stay as they are: %s", wanted)

    def set_epoch(self, epoch: int) -> None:
        """Other masks, another order. Trainer itself loses the order's epoch when it resumes over several ranks."""
        for part in (self.data_collator, self._train_order, self.train_dataset):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)

    def _refuse_unsupported(self) -> None:
        refuse_arguments(self.args, "PackedTrainer")
        for name in ("compute_loss_func", "preprocess_logits_for_metrics"):
            if getattr(self, name) is not None:
                raise ValueError(f"PackedTrainer cannot honour {name}={getattr(self, name)!r}; leave it out")
        if type(self).prediction_step is not Trainer.prediction_step:
            raise ValueError(
                f"{type(self).__name__}.prediction_step would never be called: evaluation adds up sums over packs; "
                "override compute_loss, or give a task"
            )
        if self.sequences_per_step is not None:
            refuse_torn_steps(self.args, self.sequences_per_step)

    def _size_passes(self, tokens_per_pass: int) -> None:
        """Write what tokens_per_pass means into a copy of the arguments."""
        slots = slots_per_pack(self.data_collator, self.train_dataset)
        packs = packs_per_pass(tokens_per_pass, slots, said_packs_per_pass(self.args))
        self.args = copy(self.args)
        self.args.per_device_train_batch_size = packs
        self._train_batch_size = self.args.train_batch_size

    def _find_task(self, model: nn.Module) -> Any:
        """The task of a model; stock models are isolated, and their heads prepared."""
        if has_own_loss(model):
            metrics = getattr(self, "compute_metrics", None)  # Trainer calls model_init before it sets this
            for name, value in (("task", self._given_task), ("compute_metrics", metrics)):
                if value is not None:
                    raise ValueError(
                        f"PackedTrainer cannot honour {name}={value!r}: {type(model).__name__} has a loss and metrics "
                        "of its own; leave it out"
                    )
            return OwnLoss(model)
        if self._given_task is None:
            check_forward(model)
            return task_for(model)
        prepare_head(model)
        return with_rows_of(model, self._given_task)

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        refuse_arguments(self.args, "PackedTrainer")  # a trial may have set them

    def call_model_init(self, trial=None):
        """A model of hyperparameter search is prepared like the first."""
        model = super().call_model_init(trial)
        self.task = self._find_task(model)
        if hasattr(self, "accelerator"):  # Trainer makes the first model before it
            self._compile(model)
        return model

    def _compile(self, model: nn.Module) -> None:
        """With torch_compile, a model that knows what makes good graphs compiles itself; accelerate would take all."""
        plugin = self.accelerator.state.dynamo_plugin
        if type(model).compile is not nn.Module.compile and plugin.backend != DynamoBackend.NO:
            self._compiles_with = plugin.to_kwargs()
            plugin.backend = DynamoBackend.NO
        if self._compiles_with is not None:
            model.compile(**self._compiles_with)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """(k,) the denominators of one optimizer step: over its micro-batches and all ranks."""
        if not batch_samples:  # a dataset without a length has ended
            return None
        counts = None
        for batch in batch_samples:
            filled = (batch["sequence_ids"] != PADDING).any(1).sum()
            of_batch = torch.cat([count_packs(batch), filled[None], self.task.count(batch)]).to(device)
            counts = of_batch if counts is None else counts + of_batch
        counts = self.accelerator.reduce(counts, "sum")
        self._progress.add(
            torch.stack([counts[i] for i in (0, 1, 4, 2)]).long()
        )  # floats, because denominators are sums of weights
        self._step_counted(counts[:4], counts[5:])
        return counts[5:]

    def _step_counted(self, packs: Tensor, denominators: Tensor) -> None:
        """Learn the counts of one optimizer step, over all ranks: for trainers that measure. packs: see count_packs."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._train_sums.total is not None:
            metrics = self.task.metrics(self.accelerator.reduce(self._train_sums.take(), "sum").cpu())
            del metrics["sequences"], metrics["tokens"]  # these count from the last log; the log shows totals
            logs = metrics | self._progress.seen(self.state.global_step) | self._progress.since_last_log() | logs
        if logs.get("train_runtime"):  # Trainer's samples are packs
            logs["train_samples_per_second"] = round(self._progress.in_this_run / logs["train_runtime"], 3)
        drop_figures_of_rows(logs)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Trainer would take padding for tokens."""
        return 0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        tokens = (inputs["sequence_ids"] != PADDING).sum().to(self.args.device)
        self.state.num_input_tokens_seen += self.accelerator.gather(tokens).sum().item()
