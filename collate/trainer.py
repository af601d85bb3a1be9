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

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
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

    What it cannot honour it refuses with a ValueError: models that do not follow the contract, nn.DataParallel (it
    splits packs without their counts), iterable datasets over several ranks (accelerate would repeat packs), label
    smoothing, compute_metrics and compute_loss_func (the loss and metrics are the model's), and predict().
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._refuse_unsupported()
        self._train_sums = _RunningSums()
        self._progress = PackingProgress()
        self.add_callback(self._progress)
        # Either alone is enough in transformers 5.23; the first is newer, the second is read by other code, too.
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the step's counts; Trainer must not divide again
        self.model_accepts_loss_kwargs = True  # so that the step's counts reach compute_loss
        if isinstance(self.data_collator, DataCollatorWithPacking):
            self.add_callback(self.data_collator.callback())

    def _refuse_unsupported(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process would run as nn.DataParallel, which cannot count a loss over "
                f"the step; start one process each: torchrun --nproc-per-node {self.args.n_gpu} …"
            )
        if "denominators" not in inspect.signature(self.model.forward).parameters or not hasattr(self.model, "metrics"):
            raise ValueError(
                f"{type(self.model).__name__} does not follow PackedTrainer's contract: forward(denominators=), "
                "output.sums, metrics(sums); use PackedBertForPreTraining"
            )
        ignored = {
            "label_smoothing_factor": self.args.label_smoothing_factor,
            "compute_metrics": self.compute_metrics,
            "compute_loss_func": self.compute_loss_func,
            "bf16_full_eval": self.args.bf16_full_eval,
            "fp16_full_eval": self.args.fp16_full_eval,
        }
        for name, value in ignored.items():
            if value:
                raise ValueError(f"PackedTrainer cannot honour {name}={value!r}; leave it out")

    def predict(self, *args, **kwargs):
        raise ValueError("PackedTrainer has no predict(); evaluate() gives metrics, and the model itself gives logits")

    # -- data ----------------------------------------------------------------------------------------------------

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs):
        """Every dataloader, of training and evaluation: bind the collator to its dataset, and even out the packs."""
        if self.args.world_size > 1:
            if not hasattr(dataset, "__len__"):
                raise ValueError(
                    f"the {description} dataset is iterable: over {self.args.world_size} processes accelerate would "
                    "repeat packs to even them out; use a dataset with a length"
                )
            dataset = EvenedPacks(dataset, self.args.world_size * batch_size)
        collator = self.data_collator
        if isinstance(collator, DataCollatorWithPacking):
            self.data_collator = _for_dataset(collator, dataset)
            if not is_training:
                self.data_collator = self.data_collator.for_evaluation()
        try:
            return super()._get_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)
        finally:
            self.data_collator = collator

    def _remove_unused_columns(self, dataset, description=None):
        return dataset

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator

    # -- loss ----------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """(3,) the denominators of one optimizer step: over its micro-batches and all ranks."""
        counts = torch.zeros(5, dtype=torch.int64, device=device)
        for batch in batch_samples:
            sequences = batch["sequence_ids"].amax(1).sum()
            tokens = (batch["sequence_ids"] != PADDING).sum()
            counts += torch.cat([count_denominators(batch), torch.stack([sequences, tokens])]).to(device)
        counts = self.accelerator.reduce(counts, "sum")
        self._progress.add(counts[3:])
        return counts[:3]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, denominators=num_items_in_batch)
        self._train_sums.add(outputs.sums)
        # DDP and FSDP average gradients over ranks, but the loss is already divided by all ranks' counts
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # -- log -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._train_sums.total is not None:
            metrics = self._model_metrics(self.accelerator.reduce(self._train_sums.take(), "sum").cpu())
            del metrics["sequences"], metrics["tokens"]  # since the last log; of interest is how many there were in all
            logs = metrics | self._progress.seen() | logs
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
        sums, num_packs = _RunningSums(), 0
        for inputs in dataloader:
            num_packs += len(inputs["sequence_ids"])
            with torch.no_grad(), self.compute_loss_context_manager():
                sums.add(model(**self._prepare_inputs(inputs)).sums)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        if sums.total is None:
            raise ValueError(f"{description}: the dataset has no packs; give an evaluation set with at least one")
        totals = self.accelerator.reduce(sums.take(), "sum").cpu()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._model_metrics(totals).items()}
        if isinstance(dataloader.dataset, EvenedPacks):
            num_packs = dataloader.dataset.num_packs
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


class PackingProgress(TrainerCallback, ExportableState):
    """Sequences and tokens that training has seen, over all ranks; saved and resumed with Trainer's state."""

    def __init__(self, sequences: int = 0, tokens: int = 0):
        self._counts = torch.tensor([sequences, tokens])

    def add(self, counts: Tensor) -> None:
        """counts: (2,) sequences and tokens of one optimizer step."""
        self._counts = self._counts.to(counts.device) + counts

    def seen(self) -> dict[str, int]:
        sequences, tokens = self._counts.tolist()
        return {"sequences_seen": sequences, "tokens_seen": tokens}

    def state(self) -> dict:
        sequences, tokens = self._counts.tolist()
        return {"args": {"sequences": sequences, "tokens": tokens}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        is_resumed = state.global_step > 0 and isinstance(saved, dict)
        self.__init__(**saved["args"]) if is_resumed else self.__init__()


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
    dataset = dataset.packs if isinstance(dataset, EvenedPacks) else dataset
    try:
        packed_info(dataset)
    except ValueError:
        return collator
    return collator.for_dataset(dataset)
