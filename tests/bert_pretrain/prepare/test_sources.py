"""Files and rows -> blocks -> lines: nothing cut, nothing misread."""

import bz2
import gzip
import json
import lzma
import re

import datasets
import pytest
from documents import read_documents, sources_of
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bert_pretrain.cli import main as bert_pretrain
from packing.source.text_files import find_blocks

NO_BOM = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32-le": "UTF-32LE", "utf-32-be": "UTF-32BE"}
ENGLISH = "First one. Second one.\n\nThird one.\n"
CHINESE = "今天天气很好。我们去公园玩！\n他说：「好」。\n\n再见。\n"


def documents_of(path, **options):
    return list(read_documents(path, **options))


def blocks_of(path, documents="paragraph"):
    return list(find_blocks(sources_of(path)[""], documents))


def files_of(path):
    """The text files of a source, as paths from it on."""
    return [str(file) for file in sources_of(path)[""]]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
@pytest.mark.parametrize("encoding", [*NO_BOM, "utf-16", "utf-32"])
def test_other_unicode_is_refused_with_the_right_cure(tmp_path, encoding, text):
    (tmp_path / "notes.txt").write_bytes(text.encode(encoding))
    name = NO_BOM.get(encoding, encoding.upper())
    with pytest.raises(ValueError, match=rf"notes.txt' is not UTF-8 text: byte \d+ .* iconv -f {name} -t UTF-8"):
        documents_of(tmp_path)


def test_a_stray_zero_byte_is_told_from_utf_16(tmp_path):
    (tmp_path / "stray.txt").write_bytes(b"First one.\n" * 50 + b"Sec\0nd one.\n" + b"Third.\n" * 50)
    with pytest.raises(ValueError, match=r"stray.txt' is not UTF-8 text: byte 553 \(line 51\) is 0x00; .*tr -d"):
        documents_of(tmp_path)


def test_lines_of_old_macs(tmp_path):
    for newline in ("\n", "\r\n", "\r"):
        (tmp_path / "mac.txt").write_bytes(ENGLISH.replace("\n", newline).encode())
        assert documents_of(tmp_path) == [["First one.", "Second one."], ["Third one."]]
        assert documents_of(tmp_path, documents="file") == [["First one.", "Second one.", "Third one."]]
    # Beside other line ends a carriage return is white space, so these lines are not paragraphs.
    (tmp_path / "mac.txt").write_bytes(b"First one.\r\r\nSecond one.\r\r\n\r\r\nThird\rone.\r\r\n")
    assert documents_of(tmp_path) == [["First one.", "Second one."], ["Third one."]]


def test_the_byte_and_line_are_those_of_the_file(tmp_path, monkeypatch):
    """Also where a file is read in blocks."""
    monkeypatch.setattr("packing.source.text_files.BLOCK_BYTES", 10)
    (tmp_path / "late.txt").write_bytes(b"one two three\n\n" * 20 + b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"late.txt' is not UTF-8 text: byte 303 \(line 41\) is 0xe9; .*LATIN1"):
        documents_of(tmp_path)


pieces = st.lists(st.sampled_from(["a.", "Bc d.", "é", " ", "\t", "\n", "\n", "\r", "\u3000"]), max_size=60)


