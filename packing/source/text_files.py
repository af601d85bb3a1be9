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

A file that holds something else than text (a table, an archive, markup) is refused, by its name or by its first bytes:
read as text it would be trained on.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import xxhash

from packing.files.names import NamedFile

if TYPE_CHECKING:
    import datasets

DOCUMENTS = ("paragraph", "line", "file")
BLOCK_BYTES = 1 << 20  # a block ends at the first blank line behind so many bytes; or line, where each is a document
WINDOW_BYTES = 1 << 16  # read at once to look for line ends
HEAD_BYTES = 1 << 14  # by which a file that is no text is known


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
    bytes: int  # about how much text it is
    newline: bytes = b"\n"  # ends a line of a file; a return before it is white space


def check_documents(documents: str) -> str:
    """Raise ValueError for an unknown option."""
    if documents not in DOCUMENTS:
        raise ValueError(f"documents={documents!r} is unknown; choose from {list(DOCUMENTS)}")
    return documents


def find_blocks(sources: Iterable[NamedFile | TextRows], documents: str = "paragraph") -> Iterator[TextBlock]:
    """All of the text, in order. "file" makes one block of a file, "line" may end one at any line."""
    for source in sources:
        yield from _row_blocks(source) if isinstance(source, TextRows) else _file_blocks(source, documents)


def read_lines(block: TextBlock) -> Iterator[Iterable[str]]:
    """The lines of each file or row of a block, with each run of white space made one space; "" is a blank line.

    Raises ValueError for a file that is not UTF-8.
    """
    if isinstance(block.source, TextRows):
        texts = block.source.dataset.select_columns(block.source.column)[block.start : block.end]
        split = (text.splitlines() if text is not None else [] for text in texts[block.source.column])
    else:
        split = iter([_decoded(block).split(block.newline.decode())])
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


