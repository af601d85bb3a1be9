"""pack_dataset: every token exactly once, whatever the source looks like; what is refused leaves nothing behind."""

import logging
import re

import datasets
import numpy as np
import pyarrow as pa
import pytest
import slow_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import SELECTIONS, TOKEN_COLUMNS, make_dataset

from packing import pack_dataset, packed_info
from packing.dataset import prepare_packing
from packing.options import PackOptions

datasets.disable_progress_bars()


def all_tokens(dataset):
    return sorted(token for row in dataset["input_ids"] for token in row)


def same_as_reference(dataset, **options):
    """Pack, compare with the slow version row by row, and check that every row is there exactly once."""
    packed, rows = pack_dataset(dataset, **options), dataset.to_list()
    assert packed.to_list() == slow_rows.pack_rows(rows, TOKEN_COLUMNS, packed["sequence_indices"])
    assert sorted(i for pack in packed["sequence_indices"] for i in pack) == list(range(len(rows)))
    return packed


def test_pack_dataset_draws_its_packs():
    source = datasets.Dataset.from_dict({"input_ids": [[7, 8], [5, 6, 4], [9, 9, 9, 8, 9]], "label": ["a", "b", "c"]})
    packed = pack_dataset(source, max_sequence_length=5)
    assert sorted(packed.to_list(), key=str) == [
        {"input_ids": [7, 8, 5, 6, 4], "label": ["a", "b"], "sequence_lengths": [2, 3], "sequence_indices": [0, 1]},
        {"input_ids": [9, 9, 9, 8, 9], "label": ["c"], "sequence_lengths": [5], "sequence_indices": [2]},
    ]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 40),
    longest=st.integers(2, 30),
    depth=st.none() | st.integers(1, 6),
    padded=st.booleans(),
)
def test_every_token_exactly_once(seed, count, longest, depth, padded):
    source = make_dataset(slow_rows.random_rows(seed, count, longest, padded))
    # the drawn rows can all have one length and end alike, which is refused: then they say what padding is
    options = {} if padded or len(set(map(len, source["input_ids"]))) > 1 else {"pad_token_id": 0}
    options["token_columns"] = sorted(TOKEN_COLUMNS)  # few short rows can make `answers` as long as input_ids
    packed = same_as_reference(source, max_sequence_length=30, max_sequences_per_pack=depth, seed=seed, **options)
    assert max(map(len, packed["sequence_lengths"])) <= (depth or 30)
    assert max(map(len, packed["input_ids"])) <= 30


@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("padded", [False, True], ids=["bare", "padded"])
def test_any_choice_of_rows(select, padded, tmp_path):
    rows = slow_rows.random_rows(1, 200, 40, padded)
    make_dataset(rows).save_to_disk(tmp_path / "source", num_shards=3)
    chosen = select(datasets.load_from_disk(tmp_path / "source"))
    packed = pack_dataset(chosen, 64)
    rows = chosen.with_format(None).to_list()
    assert packed.to_list() == slow_rows.pack_rows(rows, TOKEN_COLUMNS, packed["sequence_indices"])
    assert sorted(i for pack in packed["sequence_indices"] for i in pack) == list(range(len(rows)))


LISTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]


def chunked(*arrays):
    return pa.chunked_array(arrays)


COLUMNS = {
    "list": chunked(pa.array(LISTS, pa.list_(pa.int32()))),
    "large_list": chunked(pa.array(LISTS, pa.large_list(pa.int32()))),
    "chunks": chunked(pa.array(LISTS[:1], pa.list_(pa.int64())), pa.array(LISTS[1:], pa.list_(pa.int64()))),
    "an empty chunk": chunked(pa.array([], pa.list_(pa.int64())), pa.array(LISTS, pa.list_(pa.int64()))),
    "sliced": chunked(pa.array([[0] * 9, *LISTS, [0]], pa.list_(pa.uint8())).slice(1, 4)),
    "sliced values": chunked(
        pa.ListArray.from_arrays([0, 3, 5, 9, 10], pa.array([0, 0, *range(1, 11), 0], pa.int16()).slice(2))
    ),
    "uint64": chunked(pa.array(LISTS, pa.list_(pa.uint64()))),
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_any_list_in_arrow(column):
    source = datasets.Dataset(pa.table({"input_ids": column}))
    packed = pack_dataset(source, 5)
    assert packed.to_list() == slow_rows.pack_rows(source.to_list(), {"input_ids"}, packed["sequence_indices"])
    assert packed.data.column("input_ids").type.value_type == column.type.value_type


@pytest.mark.parametrize("part", [slice(None), slice(1, 3)], ids=["whole", "sliced"])
def test_lists_of_fixed_size(part):
    column = pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.int64(), 2))[part]
    source = datasets.Dataset(pa.table({"input_ids": column}))
    packed = pack_dataset(source, 4)
    assert packed.to_list() == slow_rows.pack_rows(source.to_list(), {"input_ids"}, packed["sequence_indices"])


