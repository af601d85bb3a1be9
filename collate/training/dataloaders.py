"""The dataloaders of a PackedTrainer: which packs they read, in which order, and how batches are checked."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import TrainingArguments, default_data_collator

from collate.collator import DataCollatorWithPacking
from collate.columns import COHORTS, LABELS
from collate.heads.check import CheckedCollator, check_inputs, embedding_sizes, refuse_text
from collate.training.checkpoints import what_is_saved
from collate.training.hooks import overrides_trainer
from collate.training.order import EMPTY_PACK, ArrowRows, EvenedPacks, SequencesPerStep, StepSampler
from collate.training.refused import refuse_torn_batches
from collate.training.resume import ResumesExactly
from collate.training.rounds import RoundSteps
from packing import EpochPacks, PackedInfo, packed_info
from packing.files.errors import Option, OptionError, whole_number

logger = logging.getLogger(__name__)

USUAL_WIDTH = 768
"""The width of a model that does not say it; packs are dealt by cost."""

KILLED = "DataLoader worker (pid"
"""How torch's message of a killed worker begins."""


@overrides_trainer
class LoadsPacks(ResumesExactly):
    """Part of a Trainer: every dataloader's collator knows its dataset, and all ranks get the same number of packs."""

    model: nn.Module
    data_collator: Any

    sequences_per_step: int | None = None
    task: Any
    _train_order: Sampler | None = None
    _packed_info: PackedInfo | None = None
    _source: Any = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with names_killed_workers(self.args):
            return super().train(*args, **kwargs)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> DataLoader:
        collator = self.data_collator
        self._refuse_dataset(dataset, description, is_training)
        self._packed_info, self._source = _packed_info(dataset), dataset
        packs: Any = dataset
        if isinstance(collator, DataCollatorWithPacking):
            self.data_collator = self._checked_collator(collator, dataset, is_training)
            if ArrowRows.can_hold(dataset):
                packs = ArrowRows(dataset)
        packs = self._evened(packs, batch_size, is_training, has_epochs=isinstance(dataset, EpochPacks))
        try:
            found = super()._get_dataloader(packs, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.data_collator = collator
        if isinstance(collator, DataCollatorWithPacking) and self.args.world_size > 1:
            refuse_torn_batches(collator if is_training else collator.for_prediction(), found)
        return found

    def _refuse_dataset(self, dataset: Any, description: str, is_training: bool) -> None:
        """Raise ValueError for a collator that knows nothing of packs, and for a dataset without a needed length."""
        collator = self.data_collator
        if collator is default_data_collator or type(collator).__module__.startswith("transformers."):
            name = getattr(collator, "__name__", type(collator).__name__)
            raise ValueError(
                f"{name} knows nothing of packs; give PackedTrainer data_collator=DataCollatorWithPacking(tokenizer, …)"
            )
        # an iterable dataset has lost its packing facts
        has_cohorts = is_training and COHORTS[1] in (getattr(_stored(dataset), "column_names", None) or ())
        if has_cohorts:
            refuse_torn_rounds(self.args)
        if _has_length(dataset):
            return
        if has_cohorts:
            raise ValueError(
                "the training dataset has cohorts and is iterable: its steps would span rounds; give a dataset with a "
                "length, or pack without cohorts"
            )
        if is_training and self.sequences_per_step is not None:
            raise OptionError(
                f"{Option('sequences_per_step', self.sequences_per_step)} chooses among all packs, which an iterable "
                "dataset does not have; use a dataset with a length, or leave it out"
            )
        if self.args.world_size > 1:
            raise ValueError(
                f"the {description} dataset is iterable: over {self.args.world_size} processes accelerate would "
                "repeat packs to even them out; use a dataset with a length"
            )

    def _checked_collator(self, collator: DataCollatorWithPacking, dataset: Any, is_training: bool) -> CheckedCollator:
        bound = self._bound(collator, dataset, is_training)
        if bound.masking_rule is None:
            refuse_text(dataset, ("labels", *LABELS), bound.columns)
        checked = CheckedCollator(bound, [partial(check_inputs, sizes=embedding_sizes(self.model)), self.task.check])
        if is_training and not hasattr(dataset, "__len__"):
            self._empty_batch = checked([EMPTY_PACK])
        return checked

    def _bound(self, collator: DataCollatorWithPacking, dataset: Any, is_training: bool) -> DataCollatorWithPacking:
        if _packed_info(dataset) is not None or collator.unpacked_rows is not None:
            collator = collator.for_dataset(dataset)
        return collator if is_training else collator.for_prediction()

    def _evened(self, packs: Any, batch_size: int, is_training: bool, has_epochs: bool) -> Any:
        """The packs, and as many empty ones as all ranks need to take equal numbers."""
        if not _has_length(packs):
            return packs
        taken_at_once = self.args.world_size * batch_size
        is_dropped = not is_training and self.args.dataloader_drop_last  # empty packs leave nothing to drop
        if self.args.world_size > 1 or is_dropped:
            return EvenedPacks(packs, taken_at_once)
        chooses_packs = self.sequences_per_step is not None or _has_cohorts(self._packed_info)
        if has_epochs or (is_training and chooses_packs):
            return EvenedPacks(packs, 1)  # it has no set_epoch, by which accelerate would restart evaluations
        return packs

    def _get_train_sampler(self, train_dataset=None):
        if _has_cohorts(self._packed_info):
            self._train_order = RoundSteps(
                self._source,
                self.sequences_per_step,
                **self._slots_of_step(),
                shuffle=self.args.train_sampling_strategy == "random",
            )
            return self._train_order
        if self.sequences_per_step is not None:
            self._train_order = self._order_by_sequences()
            return self._train_order
        if not hasattr(train_dataset, "__len__") or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        num_packs = train_dataset.num_packs if isinstance(train_dataset, EvenedPacks) else len(train_dataset)
        self._train_order = StepSampler(num_packs, self._balanced_packs(), self._order_seed, len(train_dataset))
        return self._train_order

    def _balanced_packs(self) -> int:
        """How many packs were balanced together; warns if forward passes take other numbers."""
        balance = None if self._packed_info is None else self._packed_info.balance
        if balance is None:
            return 1
        packs_per_pass = self.args.train_batch_size * self.args.world_size
        if packs_per_pass % balance:
            logger.warning(
                "the packs are balanced %d by %d, but a forward pass over all ranks takes %d; pack the dataset "
                "with balance=%d, or passes cost unequally",
                *(balance, balance, packs_per_pass, packs_per_pass),
            )
        return balance

    def _order_by_sequences(self) -> SequencesPerStep:
        if self._packed_info is None or self.sequences_per_step is None:
            given = Option("sequences_per_step", self.sequences_per_step)
            raise OptionError(
                f"{given} needs a train_dataset of pack_dataset, or EpochPacks, whose packs' depths are known; got "
                f"{type(self._source).__name__}"
            )
        return SequencesPerStep(self._source, self.sequences_per_step, **self._slots_of_step())

    def _slots_of_step(self) -> dict[str, int]:
        """The slots that a step has, and what decides the packs in them."""
        return {
            "packs_per_pass": self._train_batch_size,
            "passes": self.args.gradient_accumulation_steps,
            "ranks": self.args.world_size,
            "seed": self._order_seed,
            "width": getattr(getattr(self.model, "config", None), "hidden_size", None) or USUAL_WIDTH,
        }

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _remove_unused_columns(self, dataset, description=None):
        return dataset

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step.

        A dataset without a length may end within a step. Trainer then makes no step and carries the gradients over
        into the next epoch; here empty batches fill the step, so that the last batches get a step of their own.
        """
        batches, denominators = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and len(batches) < num_batches:
            batches += [self._empty_batch] * (num_batches - len(batches))
        return batches, denominators


@contextmanager
def names_killed_workers(args: TrainingArguments) -> Iterator[None]:
    """OSError in place of torch's RuntimeError: why a worker was killed, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(KILLED):
            raise
        raise OSError(
            f"{' '.join(str(error).split()).rstrip('.')}: something outside ended it, most often because memory ran "
            f"out; lower dataloader_num_workers={args.dataloader_num_workers} (with 0 this process makes the batches) "
            f"or dataloader_prefetch_factor, and resume; {what_is_saved(args.output_dir)}"
        ) from error


def refuse_torn_steps(args: TrainingArguments, sequences_per_step: int) -> None:
    """Raise ValueError for arguments that would tear the steps of sequences_per_step."""
    whole_number("sequences_per_step", sequences_per_step)
    for name, value, instead in (
        ("train_sampling_strategy", args.train_sampling_strategy, "random"),
        ("auto_find_batch_size", args.auto_find_batch_size, False),
        ("split_batches", getattr(args.accelerator_config, "split_batches", False), False),
    ):
        if value != instead:
            raise OptionError(
                f"{Option('sequences_per_step', sequences_per_step)} chooses the packs of each step, which "
                f"{Option(name, value)} would not keep together; set {Option(name, instead)}"
            )


def refuse_torn_rounds(args: TrainingArguments) -> None:
    """Raise ValueError for arguments that would tear the rounds of cohorts."""
    for name, value in (
        ("auto_find_batch_size", args.auto_find_batch_size),
        ("split_batches", getattr(args.accelerator_config, "split_batches", False)),
    ):
        if value:
            raise OptionError(
                f"{Option(name, value)} would tear the rounds of the packs' cohorts; set {Option(name, False)}, or "
                "pack without cohorts"
            )


def slots_per_pack(collator: Any, dataset: Any) -> int:
    """Token slots of a pack in a batch. Raises ValueError where neither collator nor dataset says how many."""
    info = _packed_info(dataset)
    if isinstance(collator, DataCollatorWithPacking):
        slots = (collator if info is None else collator.for_dataset(dataset)).pad_to
    else:
        slots = None if info is None else info.max_sequence_length
    if slots is None:
        raise ValueError(
            "tokens_per_pass needs to know how many token slots a pack has; give a train_dataset of pack_dataset or a "
            "collator with pad_to, or set per_device_train_batch_size instead"
        )
    return slots


def packs_per_pass(tokens_per_pass: int, slots_per_pack: int, given: int | None = None) -> int:
    """As many whole packs as one pass has room for: 65,536 tokens, 512 slots in a pack -> 128.

    given: per_device_train_batch_size, if the caller said it. Raises ValueError if it is another number, and for less
    than one pack.
    """
    whole_number("tokens_per_pass", tokens_per_pass)
    packs = tokens_per_pass // slots_per_pack
    if not packs:
        raise OptionError(
            f"{Option('tokens_per_pass', tokens_per_pass)} is less than the {slots_per_pack} token slots of one pack; "
            f"set it to {slots_per_pack} or more, or pack for a lower {Option('max_sequence_length')}"
        )
    if given not in (None, packs):
        raise OptionError(
            f"{Option('tokens_per_pass', tokens_per_pass)} is {packs} packs of {slots_per_pack} token slots, but "
            f"{Option('per_device_train_batch_size', given)} disagrees; leave out either"
        )
    return packs


def said_packs_per_pass(args: TrainingArguments) -> int | None:
    """per_device_train_batch_size; None for its default, which says nothing."""
    packs = args.per_device_train_batch_size
    return None if packs == type(args).per_device_train_batch_size else packs


def _has_length(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def _stored(dataset: Any) -> Any:
    return dataset.packed if isinstance(dataset, EpochPacks) else dataset


def _has_cohorts(info: PackedInfo | None) -> bool:
    return info is not None and info.cohort is not None


def _packed_info(dataset: Any) -> PackedInfo | None:
    """How the dataset was packed, if it says so."""
    try:
        return packed_info(dataset)
    except ValueError:
        return None
