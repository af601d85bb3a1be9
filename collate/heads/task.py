"""Task: what a packed head is trained for. The tasks themselves are in the files beside this one."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig

from collate.heads.batch import PackedBatch
from collate.heads.loss_rows import added_sums, heard_sums
from collate.heads.values import PerSequence
from collate.losses import Batch, Loss, Mean, Sums


@dataclass(frozen=True, eq=False)
class PackedOutput:
    """What a task makes of one batch.

    loss: scalar; None for a batch that has sequences but no labels.
    sums: 1-D float64 statistics that add up over batches and ranks; `task.metrics(sums)` says what they mean.
    logits: the stock head's, one row per slot that it read; see each task.
    predictions: what `predict` collects. labels: their targets, where the batch has them.
    """

    loss: Tensor | None
    sums: Tensor
    logits: Tensor
    predictions: PerSequence
    labels: PerSequence | None = None


class HeadRun(NamedTuple):
    """What a task makes of one batch before its loss. sums: by name; None without labels. Others as in PackedOutput."""

    sums: Sums | None
    logits: Tensor
    predictions: PerSequence
    labels: PerSequence | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a head is trained for: how its loss is counted, and what its outputs mean.

    A subclass gives `formula` and `run`.

        task.count(batch)                    (k,) int64: what the loss is divided by; adds up over batches and ranks
        task(model, batch, denominators)     a PackedOutput, its loss over these; None: over this batch alone
        task.metrics(sums)                   numbers for the log, from added-up PackedOutput.sums

    A batch of padding alone, such as that of a process without packs, gives loss 0 and gradients of 0.
    """

    added: tuple[Mean, ...] = field(default=(), repr=False)
    """Terms that modules of the model add to the loss: `collate.heads.loss_rows.rows_of(model)`."""

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options: Any) -> "Task":
        """The task of a stock model with this config."""
        return cls(**options)

    @property
    def formula(self) -> Loss:
        """The head's own terms of the loss, what is counted for them, and what is logged."""
        raise NotImplementedError

    @property
    def _loss(self) -> Loss:
        return self.formula.plus(self.added)

    def check(self, batch: Batch) -> None:
        """Raise ValueError for labels that the head has no place for; see collate.heads.check."""

    def targets(self, packed: PackedBatch) -> dict[str, Tensor] | None:
        """The batch's label columns with a row for each row of PackedOutput.logits; None: they have no such form."""
        return None

    def run(self, model: nn.Module, packed: PackedBatch) -> HeadRun:
        """Let the head read its slots of one batch, check the labels, and add up the loss."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, batch: Batch, denominators: Tensor | None = None) -> PackedOutput:
        """The model on one batch. denominators: what divides the loss; None: `count` of this batch.

        Raises ValueError for a batch without labels that is to be trained on, one with `denominators`.
        """
        packed = PackedBatch(batch)
        with heard_sums(model, self.added) as heard:
            sums, logits, predictions, labels = self.run(model, packed)
        loss = None
        if sums is not None:
            sums = {**sums, **added_sums(model, self.added, packed.layout, heard)}
            loss = self._loss(sums, self.count(batch) if denominators is None else denominators)
        elif denominators is not None:
            raise ValueError(
                f"{type(self).__name__} cannot train on a batch without labels, only {sorted(batch)}; "
                "keep the label columns when you pack the dataset, and as numbers: text is left out"
            )
        return PackedOutput(loss, self._loss.stacked(sums, packed.layout), logits, predictions, labels)

    def count(self, batch: Batch) -> Tensor:
        """(k,) what the terms of the loss are divided by: `formula.counts` in order, then those of `added`."""
        return self._loss.count(batch)

    def weight(self, batch: Batch) -> Tensor:
        """What the loss of a batch is a mean over, and so its weight in the mean over several batches."""
        return self.formula.weight(batch)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """What added-up sums mean; a metric without anything to count is left out."""
        return self._loss.metrics(sums)
