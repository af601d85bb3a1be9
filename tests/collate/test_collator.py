"""DataCollatorWithPacking: drawings, what its masks depend on, and what is refused."""

import datasets
import numpy as np
import pytest
import torch
from slow_training import packed_rows
from transformers import DataCollatorWithFlattening, RobertaConfig, RobertaModel

from collate import DataCollatorWithPacking
from packing import pack_dataset

CLS, SEP = 2, 3


def test_the_drawing(tokenizer):
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=8, max_sequences_per_pack=3)
    row = {
        "input_ids": [2, 8, 9, 3, 2, 7, 3],
        "token_type_ids": [0, 0, 1, 1, 0, 0, 1],
        "sequence_lengths": [4, 3],
        "next_sentence_label": [1, 0],
    }
    batch = collate([row])
    assert batch["input_ids"].tolist() == [[2, 8, 9, 3, 2, 7, 3, 0]]
    assert batch["sequence_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert batch["sequence_ids"].dtype == torch.int32
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0, 0, 1, 0]]
    assert batch["cls_positions"].tolist() == [[0, 4, -1]]
    assert batch["next_sentence_label"].tolist() == [[1, 0, -100]]
    assert "labels" not in batch


def test_labels_pass_through_without_masking(tokenizer):
    row = {"input_ids": [2, 8, 3], "labels": [-100, 5, -100], "sequence_lengths": [3]}
    batch = DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=4)([row])
    assert batch["labels"].tolist() == [[-100, 5, -100, -100]]


def test_positions_can_start_elsewhere(tokenizer):
    row = {"input_ids": [2, 8, 3, 2, 3], "sequence_lengths": [3, 2]}
    batch = DataCollatorWithPacking(tokenizer, position_ids_start=2, pad_to=6)([row])
    assert batch["position_ids"].tolist() == [[2, 3, 4, 2, 3, 2]]


@pytest.mark.parametrize("emit", ["attention_mask", "attention_bias"])
def test_masks_on_request(tokenizer, emit):
    row = {"input_ids": [2, 8, 3, 2, 3], "sequence_lengths": [3, 2]}
    mask = DataCollatorWithPacking(tokenizer, emit=emit, pad_to=6)([row])["attention_mask"][0, 0]
    attends = mask if emit == "attention_mask" else mask == 0
    assert attends.int().tolist() == [[1, 1, 1, 0, 0, 0]] * 3 + [[0, 0, 0, 1, 1, 0]] * 2 + [[0] * 6]


def sequences_of(batch):
    """{(pack, number): (input_ids, labels)} of a batch."""
    found = {}
    for pack, ids in enumerate(batch["sequence_ids"]):
        for number in range(1, int(ids.max()) + 1):
            mine = ids == number
            found[pack, number] = batch["input_ids"][pack][mine].tolist(), batch["labels"][pack][mine].tolist()
    return found


def masks_by_index(collate, rows):
    """{sequence index: (input_ids, labels)}, collated in batches of two packs."""
    masks = {}
    for start in range(0, len(rows), 2):
        part = rows[start : start + 2]
        for (pack, number), masked in sequences_of(collate(part)).items():
            masks[int(part[pack]["sequence_indices"][number - 1])] = masked
    return masks


def test_masks_depend_on_seed_epoch_and_sequence_only(tokenizer, pairs):
    collate = DataCollatorWithPacking(tokenizer, seed=5)
    rows = packed_rows(pairs, 48)
    alone = [
        {"input_ids": pair["input_ids"], "sequence_lengths": [len(pair["input_ids"])], "sequence_indices": [i]}
        for i, pair in enumerate(pairs)
    ]
    first = masks_by_index(collate, rows)
    assert len(first) == len(pairs)
    assert masks_by_index(collate, alone) == first
    assert masks_by_index(collate, rows[::-1]) == first
    assert masks_by_index(collate, packed_rows(pairs, 100)) == first
    assert masks_by_index(DataCollatorWithPacking(tokenizer, seed=6), rows) != first
    collate.set_epoch(1)
    second = masks_by_index(collate, rows)
    assert sum(second[i] != first[i] for i in first) > len(first) / 2
    collate.set_epoch(0)
    assert masks_by_index(collate, rows) == first


