"""Vectors of sequences, for inference."""

from dataclasses import dataclass

from torch import Tensor, nn

from collate.heads.batch import PackedBatch
from collate.heads.task import HeadRun, Task
from collate.heads.values import PerSequence
from collate.losses import NO_LOSS, Batch
from packing.files.errors import check_known


@dataclass(frozen=True, kw_only=True)
class SequenceEmbedding(Task):
    """A vector for each sequence: encoders without a head, such as AutoModel gives. For inference: there is no loss.

    pooling: "cls", the hidden state of the sequence's [CLS]; or "mean", that of all its tokens.
    logits and predictions: (N, D).
    """

    pooling: str = "cls"
    formula = NO_LOSS

    def __post_init__(self) -> None:
        check_known("pooling", self.pooling, ("cls", "mean"))

    def weight(self, batch: Batch) -> Tensor:
        return batch["sequence_ids"].amax(1).sum()  # its sequences

    def targets(self, packed: PackedBatch) -> dict[str, Tensor]:
        return packed.labels_by(packed.per_sequence)

    def run(self, model: nn.Module, packed: PackedBatch) -> HeadRun:
        if self.pooling == "cls":
            slots, lengths = packed.cls_slots, None
        else:
            slots, lengths = packed.layout.token_index, packed.layout.lengths
        vectors_ND = packed.run(model, slots, head_lengths=lengths)["last_hidden_state"].squeeze(1)
        return HeadRun(None, vectors_ND, PerSequence(vectors_ND.detach()))
