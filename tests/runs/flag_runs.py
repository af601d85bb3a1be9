"""Runs of `bert-pretrain train` whose options are flags, as a user types them."""

import tiny_runs

from bert_pretrain.cli import main as bert_pretrain

SMALL = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"]


def make_folders(folder):
    """{"folder", "prepared", "packed", "tokenizer"}: text of 60 paragraphs, prepared and packed at 64."""
    made = tiny_runs.make_folders(folder)
    return {"folder": folder, "packed": made["dataset"]} | {name: made[name] for name in ("prepared", "tokenizer")}


def train(folders, output, *options):
    what = ["--dataset", folders["packed"], "--tokenizer", folders["tokenizer"], "--output_dir", str(output)]
    how = ["--sequences_per_step", "12", "--max_steps", "4", "--logging_steps", "1", "--use_cpu", "True"]
    quietly = ["--report_to", "none", "--disable_tqdm", "True"]
    shape = [] if "--model" in options else SMALL
    return bert_pretrain(["train", *what, *how, *quietly, *shape, *options])
