"""Masked language modelling, alone and with sentence pairs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from collate.columns import IGNORED, PAIR_LABELS
from collate.heads.batch import PackedBatch
from collate.heads.check import check_label_ids
from collate.heads.task import HeadRun, Task
from collate.heads.values import PerSequence
from collate.losses import MLM_TERMS, Batch, Loss, mlm_loss_of, mlm_sums, pair_sums, pretraining_loss
from collate.views import at_least_float32
from packing.files.errors import check_known

PAIR_OUTPUTS = {
    "albert": ("sop_logits", PAIR_LABELS["sop"]),
    "bert": ("seq_relationship_logits", PAIR_LABELS["nsp"]),
    "ernie": ("seq_relationship_logits", PAIR_LABELS["nsp"]),
}
"""What stock models for pretraining call their sentence pairs' logits and labels."""


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Task):
    """Masked language modelling: AutoModelForMaskedLM.

    Batch: labels (B, L), -100 where nothing is predicted. The vocabulary projection runs on predicted tokens only;
    without labels, on all real tokens.
    mlm_loss: "token", the mean over predicted tokens, as in the stock model; or "sequence", the mean over sequences of
        the mean over each one's predicted tokens.
    logits: (P, V) of the predicted tokens in order; predictions and labels: their token ids, by sequence.
    """

    mlm_loss: str = "token"
    vocab_size: int | None = field(default=None, compare=False)
    """Token ids that may be labels; None: unknown until there are logits."""

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options: Any) -> "MaskedLM":
        return cls(**{"vocab_size": config.vocab_size} | options)

    def __post_init__(self) -> None:
        check_known("mlm_loss", self.mlm_loss, MLM_TERMS)

    @property
    def formula(self) -> Loss:
        return mlm_loss_of(self.mlm_loss)

    def check(self, batch: Batch) -> None:
        check_label_ids(batch, "labels", self.vocab_size, "vocab_size")

    def targets(self, packed: PackedBatch) -> dict[str, Tensor] | None:
        _, found = packed.predicted()
        return packed.labels_by(lambda _: None if found is None else found.labels)

    def run(self, model: nn.Module, packed: PackedBatch) -> HeadRun:
        slots, found = packed.predicted()
        self.check(packed.batch)
        logits_PV = packed.run(model, slots)["logits"].squeeze(1)
        predictions = logits_PV.detach().argmax(-1)
        if found is None:
            return HeadRun(None, logits_PV, PerSequence(predictions, packed.layout.lengths))
        labels = PerSequence(found.labels, found.per_sequence)
        return HeadRun(mlm_sums(logits_PV, found), logits_PV, PerSequence(predictions, found.per_sequence), labels)


@dataclass(frozen=True, kw_only=True)
class PreTraining(MaskedLM):
    """Masked language modelling plus a label for each pair of sentences: BertForPreTraining, AlbertForPreTraining.

    Batch: labels (B, L) as in MaskedLM and next_sentence_label (B, S), for ALBERT sentence_order_label; -100 in empty
    slots and for a sequence without one. The loss is the sum of both means.
    logits: (P, V) of predicted tokens; predictions: (N, 2) the pairs' logits; labels: (N,).
    """

    pair_logits: str = "seq_relationship_logits"
    pair_label: str = "next_sentence_label"

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options: Any) -> "PreTraining":
        if config.model_type not in PAIR_OUTPUTS:
            raise ValueError(
                f"{config.model_type} is not pretrained by masked language modelling and sentence pairs; "
                f"PreTraining is for {sorted(PAIR_OUTPUTS)}"
            )
        pairs = dict(zip(("pair_logits", "pair_label"), PAIR_OUTPUTS[config.model_type], strict=True))
        return cls(**pairs | {"vocab_size": config.vocab_size} | options)

    @property
    def formula(self) -> Loss:
        return pretraining_loss(self.mlm_loss, self._pair, (self.pair_label,))

    @property
    def _pair(self) -> str:
        """ "nsp" or "sop": what the log calls the pairs."""
        return next(name for name, column in PAIR_LABELS.items() if column == self.pair_label)

    def count(self, batch: Batch) -> Tensor:
        """(3,) predicted tokens, sequences with predicted tokens, sequences with a label of their pair."""
        others = [column for column in PAIR_LABELS.values() if column in batch]
        if others and self.pair_label not in others:
            raise ValueError(
                f"the batch has {others[0]!r}, but this model learns {self.pair_label!r}, which means something "
                f"else; prepare the dataset with objective={self._pair!r}, or remove the column"
            )
        return super().count(batch)

    def check(self, batch: Batch) -> None:
        super().check(batch)
        check_label_ids(batch, self.pair_label, 2, "kinds of pairs")

    def targets(self, packed: PackedBatch) -> None:
        return None  # logits of tokens and of pairs

    def run(self, model: nn.Module, packed: PackedBatch) -> HeadRun:
        slots, found = packed.predicted()
        self.check(packed.batch)
        output = packed.run(model, slots, pooler_slots=packed.cls_slots)
        logits_PV, pair_logits_N2 = output["prediction_logits"].squeeze(1), output[self.pair_logits]
        pair_labels = packed.per_sequence(self.pair_label)
        sums = None
        if found is not None:
            sums = mlm_sums(logits_PV, found)
            targets = torch.full_like(packed.cls_slots, IGNORED) if pair_labels is None else pair_labels
            sums |= pair_sums(at_least_float32(pair_logits_N2), targets)
        return HeadRun(sums, logits_PV, PerSequence(pair_logits_N2.detach()), PerSequence.of(pair_labels))
