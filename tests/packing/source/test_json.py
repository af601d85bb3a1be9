"""JSON becomes Arrow with every value as it is written, or is refused with file, line, column and value."""

import json

import datasets
import pytest

import packing.source.json_rows
from packing import cli, read_histogram
from packing.files.names import NamedFile
from packing.source.json_rows import BYTE_ORDER_MARK, MOST, blocks, check_depth
from packing.source.open import open_splits

datasets.disable_progress_bars()

BIG = 2**53 + 1  # no float64 is this number


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=[1 << 24, 100], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(packing.source.json_rows, "BLOCK", request.param)
    monkeypatch.setattr(packing.source.json_rows, "FIRST_BLOCK", request.param)


def write(path, rows, form):
    if form == "list":
        path = path.with_suffix(".json")
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(params=["lines", "list"])
def load(request, tmp_path):
    def load_rows(*files):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for number, rows in enumerate(files):
            write(folder / f"{number}.jsonl", rows, request.param)
        return open_splits(str(folder))[""]

    return load_rows


def rows_of(values):
    return [{"input_ids": [1, 2], "value": value} for value in values]


KEPT = {
    "whole numbers, however great": [2**63 - 1, -(2**63), BIG],
    "fractions among whole numbers": [3, 0.1, None, 2**53],
    "texts like dates": ["2020-01-01", "2020-01-01T12:00:00Z", "12:30:00"],
    "dates, then texts": [*["2020-01-01"] * 20, "noon"],
    "nothing, then texts": [*[None] * 20, "é \U0001f600 \u0000 \\"],
    "empty lists, then lists": [*[[]] * 20, [[1], []], None],
    "lists, then fractions": [*[[1]] * 20, [0.5]],
    "fields that come later": [{"a": 1, "b": None}] * 20 + [{"a": None, "b": ["2020-01-01"]}],
    "bools": [True, None, False],
}


@pytest.mark.parametrize("case", KEPT)
def test_values_are_kept_as_they_are_written(load, block, case):
    values = KEPT[case]
    assert load(rows_of(values))["value"][:] == values
    assert load(rows_of(values), rows_of([None] * 3), rows_of(values))["value"][:] == [
        *values, None, None, None, *values
    ]  # fmt: skip


def test_a_column_that_comes_later_is_null_before(load, block):
    rows = [{"input_ids": [1]}] * 30 + [{"input_ids": [2], "name": "x"}]
    assert load(rows)["name"][:] == [None] * 30 + ["x"]


@pytest.mark.parametrize(("values", "passes"), [([1, 2, None, 3] * 9, 1), ([1] * 30 + [0.5], 2)])
def test_a_file_is_read_twice_only_where_its_columns_widen(load, block, monkeypatch, values, passes):
    done, real = [], packing.source.json_rows._write
    monkeypatch.setattr(packing.source.json_rows, "_write", lambda *given: done.append(given) or real(*given))
    assert load(rows_of(values))["value"][:] == values
    one_block = packing.source.json_rows.BLOCK > 100
    assert len(done) == (1 if one_block else passes)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("mark", [b"", BYTE_ORDER_MARK], ids=["", "mark"])
def test_blocks_are_whole_lines_of_some_bytes(tmp_path, size, mark):
    """Blank ones alone are no block, and count as lines."""
    lines = [b"", b"", b'{"a": 1}', b"", b'{"a": "\xc3\xa9"}\r', b"   ", b'{"b": 2}', b"", b"\t"]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(mark + b"\n".join(lines))
    found = [*blocks(NamedFile(file, "rows.jsonl"), size)]
    for first, block in found:
        assert block.strip() and (b"\n".join(lines[first - 1 :])).startswith(block)
    texts = [line for _, block in found for line in block.split(b"\n") if line.strip()]
    assert texts == [line for line in lines if line.strip()]
    assert all(len(block) < size + max(map(len, lines)) + 2 for _, block in found)


