"""pack_stream: every sequence exactly once, resumed anywhere, over any shards, workers and nodes."""

import itertools
import logging
import re

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import make_pair
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from collate import DataCollatorWithPacking, PackedTrainer
from packing import EpochPacks, length_histogram, pack_dataset, pack_stream, packed_info, plan_packs

datasets.disable_progress_bars()

TOKEN_COLUMNS = ("input_ids", "weights")


def make_rows(lengths, first=0):
    """Rows with different names; the tokens are those of a sentence pair, and start with 2."""
    return [
        {
            "input_ids": [2, *range(100 + i, 100 + i + length - 1)],
            "weights": [i / 4] * length,
            "name": f"row {i}",
            "label": i % 3,
            "answers": list(range(i % 2)),
        }
        for i, length in enumerate(lengths, first)
    ]


ROWS = make_rows(np.random.default_rng(5).integers(1, 9, 40).tolist())


def yield_rows(shards):
    for rows in shards:
        yield from rows


def from_arrow(rows, num_shards=1):
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=num_shards)


def from_generator(rows, num_shards=1):
    shards = [rows[i::num_shards] for i in range(num_shards)]
    return datasets.IterableDataset.from_generator(yield_rows, gen_kwargs={"shards": shards})


SOURCES = pytest.mark.parametrize("source", [from_arrow, from_generator])


def unpack(packs):
    """The sequences of packs in their order, as rows."""
    for pack in packs:
        ends = np.cumsum(pack["sequence_lengths"]).tolist()
        assert len(pack["input_ids"]) == ends[-1]
        for i, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            row = {name: pack[name][begin:end] for name in TOKEN_COLUMNS if name in pack}
            others = [name for name in pack if name not in (*TOKEN_COLUMNS, "sequence_lengths")]
            yield row | {name: pack[name][i] for name in others}


def by_name(rows):
    return sorted(rows, key=lambda row: int(row["name"].split()[1]))


def pack_lengths_by_buffer(lengths, buffer_size, longest, depth):
    """The packs of each buffer, as sorted lengths."""
    for i in range(0, len(lengths), buffer_size):
        histogram = length_histogram(lengths[i : i + buffer_size], longest)
        plan = plan_packs(histogram, longest, depth, "lpfhp")
        packs = zip(plan.strategies, plan.repeats.tolist(), strict=True)
        yield sorted(list(lengths) for lengths, repeats in packs for _ in range(repeats))


def test_it_draws_its_packs():
    rows = {"input_ids": [[7, 8], [5, 6, 4], [9, 9], [3]], "label": ["a", "b", "c", "d"]}
    stream = pack_stream(datasets.Dataset.from_dict(rows).to_iterable_dataset(), 5, buffer_size=2)
    assert list(stream) == [
        {"input_ids": [7, 8, 5, 6, 4], "label": ["a", "b"], "sequence_lengths": [2, 3]},
        {"input_ids": [3, 9, 9], "label": ["d", "c"], "sequence_lengths": [1, 2]},
    ]
    assert list(stream.features) == ["input_ids", "label", "sequence_lengths"]


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    buffer_size=st.integers(1, 45),
    depth=st.none() | st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
    source=st.sampled_from([from_arrow, from_generator]),
)
def test_every_sequence_once_in_the_packs_of_its_buffer(lengths, buffer_size, depth, seed, source):
    rows = make_rows(lengths)
    stream = pack_stream(source(rows), 12, depth, buffer_size, seed=seed, token_columns=["weights"])
    packs = list(stream)
    assert by_name(unpack(packs)) == rows
    assert packs == list(stream), "the same again"
    found = iter(packs)
    for expected in pack_lengths_by_buffer(lengths, buffer_size, 12, depth):
        assert sorted(sorted(pack["sequence_lengths"]) for pack in itertools.islice(found, len(expected))) == expected
    assert next(found, None) is None


def test_the_seed_decides_who_meets():
    packs = [list(pack_stream(from_arrow(ROWS), 16, buffer_size=20, seed=seed)) for seed in (0, 0, 1)]
    assert packs[0] == packs[1] != packs[2]
    assert len(packs[0]) == len(packs[2])


