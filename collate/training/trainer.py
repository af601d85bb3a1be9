"""PackedTrainer: what transformers' Trainer cannot know about packs.

A row is several sequences here, and the number of sequences and of predicted tokens differs from batch to batch. So a
mean per micro-batch, which is what Trainer averages, weights sequences unequally (and stock BERT losses are wrong under
accumulation besides: huggingface/transformers#47688). PackedTrainer counts what a loss is divided by over the whole
optimizer step, all micro-batches and all ranks, before the first forward pass: the result then depends neither on
packing, nor on accumulation, nor on the number of processes. (Dropout does: each forward pass draws for its own rows.)

What is counted, and what the loss is, a task says (collate.heads): for stock models of transformers it is found by
their class. A model with a loss of its own says so by

    forward(**batch, denominators=Tensor(3)) -> output.loss, divided by these instead of by the batch's own counts
    output.sums                              -> 1-D tensor of additive statistics
    metrics(sums) -> dict[str, float]        -> what they mean, for the log: "loss", "sequences", "tokens" and others
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    default_compute_objective,
    denumpify_detensorize,
)

from collate.collator import LABELS, DataCollatorWithPacking
from collate.columns import IGNORED
from collate.heads import PAIR_LABELS, prepare_head, task_for
from collate.heads.check import CheckedCollator, check_inputs, check_label_ids, embedding_sizes, refuse_text
from collate.layout import PADDING
from collate.rows import ArrowRows
from collate.training.order import SequencesPerStep, check_sequences_per_step
from collate.training.own_loss import SeenModel, has_sequences, loss_by
from collate.training.plain_trainer import SetEpoch, check_forward, check_model
from collate.training.predictions import Predictions, RunningSums
from collate.training.refused import refuse_arguments
from collate.training.resume import ResumesExactly
from collate.training.workers import names_killed_workers
from packing import EpochPacks, PackedInfo, packed_info

logger = logging.getLogger(__name__)

COUNTED_PACKS = 10_000  # at a time
EMPTY_PACK = {"input_ids": [], "sequence_lengths": []}
"""A row without any sequence: no loss, no denominator, no gradient."""


def count_denominators(batch: dict[str, Tensor]) -> Tensor:
    """(3,) int64: predicted tokens, sequences with predicted tokens, and sequences with a label of their sentence pair.

    labels [[-100, 7, 8, -100]], sequence_ids [[1, 1, 1, 2]], next_sentence_label [[0, 1]]  ->  [2, 1, 2]
    """
    sequence_ids_BL = batch["sequence_ids"].long()
    zero = sequence_ids_BL.new_zeros(())
    mlm_tokens = mlm_sequences = pair_sequences = zero
    if "labels" in batch:
        predicted_BL = (batch["labels"] != IGNORED) & (sequence_ids_BL != PADDING)
        # a pack of L slots has at most L sequences: a fixed shape, so that a GPU need not be waited for
        hits = sequence_ids_BL.new_zeros(len(sequence_ids_BL), sequence_ids_BL.shape[1] + 1)
        hits.scatter_add_(1, sequence_ids_BL, predicted_BL.long())
        mlm_tokens, mlm_sequences = predicted_BL.sum(), (hits > 0).sum()
    for name in PAIR_LABELS.keys() & batch.keys():  # one of them: a model refuses both
        pair_sequences = pair_sequences + (batch[name] != IGNORED).sum()
    return torch.stack([mlm_tokens, mlm_sequences, pair_sequences])


def count_packs(batch: dict[str, Tensor]) -> Tensor:
    """(4,) int64: sequences, real tokens, token slots of packs that hold any, and the sum of squared lengths.

    sequence_ids [[1, 1, 1, 2], [0, 0, 0, 0]]  ->  [2, 4, 4, 10]
    """
    sequence_ids_BL = batch["sequence_ids"].long()
    packs, slots = sequence_ids_BL.shape
    lengths = sequence_ids_BL.new_zeros(packs, slots + 1).scatter_add_(
        1, sequence_ids_BL, torch.ones_like(sequence_ids_BL)
    )[:, 1:]
    is_filled = lengths.sum(1) > 0
    return torch.stack([(lengths > 0).sum(), lengths.sum(), is_filled.sum() * slots, lengths.square().sum()])


class PackedTrainer(ResumesExactly, Trainer):
    """`transformers.Trainer` for packed datasets: stock models and their heads, or models with a loss of their own.

    Differences to Trainer, each of which is needed for exactness:
    * stock models are isolated, and their heads run on sequences, not on rows: see collate.heads;
    * every loss is divided by counts over the optimizer step, all ranks;
    * columns are kept, whatever `remove_unused_columns` says: the collator needs `sequence_lengths`;
    * the collator learns L and S from the packed dataset, so that all batches have one shape, and where positions begin
      from the model;
    * training masks change with the epoch, evaluation masks never do;
    * with several ranks the packs are evened out by *empty* packs, where accelerate would repeat some;
    * packs are shuffled by (seed, epoch) alone, so that a step has the same packs on any number of processes;
    * evaluation adds up sums over all packs and ranks, so that it equals evaluation on the unpacked sequences;
    * `predict`, and `compute_metrics`, have one row per sequence, in the order of the dataset that was packed;
    * a step has a constant number of packs, gradient_accumulation_steps x ranks x per_device_train_batch_size, or with
      `sequences_per_step` a constant number of sequences in at most so many packs: see collate.training.order;
    * packs that were balanced (pack_dataset(balance=N)) are shuffled by whole steps, which stay balanced; with
      `sequences_per_step` the packs of each step are dealt to passes and ranks by cost, whatever their order was;
    * a train_dataset of EpochPacks is told each epoch;
    * tokens seen are real tokens; logs have the task's metrics beside the loss.

    task: what the head is trained for, `collate.heads`; None: found by the model's class.
    sequences_per_step: sequences per optimizer step, over all ranks, the last step of an epoch excepted; None: as many
        as the packs of a step hold.

    A subclass may override compute_loss: it is used in evaluation, too, and is given a row per label, see
    collate.training.own_loss. Then evaluation averages the losses of batches by their labels.

    What it cannot honour it refuses with a ValueError: models that cannot be isolated, a class with a forward (and so
    perhaps a loss) of its own unless `task` is given, transformers' own collators, nn.DataParallel (it splits packs
    without their counts), iterable datasets over several ranks (accelerate would repeat packs), compute_loss_func,
    prediction_step, the arguments in collate.training.refused, and labels and ids that the model has no place for.
    """

    def __init__(self, *args, task=None, sequences_per_step: int | None = None, **kwargs):
        self._given_task, self.sequences_per_step = task, sequences_per_step
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        self.task = self._find_task(self.model)
        self._refuse_metrics_of_own_loss()
        self._train_sums = RunningSums()
        self._train_order: Sampler | None = None
        self._no_objective = {"num_input_tokens_seen"}  # which Trainer.log adds; evaluations add ours
        self._progress = PackingProgress()
        self.add_callback(self._progress)
        # Either alone is enough in transformers 5.23; the first is newer, the second is read by other code, too.
        # compute_loss divides by the step's counts, and Trainer must not divide again; an override may say otherwise
        self.loss_is_scaled_for_ga = self._override is None or self.loss_is_scaled_for_ga is not False
        self.model_accepts_loss_kwargs = True  # so that the step's counts reach compute_loss
        if isinstance(self.data_collator, DataCollatorWithPacking):
            self.data_collator = self.data_collator.for_model(self.model)
            check_model(self.data_collator, self.model)
        self.add_callback(SetEpoch(self))

    def set_epoch(self, epoch: int) -> None:
        """Other masks, another order. Trainer itself loses the order's epoch when it resumes over several ranks."""
        for part in (self.data_collator, self._train_order, self.train_dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def _refuse_unsupported(self) -> None:
        refuse_arguments(self.args, "PackedTrainer")
        for name in ("compute_loss_func", "preprocess_logits_for_metrics"):
            if getattr(self, name) is not None:
                raise ValueError(f"PackedTrainer cannot honour {name}={getattr(self, name)!r}; leave it out")
        if type(self).prediction_step is not Trainer.prediction_step:
            raise ValueError(
                f"{type(self).__name__}.prediction_step would never be called: evaluation adds up sums over packs; "
                "override compute_loss, or give a task"
            )
        if self.sequences_per_step is not None:
            self._refuse_other_steps()

    def _refuse_other_steps(self) -> None:
        """Settings that would tear the steps of sequences_per_step."""
        check_sequences_per_step(self.sequences_per_step)
        for name, value, instead in (
            ("train_sampling_strategy", self.args.train_sampling_strategy, "random"),
            ("auto_find_batch_size", self.args.auto_find_batch_size, False),
            ("split_batches", self.args.accelerator_config.split_batches, False),
        ):
            if value != instead:
                raise ValueError(
                    f"sequences_per_step={self.sequences_per_step} chooses the packs of each step, which "
                    f"{name}={value!r} would not keep together; set {name}={instead!r}"
                )

    def _find_task(self, model: nn.Module):
        """The task of a model; stock models are isolated, and their heads prepared."""
        if _has_own_loss(model):
            return _OwnLoss(model)
        if self._given_task is None:
            check_forward(model)
        found = task_for(model) if self._given_task is None else self._given_task
        if self._given_task is not None:
            prepare_head(model)
        return found

    def _refuse_metrics_of_own_loss(self) -> None:
        if not isinstance(self.task, _OwnLoss):
            return
        for name, value in (("task", self._given_task), ("compute_metrics", self.compute_metrics)):
            if value is not None:
                raise ValueError(
                    f"PackedTrainer cannot honour {name}={value!r}: {type(self.model).__name__} has a loss and metrics "
                    "of its own; leave it out"
                )

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        """The default objective is Trainer's: the loss, or with metrics of the user's the sum of these."""
        if compute_objective is None:
            compute_objective = self._default_objective
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    def _default_objective(self, metrics: dict[str, float]) -> float:
        """Of what evaluate() returned, without the metrics that are counts, or that only PackedTrainer has."""
        kept = {k: v for k, v in metrics.items() if k not in self._no_objective and not _is_memory(k)}
        objective = default_compute_objective(kept)
        if objective is None:
            raise ValueError(
                f"hyperparameter_search has no objective: evaluation gives no eval_loss, only {sorted(metrics)}; give "
                "the evaluation set labels, or hyperparameter_search a compute_objective"
            )
        return objective

    def _hp_search_setup(self, trial) -> None:
        super()._hp_search_setup(trial)
        refuse_arguments(self.args, "PackedTrainer")  # a trial may have set them

    def call_model_init(self, trial=None):
        """A model of hyperparameter search is prepared like the first."""
        model = super().call_model_init(trial)
        self.task = self._find_task(model)
        return model

    # -- data ----------------------------------------------------------------------------------------------------

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        """Every dataloader, of training, evaluation and prediction: bind the collator to its dataset, and even out the
        packs."""
        collator, packs = self.data_collator, dataset
        if collator is default_data_collator or type(collator).__module__.startswith("transformers."):
            name = getattr(collator, "__name__", type(collator).__name__)
            raise ValueError(
                f"{name} knows nothing of packs; give PackedTrainer data_collator=DataCollatorWithPacking(tokenizer, …)"
            )
        if isinstance(collator, DataCollatorWithPacking):
            bound = self._bound_collator(collator, dataset, is_training)
            if bound.masking_rule is None:
                refuse_text(dataset, ("labels", *LABELS), bound.columns)
            checks = [partial(check_inputs, sizes=embedding_sizes(self.model)), self.task.check]
            self.data_collator = CheckedCollator(bound, checks)
            if is_training and not hasattr(dataset, "__len__"):
                self._empty_batch = self.data_collator([EMPTY_PACK])
            if ArrowRows.can_hold(dataset):
                packs = ArrowRows(dataset)
        has_length = hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
        if is_training and self.sequences_per_step is not None and not has_length:
            raise ValueError(
                f"sequences_per_step={self.sequences_per_step} chooses among all packs, which an iterable dataset does "
                "not have; use a dataset with a length, or leave it out"
            )
        if self.args.world_size > 1:
            if not has_length:
                raise ValueError(
                    f"the {description} dataset is iterable: over {self.args.world_size} processes accelerate would "
                    "repeat packs to even them out; use a dataset with a length"
                )
            packs = EvenedPacks(packs, self.args.world_size * batch_size)
        elif isinstance(dataset, EpochPacks) or (is_training and self.sequences_per_step is not None):
            packs = EvenedPacks(packs, 1)  # without a set_epoch, by which accelerate would begin each evaluation anew
        if not is_training and self.args.dataloader_drop_last and hasattr(packs, "__len__"):
            packs = EvenedPacks(packs, self.args.world_size * batch_size)  # nothing is left over to be dropped
        self._packed_info, self._source = _packed_info(dataset), dataset
        try:
            return super()._get_dataloader(packs, description, batch_size, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def _bound_collator(self, collator: DataCollatorWithPacking, dataset, is_training: bool) -> DataCollatorWithPacking:
        if _packed_info(dataset) is not None or collator.unpacked_rows is not None:
            collator = collator.for_dataset(dataset)
        return collator if is_training else collator.for_prediction()

    def _get_train_sampler(self, train_dataset=None):
        if self.sequences_per_step is not None:
            self._train_order = self._order_by_sequences()
            return self._train_order
        if not hasattr(train_dataset, "__len__") or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        info, packs_per_step = self._packed_info, 1
        if info is not None and info.balance is not None:
            packs_per_step = info.balance
            packs_per_pass = self.args.train_batch_size * self.args.world_size
            if packs_per_pass % packs_per_step:
                logger.warning(
                    "the packs are balanced %d by %d, but a forward pass over all ranks takes %d; pack the dataset "
                    "with balance=%d, or passes cost unequally",
                    *(packs_per_step, packs_per_step, packs_per_pass, packs_per_pass),
                )
        num_packs = train_dataset.num_packs if isinstance(train_dataset, EvenedPacks) else len(train_dataset)
        self._train_order = StepSampler(num_packs, packs_per_step, self._order_seed, len(train_dataset))
        return self._train_order

    def _order_by_sequences(self) -> SequencesPerStep:
        if self._packed_info is None:
            raise ValueError(
                f"sequences_per_step={self.sequences_per_step} needs a train_dataset of pack_dataset, or EpochPacks, "
                f"whose packs' depths are known; got {type(self._source).__name__}"
            )
        return SequencesPerStep(
            self._source,
            self.sequences_per_step,
            packs_per_pass=self._train_batch_size,
            passes=self.args.gradient_accumulation_steps,
            ranks=self.args.world_size,
            seed=self._order_seed,
            width=getattr(getattr(self.model, "config", None), "hidden_size", None) or 768,
        )

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _remove_unused_columns(self, dataset, description=None):
        return dataset

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator

    # -- loss ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step.

        A dataset without a length may end within a step. Trainer then makes no step and lets the gradients run over
        into the next epoch; with empty batches beside them the last ones get a step of their own.
        """
        batches, denominators = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and len(batches) < num_batches:
            batches += [self._empty_batch] * (num_batches - len(batches))
        return batches, denominators

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """(k,) the denominators of one optimizer step: over its micro-batches and all ranks."""
        if not batch_samples:  # a dataset without a length has ended
            return None
        counts = None
        for batch in batch_samples:
            filled = (batch["sequence_ids"] != PADDING).any(1).sum()
            of_batch = torch.cat([count_packs(batch), filled[None], self.task.count(batch)]).to(device)
            counts = of_batch if counts is None else counts + of_batch
        counts = self.accelerator.reduce(counts, "sum")
        self._progress.add(counts[[0, 1, 4, 2]])
        self._step_counted(counts[:4], counts[5:])
        return counts[5:]

    def _step_counted(self, packs: Tensor, denominators: Tensor) -> None:
        """One optimizer step, over all ranks: for trainers that measure. packs: see count_packs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """An override is used in training and in evaluation; what it is given says collate.training.own_loss."""
        if isinstance(model, SeenModel):
            denominators = None if num_items_in_batch is None else model.denominators
            outputs, ranks = self.task(model.model, model.restored(inputs), denominators), model.ranks
            model.output, model.is_counted = outputs, denominators is not None
        else:
            outputs, ranks = self.task(model, inputs, num_items_in_batch), self.accelerator.num_processes
            self._train_sums.add(outputs.sums)
        # DDP and FSDP average gradients over ranks, but the loss is already divided by all ranks' counts
        loss = outputs.loss * ranks
        return (loss, outputs) if return_outputs else loss

    @property
    def _override(self):
        """A compute_loss other than that of this class: a subclass's, or one that was set on this object."""
        is_own = getattr(self.compute_loss, "__func__", None) is PackedTrainer.compute_loss
        return None if is_own else self.compute_loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        override = self._override
        if override is None:
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            # the mean of nothing would be no number, and the loss of a model of one's own is none
            if not isinstance(self.task, _OwnLoss) and not has_sequences(inputs):
                return PackedTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
            seen = SeenModel(self.task, model, inputs, num_items_in_batch, self.accelerator.num_processes)
            loss = loss_by(override, seen, type(self).__name__, self._passes_must_be_counted)
            if seen.output is not None:
                self._train_sums.add(seen.output.sums)
            return loss

        replaced = self.__dict__.get("compute_loss")
        self.compute_loss = compute_loss
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            del self.compute_loss
            if replaced is not None:
                self.compute_loss = replaced

    @property
    def _passes_must_be_counted(self) -> bool:
        is_said = getattr(type(self), "loss_is_scaled_for_ga", None) is not None or not self.loss_is_scaled_for_ga
        return self.args.gradient_accumulation_steps * self.args.world_size > 1 and not is_said

    # -- log -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._train_sums.total is not None:
            metrics = self.task.metrics(self.accelerator.reduce(self._train_sums.take(), "sum").cpu())
            del metrics["sequences"], metrics["tokens"]  # since the last log; of interest is how many there were in all
            logs = metrics | self._progress.seen(self.state.global_step) | self._progress.since_last_log() | logs
        if logs.get("train_runtime"):  # Trainer's samples are packs
            logs["train_samples_per_second"] = round(self._progress.in_this_run / logs["train_runtime"], 3)
        _drop_figures_of_rows(logs)
        super().log(logs, start_time)

    def num_examples(self, dataloader) -> int:
        """Sequences, as in every figure of samples."""
        counted = count_sequences(getattr(dataloader, "dataset", None))
        return super().num_examples(dataloader) if counted is None else counted

    def evaluate(self, *args, **kwargs):
        with names_killed_workers(self.args):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with names_killed_workers(self.args):
            output = super().predict(*args, **kwargs)
        _drop_figures_of_rows(output.metrics)
        return output

    def floating_point_ops(self, inputs) -> int:
        """Not counted: Trainer would take padding for tokens."""
        return 0

    def _track_num_input_tokens(self, inputs):
        if self.args.include_num_input_tokens_seen == "no":
            return
        tokens = (inputs["sequence_ids"] != PADDING).sum().to(self.args.device)
        self.state.num_input_tokens_seen += self.accelerator.gather(tokens).sum().item()

    # -- evaluation and prediction -------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Sums over the whole evaluation set, then one division: a deep pack weighs what its sequences weigh."""
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models:  # evaluation without training before it
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        sums, losses = RunningSums(), RunningSums()
        collected = None if prediction_loss_only else Predictions()
        for inputs in dataloader:
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs, loss_and_weight = self._evaluated(model, self._prepare_inputs(inputs))
            sums.add(outputs.sums)
            losses.add(loss_and_weight)
            if collected is not None:
                collected.add(outputs, inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        if sums.total is None:
            raise ValueError(f"{description}: the dataset has no packs; give an evaluation set with at least one")
        metrics = self.task.metrics(self.accelerator.reduce(sums.take(), "sum").cpu())
        if self._override is not None:
            metrics = _with_loss(metrics, *self.accelerator.reduce(losses.take(), "sum").tolist())
        predictions, labels = (None, None) if collected is None else collected.gathered(self.args.world_size)
        users = {}
        if self.compute_metrics is not None and labels is not None:
            given = self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=labels))
            users = _prefixed(denumpify_detensorize(given), metric_key_prefix)
        own = _prefixed(metrics, metric_key_prefix)
        self._no_objective |= own.keys() - {f"{metric_key_prefix}_loss"}
        self._no_objective -= users.keys()
        return EvalLoopOutput(
            predictions=predictions, label_ids=labels, metrics=own | users, num_samples=metrics["sequences"]
        )

    def _evaluated(self, model: nn.Module, inputs: Mapping[str, Tensor]):
        """The task's outputs; (2,) the loss of an override, times what it is a mean over, and the latter."""
        nothing = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        if self._override is None or not has_sequences(inputs):
            return self.task(model, inputs), nothing
        counts = self.task.count(inputs)
        if len(counts) and not counts.any():  # as in training, there is no loss without labels
            return self.task(model, inputs), nothing
        seen = SeenModel(self.task, model, inputs, counts, ranks=1)
        loss = loss_by(self._override, seen, type(self).__name__, needs_count=False).detach().double()
        outputs = self.task(model, inputs) if seen.output is None else seen.output
        weight = self.task.weight(inputs).to(nothing)
        return outputs, torch.stack([loss.to(nothing) * weight, weight])


def _is_memory(name: str) -> bool:
    """Whether Trainer's skip_memory_metrics=False has added it."""
    return "_mem_cpu" in name or "_mem_gpu" in name


def _prefixed(metrics: Mapping, prefix: str) -> dict:
    """As Trainer names them: {"f1": 1, "eval_f2": 2}, eval -> {"eval_f1": 1, "eval_f2": 2}"""
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in metrics.items()}


