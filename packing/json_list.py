"""A JSON file that is one list of rows -> the same rows one a line, which can be read block by block.

    [{"input_ids": [1, 2]},            {"input_ids": [1, 2]}
     {"input_ids": [3]}]        ->     {"input_ids": [3]}

Each row stays as it is written: the datasets library would read its numbers and write them anew, with ten digits. The
file is read into memory as a whole; whoever has a large one writes it as JSON lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import xxhash

from .folder import write_file

BLANK = re.compile(r"\s*")


def lines_of_list(content: bytes, folder: Path) -> Path:
    """A file of JSON lines in this folder, used again for the same content. Raises ValueError for no JSON list."""
    path = folder / f"{xxhash.xxh3_128_hexdigest(content)}.jsonl"
    if not path.exists():
        lines = "".join(f"{row}\n" for row in _rows(content.decode("utf-8-sig")))
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, lines.encode())
    return path


def _rows(text: str) -> Iterator[str]:
    """The text of each row, on one line: a line never ends within a string of JSON."""
    decode = json.JSONDecoder().raw_decode
    place = BLANK.match(text, text.index("[") + 1).end()
    while text[place : place + 1] != "]":
        _, end = decode(text, place)
        yield text[place:end].replace("\r", " ").replace("\n", " ")
        place = BLANK.match(text, end).end()
        if text[place : place + 1] == ",":
            place = BLANK.match(text, place + 1).end()
            if text[place : place + 1] == "]":
                raise json.JSONDecodeError("Expecting a row after the comma", text, place)
        elif text[place : place + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    end = BLANK.match(text, place + 1).end()
    if end < len(text):
        raise json.JSONDecodeError("Expecting nothing after the list", text, end)
