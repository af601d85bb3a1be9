"""DataCollatorWithPacking: drawings, what its masks depend on, and what is refused."""

import pytest
import torch
from reference import packed_rows

from collate import DataCollatorWithPacking
from packing import pack_dataset


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
    import datasets

    packed = pack_dataset(datasets.Dataset.from_list(pairs), max_sequence_length=64)
    collate = DataCollatorWithPacking(tokenizer).for_dataset(packed)
    shapes = {tuple(collate([packed[i]])[name].shape) for i in range(len(packed)) for name in ("labels", "input_ids")}
    assert shapes == {(1, 64)}
    assert len({collate([packed[i]])["cls_positions"].shape for i in range(len(packed))}) == 1


def test_numpy_and_list_rows_give_the_same_batch(tokenizer, pairs):
    import datasets

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
            "no 'sequence_lengths', only \\['input_ids'\\]; pack the dataset with pack_dataset",
        ),
        ({"sequence_lengths": [2]}, {}, "no 'input_ids'"),
        (GOOD | {"sequence_lengths": [3]}, {}, "4 values in 'input_ids' but 3 tokens"),
        (GOOD | {"sequence_lengths": [4, 0], "sequence_indices": [0, 1]}, {}, "length 0"),
        (GOOD | {"next_sentence_label": [1, 1]}, {}, "2 values in 'next_sentence_label' but 1 sequences"),
        (GOOD | {"input_ids": [2, 0, 0, 3]}, {}, "contains the padding token 0"),
        (GOOD | {"input_ids": [2, 99, 9, 3]}, {}, "exceed the tokenizer's vocabulary of 60"),
        (GOOD | {"input_ids": [2.5, 8, 9, 3]}, {}, "must hold integers, not float64"),
        (GOOD | {"labels": [1, 2, 3, 4]}, {}, "set mlm_probability=None to keep them"),
        (GOOD | {"token_type_ids": [0, 0, 0, 0]}, {}, "some rows of the batch have a column 'token_type_ids'"),
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
        ({"emit": "mask"}, "unknown emit 'mask'"),
        ({"masking": "some"}, "unknown masking 'some'"),
        ({"pad_to": 0}, "pad_to=0 must be at least 1"),
        ({"mlm_probability": 0.0}, "mlm_probability=0.0"),
    ],
)
def test_bad_options_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPacking(tokenizer, **options)