def test_misaligned_tokens_are_copied():
    """A hand-made buffer that begins one byte beyond an aligned address."""
    raw = pa.py_buffer(b"x" + np.arange(10, dtype=np.int32).tobytes()).slice(1)
    values = pa.Array.from_buffers(pa.int32(), 10, [None, raw])
    other = pa.array([[77, 78]], pa.list_(pa.int32()))
    column = chunked(pa.ListArray.from_arrays([0, 4, 10], values), other)
    packed = pack_dataset(datasets.Dataset(pa.table({"input_ids": column})), 6)
    assert sorted(packed["input_ids"]) == [[0, 1, 2, 3, 77, 78], [4, 5, 6, 7, 8, 9]] or sorted(packed["input_ids"]) == [
        [4, 5, 6, 7, 8, 9],
        [77, 78, 0, 1, 2, 3],
    ]


def test_columns_of_every_kind_keep_their_type():
    source = datasets.Dataset.from_dict(
        {
            "input_ids": [[1, 2], [3]],
            "boxes": [[[0, 1], [2, 3]], [[4, 5]]],  # two numbers per token
            "bold": [[True, False], [True]],
            "tags": [["a", "b"], ["c"]],
            "label": [0, 1],
            "score": [0.5, None],
            "meta": [{"page": 1}, {"page": 2}],
            "unset": [None, None],
        },
        features=datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int16")),
                "boxes": datasets.List(datasets.List(datasets.Value("int32"))),
                "bold": datasets.List(datasets.Value("bool")),
                "tags": datasets.List(datasets.ClassLabel(names=["a", "b", "c"])),
                "label": datasets.ClassLabel(names=["no", "yes"]),
                "score": datasets.Value("float32"),
                "meta": {"page": datasets.Value("int32")},
                "unset": datasets.Value("null"),
            }
        ),
    )
    packed = pack_dataset(source, 3)
    (row,) = packed.to_list()
    order = row["sequence_indices"]
    assert order == [1, 0]  # the shorter one first
    assert row["boxes"] == [[4, 5], [0, 1], [2, 3]]
    assert row["bold"] == [True, True, False]
    assert row["tags"] == [2, 0, 1]
    assert (row["label"], row["score"], row["meta"]) == ([1, 0], [None, 0.5], [{"page": 2}, {"page": 1}])
    assert row["unset"] == [None, None]
    assert packed.features["input_ids"] == datasets.List(datasets.Value("int16"))
    assert packed.features["tags"] == datasets.List(datasets.ClassLabel(names=["a", "b", "c"]))
    assert packed.features["label"] == datasets.List(datasets.ClassLabel(names=["no", "yes"]))
    assert packed.features["sequence_lengths"] == datasets.List(datasets.Value("int32"))
    assert packed.features["sequence_indices"] == datasets.List(datasets.Value("int64"))


def test_token_columns_override():
    """`choices` is as long as input_ids by chance: said to be no token-level column, it stays a list per sequence."""
    source = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "choices": [[7, 8], [9]]})
    assert pack_dataset(source, 3)[0]["choices"] == [9, 7, 8]
    assert pack_dataset(source, 3, token_columns=["input_ids"])[0]["choices"] == [[9], [7, 8]]
    assert packed_info(pack_dataset(source, 3, token_columns=["choices"])).token_columns == ("input_ids", "choices")


# Padding


def padded_source(**columns):
    return datasets.Dataset.from_dict({"input_ids": [[5, 6, 0, 0], [7, 0, 0, 0], [5, 6, 7, 8]], **columns})


