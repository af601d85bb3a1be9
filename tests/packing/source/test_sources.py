"""The sources of pack-dataset: real files of every kind give the same packs; errors name what is wrong."""

import gzip
import json
import os
import pickle
import shutil
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import slow_rows

from packing import cli, pack_dataset
from packing.files.errors import SourceError
from packing.source import text as source_text
from packing.source.lengths import holds_lengths
from packing.source.open import find_files, open_splits

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of its own for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def make_rows():
    """60 rows with a column of every kind: per token int, int8, float, string, bool; per row all others."""
    rows = slow_rows.random_rows(5, 60, 20)
    for i, row in enumerate(rows):
        row["flags"] = [token % 2 == 0 for token in row["input_ids"]]
        row["nested"] = {"name": f"n{i}", "values": list(range(i % 3))}
        row["category"] = "abc"[i % 3]
        row["is_odd"] = bool(i % 2)
    return rows


def make_dataset():
    dataset = datasets.Dataset.from_list(make_rows())
    dataset = dataset.cast_column("label", datasets.ClassLabel(names=["low", "mid", "high"]))
    dataset = dataset.cast_column("input_ids", datasets.List(datasets.Value("int32")))
    return dataset.cast_column("token_type_ids", datasets.List(datasets.Value("int8")))


def make_table(dataset=None):
    """As in Arrow files: the schema has the meaning of the columns."""
    dataset = make_dataset() if dataset is None else dataset
    return dataset.data.table.combine_chunks().cast(dataset.features.arrow_schema)


def write_stream(path, table, **options):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, **options)


def write_file(path, table, **options):
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, **options)


def write_lines(path, rows, end="\n"):
    path.write_text("\n".join(map(json.dumps, rows)) + end)


CUTS = [(0, 7), (7, 0), (7, 30), (37, 23)]  # of several files; the second has no rows


def several(write, ending):
    def write_all(folder):
        folder.mkdir()
        table = make_table()
        for number, (first, count) in enumerate(CUTS):
            write(folder / f"part-{number}{ending}", table.slice(first, count))
        return folder

    return write_all


def one(write, ending):
    def write_one(path):
        path = path.with_name(f"rows{ending}")
        write(path, make_table())
        return path

    return write_one


def rows_only(write):
    return lambda path, table: write(path, table.to_pylist())