def test_rows_without_index_are_keyed_by_their_tokens(tokenizer, pairs):
    collate = DataCollatorWithPacking(tokenizer)
    rows = [{k: v for k, v in row.items() if k != "sequence_indices"} for row in packed_rows(pairs, 48)]
    first, again = collate(rows), collate(rows[::-1])
    assert sorted(sequences_of(first).values()) == sorted(sequences_of(again).values())


def test_evaluation_masks_ignore_the_epoch(tokenizer, pairs):
    collate = DataCollatorWithPacking(tokenizer)
    evaluate = collate.for_evaluation()
    rows = packed_rows(pairs, 48)
    before = evaluate(rows)["labels"]
    assert not (before == collate(rows)["labels"]).all()
    collate.set_epoch(3)
    assert (evaluate(rows)["labels"] == before).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_hear_of_a_new_epoch(tokenizer, pairs, workers):
    """Persistent workers are forked once; the epoch reaches them through shared memory."""
    collate = DataCollatorWithPacking(tokenizer, pad_to=48)
    rows = packed_rows(pairs, 48)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
    expected = DataCollatorWithPacking(tokenizer, pad_to=48)
    for epoch in range(3):
        collate.set_epoch(epoch)
        expected.set_epoch(epoch)
        labels = [batch["labels"] for batch in loader]
        assert all((a == expected(rows[2 * i : 2 * i + 2])["labels"]).all() for i, a in enumerate(labels))


def test_all_batches_of_a_dataset_have_one_shape(tokenizer, pairs):
    packed = pack_dataset(datasets.Dataset.from_list(pairs), max_sequence_length=64)
    collate = DataCollatorWithPacking(tokenizer).for_dataset(packed)
    shapes = {tuple(collate([packed[i]])[name].shape) for i in range(len(packed)) for name in ("labels", "input_ids")}
    assert shapes == {(1, 64)}
    assert len({collate([packed[i]])["cls_positions"].shape for i in range(len(packed))}) == 1


def test_numpy_and_list_rows_give_the_same_batch(tokenizer, pairs):
    packed = pack_dataset(datasets.Dataset.from_list(pairs), max_sequence_length=64)
    collate = DataCollatorWithPacking(tokenizer)
    as_lists = collate([packed[i] for i in range(3)])
    as_arrays = collate([packed.with_format("numpy")[i] for i in range(3)])
    assert all((as_lists[name] == as_arrays[name]).all() for name in as_lists) and as_lists.keys() == as_arrays.keys()


GOOD = {"input_ids": [2, 8, 9, 3], "sequence_lengths": [4], "sequence_indices": [0]}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"input_ids": [2, 3]},
            {},
            "row 1 of the batch has no 'sequence_lengths', others have; pack the dataset with pack_dataset",
        ),
        ({"sequence_lengths": [2]}, {}, "no 'input_ids'"),
        (GOOD | {"sequence_lengths": [3]}, {}, "4 values in 'input_ids' but 3 tokens"),
        (GOOD | {"sequence_lengths": [4, 0], "sequence_indices": [0, 1]}, {}, "length 0"),
        (GOOD | {"next_sentence_label": [1, 1]}, {}, "2 values in 'next_sentence_label' but 1 sequences"),
        (GOOD | {"input_ids": [2, 0, 0, 3]}, {}, "contains the padding token 0"),
        (GOOD | {"input_ids": [2, 99, 9, 3]}, {}, "exceed the tokenizer's vocabulary of 60"),
        (GOOD | {"input_ids": [2.5, 8, 9, 3]}, {}, "must hold integers, not float64"),
        (GOOD | {"labels": [1, 2, 3, 4]}, {}, "set mlm_probability=None to keep them"),
        (GOOD | {"token_type_ids": [0, 0, 0, 0]}, {}, "row 0 of the batch has no 'token_type_ids'"),
        (GOOD, {"pad_to": 3}, "row 1 of the batch holds 4 tokens, more than pad_to=3"),
        (GOOD | {"sequence_lengths": [2, 2], "sequence_indices": [0, 1]}, {"max_sequences_per_pack": 1}, "holds 2 seq"),
    ],
)
def test_bad_rows_are_refused(tokenizer, row, options, message):
    collate = DataCollatorWithPacking(tokenizer, **options)
    fits = {"input_ids": [2, 3], "sequence_lengths": [2], "sequence_indices": [9]}
    fits |= {name: [0] for name in ("next_sentence_label",) if name in row}
    fits |= {name: [0, 0] for name in ("labels",) if name in row}
    with pytest.raises(ValueError, match=message):
        collate([fits, row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emit": "mask"}, "unknown emit='mask'"),
        ({"masking": "some"}, "unknown masking 'some'"),
        ({"pad_to": 0}, "pad_to=0 must be a whole number, at least 1, or None"),
        ({"mlm_probability": 0.0}, "mlm_probability=0.0"),
    ],
)
def test_bad_options_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPacking(tokenizer, **options)


