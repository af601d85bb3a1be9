"""Files and rows -> blocks -> lines: nothing torn, nothing misread."""

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_pretrain.documents import read_documents
from bert_pretrain.sources import find_blocks

NO_BOM = {"utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32-le": "UTF-32LE", "utf-32-be": "UTF-32BE"}
ENGLISH = "First one. Second one.\n\nThird one.\n"
CHINESE = "今天天气很好。我们去公园玩！\n他说：「好」。\n\n再见。\n"


def documents_of(path, **options):
    return list(read_documents(path, **options))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
@pytest.mark.parametrize("encoding", [*NO_BOM, "utf-16", "utf-32"])
def test_other_unicode_is_refused_with_the_right_cure(tmp_path, encoding, text):
    (tmp_path / "notes.txt").write_bytes(text.encode(encoding))
    name = NO_BOM.get(encoding, encoding.upper())
    with pytest.raises(ValueError, match=rf"notes.txt is not UTF-8 text: byte \d+ .* iconv -f {name} -t UTF-8"):
        documents_of(tmp_path)


def test_a_stray_zero_byte_is_told_from_utf_16(tmp_path):
    (tmp_path / "stray.txt").write_bytes(b"First one.\n" * 50 + b"Sec\0nd one.\n" + b"Third.\n" * 50)
    with pytest.raises(ValueError, match=r"stray.txt is not UTF-8 text: byte 553 \(line 51\) is 0x00; .*tr -d"):
        documents_of(tmp_path)


def test_lines_of_old_macs(tmp_path):
    for newline in ("\n", "\r\n", "\r"):
        (tmp_path / "mac.txt").write_bytes(ENGLISH.replace("\n", newline).encode())
        assert documents_of(tmp_path) == [["First one.", "Second one."], ["Third one."]]
        assert documents_of(tmp_path, documents="file") == [["First one.", "Second one.", "Third one."]]
    # Among other line ends, a return is white space: not each line of these is a paragraph.
    (tmp_path / "mac.txt").write_bytes(b"First one.\r\r\nSecond one.\r\r\n\r\r\nThird\rone.\r\r\n")
    assert documents_of(tmp_path) == [["First one.", "Second one."], ["Third one."]]


def test_the_byte_and_line_are_those_of_the_file(tmp_path, monkeypatch):
    """Also where the file was read in blocks."""
    monkeypatch.setattr("bert_pretrain.sources.BLOCK_BYTES", 10)
    (tmp_path / "late.txt").write_bytes(b"one two three\n\n" * 20 + b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"late.txt is not UTF-8 text: byte 303 \(line 41\) is 0xe9; .*LATIN1"):
        documents_of(tmp_path)


pieces = st.lists(st.sampled_from(["a.", "Bc d.", "é", " ", "\t", "\n", "\n", "\r", "\u3000"]), max_size=60)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@given(pieces, st.integers(1, 30), st.integers(1, 30))
def test_blocks_tear_no_document(tmp_path_factory, newline, pieces, block_bytes, window_bytes):
    text = "".join(pieces).replace("\r", " ").replace("\n", newline)
    file = tmp_path_factory.getbasetemp() / "torn.txt"
    file.write_bytes(("x" + text).encode())
    whole = documents_of(file)
    lines = ("x" + text).replace(newline, "\n").split("\n")
    assert "".join("".join(document) for document in whole).replace(" ", "") == "".join("".join(lines).split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bert_pretrain.sources.BLOCK_BYTES", block_bytes)
        blocks = list(find_blocks([file], whole_files=False))
        assert documents_of(file) == whole
        if newline != "\r":  # which is found out from the first window
            patch.setattr("bert_pretrain.sources.WINDOW_BYTES", window_bytes)
            assert list(find_blocks([file], whole_files=False)) == blocks
    ends = [0, *(block.end for block in blocks)]
    assert [block.start for block in blocks] == ends[:-1] and ends[-1] == len(("x" + text).encode())
    assert all(block.end - block.start >= min(block_bytes, ends[-1] - block.start) for block in blocks)


def test_rows_come_in_blocks_too(tmp_path, monkeypatch):
    rows = [f"Row {n}. It is short." for n in range(40)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "rows")
    monkeypatch.setattr("bert_pretrain.sources.BLOCK_BYTES", 100)
    blocks = list(find_blocks([tmp_path / "rows"], whole_files=False))
    assert len(blocks) > 5 and blocks[-1].end == 40
    assert documents_of(tmp_path / "rows") == [[f"Row {n}.", "It is short."] for n in range(40)]