def write_zipped(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def as_dictionary(path, table):
    place = table.column_names.index("category")
    write_stream(path, table.set_column(place, "category", table["category"].dictionary_encode()))


def saved(path):
    make_dataset().save_to_disk(path, num_shards=3)
    return path


def saved_after_a_shuffle_and_back(path):
    order = np.random.default_rng(0).permutation(60)
    make_dataset().select(order).select(np.argsort(order)).save_to_disk(path)
    return path


def mixed_arrow(folder):
    folder.mkdir()
    table = make_table()
    write_stream(folder / "1.arrow", table.slice(0, 20))
    write_file(folder / "2.arrow", table.slice(20))
    return folder


SOURCES = {
    "save_to_disk": saved,
    "save_to_disk after a shuffle": saved_after_a_shuffle_and_back,
    "parquet": one(lambda path, table: pq.write_table(table, path), ".parquet"),
    "parquet, row groups": one(lambda path, table: pq.write_table(table, path, row_group_size=7), ".parquet"),
    "parquet, several": several(lambda path, table: pq.write_table(table, path), ".parquet"),
    "json lines": one(rows_only(write_lines), ".jsonl"),
    "json lines, no last newline": one(rows_only(lambda p, rows: write_lines(p, rows, "")), ".jsonl"),
    "json lines, several": several(rows_only(lambda p, rows: write_lines(p, rows, "\n" * bool(rows))), ".jsonl"),
    "json lines, zipped": one(rows_only(write_zipped), ".jsonl.gz"),
    "json lines named json": one(rows_only(write_lines), ".json"),
    "arrow stream": one(write_stream, ".arrow"),
    "arrow stream, chunks": one(lambda path, table: write_stream(path, table, max_chunksize=7), ".arrow"),
    "arrow streams": several(write_stream, ".arrow"),
    "arrow file": one(write_file, ".arrow"),
    "arrow file, chunks": one(lambda path, table: write_file(path, table, max_chunksize=7), ".arrow"),
    "arrow files": several(write_file, ".arrow"),
    "arrow, stream and file": mixed_arrow,
    "arrow, dictionary": one(as_dictionary, ".arrow"),
}


@pytest.fixture(scope="module")
def expected():
    return pack_dataset(make_dataset(), 40, seed=3)


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_packs_from_every_source(tmp_path, name, expected):
    source = SOURCES[name](tmp_path / "source")
    assert cli.main([str(source), str(tmp_path / "packed"), "--max-sequence-length", "40", "--seed", "3"]) == 0
    packed = datasets.load_from_disk(tmp_path / "packed")
    assert packed.to_list() == expected.to_list()
    if "json" not in name:  # where types are not stored
        assert packed.features == expected.features


@pytest.mark.parametrize("width", ["int16", "int32", "int64", "uint16"])
@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_lists_of_every_kind_and_width(tmp_path, kind, width):
    """Fixed-size ones are of one length; a large list of another column keeps its offsets."""
    rng = np.random.default_rng(1)
    rows = [[int(token) for token in rng.integers(1, 100, 6)] for _ in range(30)]
    plain = pack_dataset(datasets.Dataset.from_dict({"input_ids": rows}), 20)
    value = pa.type_for_alias(width)
    write = {"parquet": lambda p, t: pq.write_table(t, p), "stream": write_stream, "file": write_file}[kind]
    ending = ".parquet" if kind == "parquet" else ".arrow"
    for number, type_ in enumerate([pa.list_(value), pa.large_list(value), pa.list_(value, 6)]):
        whole = pa.table({"input_ids": pa.array([[1] * 6, *rows, [2] * 6], type_)})
        path = tmp_path / f"{number}{ending}"
        write(path, whole.slice(1, 30))
        loaded = open_splits(str(path))[""]
        assert loaded.data.column("input_ids").type == type_
        packed = pack_dataset(loaded, 20)
        assert packed["input_ids"][:] == plain["input_ids"][:]
        assert packed["sequence_indices"][:] == plain["sequence_indices"][:]
        assert packed.data.column("input_ids").type.value_type == value
        chosen = loaded.shuffle(seed=1).select(range(5, 25))
        assert (
            pack_dataset(chosen, 20).to_list()
            == pack_dataset(datasets.Dataset.from_list(chosen.to_list()), 20).to_list()
        )


def test_splits_by_name(tmp_path, expected):
    """A DatasetDict, and files and folders whose names have the split."""
    splits = {
        "train": make_dataset(),
        "validation": make_dataset().select(range(20)),
        "test": make_dataset().select([3]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for name, (folder, file) in {
        "train": ("a", "my_train"),
        "validation": ("a", "dev-00000-of-00001"),
        "test": ("a/deep/test", "part-0"),
    }.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        splits[name].to_parquet(tmp_path / folder / f"{file}.parquet")
    (tmp_path / "a" / "_SUCCESS").write_text("")
    (tmp_path / "a" / ".hidden.parquet").write_text("")
    for source in ("saved", "a", "a/**/*.parquet"):
        target = tmp_path / "packed" / source.replace("*", "x")
        assert cli.main([str(tmp_path / source), str(target), "--max-sequence-length", "40", "--seed", "3"]) == 0
        packed = datasets.load_from_disk(target)
        assert list(packed) == list(splits)
        assert packed["train"].to_list() == expected.to_list()
        assert packed["test"]["sequence_indices"][:] == [[0]]
    only = open_splits(str(tmp_path / "a" / "*train*"))
    assert list(only) == [""] and len(only[""]) == 60


def test_names_that_glob_would_read(tmp_path):
    folder = tmp_path / "odd [1] * {a,b}"
    folder.mkdir()
    write = {"x?.parquet": lambda p, t: pq.write_table(t, p), "y[0].jsonl": rows_only(write_lines)}
    for name, write_one in write.items():
        write_one(folder / name, make_table())
        assert len(open_splits(str(folder / name))[""]) == 60


def test_converted_once_and_anew_when_it_changes(tmp_path, cache):
    path = tmp_path / "rows.jsonl"
    write_lines(path, [{"input_ids": [1, 2]}])

    def files():
        return {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}

    assert open_splits(str(path))[""]["input_ids"][:] == [[1, 2]]
    first, times = files(), path.stat()
    assert open_splits(str(path))[""]["input_ids"][:] == [[1, 2]]
    assert files() == first and len(first) == 1
    write_lines(path, [{"input_ids": [3, 4]}])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it were the old one
    assert open_splits(str(path))[""]["input_ids"][:] == [[3, 4]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_columns_in_another_order_are_the_same_columns(tmp_path, kind):
    write = {"parquet": lambda p, t: pq.write_table(t, p), "jsonl": rows_only(write_lines), "arrow": write_stream}[kind]
    table = make_table()
    write(tmp_path / f"1.{kind}", table.slice(0, 20))
    write(tmp_path / f"2.{kind}", table.select(table.column_names[::-1]).slice(20))
    assert open_splits(str(tmp_path))[""].to_list() == make_dataset().to_list()


def test_streams_are_read_where_they_lie(tmp_path, cache):
    path = SOURCES["arrow stream"](tmp_path / "source")
    assert open_splits(str(path))[""].cache_files == [{"filename": str(path)}]
    assert not list(cache.rglob("*"))


def test_a_json_file_is_of_rows_or_of_lengths_by_how_it_begins(tmp_path):
    file = tmp_path / "some.json"
    for text, rows in [
        ('[{"input_ids": [1]}]', True),
        (' [ \n {"a": 1}]', True),
        ('{"input_ids": [1]}\n', True),
        ('\ufeff{"7 words": 1}', True),
        ("[12, 7]", False),
        ('{"12": 1}', False),
        ("", False),
    ]:
        file.write_text(text)
        assert holds_lengths(file) is not rows, text
    assert not holds_lengths(file.with_suffix(".JSONL")) and holds_lengths(file.with_suffix(".npy"))


# What is wrong


def refused(arguments, capsys):
    """The one line on stderr."""
    assert cli.main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pack-dataset: ") and error.count("\n") == 1
    return error


ROWS = [{"input_ids": [1, 2, 3], "label": 1}, {"input_ids": [4], "label": 0}]


def damage(path, write, where):
    """Write a file and flip bytes in its middle, or cut it short."""
    write(path)
    content = bytearray(path.read_bytes())
    if where == "cut":
        content = content[: len(content) * 2 // 3]
    else:
        first = int(len(content) * where)
        content[first : first + 40] = bytes(255 - byte for byte in content[first : first + 40])
    path.write_bytes(content)


CAN_BE_DAMAGED = [  # an Arrow file has no checksum of its tokens
    *(("parquet", where) for where in ("cut", 0.5, "empty")),
    *((kind, where) for kind in ("stream", "file") for where in ("cut", "empty")),
    *(("jsonl.gz", where) for where in ("cut", 0.5)),
]


@pytest.mark.parametrize(("kind", "where"), CAN_BE_DAMAGED)
def test_a_damaged_file_is_named(tmp_path, capfd, kind, where):
    ids = pa.array([list(range(i % 50 + 1)) for i in range(2000)], pa.list_(pa.int32()))
    table = pa.table({"input_ids": ids})
    write, ending = {
        "parquet": (lambda p: pq.write_table(table, p, write_page_checksum=True), "parquet"),
        "stream": (lambda p: write_stream(p, table), "arrow"),
        "file": (lambda p: write_file(p, table), "arrow"),
        "jsonl.gz": (lambda p: write_zipped(p, table.to_pylist()), "jsonl.gz"),
    }[kind]
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder / f"a.{ending}")
    bad = folder / f"b.{ending}"
    if where == "empty":
        bad.write_bytes(b"")
    else:
        damage(bad, write, where)
    assert cli.main([str(folder), str(tmp_path / "packed")]) == 2
    assert f"pack-dataset: {str(bad)!r} " in capfd.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_offsets_that_lead_astray_are_found(tmp_path, capsys):
    """Kernels do not check offsets: they would read foreign memory."""
    table = pa.table({"input_ids": pa.array([[1, 2]] * 100, pa.list_(pa.int32()))})
    path = tmp_path / "rows.arrow"
    write_stream(path, table)
    content = path.read_bytes()
    offsets = np.arange(0, 201, 2, dtype=np.int32).tobytes()
    assert content.count(offsets) == 1
    wrong = np.arange(0, 201, 2, dtype=np.int32)
    wrong[50] = 1 << 20
    path.write_bytes(content.replace(offsets, wrong.tobytes()))
    assert f"{str(path)!r} cannot be read, it is damaged" in refused([path, "--plan-only"], capsys)


HURT = {
    "cut.parquet": (b"PAR1 and no more", None),
    "cut.arrow": (b"ARROW1 and no more", None),
    "stream.arrow": (b"\xff\xff\xff\xff\x40", None),
    "cut.jsonl.gz": (gzip.compress(b'{"input_ids": [1]}\n')[:-4], None),
    "cut.json": (b'[{"input_ids": [1]}, ', None),
    "bytes.jsonl": (b'{"input_ids": [1]}\n\n{"input_ids": [2], "a": "\xe9"}\n', 3),
    "list.jsonl": (b'{"input_ids": [1]}\n[2]\n', 2),
    "kinds.jsonl": (b'{"input_ids": [1]}\n{"input_ids": "1"}\n', 2),
    "deep.jsonl": (b'{"input_ids": [1]}\n' + b"[" * 99 + b"\n", 2),
    "great.jsonl": (b'{"input_ids": [1], "a": 0.5}\n{"input_ids": [1], "a": 9007199254740993}\n', 2),
    "two.csv": (b"input_ids,input_ids\n1,2\n", None),
    "latin.csv": (b"caf\xe9\n1\n", None),
    "latin.txt": (b"caf\xe9\n", None),
    "cut.txt.gz": (gzip.compress(b"One.\n")[:-4], None),
    "page.txt": (b"<!doctype html>\n", None),
}


@pytest.mark.parametrize("name", HURT)
def test_what_is_wrong_with_a_file_is_a_source_error(tmp_path, name):
    """It names the file, the line where there are any, and the cure; and it comes whole from another process."""
    content, row = HURT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as refused:
        open_splits(str(tmp_path / name))[""][:]
    for error in (refused.value, pickle.loads(pickle.dumps(refused.value))):
        assert (error.file, error.row) == (str(tmp_path / name), row) and error.cure
        assert str(error).startswith(repr(error.file)) and str(error).endswith(error.cure)


BAD_LINES = {
    '{"input_ids": [1, 2': "line 3 is no JSON: Expecting ',' delimiter",
    "input_ids": "line 3 is no JSON",
    "[1, 2]": "line 3 holds list; each line is an object",
}
BAD_LINES['{"input_ids": ["a"]}'] = (
    "line 3 holds list, str in column 'input_ids', and lines before it hold list, number"
)


@pytest.mark.parametrize("block", [1 << 20, 10])
@pytest.mark.parametrize(("line", "message"), BAD_LINES.items())
def test_a_bad_line_is_named(tmp_path, capfd, monkeypatch, block, line, message):
    """Both where it is among the lines that columns are read from, and after them."""
    monkeypatch.setattr("packing.source.json_rows.FIRST_BLOCK", block)
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_lines(good, ROWS)
    write_lines(bad, ROWS)
    bad.write_text(bad.read_text() + line + "\n" + json.dumps(ROWS[0]) + "\n")
    assert cli.main([str(tmp_path), "--plan-only"]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert f"{str(bad)!r} " in error


@pytest.mark.parametrize(("name", "indent"), [("rows.json", None), ("rows.json", 2), ("rows.json.gz", 2)])
def test_one_json_list_is_read_as_it_is_written(tmp_path, name, indent):
    """The library would write its numbers again with ten digits; and a text may look like the end of a row."""
    rows = [{"input_ids": [i, 2**40 + i], "score": 0.1234567890123456 + i, "text": "}],\n[{ é"} for i in range(30)]
    text = "\ufeff " + json.dumps(rows, indent=indent, ensure_ascii=False).replace("\n", "\r\n") + "\n"
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for _ in range(2):  # from the cache, too
        assert open_splits(str(tmp_path / name))[""].to_list() == rows
    write_lines(tmp_path / "rows.jsonl", rows)
    assert open_splits(str(tmp_path / "rows.json*"))[""].to_list() == rows + rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"input_ids": [1]}, {"input_ids": [2]}', "Expecting ',' or ']'"),
        ('[{"input_ids": [1]}, ]', "Expecting a row after the comma"),
        ('[{"input_ids": [1]}] 7', "Expecting nothing after the list"),
        ('[{"input_ids": [1]} {"input_ids": [2]}]', "Expecting ',' or ']'"),
        ('[{"input_ids": [1]}, {"input_ids": [2', "Expecting"),
        ('[{"input_ids": [1]}, 7]', "element 2 holds int; each line is an object"),
        ('[{"input_ids": [1]}, {"input_ids": ["a"]}]', "element 2 holds list, str in column 'input_ids'"),
    ],
)
def test_a_json_list_that_is_none_is_named(tmp_path, capsys, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    error = refused([path, "--plan-only"], capsys)
    assert repr(str(path)) in error and message in error


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"input_ids": [[1]]}, "'a.parquet' has a column 'label', and 'b.parquet' has none"),
        (
            {"input_ids": [[1]], "label": [1], "text": ["a"]},
            "'b.parquet' has a column 'text', and 'a.parquet' has none",
        ),
        (
            {"input_ids": [[1.5]], "label": [1]},
            "column 'input_ids' is List(Value('int64')) in 'a.parquet', but List(Value('float64'))",
        ),
        (
            {"input_ids": [[1]], "label": ["x"]},
            "column 'label' is Value('int64') in 'a.parquet', but Value('string') in 'b.parquet'",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "arrow"])