# Columns of all kinds


def labelled_rows(count=12, seed=0):
    """Rows with a class, a score, a vector and text for each sequence, and two values for each token."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        words = draw.integers(5, 60, draw.integers(1, 9)).tolist()
        rows.append(
            {
                "input_ids": [CLS, *words, SEP],
                "tags": [-100, *(word % 3 for word in words), -100],
                "weights": [0.0, *(word / 7 for word in words), 0.0],
                "labels": index % 4,
                "score": index / 8,
                "topics": [float(index % 2), 1.0, 0.0],
                "text": f"row {index}",
            }
        )
    return rows


def as_formats(dataset):
    """A batch of all rows, in every form in which datasets gives it."""
    rows = range(len(dataset))
    yield "list", [dataset[i] for i in rows]
    yield "columns", dataset[:]
    for name in ("numpy", "torch"):
        yield name, [dataset.with_format(name)[i] for i in rows]
    yield "arrow", dataset.with_format("arrow")[:]
    yield "arrow, row by row", [dataset.with_format("arrow")[i] for i in rows]


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


def test_every_column_arrives_where_its_sequence_is(tokenizer):
    source = labelled_rows()
    packed = pack_dataset(datasets.Dataset.from_list(source), max_sequence_length=24)
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None).for_dataset(packed)
    batch = collate([packed[i] for i in range(len(packed))])
    assert set(batch) == {
        *("input_ids", "sequence_ids", "position_ids", "cls_positions", "tags", "weights", "labels", "score", "topics")
    }
    assert [batch[name].dtype for name in ("tags", "labels")] == [torch.int64] * 2
    assert [batch[name].dtype for name in ("weights", "score", "topics")] == [torch.float32] * 3
    seen = 0
    for pack, indices in enumerate(packed["sequence_indices"]):
        for slot in range(collate.max_sequences_per_pack):
            if slot >= len(indices):
                assert batch["labels"][pack, slot] == -100 and batch["cls_positions"][pack, slot] == -1
                assert batch["score"][pack, slot].isnan() and batch["topics"][pack, slot].isnan().all()
                continue
            row, mine = source[indices[slot]], batch["sequence_ids"][pack] == slot + 1
            assert batch["input_ids"][pack][mine].tolist() == row["input_ids"]
            assert batch["tags"][pack][mine].tolist() == row["tags"]
            torch.testing.assert_close(batch["weights"][pack][mine], torch.tensor(row["weights"]))
            assert (batch["labels"][pack, slot], batch["score"][pack, slot]) == (row["labels"], row["score"])
            assert batch["topics"][pack, slot].tolist() == row["topics"]
            seen += 1
    padding = batch["sequence_ids"] == 0
    assert seen == len(source) and (batch["tags"][padding] == 0).all() and (batch["weights"][padding] == 0).all()


@pytest.mark.parametrize("unpacked_rows", [None, "keep", "pack"])
def test_every_format_gives_the_same_batch(tokenizer, unpacked_rows):
    dataset = datasets.Dataset.from_list(labelled_rows())
    if unpacked_rows is None:
        dataset = pack_dataset(dataset, max_sequence_length=24)
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=24, unpacked_rows=unpacked_rows)
    batches = dict(as_formats(dataset))
    expected = collate(batches["list"])
    for rows in batches.values():
        same(collate(rows), expected)


def test_columns_can_be_chosen(tokenizer):
    packed = pack_dataset(datasets.Dataset.from_list(labelled_rows()), max_sequence_length=24)
    rows = [packed[0], packed[1]]
    always = {"input_ids", "sequence_ids", "position_ids", "cls_positions"}
    batch = DataCollatorWithPacking(tokenizer, mlm_probability=None, columns=["tags", "sequence_indices"])(rows)
    assert set(batch) == always | {"tags", "sequence_indices"}
    with pytest.raises(ValueError, match="columns names 'tag', which is not among"):
        DataCollatorWithPacking(tokenizer, mlm_probability=None, columns=["tag"])(rows)
    with pytest.raises(ValueError, match="column 'text' holds no numbers"):
        DataCollatorWithPacking(tokenizer, mlm_probability=None, columns=["text"])(rows)


def test_what_a_column_belongs_to_must_be_clear(tokenizer):
    row = {"input_ids": [8, 9], "sequence_lengths": [1, 1], "tags": [5, 6]}
    with pytest.raises(ValueError, match=r"'tags' has as many values as tokens and as sequences.*token_columns="):
        DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=3)([row])
    options = {"mlm_probability": None, "pad_to": 3, "max_sequences_per_pack": 4}
    per_token = DataCollatorWithPacking(tokenizer, token_columns=["tags"], **options)([row])
    per_sequence = DataCollatorWithPacking(tokenizer, token_columns=[], **options)([row])
    assert (per_token["tags"].tolist(), per_sequence["tags"].tolist()) == ([[5, 6, 0]], [[5, 6, -100, -100]])


@pytest.mark.parametrize("value", [[None, 8, 3], None])
def test_missing_values_are_refused(tokenizer, value):
    row = {"input_ids": [2, 8, 3], "sequence_lengths": [3], "tags": value}
    with pytest.raises(ValueError, match=r"'tags'.* (missing value|single value)"):
        DataCollatorWithPacking(tokenizer, mlm_probability=None)([row | {"tags": [1, 2, 3]}, row])


@pytest.mark.parametrize("form", [None, "arrow"])
@pytest.mark.parametrize("packing", [None, "keep"])
def test_missing_text_does_no_harm(tokenizer, form, packing):
    """A pack's text is a list."""
    rows = [{"input_ids": [2, 8, 3], "title": title} for title in ("one", None)]
    if packing is None:
        rows = [row | {"sequence_lengths": [2, 1], "title": [row["title"], "more"]} for row in rows]
    rows = datasets.Dataset.from_list(rows).with_format(form)
    batch = DataCollatorWithPacking(tokenizer, mlm_probability=None, unpacked_rows=packing)([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[2, 8, 3]] * 2 and "title" not in batch


@pytest.mark.parametrize("name", ["sequence_ids", "position_ids", "cls_positions"])
def test_columns_called_like_what_is_made_here_are_refused(tokenizer, name):
    row = {"input_ids": [2, 8, 3], name: [0, 0, 1]}
    with pytest.raises(ValueError, match=f"column '{name}' would replace"):
        DataCollatorWithPacking(tokenizer, unpacked_rows="keep")([row])
    kept = DataCollatorWithPacking(tokenizer, unpacked_rows="keep", columns=[])([row])
    assert kept["sequence_ids"].tolist() == [[1, 1, 1]] and kept["cls_positions"].tolist() == [[0]]


@pytest.mark.parametrize("name", ["label", "label_ids"])
def test_labels_have_the_name_that_models_know(tokenizer, name):
    row = GOOD | {name: [1]}
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None)
    assert collate([row])["labels"].tolist() == [[1]]
    both = collate([row | {"labels": [2]}])
    assert (both["labels"].tolist(), both[name].tolist()) == ([[2]], [[1]])
    masked = DataCollatorWithPacking(tokenizer)([row])  # whose labels are those of masking
    assert masked["labels"].shape == masked["input_ids"].shape and masked[name].tolist() == [[1]]


