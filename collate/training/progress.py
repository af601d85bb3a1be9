"""Counts and sums of training: sequences, tokens, packs and token slots that it has seen, and metrics for the log."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from collate.losses import lengths_by_slot
from collate.training.hooks import overrides_callback
from collate.training.order import ArrowRows, EvenedPacks
from packing import EpochPacks
from packing.source.token_column import chosen_rows, list_lengths


def count_packs(batch: Mapping[str, Tensor]) -> Tensor:
    """(4,) int64: sequences, real tokens, token slots of packs that hold any, and the sum of squared lengths.

    sequence_ids [[1, 1, 1, 2], [0, 0, 0, 0]]  ->  [2, 4, 4, 10]
    """
    lengths = lengths_by_slot(batch["sequence_ids"])
    slots_of_filled = (lengths.sum(1) > 0).sum() * batch["sequence_ids"].shape[1]
    return torch.stack([(lengths > 0).sum(), lengths.sum(), slots_of_filled, lengths.square().sum()])


class RunningSums:
    """A sum of 1-D statistics that stays on the device: adding does not wait for it."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        self.total = sums.detach().clone() if self.total is None else self.total + sums.detach()

    def take(self) -> Tensor:
        """The sum of what was added; the next one starts from nothing."""
        assert self.total is not None
        total, self.total = self.total, None
        return total


@overrides_callback
class PackingProgress(TrainerCallback, ExportableState):
    """What training has seen, over all ranks: sequences, tokens, packs that hold any, and the token slots of these.

    Trainer's state saves them, and what the last log had seen: an interval with a resume in it is whole.

    counts, logged: (4,) in that order, by now and by the last log.
    """

    def __init__(self, counts: Sequence[int] = (0, 0, 0, 0), logged: Sequence[int] = (0, 0, 0, 0)):
        self._start(counts, logged)

    def _start(self, counts: Sequence[int] = (0, 0, 0, 0), logged: Sequence[int] = (0, 0, 0, 0)) -> None:
        self._counts, self._logged = torch.tensor(counts), list(logged)
        self._sequences_before = counts[0]

    def add(self, counts: Tensor) -> None:
        """counts: (4,) of one optimizer step."""
        self._counts = self._counts.to(counts.device) + counts

    @property
    def in_this_run(self) -> int:
        """Sequences since training started or resumed."""
        return int(self._counts[0]) - self._sequences_before

    def since_last_log(self) -> dict[str, float]:
        """The packing efficiency since the last log; the next call counts from here."""
        now = self._counts.tolist()
        _, tokens, _, slots = (count - logged for count, logged in zip(now, self._logged, strict=True))
        self._logged = now
        return {"packing_efficiency": tokens / slots} if slots else {}

    def seen(self, steps: int) -> dict[str, float]:
        """For the log, over all steps so far: packing_factor is the realised one."""
        sequences, tokens, packs, _ = self._counts.tolist()
        seen = {"sequences_seen": sequences, "tokens_seen": tokens}
        if packs and steps:
            seen |= {"packing_factor": sequences / packs, "packs_per_step": packs / steps}
        return seen

    def state(self) -> dict:
        return {"args": {"counts": self._counts.tolist(), "logged": self._logged}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        is_resumed = state.global_step > 0 and isinstance(saved, dict)
        self._start(**saved["args"]) if is_resumed else self._start()


def count_sequences(dataset: Any) -> int | None:
    """How many sequences a dataset of packs holds; None where only reading all of it would tell.

    Each row that is not packed is one sequence.
    """
    while isinstance(dataset, EvenedPacks | ArrowRows):
        dataset = dataset.packs if isinstance(dataset, EvenedPacks) else dataset.dataset
    if isinstance(dataset, EpochPacks):
        return len(dataset.lengths)
    if not isinstance(dataset, datasets.Dataset):
        return None
    if "sequence_lengths" not in dataset.column_names:
        return len(dataset)
    return int(list_lengths(dataset.data.column("sequence_lengths"), chosen_rows(dataset)).sum())


def drop_figures_of_rows(metrics: dict[str, Any]) -> None:
    """Delete what Trainer computes as if a row were one sequence: FLOPs, and evaluation's forward passes per second."""
    for name in [name for name in metrics if name == "total_flos" or name.endswith("_steps_per_second")]:
        if name != "train_steps_per_second":
            del metrics[name]
