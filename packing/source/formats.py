"""FORMATS: one row for each kind of file that sequences or texts are read from. A new kind is one more row.

A row says how a file's columns are found before anything is converted, and how all rows of some files are written as
one Arrow stream. That stream is kept (files/cache.py) and mapped into memory, so that a file is converted once, and
again when it has changed. Files of one dataset have the same columns of the same types: an error names the file that
differs.

    JSON            a row is a line, or an element of one list of objects: see json_rows.py
    CSV, TSV        the first line names the columns. A column is whole numbers, or numbers, where all of its values are
                    written so; any other is text, as it stands. An empty value is a missing number, or an empty text
    Arrow           streams are mapped where they lie
    text            a row is a document: see text_files.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from packing.files.names import NamedFile
from packing.source.text_files import document_texts, find_blocks, is_blank, unpacked

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

FORM = 1  # of converted files; another one is another key
BATCH_ROWS, BATCH_BYTES = 100_000, 1 << 26  # of a file that is converted, at a time at most
CSV_BLOCK = 1 << 26  # bytes read at a time; a row must fit into them
WHOLE_NUMBER = r"^-?(0|[1-9][0-9]{0,17})$"  # an int64 as Python writes it: 007 is text
NUMBER = (
    r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?$"  # a float64; more digits before the point are text
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of file.

    words: its name, for people.
    endings: of files' names, with a dot.
    columns: a file's columns; None: it has no rows. Raises ValueError for a damaged file.
    write: (files, path, features) -> all rows of the files, as one Arrow stream.
    is_mapped: whether a file is such a stream, so that it can be read where it lies.
    can_be_packed: whether ENDING.gz is read, too.
    is_text: files hold texts alone, not rows.
    """

    words: str
    endings: tuple[str, ...]
    columns: Callable[[NamedFile], pa.Schema | None]
    write: Callable[[list[NamedFile], Path, datasets.Features], None]
    is_mapped: Callable[[NamedFile], bool] = lambda file: False
    can_be_packed: bool = False
    is_text: bool = False

    def is_ending_of(self, name: str) -> bool:
        """Whether a file of this name is of this format."""
        name = name.lower()
        return (name.removesuffix(".gz") if self.can_be_packed else name).endswith(self.endings)


def format_of(name: str) -> Format | None:
    """The format of a file, by the ending of its name; None: no format has that ending."""
    return next((format for format in FORMATS if format.is_ending_of(name)), None)


def endings(joined: str = "or") -> str:
    """ ".parquet, .jsonl, … or .txt": for messages and help texts."""
    *others, last = [ending for format in FORMATS for ending in format.endings]
    return f"{', '.join(others)} {joined} {last}"


def packed_endings(joined: str = "or") -> str:
    """The endings that may be followed by .gz."""
    *others, last = [ending for format in FORMATS if format.can_be_packed for ending in format.endings]
    return f"{', '.join(others)} {joined} {last}"


def open_files(
    format: Format, files: list[NamedFile], cache: Path | None = None, documents: str = "paragraph"
) -> datasets.Dataset:
    """All rows of files of one format, in the order of the files.

    cache: None is that of the datasets library.
    documents: the rows of text files, see DOCUMENTS.
    """
    import datasets

    if format.is_text:
        files = [unpacked(file, cache) for file in files]
        format = replace(format, words=f"{format.words} {documents}", write=partial(_write_text, documents))
    schemas = [(file, schema) for file in files if (schema := format.columns(file)) is not None]
    if not schemas:
        lacks = "text" if format.is_text else "rows"
        raise ValueError(f"{str(files[0])!r} {'has' if len(files) == 1 else 'and the other files have'} no {lacks}")
    features, files = _common_features(schemas), [file for file, _ in schemas]
    if all(map(format.is_mapped, files)):
        loaded = datasets.concatenate_datasets([_map_stream(file) for file in files])
    else:
        loaded = _convert(format, files, features, cache)
    return datasets.Dataset(
        loaded.data, info=datasets.DatasetInfo(features=loaded.features), fingerprint=loaded._fingerprint
    )


def _convert(
    format: Format, files: list[NamedFile], features: datasets.Features, cache: Path | None
) -> datasets.Dataset:
    """Into an Arrow stream that is kept, under what the system says of the files."""
    from packing.files.cache import kept_rows

    stats = [(str(file.path.absolute()), file.path.stat()) for file in files]
    stamps = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
    key = xxhash.xxh3_128_hexdigest(repr((FORM, format.words, stamps, str(features))).encode())
    return kept_rows(key, lambda folder: format.write(files, folder / "rows.arrow", features), cache)


