"""Runs of PackedTrainer and plain Trainer with stock models. Imported by test_stock_trainer.py and by
test_masks_end_to_end.py, and run by both, once, in two processes:

torchrun --nproc-per-node 2 stock_runs.py RESULTS.pt
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object
from adding_models import with_terms
from datasets import Dataset
from pairs import make_tokenizer
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
)

from collate import DataCollatorWithPacking, PackedTrainer, PackLayout, isolate_sequences, task_for, to_device
from collate.layout import SlotLayout
from packing import pack_dataset

LENGTH = 32
CLASSES = {
    "mlm": BertForMaskedLM,
    "single": BertForSequenceClassification,
    "multi": BertForSequenceClassification,
    "regression": BertForSequenceClassification,
    "tokens": BertForTokenClassification,
    "answers": BertForQuestionAnswering,
}
HEADS = list(CLASSES)
NUM_LABELS = {"single": 3, "multi": 3, "regression": 1, "tokens": 4}
LABELS = {"answers": ["start_positions", "end_positions"]}
PACKS = 18
"""Two steps of 16: the last one has 2 packs, so that of two ranks one has none."""


# Data and models.


def make_source(head, count=64, seed=11):
    """Sequences of 3 to 20 tokens with their labels, and columns that no model wants."""
    rng = np.random.default_rng(seed)
    rows = [make_sequence(rng, head, int(length)) for length in rng.integers(3, 21, count)]
    for index, row in enumerate(rows):
        row |= {"text": f"text {index}", "extra": index, "ragged": list(range(index % 3)), "score": index / 7}
    return Dataset.from_list(rows)


def make_sequence(rng, head, length):
    words = rng.integers(5, 60, length)
    words[[0, -1]] = 2, 3
    sequence = {"input_ids": words.tolist(), "token_type_ids": [0] * 2 + [1] * (length - 2)}
    if head == "single":
        sequence["labels"] = int(rng.integers(3))
    elif head == "multi":
        sequence["labels"] = rng.integers(0, 2, 3).astype(float).tolist()
    elif head == "regression":
        sequence["labels"] = int(rng.integers(-8, 9)) / 8
    elif head == "tokens":
        sequence["labels"] = [-100, *rng.integers(0, 4, length - 2).tolist(), -100]
    elif head == "answers":
        sequence |= {name: int(rng.integers(length)) for name in LABELS[head]}
    return sequence


def make_packs(head, count=PACKS):
    packed = pack_dataset(make_source(head), LENGTH, seed=4)
    assert len(packed) >= count
    return packed.select(range(count))


def make_model(head, change=None, **changes):
    """Small, in float64, with weights so large that a mistake shows; no dropout."""
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=changes.pop("num_hidden_layers", 2),
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=NUM_LABELS.get(head, 2),
        problem_type="multi_label_classification" if head == "multi" else None,
        **changes,
    )
    torch.manual_seed(0)
    model = CLASSES[head](config).double()
    return model if change is None else change(model)


def make_collator(head, **options):
    return DataCollatorWithPacking(make_tokenizer(), mlm_probability=0.15 if head == "mlm" else None, **options)


TRAINER_OPTIONS: tuple[str, ...] = (
    "compute_metrics",
    "compute_loss_func",
    "preprocess_logits_for_metrics",
    "callbacks",
    "model_init",
)
TRAINER_OPTIONS += ("train_dataset", "eval_dataset", "data_collator", "task")


@contextlib.contextmanager
def make_trainer(model, kind=PackedTrainer, folder=None, **arguments):
    """A trainer with SGD; its folder is gone afterwards, unless one is given."""
    options = {name: arguments.pop(name) for name in TRAINER_OPTIONS if name in arguments}
    defaults = {
        "num_train_epochs": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "train_sampling_strategy": "sequential",
        "include_num_input_tokens_seen": "non_padding",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if "LOCAL_RANK" in os.environ else None,
    }
    with tempfile.TemporaryDirectory() as temporary:
        yield kind(model, TrainingArguments(str(folder or temporary), **defaults | arguments), **options)


WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)


class WeightedSum(PackedTrainer):
    """Class weights, as transformers' documentation shows them for gradient accumulation."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs["logits"]
        loss = torch.nn.CrossEntropyLoss(WEIGHTS[: logits.shape[-1]], reduction="sum")(
            logits.view(-1, logits.shape[-1]), labels.view(-1)
        )
        loss = loss / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class BySlots(PackedTrainer):
    """Each rank's batches have a layout by slots, as on GPUs."""

    def _prepare_inputs(self, inputs):
        sent = to_device(super()._prepare_inputs(inputs), "cpu", by_slots=True)
        assert isinstance(PackLayout.of(sent["sequence_ids"]), SlotLayout)
        return sent


