"""What evaluation and prediction collect over batches and ranks: sums, and predictions in the dataset's order."""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from collate.columns import IGNORED
from collate.heads import PerSequence


class RunningSums:
    """A float64 sum of 1-D statistics that stays on the device: adding does not wait for it."""

    def __init__(self):
        self.total: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        self.total = sums.detach().clone() if self.total is None else self.total + sums.detach()

    def take(self) -> Tensor:
        total, self.total = self.total, None
        return total


class Predictions:
    """Predictions and labels of all sequences, in the order of the dataset that was packed."""

    def __init__(self):
        self.batches: list[tuple[PerSequence, PerSequence | None, np.ndarray | None]] = []

    def add(self, outputs, batch: Mapping[str, Tensor]) -> None:
        """One batch; its sequences are known by their row in the source, and where in it they begin."""
        if getattr(outputs, "predictions", None) is None:
            raise ValueError(
                "a model with a loss of its own has no predictions per sequence; evaluate() gives metrics, and the "
                "model itself logits"
            )
        is_sequence = batch["cls_positions"] >= 0
        if not is_sequence.any():  # empty packs have none of the dataset's columns, labels and indices among them
            return
        names = [name for name in ("sequence_indices", "sequence_starts") if name in batch]
        names = names if "sequence_indices" in names else []  # packs of a stream: their order is that of its packs
        keys = torch.stack([batch[name][is_sequence] for name in names], 1).cpu().numpy() if names else None
        labels = None if outputs.labels is None else _on_cpu(outputs.labels)
        self.batches.append((_on_cpu(outputs.predictions), labels, keys))

    def gathered(self, num_processes: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(N, …) each; what is ragged is padded: logits with -inf, labels with -100."""
        batches = self.batches
        if num_processes > 1:  # the ranks take turns: for rows without indices this is their order
            turns = itertools.zip_longest(*gather_object([batches]))
            batches = [batch for turn in turns for batch in turn if batch is not None]
        predictions, labels, keys = zip(*batches, strict=True)
        predictions = PerSequence.concatenate(predictions)
        labels = None if labels[0] is None else PerSequence.concatenate(labels)
        if keys[0] is not None:
            keys = np.concatenate(keys)
            if len(np.unique(keys, axis=0)) < len(keys):
                raise ValueError(
                    "several sequences have the same sequence_indices, so predictions have no order: packed datasets "
                    "were concatenated; predict on each, or concatenate the sources and pack them together"
                )
            order = torch.from_numpy(np.lexsort(keys.T[::-1]))
            predictions = predictions.take(order)
            labels = None if labels is None else labels.take(order)
        ragged = float("-inf") if predictions.values.is_floating_point() else IGNORED
        return predictions.padded(ragged).numpy(), None if labels is None else labels.padded(IGNORED).numpy()


def _on_cpu(values: PerSequence) -> PerSequence:
    return PerSequence(values.values.cpu(), None if values.lengths is None else values.lengths.cpu())