def test_answers_are_refused_where_their_positions_would_be_wrong(tokenizer):
    answers = {"start_positions": [1, 1], "end_positions": [1, 1]}
    row = {"input_ids": [2, 8, 9, 3], "sequence_lengths": [2, 2], "sequence_indices": [0, 0]} | answers
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None)
    assert collate([row | {"sequence_starts": [0, 0]}])["start_positions"].tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="a sequence of the batch begins at its token 2: it was split"):
        collate([row | {"sequence_starts": [0, 2]}])
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None, unpacked_rows="keep")
    row = {"input_ids": [2, 8, 3, 0], "attention_mask": [1, 1, 1, 0], "start_positions": 1, "end_positions": 1}
    assert collate([row])["end_positions"].tolist() == [[1]]
    with pytest.raises(ValueError, match="row 1 of the batch has 1 padding tokens in front, which 'start_positions'"):
        collate([row, row | {"input_ids": [0, 2, 8, 3], "attention_mask": [0, 1, 1, 1]}])


# Unpacked rows


def test_unpacked_rows_are_rows_of_one_sequence(tokenizer):
    source = labelled_rows(4)
    packed = [
        {name: value if isinstance(value, list) and name != "topics" else [value] for name, value in row.items()}
        | {"sequence_lengths": [len(row["input_ids"])]}
        for row in source
    ]
    kept = DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=16, unpacked_rows="keep")(source)
    same(kept, DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=16)(packed))


