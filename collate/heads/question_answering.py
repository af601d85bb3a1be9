"""Answers that are spans of their own sequence."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from collate.heads.batch import PackedBatch
from collate.heads.check import check_label_ids
from collate.heads.task import PackedOutput, Task
from collate.heads.values import PerSequence
from collate.losses import SPAN_LOSS, span_sums
from collate.views import at_least_float32


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

    formula = SPAN_LOSS

    def check(self, batch: Mapping[str, Tensor]) -> None:
        for name in ("start_positions", "end_positions"):
            check_label_ids(batch, name, None)

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
            logits = PerSequence(at_least_float32(logits_T2), packed.layout.lengths)
            sums = span_sums(logits.padded(), labels_N2, packed.layout.lengths)
        return self._output(
            packed,
            sums,
            denominators,
            logits=logits_T2,
            predictions=PerSequence(logits_T2.detach(), packed.layout.lengths),
            labels=None if labels_N2 is None else PerSequence(labels_N2),
        )
