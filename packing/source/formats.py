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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packing.files.errors import SourceError
from packing.files.names import NamedFile, unreadable
from packing.source.text_files import document_texts, find_blocks, is_blank, uncompressed

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

FORM = 1  # part of the key of converted files: change it when their form changes
BATCH_ROWS, BATCH_BYTES = 100_000, 1 << 26  # the most to convert at a time
CSV_BLOCK = 1 << 26  # bytes read at a time; a row must fit into them
NUMBERS = (
    ("int64", r"^-?(0|[1-9][0-9]{0,17})$"),  # Python writes it like this: 007 is text
    ("float64", r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]{1,3})?$"),  # more digits before the point are text
)


@dataclass(frozen=True)
class Format:
    """One kind of file. An Arrow error or an OSError of its functions becomes a SourceError that names the file.

    words: its name, for people.
    endings: of files' names, with a dot.
    columns: a file's columns; None: it has no rows.
    write: (files, path, features) -> all rows of the files, as one Arrow stream.
    is_mapped: whether a file is such a stream, so that it can be read where it lies.
    may_be_compressed: whether ENDING.gz is read, too.
    is_text: files hold texts alone, not rows.
    """

    words: str
    endings: tuple[str, ...]
    columns: Callable[[NamedFile], pa.Schema | None]
    write: Callable[[list[NamedFile], Path, datasets.Features], None]
    is_mapped: Callable[[NamedFile], bool] = lambda file: False
    may_be_compressed: bool = False
    is_text: bool = False

    def is_ending_of(self, name: str) -> bool:
        """Whether a file of this name is of this format."""
        name = name.lower()
        return (name.removesuffix(".gz") if self.may_be_compressed else name).endswith(self.endings)


def format_of(name: str) -> Format | None:
    """The format of a file, by the ending of its name; None: no format has that ending."""
    return next((format for format in FORMATS if format.is_ending_of(name)), None)


def endings(compressed: bool = False) -> str:
    """ ".parquet, .jsonl, … or .txt": for messages and help texts. compressed: only those that .gz may follow."""
    formats = [format for format in FORMATS if format.may_be_compressed or not compressed]
    *others, last = [ending for format in formats for ending in format.endings]
    return f"{', '.join(others)} or {last}"


def open_files(
    format: Format, files: list[NamedFile], cache: Path | None = None, documents: str = "paragraph"
) -> datasets.Dataset:
    """All rows of files of one format, in the order of the files.

    cache: None is that of the datasets library.
    documents: the rows of text files, see DOCUMENTS.
    """
    import datasets

    from packing.files.cache import kept_rows, key_of

    if format.is_text:
        format, files = _text(documents), [uncompressed(file, cache) for file in files]
    schemas = [(file, schema) for file in files if (schema := _columns(format, file)) is not None]
    if not schemas:
        has, lacks = "has" if len(files) == 1 else "and the other files have", "text" if format.is_text else "rows"
        raise SourceError(f"{has} no {lacks}", file=files[0], cure=f"name a file that has {lacks}")
    features, files = _common_features(schemas), [file for file, _ in schemas]
    if all(map(format.is_mapped, files)):
        rows = datasets.concatenate_datasets([_map_stream(file) for file in files])
    else:  # convert once, to an Arrow stream; its key is what the system says about the files
        key = key_of(FORM, format.words, [file.stamp() for file in files], str(features))
        rows = kept_rows(key, lambda folder: format.write(files, folder / "rows.arrow", features), cache)
    return datasets.Dataset(rows.data, info=datasets.DatasetInfo(features=rows.features), fingerprint=rows._fingerprint)


def _columns(format: Format, file: NamedFile) -> pa.Schema | None:
    with _naming(file):
        return format.columns(file)


def _write_batches(
    read: Callable[[NamedFile], Iterator[pa.RecordBatch]], files: list[NamedFile], path: Path, features: Any
) -> None:
    import pyarrow as pa
    from datasets.table import cast_table_to_features

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        for file in files:
            with _naming(file):
                for batch in read(file):
                    batch.validate(full=True)
                    writer.write_table(cast_table_to_features(pa.Table.from_batches([batch]), features))


