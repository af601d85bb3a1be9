"""Labels of sequences, and of tokens."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from collate.heads.batch import PackedBatch
from collate.heads.check import check_label_ids, check_shares
from collate.heads.task import HeadRun, Task
from collate.heads.values import PerSequence, mean_by_sequence
from collate.layout import PADDING
from collate.losses import NUMBER_LOSS, SEQUENCE_LABEL_LOSS, TOKEN_LABEL_LOSS, Batch, Loss, label_sums, number_sums
from collate.views import at_least_float32
from packing.files.errors import check_known

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(Task):
    """One label for each sequence, several, or a number: AutoModelForSequenceClassification.

    Batch: labels (B, S) integers, -100 in empty slots; for regression floats, NaN in empty slots; for several labels
    floats (B, S, C). A sequence without a label (-100, NaN) is in no mean. logits and predictions: (N, C).

    num_labels, problem_type: as in the model's config. Without a problem_type the rule of stock models holds:
        num_labels 1 is regression, else integers mean one label of many, and floats several.
    pooling: "cls", "mean" (of the sequence's hidden states), or "late" (of its tokens' logits; EuroBERT's default).
    """

    num_labels: int
    problem_type: str | None = None
    pooling: str = "cls"

    def __post_init__(self) -> None:
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"unknown problem_type {self.problem_type!r}; choose from {list(PROBLEM_TYPES)} or None")
        check_known("pooling", self.pooling, ("cls", "mean", "late"))

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options: Any) -> "SequenceClassification":
        pooling = getattr(config, "classifier_pooling", "cls")  # ModernBERT and EuroBERT have a choice
        pooling = "cls" if pooling == "bos" else pooling
        given: dict[str, Any] = {"num_labels": config.num_labels, "problem_type": config.problem_type}
        return cls(**given | {"pooling": pooling} | options)

    @property
    def formula(self) -> Loss:
        """A mean over labels; of several labels a sequence, each counts."""
        is_regression = self.problem_type == "regression" or (self.problem_type is None and self.num_labels == 1)
        return NUMBER_LOSS if is_regression else SEQUENCE_LABEL_LOSS

    def targets(self, packed: PackedBatch) -> dict[str, Tensor]:
        return packed.labels_by(packed.per_sequence)

    def check(self, batch: Batch) -> None:
        labels = batch.get("labels")
        if labels is None or labels.device.type != "cpu":  # the check would wait for another device
            return
        is_empty = not (batch["sequence_ids"] != PADDING).any()  # the type of no labels says nothing
        if is_empty or labels.shape[:2] != batch.get("cls_positions", labels).shape[:2]:
            return
        problem = self._problem(labels.flatten(0, 1))
        if problem == "single_label_classification":
            check_label_ids(batch, "labels", self.num_labels)
        elif problem == "multi_label_classification":
            check_shares(batch, "labels")

    def run(self, model: nn.Module, packed: PackedBatch) -> HeadRun:
        logits_NC = self._logits(model, packed)
        labels = packed.per_sequence("labels")
        self.check(packed.batch)
        sums = None if labels is None else self._sums(at_least_float32(logits_NC), labels)
        return HeadRun(sums, logits_NC, PerSequence(logits_NC.detach()), PerSequence.of(labels))

    def _logits(self, model: nn.Module, packed: PackedBatch) -> Tensor:
        if self.pooling == "cls":
            slots = packed.cls_slots
            return packed.run(model, slots, pooler_slots=slots)["logits"]
        slots, lengths = packed.layout.token_index, packed.layout.lengths
        if self.pooling == "mean":
            return packed.run(model, slots, head_lengths=lengths)["logits"]
        # the stock head takes the mean over the single token that it sees: the token's logits
        return mean_by_sequence(packed.run(model, slots)["logits"], lengths)

    def _sums(self, logits_NC: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not len(logits_NC):  # the type of no labels says nothing
            nothing = logits_NC.new_zeros(())
            return {"loss": logits_NC.sum(), "labels": nothing, "correct": nothing}
        problem = self._problem(labels)
        if problem == "single_label_classification":
            return label_sums(logits_NC, labels)
        if labels.numel() != logits_NC.numel():
            raise ValueError(
                f"labels {tuple(labels.shape)} do not fit logits {tuple(logits_NC.shape)} of {problem}; give "
                f"{logits_NC.shape[1]} floats per sequence, or if each has one label of many, cast them to integers"
            )
        return number_sums(logits_NC, labels.view_as(logits_NC).to(logits_NC), problem == "regression")

    def _problem(self, labels: Tensor) -> str:
        problem = self.problem_type
        if problem is None and self.num_labels == 1:
            problem = "regression"
        elif problem is None:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if labels.is_floating_point() == (problem == "single_label_classification"):
            wanted = "integers" if problem == "single_label_classification" else "floats"
            raise ValueError(f"labels are {labels.dtype}, but {problem} needs {wanted}; cast the column before packing")
        if problem == "single_label_classification" and labels.dim() > 1:
            raise ValueError(
                f"labels {tuple(labels.shape)} are integers, of which {problem} needs one per sequence; if each may "
                "have several labels, cast them to floats before packing"
            )
        return problem


@dataclass(frozen=True, kw_only=True)
class TokenClassification(Task):
    """A label for each token: AutoModelForTokenClassification.

    Batch: labels (B, L), -100 where a token has none. The loss is the mean over labelled tokens, as in the stock model.
    logits: (T, C) of all real tokens; predictions and labels: the same by sequence.

    num_labels: None: unknown until there are logits.
    """

    num_labels: int | None = field(default=None, compare=False)
    formula = TOKEN_LABEL_LOSS

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options: Any) -> "TokenClassification":
        return cls(**{"num_labels": config.num_labels} | options)

    def targets(self, packed: PackedBatch) -> dict[str, Tensor]:
        return packed.labels_by(packed.per_token)

    def check(self, batch: Batch) -> None:
        check_label_ids(batch, "labels", self.num_labels)

    def run(self, model: nn.Module, packed: PackedBatch) -> HeadRun:
        logits_TC = packed.run(model, packed.layout.token_index)["logits"].squeeze(1)
        labels_T = packed.per_token("labels")
        check_label_ids(packed.batch, "labels", logits_TC.shape[1])
        sums = None if labels_T is None else label_sums(at_least_float32(logits_TC), labels_T)
        lengths = packed.layout.lengths
        return HeadRun(sums, logits_TC, PerSequence(logits_TC.detach(), lengths), PerSequence.of(labels_T, lengths))
