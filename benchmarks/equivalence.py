"""Is packed training the same training? Parameters after 100 steps of AdamW and of LAMB, in float64.

    python benchmarks/equivalence.py

One small BERT (MLM + NSP) is trained from the same weights, on the same 16 sequences with the same masks each step, by

    stock, each sequence alone   transformers' BertForPreTraining, the mean losses and the training loop written out
    unpacked 1 x 16, 4 x 4       PackedTrainer, a row for each sequence; so many rows in one pass, or accumulated
    packed 1 x 4, 4 x 1          PackedTrainer, 2 to 6 sequences in a row
    packed, 2 processes          the packs of a step divided between two processes (torchrun, gloo)

and by three mistakes, which must not pass. A row of the table is the difference to the first: of all parameters as one
vector, |a - b| / |a|; the same against how far training moved them, |a - b| / |a - start|; and the worst tensor's max
|a - b| / max |a|. Key biases are left out of the last: a softmax ignores them, so their gradients, and their values,
are only rounding.

The status is 1 if a difference of the right ones is above 1e-12, or one of the mistakes' below 1e-6.

No dropout; weights drawn with a standard deviation of 0.1, five times BERT's, so that sequences change one another
where they meet; learning rate with warm-up over the first tenth and linear decay, weight decay 0.01, gradients clipped
to 1. Adam divides by sqrt(v) + eps: where a gradient is only rounding, eps decides whether the step stays small. It is
1e-6, the original BERT's; --eps 1e-8 is transformers' default.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertTokenizer,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import use_attention
from bert_pretrain.train.optimizer import Lamb
from collate import DataCollatorWithPacking, PackedTrainer

BOUND = 1e-12
MISTAKE = 1e6 * BOUND
"""What a mistake must differ by at least."""

MAX_LENGTH = 64
DEPTHS = (2, 3, 5, 6)
"""Sequences in the packs of a step, in random order."""

LEARNING_RATES = {"adamw": 1e-3, "lamb": 1e-2}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--eps", type=float, default=1e-6, help="Adam's and LAMB's")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)  # a process of "packed, 2 processes"
    options = parser.parse_args()
    if options.save is not None:
        return train_in_two_processes(options)
    passed = True
    for optimizer in LEARNING_RATES:
        lines, good = compare(optimizer, options.steps, options.eps)
        passed &= good
        print("\n".join(lines), flush=True)
    print("\nOK" if passed else "\nFAILED")
    sys.exit(0 if passed else 1)


def compare(optimizer: str, steps: int, eps: float, right=None, mistakes=None) -> tuple[list[str], bool]:
    """The table of one optimizer, and whether all is as it must be. right, mistakes: names; None: all."""
    start = parameters_of(make_model(PackedBertForPreTraining))
    expected = train_stock(optimizer, steps, eps)
    moved = distance(expected, start)
    lines = [
        "",
        f"{optimizer}, {steps} steps, eps {eps:g}: parameters moved by {moved / length(start):.2f} of their length",
        "",
        "                                 all, by length     by way moved     worst tensor",
    ]
    passed = True
    for name in [*(RIGHT if right is None else right), *(MISTAKES if mistakes is None else mistakes)]:
        got = (RIGHT | MISTAKES)[name](optimizer, steps, eps)
        apart = distance(got, expected)
        worst, tensor = max((tensor_error(got[name], expected[name]), name) for name in expected if is_seen(name))
        errors = apart / length(expected), apart / moved, worst
        passed &= max(errors) <= BOUND if name in RIGHT else min(errors) >= MISTAKE
        lines.append(f"{name:<30}" + "".join(f"{error:>17.1e}" for error in errors) + f"  {tensor}")
    return lines, passed


# -- what is trained -------------------------------------------------------------------------------------------------


def make_model(model_class: Callable[[BertConfig], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"intermediate_size": 64, "max_position_embeddings": MAX_LENGTH, "initializer_range": 0.1}
    model = model_class(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))
    return model.double().train()


def make_tokenizer() -> BertTokenizer:
    words = SPECIAL + [f"w{i}" for i in range(VOCABULARY - len(SPECIAL))]
    vocabulary = {word: i for i, word in enumerate(words)}
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    special: dict[str, Any] = dict(zip(names, SPECIAL, strict=True))
    return BertTokenizer(tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")), **special)


def make_packs(steps: int) -> list[dict]:
    """len(DEPTHS) packs for each step. Words follow one another, so that there is something to learn."""
    rng = np.random.default_rng(0)
    packs, index = [], 0
    for _ in range(steps):
        for depth in rng.permutation(DEPTHS):
            lengths = rng.multinomial(MAX_LENGTH - 6 * depth - int(rng.integers(4)), np.ones(depth) / depth) + 6
            pairs = [make_pair(rng, int(length)) for length in lengths]
            pack = {name: [value for pair in pairs for value in pair[name]] for name in ("input_ids", "token_type_ids")}
            pack["next_sentence_label"] = [pair["next_sentence_label"] for pair in pairs]
            pack["sequence_lengths"] = lengths.tolist()
            pack["sequence_indices"] = list(range(index, index + len(pairs)))
            packs.append(pack)
            index += len(pairs)
    return packs


def make_pair(rng: np.random.Generator, length: int) -> dict:
    """[CLS] A [SEP] B [SEP]: each word is the one before it plus 3, or any; B continues A, or starts anywhere."""
    cut, label = int(rng.integers(3, length - 2)), int(rng.integers(2))
    words = rng.integers(len(SPECIAL), VOCABULARY, length)
    for i in range(1, length):
        if rng.random() < 0.7 and not (i == cut + 1 and label):
            words[i] = len(SPECIAL) + (words[i - 1] - len(SPECIAL) + 3) % (VOCABULARY - len(SPECIAL))
    words[[0, cut, length - 1]] = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]"), SPECIAL.index("[SEP]")
    types = [0] * (cut + 1) + [1] * (length - cut - 1)
    return {"input_ids": words.tolist(), "token_type_ids": types, "next_sentence_label": label}


def unpack(packs: list[dict]) -> list[dict]:
    """Every sequence in a row of its own."""
    rows = []
    for pack in packs:
        ends = np.cumsum(pack["sequence_lengths"])
        for number, end in enumerate(ends):
            mine = slice(end - pack["sequence_lengths"][number], end)
            row = {name: pack[name][mine] for name in ("input_ids", "token_type_ids")}
            per_sequence = ("next_sentence_label", "sequence_lengths", "sequence_indices")
            rows.append(row | {name: [pack[name][number]] for name in per_sequence})
    return rows


# -- training --------------------------------------------------------------------------------------------------------


def arguments(folder, optimizer: str, steps: int, eps: float, rows: int, passes: int) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=passes,
        max_steps=steps,
        learning_rate=LEARNING_RATES[optimizer],
        adam_epsilon=eps,
        weight_decay=0.01,
        max_grad_norm=1.0,
        warmup_steps=max(1, steps // 10),
        lr_scheduler_type="linear",
        train_sampling_strategy="sequential",
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        ddp_backend="gloo" if "LOCAL_RANK" in os.environ else None,
    )


def optimizer_for(optimizer: str, training: TrainingArguments, model: PreTrainedModel):
    """Class and options, as Trainer takes them."""
    if optimizer == "lamb":
        return Lamb, {"lr": training.learning_rate, "eps": training.adam_epsilon}
    return Trainer.get_optimizer_cls_and_kwargs(training, model)


def train(
    optimizer: str,
    steps: int,
    eps: float,
    rows: int,
    passes: int,
    packed=True,
    prepare=None,
    trainer_class=PackedTrainer,
) -> dict[str, torch.Tensor]:
    """Parameters after training by PackedTrainer. prepare: a mistake, made in the model or the batches."""
    packs = make_packs(steps)
    model = make_model(PackedBertForPreTraining)
    collator = DataCollatorWithPacking(make_tokenizer(), pad_to=MAX_LENGTH, max_sequences_per_pack=max(DEPTHS))
    if prepare is not None:
        collator = prepare(model, collator) or collator
    with tempfile.TemporaryDirectory() as folder:
        training = arguments(folder, optimizer, steps, eps, rows, passes)
        trainer = trainer_class(
            model,
            training,
            train_dataset=Dataset.from_list(packs if packed else unpack(packs)),
            data_collator=collator,
            optimizer_cls_and_kwargs=optimizer_for(optimizer, training, model),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return parameters_of(model)


def train_stock(optimizer: str, steps: int, eps: float) -> dict[str, torch.Tensor]:
    """Parameters after training stock BERT on one sequence after the other: no pack, no batch, no Trainer."""
    packs = make_packs(steps)
    model = make_model(BertForPreTraining)
    collator = DataCollatorWithPacking(make_tokenizer(), max_sequences_per_pack=1)  # for its masks
    with tempfile.TemporaryDirectory() as folder:
        training = arguments(folder, optimizer, steps, eps, 1, 1)
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups = [
        {"params": [p for name, p in model.named_parameters() if name in decayed], "weight_decay": 0.01},
        {"params": [p for name, p in model.named_parameters() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer_class, options = optimizer_for(optimizer, training, model)
    updates = optimizer_class(groups, **options)
    schedule = get_scheduler("linear", updates, int(training.warmup_steps), steps)
    for step in range(steps):
        mlm_losses, nsp_losses = [], []
        for row in unpack(packs[step * len(DEPTHS) : (step + 1) * len(DEPTHS)]):
            batch = collator([row])
            output = model(batch["input_ids"], token_type_ids=batch["token_type_ids"])
            predicted = batch["labels"] != -100
            mlm_losses.append(F.cross_entropy(output.prediction_logits[predicted], batch["labels"][predicted]))
            label = batch["next_sentence_label"][0]
            nsp_losses.append(F.cross_entropy(output.seq_relationship_logits, label))
        loss = torch.stack(mlm_losses).mean() + torch.stack(nsp_losses).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        updates.step()
        schedule.step()
        updates.zero_grad()
    return parameters_of(model)


def two_processes(optimizer: str, steps: int, eps: float) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__]
        save = Path(folder) / f"{optimizer}.pt"
        command += ["--steps", str(steps), "--eps", str(eps), "--save", str(save)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{' '.join(command)}\n{run.stderr[-3000:]}")
        return torch.load(save)


def train_in_two_processes(options: argparse.Namespace) -> None:
    parameters = train(options.save.stem, options.steps, options.eps, 2, 1)
    if torch.distributed.get_rank() == 0:
        torch.save(parameters, options.save)
    torch.distributed.barrier()
    gc.collect()  # a DistributedDataParallel that outlives the group may hang as it ends
    torch.distributed.destroy_process_group()


# -- mistakes --------------------------------------------------------------------------------------------------------


class MeanOfMeans(PackedTrainer):
    """Each pass has its own mean, and passes are averaged: what Trainer does with a loss that is a plain mean."""

    loss_is_scaled_for_ga = True  # it divides by the passes itself

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs) / self.args.gradient_accumulation_steps


class RowWideAttention(nn.Module):
    """Every real token of the row, instead of the sequence's."""

    def __init__(self, **_):
        super().__init__()

    def forward(self, query_THK, key_THK, value_THK, layout, dropout=0.0):
        query, key, value = (layout.pad(x).transpose(1, 2) for x in (query_THK, key_THK, value_THK))
        mask = layout.is_real_BL[:, None, None, :]
        return layout.unpad(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2))


