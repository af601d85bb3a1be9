"""Python values become Arrow unchanged, or are refused with row and value; in streams the first rows fix the types."""

import datetime as dt
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.iterable_dataset import ArrowExamplesIterable

from packing import pack_stream
from packing.source.exact import NotHeldError, exact_array

datasets.disable_progress_bars()

NOON = dt.datetime(2020, 1, 1, 12, 0, 0, 5)
UTC_NOON = NOON.replace(tzinfo=dt.UTC)
BIG = 2**53 + 1  # no float64 is this number

HELD = {
    "numbers": ([1, 2.5, None], pa.float64(), [1.0, 2.5, None]),
    "whole floats": ([5.0], pa.int64(), [5]),
    "nan": ([float("nan"), None], None, "[nan, None]"),
    "decimals": ([Decimal("1.55"), Decimal(2)], None, [Decimal("1.55"), Decimal(2)]),
    "lists": ([[1, None], None, [], (2,), np.array([3])], pa.list_(pa.int64()), [[1, None], None, [], [2], [3]]),
    "a field is missing": ([{"a": 1}, None, {}], pa.struct([("a", pa.int64())]), [{"a": 1}, None, {"a": None}]),
    "times": ([NOON, None], pa.timestamp("us"), [NOON, None]),
    "one instant": ([UTC_NOON], pa.timestamp("us", "Europe/Berlin"), [UTC_NOON]),
    "texts and bytes": ([["x"], ["é"]], None, [["x"], ["é"]]),
    "numpy": ([np.float32(0.1), np.float64(0.1)], None, [float(np.float32(0.1)), 0.1]),
    "an array of two dimensions": ([np.array([[1, 2], [3, 4]])], None, [[[1, 2], [3, 4]]]),
    "an array of none": ([np.array(5)], None, [5]),
    "nanoseconds": ([np.datetime64("2020-01-01T00:00:00", "ns")], None, [dt.datetime(2020, 1, 1)]),
}


@pytest.mark.parametrize("case", HELD)
def test_what_a_type_holds_is_taken_as_it_is(case):
    values, type_, expected = HELD[case]
    found = exact_array(values, type_).to_pylist()
    assert (str(found) if isinstance(expected, str) else found) == expected


