"""Answers that are spans of their own sequence."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collate.columns import IGNORED
from collate.heads.batch import PackedBatch, count_hits, lengths_by_slot
from collate.heads.check import check_label_ids
from collate.heads.task import PackedOutput, Task, share
from collate.heads.values import PerSequence, at_least_float32


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Where in its own sequence an answer starts and ends: AutoModelForQuestionAnswering.

    Batch: start_positions and end_positions (B, S), counted from the sequence's own first token. The softmax runs over
    the tokens of one sequence: the logits of all others are -inf. The loss is half the mean over sequences for the
    starts plus half that for the ends. A position outside of its sequence, -100 for one, is in no mean. (Stock models
    take a negative one for 0, the [CLS]; datasets that mean that should say 0.)

    logits: (T, 2) start and end of all real tokens; predictions: the same by sequence, and
    `predictions.padded()` is (N, longest, 2), filled with -inf. labels: (N, 2).
    """

    names = ("start_loss", "starts", "start_correct", "end_loss", "ends", "end_correct", "both_correct", "both")

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(2,) starts, and ends, that lie in their sequence."""
        if "start_positions" not in batch:
            return count_hits(batch, None, None)
        lengths_BS = lengths_by_slot(batch["sequence_ids"], batch["start_positions"].shape[1])
        return count_hits(
            batch, *(_is_inside(batch[name], lengths_BS) for name in ("start_positions", "end_positions"))
        )

    def check(self, batch: Mapping[str, Tensor]) -> None:
        for name in ("start_positions", "end_positions"):
            check_label_ids(batch, name, None)

    def loss(self, sums: Mapping[str, Tensor], denominators: Tensor) -> Tensor:
        starts, ends = denominators
        return (share(sums["start_loss"], starts) + share(sums["end_loss"], ends)) / 2

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None
    ) -> PackedOutput:
        packed = PackedBatch(batch)
        self.check(batch)
        output = packed.run(model, packed.layout.token_index)
        logits_T2 = torch.cat([output["start_logits"], output["end_logits"]], dim=1)
        targets = [packed.per_sequence(name) for name in ("start_positions", "end_positions")]
        labels_N2 = None if targets[0] is None or targets[1] is None else torch.stack(targets, dim=1)
        sums = None
        if labels_N2 is not None:
            sums = self._sums(PerSequence(at_least_float32(logits_T2), packed.layout.lengths), labels_N2)
        return self._output(
            packed,
            sums,
            denominators,
            logits=logits_T2,
            predictions=PerSequence(logits_T2.detach(), packed.layout.lengths),
            labels=None if labels_N2 is None else PerSequence(labels_N2),
        )

    @staticmethod
    def _sums(logits: PerSequence, labels_N2: Tensor) -> dict[str, Tensor]:
        logits_NM2 = logits.padded()
        is_inside = _is_inside(labels_N2, logits.lengths[:, None])
        labels_N2 = labels_N2.where(is_inside, IGNORED)
        loss = F.cross_entropy(logits_NM2, labels_N2, reduction="none", ignore_index=IGNORED).sum(0)
        is_correct = (logits_NM2.argmax(1) == labels_N2) & is_inside
        counts, correct, both = is_inside.sum(0), is_correct.sum(0), is_inside.all(1)
        return {
            "start_loss": loss[0],
            "starts": counts[0],
            "start_correct": correct[0],
            "end_loss": loss[1],
            "ends": counts[1],
            "end_correct": correct[1],
            "both_correct": is_correct.all(1).sum(),
            "both": both.sum(),
        }

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics, counts = {}, torch.stack([sums["starts"], sums["ends"]])
        if counts.all():  # half a loss is none
            metrics["loss"] = self.loss(sums, counts)
        for name, correct, count in (
            ("start_accuracy", "start_correct", "starts"),
            ("end_accuracy", "end_correct", "ends"),
            ("exact_match", "both_correct", "both"),
        ):
            if sums[count] > 0:
                metrics[name] = sums[correct] / sums[count]
        return metrics


def _is_inside(positions: Tensor, lengths: Tensor) -> Tensor:
    return (positions >= 0) & (positions < lengths)