def test_files_that_differ_are_named(tmp_path, capsys, monkeypatch, kind, other, message):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    write = {"parquet": lambda p, t: pq.write_table(t, p), "jsonl": rows_only(write_lines), "arrow": write_stream}[kind]
    for name, columns in (("a", {"input_ids": [[1, 2]], "label": [1]}), ("b", other)):
        write(tmp_path / "data" / f"{name}.{kind}", pa.table(columns))
    message = message.replace(".parquet", f".{kind}").replace("'a.", "'data/a.").replace("'b.", "'data/b.")
    assert message in refused(["data", "--plan-only"], capsys)


def test_labels_in_another_order_are_other_labels(tmp_path, capsys):
    for name, labels in (("a", ["neg", "pos"]), ("b", ["pos", "neg"])):
        dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "label": [1]})
        dataset.cast_column("label", datasets.ClassLabel(names=labels)).to_parquet(tmp_path / f"{name}.parquet")
    assert "column 'label' is ClassLabel(names=['neg', 'pos'])" in refused([tmp_path, "--plan-only"], capsys)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"input_ids": [[1], None]}, [], "column 'input_ids' in row 1 has no value (null)"),
        ({"input_ids": [[1], [2, None]]}, [], "column 'input_ids' in row 1 has a null token"),
        (
            {"input_ids": [[1.0], [2.5]]},
            [],
            "column 'input_ids' holds list<element: double>; it must be a list of integers",
        ),
        ({"input_ids": [[1], []]}, [], "row 1 has length 0"),
        (
            {"input_ids": [[1, 2], [3]], "tags": [[1, 2], [3, 4]]},
            ["--token-columns", "tags"],
            "column 'tags' in row 1 has 2 values, where input_ids has 1",
        ),
        ({"inputs_ids": [[1], [2]]}, [], "no column 'input_ids' among inputs_ids; did you mean 'inputs_ids'?"),
        ({"text": ["a", "b"]}, [], "no column 'input_ids' among text; tokenize before packing, or let it be done here"),
    ],
)
def test_bad_rows_are_named(tmp_path, capsys, columns, options, message):
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    error = refused([tmp_path / "rows.parquet", "--plan-only", *options], capsys)
    assert message.replace("element", "item") in error.replace("element", "item")


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "stream", "file"])
def test_no_rows_at_all(tmp_path, capsys, kind):
    empty = pa.table({"input_ids": pa.array([], pa.list_(pa.int32()))})
    path = tmp_path / ("rows.arrow" if kind in ("stream", "file") else f"rows.{kind}")
    write = {"parquet": lambda p, t: pq.write_table(t, p), "stream": write_stream, "file": write_file}
    path.write_text("") if kind == "jsonl" else write[kind](path, empty)
    assert f"{str(path)!r} has no rows" in refused([path, "--plan-only"], capsys)
    shutil.copy(path, path.with_stem("more"))
    assert "and the other files have no rows" in refused([tmp_path, "--plan-only"], capsys)