REFUSED = {
    "a great number among fractions": ([1] * 30 + [0.5, BIG], rf"has {BIG} in column 'value', which holds fractions"),
    "a great number before fractions": ([BIG] + [1] * 30 + [0.5], rf"has {BIG} in column 'value'"),
    "a number beyond all integers": ([1] * 30 + [2**64 - 1], rf"has {2**64 - 1} in column 'value'"),
    "a number beyond all floats": ([1] * 30 + [10**300], r"has 10{299}0 in column 'value'"),
    "in a list": ([[1, 0.5]] * 30 + [[1, -BIG]], rf"has -{BIG} in column 'value'"),
    "in a field": ([{"a": 0.5}] * 30 + [{"a": BIG}], rf"has {BIG} in column 'value'"),
    "texts, then objects": (["x"] * 30 + [{"a": 1}], "holds dict in column 'value', and lines before it hold str"),
    "texts, then numbers": (["x"] * 30 + [5], "holds number in column 'value'"),
    "numbers, then texts": ([5] * 30 + ["x"], "holds str in column 'value'"),
    "numbers, then bools": ([5] * 30 + [True], "holds bool in column 'value'"),
    "a field that differs": ([{"a": [{"b": 1}]}] * 30 + [{"a": [{"b": "x"}]}], r"value.a.b|/value/a/\[\]/b"),
    "nothing in lists, then texts": ([[None]] * 20 + [[1]] * 10 + [["x"]], "holds list, str in column 'value'"),
    "objects, then lists": ([{"a": 1}] * 30 + [[1]], "holds list, number in column 'value'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_is_refused_by_line_and_column(load, block, case):
    values, message = REFUSED[case]
    number = (
        next(i for i, value in enumerate(values, 1) if value in (BIG, [1, -BIG], {"a": BIG}))
        if str(BIG) in str(values)
        else len(values)
    )
    with pytest.raises((ValueError, TypeError), match=message) as refused:
        load(rows_of(values))
    if case != "a field that differs":
        assert f" {number} " in str(refused.value)
    assert "/data/0.js" in str(refused.value)


def test_a_number_of_thousands_of_digits_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [1], "value": ' + "9" * 5_000 + "}\n")
    with pytest.raises(ValueError, match=r"rows.jsonl' line 1 has 9{40}… in column 'value'"):
        open_splits(str(tmp_path / "rows.jsonl"))


def test_files_that_differ_name_the_column_and_null_is_anything(load, block):
    assert load(rows_of([None] * 30), rows_of(["x"]))["value"][:] == [None] * 30 + ["x"]
    assert load(rows_of(["x"]), rows_of([None]), rows_of([[]][:0] or [None]))["value"][:] == ["x", None, None]
    with pytest.raises((ValueError, TypeError), match="'value'"):
        load(rows_of([None, 1]), rows_of(["x"]))


def bad_bytes(tmp_path, *, after, content):
    path = tmp_path / "bad.jsonl"
    line = b'{"input_ids": [1, 2], "text": "fine"}\n'
    path.write_bytes(line * after + content + b"\n" + line * 5)
    return path


@pytest.mark.parametrize("after", [0, 40])
@pytest.mark.parametrize("content", [b'{"input_ids": [1], "text": "\xff"}', b'{"input_ids": [1], "text": "\xe9t\xe9"}'])
def test_what_is_no_utf8_is_refused(tmp_path, block, after, content, capsys):
    path = bad_bytes(tmp_path, after=after, content=content)
    assert cli.main([str(path), str(tmp_path / "packed")]) == 2
    assert f"{str(path)!r} line {after + 1} is no UTF-8 (byte 0x{content[28]:02x}" in capsys.readouterr().err
    listed = tmp_path / "listed.json"
    listed.write_bytes(b"[" + content + b"]")
    assert cli.main([str(listed), str(tmp_path / "packed")]) == 2
    assert f"{str(listed)!r} line 1 is no UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("depth", [2_000, 100_000])
@pytest.mark.parametrize("brackets", ["[]", "{}", "lines"])
def test_what_is_nested_too_deep_is_refused(tmp_path, block, depth, brackets, capsys):
    if brackets == "lines":  # each bracket on a line of its own
        value = "[\n" * depth + "]\n" * depth
    else:
        begin, end = ('{"a":', "}") if brackets == "{}" else ("[", "]")
        value = begin * depth + "1" + end * depth
    content = f'{{"input_ids": [1], "value": {value}}}'
    path = bad_bytes(tmp_path, after=40, content=content.encode())
    assert cli.main([str(path), str(tmp_path / "packed")]) == 2
    error = capsys.readouterr().err
    assert repr(str(path)) in error and ("is nested more than 60 deep" in error or brackets == "lines")
    listed = tmp_path / "listed.json"
    listed.write_text(f"[{content}]")
    assert cli.main([str(listed), str(tmp_path / "packed")]) == 2
    assert f"{str(listed)!r} line" in (error := capsys.readouterr().err) and "is nested more than 60 deep" in error
    lengths = tmp_path / "lengths.json"
    lengths.write_text("[" * depth + "1" + "]" * depth)
    with pytest.raises(ValueError, match=r"lengths.json': line 1 is nested more than 60 deep"):
        read_histogram(lengths)


def test_what_is_nested_less_deep_is_read(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"input_ids": [1], "value": ' + "[" * (MOST - 1) + "1" + "]" * (MOST - 1) + "}")
    assert len(open_splits(str(path))[""]) == 1


def test_brackets_in_texts_are_not_nested():
    check_depth(json.dumps({"text": '[[" \\' * 500, "value": [[1]]}).encode() * 3)
    check_depth(b"[" * MOST + b"]" * MOST + b"\n" + b"{" * MOST)
    check_depth(b'{"text": "unclosed [[[[\n' * 3)
    with pytest.raises(ValueError, match="line 8 is nested"):
        check_depth(b"\n" + b'"\\""' + b"[" * (MOST + 1), first_line=7)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_that_is_no_table_is_called_what_it_is(tmp_path, block, indent, capsys):
    content = {"type": "FeatureCollection", "features": [{"type": "Feature", "id": i} for i in range(3)]}
    path = tmp_path / "map.json"
    path.write_text(json.dumps(content, indent=indent))
    assert cli.main([str(path), "--plan-only"]) == 2
    error = capsys.readouterr().err
    assert "one object with 'type', 'features', and no table" in error
    assert "'features' is a list of 3 objects: if they are the rows, save it alone" in error


def test_rows_are_the_same_in_parts_that_threads_parse(tmp_path, monkeypatch):
    rows = [{"input_ids": [i, i + 1], "value": None if i < 50 else i, "note": {"a": "x" * (i % 7)}} for i in range(99)]
    rows[70]["value"] = 0.5
    texts = {
        "lines": "\n".join(map(json.dumps, rows)),
        "over lines": "\n".join(json.dumps(row, indent=1) for row in rows),
        "on one line": " ".join(map(json.dumps, rows)),
    }
    found = {}
    for part in (40, 300, 1 << 20):
        monkeypatch.setattr(packing.source.json_rows, "PART", part)
        for name, text in texts.items():
            path = tmp_path / f"{name} {part}.jsonl"
            path.write_text(text)
            found[name, part] = open_splits(str(path))[""].to_list()
    assert all(each == rows for each in found.values()), [name for name, each in found.items() if each != rows]
