"""Losses of one's own: a model's, and an overridden `compute_loss`, which sees one row per label however packs lie.

Trainer's documentation shows the recipe, and with packs it reads the same:

    labels = inputs.pop("labels")                    (N,)     instead of (B, S)
    logits = model(**inputs).logits                  (N, C)   instead of (B, C) of the packs' first tokens
    loss = CrossEntropyLoss(weight)(logits.view(-1, C), labels.view(-1))

N are the sequences of the batch; labels of tokens give T rows, masks P rows of predicted tokens. There is no padding.
Beside labels of sequences, other columns with a value per sequence, such as weights, are (N, …), too.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from collate.columns import PAIR_LABELS
from collate.heads import PackedOutput
from collate.heads.batch import PackedBatch
from collate.heads.check import check_label_ids
from collate.heads.loss_rows import rows_of
from collate.layout import PADDING
from collate.losses import count_denominators
from collate.training.dataloaders import LoadsPacks
from collate.training.hooks import overrides_trainer
from collate.training.progress import count_packs


class SeenModel:
    """The model of one batch, as an overridden compute_loss sees it; all but the call is the model's own.

    inputs: the batch, its label columns with one row per label; beside labels of sequences, so are `others`.
    count: what divides the loss of a whole step: labels over all passes, per rank, since ranks average their gradients.
        None: the task has no labels.
    output: what the task made of the batch, once the model was called; was_called: True even if that failed.
    is_counted: whether the loss came from PackedTrainer.compute_loss with this count.
    """

    def __init__(self, task: Any, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor, ranks: int):
        self.task, self.model, self.batch, self.denominators, self.ranks = task, model, batch, denominators, ranks
        packed = PackedBatch(batch)
        targets = task.targets(packed)
        self.fits = targets is not None
        self.targets = targets or {}
        self.others = _columns_of_sequences(packed) if "labels" in self.targets else {}
        self.inputs = {**batch, **self.others, **self.targets}
        self.was_called = False
        self.output: Any = None
        self.is_counted = False
        first = denominators[0] if len(denominators) else None
        self.count = first / ranks if first is not None and ranks > 1 else first

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __call__(self, **inputs: Any) -> Any:
        """logits, and with labels the loss: the mean over this batch."""
        self.was_called = True
        if not self.fits:
            raise ValueError(
                f"an overridden compute_loss cannot call the model for {type(self.task).__name__}, whose outputs have "
                "no single row of logits per label; let it call super().compute_loss(model, inputs, …) instead"
            )
        unknown = [name for name in inputs if name not in self.batch]
        if unknown:
            raise ValueError(
                f"compute_loss gives the model {unknown[0]!r}, which a packed head cannot honour; give it the batch "
                f"alone: {', '.join(sorted(self.batch))}"
            )
        self.output = self.task(self.model, self.restored(inputs))
        if not isinstance(self.output, PackedOutput):  # a model with a loss of its own
            return self.output
        has_labels = bool(self.targets.keys() & inputs.keys())
        return SequenceClassifierOutput(loss=self.output.loss if has_labels else None, logits=self.output.logits)

    def restored(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the changes in inputs, and with labels that inputs lack back in their places."""
        self.was_called = True
        for name in self.targets.keys() & inputs.keys():
            if inputs[name] is not self.targets[name]:
                raise ValueError(
                    f"compute_loss changed {name!r} before it called the model; change the dataset's column instead, "
                    "or take it out of inputs, call the model, and compute the loss from its logits"
                )
        mine = self.targets.keys() | self.others.keys()
        return {**self.batch, **{name: value for name, value in inputs.items() if name not in mine}}


def _columns_of_sequences(packed: PackedBatch) -> dict[str, Tensor]:
    """(B, S, …) -> (N, …) for all columns with a value per sequence, if labels are such a column."""
    batch, slots = packed.batch, packed.batch.get("cls_positions")
    if slots is None or slots.shape == batch["sequence_ids"].shape or batch["labels"].shape[:2] != slots.shape:
        return {}
    columns = [name for name, x in batch.items() if isinstance(x, Tensor) and x.shape[:2] == slots.shape]
    found = {name: packed.per_sequence(name) for name in columns if name not in ("cls_positions", "labels")}
    return {name: values for name, values in found.items() if values is not None}