def test_files_that_do_not_belong_together(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.parquet", "a/y.jsonl", "b/test.jsonl", "b/z.jsonl", "c/train.jsonl", "c/README.md"):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        write_lines(tmp_path / name, ROWS)
    (tmp_path / "c" / "dataset_infos.json").write_text("{}")
    assert "files of several kinds, 'a/x.parquet' and 'a/y.jsonl'; give a glob" in refused(["a", "packed"], capsys)
    assert "'b/test.jsonl' is named as of split 'test', but 'b/z.jsonl' as of none" in refused(["b", "packed"], capsys)
    assert [file.name for file in find_files("c").splits[""]] == ["c/train.jsonl"]
    assert "SOURCE 'd*' matches no file" in refused(["d*", "packed"], capsys)
    assert "'c/README.md' is no file .parquet" in refused(["c/*.md", "packed"], capsys)
    assert "there is no SOURCE 'b/tset.jsonl'" in refused(["b/tset.jsonl", "packed"], capsys)
    with pytest.raises(SystemExit):
        cli.main(["b/test.jsonl", "b/z.jsonl", "packed"])
    assert "quote the glob" in capsys.readouterr().err


def test_names_of_the_hub_are_passed_on(monkeypatch, capsys):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        if len(arguments) > 1:
            return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
        raise datasets.exceptions.DatasetNotFoundError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert cli.main(["someone/some-data:config.a", "--plan-only"]) == 0
    assert "train: 2 rows" in capsys.readouterr().out
    assert "there is no file or folder 'someone/some-data', and the hub gave" in refused(
        ["someone/some-data", "--plan-only"], capsys
    )
    assert asked == [("someone/some-data", "config.a"), ("someone/some-data",)]


# Texts


def words(rng, most):
    return " ".join(f"w{word}" for word in rng.integers(0, 55, rng.integers(1, most)))


@pytest.fixture
def texts(tmp_path, tokenizer):
    """A folder with a tokenizer, and rows of texts, pairs and labels, as JSON lines and as save_to_disk."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rng = np.random.default_rng(2)
    rows = [{"text": words(rng, 20), "reply": words(rng, 9), "label": i % 3} for i in range(50)]
    write_lines(tmp_path / "texts.jsonl", rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    return tmp_path, rows


def tokenized(folder, rows, *names, **options):
    """The slow way."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    found = [tokenizer(*(row[name] for name in names), **options) for row in rows]
    ints = {width: datasets.List(datasets.Value(width)) for width in ("int32", "int8")}
    features = {"label": datasets.Value("int64"), "input_ids": ints["int32"], "token_type_ids": ints["int8"]}
    columns = {name: [f[name] for f in found] for name in ("input_ids", "token_type_ids")}
    columns["label"] = [row["label"] for row in rows]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("source", ["texts.jsonl", "saved"])
@pytest.mark.parametrize("names", [("text",), ("text", "reply")], ids=["texts", "pairs"])
def test_from_texts_to_packs(texts, source, names):
    folder, rows = texts
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    options = ["--tokenizer", str(folder / "tokenizer"), "--max-sequence-length", "32", "--text-column", names[0]]
    options += ["--text-pair-column", names[1]] if len(names) == 2 else []
    expected = pack_dataset(tokenized(folder, rows, *names), 32)
    assert set(expected["token_type_ids"][0]) == ({0, 1} if len(names) == 2 else {0})
    for num_proc in ("1", "2"):
        target = folder / f"packed{num_proc}"
        assert cli.main([str(folder / source), str(target), *options, "--num-proc", num_proc]) == 0
        packed = datasets.load_from_disk(target).to_list()
        for row in packed:
            assert row.pop("reply", None) is None or names == ("text",)
        assert packed == expected.to_list()
    assert {path: path.read_bytes() for path in before} == before
    assert {path for path in folder.rglob("*") if path.is_file() and "packed" not in path.parts[-2]} == set(before)


def test_packed_texts_are_verified_against_the_texts(texts, capsys):
    folder, rows = texts
    options = ["--tokenizer", str(folder / "tokenizer"), "--text-column", "text", "--keep-text"]
    assert cli.main([str(folder / "texts.jsonl"), str(folder / "packed"), "--max-sequence-length", "32", *options]) == 0
    verify = ["verify", str(folder / "packed")]
    assert cli.main([*verify, "--source", str(folder / "texts.jsonl"), *options]) == 0
    assert "50 rows, 5 columns compared" in capsys.readouterr().out
    rows[7]["text"] += " w1"
    write_lines(folder / "others.jsonl", rows)
    assert cli.main([*verify, "--source", str(folder / "others.jsonl"), *options]) == 1
    assert "source row 7, column sequence_lengths" in capsys.readouterr().out
    for wrong, message in (
        (options, "--text-column 'text' is for texts in a source; also give --source"),
        (["--source", "x", *options[2:]], "--text-column needs --tokenizer"),
        (["--source", "x", "--keep-text"], "--keep-text would be ignored: there is no --text-column"),
        (["--source", str(folder / "texts.jsonl")], "tokenize before packing, or let it be done here: --text-column"),
    ):
        assert cli.main([*verify, *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("overlong", ["error", "truncate", "drop", "split"])
def test_the_overlong_rule_sees_whole_texts(texts, overlong, capsys):
    folder, rows = texts
    arguments = [
        folder / "texts.jsonl",
        folder / "packed",
        "--text-column",
        "text",
        "--tokenizer",
        folder / "tokenizer",
    ]
    arguments += ["--max-sequence-length", "12", "--overlong", overlong]
    lengths = [len(row["text"].split()) + 2 for row in rows]
    if overlong == "error":
        first = next(i for i, length in enumerate(lengths) if length > 12)
        assert f"row {first} has {lengths[first]} tokens, more than --max-sequence-length 12" in refused(
            arguments, capsys
        )
        return
    assert cli.main([*map(str, arguments)]) == 0
    packed = datasets.load_from_disk(folder / "packed").remove_columns("reply")
    kept = sum(map(len, packed["input_ids"][:]))
    if overlong == "truncate":  # as the tokenizer would
        cut = tokenized(folder, rows, "text", truncation=True, max_length=12)
        assert packed.to_list() == pack_dataset(cut, 12).to_list()
    else:
        assert kept == sum(length for length in lengths if overlong == "split" or length <= 12)


def test_texts_are_tokenized_once_and_kept_when_asked(texts, cache):
    folder, rows = texts
    options = ["--text-column", "text", "--tokenizer", str(folder / "tokenizer"), "--keep-text"]
    assert cli.main([str(folder / "saved"), "--plan-only", *options]) == 0
    (made,) = cache.rglob("*.arrow")
    time = made.stat().st_mtime_ns
    assert cli.main([str(folder / "saved"), str(folder / "packed"), *options]) == 0
    assert made.stat().st_mtime_ns == time and len(list(cache.rglob("*.arrow"))) == 1
    packed = datasets.load_from_disk(folder / "packed")
    found = {i: text for row in packed for i, text in zip(row["sequence_indices"], row["text"], strict=True)}
    assert [found[i] for i in range(50)] == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "txt"], "no column 'txt' among text, reply, label; did you mean 'text'?"),
        (["--text-column", "label"], "column 'label' holds int64; texts to tokenize are strings"),
        (["--text-column", "text", "--text-pair-column", "replies"], "no column 'replies' among text, reply"),
        (
            ["--text-column", "text", "--text-pair-column", "reply", "--overlong", "truncate"],
            "only the second text of a pair",
        ),
        (["--keep-text"], "columns 'text' and 'reply' hold texts; name the one that is meant: --text-column text"),
        (["--text-column", "text", "--tokenizer", "./nowhere"], "there is no folder './nowhere' with a tokenizer"),
    ],
)
def test_texts_that_cannot_be_tokenized(texts, capsys, options, message):
    folder, _ = texts
    arguments = [folder / "saved", "--plan-only", "--tokenizer", folder / "tokenizer", *options]
    assert message in refused(arguments, capsys)