def without_isolation(model, collator) -> None:
    use_attention(model, RowWideAttention)


class OnePositionAfterTheOther(DataCollatorWithPacking):
    """Positions count through the row."""

    def __call__(self, features):
        batch = super().__call__(features)
        return batch | {"position_ids": torch.arange(MAX_LENGTH).expand(batch["input_ids"].shape)}


def without_reset(model, collator) -> DataCollatorWithPacking:
    return OnePositionAfterTheOther(make_tokenizer(), pad_to=MAX_LENGTH, max_sequences_per_pack=max(DEPTHS))


RIGHT: dict[str, Callable] = {
    "unpacked 1 x 16": partial(train, rows=16, passes=1, packed=False),
    "unpacked 4 x 4": partial(train, rows=4, passes=4, packed=False),
    "packed 1 x 4": partial(train, rows=4, passes=1),
    "packed 4 x 1": partial(train, rows=1, passes=4),
    "packed, 2 processes": two_processes,
}

MISTAKES: dict[str, Callable] = {
    "mean of the passes' means": partial(train, rows=1, passes=4, trainer_class=MeanOfMeans),
    "no isolation": partial(train, rows=4, passes=1, prepare=without_isolation),
    "positions not reset": partial(train, rows=4, passes=1, prepare=without_reset),
}


# -- differences -----------------------------------------------------------------------------------------------------


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def length(parameters: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([(values**2).sum() for values in parameters.values()]).sum().sqrt())


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return length({name: a[name] - b[name] for name in b})


def tensor_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def is_seen(name: str) -> bool:
    """Whether the loss depends on a parameter at all."""
    return not name.endswith("attention.self.key.bias")


if __name__ == "__main__":
    main()