# Training and prediction.


def train(head, packs_per_pass=16, passes=1, packs=PACKS, dataset=None, kind=PackedTrainer, change=None, **arguments):
    """Parameters after SGD, what every step logged, and the evaluation on the same packs."""
    dataset = make_packs(head, packs) if dataset is None else dataset
    options = {"train_dataset": dataset, "data_collator": make_collator(head)} | arguments
    options |= {"per_device_train_batch_size": packs_per_pass, "gradient_accumulation_steps": passes}
    with make_trainer(None if "model_init" in arguments else make_model(head, change), kind, **options) as trainer:
        trainer.train()
        evaluation = deterministic(trainer.evaluate(make_packs(head, packs)))
    return outcome(trainer) | {"evaluation": evaluation}


def train_unpacked(rows_per_pass=16, passes=1, form="keep", **arguments):
    """Rows of one sequence each; the collator packs them or does not."""
    collator = make_collator("single", unpacked_rows=form, pad_to=LENGTH)
    options = {"train_dataset": make_source("single", PACKS), "data_collator": collator} | arguments
    options |= {"per_device_train_batch_size": rows_per_pass, "gradient_accumulation_steps": passes}
    with make_trainer(make_model("single"), **options) as trainer:
        trainer.train()
    return outcome(trainer) | {"evaluation": {}}


def refusal(run):
    """What it raises, in words."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def outcome(trainer):
    return {
        "parameters": [parameter.detach().clone() for parameter in trainer.model.parameters()],
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "processes": trainer.args.world_size,
    }


def train_plain(dataset=None, isolated=True, with_callback=True, head="mlm", resume=None, change=None, **arguments):
    """Plain Trainer, set up as our callback asks for; two epochs of two steps."""
    dataset = make_packs(head) if dataset is None else dataset
    collator = make_collator(head)
    options = {"train_dataset": dataset, "data_collator": collator.for_dataset(make_packs(head))}
    options |= {"per_device_train_batch_size": 16, "num_train_epochs": 2, "remove_unused_columns": False}
    options |= {"include_num_input_tokens_seen": "no", "callbacks": [collator.callback()] if with_callback else []}
    model = make_model(head, change)
    with make_trainer(isolate_sequences(model) if isolated else model, Trainer, **options | arguments) as trainer:
        trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


def deterministic(metrics):
    """Without the timings."""
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))}


def predict(head, dataset, **arguments):
    """predict()'s rows, and what compute_metrics was given by evaluate()."""
    given = []
    options = {"data_collator": make_collator(head), "per_device_eval_batch_size": 3} | arguments
    options |= {"compute_metrics": lambda prediction: given.append(prediction) or {"rows": len(prediction.predictions)}}
    with make_trainer(make_model(head), **options) as trainer:
        rows = trainer.predict(dataset)
        metrics = deterministic(trainer.evaluate(dataset))
    return {
        "predictions": rows.predictions,
        "labels": rows.label_ids,
        "given": [(p.predictions, p.label_ids) for p in given],
        "metrics": metrics,
    }


def dealt_out():
    """What each rank gets of an iterable dataset in a loop of one's own: accelerate reads it in one process, and deals
    out. [{"packs", "sums", "depth"}] of both ranks, one after the other."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    packs, model = make_packs("mlm", 16), make_model("mlm")
    task, collator = task_for(model), make_collator("mlm").for_dataset(packs)
    batches = DataLoader(packs.to_iterable_dataset(num_shards=2), 4, collate_fn=collator, num_workers=2)
    found = []
    for batch in accelerator.prepare(batches):
        sent = to_device(batch, "cpu", by_slots=True)
        layout = PackLayout.of(sent["sequence_ids"])
        assert isinstance(layout, SlotLayout) and torch.equal(layout.sequence_ids_BL, sent["sequence_ids"])
        sums = task(model, sent).sums.tolist()
        found.append({"packs": sent["input_ids"].tolist(), "sums": sums, "slots": layout.num_sequences})
    return gather_object(found)


def without_labels(head, dataset):
    return dataset.remove_columns(LABELS.get(head, ["labels"]) if head != "mlm" else [])


# Masks.


class Recording:
    """Note what the model gets for every sequence, by source row: {(epoch, index): [(input_ids, labels)]}."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.trained, self.evaluated = {}, {}

    def _prepare_inputs(self, inputs):
        record = self.trained if self.model.training else self.evaluated
        epoch = int(self.state.epoch or 0)
        is_real = inputs["sequence_ids"].amax(1) > 0  # empty packs have no indices
        for pack in is_real.nonzero().flatten().tolist():
            for number in range(1, int(inputs["sequence_ids"][pack].max()) + 1):
                mine = inputs["sequence_ids"][pack] == number
                fed = tuple(tuple(inputs[name][pack][mine].tolist()) for name in ("input_ids", "labels"))
                index = int(inputs["sequence_indices"][pack, number - 1])
                record.setdefault((epoch, index), []).append(fed)
        return super()._prepare_inputs(inputs)