def test_texts_without_a_value_and_tokens_that_are_there_already(texts, capsys):
    folder, _ = texts
    write_lines(folder / "a.jsonl", [{"text": "w1"}, {"text": None}])
    write_lines(folder / "b.jsonl", [{"text": "w1", "input_ids": [1]}])
    options = ["--plan-only", "--text-column", "text", "--tokenizer", folder / "tokenizer"]
    assert "column 'text' in row 1 has no text (null)" in refused([folder / "a.jsonl", *options], capsys)
    assert "column 'input_ids' is there already" in refused([folder / "b.jsonl", *options], capsys)
    assert "--text-column needs --tokenizer" in refused([folder / "a.jsonl", *options[:3]], capsys)


def test_tokenizers_that_will_not_do(texts, tokenizer, capsys, monkeypatch):
    from transformers import CanineTokenizer, PreTrainedTokenizerFast

    folder, _ = texts
    CanineTokenizer().save_pretrained(folder / "slow")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(folder / "padless")
    (folder / "none").mkdir()
    for name, message in {
        "slow": "(CanineTokenizer) has no fast version",
        "padless": "has no pad token",
        "none": f"no tokenizer in {str(folder / 'none')!r}: ",
    }.items():
        options = ["--plan-only", "--text-column", "text", "--tokenizer", folder / name]
        assert message in refused([folder / "saved", *options], capsys)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'dataset-packing[train]'" in refused([folder / "saved", *options], capsys)