@pytest.mark.parametrize("kind", ["paragraph", "line"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@given(pieces, st.integers(1, 30), st.integers(1, 30))
def test_blocks_tear_no_document(tmp_path_factory, kind, newline, pieces, block_bytes, window_bytes):
    text = "".join(pieces).replace("\r", " ").replace("\n", newline)
    file = tmp_path_factory.getbasetemp() / "torn.txt"
    file.write_bytes(("x" + text).encode())
    whole = documents_of(file, documents=kind)
    lines = ("x" + text).replace(newline, "\n").split("\n")
    assert "".join("".join(document) for document in whole).replace(" ", "") == "".join("".join(lines).split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("packing.source.text_files.BLOCK_BYTES", block_bytes)
        blocks = blocks_of(file, kind)
        assert documents_of(file, documents=kind) == whole
        if newline != "\r":  # which is found out from the first window
            patch.setattr("packing.source.text_files.WINDOW_BYTES", window_bytes)
            assert [block[1:] for block in blocks_of(file, kind)] == [block[1:] for block in blocks]
    ends = [0, *(block.end for block in blocks)]
    assert [block.start for block in blocks] == ends[:-1] and ends[-1] == len(("x" + text).encode())
    assert all(block.end - block.start >= min(block_bytes, ends[-1] - block.start) for block in blocks)


def test_rows_come_in_blocks_too(tmp_path, monkeypatch):
    rows = [f"Row {n}. It is short." for n in range(40)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "rows")
    monkeypatch.setattr("packing.source.text_files.BLOCK_BYTES", 100)
    blocks = blocks_of(tmp_path / "rows")
    assert len(blocks) > 5 and blocks[-1].end == 40
    assert documents_of(tmp_path / "rows") == [[f"Row {n}.", "It is short."] for n in range(40)]


ROW = '{"text": "One is here. Two is there.", "label": 1}'
OTHER_FORMATS = {
    "corpus.txt.zst": (b"\x28\xb5\x2f\xfd", r"compressed data \(zstd\)"),
    "corpus.zip": (b"PK\x03\x04", r"compressed data \(zip\).*unzip"),
    "page.html": ("<p>One.</p>", "HTML.*take the text out of it"),
    "paper.pdf": (b"%PDF-1.7", "PDF"),
    # recognized by their first bytes, whatever the name
    "a.txt": (f"{ROW}\n{ROW}\n", r"rows \(JSON lines\).*rename it to end in \.jsonl.*start with a line of words"),
    "b.txt": (f"\ufeff\n[\n  {ROW},\n  {ROW}\n]", r"rows \(JSON\)"),
    "c.txt": (f"{ROW[:-1]}".ljust(100_000, "x"), r"rows \(JSON\)"),
    "d.txt": (b"\x1f\x8b\x08\0", r"compressed data \(gzip\)"),
    "e.txt": ("\n<!DOCTYPE html>\n<html>", "HTML"),
    "f.txt": ("<?xml version='1.0'?><doc/>", "XML"),
    "g.txt": (bz2.compress(b"One."), r"compressed data \(bzip2\)"),
    "h.txt": ("[101, 7592, 102]\n[101, 102]\n", r"rows \(JSON lines\)"),
    "without_a_suffix": (lzma.compress(b"One."), r"compressed data \(xz\)"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_what_is_no_text_is_refused_by_name_or_content(tmp_path, name):
    content, message = OTHER_FORMATS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{re.escape(name)}' holds {message}"):
        sources_of(tmp_path / name)
    if name.endswith(".txt"):
        with pytest.raises(ValueError, match=f"{name}' holds "):
            sources_of(tmp_path)


TEXTS = [
    '"Hello."',
    "[1] A footnote.",
    "[1]",
    "{sic}",
    "<b>bold</b> words",
    '{"quoted"} braces',
    "[Illustration]",
    "BZhang",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["a.txt", "README", "notes.md", "B.TXT"])
def test_text_that_looks_a_little_like_another_format_is_text(tmp_path, name, text):
    (tmp_path / name).write_text(f"{text}\nMore of it.\n")
    assert files_of(tmp_path / name) == [str(tmp_path / name)]


def test_files_of_a_folder_that_are_left_out_are_said(tmp_path, caplog):
    for name in ("a.txt", "B.TXT", "b.jsonl", "c.jsonl", "sub/LICENSE", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("One.")
    assert files_of(tmp_path) == [str(tmp_path / "B.TXT"), str(tmp_path / "a.txt")]
    assert f"{tmp_path}: only .txt files are read; left out are 2 .jsonl, 1 LICENSE" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"holds no file .*; there are 1 LICENSE; name files one by one"):
        sources_of(tmp_path / "sub")


TABLE = {"text": ["One is here.\nTwo is there.", 'Three, and "four".\n\nFive.'], "label": [1, 0]}
ROWS = {
    "rows.jsonl": lambda file: datasets.Dataset.from_dict(TABLE).to_json(file),
    "rows.json": lambda file: datasets.Dataset.from_dict(TABLE).to_json(file, lines=False),
    "rows.jsonl.gz": lambda file: datasets.Dataset.from_dict(TABLE).to_json(file, compression="gzip"),
    "rows.csv": lambda file: datasets.Dataset.from_dict(TABLE).to_csv(file),
    "rows.tsv": lambda file: datasets.Dataset.from_dict(TABLE).to_csv(file, sep="\t"),
    "rows.parquet": lambda file: datasets.Dataset.from_dict(TABLE).to_parquet(file),
    "rows": lambda file: datasets.Dataset.from_dict(TABLE).save_to_disk(file),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_format_are_documents_of_their_column(tmp_path, name):
    """Only the texts, and never the raw file: no brace, no label."""
    ROWS[name](str(tmp_path / name))
    assert documents_of(tmp_path / name) == [["One is here.", "Two is there."], ['Three, and "four".'], ["Five."]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_rows_are_read_from_a_folder_and_a_glob_too(tmp_path, name):
    folder = tmp_path / "corpus"
    folder.mkdir()
    ROWS[name](str(folder / name))
    whole = documents_of(folder / name)
    assert documents_of(folder) == documents_of(str(folder / f"*{name[-4:]}")) == whole


def test_compressed_text_is_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(ENGLISH.encode()))
    assert documents_of(tmp_path / "a.txt.gz") == [["First one.", "Second one."], ["Third one."]]


def test_the_only_column_of_strings_is_taken_and_said(tmp_path, caplog):
    (tmp_path / "reviews.jsonl").write_text('{"review": "One is here.", "stars": 5}\n')
    assert documents_of(tmp_path / "reviews.jsonl") == [["One is here."]]
    assert "'review'" in caplog.text


def test_of_two_columns_of_strings_one_must_be_named(tmp_path, capsys):
    (tmp_path / "pairs.csv").write_text("first,second\nOne is here.,Two is there.\n")
    with pytest.raises(ValueError, match=r"'first' and 'second' hold texts; .*text_column='first'"):
        documents_of(tmp_path / "pairs.csv")
    assert bert_pretrain(["prepare", "--text", str(tmp_path / "pairs.csv"), "--output", str(tmp_path / "out")]) == 2
    assert "--text-column first" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"pairs.csv': no column 'secnd' .*did you mean 'second'\?"):
        documents_of(tmp_path / "pairs.csv", text_column="secnd")
    assert documents_of(tmp_path / "pairs.csv", text_column="second") == [["Two is there."]]


def test_chinese_rows_and_texts_are_the_same_sentences(tmp_path):
    """A table with Chinese names of columns, and a file with blank lines between documents."""
    texts = ["今天天气很好。我们去公园玩！", "他说：「好」。再见。"]
    (tmp_path / "rows.csv").write_text("编号,正文\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts)))
    (tmp_path / "text.txt").write_text("\n\n \n".join(texts) + "\n\n")
    expected = [["今天天气很好。", "我们去公园玩！"], ["他说：「好」。", "再见。"]]
    assert documents_of(tmp_path / "rows.csv", text_column="正文") == expected
    assert documents_of(tmp_path / "text.txt") == expected


def test_prepare_trains_on_the_text_of_json_lines(tmp_path):
    rows = [{"text": f"Row {n} is here. It is short.", "label": "never"} for n in range(60)]
    (tmp_path / "corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "corpus.txt").write_text("\n\n".join(row["text"] for row in rows))
    made = {}
    for name in ("corpus.jsonl", "corpus.txt"):
        command = ["prepare", "--text", str(tmp_path / name), "--output", str(tmp_path / f"{name}.prepared")]
        assert bert_pretrain([*command, "--max_sequence_length", "16", "--vocab_size", "200"]) == 0
        made[name] = datasets.load_from_disk(tmp_path / f"{name}.prepared")["train"].to_dict()
    assert made["corpus.jsonl"] == made["corpus.txt"]


def test_splits_of_a_source_stay_splits(tmp_path):
    rows = [f"Row {n} is here. It is short." for n in range(40)]
    parts = {"train": rows[:30], "validation": rows[30:]}
    made = {name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "rows")
    command = ["prepare", "--text", str(tmp_path / "rows"), "--output", str(tmp_path / "prepared")]
    assert bert_pretrain([*command, "--max_sequence_length", "16", "--vocab_size", "200", "--objective", "none"]) == 0
    prepared = datasets.load_from_disk(tmp_path / "prepared")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "prepared" / "tokenizer")
    for name in parts:
        text = [tokenizer.decode(row) for row in prepared[name]["input_ids"]]
        numbers = {int(number) for line in text for number in re.findall(r"row (\d+)", line)}
        assert numbers and numbers <= {n for n in range(40) if rows[n] in parts[name]}


def test_a_row_without_a_text_is_refused(tmp_path):
    """As by pack-dataset: nobody misses a text that is left out without a word."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"texts\.jsonl' column 'text' in row 1 has no text \(null\); fill it in or leave"
    ):
        list(read_documents(path))