def _write_batches(
    read: Callable[[NamedFile], Iterator[pa.RecordBatch]], files: list[NamedFile], path: Path, features: Any
) -> None:
    import pyarrow as pa
    from datasets.table import cast_table_to_features

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        for file in files:
            try:
                for batch in read(file):
                    batch.validate(full=True)
                    writer.write_table(cast_table_to_features(pa.Table.from_batches([batch]), features))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, EOFError) as error:
                raise _damaged(file, error) from None


def _damaged(file: NamedFile, error: Exception) -> ValueError:
    said = " ".join(str(error).split())
    return ValueError(f"{str(file)!r} cannot be read, it is damaged or no {file.suffix} file: {said}")


# Parquet


def _parquet_columns(file: NamedFile) -> pa.Schema | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as opened:
            return opened.schema_arrow if opened.metadata.num_rows else None
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def _parquet_batches(file: NamedFile) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.path) as opened:
        about = opened.metadata
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        yield from opened.iter_batches(max(1, min(BATCH_ROWS, BATCH_BYTES * about.num_rows // max(1, size))))


# Arrow


def read_arrow(file: Path) -> tuple[pa.Schema, bool, Iterator[pa.RecordBatch]]:
    """The schema; whether it is a stream, and no Arrow file; the batches."""
    import pyarrow as pa

    mapped = pa.memory_map(str(file))
    is_stream = mapped.read(6) != b"ARROW1"
    mapped.seek(0)
    reader = pa.ipc.open_stream(mapped) if is_stream else pa.ipc.open_file(mapped)
    batches = iter(reader) if is_stream else map(reader.get_batch, range(reader.num_record_batches))
    return reader.schema, is_stream, batches


def _arrow_columns(file: NamedFile) -> pa.Schema | None:
    import pyarrow as pa

    try:
        schema, _, batches = read_arrow(file.path)
        return schema if any(batch.num_rows for batch in batches) else None
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def _is_arrow_stream(file: NamedFile) -> bool:
    return read_arrow(file.path)[1]


def _arrow_batches(file: NamedFile) -> Iterator[pa.RecordBatch]:
    return read_arrow(file.path)[2]


def _map_stream(file: NamedFile) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    try:
        dataset = datasets.Dataset.from_file(str(file.path))
        for batch in dataset.data.to_batches():
            batch.validate(full=True)  # offsets lead into memory: kernels do not look
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None
    return dataset


# JSON


def _json_columns(file: NamedFile) -> pa.Schema | None:
    from packing.source.json_rows import first_columns

    return first_columns(file)


def _write_json(files: list[NamedFile], path: Path, features: datasets.Features) -> None:
    from packing.source.json_rows import write_rows

    write_rows(files, path)


# Values between commas, or other characters


def _delimited(words: str, endings: tuple[str, ...], delimiter: str) -> Format:
    """Files with a row a line, whose values a character parts. Quotes may hold the character and line ends."""
    columns, write = partial(_value_columns, delimiter), partial(_write_values, delimiter)
    return Format(words=words, endings=endings, columns=columns, write=write, can_be_packed=True)


def _value_columns(delimiter: str, file: NamedFile) -> pa.Schema | None:
    """All of text, until all values have been seen."""
    import pyarrow as pa

    try:
        batches = _value_batches(delimiter, file)
        return next((batch.schema for batch in batches if batch.num_rows), None)
    except (pa.ArrowInvalid, OSError, EOFError) as error:
        raise _damaged(file, error) from None


def _value_batches(delimiter: str, file: NamedFile) -> Iterator[pa.RecordBatch]:
    """The values as they stand, some megabytes at a time."""
    import pyarrow as pa
    from pyarrow import csv

    with file.open() as stream:
        names = _column_names(delimiter, file)
        if not names:
            return
        reader = csv.open_csv(
            pa.PythonFile(stream, "r"),
            csv.ReadOptions(block_size=CSV_BLOCK, use_threads=False),
            csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
        yield from reader


def _column_names(delimiter: str, file: NamedFile) -> list[str]:
    """The names that the first line gives; none for an empty file."""
    import csv
    import io

    with file.open() as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as lines:
        try:
            names = next(csv.reader(lines, delimiter=delimiter), [])
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(file)!r} is no UTF-8: {error}; convert it with iconv -t UTF-8") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{str(file)!r} names two columns {twice[0]!r} in its first line; rename one of them")
    return names


def _write_values(delimiter: str, files: list[NamedFile], path: Path, features: datasets.Features) -> None:
    """Numbers where all values of a column are, in all files; else the texts."""
    import datasets

    patterns = dict.fromkeys(features, ("int64", WHOLE_NUMBER))
    has_values: set[str] = set()
    for file in files:
        for batch in _value_batches(delimiter, file):
            for name in features:
                patterns[name], filled = _narrowed(batch.column(name), *patterns[name])
                has_values |= {name} if filled else set()
    types = {name: patterns[name][0] if name in has_values else "string" for name in features}
    typed = datasets.Features({name: datasets.Value(type_) for name, type_ in types.items()})
    _write_batches(partial(_typed_batches, delimiter, typed.arrow_schema), files, path, typed)


def _narrowed(values: pa.Array, type_: str, pattern: str) -> tuple[tuple[str, str], bool]:
    """The first type, from this one on, of which all values are; and whether there are any."""
    import pyarrow.compute as pc

    filled = values.filter(pc.not_equal(values, ""))
    for narrow in [(type_, pattern), ("float64", NUMBER)]:
        if type_ == "string" or pc.all(pc.match_substring_regex(filled, narrow[1])).as_py() is not False:
            return narrow, len(filled) > 0
    return ("string", ""), True


def _typed_batches(delimiter: str, schema: pa.Schema, file: NamedFile) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in _value_batches(delimiter, file):
        columns = []
        for field in schema:
            column = batch.column(field.name)
            if field.type != pa.string():
                column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column).cast(field.type)
            columns.append(column)
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


# Text


def _text_columns(file: NamedFile) -> pa.Schema | None:
    import pyarrow as pa

    return None if is_blank(file) else pa.schema({"text": pa.string()})


def _write_text(documents: str, files: list[NamedFile], path: Path, features: datasets.Features) -> None:
    import pyarrow as pa

    def batches(file: NamedFile) -> Iterator[pa.RecordBatch]:
        for block in find_blocks([file], documents):
            texts = pa.array(document_texts(block, documents), pa.string())
            yield pa.record_batch([texts], schema=features.arrow_schema)

    _write_batches(batches, files, path, features)


# Columns of several files


def _common_features(schemas: list[tuple[NamedFile, pa.Schema]]) -> datasets.Features:
    """What the columns of all files are: those of the first file. Raises ValueError for a file that has others.

    What holds no value yet (null) may turn out to be anything."""
    import datasets

    (first, expected), *others = [(file, _features(file, schema)) for file, schema in schemas]
    common = dict(expected)
    for file, found in others:
        for name in [*expected, *(name for name in found if name not in expected)]:
            if name not in found or name not in expected:
                has, lacks = (first, file) if name in expected else (file, first)
                raise ValueError(f"{str(has)!r} has a column {name!r}, and {str(lacks)!r} has none; make them alike")
            joined = _joined(common[name], found[name])
            if joined is None:
                raise ValueError(
                    f"column {name!r} is {common[name]} in {str(first)!r}, but {found[name]} in {str(file)!r}; "
                    "make them alike"
                )
            common[name] = joined
    return datasets.Features(common)


def _joined(known: Any, found: Any) -> Any:
    """The type of both, where they differ in nothing but that one has no values (null), in lists and fields, too.

    {"a": null, "b": int64} and {"a": string, "b": int64} -> {"a": string, "b": int64}; None: there is none."""
    import datasets

    nothing = datasets.Value("null")
    if found in (known, nothing):
        return known
    if known == nothing:
        return found
    if isinstance(known, dict) and isinstance(found, dict) and known.keys() == found.keys():
        fields = {name: _joined(feature, found[name]) for name, feature in known.items()}
        return None if None in fields.values() else fields
    if type(known) is type(found) and isinstance(known, datasets.List | datasets.LargeList):
        values = _joined(known.feature, found.feature)
        is_alike = replace(found, feature=known.feature) == known  # a length, say
        return None if values is None or not is_alike else replace(known, feature=values)
    return None


def _features(file: NamedFile, schema: pa.Schema) -> dict:
    import datasets

    try:
        return datasets.Features.from_arrow_schema(schema)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ValueError(f"{str(file)!r} holds a type of column that datasets has not: {error}") from None


FORMATS: tuple[Format, ...] = (
    Format(
        words="Parquet",
        endings=(".parquet",),
        columns=_parquet_columns,
        write=partial(_write_batches, _parquet_batches),
    ),
    Format(
        words="JSON",
        endings=(".jsonl", ".ndjson", ".json"),
        columns=_json_columns,
        write=_write_json,
        can_be_packed=True,
    ),
    Format(
        words="Arrow",
        endings=(".arrow",),
        columns=_arrow_columns,
        write=partial(_write_batches, _arrow_batches),
        is_mapped=_is_arrow_stream,
    ),
    _delimited("CSV", (".csv",), ","),
    _delimited("TSV", (".tsv",), "\t"),
    Format(
        words="text",
        endings=(".txt",),
        columns=_text_columns,
        write=partial(_write_text, "paragraph"),
        can_be_packed=True,
        is_text=True,
    ),
)
