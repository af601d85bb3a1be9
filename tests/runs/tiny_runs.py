"""Text, sequences, packs and training runs as small as possible, made with the commands that a user types."""

import json
from pathlib import Path

import numpy as np

from bert_pretrain.cli import main as bert_pretrain
from packing.cli import main as pack_dataset

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "big", "old", "house", "tree", "river", "quickly"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_text(file, num_paragraphs=60, seed=0):
    rng = np.random.default_rng(seed)

    def sentence():
        return " ".join(rng.choice(WORDS, rng.integers(3, 12))).capitalize() + "."

    paragraphs = [" ".join(sentence() for _ in range(rng.integers(1, 6))) for _ in range(num_paragraphs)]
    Path(file).write_text("\n\n".join(paragraphs), encoding="utf-8")
    return str(file)


def make_folders(folder, length=64, **options):
    """{"prepared", "packed", "tokenizer"}: folders, as the options `dataset` and `tokenizer` of `train` want them."""
    text, prepared, packed = write_text(folder / "text.txt"), str(folder / "prepared"), str(folder / "packed")
    defaults = {"text": text, "output": prepared, "max_sequence_length": length, "test_fraction": 0.2}
    if "tokenizer" not in options:
        defaults["vocab_size"] = 120
    assert bert_pretrain(["prepare", *flags(defaults | options)]) == 0
    assert pack_dataset([prepared, packed, "--max-sequence-length", str(length)]) == 0
    return {"prepared": prepared, "dataset": packed, "tokenizer": options.get("tokenizer", f"{prepared}/tokenizer")}


def flags(options):
    """{"seed": 1, "use_cpu": True} -> ["--seed", "1", "--use_cpu", "True"]"""
    return [text for name, value in options.items() for text in (f"--{name}", *map(str, np.atleast_1d(value)))]


def train_options(folders, output, **options):
    """4 steps of 12 sequences with a tiny model, on a CPU, without output."""
    data = {name: folders[name] for name in ("dataset", "tokenizer")}
    run = {"output_dir": str(output), "sequences_per_step": 12, "max_steps": 4, "logging_steps": 1, "use_cpu": True}
    quietly = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    shape = SMALL if options.get("model") is None else {}
    given = data | run | quietly | shape | options
    return {name: value for name, value in given.items() if value is not None}


def train(folders, output, **options):
    """The exit status of `bert-pretrain train`; an option that is None is left out."""
    return bert_pretrain(["train", *flags(train_options(folders, output, **options))])


def history(output):
    return json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
