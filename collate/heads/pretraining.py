"""Masked language modelling, alone and with sentence pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from collate.columns import IGNORED
from collate.heads.batch import PackedBatch, count_hits, has_label, labelled_tokens, lengths_by_slot
from collate.heads.check import check_label_ids
from collate.heads.task import PackedOutput, Task, cross_entropy_sums, share
from collate.heads.values import PerSequence, at_least_float32
from collate.layout import PADDING
from collate.losses import MLM_SUMS, check_mlm_loss, mlm_loss_of, mlm_metrics, mlm_sums

PAIR_OUTPUTS = {
    "albert": ("sop_logits", "sentence_order_label"),
    "bert": ("seq_relationship_logits", "next_sentence_label"),
    "ernie": ("seq_relationship_logits", "next_sentence_label"),
}
"""What stock models for pretraining call their sentence pairs' logits and labels."""

PAIR_LABELS = {"next_sentence_label": "nsp", "sentence_order_label": "sop"}
"""The labels of sentence pairs, and what metrics call them."""


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
    names = MLM_SUMS

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options) -> "MaskedLM":
        return cls(**{"vocab_size": config.vocab_size} | options)

    def __post_init__(self) -> None:
        check_mlm_loss(self.mlm_loss)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(2,) predicted tokens, sequences with predicted tokens.

        labels [[-100, 7, 8, -100]], sequence_ids [[1, 1, 1, 2]]  ->  [2, 1]
        """
        labelled_BL = labelled_tokens(batch)
        if labelled_BL is None:
            return count_hits(batch, None, None)
        return count_hits(batch, labelled_BL, lengths_by_slot(batch["sequence_ids"].where(labelled_BL, PADDING)) > 0)

    def check(self, batch: Mapping[str, Tensor]) -> None:
        check_label_ids(batch, "labels", self.vocab_size, "vocab_size")

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.count(batch)[1 if self.mlm_loss == "sequence" else 0]

    def targets(self, packed: PackedBatch) -> dict[str, Tensor] | None:
        return {"labels": packed.predicted()[1]} if "labels" in packed.batch else {}

    def loss(self, sums: Mapping[str, Tensor], denominators: Tensor) -> Tensor:
        return mlm_loss_of(sums, self.mlm_loss, tokens=denominators[0], sequences=denominators[1])

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        packed = PackedBatch(batch)
        slots, labels = packed.predicted()
        self.check(batch)
        logits_PV = packed.run(model, slots)["logits"].squeeze(1)
        sequence_P, lengths = packed.sequences_of(slots)
        sums = None if labels is None else mlm_sums(at_least_float32(logits_PV), labels, sequence_P, lengths)
        return self._output(
            packed,
            sums,
            denominators,
            logits=logits_PV,
            predictions=PerSequence(logits_PV.detach().argmax(-1), lengths),
            labels=None if labels is None else PerSequence(labels, lengths),
        )

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        if not sums["mlm_tokens"] > 0:
            return {}
        return {"loss": self.loss(sums, torch.stack([sums["mlm_tokens"], sums["mlm_sequences"]]))} | mlm_metrics(sums)


@dataclass(frozen=True, kw_only=True)
class PreTraining(MaskedLM):
    """Masked language modelling plus a label for each pair of sentences: BertForPreTraining, AlbertForPreTraining.

    Batch: labels (B, L) as in MaskedLM and next_sentence_label (B, S), for ALBERT sentence_order_label; -100 in empty
    slots and for a sequence without one. The loss is the sum of both means.
    logits: (P, V) of predicted tokens; predictions: (N, 2) the pairs' logits; labels: (N,).
    """

    pair_logits: str = "seq_relationship_logits"
    pair_label: str = "next_sentence_label"
    names = (*MaskedLM.names, "pair_loss", "pairs", "pair_correct", "pair_ones")

    @classmethod
    def for_config(cls, config: PretrainedConfig, **options) -> "PreTraining":
        if config.model_type not in PAIR_OUTPUTS:
            raise ValueError(
                f"{config.model_type} is not pretrained by masked language modelling and sentence pairs; "
                f"PreTraining is for {sorted(PAIR_OUTPUTS)}"
            )
        pairs = dict(zip(("pair_logits", "pair_label"), PAIR_OUTPUTS[config.model_type], strict=True))
        return cls(**pairs | {"vocab_size": config.vocab_size} | options)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(3,) predicted tokens, sequences with predicted tokens, sequences with a label of their pair."""
        if self.pair_label not in batch and (others := PAIR_LABELS.keys() & batch.keys()):
            raise ValueError(
                f"the batch has {others.pop()!r}, but this model learns {self.pair_label!r}, which means something "
                f"else; prepare the dataset with objective={PAIR_LABELS[self.pair_label]!r}, or remove the column"
            )
        pairs = count_hits(batch, has_label(batch[self.pair_label]) if self.pair_label in batch else None)
        return torch.cat([super().count(batch), pairs])

    def check(self, batch: Mapping[str, Tensor]) -> None:
        super().check(batch)
        check_label_ids(batch, self.pair_label, 2, "kinds of pairs")

    def targets(self, packed: PackedBatch) -> None:
        return None  # logits of tokens and of pairs

    def loss(self, sums: Mapping[str, Tensor], denominators: Tensor) -> Tensor:
        return super().loss(sums, denominators) + share(sums["pair_loss"], denominators[2])

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        packed = PackedBatch(batch)
        slots, labels = packed.predicted()
        self.check(batch)
        output = packed.run(model, slots, pooler_slots=packed.cls_slots)
        logits_PV, pair_logits_N2 = output["prediction_logits"].squeeze(1), output[self.pair_logits]
        pair_labels = packed.per_sequence(self.pair_label)
        sums = None
        if labels is not None:
            sums = mlm_sums(at_least_float32(logits_PV), labels, *packed.sequences_of(slots))
            sums |= self._pair_sums(at_least_float32(pair_logits_N2), pair_labels)
        return self._output(
            packed,
            sums,
            denominators,
            logits=logits_PV,
            predictions=PerSequence(pair_logits_N2.detach()),
            labels=None if pair_labels is None else PerSequence(pair_labels),
        )

    @staticmethod
    def _pair_sums(logits_N2: Tensor, labels_N: Tensor | None) -> dict[str, Tensor]:
        if labels_N is None:
            labels_N = torch.full(logits_N2.shape[:1], IGNORED, device=logits_N2.device)
        sums = cross_entropy_sums(logits_N2, labels_N)
        ones = (labels_N == 1).sum()
        return {"pair_loss": sums["loss"], "pairs": sums["labels"], "pair_correct": sums["correct"], "pair_ones": ones}

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = torch.stack([sums["mlm_tokens"], sums["mlm_sequences"], sums["pairs"]])
        metrics = {"loss": self.loss(sums, counts)} if counts.any() else {}
        metrics |= mlm_metrics(sums)
        if sums["pairs"] > 0:
            ones = sums["pair_ones"] / sums["pairs"]
            name = PAIR_LABELS[self.pair_label]
            metrics |= {
                f"{name}_loss": sums["pair_loss"] / sums["pairs"],
                f"{name}_accuracy": sums["pair_correct"] / sums["pairs"],
                f"{name}_majority": max(ones, 1 - ones),
            }
        return metrics