class RecordingPackedTrainer(Recording, PackedTrainer):
    pass


class RecordingTrainer(Recording, Trainer):
    pass


MASKED = 34
"""Sequences whose masks are noted: 13 packs, so that of two ranks one has none in the last step."""
MASK_DEFAULTS = {"max_sequence_length": 32, "packer": "optimal", "seed": 0}


def record_masks(folder=None, packing=None, kind=RecordingPackedTrainer, stop=None, **arguments):
    """The notes of three epochs: {"trained", "evaluated", "before"}.

    With `stop` the run ends after so many steps, and another trainer resumes it: "before" has the notes until then.
    """
    packed = pack_dataset(make_source("mlm", MASKED), **MASK_DEFAULTS | (packing or {}))
    options = {"train_dataset": packed, "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 0.01}
    options |= {"train_sampling_strategy": "random"}
    if kind is RecordingPackedTrainer:
        options |= {"eval_dataset": packed, "eval_strategy": "epoch", "per_device_eval_batch_size": 7}
    options |= arguments
    before = {}
    if stop is not None:
        limits = {"max_steps": stop, "save_strategy": "steps", "save_steps": stop}
        with recording(kind, folder, **options | limits) as trainer:
            trainer.train()
        before = trainer.trained
    with recording(kind, folder, **options) as trainer:
        trainer.train(resume_from_checkpoint=None if stop is None else True)
    return {"trained": trainer.trained, "evaluated": trainer.evaluated, "before": before}


@contextlib.contextmanager
def recording(kind, folder, **options):
    """A trainer that notes masks; a plain one with its callback."""
    collator = make_collator("mlm", columns=["sequence_indices"], seed=5)
    model = make_model("mlm", num_hidden_layers=1)
    if kind is RecordingTrainer:
        isolate_sequences(model)
        options = {"callbacks": [collator.callback()], "remove_unused_columns": False} | options
        options |= {"include_num_input_tokens_seen": "no"}
    with make_trainer(model, kind, folder, data_collator=collator, **options) as trainer:
        yield trainer


# Two processes.


TWO_PROCESSES: dict[str, Callable[[], object]] = {head: functools.partial(train, head, 4, 2) for head in HEADS}
TWO_PROCESSES |= {
    "class weights": lambda: train("single", 4, 2, kind=WeightedSum),
    "22 packs": lambda: train("mlm", 4, 2, packs=22),
    "terms of a stock model's modules": lambda: train("mlm", 4, 2, change=with_terms),
    "dealt out": dealt_out,
    "dispatched": lambda: train("mlm", 4, 2, kind=BySlots, accelerator_config={"dispatch_batches": True}),
    "dispatched by workers": lambda: train(
        "single", 4, 2, kind=BySlots, accelerator_config={"dispatch_batches": True}, dataloader_num_workers=2
    ),
    "dispatched unpacked": lambda: train_unpacked(4, 2, accelerator_config={"dispatch_batches": True}),
    "dispatched and packed by batches": lambda: refusal(
        lambda: train_unpacked(4, 2, "pack", accelerator_config={"dispatch_batches": True})
    ),
    "random": lambda: train("mlm", 4, 2, train_sampling_strategy="random", num_train_epochs=2),
    **{f"predict {head}": functools.partial(lambda head: predict(head, make_packs(head)), head) for head in HEADS},
    "predict without labels": lambda: predict_only("single", without_labels("single", make_packs("single"))),
    "predict split": lambda: predict("tokens", pack_dataset(make_source("tokens"), 12, overlong="split")),
    "predict unpacked": lambda: predict(
        "single", make_source("single"), data_collator=make_collator("single", unpacked_rows="keep")
    ),
    "masks": lambda: gathered_masks(per_device_train_batch_size=2),
    "masks resumed": lambda: gathered_masks(per_device_train_batch_size=2, stop=6),
}


def predict_only(head, dataset):
    with make_trainer(make_model(head), data_collator=make_collator(head), per_device_eval_batch_size=3) as trainer:
        return trainer.predict(dataset).predictions


def gathered_masks(**options):
    """record_masks in a folder of all ranks; what the ranks noted is put together."""
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    merged = {}
    for records in gather_object([record_masks(folder[0], **options)]):
        for name, record in records.items():
            for key, fed in record.items():
                into = merged.setdefault(name, {})
                into[key] = into.get(key, []) + fed
    return merged