@SOURCES
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("form", [None, "arrow"])
def test_resumed_anywhere_it_goes_on_exactly(source, num_shards, form):
    started, resumed, twice = (
        pack_stream(source(ROWS, num_shards), 16, buffer_size=12).with_format(form) for _ in range(3)
    )
    states, whole = [started.state_dict()], []
    for pack in started:
        whole.append(pack)
        states.append(started.state_dict())
    assert len(whole) > 10
    for stop, state in enumerate(states):
        resumed.load_state_dict(state)
        assert list(itertools.islice(resumed, 3)) == whole[stop : stop + 3]
        twice.load_state_dict(resumed.state_dict())
        assert list(twice) == whole[stop + 3 :]


def test_shuffled_shards_resume_exactly_and_change_with_the_epoch():
    def stream(epoch):
        source = from_arrow(ROWS, 8).shuffle(seed=3, buffer_size=1)
        packed = pack_stream(source, 16, buffer_size=12)
        packed.set_epoch(epoch)
        return packed

    epochs = [list(stream(epoch)) for epoch in (0, 1, 2)]
    assert epochs[0] != epochs[1] != epochs[2]
    for packs in epochs:
        assert by_name(unpack(packs)) == ROWS
    for stop in range(0, len(epochs[1]), 5):
        started, resumed = stream(1), stream(1)
        list(itertools.islice(started, stop))
        resumed.load_state_dict(started.state_dict())
        assert list(resumed) == epochs[1][stop:]


def test_a_shuffle_buffer_keeps_every_sequence():
    source = from_arrow(ROWS, 2).shuffle(seed=3, buffer_size=10)
    packed = pack_stream(source, 16, buffer_size=7)
    assert by_name(unpack(packed)) == by_name(unpack(packed.shuffle(seed=1, buffer_size=5))) == ROWS
    assert list(packed) == list(packed)


@SOURCES
@pytest.mark.parametrize("form", [None, "arrow"])
def test_a_shuffle_buffer_before_packing_cannot_be_resumed(source, form):
    """Its rows would be lost silently."""
    rows = make_rows([3] * 3_000)

    def stream():
        shuffled = source(rows).shuffle(seed=3, buffer_size=600).map(lambda row: row)
        return pack_stream(shuffled, 16, buffer_size=100).with_format(form)

    started = stream()
    for _ in itertools.islice(started, 150):
        pass
    state = started.state_dict()
    for resumed in (stream(), started):
        resumed.load_state_dict(state)
        with pytest.raises(ValueError, match="resumed in the middle, and comes through shuffle"):
            list(resumed)
    assert by_name(unpack(stream().with_format(None))) == rows  # a stream that starts again is read to its end


@SOURCES
@pytest.mark.parametrize("num_shards, nodes", [(1, 3), (2, 3), (4, 2), (5, 2), (6, 3)])
def test_nodes_share_the_stream(source, num_shards, nodes):
    packed = pack_stream(source(ROWS, num_shards), 16, buffer_size=7)
    before = [
        pack_stream(split_dataset_by_node(source(ROWS, num_shards), i, nodes), 16, buffer_size=7) for i in range(nodes)
    ]
    for parts in ([split_dataset_by_node(packed, i, nodes) for i in range(nodes)], before):
        parts = [list(part) for part in parts]
        assert all(parts)
        assert by_name(unpack(itertools.chain(*parts))) == ROWS


@SOURCES
def test_workers_share_the_stream(source):
    packed = pack_stream(source(ROWS, 4), 16, buffer_size=7)
    for part in (packed, packed.with_format("arrow")):
        rows = DataLoader(part, batch_size=None, num_workers=2)
        packs = [row.to_pylist()[0] if isinstance(row, pa.Table) else row for row in rows]
        assert by_name(unpack(packs)) == ROWS
    nodes = [DataLoader(split_dataset_by_node(packed, i, 3), batch_size=None, num_workers=2) for i in range(3)]
    assert by_name(unpack(itertools.chain(*nodes))) == ROWS


def endless():
    for number in itertools.count():
        yield from make_rows([1 + number % 8], number)


def test_an_endless_stream():
    packed = pack_stream(datasets.IterableDataset.from_generator(endless), 16, buffer_size=50)
    packs = list(itertools.islice(packed, 60))
    names = [row["name"] for row in unpack(packs)]
    assert len(set(names)) == len(names) > 100
    resumed = pack_stream(datasets.IterableDataset.from_generator(endless), 16, buffer_size=50)
    resumed.load_state_dict(packed.state_dict())
    assert list(itertools.islice(packed, 90))[60:] == list(itertools.islice(resumed, 30))