def _with_loss(metrics: dict, total: float, weight: float) -> dict:
    """The override's loss in place of the task's."""
    others = {name: value for name, value in metrics.items() if name != "loss"}
    return {"loss": total / weight, **others} if weight else others


def _drop_figures_of_rows(metrics: dict) -> None:
    """What Trainer computes as if a row were one sequence: FLOPs, and evaluation's forward passes per second."""
    for name in [name for name in metrics if name == "total_flos" or name.endswith("_steps_per_second")]:
        if name != "train_steps_per_second":
            del metrics[name]


class _OwnLoss:
    """A model's own loss, as a task."""

    def __init__(self, model: nn.Module):
        self.metrics = model.metrics
        self.arguments = frozenset(inspect.signature(model.forward).parameters)

    def count(self, batch: Mapping[str, Tensor]) -> Tensor:
        return count_denominators(batch)

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        return count_packs(batch)[0]

    def targets(self, packed) -> dict[str, Tensor]:
        return {}

    @staticmethod  # so that no worker is sent the model
    def check(batch: Mapping[str, Tensor]) -> None:
        for name in PAIR_LABELS:
            check_label_ids(batch, name, 2, "kinds of pairs")

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], denominators: Tensor | None = None):
        batch = {name: values for name, values in batch.items() if name in self.arguments}
        return model(**batch, denominators=denominators)