def unpacked(file: NamedFile, cache: Path | None = None) -> NamedFile:
    """A text file that can be read from any place: of a .gz, a copy that the cache keeps, under the same name."""
    from packing.files.cache import kept_folder

    if file.suffix.lower() != ".gz":
        return file
    found = file.path.stat()
    stamp = str(file.path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
    key = xxhash.xxh3_128_hexdigest(repr(("unpacked", stamp)).encode())

    def make(folder: Path) -> None:
        with file.open() as packed, (folder / "text").open("wb") as target:
            try:
                shutil.copyfileobj(packed, target, 1 << 20)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{str(file)!r} cannot be unpacked: {error}; make the file again") from None

    return NamedFile(kept_folder(key, make, cache) / "text", file.name)


def is_blank(file: NamedFile) -> bool:
    """Whether there is nothing but white space."""
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
        head += stream.read(1) if head.endswith(b"\r") else b""  # which may be half of a line end
        newline = b"\r" if b"\r" in head and b"\n" not in head else b"\n"  # lines of old Macs end in a return alone
        line_end = newline if documents == "line" else newline + rb"[ \t\r]*" + newline
        start = 0
        while start < size:
            whole = documents == "file"
            end = size if whole else _behind_end(stream, start + BLOCK_BYTES, size, newline, re.compile(line_end))
            yield TextBlock(file, start, end, end - start, newline)
            start = end


def _behind_end(stream: BinaryIO, position: int, size: int, newline: bytes, end: re.Pattern[bytes]) -> int:
    """The first place behind `position` that follows the end of a block; or the size of the file."""
    if position >= size:
        return size
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
    return size


# Bytes -> characters


def _decoded(block: TextBlock) -> str:
    with block.source.path.open("rb") as stream:
        stream.seek(block.start)
        data = stream.read(block.end - block.start)
    if (nul := data.find(b"\0")) >= 0:
        raise _not_utf8(block, nul, data)
    try:
        # Only a file may start with a byte-order mark.
        return data.decode("utf-8-sig" if block.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # error.start counts from error.object, which lacks the byte-order mark.
        raise _not_utf8(block, len(data) - len(error.object) + error.start, data) from None


def _not_utf8(block: TextBlock, at: int, data: bytes) -> ValueError:
    """An error that names the file, the byte and its line, and what the file is likely to be."""
    with block.source.path.open("rb") as stream:
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


# Files that hold something else


class NotText(NamedTuple):
    """What a file holds instead of text, and what to do about it."""

    name: str
    cure: str


def _rows(name: str, ending: str) -> NotText:
    return NotText(f"rows ({name})", f"rename it to end in {ending}, and its rows are read")


def _packed(name: str, command: str) -> NotText:
    return NotText(f"compressed data ({name})", f"unpack it first: {command} {{file}}")


def _markup(name: str) -> NotText:
    return NotText(name, "take the text out of it, and write it to a .txt file")


JSON_LINES, JSON = _rows("JSON lines", ".jsonl"), _rows("JSON", ".json")
PARQUET, ARROW = _rows("Parquet", ".parquet"), _rows("Arrow", ".arrow")
GZIP, BZIP2, XZ = _packed("gzip", "gunzip -k"), _packed("bzip2", "bunzip2 -k"), _packed("xz", "unxz -k")
ZSTD, ZIP, TAR = _packed("zstd", "unzstd"), _packed("zip", "unzip"), _packed("tar", "tar -xf")
SEVEN = _packed("7-Zip", "7z x")
HTML, XML, PDF = _markup("HTML"), _markup("XML"), _markup("PDF")
NOTEBOOK, MAP = _markup("a notebook"), _markup("GeoJSON")
OFFICE, BINARY = _markup("a document of a word processor"), NotText("binary data", "leave it out")

BY_SUFFIX = {
    **{".geojson": MAP, ".ipynb": NOTEBOOK, ".feather": ARROW, ".gz": GZIP, ".tgz": GZIP},
    **{".bz2": BZIP2, ".xz": XZ, ".zst": ZSTD, ".zstd": ZSTD, ".zip": ZIP, ".tar": TAR, ".7z": SEVEN},
    **dict.fromkeys((".html", ".htm", ".xhtml"), HTML),
    **{".xml": XML, ".pdf": PDF, ".epub": OFFICE, ".doc": OFFICE, ".docx": OFFICE, ".odt": OFFICE, ".rtf": OFFICE},
    **dict.fromkeys((".bin", ".pt", ".pth", ".safetensors", ".npy", ".npz", ".pkl", ".pickle", ".h5", ".db"), BINARY),
    **{".sqlite": BINARY, ".xlsx": BINARY, ".xls": BINARY},
}
BY_FIRST_BYTES = {
    **{b"\x1f\x8b": GZIP, b"\xfd7zXZ\0": XZ, b"\x28\xb5\x2f\xfd": ZSTD, b"PK\x03\x04": ZIP},
    **{b"BZh%d" % level: BZIP2 for level in range(1, 10)},
    **{b"7z\xbc\xaf\x27\x1c": SEVEN, b"PAR1": PARQUET, b"ARROW1": ARROW, b"%PDF-": PDF, b"{\\rtf": OFFICE},
    **{b"\x89PNG": BINARY, b"\x93NUMPY": BINARY, b"SQLite format 3": BINARY},
}
OF_MARKUP = re.compile(rb"<(?:(!doctype\s+html|html[\s>])|(\?xml\s))", re.IGNORECASE)
OF_JSON = re.compile(rb'[\[{\s]*\{\s*"[^"\n]*"\s*:\s*["\d\[{tfn-]')


def refuse_other_formats(file: NamedFile) -> None:
    """Raise ValueError for a file that is no text, by its name or by its first bytes."""
    by_suffix = None if file.name.lower().endswith(".txt.gz") else BY_SUFFIX.get(file.suffix.lower())
    found = by_suffix or _by_content(file)
    if found is not None:
        cure = found.cure.format(file=str(file))
        if by_suffix is None and found in (JSON_LINES, JSON, HTML, XML):
            cure += "; if it is text, let it start with a line of words"
        raise ValueError(f"{file} holds {found.name}, and no text; {cure}")


def _by_content(file: NamedFile) -> NotText | None:
    try:
        with file.open() as stream:
            head = stream.read(HEAD_BYTES)
    except (OSError, EOFError, zlib.error):
        return None  # damaged: unpacking says so
    for first, found in BY_FIRST_BYTES.items():
        if head.startswith(first):
            return found
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if markup := OF_MARKUP.match(head):
        return HTML if markup[1] else XML
    line = head.splitlines()[0] if head else b""
    if OF_JSON.match(head):
        return JSON_LINES if _parsed(line) is not None else JSON
    is_list = line.startswith(b"[") and len(_parsed(line) or []) > 1  # not "[1]", which may be a footnote
    return JSON_LINES if is_list else None


def _parsed(line: bytes):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
