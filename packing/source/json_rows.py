"""JSON files -> Arrow, every value as it is written, or an error that names the file, the line and the column.

Arrow's reader parses blocks of lines. What it would change by itself is looked at here:
* Whole numbers become fractions where a column has both. One that no float64 is (2**53 + 1) is refused.
* "2020-01-01" becomes a time; it stays text.
* Bytes that are no UTF-8 pass, and cannot be read later; refused.
* Lists and objects nested so deep that a parser would end the process are refused.
A block may widen the columns of those before it: null to anything, whole numbers to fractions, by another column or
field. Then all blocks are read once more. Whatever else differs (text, then objects) is refused.

A file is JSON lines, or one list of objects, whose elements are taken as they are written.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from packing.files.errors import SourceError
from packing.files.names import NamedFile, unreadable
from packing.numba_tools import njit

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FIRST_BLOCK = 1 << 20  # bytes that a file's columns are first read from
BLOCK = 1 << 24  # bytes read at a time
PART = 1 << 20  # bytes of them that a thread of Arrow parses at a time
EXACT = 2**53  # up to here every whole number is a float64
ONE_ROW = 'each line is an object: {"input_ids": […]}'
MOST = 60  # lists and objects around a value; Arrow hands on types of 64 at most


def first_columns(file: NamedFile) -> pa.Schema | None:
    """The columns of a file's first lines; None: it has no rows."""
    return next((read_block(file, line, data).schema for line, data in blocks(file, FIRST_BLOCK)), None)


def write_rows(files: list[NamedFile], path: Path) -> None:
    """All rows of the files as one stream of Arrow."""
    known, is_written = None, False
    while not is_written:
        known, is_written = _write(files, known, path)


def _write(files: list[NamedFile], known: pa.Schema | None, path: Path) -> tuple[pa.Schema, bool]:
    """Write the rows as far as their columns are the known ones (None: the first block's).

    Returns the columns of all rows, and whether all rows are written."""
    import pyarrow as pa
    from datasets import Features
    from datasets.table import cast_table_to_features

    tables = _tables(files, known)
    first = next(tables)
    features, found = Features.from_arrow_schema(first.schema), first.schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        for table in chain([first], tables):
            found = table.schema
            if found == first.schema:  # or else this pass is for the columns alone
                writer.write_table(cast_table_to_features(table, features))
    return found, found == first.schema


def _tables(files: list[NamedFile], known: pa.Schema | None) -> Iterator[pa.Table]:
    """All blocks, each with the columns of those before it."""
    for file in files:
        for line, data in blocks(file, BLOCK):
            table = read_block(file, line, data, known, files)
            known = table.schema
            yield table


def read_block(
    file: NamedFile, line: int, data: bytes, known: pa.Schema | None = None, files: Iterable[NamedFile] = ()
) -> pa.Table:
    """Some lines, from this one on, with the columns that are known and those that come with them.

    files: where to look for the line that differs."""
    import pyarrow as pa

    _check_text(file, line, data)
    try:
        table = _parsed_as_far_as_known(data, known)
        wide = _joined_schema(known, table.schema)
        if table.schema != wide:
            table = _parse(data, wide)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        find_bad_line(list(files) or [file])
        what = f"cannot be read, from {_unit(file)} {line} on: {error}"
        raise SourceError(what, file=file, cure="make the file again") from None
    _refuse_lost_numbers(file, line, data, table)
    return table


def _parsed_as_far_as_known(data: bytes, known: pa.Schema | None) -> pa.Table:
    import pyarrow as pa

    if known is not None:
        with suppress(pa.ArrowInvalid):  # other types are in this block
            return _parse(data, known)
    return _parse(data, None)