CHANGED = {
    "a fraction": ([5, 4.75], pa.int64(), 4.75),
    "a decimal fraction": ([5, Decimal("1.5")], pa.int64(), Decimal("1.5")),
    "a bool among numbers": ([5, np.True_], pa.int64(), np.True_),
    "a bool among floats": ([0.5, True], pa.float64(), True),
    "a great number among floats": ([0.5, BIG], pa.float64(), BIG),
    "a great number, types not known": ([0.5, BIG], None, BIG),
    "a float of more bits": ([np.float32(0.5), 0.1], pa.float32(), 0.1),
    "bytes among texts": (["x", b"y"], pa.string(), b"y"),
    "texts and bytes, types not known": ([b"x", "y"], None, "y"),
    "half a character": (["x", "\ud800"], pa.string(), "\ud800"),
    "a time of day in a date": ([NOON.date(), NOON], pa.date32(), NOON),
    "a time of day, types not known": ([NOON.date(), NOON], None, NOON),
    "a time zone": ([NOON, UTC_NOON], pa.timestamp("us"), UTC_NOON),
    "no time zone": ([UTC_NOON, NOON], None, NOON),
    "microseconds": ([NOON.replace(microsecond=0), NOON], pa.timestamp("s"), NOON),
    "a number for a time": ([NOON, 5], pa.timestamp("us"), 5),
    "a list with a fraction": ([[1], [2, 0.5]], pa.list_(pa.int64()), [2, 0.5]),
    "a list with a bool": ([[1], [True]], pa.list_(pa.float64()), [True]),
    "a text for a list": ([["a"], "ab"], pa.list_(pa.string()), "ab"),
    "lists in lists": ([[[1]], [[0.5]]], pa.list_(pa.list_(pa.int8())), [[0.5]]),
    "a field that nobody named": ([{"a": 1}, {"a": 1, "b": 2}], pa.struct([("a", pa.int64())]), {"a": 1, "b": 2}),
    "a fraction in a field": ([{"a": 1}, {"a": 0.5}], pa.struct([("a", pa.int64())]), {"a": 0.5}),
    "a field in a list": ([[{"a": "x"}], [{"a": b"x"}]], pa.list_(pa.struct([("a", pa.string())])), [{"a": b"x"}]),
    "bytes for a list of numbers": ([[1], bytearray(b"a")], pa.list_(pa.int64()), bytearray(b"a")),
    "a float of more bits than Python's": ([0.5, np.longdouble("0.1")], pa.float64(), np.longdouble("0.1")),
    "too great": ([1, 2**63], pa.int64(), 2**63),
    "anything where nothing was": ([None, 5], pa.null(), 5),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_a_type_would_change_is_refused(case):
    values, type_, culprit = CHANGED[case]
    with pytest.raises(NotHeldError) as refused:
        exact_array(values, type_)
    assert (refused.value.row, refused.value.value) == (1, culprit)


def test_arrays_of_numpy_are_looked_into():
    values, type_ = [np.array([1.0]), np.array([0.5])], pa.list_(pa.int64())
    with pytest.raises(NotHeldError, match=r"hold \[0\] instead of array\(\[0.5\]\)"):
        exact_array(values, type_)


def test_tensors_are_lists_of_numbers():
    torch = pytest.importorskip("torch")
    rows = [torch.tensor([1, 2]), [torch.tensor(3)], torch.tensor([4])]
    assert exact_array(rows).to_pylist() == exact_array(rows, pa.list_(pa.int32())).to_pylist() == [[1, 2], [3], [4]]
    assert exact_array([{"a": torch.tensor(0.5, dtype=torch.bfloat16)}]).to_pylist() == [{"a": 0.5}]
    with pytest.raises(NotHeldError, match=r"hold \[0\] instead of \[0.5\]"):
        exact_array([torch.tensor([1]), torch.tensor([0.5])], pa.list_(pa.int64()))


def test_floats_are_rounded_only_to_a_type_that_somebody_chose():
    assert exact_array([0.1], pa.float32(), rounds=True).to_pylist() == [float(np.float32(0.1))]
    with pytest.raises(NotHeldError):
        exact_array([5, 0.1], pa.int64(), rounds=True)
    assert exact_array([float("inf"), None, 0.1], pa.float32(), rounds=True).to_pylist()[:2] == [float("inf"), None]
    with pytest.raises(NotHeldError, match="would hold inf instead of 1e"):
        exact_array([float("inf"), 1e300], pa.float32(), rounds=True)


@pytest.mark.parametrize(("first", "later"), [(5, 4.75), (0.5, True), (0.5, BIG), ("x", b"y"), (NOON.date(), NOON)])
def test_a_stream_refuses_what_the_types_of_its_first_rows_would_change(first, later):
    rows = [{"input_ids": [2, 3], "score": first}] * 1_003 + [{"input_ids": [2, 3], "score": later}]
    packed = pack_stream(datasets.IterableDataset.from_generator(lambda: iter(rows)), 8, buffer_size=1_000)
    with pytest.raises(ValueError, match=r"column 'score' must hold .* in row 3 of a buffer.*from_generator\(features"):
        list(packed)
    fine = pack_stream(datasets.IterableDataset.from_generator(lambda: iter(rows[:-1])), 8, buffer_size=1_000)
    assert [value for pack in fine for value in pack["score"]] == [first] * 1_003


@pytest.mark.parametrize(("first", "later"), [(5, 4.75), (0.5, BIG), (5, "text"), ("text", 5)])
def test_tables_of_a_stream_without_features_are_not_cast(first, later):
    """datasets would make text of numbers, and name no row where it cannot cast."""

    def tables():
        for number, value in enumerate((first, later)):
            yield number, pa.table({"input_ids": [[2, 3]] * 1_000, "score": [value] * 1_000})

    stream = datasets.IterableDataset(ArrowExamplesIterable(tables, {}))
    with pytest.raises(ValueError, match=r"column 'score' must hold .* in row 0 of a buffer"):
        list(pack_stream(stream, 8, buffer_size=1_000))


def test_declared_types_are_kept_and_nothing_is_cut_to_them():
    rows = [{"input_ids": [2, 3], "score": 0.1, "label": "low", "name": 5}] * 3
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "score": datasets.Value("float32"),
            "label": datasets.ClassLabel(names=["high", "low"]),
            "name": datasets.Value("string"),
        }
    )

    def packs(score):
        changed = [*rows, rows[0] | {"score": score}]
        declared = features if score == 0.1 else features | {"score": datasets.Value("int64")}
        stream = datasets.IterableDataset.from_generator(lambda: iter(changed), features=datasets.Features(declared))
        return list(pack_stream(stream, 8))

    (pack,) = packs(0.1)
    assert pack["label"] == [1] * 4 and pack["name"] == ["5"] * 4
    assert pack["score"] == [float(np.float32(0.1))] * 4
    with pytest.raises(ValueError, match=r"'score' must hold int64.*would hold 0 instead of 0.1"):
        packs(4.75)


DECLARED = {  # a feature, values that it holds as they are given or encoded, one that it does not
    "a name of a class": (datasets.ClassLabel(names=["a", "b"]), ["b", 1], [1, 1], 7),
    "a number of a class": (datasets.ClassLabel(names=["a", "b"]), [0, "a"], [0, 0], 0.7),
    "a field of text": ({"a": datasets.Value("string")}, [{"a": "x"}, {"a": 5}], [{"a": "x"}, {"a": "5"}], {"b": 2}),
    "a number beside text": (
        {"a": datasets.Value("string"), "b": datasets.Value("int64")},
        [{"a": 5, "b": 2}],
        [{"a": "5", "b": 2}],
        {"a": 5, "b": 2.5},
    ),
    "texts in a list": (datasets.List(datasets.Value("string")), [["x", 5, "y"]], [["x", "5", "y"]], 5),
}


@pytest.mark.parametrize("case", DECLARED)
def test_declared_features_encode_values_and_cut_none(case):
    feature, values, expected, culprit = DECLARED[case]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32")), "value": feature})

    def packed(*values):
        rows = [{"input_ids": [2, 3], "value": value} for value in values]
        stream = datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)
        return [value for pack in pack_stream(stream, 8) for value in pack["value"]]

    found = packed(*values)
    assert sorted(map(str, found)) == sorted(map(str, expected))
    with pytest.raises(ValueError, match=r"column 'value' must hold .*give the stream features"):
        packed(*values, culprit)


def test_columns_of_tables_that_were_cast_are_cast(tmp_path):
    pq.write_table(pa.table({"input_ids": [[2, 3]] * 3, "number": [1, 2, 3]}), tmp_path / "rows.parquet")
    files = str(tmp_path / "rows.parquet")
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=tmp_path)
    (pack,) = pack_stream(stream.cast_column("number", datasets.Value("string")), 8)
    assert sorted(pack["number"]) == ["1", "2", "3"]