# Small things


def test_said_before_any_work(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr("packing.source.open.open_splits", None)
    assert "is a folder; give the name of a file" in refused([path, "--report", tmp_path / "folder.html"], capsys)


def test_balance_says_how_many_packs_there_are(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    write_lines(path, ROWS)
    error = refused([path, "--plan-only", "--balance", "9"], capsys)
    assert "more than the 1 packs" in error and "give at most 1 as balance" in error


def test_a_flat_histogram_is_not_taken_for_lengths(tmp_path, capsys):
    np.save(tmp_path / "flat.npy", np.array([0, 3, 1]))
    assert "a histogram that is indexed by length goes into an .npz" in refused(
        [tmp_path / "flat.npy", "--plan-only"], capsys
    )


def test_a_mistyped_source_or_column_is_refused_before_a_tokenizer_is_loaded(texts, capsys, monkeypatch):
    """transformers takes many seconds to import."""
    folder, _ = texts

    def load(name):
        raise AssertionError("the tokenizer was loaded")

    monkeypatch.setattr("packing.text.tokenizer.open_tokenizer", load)
    options = ["--plan-only", "--tokenizer", folder / "tokenizer", "--text-column"]
    for source in ("txts.jsonl", "nowhere/texts.jsonl", "*.parquet", ""):
        given = folder / source if source else ""
        for name in ("text", "txt"):
            assert "SOURCE" in refused([given, *options, name], capsys)
    assert "there is no SOURCE 'data/revews.jsonl'" in refused(["data/revews.jsonl", *options, "text"], capsys)
    assert "no column 'txt' among text" in refused([folder / "texts.jsonl", *options, "txt"], capsys)
    with pytest.raises(AssertionError, match="was loaded"):
        cli.main([*map(str, [folder / "texts.jsonl", *options, "text"])])


def test_the_first_text_that_is_too_long_ends_the_work(tmp_path, tokenizer, capsys, monkeypatch):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"text": "w1 w2"}] * 3_000
    rows[1_200] = {"text": "w1 " * 20}
    write_lines(tmp_path / "texts.jsonl", rows)
    seen = []
    tokens = source_text.TokenizeRows._tokens

    def count(work, texts, first_row):
        seen.extend(range(first_row, first_row + len(texts[0])))
        return tokens(work, texts, first_row)

    monkeypatch.setattr(source_text, "BATCH_BYTES", 5_000)  # of five a row
    monkeypatch.setattr(source_text.TokenizeRows, "_tokens", count)
    options = ["--plan-only", "--tokenizer", tmp_path / "tokenizer", "--text-column", "text"]
    error = refused([tmp_path / "texts.jsonl", *options, "--max-sequence-length", "16"], capsys)
    assert error == (
        "pack-dataset: row 1200 has 22 tokens, more than --max-sequence-length 16; choose --overlong truncate, "
        "--overlong split or --overlong drop, or raise --max-sequence-length\n"
    )
    assert 1_200 < len(seen) <= 2_000 and seen == list(range(len(seen)))  # the batch with that text is the last one
    assert cli.main([str(tmp_path / "texts.jsonl"), *map(str, options), "--overlong", "drop"]) == 0


