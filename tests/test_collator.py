"""DataCollatorWithPacking and masking: drawings, properties, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import mask_one_by_one, packed_rows
from scipy import stats

from collate import DataCollatorWithPacking
from collate.masking import MaskingRule, sequence_keys
from packing import pack_dataset

CLS, SEP, MASK = 2, 3, 4


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


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 59), min_size=1, max_size=40), min_size=1, max_size=8),
    st.floats(0.01, 0.9),
    st.sampled_from(["exact", "independent"]),
    st.integers(0, 2**40),
)
def test_masking_properties(sequences, probability, masking, seed):
    is_special = np.arange(60) < 5
    rule = MaskingRule(probability, masking, MASK, is_special)
    tokens = np.concatenate([np.array(sequence) for sequence in sequences])
    offsets = np.cumsum([0] + [len(sequence) for sequence in sequences])
    keys = sequence_keys(seed, 0, np.arange(len(sequences)))
    corrupted, labels = rule(tokens, offsets, keys)
    predicted = labels != -100
    assert (labels[predicted] == tokens[predicted]).all()
    assert not is_special[tokens[predicted]].any()
    assert (corrupted[~predicted] == tokens[~predicted]).all()
    drawn = corrupted[predicted & (corrupted != MASK)]
    assert not is_special[drawn].any()
    for i, sequence in enumerate(sequences):
        count = predicted[offsets[i] : offsets[i + 1]].sum()
        candidates = sum(token >= 5 for token in sequence)
        if masking == "exact":
            assert count == min(candidates, max(1, round(probability * len(sequence))))
        else:
            assert (count >= 1) == (candidates >= 1)


def test_80_10_10_and_uniform_choice():
    """Chi-square over 4,000 sequences of 22 tokens, 3 predicted in each: p above 1e-4 for the shares and the places."""
    count, length, words = 4000, 22, 1000
    is_special = np.arange(words) < 5
    rule = MaskingRule(0.15, "exact", MASK, is_special)
    tokens = np.tile(np.r_[CLS, np.arange(20) + 500, SEP], count)
    corrupted, labels = rule(tokens, np.arange(count + 1) * length, sequence_keys(1, 2, np.arange(count)))
    predicted = labels != -100
    assert predicted.sum() == 3 * count  # round(0.15 * 22) = 3
    masked = (corrupted[predicted] == MASK).sum()
    kept = (corrupted[predicted] == labels[predicted]).sum()
    shares = [masked, kept, 3 * count - masked - kept]
    # a random word is the word itself once in 995
    expected = np.array([0.8, 0.1 + 0.1 / 995, 0.1 - 0.1 / 995]) * 3 * count
    assert stats.chisquare(shares, expected).pvalue > 1e-4
    places = predicted.reshape(count, length)[:, 1:-1].sum(0)
    assert stats.chisquare(places).pvalue > 1e-4
    drawn = corrupted[predicted & (corrupted != MASK) & (corrupted != labels)]
    assert stats.chisquare(np.histogram(drawn, bins=10, range=(5, 1000))[0]).pvalue > 1e-4


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 59), min_size=1, max_size=40), min_size=1, max_size=5),
    st.integers(0, 2**63),
    st.integers(-1, 5),
)
def test_masks_equal_their_slow_twin(sequences, seed, epoch):
    is_special = np.arange(60) < 5
    offsets = np.cumsum([0] + [len(sequence) for sequence in sequences])
    keys = sequence_keys(seed, epoch, np.arange(len(sequences)))
    rule = MaskingRule(0.15, "exact", MASK, is_special)
    corrupted, labels = rule(np.concatenate([np.array(sequence) for sequence in sequences]), offsets, keys)
    for i, sequence in enumerate(sequences):
        expected = mask_one_by_one(sequence, i, seed, epoch % 2**64, 0.15, MASK, is_special)
        mine = slice(offsets[i], offsets[i + 1])
        assert (corrupted[mine].tolist(), labels[mine].tolist()) == expected


def test_independent_draws_have_their_rate_and_are_uniform():
    count, length = 2000, 42
    rule = MaskingRule(0.15, "independent", MASK, np.arange(100) < 5)
    tokens = np.tile(np.r_[CLS, np.arange(40) + 20, SEP], count)
    _, labels = rule(tokens, np.arange(count + 1) * length, sequence_keys(3, 0, np.arange(count)))
    predicted = (labels != -100).reshape(count, length)[:, 1:-1]
    drawn = predicted.sum()
    assert stats.binomtest(int(drawn), predicted.size, 0.15).pvalue > 1e-4  # one added in 0.85^40 of them: 0.15 %
    assert stats.chisquare(predicted.sum(0)).pvalue > 1e-4
    alone = np.tile(np.r_[CLS, 20, 21, SEP], count)  # of two candidates at least one, either one as often
    _, labels = rule(alone, np.arange(count + 1) * 4, sequence_keys(3, 0, np.arange(count)))
    first, second = (labels != -100).reshape(count, 4)[:, 1:3].T
    assert (first | second).all() and stats.binomtest(
        int((first & ~second).sum()), int((first ^ second).sum())
    ).pvalue > 1e-4


def test_pieces_of_one_row_have_masks_of_their_own():
    tokens = np.tile(np.arange(10, 50), 2)
    rule = MaskingRule(0.15, "exact", MASK, np.arange(60) < 5)
    keys = sequence_keys(0, 0, np.array([7, 7]), np.array([0, 40]))
    _, labels = rule(tokens, np.array([0, 40, 80]), keys)
    assert (labels[:40] != labels[40:]).any()


def test_the_masks_of_a_seed_are_these():
    """Golden: masks must not change between versions, or a resumed run would differ from an unbroken one."""
    rule = MaskingRule(0.3, "exact", MASK, np.arange(60) < 5)
    tokens = np.r_[CLS, np.arange(10, 18), SEP]
    _, labels = rule(tokens, np.array([0, 10]), sequence_keys(0, 0, np.array([0])))
    assert np.flatnonzero(labels != -100).tolist() == [1, 5, 8]


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