def _parse(data: bytes, schema: pa.Schema | None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.json

    def parse(part: int) -> pa.Table:
        read = pyarrow.json.ReadOptions(block_size=part)
        return pyarrow.json.read_json(pa.BufferReader(data), read, pyarrow.json.ParseOptions(explicit_schema=schema))

    if len(data) > PART:
        with suppress(pa.ArrowInvalid):  # a row over several lines, say, which is not known to end where a part does
            return parse(PART)
    return parse(len(data) + 1)


def _check_text(file: NamedFile, line: int, data: bytes, unit: str = "") -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        bad = line + data.count(b"\n", 0, error.start)
        said = f"byte 0x{data[error.start]:02x}: {error.reason}"
        raise _error(f"is no UTF-8 ({said})", file, bad, "save the file as UTF-8", unit) from None
    check_depth(data, line, file=file, unit=unit or _unit(file))


def _joined_schema(known: pa.Schema | None, found: pa.Schema) -> pa.Schema:
    """The columns of both; whole numbers and fractions of one column, or field, are fractions."""
    import pyarrow as pa

    found = pa.schema(list(_without_times(pa.struct(list(found)))))
    return found if known is None else pa.unify_schemas([known, found], promote_options="permissive")


def _without_times(type_: pa.DataType) -> pa.DataType:
    """Arrow takes texts for times where all look like it."""
    import pyarrow as pa

    if pa.types.is_temporal(type_):
        return pa.string()
    if pa.types.is_list(type_):
        return pa.list_(_without_times(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([(field.name, _without_times(field.type)) for field in type_])
    return type_


# Numbers


def _refuse_lost_numbers(file: NamedFile, line: int, data: bytes, table: pa.Table) -> None:
    """Raise SourceError for a whole number in a column of float64 that no float64 equals."""
    if not any(_has_great_floats(chunk) for column in table.columns for chunk in column.chunks):
        return
    types = {field.name: field.type for field in table.schema}
    text = data.decode()
    place = _skip_blank(text, 0)
    # a number of thousands of digits is too long for Python, and stays the text it is
    decode = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 400 else digits).raw_decode
    while place < len(text):
        row, end = decode(text, place)
        for name, value in row.items():
            lost = _lost(value, types[name])
            if lost is not None:
                what = f"has {lost} in column {name!r}, which holds fractions, too"
                cure = "as float64 it would be another number: write all of the column as whole numbers, or as texts"
                raise _error(what, file, line + text.count("\n", 0, place), cure)
        place = _skip_blank(text, end)


def _has_great_floats(array: pa.Array) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_float64(array.type):
        greatest = pc.max(pc.abs(array)).as_py()
        return greatest is not None and not greatest < EXACT
    if pa.types.is_list(array.type):
        return _has_great_floats(array.flatten())
    return pa.types.is_struct(array.type) and any(map(_has_great_floats, array.flatten()))


def _lost(value: Any, type_: pa.DataType) -> int | str | None:
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_list(type_):
        return next((lost for each in value if (lost := _lost(each, type_.value_type)) is not None), None)
    if pa.types.is_struct(type_):
        found = (_lost(value.get(field.name), field.type) for field in type_)
        return next((lost for lost in found if lost is not None), None)
    if not pa.types.is_float64(type_) or isinstance(value, float):
        return None
    if isinstance(value, str):
        return f"{value[:40]}…"
    try:
        return value if int(float(value)) != value else None
    except OverflowError:
        return value


# Lines


def blocks(file: NamedFile, size: int) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, lines), about `size` bytes at a time; none of blank lines alone."""
    first = 1
    for lines in _runs(file, size):
        if not lines.isspace():
            yield first, lines
        first += lines.count(b"\n")


def _runs(file: NamedFile, size: int) -> Iterator[bytes]:
    """The lines of a file, or the elements of the list that it is, about `size` bytes at a time."""
    if not is_json_list(file):
        with _naming_damage(file), file.open() as opened:
            lines = _whole_lines(opened, size).removeprefix(BYTE_ORDER_MARK)
            while lines:
                yield lines
                lines = _whole_lines(opened, size)
        return
    held, filled = [], 0
    for line in _lines(file):
        held.append(line)
        filled += len(line)
        if filled >= size:
            yield b"".join(held)
            held, filled = [], 0
    if held:
        yield b"".join(held)


def _whole_lines(opened: IO[bytes], size: int) -> bytes:
    return opened.read(size) + opened.readline()


def _lines(file: NamedFile) -> Iterator[bytes]:
    """The lines of a file, or the elements of the list that it is, each on one line."""
    with _naming_damage(file):
        if is_json_list(file):
            with file.open() as opened:
                content = opened.read().removeprefix(BYTE_ORDER_MARK)
            _check_text(file, 1, content, "line")
            for row in _elements(content.decode()):
                yield f"{row}\n".encode()
            return
        with file.open() as opened:
            for number, line in enumerate(opened):
                yield line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line


@contextmanager
def _naming_damage(file: NamedFile) -> Iterator[None]:
    try:
        yield
    except (json.JSONDecodeError, OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error) from None


def is_json_list(file: NamedFile) -> bool:
    """[{"input_ids": …"""
    try:
        with file.open() as opened:
            begin = opened.read(FIRST_BLOCK).removeprefix(BYTE_ORDER_MARK).lstrip()
    except (OSError, EOFError, zlib.error):
        return False  # whoever reads it says so
    return begin[:1] == b"[" and begin[1:].lstrip()[:1] == b"{"


def _unit(file: NamedFile) -> str:
    return "element" if is_json_list(file) else "line"


def _error(what: str, file: NamedFile, number: int, cure: str, unit: str = "") -> SourceError:
    return SourceError(what, file=file, row=number, unit=unit or _unit(file), cure=cure)


def _elements(text: str) -> Iterator[str]:
    """The text of each row of a list, on one line: a line never ends within a string of JSON."""
    decode = json.JSONDecoder().raw_decode
    place = _skip_blank(text, text.index("[") + 1)
    while text[place : place + 1] != "]":
        _, end = decode(text, place)
        yield text[place:end].replace("\r", " ").replace("\n", " ")
        place = _skip_blank(text, end)
        if text[place : place + 1] == ",":
            place = _skip_blank(text, place + 1)
            if text[place : place + 1] == "]":
                raise json.JSONDecodeError("Expecting a row after the comma", text, place)
        elif text[place : place + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
    if text[place + 1 :].strip():
        raise json.JSONDecodeError("Expecting nothing after the list", text, _skip_blank(text, place + 1))


def _skip_blank(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


# What is wrong, once something has failed


def find_bad_line(files: list[NamedFile]) -> None:
    """Raise for a line that is no JSON object, or has a value of another kind than the lines before it."""
    kinds: dict[str, set[str]] = {}
    for file in files:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            _check_text(file, number, line)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _error(f"is no JSON: {error}", file, number, _cure_of_object(file)) from None
            if not isinstance(row, dict):
                raise _error(f"holds {type(row).__name__}", file, number, ONE_ROW)
            for name, value in _fields(row):
                found, before = _kinds_of(value), kinds.setdefault(name, set())
                if found and before and found != before:
                    kind, other = (", ".join(sorted(kinds)) for kinds in (found, before))
                    what = f"holds {kind} in column {name!r}, and lines before it hold {other}"
                    raise _error(what, file, number, "make them alike")
                before |= found


def _fields(row: dict, inside: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": [{"b": 1}]} -> ("a", [{"b": 1}]), ("a.b", 1)"""
    for name, value in row.items():
        yield inside + name, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _fields(inner, f"{inside}{name}.")


def _kinds_of(value: Any) -> set[str]:
    """1.5 -> {number}    [1, None] -> {list, number}    "a" -> {str}    None, [] and [None] -> {}"""
    if isinstance(value, list):
        inner = set().union(*map(_kinds_of, value))
        return {"list", *inner} if inner else set()
    if value is None:
        return set()
    return {"number" if type(value) in (int, float) else type(value).__name__}


def _cure_of_object(file: NamedFile) -> str:
    """For a line that is no JSON. The file as a whole may be one JSON object, and no table."""
    with suppress(ValueError, RecursionError, OSError), file.open() as opened:
        content = json.loads(opened.read())
        return f"the file as a whole is JSON, {describe_object(content)}" if isinstance(content, dict) else ONE_ROW
    return ONE_ROW


def about_single_object(dataset: datasets.Dataset) -> str:
    """What the only row may be that holds lists of objects, as GeoJSON and SQuAD do; "" for other datasets."""
    row = dataset[0] if len(dataset) == 1 else {}
    has_objects = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values())
    return f" (the source is {describe_object(row)})" if has_objects else ""


def describe_object(content: dict) -> str:
    """{"type": …, "features": [{…}, {…}]} -> what may be its rows."""
    lists = {n: v for n, v in content.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    rows = "".join(
        f"; {n!r} is a list of {len(v):,} objects: if they are the rows, save it alone" for n, v in lists.items()
    )
    return f"one object with {', '.join(map(repr, content))}, and no table{rows}"


# Depth: looked at before a parser, as Arrow's ends the process at great depths, and Python's gives up


def check_depth(data: bytes, first_line: int = 1, file: object = None, unit: str = "line") -> None:
    """Raise SourceError, naming the line, where brackets are nested too deep. Brackets in strings do not count."""
    place = _first_deeper(np.frombuffer(data, np.uint8), MOST)
    if place >= 0:
        line = first_line + data.count(b"\n", 0, place)
        what = f"is nested more than {MOST} deep"
        raise SourceError(what, file=file, row=line, unit=unit, cure="rows of a table are not: flatten them")


@njit(cache=True, nogil=True)
def _first_deeper(data, most):
    """Where the bracket lies that is nested deeper than `most`, or -1. A string never reaches over a line's end."""
    depth, in_string, i = 0, False, 0
    while i < len(data):
        byte = data[i]
        if in_string:
            if byte == 92:  # backslash
                i += 1
            elif byte == 34 or byte == 10:
                in_string = False
        elif byte == 34:
            in_string = True
        elif byte == 91 or byte == 123:
            depth += 1
            if depth > most:
                return i
        elif byte == 93 or byte == 125:
            depth = max(0, depth - 1)
        i += 1
    return -1
