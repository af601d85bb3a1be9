"""Token losses + layout -> loss per sequence, with denominators that may span a whole optimizer step.

MLM: by sequence or by token, see collate.losses.
NSP or SOP: the mean over sequences that have a label of their pair. Which of the two it is, the labels' column says.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.losses import mlm_loss_of, mlm_metrics, mlm_sums


class PretrainingSums(NamedTuple):
    """Additive statistics: summed over batches and ranks, they give every metric of a run exactly.

    Each is a scalar. `mlm_…` are those of collate.losses, `pair_…` sums over sequences with a label of their pair;
    sop_sequences are those of them whose label is the sentences' order.
    """

    tokens: Tensor
    sequences: Tensor
    mlm_tokens: Tensor
    mlm_sequences: Tensor
    mlm_loss_by_token: Tensor
    mlm_loss_by_sequence: Tensor
    mlm_correct_by_token: Tensor
    mlm_correct_by_sequence: Tensor
    pair_sequences: Tensor
    pair_loss: Tensor
    pair_correct: Tensor
    pair_ones: Tensor
    sop_sequences: Tensor

    def loss(self, mlm_loss: str, denominators: Tensor | None = None) -> Tensor:
        """MLM loss plus that of sentence pairs.

        denominators: (3,) predicted tokens, sequences with predicted tokens, sequences with a label of their pair,
        counted over the whole optimizer step; None: over these sums alone. A denominator of 0 goes with a sum of 0.
        """
        if denominators is None:
            denominators = torch.stack([self.mlm_tokens, self.mlm_sequences, self.pair_sequences])
        tokens, sequences, pair_sequences = denominators.unbind()
        mlm = mlm_loss_of(self._asdict(), mlm_loss, tokens, sequences)
        return mlm + self.pair_loss / pair_sequences.clamp(min=1).to(self.pair_loss)

    def stacked(self) -> Tensor:
        """(13,) float64, detached; the order is that of the fields."""
        return torch.stack([value.detach().double() for value in self])


def pretraining_sums(layout, mlm_logits_PV, mlm_labels_P, mlm_sequence_P, pair_logits_N2, pair_labels_N, objective):
    """The sums of one batch.

    P: predicted tokens; mlm_sequence_P: which sequence of the batch each belongs to; N: sequences with a label of their
    pair; objective: "nsp" or "sop", what that label means.
    """
    predicted_N = torch.bincount(mlm_sequence_P, minlength=layout.num_sequences)
    mlm = mlm_sums(mlm_logits_PV, mlm_labels_P, mlm_sequence_P, predicted_N)
    pair_loss_N = F.cross_entropy(pair_logits_N2, pair_labels_N, reduction="none")

    def number(value) -> Tensor:
        return torch.as_tensor(value, dtype=mlm_logits_PV.dtype, device=mlm_logits_PV.device)

    return PretrainingSums(
        tokens=number(layout.num_tokens),
        sequences=number(layout.num_sequences),
        **{name: number(value) for name, value in mlm.items()},
        pair_sequences=number(len(pair_labels_N)),
        pair_loss=pair_loss_N.sum(),
        pair_correct=number((pair_logits_N2.argmax(-1) == pair_labels_N).sum()),
        pair_ones=number(pair_labels_N.sum()),
        sop_sequences=number(len(pair_labels_N) if objective == "sop" else 0),
    )


def pretraining_metrics(stacked: Tensor, mlm_loss: str) -> dict[str, float]:
    """What the sums mean. NSP or SOP accuracy stands beside that of always answering the more frequent label.

    `loss` is there for evaluation; a metric whose count is 0 (no NSP in this dataset, say) is left out, and so is the
    loss where nothing at all has a label.
    Raises ValueError for sums over both NSP and SOP, whose accuracies cannot be told apart any more.
    """
    sums = PretrainingSums(*stacked)
    has_labels = sums.mlm_tokens > 0 or sums.pair_sequences > 0
    metrics = {"loss": float(sums.loss(mlm_loss))} if has_labels else {}
    metrics |= {name: float(value) for name, value in mlm_metrics(sums._asdict()).items()}
    if sums.pair_sequences > 0:
        if 0 < sums.sop_sequences < sums.pair_sequences:
            raise ValueError(
                f"{int(sums.sop_sequences)} of {int(sums.pair_sequences)} labelled sequences have a "
                "sentence_order_label, the others a next_sentence_label; evaluate them apart"
            )
        name = "sop" if sums.sop_sequences > 0 else "nsp"
        ones_share = float(sums.pair_ones / sums.pair_sequences)
        metrics |= {
            f"{name}_loss": float(sums.pair_loss / sums.pair_sequences),
            f"{name}_accuracy": float(sums.pair_correct / sums.pair_sequences),
            f"{name}_majority": max(ones_share, 1 - ones_share),
        }
    return metrics | {"tokens": int(sums.tokens), "sequences": int(sums.sequences)}
