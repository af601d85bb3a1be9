"""Where text lies: files and `datasets` folders, in blocks that can be read each on its own, in any order.

a.txt   First one.          TextBlock(a.txt, 0, 24)     a blank line ends a block, so that no document is torn
        Second one.
        (blank line)
        Third one.          TextBlock(a.txt, 24, 35)
rows/   1500 rows           TextBlock(rows, 0, 1000), TextBlock(rows, 1000, 1500)
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bert_pretrain.prepare.not_text import refuse_other_formats

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
"""A block ends at the first blank line behind so many bytes; or line, where each is a document."""

WINDOW_BYTES = 1 << 16
"""What is read at once to look for line ends."""


class TextBlock(NamedTuple):
    """A part of one source that no document crosses."""

    source: Path
    start: int
    end: int
    """Bytes of a file, or rows of a `datasets` folder."""
    bytes: int
    """About how much text it is."""
    newline: bytes = b"\n"
    """What ends a line of a file; a return before it is white space."""


def find_sources(text: str | Path | Iterable[str | Path]) -> list[Path]:
    """The `.txt` files and `datasets` folders that `text` names, folders searched recursively, each in sorted order."""
    paths = [Path(text)] if isinstance(text, str | Path) else [Path(path) for path in text]
    if not paths:
        raise ValueError("no text was named; give .txt files, folders of them, or a folder written by save_to_disk")
    return [source for path in paths for source in _sources_under(path)]


def _sources_under(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"no text at {path}: there is no such file or folder")
    if (path / "dataset_dict.json").exists():
        splits = sorted(split.parent.name for split in path.glob("*/state.json"))
        raise ValueError(f"{path} holds several splits; name the one that is meant, out of {splits}: {path}/SPLIT")
    if _is_dataset(path):
        return [path]
    files = [path] if path.is_file() else _text_files(path)
    for file in files:
        refuse_other_formats(file)
    return files


def _text_files(folder: Path) -> list[Path]:
    """The .txt files under a folder; a log line names what is left out."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    others = [file for file in files if not _is_hidden(file.relative_to(folder)) and file.suffix.lower() != ".txt"]
    kinds = Counter(file.suffix or file.name for file in others)
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) + (", …" if len(kinds) > 5 else "")
    if not texts:
        there = f"; there are {said}" if others else ""
        cure = "name files one by one if they hold text and end otherwise"
        raise FileNotFoundError(f"no .txt file in {folder} or its subfolders{there}; {cure}")
    if others:
        logger.warning("%s: only .txt files are read; left out are %s", folder, said)
    return texts


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").exists() and (path / "dataset_info.json").exists()


def find_blocks(sources: Iterable[Path], whole_files: bool, lines: bool = False) -> Iterator[TextBlock]:
    """All of the text, in order. whole_files: a file is one block. lines: any line may be a document."""
    for source in sources:
        yield from _row_blocks(source) if source.is_dir() else _file_blocks(source, whole_files, lines)


def _row_blocks(folder: Path) -> Iterator[TextBlock]:
    texts = _rows(folder)
    num_bytes = texts.data.nbytes
    step = max(1, BLOCK_BYTES * len(texts) // max(1, num_bytes))
    for start in range(0, len(texts), step):
        end = min(start + step, len(texts))
        yield TextBlock(folder, start, end, num_bytes * (end - start) // len(texts))


def _file_blocks(file: Path, whole: bool, lines: bool) -> Iterator[TextBlock]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(WINDOW_BYTES)
        head += stream.read(1) if head.endswith(b"\r") else b""  # which may be half of a line end
        newline = b"\r" if b"\r" in head and b"\n" not in head else b"\n"  # lines of old Macs end in a return alone
        start = 0
        while start < size:
            end = size if whole else _behind_end(stream, start + BLOCK_BYTES, size, newline, lines)
            yield TextBlock(file, start, end, end - start, newline)
            start = end


def _behind_end(stream: BinaryIO, position: int, size: int, newline: bytes, lines: bool) -> int:
    """Where the first line begins that follows `position` and a blank line, or any; or the size of the file."""
    if position >= size:
        return size
    end = re.compile(newline if lines else newline + rb"[ \t\r]*" + newline)
    stream.seek(position)
    held = b""
    while window := stream.read(WINDOW_BYTES):
        held += window
        if found := end.search(held):
            return position + found.end()
        # A blank line may have begun: keep the last line end, if there is only white space behind it.
        last = held.rfind(newline)
        kept = held[last:] if last >= 0 and not held[last:].strip() else b""
        position += len(held) - len(kept)
        held = kept
    return size


def read_block(block: TextBlock) -> Iterator[Iterable[str]]:
    """The lines of each file or row of a block, with each run of white space made one space; "" is a blank line.

    Raises ValueError for a file that is not UTF-8.
    """
    if block.source.is_dir():
        for row in _rows(block.source).select(range(block.start, block.end)):
            yield (" ".join(line.split()) for line in (row["text"] or "").splitlines())
    else:
        lines = _decoded(block).split(block.newline.decode())
        yield (" ".join(line.split()) for line in lines)


def _rows(folder: Path):
    """The text of a `datasets` folder."""
    from packing.files.saved import load_saved

    dataset = load_saved(folder)
    if "text" not in dataset.column_names:
        raise ValueError(
            f"{folder} has no column 'text' but {dataset.column_names}; rename_column() the one that is text"
        )
    return dataset.select_columns("text")


def _decoded(block: TextBlock) -> str:
    with block.source.open("rb") as stream:
        stream.seek(block.start)
        data = stream.read(block.end - block.start)
    if (nul := data.find(b"\0")) >= 0:
        raise _not_utf8(block, nul, data)
    try:
        # Only a file may begin with a byte-order mark.
        return data.decode("utf-8-sig" if block.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # error.start counts from error.object, which lacks the byte-order mark.
        raise _not_utf8(block, len(data) - len(error.object) + error.start, data) from None


def _not_utf8(block: TextBlock, at: int, data: bytes) -> ValueError:
    """Names the file, the byte and its line, and what the file is likely to be."""
    with block.source.open("rb") as stream:
        line = stream.read(block.start + at).count(block.newline) + 1
        stream.seek(0)
        cure = _likely_cure(stream.read(WINDOW_BYTES), data)
    return ValueError(
        f"{block.source} is not UTF-8 text: byte {block.start + at} (line {line}) is 0x{data[at]:02x}; {cure}"
    )


def _likely_cure(head: bytes, data: bytes) -> str:
    """UTF-16 shows by its mark, or by zeros: a character of most alphabets has one, always first or always second."""
    marks = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
    for mark, encoding in marks.items():
        if head.startswith(mark):
            return f"it is {encoding}: convert it with iconv -f {encoding} -t UTF-8"
    zeros = [head[start::4].count(0) / max(1, len(head) / 4) for start in range(4)]
    if min(zeros[0], zeros[1]) > 0.5:
        return "it looks like UTF-32: convert it with iconv -f UTF-32BE -t UTF-8"
    if min(zeros[2], zeros[3]) > 0.5:
        return "it looks like UTF-32: convert it with iconv -f UTF-32LE -t UTF-8"
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if max(even, odd) > 0.02 and max(even, odd) > 10 * min(even, odd):
        order = "BE" if even > odd else "LE"
        return f"it looks like UTF-16: convert it with iconv -f UTF-16{order} -t UTF-8"
    if b"\0" in data:
        return "text has no zero bytes: leave the file out if it is no text, or remove them with tr -d '\\000'"
    return "convert it, say with iconv -f LATIN1 -t UTF-8"
