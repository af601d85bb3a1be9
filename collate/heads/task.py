"""Task: what a packed head is trained for. The tasks themselves are in the files beside this one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from collate.columns import IGNORED
from collate.heads.batch import PackedBatch, has_label
from collate.heads.values import PerSequence


@dataclass(frozen=True, eq=False)
class PackedOutput:
    """What a task makes of one batch.

    loss: scalar; None for a batch that has sequences but no labels.
    sums: 1-D float64 statistics that add up over batches and ranks; `task.metrics(sums)` says what they mean.
    logits: the stock head's, one row per slot that it read; see each task.
    predictions: what `predict` collects.
    labels: their targets, where the batch has them.
    """

    loss: Tensor | None
    sums: Tensor
    logits: Tensor
    predictions: PerSequence
    labels: PerSequence | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a head is trained for: how its loss is counted, and what its outputs mean.

        task.count(batch)                    (k,) int64: what the loss is divided by; adds up over batches and ranks
        task(model, batch, denominators)     a PackedOutput, its loss over these; None: over this batch alone
        task.metrics(sums)                   numbers for the log, from added-up PackedOutput.sums

    A batch of padding alone, such as that of a process without packs, gives loss 0 and gradients of 0.
    """

    names: ClassVar[tuple[str, ...]]
    """What the sums are, in order, before the last two: tokens and sequences."""

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options) -> "Task":
        """The task of a stock model with this config."""
        return cls(**options)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Raise ValueError for labels that the head has no place for; see collate.heads.check."""

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the loss of a batch is a mean over, by which losses of several batches are averaged."""
        return self.count(batch)[0]

    def targets(self, packed: PackedBatch) -> dict[str, Tensor] | None:
        """The batch's label columns with a row for each row of PackedOutput.logits; None: they have no such form."""
        return None

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        raise NotImplementedError

    def loss(self, sums: Mapping[str, Tensor], denominators: Tensor) -> Tensor:
        """The loss, from sums by name."""
        return share(sums["loss"], denominators[0])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """What added-up sums mean; a metric without anything to count is left out."""
        *sums, tokens, sequences = sums
        metrics = self._metrics(dict(zip(self.names, sums, strict=True)))
        return {name: float(value) for name, value in metrics.items()} | {
            "tokens": int(tokens),
            "sequences": int(sequences),
        }

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those with something to count: a loss of 0 over nothing would pass for the best one."""
        raise NotImplementedError

    def _output(self, packed: PackedBatch, sums: dict | None, denominators: Tensor | None, **fields) -> PackedOutput:
        """sums: by name; None: the batch has no labels."""
        loss = None
        if sums is not None:
            loss = self.loss(sums, self.count(packed.batch) if denominators is None else denominators)
        elif denominators is not None:
            raise ValueError(
                f"{type(self).__name__} cannot train on a batch without labels, only {sorted(packed.batch)}; "
                "keep the label columns when you pack the dataset, and as numbers: text is left out"
            )
        values = [0] * len(self.names) if sums is None else [sums[name] for name in self.names]
        return PackedOutput(loss=loss, sums=packed.stack(values), **fields)


def cross_entropy_sums(logits_NC: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
    """loss: summed over what has a label; labels: how many have one; correct: how many of these are predicted."""
    is_label = has_label(labels_N)
    return {
        "loss": F.cross_entropy(logits_NC, labels_N, reduction="sum", ignore_index=IGNORED),
        "labels": is_label.sum(),
        "correct": ((logits_NC.argmax(-1) == labels_N) & is_label).sum(),
    }


def label_metrics(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What cross_entropy_sums mean; nothing where nothing has a label."""
    if not sums["labels"] > 0:
        return {}
    return {"loss": sums["loss"] / sums["labels"], "accuracy": sums["correct"] / sums["labels"]}


def share(total: Tensor, count: Tensor) -> Tensor:
    """total / count; a count of 0 goes with a total of 0."""
    return total / count.clamp(min=1).to(total)


def check_pooling(pooling: str, choices: Sequence[str]) -> None:
    """Raise ValueError for a pooling that is none of the choices."""
    if pooling not in choices:
        raise ValueError(f"unknown pooling {pooling!r}; choose from {list(choices)}")
