"""A SOURCE that a user mistypes, or files that look like another kind: the error says what was meant."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from packing.files.errors import SourceError, path_suggestion
from packing.source.formats import FORMATS, endings, format_of
from packing.source.lengths import holds_lengths
from packing.source.open import TextOptions, find_texts, open_sequences, open_splits


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with files and a DatasetDict, a cache of its own, and a hub that has nothing."""

    def load_dataset(*arguments):
        raise datasets.exceptions.DatasetNotFoundError("the hub has none")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("data/train.jsonl", "data/test.jsonl", "reviews.jsonl"):
        write(name, '{"text": "one"}\n')
    for split in ("train", "test"):
        (tmp_path / "saved" / split).mkdir(parents=True)
    return tmp_path


def write(name, text):
    from pathlib import Path

    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("revews.jsonl", "reviews.jsonl"),  # a file
        ("reviews.json", "reviews.jsonl"),  # its ending
        ("dta", "data"),  # a folder
        ("dta/train.jsonl", "data/train.jsonl"),  # a folder on the way
        ("saved/trian", "saved/train"),  # a split
        ("savd/train", "saved/train"),  # what could be a name of the hub
        ("dta/*.jsonl", "data"),  # the folder of a glob
    ],
)
def test_a_near_name_is_named(mistyped, meant):
    with pytest.raises(
        (FileNotFoundError, ValueError), match=f"{mistyped.replace('*', '.')}'.*; did you mean '{meant}'"
    ):
        open_splits(mistyped)


@pytest.mark.parametrize("name", ["nothing-like-it.jsonl", "someone/some-data", "data/*.csv"])
def test_where_nothing_is_near_nothing_is_named(name):
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        open_splits(name)
    assert "did you mean" not in str(error.value)
    assert path_suggestion(name.replace("*", "x")) == ""


@pytest.mark.parametrize("parted", [";", "\t", "|"])
def test_values_that_another_character_parts_are_refused(parted):
    """Read as one column, the label would be part of the text."""
    source = write("rows.csv", f"text{parted}label\none, two{parted}1\n")
    with pytest.raises(
        ValueError, match=r"'rows.csv' names one column, 'text.{1,2}label': .* seems to part its values"
    ):
        open_splits(source)
    assert open_splits(write("one.csv", "text\none\n"))[""].to_list() == [{"text": "one"}]


def test_several_kinds_of_files_come_with_a_glob_that_works():
    write("data/more.csv", "text\ntwo\n")
    with pytest.raises(ValueError, match=r"'data/more.csv' and 'data/test.jsonl'; give a glob for one: 'data/\*.csv'"):
        open_splits("data")
    assert open_splits("data/*.csv")[""].to_list() == [{"text": "two"}]


def test_a_list_of_texts_is_no_file_of_lengths():
    source = write("texts.json", json.dumps(["one", "two"]))
    assert not holds_lengths(source)
    with pytest.raises(SourceError, match=r"'texts.json' line 1 holds list; each line is an object"):
        open_splits(source)


@pytest.mark.parametrize("name", ["notes", "notes.md"])
def test_a_file_of_unknown_ending_comes_with_the_cure_for_text(name):
    source = write(name, "One.\n")
    with pytest.raises(
        ValueError, match=rf"'{name}' is no file .parquet.*; convert it, or name it .txt if it holds text"
    ):
        open_splits(source)
    assert [str(file) for file in find_texts(source)[""]] == [name]


@pytest.mark.parametrize("name", ["notes", "notes.md"])
def test_a_file_of_unknown_ending_is_text_for_both_commands(name, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = TextOptions(tokenizer=str(tmp_path / "tokenizer"))
    rows = [open_sequences(write(file, "One.\n\nTwo.\n"), texts).splits[""] for file in (name, "twin.txt")]
    assert rows[0].to_list() == rows[1].to_list() and len(rows[0]) == 2
    write(name, '{"text": "one"}\n')
    for read in (lambda: open_sequences(name, texts), lambda: find_texts(name)):
        with pytest.raises(SourceError, match=f"'{name}' holds rows .JSON lines., and no text; rename it"):
            read()


def test_rows_within_one_object_are_named():
    source = write("squad.json", json.dumps({"version": "2", "data": [{"text": "one"}, {"text": "two"}]}))
    for texts in (TextOptions(), TextOptions(tokenizer="tokenizer", text_column=None)):
        with pytest.raises(ValueError) as error:
            open_sequences(write("only.json", '{"data": [{"text": "one"}]}'), texts)
        assert "'data' is a list of 1 objects: if they are the rows, save it alone" in str(error.value)
    with pytest.raises(ValueError, match="'data' is a list of 2 objects"):
        open_sequences(source, TextOptions())


def test_texts_left_out_beside_rows_are_said():
    write("mixed/rows.jsonl", '{"input_ids": [1]}\n')
    write("mixed/corpus.txt", "One.\n")
    write("mixed/README.md", "# Read me\n")
    said = []
    opened = open_sequences("mixed", TextOptions(), say=said.append)
    assert opened.splits[""].to_list() == [{"input_ids": [1]}]
    assert said == ["mixed: only .jsonl, .ndjson, .json files are read; left out are 1 .txt"]


@pytest.mark.parametrize(
    ("name", "words"), [("a.CSV", "CSV"), ("a.csv.gz", "CSV"), ("a.parquet.gz", None), ("a", None)]
)
def test_the_format_of_a_name(name, words):
    found = format_of(name)
    assert (found and found.words) == words


def test_every_ending_is_of_one_format():
    listed = [ending for format in FORMATS for ending in format.endings]
    assert len(listed) == len({*listed}) and all(ending in endings() for ending in listed)
    assert ".parquet" not in endings(compressed=True) and ".csv" in endings(compressed=True)


def test_a_folder_of_splits_of_parquet(here):
    (here / "splits" / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(pa.table({"text": [split]}), here / "splits" / "data" / f"{split}-00000-of-00001.parquet")
    write("splits/README.md", "# A card")
    opened = open_splits("splits")
    assert {name: rows["text"][:] for name, rows in opened.items()} == {
        "train": ["train"],
        "validation": ["validation"],
    }
    assert open_splits(f"file://{here}/splits").keys() == opened.keys()
