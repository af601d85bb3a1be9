"""What a run learns of sentence pairs: the columns of its dataset, and the configuration's objective."""

import json
import logging
import random

import pytest
import torch
from datasets import Dataset

from bert_pretrain.attention import ATTENTION
from bert_pretrain.cli import main as bert_pretrain
from bert_pretrain.objective import OBJECTIVES
from bert_pretrain.prepare.sequences import builder_of
from bert_pretrain.train.checks import check_objective, for_objective
from bert_pretrain.train.config import HEADS, PretrainConfig
from collate.columns import PAIR_LABELS
from collate.heads import PreTraining
from packing.cli import main as pack_dataset

COLUMNS = {"nsp": ["next_sentence_label"], "sop": ["sentence_order_label"], "none": []}
COLUMNS["both"] = COLUMNS["nsp"] + COLUMNS["sop"]


def config(objective):
    return PretrainConfig(dataset="packed", tokenizer="", objective=objective)


def dataset(labels):
    return Dataset.from_dict({name: [[1, 0]] for name in ["input_ids", *COLUMNS[labels]]})


@pytest.mark.parametrize("labels", ["nsp", "sop", "none"])
def test_the_objective_is_what_the_columns_say(labels):
    assert check_objective(config("auto"), dataset(labels)) == labels
    assert check_objective(config(labels), dataset(labels)) == labels
    split = dataset(labels)
    assert for_objective(config("auto"), split, None) == [split, None]


def test_none_ignores_labels_and_says_so(caplog):
    with caplog.at_level(logging.INFO, "bert_pretrain.train.checks"):
        splits = for_objective(config("none"), dataset("sop"), dataset("both"))
    assert [split.column_names for split in splits] == [["input_ids"], ["input_ids"]]
    assert "objective=none: sentence_order_label is in the dataset, and is not learned" in caplog.text


@pytest.mark.parametrize(
    ("objective", "labels", "message"),
    [
        (
            "sop",
            "nsp",
            r"objective='sop' needs the column 'sentence_order_label', and packed has \['input_ids', 'n",
        ),
        ("sop", "nsp", r"prepare the text with --objective sop, or set the objective to 'nsp'"),
        ("nsp", "none", r"needs the column 'next_sentence_label', and packed has \['input_ids'\]; .* to 'none'"),
        ("auto", "both", "has the columns next_sentence_label and sentence_order_label, .* remove_columns"),
        ("nsp", "both", "one head cannot learn both"),
    ],
)
def test_columns_that_do_not_fit_are_refused(objective, labels, message):
    with pytest.raises(ValueError, match=message):
        check_objective(config(objective), dataset(labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "the column 'next_sentence_label' holds 2; a label is 0 or 1, or -100 where there is no pair"),
        ([0, None], "the column 'next_sentence_label' holds None; a label is 0 or 1"),
        ([0.0, 1.0], "the column 'next_sentence_label' holds double; a label is 0 or 1"),
    ],
)
def test_labels_that_no_loss_could_take_are_refused_wherever_they_are(labels, message):
    """A wrong label in the last of many packs of the other split is found, too."""
    right = Dataset.from_dict({"next_sentence_label": [[0, 1], [-100]]})
    wrong = Dataset.from_dict({"next_sentence_label": [[type(labels[0])(0)]] * 12_000 + [labels]})
    with pytest.raises(ValueError, match=f"^packed: {message}"):
        for_objective(config("auto"), right, wrong)
    assert for_objective(config("none"), right, wrong)[1].column_names == []  # not looked at
    flags = Dataset.from_dict({"next_sentence_label": [[True, False]]})
    assert for_objective(config("auto"), right, flags) == [right, flags]


def test_splits_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match=r"different objectives, \['nsp', 'sop'\]"):
        for_objective(config("auto"), dataset("nsp"), dataset("sop"))
    with pytest.raises(ValueError, match="unknown objective 'mlm'; choose from"):
        config("mlm")