def test_what_is_known_of_a_stream():
    packed = pack_stream(from_arrow(ROWS, 2), 16, 3, buffer_size=7, overlong="drop", seed=4)
    for stream in (packed, packed.with_format("arrow"), packed.shuffle(seed=1), packed.take(3)):
        info = packed_info(stream)
        assert (info.max_sequence_length, info.max_sequences_per_pack, info.max_depth) == (16, 3, 3)
        assert info.token_columns == TOKEN_COLUMNS and info.overlong == "drop"
        assert (info.buffer_size, info.seed, info.packer) == (7, 4, "lpfhp")
        assert info.num_packs is info.num_sequences is info.num_tokens is info.source_rows is None
    assert packed_info(pack_stream(from_arrow(ROWS), 16)).max_depth is None
    whole = pack_dataset(datasets.Dataset.from_list(ROWS), 16)
    assert packed.features == datasets.Features({n: f for n, f in whole.features.items() if n != "sequence_indices"})
    with pytest.raises(TypeError, match="got a stream"):
        EpochPacks(packed)


def test_types_are_kept_and_strings_carried():
    features = datasets.Features(
        {
            "input_ids": datasets.Sequence(datasets.Value("int32")),
            "attention_mask": datasets.Sequence(datasets.Value("int8")),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "name": datasets.Value("string"),
        }
    )
    rows = [
        {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "label": 1, "name": None},
        {"input_ids": [7, 0, 0], "attention_mask": [1, 0, 0], "label": 0, "name": "b"},
    ]
    arrow = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    generated = datasets.IterableDataset.from_generator(yield_rows, features, gen_kwargs={"shards": [rows]})
    for source in (arrow, generated):
        packed = pack_stream(source, 4)
        table = pa.concat_tables(list(packed.with_format("arrow")))
        assert table.column("input_ids").type == pa.list_(pa.int32())
        assert packed.features["label"].feature.names == ["no", "yes"]
        (pack,) = packed
        assert sorted(zip(pack["sequence_lengths"], pack["label"], pack["name"], strict=True)) == [
            (1, 0, "b"),
            (2, 1, None),
        ]
        assert pack["input_ids"] in ([5, 6, 7], [7, 5, 6])


# Rows that do not fit.

OVERLONG = [
    {"input_ids": [2, 5, 3], "name": "row 0"},
    {"input_ids": [2, 5, 6, 7, 8, 3], "name": "row 1"},
    {"input_ids": [2, 5, 6, 3], "name": "row 2"},
    {"input_ids": [2, 4, 4, 4, 4, 4, 4, 4, 3], "name": "row 3"},
    {"input_ids": [2, 6, 6, 6, 3], "name": "row 4"},
]


@SOURCES
@pytest.mark.parametrize("buffer_size", [1, 2, 10])
def test_overlong_rows(source, buffer_size):
    def tokens(overlong, rows=OVERLONG):
        packs = pack_stream(source(rows), 4, 1, buffer_size, overlong)
        found = [(pack["name"][0], pack.get("sequence_starts", [0])[0], pack["input_ids"]) for pack in packs]
        return [tokens for *_, tokens in sorted(found)]

    assert tokens("drop") == [[2, 5, 3], [2, 5, 6, 3]]
    assert tokens("truncate") == [[2, 5, 3], [2, 5, 6, 3], [2, 5, 6, 3], [2, 4, 4, 3], [2, 6, 6, 3]]
    other = [*OVERLONG, {"input_ids": [2, 5, 3, 9], "name": "row 9"}]
    # no token closes all rows, even if it closes all of a buffer
    assert tokens("truncate", other)[:-1] == [[2, 5, 3], [2, 5, 6, 7], [2, 5, 6, 3], [2, 4, 4, 4], [2, 6, 6, 6]]
    assert tokens("split") == [
        *([2, 5, 3], [2, 5, 6, 7], [8, 3], [2, 5, 6, 3], [2, 4, 4, 4], [4, 4, 4, 4], [3], [2, 6, 6, 6], [3])
    ]
    with pytest.raises(ValueError, match=re.escape("begins with input_ids [2, 5, 6, 7, 8, 3]")):
        tokens("error")


