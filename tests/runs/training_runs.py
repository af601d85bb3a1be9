"""One epoch of PackedTrainer over a few fixed packs, in one process or in two."""

import contextlib
import functools
import os
import tempfile

import numpy as np
from adding_models import with_terms
from datasets import Dataset
from pairs import make_pair, make_tokenizer
from pretraining_models import MAX_LENGTH, make_models
from slow_training import packed_rows
from transformers import TrainingArguments

from bert_pretrain.block import use_block
from bert_pretrain.moving import AfterStepCallback, moves_after_step
from collate import DataCollatorWithPacking, PackedTrainer
from packing import EpochPacks, pack_dataset

# name: (packs, packs per forward pass, accumulated passes, mlm_loss); each step sees 16 packs, the last one fewer
ONE_PROCESS = {
    "1 x 16": (22, 16, 1, "sequence"),
    "4 x 4": (22, 4, 4, "sequence"),
    "1 x 16, token loss": (22, 16, 1, "token"),
    "4 x 4, token loss": (22, 4, 4, "token"),
    "17 packs": (17, 16, 1, "sequence"),
}
# name: (rows in every pass, passes); each step has 24 sequences, in 2 epochs, the second of which has other packs
BY_SEQUENCES = {"1 x 16": (16, 1), "8 x 2": (2, 8)}
BY_SEQUENCES_IN_TWO = {"2 ranks x 3 x 3": (3, 3)}
# name: (rows in every pass, passes); each step has 8 packs at most, in 2 epochs, the second of which has other packs
COHORTS = {"1 x 8": (8, 1), "4 x 2": (2, 4)}
IN_TWO = {
    "2 ranks x 2 x 4": (22, 4, 2, "sequence"),
    "2 ranks x 2 x 4, token loss": (22, 4, 2, "token"),
    "2 ranks x 2 x 4, 17 packs": (17, 4, 2, "sequence"),
}


def make_packs(count):
    """`count` packs; those of the second forward pass of 4, rank 1's first, have no NSP target."""
    rng = np.random.default_rng(7)
    rows = packed_rows([make_pair(rng, int(length)) for length in rng.integers(5, 31, 80)], MAX_LENGTH)[:count]
    assert len(rows) == count
    for row in rows[4:8]:
        row["next_sentence_label"] = [-100] * len(row["next_sentence_label"])
    return Dataset.from_list(rows)


def train(packs, packs_per_pass, passes, mlm_loss, change=None):
    """Parameters after one epoch of SGD, the losses and metrics of each step, and the evaluation on the same packs."""
    dataset = make_packs(packs)
    with make_trainer(
        mlm_loss,
        train_dataset=dataset,
        eval_dataset=dataset,
        change=change,
        per_device_train_batch_size=packs_per_pass,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=passes,
    ) as trainer:
        trainer.train()
        evaluation = deterministic(trainer.evaluate())
    return {
        "parameters": [parameter.detach().clone() for parameter in trainer.model.parameters()],
        "buffers": {name: x.clone() for name, x in trainer.model.named_buffers() if x.is_floating_point()},
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "evaluation": evaluation,
        "processes": trainer.args.world_size,
    }


def make_epochs():
    """80 sequences in EpochPacks."""
    rng = np.random.default_rng(8)
    rows = [make_pair(rng, int(length)) for length in rng.integers(5, 31, 80)]
    return EpochPacks(pack_dataset(Dataset.from_list(rows), MAX_LENGTH, max_sequences_per_pack=8), 3)


def train_by_sequences(packs_per_pass, passes, dataset=None, **options):
    """Two epochs of 24 sequences per step: parameters, and what each step logs."""
    with make_trainer(
        train_dataset=make_epochs() if dataset is None else dataset,
        per_device_train_batch_size=packs_per_pass,
        gradient_accumulation_steps=passes,
        **{"train_sampling_strategy": "random", "sequences_per_step": 24, "num_train_epochs": 2} | options,
    ) as trainer:
        trainer.train()
    return {
        "parameters": [parameter.detach().clone() for parameter in trainer.model.parameters()],
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "processes": trainer.args.world_size,
    }


def make_cohorts():
    """30 documents of up to four pieces, in EpochPacks."""
    rng = np.random.default_rng(9)
    rows = [make_pair(rng, int(length)) for length in rng.integers(5, 120, 30)]
    options = {"overlong": "split", "packer": "lpfhp", "cohort": 12, "cohort_lanes": 4}
    return EpochPacks(pack_dataset(Dataset.from_list(rows), MAX_LENGTH, max_sequences_per_pack=8, **options), 3)


def train_cohorts(packs_per_pass, passes):
    """Two epochs of packs with cohorts: parameters, and what each step logs."""
    return train_by_sequences(packs_per_pass, passes, make_cohorts(), sequences_per_step=None)


def evaluate(dataset, packs_per_pass):
    """Metrics of the untrained model."""
    with make_trainer(eval_dataset=dataset, per_device_eval_batch_size=packs_per_pass) as trainer:
        return deterministic(trainer.evaluate())


def deterministic(metrics):
    """Without the timings."""
    return {k: v for k, v in metrics.items() if not k.endswith(("runtime", "per_second"))}


TRAINER_OPTIONS = ("compute_metrics", "compute_loss_func", "data_collator", "sequences_per_step", "tokens_per_pass")


@contextlib.contextmanager
def make_trainer(mlm_loss="sequence", train_dataset=None, eval_dataset=None, folder=None, change=None, **arguments):
    """A PackedTrainer on a small model in float64; its folder is gone afterwards, unless one is given.

    change: of the model, before it gets there.
    """
    _, model = make_models(mlm_loss)
    model = model if change is None else change(model)
    collator = DataCollatorWithPacking(make_tokenizer(), pad_to=MAX_LENGTH, max_sequences_per_pack=8)
    options = {"data_collator": collator} | {k: arguments.pop(k) for k in TRAINER_OPTIONS if k in arguments}
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
        training = TrainingArguments(str(folder or temporary), **defaults | arguments)
        trainer = PackedTrainer(model, training, train_dataset=train_dataset, eval_dataset=eval_dataset, **options)
        if moves_after_step(model):
            trainer.add_callback(AfterStepCallback())
        yield trainer


def with_experts(balance, model):
    """The model with a mixture of experts; its terms weigh so much that a mistake shows."""
    options = {"experts": 4, "top_k": 2, "balance": balance, "z_loss": 0.1}
    options |= {"balance_weight": 0.5} if balance == "sequence" else {"bias_speed": 0.01}
    return use_block(model, feed_forward="moe", **options)


EXPERTS = {balance: functools.partial(with_experts, balance) for balance in ("sequence", "bias")}


TWO_PROCESSES = {name: functools.partial(train, *run) for name, run in IN_TWO.items()}
TWO_PROCESSES["terms of modules"] = functools.partial(train, 17, 4, 2, "sequence", with_terms)
TWO_PROCESSES |= {f"experts, {name}": functools.partial(train, 17, 4, 2, "sequence", x) for name, x in EXPERTS.items()}
TWO_PROCESSES["2 ranks, cohorts"] = functools.partial(train_cohorts, 2, 2)
TWO_PROCESSES |= {name: functools.partial(train_by_sequences, *run) for name, run in BY_SEQUENCES_IN_TWO.items()}