def test_errors_speak_the_words_of_the_command_and_leave_those_of_the_user(tmp_path, capsys):
    write_lines(tmp_path / "rows.jsonl", [{"text": "a", "max_sequence_length": 3}])
    error = refused([tmp_path / "rows.jsonl", tmp_path / "packed"], capsys)
    assert "among text, max_sequence_length; tokenize" in error and "--text-column NAME --tokenizer FOLDER" in error
    assert "'seed=1.txt'" in refused(["seed=1.txt", tmp_path / "packed"], capsys)
    with pytest.raises(ValueError, match=r"among text, max_sequence_length; tokenize before packing\Z"):
        pack_dataset(datasets.Dataset.from_list([{"text": "a", "max_sequence_length": 3}]))


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("other", "joined"),
    [
        ({"a": "x", "b": 8}, True),
        ({"a": ["x"], "b": 8}, True),
        ({"a": "x", "b": "y"}, False),  # the numbers of the first file would become texts
        ({"a": "x", "b": 0.5}, False),
        ({"a": "x", "null_b": 8}, False),
    ],
)
def test_a_field_without_values_makes_no_other_field_of_any_type(tmp_path, monkeypatch, ending, other, joined):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    values = [{"a": None, "b": 7}, other]
    for number, value in enumerate(values):
        table = pa.table({"input_ids": [[1, 2]], "value": [value]})
        path = tmp_path / f"{number}.{ending}"
        if ending == "parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    source = str(tmp_path / f"*.{ending}")
    if joined:
        assert open_splits(source)[""][:]["value"] == values
    else:
        with pytest.raises(ValueError, match=r"column 'value' is .*0\..* but .*1\..*make them alike"):
            open_splits(source)
