"""Text files -> blocks -> lines -> documents. Each block can be read alone, by any process, in any order.

a.txt   First one.          TextBlock(a.txt, 0, 24)     a blank line ends a block, so that no document is torn
        Second one.
        (blank line)
        Third one.          TextBlock(a.txt, 24, 35)
rows    1500 rows           TextBlock(rows, 0, 1000), TextBlock(rows, 1000, 1500)

Lines come with each run of white space made one space. What a document is, an option says:

    "paragraph"    the lines between blank lines, as in BERT's own input format
    "line"         each line that is not blank
    "file"         each file, or each row

A file that holds something else than text is refused, by its name or by its first bytes: a model would learn from it.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from packing.files.errors import SourceError, check_known
from packing.files.names import NamedFile

if TYPE_CHECKING:
    import datasets

DOCUMENTS = ("paragraph", "line", "file")
BLOCK_BYTES = 1 << 20  # a block ends where the first document after so many bytes does
WINDOW_BYTES = 1 << 16  # read at once to look for line ends
HEAD_BYTES = 1 << 14  # enough to know a file that is no text


@dataclass(frozen=True, eq=False)
class TextRows:
    """A column of texts in a dataset whose files any process can open."""

    name: str
    dataset: datasets.Dataset
    column: str

    def __str__(self) -> str:
        return self.name


class TextBlock(NamedTuple):
    """A part of one source that no document crosses."""

    source: NamedFile | TextRows
    start: int  # bytes of a file, or rows
    end: int
    num_bytes: int  # roughly the amount of text
    newline: bytes = b"\n"  # ends a line of a file; a return before it is white space


def check_documents(documents: str) -> str:
    """Raise ValueError for an unknown option."""
    check_known("documents", documents, DOCUMENTS)
    return documents


def find_blocks(sources: Iterable[NamedFile | TextRows], documents: str = "paragraph") -> Iterator[TextBlock]:
    """All of the text, in order. With "file" a file is one block, with "line" a block may end at any line."""
    for source in sources:
        yield from _row_blocks(source) if isinstance(source, TextRows) else _file_blocks(source, documents)


def read_lines(block: TextBlock) -> Iterator[Iterable[str]]:
    """The lines of each file or row of a block, with each run of white space made one space; "" is a blank line.

    Raises SourceError for a file that is not UTF-8.
    """
    split: Iterable[list[str]]
    if isinstance(source := block.source, TextRows):
        texts = source.dataset.select_columns(source.column)[block.start : block.end][source.column]
        if None in texts:
            row = block.start + texts.index(None)
            cure = "fill it in or leave the row out"
            raise SourceError("has no text (null)", file=source, column=source.column, row=row, cure=cure)
        split = (text.splitlines() for text in texts)
    else:
        split = [_decoded(source, block).split(block.newline.decode())]
    for lines in split:
        yield (" ".join(line.split()) for line in lines)


def paragraphs(lines: Iterable[str], documents: str) -> Iterator[list[str]]:
    """["a", "b", "", "", "c"] -> ["a", "b"], ["c"]: the lines between blank ones; of "line": ["a"], ["b"], ["c"].

    Each is a document, unless "file" takes all of them together for one.
    """
    held: list[str] = []
    for line in lines:
        if line and documents == "line":
            yield [line]
        elif line:
            held.append(line)
        elif held:
            yield held
            held = []
    if held:
        yield held


def document_texts(block: TextBlock, documents: str) -> Iterator[str]:
    """The text of each document of a block, on one line."""
    for lines in read_lines(block):
        texts = (" ".join(paragraph) for paragraph in paragraphs(lines, documents))
        yield from filter(None, [" ".join(texts)]) if documents == "file" else texts


def uncompressed(file: NamedFile, cache: Path | None = None) -> NamedFile:
    """A text file that can be read from any place; for a .gz, its content in the cache, under the name of the .gz."""
    from packing.files.cache import kept_folder, key_of

    if not file.is_compressed:
        return file

    def make(folder: Path) -> None:
        with file.open() as compressed, (folder / "text").open("wb") as target:
            try:
                shutil.copyfileobj(compressed, target, 1 << 20)
            except (OSError, EOFError, zlib.error) as error:
                raise SourceError(f"cannot be uncompressed: {error}", file=file, cure="make the file again") from None

    return NamedFile(kept_folder(key_of("uncompressed", file.stamp()), make, cache) / "text", file.name)


def is_blank(file: NamedFile) -> bool:
    """Whether it holds nothing but white space."""
    with file.open() as stream:
        return not any(window.strip(b"\xef\xbb\xbf \t\r\n") for window in iter(lambda: stream.read(WINDOW_BYTES), b""))


def _row_blocks(rows: TextRows) -> Iterator[TextBlock]:
    count, num_bytes = len(rows.dataset), rows.dataset.select_columns(rows.column).data.nbytes
    step = max(1, BLOCK_BYTES * count // max(1, num_bytes))
    for start in range(0, count, step):
        end = min(start + step, count)
        yield TextBlock(rows, start, end, num_bytes * (end - start) // count)


def _file_blocks(file: NamedFile, documents: str) -> Iterator[TextBlock]:
    size = file.path.stat().st_size
    with file.path.open("rb") as stream:
        head = stream.read(WINDOW_BYTES)
        head += stream.read(1) if head.endswith(b"\r") else b""  # a line end may have been cut in half
        newline = b"\r" if b"\r" in head and b"\n" not in head else b"\n"  # lines of old Macs end in a return alone
        line_end = newline if documents == "line" else newline + rb"[ \t\r]*" + newline
        start, step = 0, size if documents == "file" else BLOCK_BYTES
        while start < size:
            end = min(size, _after_end(stream, start + step, newline, re.compile(line_end)))
            yield TextBlock(file, start, end, end - start, newline)
            start = end


def _after_end(stream: BinaryIO, position: int, newline: bytes, end: re.Pattern[bytes]) -> int:
    """The first place from `position` on that follows the end of a block; the end of the file has one."""
    stream.seek(position)
    held = b""
    while window := stream.read(WINDOW_BYTES):
        held += window
        if found := end.search(held):
            return position + found.end()
        # A blank line may have started: keep the last line end, if there is only white space behind it.
        last = held.rfind(newline)
        kept = held[last:] if last >= 0 and not held[last:].strip() else b""
        position += len(held) - len(kept)
        held = kept
    return position + len(held)


# Bytes -> characters


def _decoded(file: NamedFile, block: TextBlock) -> str:
    with file.path.open("rb") as stream:
        stream.seek(block.start)
        data = stream.read(block.end - block.start)
    if (nul := data.find(b"\0")) >= 0:
        raise _not_utf8(file, block, nul, data)
    try:
        # Only a file may start with a byte-order mark.
        return data.decode("utf-8-sig" if block.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # error.start counts from error.object, which lacks the byte-order mark.
        raise _not_utf8(file, block, len(data) - len(error.object) + error.start, data) from None


def _not_utf8(file: NamedFile, block: TextBlock, at: int, data: bytes) -> SourceError:
    """An error that names the file, the byte and its line, and what the file is likely to be."""
    with file.path.open("rb") as stream:
        line = stream.read(block.start + at).count(block.newline) + 1
        stream.seek(0)
        cure = _likely_cure(stream.read(WINDOW_BYTES), data)
    what = f"is not UTF-8 text: byte {block.start + at} (line {line}) is 0x{data[at]:02x}"
    return SourceError(what, file=file, cure=cure)


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


# Files that hold something else


class Other(NamedTuple):
    """What a file may hold instead of text, and the cure. It is known by an ending, or by how the content starts."""

    name: str
    cure: str
    endings: tuple[str, ...] = ()
    starts: tuple[bytes, ...] = ()


READ_ROWS = "rename it to end in {}, and its rows are read"
UNPACK = "uncompress it first: {} {{file}}"
TAKE_OUT = "take the text out of it, and write it to a .txt file"
WEIGHTS = (".bin", ".pt", ".pth", ".safetensors", ".npy", ".npz", ".pkl", ".pickle", ".h5", ".db")
JSON_LINES = Other("rows (JSON lines)", READ_ROWS.format(".jsonl"))
JSON = Other("rows (JSON)", READ_ROWS.format(".json"))
HTML, XML = Other("HTML", TAKE_OUT, (".html", ".htm", ".xhtml")), Other("XML", TAKE_OUT, (".xml",))
OTHERS = (
    HTML,
    XML,
    Other("rows (Parquet)", READ_ROWS.format(".parquet"), (), (b"PAR1",)),
    Other("rows (Arrow)", READ_ROWS.format(".arrow"), (".feather",), (b"ARROW1",)),
    Other("compressed data (gzip)", UNPACK.format("gunzip -k"), (".gz", ".tgz"), (b"\x1f\x8b",)),
    Other("compressed data (bzip2)", UNPACK.format("bunzip2 -k"), (".bz2",), (*(b"BZh%d" % n for n in range(1, 10)),)),
    Other("compressed data (xz)", UNPACK.format("unxz -k"), (".xz",), (b"\xfd7zXZ\0",)),
    Other("compressed data (zstd)", UNPACK.format("unzstd"), (".zst", ".zstd"), (b"\x28\xb5\x2f\xfd",)),
    Other("compressed data (zip)", UNPACK.format("unzip"), (".zip",), (b"PK\x03\x04",)),
    Other("compressed data (tar)", UNPACK.format("tar -xf"), (".tar",)),
    Other("compressed data (7-Zip)", UNPACK.format("7z x"), (".7z",), (b"7z\xbc\xaf\x27\x1c",)),
    Other("PDF", TAKE_OUT, (".pdf",), (b"%PDF-",)),
    Other("a notebook", TAKE_OUT, (".ipynb",)),
    Other("GeoJSON", TAKE_OUT, (".geojson",)),
    Other("a document of a word processor", TAKE_OUT, (".epub", ".doc", ".docx", ".odt", ".rtf"), (b"{\\rtf",)),
    Other(
        "a spreadsheet or a database",
        "write its rows to a .csv file",
        (".xlsx", ".xls", ".sqlite"),
        (b"SQLite format 3",),
    ),
    Other("binary data", "leave it out", WEIGHTS, (b"\x89PNG", b"\x93NUMPY")),
)
OF_MARKUP = re.compile(rb"<(?:(!doctype\s+html|html[\s>])|(\?xml\s))", re.IGNORECASE)
OF_JSON = re.compile(rb'[\[{\s]*\{\s*"[^"\n]*"\s*:\s*["\d\[{tfn-]')


def refuse_other_formats(file: NamedFile) -> None:
    """Raise SourceError for a file that is no text, by its name or by its first bytes."""
    name = file.name.lower()
    found = None if name.endswith(".txt.gz") else next((o for o in OTHERS if name.endswith(o.endings)), None)
    cure = "" if found else "; if it is text, let it start with a line of words"
    found = found or _by_content(file)
    if found is not None:
        cure = found.cure.format(file=file) + cure * (found in (JSON_LINES, JSON, HTML, XML))
        raise SourceError(f"holds {found.name}, and no text", file=file, cure=cure)


def _by_content(file: NamedFile) -> Other | None:
    try:
        with file.open() as stream:
            head = stream.read(HEAD_BYTES)
    except (OSError, EOFError, zlib.error):
        return None  # it is damaged: uncompressing says so
    for other in OTHERS:
        if head.startswith(other.starts):
            return other
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if markup := OF_MARKUP.match(head):
        return HTML if markup[1] else XML
    line = head.splitlines()[0] if head else b""
    if OF_JSON.match(head):
        return JSON_LINES if _parsed(line) is not None else JSON
    is_list = line.startswith(b"[") and len(_parsed(line) or []) > 1  # not "[1]", which may be a footnote
    return JSON_LINES if is_list else None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