def test_packing_within_a_batch_keeps_every_sequence(tokenizer):
    source = labelled_rows(30)
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=24, unpacked_rows="pack")
    batch = collate(source)
    assert len(batch["input_ids"]) < 15
    found = []
    for pack, ids in enumerate(batch["sequence_ids"]):
        for slot in range(int(ids.max())):
            mine = ids == slot + 1
            values = (batch[name][pack][mine].tolist() for name in ("input_ids", "tags"))
            found.append((*values, int(batch["labels"][pack, slot]), float(batch["score"][pack, slot])))
    assert sorted(found) == sorted((row["input_ids"], row["tags"], row["labels"], row["score"]) for row in source)
    shallow = DataCollatorWithPacking(
        tokenizer, mlm_probability=None, pad_to=24, unpacked_rows="pack", max_sequences_per_pack=2
    )(source)
    assert shallow["cls_positions"].shape[1] == 2 and int(shallow["sequence_ids"].max()) == 2
    with pytest.raises(ValueError, match=r"row \d+ of the batch has \d+ tokens, more than pad_to=5"):
        DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=5, unpacked_rows="pack")(source)


def test_masks_are_the_same_packed_or_not(tokenizer):
    source = [{"input_ids": row["input_ids"]} for row in labelled_rows(30)]
    masked = []
    for unpacked_rows in ("keep", "pack"):
        batch = DataCollatorWithPacking(tokenizer, pad_to=24, unpacked_rows=unpacked_rows)(source)
        masked.append(sorted(sequences_of(batch).values()))
    assert masked[0] == masked[1]


def test_unpacked_rows_lose_their_padding(tokenizer):
    row = {"input_ids": [0, 2, 8, 3, 0], "attention_mask": [0, 1, 1, 1, 0], "tags": [9, 1, 2, 3, 9]}
    collate = DataCollatorWithPacking(
        tokenizer, mlm_probability=None, pad_to=4, unpacked_rows="keep", token_columns=["tags"]
    )
    batch = collate([row, {"input_ids": [2, 3], "attention_mask": [1, 1], "tags": [4, 5]}])
    assert batch["input_ids"].tolist() == [[2, 8, 3, 0], [2, 3, 0, 0]]
    assert batch["tags"].tolist() == [[1, 2, 3, 0], [4, 5, 0, 0]]
    with pytest.raises(ValueError, match="row 0 of the batch has zeros inside its attention_mask"):
        collate([row | {"attention_mask": [1, 0, 1, 1, 0]}])
    with pytest.raises(ValueError, match="row 0 of the batch holds no token"):
        collate([row | {"attention_mask": [0] * 5}])
    with pytest.raises(ValueError, match="contains the padding token 0"):
        collate([{name: row[name] for name in ("input_ids", "tags")}])


