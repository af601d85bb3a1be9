"""A source read by ranges of rows, in any order: it equals, and refuses, what one process reads at once."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
import slow_rows

from packing.source.fingerprint import column_prints
from packing.source.ranges import (
    RangeLost,
    RangeWrong,
    Reading,
    from_arrow,
    join_ranges,
    read_range,
    row_ranges,
    to_arrow,
)
from packing.source.rows import closing_token, read_source
from packing.source.sequences import cut_sequences

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch):
    monkeypatch.setattr("packing.source.fingerprint.BLOCK_ROWS", 16)
    monkeypatch.setattr("packing.source.ranges.BLOCK_ROWS", 16)
    monkeypatch.setattr("packing.source.ranges.RANGE_BYTES", 1)


def by_ranges(dataset, token_columns=None, pad_token_id=None):
    """As a cluster does: the last range first, and rows of Arrow travel. -> Source, prints, how many were wrong"""
    reading, ranges = Reading(token_columns, pad_token_id, True), row_ranges(dataset)
    assert len(ranges) == -(-len(dataset) // 16)
    parts = [from_arrow(to_arrow(read_range(dataset, reading, *bounds))) for bounds in reversed(ranges)]
    assert sum(part.rows for part in parts) == len(dataset)
    return *join_ranges(dataset, reading, iter(parts)), sum(isinstance(part, RangeWrong) for part in parts)


def rows_of(lengths, **columns) -> datasets.Dataset:
    ids = [[5 + i % 7] * (n - 1) + [2] for i, n in enumerate(lengths)]
    return datasets.Dataset.from_dict({"input_ids": ids, **columns})


def masked(side: str) -> datasets.Dataset:
    draw, rows = np.random.default_rng(1), {"input_ids": [], "attention_mask": []}
    for _ in range(300):
        kept = int(draw.integers(1, 20))
        ids, mask = [*range(3, 2 + kept), 1], [1] * kept
        padding = [0] * (20 - kept)
        front, back = (padding, []) if side == "left" else ([], padding)
        rows["input_ids"].append(front + ids + back)
        rows["attention_mask"].append([0] * len(front) + mask + [0] * len(back))
    return datasets.Dataset.from_dict(rows)


def plain() -> datasets.Dataset:
    return datasets.Dataset.from_list(slow_rows.random_rows(3, 400, 60))


def some_padded_in_front() -> datasets.Dataset:
    """In some ranges only."""
    ids = [([0] * 3 if 100 < i < 140 else []) + [7] * (1 + i % 9) + [8] for i in range(300)]
    return datasets.Dataset.from_dict({"input_ids": ids})


SOURCES = {
    "plain": (plain, {}),
    "chosen rows": (lambda: plain().shuffle(seed=1).select(range(50, 350)), {}),
    "padded": (lambda: masked("right"), {}),
    "padded in front": (lambda: masked("left"), {}),
    "padded in front in some ranges": (some_padded_in_front, {"pad_token_id": 0}),
    "token columns": (lambda: rows_of([3, 9, 4] * 90, tags=[[1] * n for n in [3, 9, 4] * 90]), {}),
    "token columns by name": (
        lambda: rows_of([3, 9, 4] * 90, tags=[[1] * n for n in [3, 9, 4] * 90], same=[[1] * n for n in [3, 9, 4] * 90]),
        {"token_columns": ["same"]},
    ),
    "empty texts": (lambda: rows_of([3, 4] * 150, text=[None, "a"] * 150), {}),
    "no list in one range": (lambda: rows_of([3, 4] * 150, tags=[None if i == 20 else [i] for i in range(300)]), {}),
    "a null in one range": (lambda: rows_of([3, 4] * 150, tags=[[None if i == 20 else i] for i in range(300)]), {}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_ranges_say_what_one_process_reads(name):
    make, options = SOURCES[name]
    dataset = make()
    whole = read_source(dataset, **options)
    found, prints, _ = by_ranges(dataset, **options)
    assert prints == column_prints(dataset)
    assert np.array_equal(found.kept, whole.kept) and found.kept.dtype == whole.kept.dtype
    assert (found.skipped is None) == (whole.skipped is None)
    assert whole.skipped is None or np.array_equal(found.skipped, whole.skipped)
    assert (found.trimmed_rows, found.trimmed_tokens) == (whole.trimmed_rows, whole.trimmed_tokens)
    assert [c.name for c in found.columns.token_columns] == [c.name for c in whole.columns.token_columns]
    assert list(found.columns.row_columns) == list(whole.columns.row_columns)
    assert found.ends_alike == (closing_token(whole) is not None)


TAGS = {
    "no list": pa.array([None if i == 20 else [i] * (i % 3) for i in range(300)], pa.list_(pa.int32())),
    "null": pa.array([[None] if i == 20 else [i] * (i % 3) for i in range(300)], pa.list_(pa.int32())),
    "no list of fixed size": pa.array([None if i == 20 else [i, 1] for i in range(300)], pa.list_(pa.int32(), 2)),
    "null of fixed size": pa.array([[None, 1] if i == 20 else [i, 1] for i in range(300)], pa.list_(pa.int32(), 2)),
}


@pytest.mark.parametrize("name", TAGS)
def test_one_fingerprint_however_rows_with_nulls_are_stored(name):
    """In chunks of any length, chosen, or alone: rows beside them do not count."""
    tags, whole, part = TAGS[name], set(), set()
    for rows in (300, 100, 17):
        chunks = [pa.array(tags[i : i + rows].to_pylist(), tags.type) for i in range(0, 300, rows)]
        ids = rows_of([3, 4] * 150)["input_ids"]
        dataset = datasets.Dataset(pa.table({"input_ids": ids, "tags": pa.chunked_array(chunks)}))
        chosen = dataset.select(range(299, -1, -1)).select(range(299, -1, -1))
        for same in (dataset, chosen):
            whole |= {column_prints(same), by_ranges(same)[1]}
            part |= {column_prints(same.select(range(100, 300))), by_ranges(same.select(range(100, 300)))[1]}
    assert (len(whole), len(part)) == (1, 1)


def test_rows_end_alike_in_each_range_but_not_in_all():
    ids = [[5, 6, 1 if i < 160 else 2] for i in range(320)]
    found, _, _ = by_ranges(datasets.Dataset.from_dict({"input_ids": ids, "n": list(range(320))}))
    assert found.ends_alike is False


def test_a_column_that_is_token_level_in_some_ranges_only():
    """Its first rows are as long as input_ids, most are not: a list for each sequence, as in one process."""
    dataset = rows_of([3] * 300, tags=[[1] * (3 if i < 64 else 1) for i in range(300)], n=list(range(300)))
    found, prints, _ = by_ranges(dataset)
    assert list(found.columns.row_columns) == ["tags", "n"] and prints == column_prints(dataset)


def with_null_row() -> datasets.Dataset:
    ids = [None if i == 217 else [1, 2, 3][: 1 + i % 3] for i in range(300)]
    return datasets.Dataset(pa.table({"input_ids": pa.array(ids, pa.list_(pa.int64())), "n": list(range(300))}))


def looks_padded_as_a_whole() -> datasets.Dataset:
    """One range has a row with one token of padding, another a row with two: no range looks padded on its own."""
    ids = [[5, 6, 7, 8] for _ in range(300)]
    ids[10], ids[250] = [5, 6, 7, 0], [5, 6, 0, 0]
    return datasets.Dataset.from_dict({"input_ids": ids, "n": list(range(300))})


def with_hole() -> datasets.Dataset:
    mask = [[1, 0, 1] if i == 123 else [1, 1, 0] for i in range(300)]
    return datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 300, "attention_mask": mask})


WRONG = {
    "null": (with_null_row, {}, r"column 'input_ids' in row 217 has no value \(null\)", True),
    "empty": (lambda: rows_of([3] * 300).map(lambda r, i: {"input_ids": [] if i == 99 else [1]}, with_indices=True),
              {}, "row 99 has length 0", True),
    "hole": (with_hole, {}, "row 123 has zeros between ones", True),
    "padded": (looks_padded_as_a_whole, {}, "the source looks padded: all 300 rows have 4 tokens, and 2 of", False),
    "ragged": (lambda: rows_of([3] * 300, tags=[[1] * (2 if i == 201 else 3) for i in range(300)]),
               {}, "column 'tags' in row 201 has 2 values, where input_ids has 3", True),
    "ragged by name": (lambda: rows_of([3] * 300, tags=[[1] * (2 if i == 201 else 3) for i in range(300)]),
                       {"token_columns": ["tags"]}, "column 'tags' in row 201 has 2 values", True),
    "missing in one range": (
        lambda: rows_of([3] * 300, tags=[None if i < 64 else [1] * 3 for i in range(300)]),
        {}, r"column 'tags' in row 0 has no value \(null\), and one value per token in other rows", False),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_as_by_one_process(name):
    make, options, said, is_seen_in_a_range = WRONG[name]
    dataset = make()
    with pytest.raises(ValueError, match=said) as alone:
        read_source(dataset, **options)
    with pytest.raises(ValueError) as ranges:
        by_ranges(dataset, **options)
    assert str(ranges.value) == str(alone.value)
    reading = Reading(options.get("token_columns"), options.get("pad_token_id"), True)
    read = [read_range(dataset, reading, *bounds) for bounds in row_ranges(dataset)]
    assert any(isinstance(part, RangeWrong) for part in read) == is_seen_in_a_range


def test_a_range_that_is_wrong_by_itself_only():
    """In one range half of the rows have a list as long as input_ids, in the whole source few: nothing is wrong."""
    dataset = rows_of([3] * 300, tags=[[1] * (3 if 64 <= i < 74 else 1 + i % 2) for i in range(300)])
    found, prints, wrong = by_ranges(dataset)
    assert wrong == 1
    assert list(found.columns.row_columns) == ["tags"] and prints == column_prints(dataset)


def test_truncation_takes_what_ranges_said_of_how_rows_end(monkeypatch):
    monkeypatch.setattr("packing.source.sequences.closing_token", None)  # the source is not read again
    alike, _, _ = by_ranges(rows_of([9, 3, 5] * 100))
    assert cut_sequences(alike, 4, "truncate").ends is not None
    other, _, _ = by_ranges(datasets.Dataset.from_dict({"input_ids": [[i % 9] * (2 + i % 9) for i in range(300)]}))
    assert cut_sequences(other, 4, "truncate").ends is None


@pytest.mark.parametrize("given", [slice(1, None), slice(None, -1), [0, 1, 1, 2], [0, 0, 2]], ids=str)
def test_ranges_that_are_not_all_rows_once_are_refused(given):
    dataset = rows_of([3, 4] * 20)
    reading = Reading(None, None, False)
    parts = [read_range(dataset, reading, *bounds) for bounds in row_ranges(dataset)]
    parts = parts[given] if isinstance(given, slice) else [parts[i] for i in given]
    with pytest.raises(RuntimeError, match="are not the 40 rows of the source, each once"):
        join_ranges(dataset, reading, parts)


def test_a_range_that_was_lost_travels_as_one():
    assert from_arrow(to_arrow(RangeLost(16, 32, "no such file"))) == RangeLost(16, 32, "no such file")