def _has_own_loss(model: nn.Module) -> bool:
    return "denominators" in inspect.signature(model.forward).parameters and hasattr(model, "metrics")


class EvenedPacks(Dataset):
    """A packed dataset followed by empty packs, up to a multiple of what all ranks take at once.

    7 packs, multiple 4  ->  7 packs and 1 that holds no sequence: no loss, no denominator, no gradient.

    So is every pack with a number beyond, which a sampler may ask for.
    """

    def __init__(self, packs, multiple: int):
        self.packs = packs
        self.num_packs = len(packs)
        self.padded_length = -(-len(packs) // multiple) * multiple

    def __len__(self) -> int:
        return self.padded_length

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]):
        real = [index for index in indices if index < self.num_packs]
        num_empty = len(indices) - len(real)
        if not real:
            return [EMPTY_PACK] * num_empty
        rows = self.packs.__getitems__(real) if hasattr(self.packs, "__getitems__") else [self.packs[i] for i in real]
        if not num_empty:
            return rows
        if isinstance(rows, pa.Table) and all(pa.types.is_list(type_) for type_ in rows.schema.types):
            empty = {field.name: pa.array([[]] * num_empty, field.type) for field in rows.schema}
            return pa.concat_tables([rows, pa.table(empty)])
        if not isinstance(rows, list):
            rows = rows.to_pylist()
        return rows + [EMPTY_PACK] * num_empty