def test_a_packed_row_is_never_taken_for_one_sequence(tokenizer):
    """Plain Trainer strips sequence_lengths from packs, so rows count as unpacked only if the caller says so."""
    with pytest.raises(ValueError, match=r"no 'sequence_lengths', only.*remove_unused_columns=False"):
        DataCollatorWithPacking(tokenizer)([{"input_ids": [2, 8, 3, 2, 9, 3]}])
    with pytest.raises(ValueError, match="rows are packed: they have sequence_lengths"):
        DataCollatorWithPacking(tokenizer, unpacked_rows="keep")([GOOD])


# The other forms of a batch


def test_flash_gives_one_row_and_its_boundaries(tokenizer):
    rows = [
        {"input_ids": [2, 8, 3, 2, 3], "sequence_lengths": [3, 2], "labels": [0, 1]},
        {"input_ids": [2, 9, 9, 3], "sequence_lengths": [4], "labels": [2]},
    ]
    batch = DataCollatorWithPacking(tokenizer, mlm_probability=None, emit="flash", pad_to=16)(rows)
    assert batch["input_ids"].tolist() == [[2, 8, 3, 2, 3, 2, 9, 9, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["sequence_ids"].tolist() == [[1, 1, 1, 2, 2, 3, 3, 3, 3]]
    assert batch["cls_positions"].tolist() == [[0, 3, 5]] and batch["labels"].tolist() == [[0, 1, 2]]
    for which in "qk":
        assert batch[f"cu_seq_lens_{which}"].tolist() == [0, 3, 5, 9]
        assert batch[f"cu_seq_lens_{which}"].dtype == torch.int32
        assert batch[f"max_length_{which}"] == 4


def test_flash_boundaries_are_those_of_transformers(tokenizer):
    source = [{"input_ids": row["input_ids"], "labels": row["tags"]} for row in labelled_rows()]
    ours = DataCollatorWithPacking(tokenizer, mlm_probability=None, emit="flash", unpacked_rows="keep")(source)
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(source)
    for name in ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name
    assert torch.equal(ours["sequence_ids"], theirs["seq_idx"] + 1)


def test_numpy_batches_and_rounded_widths(tokenizer):
    collate = DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to_multiple_of=8, return_tensors="np")
    batch = collate([GOOD])
    assert all(isinstance(values, np.ndarray) for values in batch.values())
    assert batch["input_ids"].tolist() == [[2, 8, 9, 3, 0, 0, 0, 0]]
    assert isinstance(collate([GOOD], return_tensors="pt")["input_ids"], torch.Tensor)


@pytest.mark.parametrize("emit", ["sequence_ids", "attention_mask", "attention_bias", "flash"])
def test_numpy_batches_hold_what_tensors_hold(tokenizer, emit):
    collate = DataCollatorWithPacking(tokenizer, emit=emit)
    as_arrays, as_tensors = collate([GOOD], return_tensors="np"), collate([GOOD])
    assert as_arrays.keys() == as_tensors.keys()
    for name, values in as_arrays.items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(as_tensors[name])), name


def test_positions_begin_where_the_models_do(tokenizer):
    config = RobertaConfig(vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=1)
    model = RobertaModel(config)
    assert DataCollatorWithPacking(tokenizer, model=model)([GOOD])["position_ids"].tolist() == [[2, 3, 4, 5]]
    assert DataCollatorWithPacking(tokenizer).for_model(model).position_ids_start == 2
    assert DataCollatorWithPacking(tokenizer, position_ids_start=0, model=model).position_ids_start == 0


def test_a_batch_is_small(tokenizer):
    """Isolation adds sequence_ids, 65 KB, to 32 packs of 512; no tensor of a batch is as large as 512 x 512."""
    draw = np.random.default_rng(0)
    rows = [{"input_ids": draw.integers(5, 60, 512), "sequence_lengths": [200, 200, 112]} for _ in range(32)]
    batch = DataCollatorWithPacking(tokenizer, pad_to=512)(rows)
    assert batch["sequence_ids"].nbytes <= 100_000
    assert all(values.numel() <= 32 * 512 for values in batch.values())