@pytest.mark.parametrize("padding", ["mask", "token"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_of_padded_rows(padding, side):
    rows, longest = [], max(len(row["input_ids"]) for row in OVERLONG)
    for row in OVERLONG:
        ids, zeros = row["input_ids"], [0] * (longest - len(row["input_ids"]))
        ones = [1] * len(ids)
        rows.append(row | {"input_ids": zeros + ids if side == "left" else ids + zeros})
        if padding == "mask":
            rows[-1]["attention_mask"] = zeros + ones if side == "left" else ones + zeros
    options = {"pad_token_id": 0} if padding == "token" else {}
    packs = list(pack_stream(from_arrow(rows), 4, 1, 2, "truncate", **options))
    expected = pack_dataset(datasets.Dataset.from_list(rows), 4, 1, overlong="truncate", **options)
    assert sorted(pack["input_ids"] for pack in packs) == sorted(expected["input_ids"])


def test_the_log_counts_and_does_not_flood(caplog):
    rows = make_rows([6, 3] * 150)
    with caplog.at_level(logging.WARNING, "packing"):
        packed = pack_stream(from_arrow(rows), 4, buffer_size=2, overlong="drop")
        assert not caplog.records, "the first rows are looked at, not packed"
        assert len(list(unpack(packed))) == 150
    said = [record.getMessage() for record in caplog.records]
    assert [int(text.split()[0]) for text in said] == [1, 10, 100]
    assert said[1] == ("10 rows so far have more than 4 tokens: dropped, 60 tokens lost; said again at 100 rows")


# What is refused.


def refused(rows, match, error=ValueError, **options):
    for source in (from_arrow, from_generator):
        with pytest.raises(error, match=match):
            list(pack_stream(source(rows), **options))


def test_what_is_no_stream_is_told_what_to_do():
    whole = datasets.Dataset.from_list(ROWS)
    with pytest.raises(TypeError, match="use pack_dataset"):
        pack_stream(whole)
    with pytest.raises(TypeError, match="split by split"):
        pack_stream(datasets.IterableDatasetDict({"train": from_arrow(ROWS)}))
    with pytest.raises(TypeError, match="got list"):
        pack_stream(ROWS)
    with pytest.raises(ValueError, match="packed already"):
        pack_stream(pack_dataset(whole, 16).to_iterable_dataset())
    with pytest.raises(ValueError, match="'sequence_lengths' has a reserved name"):
        pack_stream(pack_stream(from_arrow(ROWS), 16))
    with pytest.raises(ValueError, match="stream is empty"):
        pack_stream(from_arrow(ROWS).filter(lambda row: False))


@pytest.mark.parametrize("buffer_size", [0, -1, 1.5, True, None])
def test_buffer_size_is_a_number_of_rows(buffer_size):
    with pytest.raises(ValueError, match="buffer_size="):
        pack_stream(from_arrow(ROWS), buffer_size=buffer_size)


def test_options_are_checked_at_once():
    for options in ({"max_sequence_length": 0}, {"max_sequences_per_pack": 0}, {"overlong": "cut"}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            pack_stream(from_arrow(ROWS), **options)


def test_a_later_row_that_is_otherwise_is_named():
    later = make_rows([3] * 1_005)
    long = [*later[:1_003], later[1_003] | {"input_ids": [2, 7] * 300}, later[1_004]]
    refused(long, r"600 tokens.*row 3 begins with input_ids \[2, 7, 2, 7", token_columns=[], buffer_size=1_000)
    ragged = [*later[:1_003], later[1_003] | {"weights": [1.0]}, later[1_004]]
    refused(ragged, r"'weights' in row 3 has 1 values, where input_ids has 3.*row 3 begins", buffer_size=1_000)
    assert len(list(pack_stream(from_arrow(ragged), token_columns=[]).take(2))) == 2
    empty = [*later[:1_003], later[1_003] | {"input_ids": [], "weights": []}, later[1_004]]
    refused(empty, "row 3 has length 0", buffer_size=1_000)
    null = [*later[:1_003], later[1_003] | {"input_ids": [2, None, 3]}, later[1_004]]
    refused(null, r"row 3 has a null token.*begins with input_ids \[2, None, 3\]", buffer_size=1_000)
    missing = [*later[:1_003], later[1_003] | {"input_ids": None}, later[1_004]]
    refused(missing, "'input_ids' in row 3 has no value .null.", buffer_size=1_000)


def test_types_and_columns_of_a_generator_are_those_of_its_first_rows():
    later = make_rows([3] * 1_005)

    def packs(**changed):
        rows = [*later[:1_003], later[1_003] | changed, later[1_004]]
        return list(pack_stream(from_generator(rows), buffer_size=1_000))

    with pytest.raises(ValueError, match=r"'label' must hold int64.*in row 3 of a buffer"):
        packs(label="three")
    with pytest.raises(ValueError, match=r"'other' is in row 3 of a buffer, but not among"):
        packs(other=1)
    assert len(packs(label=None)) > 1


def test_padding_and_answers_are_refused_as_in_a_dataset():
    padded = [{"input_ids": [5, 6 + i % 3, *[0] * (2 + i % 2)][:4]} for i in range(200)]
    refused([{"input_ids": [5 + i, 6 + i, *[0] * 2]} for i in range(200)], "looks padded", max_sequence_length=8)
    assert len(list(pack_stream(from_arrow(padded), 8, pad_token_id=0))) > 1
    rows = [{"input_ids": [2, *[5 + i % 3] * (i % 9 + 1)], "start_positions": 1} for i in range(1_100)]
    refused(rows, "'start_positions' counts tokens", max_sequence_length=8, overlong="truncate")
    late = [row for row in rows if len(row["input_ids"]) <= 8][:800] * 2 + rows[-30:]
    refused(late, "'start_positions' counts tokens", max_sequence_length=8, overlong="truncate", buffer_size=1_000)
    assert list(pack_stream(from_arrow(late), 8, overlong="drop").take(1))


def test_two_rows_of_a_last_buffer_do_not_look_padded():
    rows = [*make_rows([3, 4, 5, 6] * 5), *({"input_ids": [5, i, 9, 9], "weights": [0.0] * 4} for i in (6, 7))]
    rows = [row | {"name": f"row {i}", "label": 0, "answers": []} for i, row in enumerate(rows)]
    assert by_name(unpack(pack_stream(from_arrow(rows), 8, buffer_size=20))) == rows


# Training.


@pytest.fixture
def classified():
    rng = np.random.default_rng(3)
    rows = [make_pair(rng, int(length)) for length in rng.integers(5, 31, 60)]
    return [{"label" if name == "next_sentence_label" else name: row[name] for name in row} for row in rows]


def train(dataset, tokenizer, folder, **options):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=6,
        logging_steps=1,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
        **options,
    )
    collator = DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=32, max_sequences_per_pack=4)
    trainer = PackedTrainer(
        BertForSequenceClassification(config), arguments, train_dataset=dataset, data_collator=collator
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_packed_trainer_takes_a_stream_as_it_takes_its_packs(classified, tokenizer, tmp_path):
    source = datasets.Dataset.from_list(classified).to_iterable_dataset(num_shards=2)
    stream = pack_stream(source, 32, 4, buffer_size=20)
    packs = list(stream)
    assert len(packs) >= 24, "six steps of one epoch"
    stored = datasets.Dataset.from_list(packs, features=stream.features)
    trainer, losses = train(stored, tokenizer, tmp_path)
    assert len(set(losses)) == 6
    labels = {tuple(row["input_ids"]): row["label"] for row in classified}
    for row in unpack(packs):
        assert labels[tuple(row["input_ids"])] == row["label"]
    for form in (None, "arrow"):
        again, others = train(stream.with_format(form), tokenizer, tmp_path)
        assert others == losses
        for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)
    predicted = again.predict(stream)
    assert predicted.label_ids.tolist() == [row["label"] for row in unpack(packs)]
    again.args.train_sampling_strategy = "random"
    with pytest.raises(ValueError, match="sequences_per_step=8 chooses among all packs"):
        PackedTrainer(
            again.model, again.args, train_dataset=stream, data_collator=again.data_collator, sequences_per_step=8
        ).train()


def test_masks_are_drawn_by_the_tokens(classified, tokenizer):
    stream = pack_stream(from_arrow(classified), 32, buffer_size=20)
    collator = DataCollatorWithPacking(tokenizer, seed=1).for_dataset(stream.remove_columns("label"))
    rows = list(stream.remove_columns("label"))
    together, alone = collator(rows), [collator([row]) for row in rows]
    for i, batch in enumerate(alone):
        assert torch.equal(batch["labels"][0], together["labels"][i])
    assert (together["labels"] != -100).any()
    collator.set_epoch(1)
    assert not torch.equal(collator(rows)["labels"], together["labels"])
