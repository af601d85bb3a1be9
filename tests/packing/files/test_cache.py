"""The cache is used only as it was written; verify does not use it at all."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from packing import cli
from packing.files.cache import _measured, kept_rows
from packing.source.open import open_splits

datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "pack-dataset"


ROWS = [{"text": f"w{i % 40} w{i % 7}", "label": i} for i in range(2_500)]


def texts(folder, tokenizer):
    """The arguments of a source of texts; its tokens are the last thing that the cache keeps."""
    tokenizer.save_pretrained(folder / "tokenizer")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "texts")
    return [str(folder / "texts"), "--text-column", "text", "--tokenizer", str(folder / "tokenizer")]


def rows(kind):
    def write(folder, tokenizer):
        table = pa.table({"input_ids": [[5, 6 + i % 9] for i in range(2_500)], "label": list(range(2_500))})
        path = folder / f"rows.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        elif kind == "arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        elif kind == "json":
            path.write_text(json.dumps(table.to_pylist()))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        return [str(path)]

    return write


SOURCES = {"texts": texts} | {kind: rows(kind) for kind in ("parquet", "arrow", "json", "jsonl")}


def halve(path):
    """The first batch alone, as a whole stream: nobody sees that rows are missing."""
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table.slice(0, 1_000))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut at a batch's end": halve,
    "cut within a batch": cut,
    "one bit": flip,
    "a file is gone": lambda path: path.unlink(),
    "no seal": lambda path: (path.parent / "seal.json").unlink(),
    "half a seal": lambda path: cut(path.parent / "seal.json"),
}


def labels(folder):
    return sorted(label for row in datasets.load_from_disk(str(folder)) for label in row["label"])


@pytest.mark.parametrize(
    ("source", "damage"),
    [*(("jsonl", each) for each in DAMAGES), *((each, "cut at a batch's end") for each in SOURCES)],
)
def test_what_was_damaged_is_made_anew(tmp_path, tokenizer, cache, caplog, source, damage):
    arguments = SOURCES[source](tmp_path, tokenizer)
    assert cli.main([arguments[0], str(tmp_path / "first"), *arguments[1:]]) == 0
    (kept,) = cache.rglob("*.arrow")
    assert not caplog.records and labels(tmp_path / "first") == list(range(2_500))
    DAMAGES[damage](kept)
    with caplog.at_level(logging.WARNING, "packing.files.cache"):
        assert cli.main([arguments[0], str(tmp_path / "second"), *arguments[1:]]) == 0
    assert "damaged" in caplog.text and str(kept.parent) in caplog.text
    assert labels(tmp_path / "second") == list(range(2_500))
    assert [path.name for path in cache.iterdir()] == [kept.parent.name]


@pytest.mark.parametrize("source", SOURCES)
def test_verify_reads_the_source_and_not_what_packing_kept(tmp_path, tokenizer, cache, capsys, source):
    arguments = SOURCES[source](tmp_path, tokenizer)
    assert cli.main([*arguments, "--plan-only"]) == 0
    (kept,) = cache.rglob("*.arrow")
    halve(kept)  # with a matching seal, so that packing cannot know
    (kept.parent / "seal.json").write_text(json.dumps({kept.name: _measured(kept)}))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert cli.main([arguments[0], str(tmp_path / "packed"), *arguments[1:]]) == 0
    assert labels(tmp_path / "packed") == list(range(1_000))
    assert cli.main(["verify", str(tmp_path / "packed")]) == 0  # the packs alone look whole
    assert cli.main(["verify", str(tmp_path / "packed"), "--source", *arguments]) == 1
    assert "2,500" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_work_that_failed_leaves_nothing(cache):
    def fail(folder):
        (folder / "rows.arrow").write_bytes(b"half")
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        kept_rows("key", fail)
    assert not list(cache.iterdir())


def test_another_process_that_made_the_same_is_no_error(cache):
    def write(folder):
        with pa.ipc.new_stream(folder / "rows.arrow", (table := pa.table({"a": [1, 2]})).schema) as writer:
            writer.write_table(table)

    def write_second(folder):
        write(folder)
        kept_rows("key", write)

    assert kept_rows("key", write_second)["a"][:] == [1, 2]
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_other_texts_and_another_tokenizer_are_other_tokens(tmp_path, cache):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [1]}\n')
    assert open_splits(str(tmp_path / "rows.jsonl"))[""]["input_ids"][:] == [[1]]
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [2]}\n')
    assert open_splits(str(tmp_path / "rows.jsonl"))[""]["input_ids"][:] == [[2]]


@pytest.mark.parametrize("what", ["a file", "a link", "a link to nothing"])
def test_what_is_no_folder_of_the_cache_is_made_anew(cache, tmp_path, tokenizer, caplog, what):
    (source,) = rows("jsonl")(tmp_path, tokenizer)
    expected = open_splits(source)[""].to_list()
    (kept,) = cache.iterdir()
    kept.rename(tmp_path / "elsewhere")
    if what == "a file":
        kept.write_text("no folder")
    else:
        kept.symlink_to(tmp_path / ("cache" if what == "a link" else "nowhere"))
    assert open_splits(source)[""].to_list() == expected
    assert "which is made again" in caplog.text and not kept.is_symlink()
