"""Labels and ids that a model has no place for: an error that names the column, the row, the value and the cure."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from stock_runs import make_collator, make_model, make_packs, make_source, make_trainer

from collate import task_for
from collate.heads.check import embedding_sizes, refuse_text
from packing import EpochPacks, pack_dataset


def with_label(head, row, change, column="labels"):
    """Packs whose source has another label in one row."""
    rows = make_source(head).to_list()
    rows[row][column] = change(rows[row][column])
    return pack_dataset(Dataset.from_list(rows), 32, seed=4)


def at(place, value):
    def change(labels):
        labels[place] = value
        return labels

    return change


WRONG = [
    (
        "single",
        lambda label: 3,
        r"'labels' is 3 at row 7 of the source, but the model has num_labels=3: ids are 0 to 2",
    ),
    ("single", lambda label: -1, r"'labels' is -1 at row 7 of the source.*-100 where nothing is labelled.*label2id"),
    ("tokens", at(2, 4), r"'labels' is 4 at token 2 of row 7 of the source, but the model has num_labels=4"),
    ("tokens", at(1, -7), r"'labels' is -7 at token 1 of row 7 of the source"),
    ("multi", at(1, 2.0), r"'labels' is 2 at row 7 of the source, but each of several labels is a number from 0 to 1"),
    ("multi", at(0, -100.0), r"'labels' is -100 at row 7 of the source.*NaN where it is not known"),
]


@pytest.mark.parametrize(("head", "change", "message", "workers"), [*((*case, 0) for case in WRONG), (*WRONG[0], 1)])
def test_a_label_out_of_range_is_named(head, change, message, workers):
    packs = with_label(head, 7, change)
    options = {"train_dataset": packs, "data_collator": make_collator(head), "dataloader_num_workers": workers}
    with make_trainer(make_model(head), **options) as trainer:
        with pytest.raises(ValueError, match=message):
            trainer.train()
        with pytest.raises(ValueError, match=message):
            trainer.evaluate(packs)


@pytest.mark.parametrize(("head", "change", "message"), WRONG)
def test_and_in_a_loop_of_ones_own(head, change, message):
    model, packs = make_model(head), with_label(head, 7, change)
    task, batch = task_for(model), make_collator(head)(packs)
    place = message.partition(" at ")[0]
    with pytest.raises(ValueError, match=f"{place} at .*sequence \\d+ of pack \\d+ of the batch"):
        task(model, batch)


def test_labels_within_range_pass():
    for head in ("single", "multi", "tokens", "regression", "answers", "mlm"):
        model = make_model(head)
        task_for(model).check(make_collator(head)(make_packs(head)))


@pytest.mark.parametrize("head", ["tokens", "answers"])
def test_floats_are_no_ids(head):
    column = "labels" if head == "tokens" else "end_positions"
    model, batch = make_model(head), make_collator(head)(make_packs(head))
    batch[column] = batch[column].float()
    with pytest.raises(ValueError, match=f"'{column}' holds floats, but labels are ids; cast the column to integers"):
        task_for(model)(model, batch)


def test_labels_of_masks_and_pairs():
    model = make_model("mlm")
    task, batch = task_for(model), make_collator("mlm")(make_packs("mlm"))
    pack, slot = (batch["labels"] >= 0).nonzero()[0].tolist()
    batch["labels"][pack, slot] = 60
    with pytest.raises(ValueError, match=r"'labels' is 60 at token .*the model has vocab_size=60: ids are 0 to 59"):
        task(model, batch)


# Ids without an embedding.


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "input_ids",
            60,
            r"'input_ids' is 60 at token 1 of row 7 of the source.*for 0 to 59; use the model's own token",
        ),
        ("token_type_ids", 2, r"'token_type_ids' is 2 at token 1 of row 7.*0 to 1; remove the column"),
    ],
)
def test_ids_without_an_embedding_are_named(column, value, message):
    packs = with_label("single", 7, at(1, value), column)
    made = make_trainer(make_model("single"), data_collator=make_collator("single"))
    with made as trainer, pytest.raises(ValueError, match=message):
        trainer.predict(packs)


def test_positions_without_an_embedding_are_named():
    model = make_model("single")
    assert embedding_sizes(model) == {"input_ids": 60, "token_type_ids": 2, "position_ids": 32}
    rows = [{"input_ids": [2, *[7] * 40, 3], "labels": 1}]
    packs = pack_dataset(Dataset.from_list(rows), 48)
    message = r"'position_ids' is 32 at token 32 of row 0 of the source.*truncate"
    made = make_trainer(model, data_collator=make_collator("single"))
    with made as trainer, pytest.raises(ValueError, match=message):
        trainer.evaluate(packs)


# Text.


def text_labels(column="label", values=("neg", "pos")):
    source = make_source("single")
    names = np.resize(values, len(source)).tolist()
    return pack_dataset(source.remove_columns("labels").add_column(column, names), 32)


@pytest.mark.parametrize("column", ["label", "labels", "label_ids"])
def test_labels_that_are_text_are_called_so(column):
    packs = text_labels(column)
    message = f"labels in column '{column}' are text, in the first pack 'neg', 'pos'; map them to ids.*label2id = "
    with make_trainer(make_model("single"), data_collator=make_collator("single"), train_dataset=packs) as trainer:
        with pytest.raises(ValueError, match=message + "{'neg': 0, 'pos': 1, …}"):
            trainer.train()
        with pytest.raises(ValueError, match=message):
            trainer.evaluate(packs)
        with pytest.raises(ValueError, match=message):
            trainer.evaluate(EpochPacks(packs))


def test_lists_of_text_are_text():
    source = make_source("tokens").map(lambda row: {"labels": ["B-PER"] * len(row["input_ids"])})
    with pytest.raises(ValueError, match="'labels' are text, in the first pack 'B-PER'"):
        refuse_text(pack_dataset(source, 32), ["labels"])


def test_text_beside_labels_does_no_harm():
    packs = text_labels().add_column("labels", _ids(text_labels()))
    refuse_text(packs, ["labels", "label"])
    with make_trainer(make_model("mlm"), data_collator=make_collator("mlm")) as trainer:
        assert trainer.evaluate(text_labels())["eval_loss"] > 0
    with make_trainer(make_model("single"), data_collator=make_collator("single", columns=["extra"])) as trainer:
        assert "eval_loss" not in trainer.evaluate(text_labels())


def _ids(packs):
    return [[0] * len(lengths) for lengths in packs["sequence_lengths"]]


def test_class_labels_are_numbers():
    packs = pack_dataset(make_source("single").cast_column("labels", ClassLabel(names=["a", "b", "c"])), 32)
    refuse_text(packs, ["labels"])
    assert torch.is_tensor(make_collator("single")(packs)["labels"])
