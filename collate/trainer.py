"""PackedTrainer: what transformers' Trainer cannot know about packs.

A row is several sequences here, and the number of sequences and of predicted tokens differs from batch to batch. So a
mean per micro-batch, which is what Trainer averages, weights sequences unequally (and stock BERT losses are wrong under
accumulation besides: huggingface/transformers#47688). PackedTrainer counts what a loss is divided by over the whole
optimizer step, all micro-batches and all ranks, before the first forward pass: the result then depends neither on
packing, nor on accumulation, nor on the number of processes.

The model's side of the contract:

    forward(**batch, denominators=Tensor(3)) -> output.loss, divided by these instead of by the batch's own counts
    output.sums                              -> 1-D tensor of additive statistics
    metrics(sums) -> dict[str, float]        -> what they mean, for the log: "loss", "sequences", "tokens" and others
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from collate.collator import DataCollatorWithPacking
from collate.layout import PADDING
from collate.masking import IGNORED
from packing import packed_info


def count_denominators(batch: dict[str, Tensor]) -> Tensor:
    """(3,) int64: predicted tokens, sequences with predicted tokens, and sequences with a next_sentence_label.

    labels [[-100, 7, 8, -100]], sequence_ids [[1, 1, 1, 2]], next_sentence_label [[0, 1]]  ->  [2, 1, 2]
    """
    sequence_ids_BL = batch["sequence_ids"].long()
    zero = sequence_ids_BL.new_zeros(())
    mlm_tokens = mlm_sequences = nsp_sequences = zero
    if "labels" in batch:
        predicted_BL = (batch["labels"] != IGNORED) & (sequence_ids_BL != PADDING)
        # a pack of L slots has at most L sequences: a fixed shape, so that a GPU need not be waited for
        hits = sequence_ids_BL.new_zeros(len(sequence_ids_BL), sequence_ids_BL.shape[1] + 1)
        hits.scatter_add_(1, sequence_ids_BL, predicted_BL.long())
        mlm_tokens, mlm_sequences = predicted_BL.sum(), (hits > 0).sum()
    if "next_sentence_label" in batch:
        nsp_sequences = (batch["next_sentence_label"] != IGNORED).sum()
    return torch.stack([mlm_tokens, mlm_sequences, nsp_sequences])


class PackedTrainer(Trainer):
    """`transformers.Trainer` for packed datasets and models that follow the contract above.

    Differences to Trainer, each of which is needed for exactness:
    * every loss is divided by counts over the optimizer step, all ranks;
    * columns are kept, whatever `remove_unused_columns` says: the collator needs `sequence_lengths`;
    * the collator learns L and S from the packed dataset, so that all batches have one shape;
    * training masks change with the epoch, evaluation masks never do;
    * with several ranks the packs are evened out by *empty* packs, where accelerate would repeat some;
    * evaluation adds up sums over all packs and ranks, so that it equals evaluation on the unpacked sequences;
    * tokens seen are real tokens; logs have the model's metrics beside the loss.

    Raises ValueError for several GPUs in one process (nn.DataParallel splits packs without their counts): use torchrun.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would run as nn.DataParallel, which cannot count a loss over "
                f"the step; start one process each: torchrun --nproc-per-node {self.args.n_gpu} …"
            )
        self._train_sums = _RunningSums()
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the step's counts; Trainer must not divide again
        self.model_accepts_loss_kwargs = True  # so that the step's counts reach compute_loss
        self._packed_collator = self.data_collator
        if isinstance(self.data_collator, DataCollatorWithPacking):
            self.add_callback(self.data_collator.callback())
            if self.train_dataset is not None:
                self.data_collator = _for_dataset(self._packed_collator, self.train_dataset)
        self.train_dataset = self._even(self.train_dataset, self.args.train_batch_size)

    # -- data ----------------------------------------------------------------------------------------------------

    def _even(self, dataset, batch_size: int):
        """Add empty packs until every rank gets the same number of full batches."""
        multiple = self.args.world_size * batch_size
        if self.args.world_size == 1 or not hasattr(dataset, "__len__") or len(dataset) % multiple == 0:
            return dataset
        return EvenedPacks(dataset, multiple)

    def _remove_unused_columns(self, dataset, description=None):
        return dataset

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator

    def get_eval_dataloader(self, eval_dataset=None):
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not isinstance(self._packed_collator, DataCollatorWithPacking):
            return super().get_eval_dataloader(dataset)
        training_collator = self.data_collator
        self.data_collator = _for_dataset(self._packed_collator, dataset).for_evaluation()
        try:
            return super().get_eval_dataloader(self._even(dataset, self.args.eval_batch_size))
        finally:
            self.data_collator = training_collator

    # -- loss ----------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """(3,) the denominators of one optimizer step: over its micro-batches and all ranks."""
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        for batch in batch_samples:
            counts += count_denominators(batch).to(device)
        return self.accelerator.reduce(counts, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, denominators=num_items_in_batch)
        if model.training:
            self._train_sums.add(outputs.sums)
        # DDP and FSDP average gradients over ranks, but the loss is already divided by all ranks' counts
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # -- log -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._train_sums.total is not None:
            metrics = self._model_metrics(self.accelerator.reduce(self._train_sums.take(), "sum").cpu())
            # from the last log and not from a counter, so that a resumed run goes on counting
            seen = next((entry for entry in reversed(self.state.log_history) if "sequences_seen" in entry), {})
            for unit in ("sequences", "tokens"):
                metrics[f"{unit}_seen"] = seen.get(f"{unit}_seen", 0) + metrics.pop(unit)
            logs = metrics | logs
        super().log(logs, start_time)

    def _model_metrics(self, sums: Tensor) -> dict[str, float]:
        return self.accelerator.unwrap_model(self.model).metrics(sums)

    def _track_num_input_tokens(self, inputs):
        if self.args.include_num_input_tokens_seen == "no":
            return
        tokens = (inputs["sequence_ids"] != PADDING).sum().to(self.args.device)
        self.state.num_input_tokens_seen += self.accelerator.gather(tokens).sum().item()

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Sums over the whole evaluation set, then one division: a deep pack weighs what its sequences weigh."""
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models:  # evaluation without training before it
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was_training = model.training
        model.eval()
        sums = _RunningSums()
        for inputs in dataloader:
            with torch.no_grad(), self.compute_loss_context_manager():
                sums.add(model(**self._prepare_inputs(inputs)).sums)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        if sums.total is None:
            raise ValueError(f"{description}: the dataset has no packs; give an evaluation set with at least one")
        totals = self.accelerator.reduce(sums.take(), "sum").cpu()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._model_metrics(totals).items()}
        dataset = dataloader.dataset
        num_packs = dataset.num_packs if isinstance(dataset, EvenedPacks) else len(dataset)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_packs)


class EvenedPacks(Dataset):
    """A packed dataset followed by empty packs, up to a multiple of what all ranks take at once.

    7 packs, multiple 4  ->  7 packs and 1 that holds no sequence: no loss, no denominator, no gradient.
    """

    def __init__(self, packs, multiple: int):
        self.packs = packs
        self.num_packs = len(packs)
        self.padded_length = -(-len(packs) // multiple) * multiple

    def __len__(self) -> int:
        return self.padded_length

    def __getitem__(self, index: int) -> dict:
        return self.packs[index] if index < self.num_packs else {"input_ids": [], "sequence_lengths": []}

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return [self[index] for index in indices]


class _RunningSums:
    """A float64 sum of 1-D statistics that stays on the device: adding does not wait for it."""

    def __init__(self):
        self.total: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        self.total = sums.detach().clone() if self.total is None else self.total + sums.detach()

    def take(self) -> Tensor:
        total, self.total = self.total, None
        return total


def _for_dataset(collator: DataCollatorWithPacking, dataset) -> DataCollatorWithPacking:
    """The collator bound to L and S of the dataset, where the dataset says them."""
    try:
        packed_info(dataset)
    except ValueError:
        return collator
    return collator.for_dataset(dataset)
