"""Masked language modelling in numbers: sums that add up over batches and ranks, and what they mean.

"sequence"   the mean over sequences of the mean over each one's predicted tokens: every sequence weighs the same, as
             without packing in "Packing: Towards 2x NLP BERT Acceleration" (arXiv 2107.02027, section 3.2.3)
"token"      the mean over predicted tokens, as in the original BERT: longer sequences weigh more
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

MLM_LOSSES = ("sequence", "token")
MLM_SUMS = (
    *("mlm_tokens", "mlm_sequences", "mlm_loss_by_token", "mlm_loss_by_sequence"),
    *("mlm_correct_by_token", "mlm_correct_by_sequence"),
)
"""`…_by_token` sums over predicted tokens, `…_by_sequence` a mean per sequence over sequences that have any."""


def mlm_sums(logits_PV: Tensor, labels_P: Tensor, sequence_P: Tensor, lengths_N: Tensor) -> dict[str, Tensor]:
    """MLM_SUMS of the P predicted tokens of a batch.

    sequence_P: which of N sequences each is of; lengths_N: how many each sequence has.
    """
    loss_P = F.cross_entropy(logits_PV, labels_P, reduction="none")
    correct_P = (logits_PV.argmax(-1) == labels_P).to(loss_P.dtype)
    share_P = 1 / lengths_N.to(loss_P.dtype)[sequence_P]
    return {
        "mlm_tokens": lengths_N.sum(),
        "mlm_sequences": (lengths_N > 0).sum(),
        "mlm_loss_by_token": loss_P.sum(),
        "mlm_loss_by_sequence": (loss_P * share_P).sum(),
        "mlm_correct_by_token": correct_P.sum(),
        "mlm_correct_by_sequence": (correct_P * share_P).sum(),
    }


def check_mlm_loss(name: str) -> None:
    """Raise ValueError for a name that is not in MLM_LOSSES."""
    if name not in MLM_LOSSES:
        raise ValueError(f"unknown mlm_loss {name!r}; choose from {list(MLM_LOSSES)}")


def mlm_loss_of(sums: Mapping[str, Tensor], name: str, tokens: Tensor, sequences: Tensor) -> Tensor:
    """The loss of that name, divided by so many predicted tokens, or sequences with any; a count of 0 goes with 0."""
    total, count = (
        (sums["mlm_loss_by_sequence"], sequences) if name == "sequence" else (sums["mlm_loss_by_token"], tokens)
    )
    return total / count.clamp(min=1).to(total)


def mlm_metrics(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both losses and accuracies; nothing where no token was predicted."""
    if not sums["mlm_tokens"] > 0:
        return {}
    return {
        f"mlm_{what}_per_{unit}": sums[f"mlm_{summed}_by_{unit}"] / sums[f"mlm_{unit}s"]
        for what, summed in (("loss", "loss"), ("accuracy", "correct"))
        for unit in ("sequence", "token")
    }