@contextmanager
def _naming(file: NamedFile) -> Iterator[None]:
    """What Arrow or the system cannot read becomes a SourceError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, EOFError) as error:
        raise unreadable(file, error) from None


# Parquet


def _parquet_columns(file: NamedFile) -> pa.Schema | None:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.path) as opened:
        return opened.schema_arrow if opened.metadata.num_rows else None


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
    schema, _, batches = read_arrow(file.path)
    return schema if any(batch.num_rows for batch in batches) else None


def _map_stream(file: NamedFile) -> datasets.Dataset:
    import datasets

    with _naming(file):
        dataset = datasets.Dataset.from_file(str(file.path))
        for batch in dataset.data.to_batches():
            batch.validate(full=True)  # offsets lead into memory: kernels do not look
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
    return Format(words, endings, columns, write, may_be_compressed=True)


def _value_columns(delimiter: str, file: NamedFile) -> pa.Schema | None:
    """All of text, until all values have been seen."""
    return next((batch.schema for batch in _value_batches(delimiter, file) if batch.num_rows), None)


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
            raise SourceError(f"is no UTF-8: {error}", file=file, cure="convert it with iconv -t UTF-8") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SourceError(f"names two columns {twice[0]!r} in its first line", file=file, cure="rename one of them")
    other = next((character for character in ",;\t|" if len(names) == 1 and character in names[0]), None)
    if other is not None:
        what = f"names one column, {names[0]!r}: {other!r} seems to part its values, and {delimiter!r} is expected"
        raise SourceError(what, file=file, cure=f"write it with {delimiter!r}, or rename the column")
    return names


def _write_values(delimiter: str, files: list[NamedFile], path: Path, features: datasets.Features) -> None:
    """Numbers where all values of a column are, in all files; else the texts."""
    import datasets
    import pyarrow.compute as pc

    found: dict[str, int] = {}  # the first of NUMBERS of which all values are, so far
    for file in files:
        for batch in _value_batches(delimiter, file):
            for name in features:
                values = batch.column(name)
                filled = values.filter(pc.not_equal(values, ""))
                kinds = range(found.get(name, 0), len(NUMBERS))
                fits = (i for i in kinds if pc.all(pc.match_substring_regex(filled, NUMBERS[i][1])).as_py())
                if len(filled):
                    found[name] = next(fits, len(NUMBERS))
    types = [*(type_ for type_, _ in NUMBERS), "string"]
    typed = datasets.Features({name: datasets.Value(types[found.get(name, -1)]) for name in features})
    _write_batches(partial(_typed_batches, delimiter, typed.arrow_schema), files, path, typed)


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


def _text(documents: str = "paragraph") -> Format:
    """Text files, with a document a row."""
    write = partial(_write_text, documents)
    return Format(f"text, {documents}", (".txt",), _text_columns, write, may_be_compressed=True, is_text=True)


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
    """What the columns of all files are: those of the first file. Raises SourceError for a file that has others.

    What holds no value yet (null) may turn out to be anything."""
    import datasets

    (first, expected), *others = [(file, _features(file, schema)) for file, schema in schemas]
    common = dict(expected)
    for file, found in others:
        for name in {**expected, **found}:
            if name not in found or name not in expected:
                has, lacks = (first, file) if name in expected else (file, first)
                what = f"has a column {name!r}, and {str(lacks)!r} has none"
                raise SourceError(what, file=has, cure="make them alike")
            joined = _joined(common[name], found[name])
            if joined is None:
                what = f"is {common[name]} in {str(first)!r}, but {found[name]} in {str(file)!r}"
                raise SourceError(what, column=name, cure="make them alike")
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
        what = f"holds a type of column that datasets has not: {error}"
        raise SourceError(what, file=file, cure="write the column as another type, or leave it out") from None


TEXT = _text()
FORMATS: tuple[Format, ...] = (
    Format("Parquet", (".parquet",), _parquet_columns, partial(_write_batches, _parquet_batches)),
    Format("JSON", (".jsonl", ".ndjson", ".json"), _json_columns, _write_json, may_be_compressed=True),
    Format(
        "Arrow",
        (".arrow",),
        _arrow_columns,
        partial(_write_batches, lambda file: read_arrow(file.path)[2]),
        is_mapped=lambda file: read_arrow(file.path)[1],
    ),
    _delimited("CSV", (".csv",), ","),
    _delimited("TSV", (".tsv",), "\t"),
    TEXT,
)
