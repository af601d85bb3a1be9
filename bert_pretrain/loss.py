"""Token losses + layout -> loss per sequence, with denominators that may span a whole optimizer step.

MLM, "sequence": the mean over sequences of the mean over each one's predicted tokens: the unpacked loss of
    "Packing: Towards 2x NLP BERT Acceleration" (arXiv 2107.02027, section 3.2.3): every sequence weighs the same.
MLM, "token": the mean over predicted tokens, as in the original BERT: longer sequences weigh more.
NSP: the mean over sequences that have a label.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MLM_LOSSES = ("sequence", "token")


class PretrainingSums(NamedTuple):
    """Additive statistics: summed over batches and ranks, they give every metric of a run exactly.

    Each is a scalar. `…_by_sequence` sums a mean per sequence, `…_by_token` sums over predicted tokens.
    """

    tokens: Tensor
    sequences: Tensor
    mlm_tokens: Tensor
    mlm_sequences: Tensor
    mlm_loss_by_token: Tensor
    mlm_loss_by_sequence: Tensor
    mlm_correct_by_token: Tensor
    mlm_correct_by_sequence: Tensor
    nsp_sequences: Tensor
    nsp_loss: Tensor
    nsp_correct: Tensor
    nsp_random: Tensor

    def loss(self, mlm_loss: str, denominators: Tensor | None = None) -> Tensor:
        """MLM plus NSP loss.

        denominators: (3,) predicted tokens, sequences with predicted tokens, sequences with an NSP label, counted
        over the whole optimizer step; None: over these sums alone. A denominator of 0 goes with a sum of 0.
        """
        if denominators is None:
            denominators = torch.stack([self.mlm_tokens, self.mlm_sequences, self.nsp_sequences])
        mlm_tokens, mlm_sequences, nsp_sequences = denominators.clamp(min=1).to(self.nsp_loss).unbind()
        if mlm_loss == "sequence":
            mlm = self.mlm_loss_by_sequence / mlm_sequences
        else:
            mlm = self.mlm_loss_by_token / mlm_tokens
        return mlm + self.nsp_loss / nsp_sequences

    def stacked(self) -> Tensor:
        """(12,) float64, detached; the order is that of the fields."""
        return torch.stack([value.detach().double() for value in self])


def pretraining_sums(layout, mlm_logits_PV, mlm_labels_P, mlm_sequence_P, nsp_logits_N2, nsp_labels_N):
    """The sums of one batch.

    P: predicted tokens; mlm_sequence_P: which sequence of the batch each belongs to; N: sequences with an NSP label.
    """
    loss_P = F.cross_entropy(mlm_logits_PV, mlm_labels_P, reduction="none")
    correct_P = (mlm_logits_PV.argmax(-1) == mlm_labels_P).to(loss_P.dtype)
    predicted_per_sequence = torch.bincount(mlm_sequence_P, minlength=layout.num_sequences)
    share_P = 1 / predicted_per_sequence.to(loss_P.dtype)[mlm_sequence_P]
    nsp_loss_N = F.cross_entropy(nsp_logits_N2, nsp_labels_N, reduction="none")

    def number(value) -> Tensor:
        return torch.as_tensor(value, dtype=loss_P.dtype, device=loss_P.device)

    return PretrainingSums(
        tokens=number(layout.num_tokens),
        sequences=number(layout.num_sequences),
        mlm_tokens=number(len(mlm_labels_P)),
        mlm_sequences=number((predicted_per_sequence > 0).sum()),
        mlm_loss_by_token=loss_P.sum(),
        mlm_loss_by_sequence=(loss_P * share_P).sum(),
        mlm_correct_by_token=correct_P.sum(),
        mlm_correct_by_sequence=(correct_P * share_P).sum(),
        nsp_sequences=number(len(nsp_labels_N)),
        nsp_loss=nsp_loss_N.sum(),
        nsp_correct=(nsp_logits_N2.argmax(-1) == nsp_labels_N).to(loss_P.dtype).sum(),
        nsp_random=nsp_labels_N.to(loss_P.dtype).sum(),
    )


def pretraining_metrics(stacked: Tensor, mlm_loss: str) -> dict[str, float]:
    """What the sums mean. NSP accuracy stands beside that of always answering the more frequent label.

    `loss` is there for evaluation; a metric whose count is 0 (no NSP in this dataset, say) is left out.
    """
    sums = PretrainingSums(*stacked)
    metrics = {"loss": float(sums.loss(mlm_loss))}
    if sums.mlm_sequences > 0:
        metrics |= {
            "mlm_loss_per_sequence": float(sums.mlm_loss_by_sequence / sums.mlm_sequences),
            "mlm_loss_per_token": float(sums.mlm_loss_by_token / sums.mlm_tokens),
            "mlm_accuracy_per_sequence": float(sums.mlm_correct_by_sequence / sums.mlm_sequences),
            "mlm_accuracy_per_token": float(sums.mlm_correct_by_token / sums.mlm_tokens),
        }
    if sums.nsp_sequences > 0:
        random_share = float(sums.nsp_random / sums.nsp_sequences)
        metrics |= {
            "nsp_loss": float(sums.nsp_loss / sums.nsp_sequences),
            "nsp_accuracy": float(sums.nsp_correct / sums.nsp_sequences),
            "nsp_majority": max(random_share, 1 - random_share),
        }
    return metrics | {"tokens": int(sums.tokens), "sequences": int(sums.sequences)}