def test_padding_is_trimmed_by_the_mask_counted_and_said(caplog):
    source = padded_source(attention_mask=[[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    packed = pack_dataset(source, 4)
    assert sorted(map(sorted, packed["input_ids"])) == [[5, 6, 7], [5, 6, 7, 8]]
    assert "attention_mask" not in packed.column_names
    assert (packed_info(packed).trimmed_tokens, packed_info(packed).trimmed_rows) == (5, 2)
    assert "5 padding tokens trimmed from 2 of 3 rows (attention_mask 0)" in caplog.text


@pytest.mark.parametrize("type_", ["int8", "int64", "bool", "uint8"])
def test_masks_of_any_type(type_):
    mask = [[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    source = padded_source(attention_mask=mask).cast_column("attention_mask", datasets.List(datasets.Value(type_)))
    packed = pack_dataset(source, 4)
    assert all_tokens(packed) == [0, 5, 6, 6, 7, 7, 8]


def test_padding_is_trimmed_by_its_token(caplog):
    packed = pack_dataset(padded_source(token_type_ids=[[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1]]), 4, pad_token_id=0)
    assert sorted(zip(packed["input_ids"], packed["token_type_ids"], strict=True)) == [
        ([5, 6, 7, 8], [1, 0, 1, 1]),
        ([7, 5, 6], [1, 1, 1]),
    ]
    assert "5 padding tokens trimmed from 2 of 3 rows (pad_token_id=0)" in caplog.text


LOOKS_PADDED = {
    "right": [[5, 6, 0, 0], [7, 0, 0, 0], [5, 6, 7, 8]],
    "right, every row": [[5, 6, 0, 0], [7, 8, 0, 0]],
    "left": [[0, 0, 5, 6], [0, 0, 0, 7], [5, 6, 7, 8]],
}


@pytest.mark.parametrize("rows", LOOKS_PADDED.values(), ids=LOOKS_PADDED)
def test_unsaid_padding_is_refused(rows):
    with pytest.raises(ValueError, match=r"looks padded: all \d rows have 4 tokens.*token 0 .*pad_token_id"):
        pack_dataset(datasets.Dataset.from_dict({"input_ids": rows}), 4)


NOT_PADDED = {
    "one length, one closing token": [[5, 6, 7, 3], [8, 9, 5, 3]],
    "the last token occurs inside too": [[5, 3, 3, 3], [3, 9, 3, 3]],
    "many lengths": [[5, 0, 0, 0], [7, 0, 0]],
    "one row": [[5, 0, 0, 0]],
    "a row of it alone": [[5, 0, 0, 0], [0, 0, 0, 0]],
    "one token a row": [[5], [5]],
}


@pytest.mark.parametrize("rows", NOT_PADDED.values(), ids=NOT_PADDED)
def test_what_is_no_padding_is_packed(rows):
    source = datasets.Dataset.from_dict({"input_ids": rows})
    assert all_tokens(pack_dataset(source, 8)) == all_tokens(source)


def test_pad_token_id_also_says_what_is_no_padding():
    source = datasets.Dataset.from_dict({"input_ids": LOOKS_PADDED["right"]})
    assert packed_info(pack_dataset(source, 4, pad_token_id=99)).num_tokens == 12


# Rows longer than a pack

LONG = [[1, 5, 9], [1, 2, 3, 4, 5, 6, 9], [1, 7, 7, 7, 9]]  # all end in 9


def long_source(**columns):
    return datasets.Dataset.from_dict({"input_ids": LONG, "token_type_ids": [[0] * (len(r) - 1) + [1] for r in LONG]})


def test_truncation_keeps_the_closing_token(caplog):
    packed = pack_dataset(long_source(), 4, overlong="truncate")
    assert sorted(packed["input_ids"]) == [[1, 2, 3, 9], [1, 5, 9], [1, 7, 7, 9]]
    assert sorted(packed["token_type_ids"]) == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1]]
    info = packed_info(packed)
    assert (info.overlong, info.overlong_rows, info.overlong_tokens) == ("truncate", (1, 2), 4)  # 3 + 1 tokens
    assert "2 of 3 rows have more than 4 tokens: truncated, 4 tokens lost; rows 1, 2" in caplog.text


def test_truncation_of_rows_that_end_differently():
    source = datasets.Dataset.from_dict({"input_ids": [*LONG, [8]]})
    assert [1, 2, 3, 4] in pack_dataset(source, 4, overlong="truncate")["input_ids"]


def test_a_split_remembers_where_pieces_began():
    packed = pack_dataset(long_source(), 4, overlong="split")
    pieces = []
    for row in packed.to_list():
        ends = np.cumsum(row["sequence_lengths"])
        for end, n, i, b in zip(
            ends, row["sequence_lengths"], row["sequence_indices"], row["sequence_starts"], strict=True
        ):
            pieces.append((i, b, row["input_ids"][end - n : end]))
    assert sorted(pieces) == [
        (0, 0, [1, 5, 9]),
        (1, 0, [1, 2, 3, 4]),
        (1, 4, [5, 6, 9]),
        (2, 0, [1, 7, 7, 7]),
        (2, 4, [9]),
    ]
    assert packed_info(packed).overlong_rows == (1, 2)
    assert packed_info(packed).overlong_tokens == 0


def test_a_split_counts_from_the_row_with_its_padding():
    source = datasets.Dataset.from_dict({"input_ids": [[0, 1, 2, 3, 4]], "attention_mask": [[0, 1, 1, 1, 1]]})
    packed = pack_dataset(source, 3, overlong="split")
    assert sorted(zip(packed["sequence_starts"], packed["input_ids"], strict=True)) == [([1], [1, 2, 3]), ([4], [4])]


def test_dropped_rows_are_counted_and_listed(caplog):
    packed = pack_dataset(long_source(), 4, overlong="drop")
    assert packed["input_ids"][:] == [[1, 5, 9]]
    assert packed["sequence_indices"][:] == [[0]]
    info = packed_info(packed)
    assert (info.overlong_rows, info.overlong_tokens, info.source_rows, info.num_sequences) == ((1, 2), 12, 3, 1)
    assert "dropped, 12 tokens lost" in caplog.text


def test_overlong_rows_are_refused_by_default():
    message = "row 1 has 7 tokens, more than max_sequence_length=4 (and 1 more rows are too long); choose overlong="
    with pytest.raises(ValueError, match=re.escape(message)):
        pack_dataset(long_source(), 4)


# On disk


def test_the_folder_is_a_dataset(tmp_path):
    rows = slow_rows.random_rows(3, 300, 40)
    source = make_dataset(rows)
    packed = pack_dataset(source, 64, 3, output=tmp_path / "new" / "packed")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["packed"]
    assert sorted(p.name for p in (tmp_path / "new" / "packed").iterdir()) == [
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "manifest.json",
        "state.json",
    ]
    loaded = datasets.load_from_disk(tmp_path / "new" / "packed")
    assert loaded.to_list() == packed.to_list() == pack_dataset(source, 64, 3).to_list()
    assert loaded.features == packed.features
    assert packed_info(loaded) == packed_info(pack_dataset(source, 64, 3))


def test_shards_and_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", 2000)
    monkeypatch.setattr("packing.store.contents.BATCH_TOKENS", 256)
    source = make_dataset(slow_rows.random_rows(3, 300, 40))
    packed = pack_dataset(source, 64, output=tmp_path / "packed")
    assert len(packed.cache_files) > 3
    monkeypatch.undo()
    assert packed.to_list() == pack_dataset(source, 64).to_list()


def test_same_seed_same_bytes(tmp_path):
    source = make_dataset(slow_rows.random_rows(3, 100, 40))
    files = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack_dataset(source, 64, seed=seed, output=tmp_path / name)
        files[name] = [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]
    assert files["a"] == files["b"]
    assert files["a"][0] != files["c"][0]


def test_facts_survive(tmp_path):
    source = make_dataset(slow_rows.random_rows(3, 100, 40))
    info = packed_info(pack_dataset(source, 64, 3, seed=5, output=tmp_path / "packed"))
    assert (info.max_sequence_length, info.max_sequences_per_pack, info.seed, info.source_rows) == (64, 3, 5, 100)
    assert info.max_depth <= 3
    assert set(info.token_columns) == TOKEN_COLUMNS
    assert info.token_columns[0] == "input_ids"
    assert (info.num_sequences, info.num_tokens) == (100, sum(map(len, source["input_ids"])))
    loaded = datasets.load_from_disk(tmp_path / "packed")
    loaded.shuffle(seed=0).select(range(3)).save_to_disk(tmp_path / "again")
    assert packed_info(datasets.load_from_disk(tmp_path / "again")) == info


def test_an_unpacked_dataset_has_no_facts():
    with pytest.raises(ValueError, match="was not packed"):
        packed_info(long_source())
    with pytest.raises(ValueError, match="several packings"):
        packed_info(
            datasets.concatenate_datasets([pack_dataset(long_source(), 8), pack_dataset(long_source(), 8, seed=1)])
        )


# What is refused: each names the culprit and the cure, and leaves nothing on disk


def of(**columns):
    return datasets.Dataset.from_dict(columns)


REFUSED = {
    "empty dataset": (of(input_ids=[]), {}, "is empty: it has no rows"),
    "length 0": (of(input_ids=[[1], [2, 3], []]), {}, "row 2 has length 0: its input_ids are empty; filter"),
    "overlong": (of(input_ids=[[1], [2] * 9]), {}, "row 1 has 9 tokens, more than max_sequence_length=8; choose"),
    "all dropped": (of(input_ids=[[2] * 9]), {"overlong": "drop"}, "every row is longer than max_sequence_length=8"),
    "no input_ids": (of(text=["a"], label=[0]), {}, "no column 'input_ids' among text, label; tokenize"),
    "input_ids of text": (of(input_ids=["a"]), {}, "'input_ids' holds string; it must be a list of integers"),
    "input_ids of floats": (of(input_ids=[[0.5]]), {}, "'input_ids' holds .*double.*; it must be a list of integers"),
    "padded, no mask": (of(input_ids=[[1, 2, 0, 0], [1, 0, 0, 0]]), {}, "looks padded.*attention_mask.*pad_token_id"),
    "hole": (of(input_ids=[[1], [1, 2, 3]], attention_mask=[[1], [1, 0, 1]]), {}, "row 1 has zeros between ones"),
    "all masked": (of(input_ids=[[1], [1, 2]], attention_mask=[[1], [0, 0]]), {}, "row 1 is nothing but padding"),
    "all padding": (of(input_ids=[[1], [0, 0]]), {"pad_token_id": 0}, "row 1 is nothing but padding"),
    "mask of other length": (of(input_ids=[[1, 2]], attention_mask=[[1]]), {}, "_mask' in row 0 has 1 values"),
    "mask of text": (of(input_ids=[[1]], attention_mask=["x"]), {}, "'attention_mask' holds string"),
    "mask and pad_token_id": (of(input_ids=[[1]], attention_mask=[[1]]), {"pad_token_id": 0}, "or remove the column"),
    "null row": (of(input_ids=[[1], None]), {}, r"'input_ids' in row 1 has no value \(null\)"),
    "null token": (of(input_ids=[[1], [2, None]]), {}, "'input_ids' in row 1 has a null token"),
    "null in a token column": (of(input_ids=[[1], [2]], tags=[[1], None]), {}, r"'tags' in row 1 has no value"),
    "reserved name": (of(input_ids=[[1]], position_ids=[[0]]), {}, "'position_ids' has a reserved name"),
    "packed already": (pack_dataset(of(input_ids=[[1]]), 8), {}, "is packed already"),
    "unknown packer": (of(input_ids=[[1]]), {"packer": "nope"}, "unknown packer 'nope'; choose from .*spfhp"),
    "unknown overlong": (of(input_ids=[[1]]), {"overlong": "cut"}, "overlong 'cut'; choose from error, truncate"),
    "bad seed": (of(input_ids=[[1]]), {"seed": -1}, "seed=-1 must be a whole number"),
    "bad depth": (of(input_ids=[[1]]), {"max_sequences_per_pack": 0}, "max_sequences_per_pack=0 must be"),
    "unknown token column": (of(input_ids=[[1]]), {"token_columns": ["b"]}, "'b', which is not among input_ids"),
    "other length": (of(input_ids=[[1, 2]], a=[[1]]), {"token_columns": ["a"]}, "row 0 has 1 values, where .* has 2"),
    "no list": (of(input_ids=[[1, 2]], a=[1]), {"token_columns": ["a"]}, "'a', which holds int64"),
    "ragged": (of(input_ids=[[1, 2], [3], [4]], a=[[1, 2], [3], [4, 5]]), {}, "'a' in row 2 has 2 values, where .* 1"),
    "weights as input_ids": (of(input_ids=[[1.0, 2.0]]), {}, "must be a list of integers"),
    "token_columns is text": (of(input_ids=[[1]]), {"token_columns": "input_ids"}, "must be a list of column names"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(source, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pack_dataset(source, 8, output=tmp_path / "packed", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_left_alone(tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="packed' exists already; choose another folder or remove it"):
        pack_dataset(of(input_ids=[[1]]), output=tmp_path / "packed")
    assert [p.read_text() for p in (tmp_path / "packed").iterdir()] == ["precious"]


def test_what_is_no_dataset():
    with pytest.raises(TypeError, match=r"needs a datasets\.Dataset, got list"):
        pack_dataset([[1, 2]])
    with pytest.raises(ValueError, match="has no splits"):
        pack_dataset(datasets.DatasetDict())


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("packing.store.shards.gather_packs", fail)
    with pytest.raises(OSError, match="disk full"):
        pack_dataset(of(input_ids=[[1]]), output=tmp_path / "new" / "packed")
    assert list(tmp_path.iterdir()) == []


def test_planning_copies_no_token(caplog):
    with caplog.at_level(logging.WARNING):
        packing = prepare_packing(long_source(), PackOptions(max_sequence_length=8))
    assert (packing.plan.num_packs, packing.facts.num_packs) == (2, 2)  # 7 | 5 + 3
    assert not caplog.records


@pytest.mark.parametrize("mask", [[1, 1, 2, 2], [1, 1, 1, -1]])
def test_a_mask_that_numbers_sequences_is_refused(mask):
    """Read as ones, they would join several sequences."""
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 2, "attention_mask": [[1, 1, 1, 1], mask]})
    with pytest.raises(ValueError, match="row 1 has values other than 0 and 1"):
        pack_dataset(rows, max_sequence_length=8)


def test_a_failure_leaves_what_others_wrote(tmp_path):
    """Two runs make the same parent folder; the one that fails must not delete the other's output."""
    from packing.files.folder import new_folder

    with pytest.raises(OSError, match="disk"), new_folder(tmp_path / "new" / "b"):
        (tmp_path / "new" / "a").mkdir()
        raise OSError("disk full")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    with pytest.raises(OSError, match="disk"), new_folder(tmp_path / "other" / "deep" / "b"):
        raise OSError("disk full")
    assert not (tmp_path / "other").exists()


def test_answers_that_packing_would_move_are_refused():
    rows = {"input_ids": [[0, 2, 8, 3], [2, 9, 9, 3]], "attention_mask": [[0, 1, 1, 1], [1, 1, 1, 1]]}
    dataset = datasets.Dataset.from_dict(rows | {"start_positions": [2, 1], "end_positions": [2, 2]})
    with pytest.raises(ValueError, match="'start_positions' counts tokens of its row, but row 0 begins with 1 tokens"):
        pack_dataset(dataset, max_sequence_length=8)
    whole = dataset.remove_columns("attention_mask")
    for overlong in ("truncate", "split"):
        with pytest.raises(ValueError, match=f"row 0 would be cut by overlong='{overlong}'"):
            pack_dataset(whole, max_sequence_length=3, overlong=overlong)
    assert pack_dataset(whole, max_sequence_length=4)["start_positions"][:] == [[2], [1]]


def test_a_dataset_dict_packs_each_split_by_itself(tmp_path):
    source = datasets.DatasetDict(train=of(input_ids=[[1, 2], [3]]), test=of(input_ids=[[4]]))
    packed = pack_dataset(source, max_sequence_length=3)
    assert {name: rows["input_ids"][:] for name, rows in packed.items()} == {"train": [[3, 1, 2]], "test": [[4]]}
    written = pack_dataset(source, max_sequence_length=3, output=tmp_path / "packed")
    assert [written[name][:] for name in source] == [packed[name][:] for name in source]
    with pytest.raises(ValueError, match=r"^split 'test': row 0 has 4 tokens, more than max_sequence_length=3"):
        pack_dataset(datasets.DatasetDict(test=of(input_ids=[[1, 2, 3, 4]])), max_sequence_length=3)