class StepSampler(Sampler):
    """Packs in random order by whole steps of packs_per_step; an incomplete step stays at the end.

    packs 0 1 | 2 3 | 4 5 | 6, packs_per_step 2  ->  4 5 0 1 2 3 6, say

    A balanced dataset stays balanced: the packs of a step are those that were put together.

    length: if more than num_packs, empty packs follow, see EvenedPacks. They too stay at the end, so that the order
        depends on (seed, epoch) and not on how many ranks there are.
    """

    def __init__(self, num_packs: int, packs_per_step: int, seed: int, length: int | None = None):
        self.num_packs, self.packs_per_step, self.seed, self.epoch = num_packs, packs_per_step, seed, 0
        self.length = num_packs if length is None else length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        complete = self.num_packs // self.packs_per_step
        draw = np.random.default_rng([self.seed, self.epoch])
        for step in draw.permutation(complete).tolist():
            yield from range(step * self.packs_per_step, (step + 1) * self.packs_per_step)
        yield from range(complete * self.packs_per_step, self.length)


class PackingProgress(TrainerCallback, ExportableState):
    """What training has seen, over all ranks: sequences, tokens, packs that hold any, and the token slots of these.

    Saved and resumed with Trainer's state, as is what the last log had seen: so an interval with a resume in it is
    whole.

    counts, logged: (4,) in that order, by now and by the last log.
    """

    def __init__(self, counts: Sequence[int] = (0, 0, 0, 0), logged: Sequence[int] = (0, 0, 0, 0)):
        self._counts, self._logged = torch.tensor(counts), list(logged)
        self._sequences_before = counts[0]

    def add(self, counts: Tensor) -> None:
        """counts: (4,) of one optimizer step."""
        self._counts = self._counts.to(counts.device) + counts

    @property
    def in_this_run(self) -> int:
        """Sequences since training began or was resumed."""
        return int(self._counts[0]) - self._sequences_before

    def since_last_log(self) -> dict[str, float]:
        """The packing efficiency, and begin anew."""
        now = self._counts.tolist()
        _, tokens, _, slots = (count - logged for count, logged in zip(now, self._logged, strict=True))
        self._logged = now
        return {"packing_efficiency": tokens / slots} if slots else {}

    def seen(self, steps: int) -> dict[str, float]:
        """For the log, over all steps so far; packing_factor is the realised one."""
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
        self.__init__(**saved["args"]) if is_resumed else self.__init__()


def count_sequences(dataset) -> int | None:
    """How many sequences a dataset of packs holds; None where that would mean to read all of it.

    Rows that are not packed are a sequence each.
    """
    while isinstance(dataset, EvenedPacks | ArrowRows):
        dataset = dataset.packs if isinstance(dataset, EvenedPacks) else dataset.dataset
    if isinstance(dataset, EpochPacks):
        return len(dataset.lengths)
    if not isinstance(dataset, datasets.Dataset):
        return None
    if "sequence_lengths" not in dataset.column_names:
        return len(dataset)
    lengths = dataset.select_columns(["sequence_lengths"]).with_format("arrow")
    return sum(
        pc.sum(pc.list_value_length(table["sequence_lengths"])).as_py() or 0 for table in lengths.iter(COUNTED_PACKS)
    )


def _packed_info(dataset) -> PackedInfo | None:
    """How the dataset was packed, if it says so."""
    try:
        return packed_info(dataset)
    except ValueError:
        return None