def test_a_stock_model_refuses_the_label_of_the_other():
    batch = {"sequence_ids": torch.ones(1, 4, dtype=torch.int32), "sentence_order_label": torch.zeros(1, 1)}
    with pytest.raises(ValueError, match="has 'sentence_order_label', but this model learns 'next_sentence_label'"):
        PreTraining().count(batch)


@pytest.mark.parametrize("name", ["nsp", "sop"])
def test_stock_models_name_what_they_learn(name):
    task = PreTraining(pair_label=COLUMNS[name][0])
    sums = {"pair_loss": 1.5, "pairs": 3, "pair_correct": 2, "pair_ones": 1}
    metrics = task.metrics(torch.tensor([sums.get(field, 1) for field in (*task.formula.names, "tokens", "sequences")]))
    assert metrics[f"{name}_loss"] == 0.5 and metrics[f"{name}_majority"] == pytest.approx(2 / 3)
    assert sum(key.startswith(("nsp", "sop")) for key in metrics) == 3


@pytest.fixture(scope="module")
def sop_folders(tmp_path_factory):
    """Text of 40 paragraphs, some of one sentence, prepared for SOP and packed at 64."""
    folder = tmp_path_factory.mktemp("sop")
    draw = random.Random(0)
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "big", "old", "house", "tree", "river", "quickly"]
    sentences = lambda n: " ".join(" ".join(draw.choices(words, k=7)).capitalize() + "." for _ in range(n))  # noqa: E731
    (folder / "text.txt").write_text("\n\n".join(sentences(1 + n % 5) for n in range(40)), encoding="utf-8")
    text, prepared, packed = (str(folder / name) for name in ("text.txt", "prepared", "packed"))
    options = ["--max_sequence_length", "64", "--vocab_size", "120", "--test_fraction", "0.2", "--objective", "sop"]
    assert bert_pretrain(["prepare", "--text", text, "--output", prepared, *options]) == 0
    assert pack_dataset([prepared, packed, "--max-sequence-length", "64"]) == 0
    return ["--dataset", packed, "--tokenizer", f"{prepared}/tokenizer"]


def train(folders, output, *options):
    small = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--max_steps", "2"]
    quietly = ["--report_to", "none", "--disable_tqdm", "True", "--use_cpu", "True", "--logging_steps", "1"]
    everything = [*folders, "--output_dir", str(output), "--sequences_per_step", "12", *small, *quietly, *options]
    return bert_pretrain(["train", *everything])


@pytest.mark.parametrize("objective", ["auto", "none"])
def test_the_whole_way(sop_folders, tmp_path, objective):
    assert train(sop_folders, tmp_path / "bert", "--objective", objective) == 0
    first, *_, last = json.loads((tmp_path / "bert" / "trainer_state.json").read_text())["log_history"]
    assert not any("nsp" in name for name in first.keys() | last.keys())
    names = {"sop_loss", "sop_accuracy", "sop_majority"}
    assert names & first.keys() == (names if objective == "auto" else set())
    evaluation = json.loads((tmp_path / "bert" / "eval_results.json").read_text())
    assert ("eval_sop_majority" in evaluation) == (objective == "auto")
    assert (tmp_path / "bert" / "model.safetensors").exists()


def test_a_missing_column_is_told_before_the_first_step(sop_folders, tmp_path, capsys):
    assert train(sop_folders, tmp_path / "bert", "--objective", "nsp") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--objective nsp needs the column 'next_sentence_label'" in error and "'sentence_order_label'" in error
    assert not (tmp_path / "bert").exists()


def test_every_row_is_complete():
    """A row names a builder that is there, and a column that the losses know by the same name."""
    for name, row in OBJECTIVES.items():
        assert callable(builder_of(name))
        assert row.column == PAIR_LABELS.get(name)
        assert (row.label_1 == "") == (row.name == "") == (row.column is None)
    assert {name for name, row in OBJECTIVES.items() if row.column is not None} == PAIR_LABELS.keys()


def test_the_catalogue_of_help_is_the_table_of_heads():
    assert sorted(ATTENTION) == HEADS
