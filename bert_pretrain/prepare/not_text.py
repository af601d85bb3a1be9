"""Files that hold something else than text: tables, archives, markup. Read as text they would be trained on so.

corpus.jsonl        by its name        -> "corpus.jsonl holds rows (JSON lines), and prepare takes text; …"
corpus.txt          by what it begins with: {"text": …}, <html>, the bytes of gzip, …
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

HEAD_BYTES = 1 << 14


class Format(NamedTuple):
    """A format that is no text: how it is called, and what to do with it."""

    name: str
    cure: str


def _rows(name: str, loader: str, more: str = "") -> Format:
    code = f"datasets.load_dataset({loader!r}, data_files={{file!r}}, split='train'{more}).save_to_disk('rows')"
    return Format(f"rows ({name})", f"make a folder of them, whose column text is read: {code}; and give --text rows")


def _packed(name: str, command: str) -> Format:
    return Format(f"compressed data ({name})", f"unpack it first: {command} {{file}}")


def _markup(name: str) -> Format:
    return Format(name, "take the text out of it, and write it to a .txt file")


JSON_LINES, JSON = _rows("JSON lines", "json"), _rows("JSON", "json")
CSV, TSV = _rows("CSV", "csv"), _rows("TSV", "csv", r", sep='\t'")
PARQUET, ARROW = _rows("Parquet", "parquet"), _rows("Arrow", "arrow")
GZIP, BZIP2, XZ = _packed("gzip", "gunzip -k"), _packed("bzip2", "bunzip2 -k"), _packed("xz", "unxz -k")
ZSTD, ZIP, TAR = _packed("zstd", "unzstd"), _packed("zip", "unzip"), _packed("tar", "tar -xf")
SEVEN = _packed("7-Zip", "7z x")
HTML, XML, PDF = _markup("HTML"), _markup("XML"), _markup("PDF")
OFFICE, BINARY = _markup("a document of a word processor"), Format("binary data", "leave it out")

BY_SUFFIX = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), JSON_LINES),
    **{".json": JSON, ".geojson": JSON, ".ipynb": JSON, ".csv": CSV, ".tsv": TSV, ".tab": TSV},
    **{".parquet": PARQUET, ".arrow": ARROW, ".feather": ARROW},
    **dict.fromkeys((".gz", ".tgz"), GZIP),
    **{".bz2": BZIP2, ".xz": XZ, ".zst": ZSTD, ".zstd": ZSTD, ".zip": ZIP, ".tar": TAR, ".7z": SEVEN},
    **dict.fromkeys((".html", ".htm", ".xhtml"), HTML),
    **{".xml": XML, ".pdf": PDF, ".epub": OFFICE, ".doc": OFFICE, ".docx": OFFICE, ".odt": OFFICE, ".rtf": OFFICE},
    **dict.fromkeys((".bin", ".pt", ".pth", ".safetensors", ".npy", ".npz", ".pkl", ".pickle", ".h5", ".db"), BINARY),
    **{".sqlite": BINARY, ".xlsx": BINARY, ".xls": BINARY},
}
BY_FIRST_BYTES = {
    **{
        b"\x1f\x8b": GZIP,
        **{b"BZh%d" % level: BZIP2 for level in range(1, 10)},
        b"\xfd7zXZ\0": XZ,
        b"\x28\xb5\x2f\xfd": ZSTD,
        b"PK\x03\x04": ZIP,
    },
    **{b"7z\xbc\xaf\x27\x1c": SEVEN, b"PAR1": PARQUET, b"ARROW1": ARROW, b"%PDF-": PDF, b"{\\rtf": OFFICE},
    **{b"\x89PNG": BINARY, b"\x93NUMPY": BINARY, b"SQLite format 3": BINARY},
}
OF_MARKUP = re.compile(rb"<(?:(!doctype\s+html|html[\s>])|(\?xml\s))", re.IGNORECASE)
OF_JSON = re.compile(rb'[\[{\s]*\{\s*"[^"\n]*"\s*:\s*["\d\[{tfn-]')


def refuse_other_formats(file: Path) -> None:
    """Raise ValueError for a file that is no text, by its name or by what it begins with."""
    by_suffix = BY_SUFFIX.get(file.suffix.lower())
    found = by_suffix or _by_content(file)
    if found is not None:
        cure = found.cure.format(file=str(file))
        if by_suffix is None and found in (JSON_LINES, JSON, HTML, XML):
            cure += "; if it is text, let it begin with a line of words"
        raise ValueError(f"{file} holds {found.name}, and prepare takes text, in files such as .txt; {cure}")


def _by_content(file: Path) -> Format | None:
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
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
