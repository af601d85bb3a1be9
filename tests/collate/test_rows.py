"""What rows hold beside tokens, and whether the collator uses it: special tokens, words, labels; and no rows."""

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    RoCBertConfig,
    RoCBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from bert_pretrain.train.checks import check_tokenizer
from collate import DataCollatorWithPacking, PackedTrainer, PackLayout, check_isolation, isolate_sequences
from collate.heads import MaskedLM, packed_predictions
from collate.masking import MASKING
from collate.vocabulary import token_ids, vocabulary_size
from packing import EpochPacks, pack_dataset, pack_stream, unpack_dataset, verify_packed

CLS, SEP = 2, 3
NAMES = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def marked_rows(count=40, seed=0):
    """[CLS] entity words [SEP], of which the entity, 1 to 4 tokens, and a word here and there are marked."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = draw.integers(5, 60, draw.integers(6, 12))
        marks = (np.arange(len(words)) < draw.integers(1, 5)) | (draw.random(len(words)) < 0.2)
        rows.append(
            {"input_ids": [CLS, *words.tolist(), SEP], "special_tokens_mask": [1, *marks.astype(int).tolist(), 1]}
        )
    return rows


# special_tokens_mask


@pytest.mark.parametrize("masking", MASKING)
@pytest.mark.parametrize("form", ["packed", "keep", "pack", "arrow"])
def test_what_special_tokens_mask_marks_is_never_predicted(tokenizer, masking, form):
    rows, options = datasets.Dataset.from_list(marked_rows()), {"masking": masking, "mlm_probability": 0.8}
    if form in ("packed", "arrow"):
        rows = pack_dataset(rows, max_sequence_length=32)
        collate = DataCollatorWithPacking(tokenizer, columns=["special_tokens_mask"], **options).for_dataset(rows)
        rows = rows.with_format("arrow")[:] if form == "arrow" else list(rows)
    else:
        options |= {"unpacked_rows": form, "pad_to": 32, "columns": ["special_tokens_mask"]}
        collate, rows = DataCollatorWithPacking(tokenizer, **options), list(rows)
    batch = collate(rows)
    is_marked = (batch["special_tokens_mask"] == 1) & (batch["sequence_ids"] > 0)
    assert is_marked.sum() > 150 and (batch["labels"][is_marked] == -100).all()
    assert (batch["labels"][~is_marked & (batch["sequence_ids"] > 0)] != -100).float().mean() > 0.7
    # negative control: without the column they are predicted
    collate.columns = None
    if form != "arrow":
        bare = [{name: row[name] for name in row if name != "special_tokens_mask"} for row in rows]
        assert (collate(bare)["labels"][is_marked] != -100).any()


def test_stock_does_not_predict_them_either(tokenizer):
    rows = [{**row, "special_tokens_mask": np.array(row["special_tokens_mask"])} for row in marked_rows(200)]
    rows = [{name: np.asarray(value) for name, value in row.items()} for row in rows if len(row["input_ids"]) == 10]
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.8, seed=1)([dict(row) for row in rows])
    ours = DataCollatorWithPacking(tokenizer, 0.8, "independent", unpacked_rows="keep")(rows)
    marked = torch.tensor(np.array([row["special_tokens_mask"] for row in rows]) == 1)
    for labels in (theirs["labels"], ours["labels"]):
        assert (labels[marked] == -100).all()
        assert abs((labels[~marked] != -100).float().mean() - 0.8) < 0.07


def test_a_marked_sequence_has_no_label_and_no_part_in_the_denominator(tokenizer):
    rows = [
        {"input_ids": [2, 8, 9, 3], "special_tokens_mask": [1, 1, 1, 1]},
        {"input_ids": [2, 8, 9, 7, 3], "special_tokens_mask": [1, 0, 0, 0, 1]},
    ]
    batch = DataCollatorWithPacking(tokenizer, pad_to=12, unpacked_rows="pack")(rows)
    (slot,) = (batch["labels"] != -100).nonzero().tolist()
    number = batch["sequence_ids"][tuple(slot)]
    assert batch["input_ids"][batch["sequence_ids"] == number].tolist().count(3) == 1
    assert (batch["sequence_ids"] == number).sum() == 5
    of_one = DataCollatorWithPacking(tokenizer, unpacked_rows="keep")(rows[:1])
    assert MaskedLM().count(of_one).tolist() == [0, 0] and MaskedLM().count(batch).tolist() == [1, 1]


def test_a_marked_token_parts_a_word(tokenizer):
    """word_ids say that 8 9 10 are one word; 9 is marked, so that neither half is longer than the budget of 1."""
    row = {"input_ids": [2, 8, 9, 10, 3], "special_tokens_mask": [1, 0, 1, 0, 1], "word_ids": [-1, 0, 0, 0, -1]}
    collate = DataCollatorWithPacking(tokenizer, whole_word_mask=True, unpacked_rows="keep")
    assert collate.count_words([row])["words"] == 2
    assert {int(i) for epoch in range(20) for i in _predicted(collate, row, epoch)} == {1, 3}


def _predicted(collate, row, epoch):
    collate.set_epoch(epoch)
    return (collate([row])["labels"][0] != -100).nonzero()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 0, 1], "3 values in 'special_tokens_mask' but 4 tokens .* remove it from the dataset"),
        ([1.0, 0.5, 0.0, 1.0], "special_tokens_mask_T must hold 4 integers"),
    ],
)
def test_a_mask_of_something_else_is_refused(tokenizer, mask, message):
    row = {"input_ids": [2, 8, 9, 3], "special_tokens_mask": mask}
    for options in ({}, {"token_columns": []}):  # which does not list tokens that are always special
        with pytest.raises(ValueError, match=message):
            DataCollatorWithPacking(tokenizer, unpacked_rows="keep", **options)([row])
        with pytest.raises(ValueError, match=message):
            DataCollatorWithPacking(tokenizer, **options)([row | {"sequence_lengths": [4]}])


def test_packed_rows_have_no_masked_tokens(tokenizer):
    row = {"input_ids": [2, 8, 3, 2, 9, 3], "sequence_lengths": [3, 3], "attention_mask": [1] * 6}
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None)
    assert collate([row])["input_ids"].tolist() == [row["input_ids"]]
    with pytest.raises(ValueError, match="the packs have an attention_mask with zeros"):
        collate([row | {"attention_mask": [1, 1, 1, 1, 0, 1]}])


@pytest.mark.parametrize("form", ["lists", "arrow"])
def test_a_mask_that_numbers_sequences_is_refused(tokenizer, form):
    """[1, 1, 1, 2, 2, 2] would be taken for one sequence of six tokens."""
    row = {"input_ids": [2, 8, 3, 2, 9, 3], "attention_mask": [1, 1, 1, 2, 2, 2]}
    for options, more in (({"unpacked_rows": "keep"}, {}), ({}, {"sequence_lengths": [6]})):
        rows = [row | more]
        if form == "arrow":
            rows = datasets.Dataset.from_list(rows).with_format("arrow")[:]
        with pytest.raises(ValueError, match="attention_mask has the value 2 in the batch"):
            DataCollatorWithPacking(tokenizer, **options)(rows)


# Options that would be ignored


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "span"}, "masking='span' is for masking, but mlm_probability=None switches it off"),
        ({"whole_word_mask": True}, "whole_word_mask=True is for masking"),
        ({"mask_replace_prob": 1.0}, "mask_replace_prob=1.0 is for masking"),
        ({"max_predictions_per_sequence": 20}, "max_predictions_per_sequence=20 is for masking"),
        ({"pad_to": 20, "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 contradicts pad_to=20"),
        ({"emit": "flash", "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 contradicts emit='flash'"),
    ],
)
def test_options_without_effect_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPacking(tokenizer, mlm_probability=None, **options)


def test_options_that_were_not_heard(tokenizer):
    rows = pack_dataset(datasets.Dataset.from_list(marked_rows()), max_sequence_length=30)
    rounded = DataCollatorWithPacking(tokenizer, pad_to_multiple_of=8).for_dataset(rows)
    assert rounded([rows[0]])["input_ids"].shape == (1, 32)
    with pytest.raises(ValueError, match="unknown return_tensors='tf'; choose from 'pt', 'np'"):
        rounded([rows[0]], return_tensors="tf")
    with pytest.raises(ValueError, match="more than pad_to=8"):
        DataCollatorWithPacking(tokenizer, emit="flash", pad_to=8)([rows[0]])


# Labels of tokens, or several of a sequence


def listed_rows(count=6, labels=6, tokens=6, column="labels"):
    return [{"input_ids": [CLS, *range(8, 6 + tokens), SEP], column: [float(i % 2)] * labels} for i in range(count)]


def test_six_labels_of_six_tokens_are_whose_the_task_says(tokenizer):
    config = BertConfig(**SIZES, num_labels=6, problem_type="multi_label_classification")
    options = {"mlm_probability": None, "unpacked_rows": "keep"}
    by_model = {
        cls: DataCollatorWithPacking(tokenizer, model=cls(config), **options)(listed_rows())["labels"]
        for cls in (BertForSequenceClassification, BertForTokenClassification)
    }
    assert by_model[BertForSequenceClassification].shape == (6, 1, 6)
    assert by_model[BertForTokenClassification].shape == (6, 6)
    named = DataCollatorWithPacking(tokenizer, token_columns=[], **options)
    assert named(listed_rows())["labels"].shape == (6, 1, 6)
    with pytest.raises(ValueError, match=r"'labels' has 6 values in each row .* each row has 6 tokens.*token_columns="):
        DataCollatorWithPacking(tokenizer, **options)(listed_rows())
    for count in (1, 2):  # lengths that differ leave no doubt
        longer = [*listed_rows(count), {"input_ids": [2, 8, 3], "labels": [0.0] * 6}]
        assert DataCollatorWithPacking(tokenizer, **options)(longer)["labels"].shape == (count + 1, 1, 6)


@pytest.mark.parametrize("labels", [6, 9])
def test_an_epoch_does_not_end_at_a_last_batch_of_one_row(tokenizer, labels):
    """This batch does not tell what the lists belong to, but the one before does: it has a row of 9 tokens, not 6."""
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None, unpacked_rows="keep")
    collate(listed_rows(2) + listed_rows(1, labels, tokens=9))
    assert collate(listed_rows(1))["labels"].shape == ((1, 6) if labels == 9 else (1, 1, 6))


@pytest.mark.parametrize("column", ["labels", "topics"])
def test_what_lists_belong_to_is_decided_by_the_whole_dataset(tokenizer, column):
    """One row of 9 tokens at the end tells what the lists of the earlier batches are."""
    several, of_tokens, ragged = (
        datasets.Dataset.from_list(listed_rows(8, column=column) + listed_rows(1, labels, 9, column))
        for labels in (6, 9, 7)
    )
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None, unpacked_rows="keep")
    for first in range(8):
        assert collate.for_dataset(several)([several[first]])[column].shape == (1, 1, 6)
    assert collate.for_dataset(of_tokens)([several[0]])[column].shape == (1, 6)
    assert column not in collate.for_dataset(ragged)([several[0]])


def test_training_on_several_labels_where_a_batch_misleads(tokenizer, tmp_path):
    """Batches of sequences of 6 tokens, 6 labels: the loss is that of all other lengths."""
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=6, problem_type="multi_label_classification"))
    trainer = PackedTrainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True),
        data_collator=DataCollatorWithPacking(tokenizer, mlm_probability=None, unpacked_rows="keep"),
    )
    alone = [
        trainer.evaluate(datasets.Dataset.from_list(listed_rows(2, tokens=tokens)))["eval_loss"] for tokens in (6, 7)
    ]
    together = trainer.evaluate(datasets.Dataset.from_list(listed_rows(2) + listed_rows(2, tokens=7)))["eval_loss"]
    assert together == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_plain_trainer_tells_the_collator_of_the_task(tokenizer, tmp_path):
    """Labels of tokens, in a batch whose rows are all of one length."""
    model = BertForTokenClassification(BertConfig(**SIZES, num_labels=2))
    isolate_sequences(model)
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None, unpacked_rows="keep")
    arguments = {"report_to": "none", "use_cpu": True, "remove_unused_columns": False, "max_steps": 2}
    rows = [{"input_ids": row["input_ids"], "labels": [0, 1] * 3} for row in listed_rows(8)]
    options = {"data_collator": collate, "train_dataset": datasets.Dataset.from_list(rows)}
    Trainer(model, TrainingArguments(tmp_path, **arguments), callbacks=[collate.callback()], **options).train()
    assert collate(rows)["labels"].shape == (8, 6)


def test_a_stream_is_not_of_two_minds():
    """Lists as long as the tokens in the first thousand rows, and then not: refused, not packed by another rule."""

    def rows():
        yield from listed_rows(1000)
        yield from listed_rows(20, tokens=9)

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(ValueError, match=r"column 'labels' in row .* has 6 values, where input_ids has 9"):
        list(pack_stream(stream, max_sequence_length=32, buffer_size=510))


# Word ids


def with_none(row):
    return row | {"word_ids": [None if word < 0 else word for word in row["word_ids"]]}


def worded_rows(count=20, seed=3):
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = np.repeat(np.arange(9), draw.integers(1, 3, 9))
        rows.append({"input_ids": [CLS, *draw.integers(5, 60, len(words)).tolist(), SEP], "word_ids": [-1, *words, -1]})
    return rows


@pytest.mark.parametrize("form", ["list", "columns", "numpy", "torch", "arrow"])
@pytest.mark.parametrize("packed", [False, True])
def test_word_ids_may_be_those_of_a_tokenizer(tokenizer, form, packed):
    """None for [CLS] and [SEP], from the rows to the masks: the masks are those of -1."""
    numbered = [{name: [int(value) for value in row[name]] for name in row} for row in worded_rows()]
    options = {"whole_word_mask": True, "mlm_probability": 0.3, "unpacked_rows": None if packed else "keep"}
    batches = []
    for rows in (numbered, [with_none(row) for row in numbered]):
        rows = datasets.Dataset.from_list(rows)
        if packed:
            rows = pack_dataset(rows, max_sequence_length=64)
        formatted = rows if form in ("list", "columns") else rows.with_format(form)
        batch = formatted[:] if form in ("columns", "arrow") else [formatted[i] for i in range(len(rows))]
        batches.append(DataCollatorWithPacking(tokenizer, **options)(batch))
    assert torch.equal(batches[0]["labels"], batches[1]["labels"]) and (batches[0]["labels"] != -100).any()


def test_word_ids_of_a_tokenizer_survive_packing(tmp_path):
    source = datasets.Dataset.from_list(
        [with_none({name: [int(v) for v in row[name]] for name in row}) for row in worded_rows()]
    )
    packed = pack_dataset(source, max_sequence_length=64)
    assert unpack_dataset(packed)["word_ids"] == source["word_ids"]
    epochs = EpochPacks(packed)
    epochs.set_epoch(1)
    words = {
        index: row["word_ids"][sum(row["sequence_lengths"][:slot]) :][: row["sequence_lengths"][slot]]
        for row in (epochs[i] for i in range(len(epochs)))
        for slot, index in enumerate(row["sequence_indices"])
    }
    assert [list(words[i]) for i in range(len(source))] == source["word_ids"]
    pack_dataset(source, max_sequence_length=64, output=tmp_path / "packed")
    assert verify_packed(tmp_path / "packed", source).ok
    stream = pack_stream(source.to_iterable_dataset(), max_sequence_length=64)
    assert sum(row["word_ids"].count(None) for row in stream) == 2 * len(source)
    with pytest.raises(ValueError, match=r"'tags' .*null"):
        pack_dataset(source.rename_column("word_ids", "tags"), max_sequence_length=64)


# Vocabularies that are no range


def gappy_tokenizer():
    """20 words at ids 100, 110 … 290."""
    vocabulary = {token: i for i, token in enumerate(NAMES.values())} | {f"w{i}": 100 + 10 * i for i in range(20)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return BertTokenizer(tokenizer_object=backend, **NAMES)


def tokenizer_with_a_line_twice(folder):
    (folder / "vocab.txt").write_text("\n".join([*NAMES.values(), "a", "b", "a", "c"]), encoding="utf-8")
    return BertTokenizer(vocab=str(folder / "vocab.txt"))


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("which", ["gaps", "a line twice"])
def test_vocabularies_that_are_no_range(tmp_path, which, whole_words):
    tokenizer = gappy_tokenizer() if which == "gaps" else tokenizer_with_a_line_twice(tmp_path)
    words = " ".join(f"w{i}" for i in range(20)) if which == "gaps" else "a b c a b c b"
    size = {"gaps": 291, "a line twice": 9}[which]
    assert vocabulary_size(tokenizer) == size > len(tokenizer) and len(token_ids(tokenizer)) == len(tokenizer)
    collate = DataCollatorWithPacking(
        tokenizer, 1.0, mask_replace_prob=0, random_replace_prob=1, whole_word_mask=whole_words, unpacked_rows="keep"
    )
    row = {"input_ids": tokenizer(words)["input_ids"]}
    drawn = set()
    for epoch in range(60):
        collate.set_epoch(epoch)
        drawn |= set(collate([row])["input_ids"][0, 1:-1].tolist())
    assert drawn == set(token_ids(tokenizer)) - set(tokenizer.all_special_ids)
    with pytest.raises(ValueError, match=r"token id 5 is below .* but no token has it"):
        collate([{"input_ids": [2, 5, 3]}])
    with pytest.raises(ValueError, match=f"exceed the tokenizer's vocabulary of {size}"):
        collate([{"input_ids": [2, size, 3]}])


def test_other_parts_hold_the_highest_id():
    tokenizer = gappy_tokenizer()
    packed = pack_dataset(
        datasets.Dataset.from_list([tokenizer(" ".join(f"w{i}" for i in range(k, 20))) for k in range(10)]),
        max_sequence_length=64,
    )
    check_tokenizer("packed", packed, "gappy", tokenizer)
    wrong = pack_dataset(
        datasets.Dataset.from_list([{"input_ids": [2, 105, *range(100, 100 + 10 * k, 10), 3]} for k in range(9)]),
        max_sequence_length=64,
    )
    with pytest.raises(ValueError, match=r"holds token 105, but .* up to 290, and none with that id"):
        check_tokenizer("packed", wrong, "gappy", tokenizer)
    model = BertForTokenClassification(BertConfig(**SIZES | {"vocab_size": 291}, max_position_embeddings=128))
    assert not check_isolation(model, tokenizer).isolated


# Nothing


@pytest.mark.parametrize("nothing", [[], {"input_ids": [], "sequence_lengths": []}, "arrow"])
def test_a_batch_without_rows_is_refused(tokenizer, nothing):
    if nothing == "arrow":
        rows = pack_dataset(datasets.Dataset.from_list(marked_rows(4)), max_sequence_length=32)
        nothing = rows.with_format("arrow")[:].slice(0, 0)
    for unpacked_rows in (None, "keep"):
        if unpacked_rows and not isinstance(nothing, list):
            nothing = {"input_ids": []}
        with pytest.raises(ValueError, match="the batch has no rows"):
            DataCollatorWithPacking(tokenizer, unpacked_rows=unpacked_rows)(nothing)


def test_rows_without_tokens_are_refused(tokenizer):
    empty = {"input_ids": [], "labels": []}
    with pytest.raises(ValueError, match="row 1 of the batch holds no token"):
        DataCollatorWithPacking(tokenizer, None, unpacked_rows="keep")([{"input_ids": [2, 3], "labels": [1, 2]}, empty])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (0, 0)])
def test_there_is_no_layout_of_nothing(shape):
    with pytest.raises(ValueError, match=f"{shape[0]} packs of {shape[1]} slots"):
        PackLayout(torch.zeros(shape, dtype=torch.int32))
    assert PackLayout(torch.zeros((1, 8), dtype=torch.int32)).num_sequences == 0  # evens out the ranks


def test_columns_that_a_model_takes_reach_it(tokenizer):
    """RoCBert reads two more ids per token; without them its logits differ."""
    sizes = {"pronunciation_vocab_size": 8, "shape_vocab_size": 8, "pronunciation_embed_dim": 8, "shape_embed_dim": 8}
    torch.manual_seed(0)
    model = RoCBertForSequenceClassification(RoCBertConfig(**SIZES, **sizes, initializer_range=0.5)).eval()
    names = ("input_ids", "input_shape_ids", "input_pronunciation_ids")
    rows = [
        dict(zip(names, values, strict=True))
        for values in (([2, 8, 9, 3], [1, 2, 3, 4], [4, 3, 2, 1]), ([2, 7, 3], [1, 7, 3], [5, 6, 7]))
    ]
    with torch.no_grad():
        alone = [model(**{name: torch.tensor([row[name]]) for name in names}).logits[0] for row in rows]
    packed = {name: [value for row in rows for value in row[name]] for name in names} | {"sequence_lengths": [4, 3]}
    batch = DataCollatorWithPacking(tokenizer, None, pad_to=8)([packed])
    torch.testing.assert_close(torch.stack(packed_predictions(model, batch)), torch.stack(alone))
    del batch["input_shape_ids"]
    assert (torch.stack(packed_predictions(model, batch)) - torch.stack(alone)).abs().max() > 0.1
