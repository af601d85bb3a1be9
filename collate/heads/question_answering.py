"""Answers that are spans of their own sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from collate.columns import ANSWERS
from collate.heads.batch import PackedBatch
from collate.heads.check import check_label_ids
from collate.heads.task import HeadRun, Task
from collate.heads.values import PerSequence
from collate.layout import PackLayout
from collate.losses import SPAN_LOSS, Batch, span_sums
from collate.views import at_least_float32


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Where in its own sequence an answer starts and ends: AutoModelForQuestionAnswering.

    Batch: start_positions and end_positions (B, S), counted from the sequence's own first token. The softmax runs over
    the tokens of one sequence. The loss is half the mean over sequences for the starts plus half that for the ends. A
    position outside of its sequence, such as -100, is in no mean. (Stock models read a negative one as 0, the [CLS].)

    logits: (T, 2) start and end of all real tokens; predictions: the same by sequence, and
    `predictions.padded()` is (N, longest, 2), filled with -inf. labels: (N, 2).
    """

    formula = SPAN_LOSS

    def check(self, batch: Batch) -> None:
        for name in ANSWERS:
            check_label_ids(batch, name, None)

    def run(self, model: nn.Module, packed: PackedBatch) -> HeadRun:
        self.check(packed.batch)
        output = packed.run(model, packed.layout.token_index)
        logits_T2 = torch.cat([output["start_logits"], output["end_logits"]], dim=1)
        lengths = packed.layout.lengths
        predictions = PerSequence(logits_T2.detach(), lengths)
        starts, ends = (packed.per_sequence(name) for name in ANSWERS)
        if starts is None or ends is None:
            return HeadRun(None, logits_T2, predictions)
        labels_N2 = torch.stack([starts, ends], dim=1)
        logits_NM2 = _side_by_side(at_least_float32(logits_T2), packed.layout)
        return HeadRun(span_sums(logits_NM2, labels_N2, lengths), logits_T2, predictions, PerSequence(labels_N2))


def _side_by_side(logits_T2: Tensor, layout: PackLayout) -> Tensor:
    """(N, M, 2), -inf behind a sequence's end."""
    longest = layout.table("longest", lambda layout: max(layout.lengths.tolist(), default=1))
    padded = logits_T2.new_full((layout.num_sequences, longest, 2), -torch.inf)
    return padded.index_put((layout.sequence_of_token, layout.positions_T), logits_T2)