def loss_by(override: Callable, seen: SeenModel, name: str, needs_count: bool) -> Tensor:
    """The scalar loss that an overridden compute_loss gives for a batch.

    name: its class's. needs_count: the step has several passes or ranks, and nobody said how their losses add up.
    """
    try:
        loss = override(seen, seen.inputs, num_items_in_batch=seen.count)
    except ValueError as error:
        if seen.was_called:
            raise
        raise ValueError(
            f"{name}.compute_loss failed, as the error above says, and has not called the model that it was given; if "
            "it called self.model, whose outputs have a row per pack and not per label, let it call `model`"
        ) from error
    loss = loss[0] if isinstance(loss, tuple) else loss
    if not seen.is_counted and (added := getattr(seen.task, "added", ())):
        raise ValueError(
            f"modules of the model add {', '.join(row.name for row in added)} to its loss, which a loss that "
            f"{name}.compute_loss makes of its own would leave out; let it call super().compute_loss(model, inputs, "
            "return_outputs, num_items_in_batch), and add to that"
        )
    if needs_count and not seen.is_counted:
        raise ValueError(
            f"{name}.compute_loss makes a loss of its own, and a step has several passes or ranks, whose packs hold "
            "unequal numbers of sequences. Let it return sum / num_items_in_batch and set loss_is_scaled_for_ga = True "
            "in the class; or False, if it returns a mean over each batch and all batches shall weigh the same; or "
            "pass num_items_in_batch on to super().compute_loss"
        )
    return loss.squeeze() if isinstance(loss, Tensor) else torch.tensor(float(loss))


def has_sequences(batch: Mapping[str, Tensor]) -> bool:
    """Whether any slot of the batch holds a token; a rank that ran out of packs gets only padding."""
    return bool((batch["sequence_ids"] != PADDING).any())


class OwnLoss:
    """A model's own loss, as a task."""

    def __init__(self, model: nn.Module):
        self.metrics = model.metrics
        self.added = rows_of(model)
        self._count = getattr(model, "count_denominators", count_denominators)
        self.arguments = {*inspect.signature(model.forward).parameters, *getattr(model, "pair_columns", ())}

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._count(batch)

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        return count_packs(batch)[0]

    def targets(self, packed: PackedBatch) -> dict[str, Tensor]:
        return {}

    @staticmethod  # so that no worker is sent the model
    def check(batch: Mapping[str, Tensor]) -> None:
        for name in PAIR_LABELS.values():
            check_label_ids(batch, name, 2, "kinds of pairs")

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None) -> Any:
        batch = {name: values for name, values in batch.items() if name in self.arguments}
        return model(**batch, denominators=denominators)


def has_own_loss(model: nn.Module) -> bool:
    """Whether the model itself divides its loss by counts over the step, as PackedBertForPreTraining does."""
    return "denominators" in inspect.signature(model.forward).parameters and hasattr(model, "metrics")


@overrides_trainer
class TakesOwnLoss(LoadsPacks):
    """Part of a Trainer that has a task: it computes the task's loss, or what an override makes of it."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """The task's loss, divided by the step's counts. Training and evaluation use an override, too."""
        if isinstance(model, SeenModel):
            denominators = None if num_items_in_batch is None else model.denominators
            outputs, ranks = self.task(model.model, model.restored(inputs), denominators), model.ranks
            model.output, model.is_counted = outputs, denominators is not None
        else:
            outputs, ranks = self.task(model, inputs, num_items_in_batch), self.accelerator.num_processes
            self._train_sums.add(outputs.sums)
        # DDP and FSDP average gradients over ranks, but the loss is already divided by all ranks' counts
        loss = outputs.loss * ranks
        return (loss, outputs) if return_outputs else loss

    @property
    def _override(self) -> Callable | None:
        """A compute_loss other than this class's: a subclass's, or one that was set on this object; None: ours."""
        is_own = getattr(self.compute_loss, "__func__", None) is TakesOwnLoss.compute_loss
        return None if is_own else self.compute_loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        override = self._override
        if override is None:
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            # the mean of nothing is no number; a model with a loss of its own knows what to do
            if not isinstance(self.task, OwnLoss) and not has_sequences(inputs):
                return TakesOwnLoss.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
            seen = SeenModel(self.task, model, inputs, num_items_in_batch, self.accelerator.num_processes)
            loss = loss_by(override, seen, type(self).__name__, self._passes_must_be_counted)
            if seen.output is not None:
                self._train_sums.add(seen.output.sums)
            return loss

        replaced = self.__dict__.get("compute_loss")
        self.__dict__["compute_loss"] = compute_loss
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            del self.__dict__["compute_loss"]
            if replaced is not None:
                self.__dict__["compute_loss"] = replaced

    @property
    def _passes_must_be_counted(self) -> bool:
        is_said = getattr(type(self), "loss_is_scaled_for_ga", None) is not None or not self.loss_is_scaled_for_ga
        return self.args.gradient_accumulation_steps * self.args.world_size > 1 and not is_said
