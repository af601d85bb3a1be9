"""Where sequences come from: SOURCE of the command -> {split: datasets.Dataset}.

folder of save_to_disk          opened where it lies; a DatasetDict has splits
.arrow, a stream                mapped into memory where it lies
.parquet, .jsonl, .json, .arrow converted once, into the cache of datasets (HF_DATASETS_CACHE says where; kept.py); a
    (a file), also .jsonl.gz    file that has changed since is converted anew. A .json has an object a line, or is one
                                list of objects: json_rows.py
folder or glob of such files    one after the other, by name, subfolders too. Names that say train, validation or test
                                make splits
OWNER/NAME, OWNER/NAME:CONFIG   a dataset of the hub, by datasets.load_dataset
any of the first four at a URL  copied into that cache first, and then the same: see local_copy.py

Files of one dataset have the same columns of the same types; which file differs, or is damaged, is said.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from packing.files.cache import kept_rows
from packing.files.errors import path_suggestion
from packing.files.paths import URL, is_url, place
from packing.source.json_rows import first_columns, write_rows

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

# Ending -> builder of the datasets library.
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
ENDINGS = ".parquet, .jsonl, .json or .arrow"
ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "manifest.json")  # files beside data, no rows in them

# Words in a name that say which split a file belongs to, as on the hub.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
FORM = 1  # of converted files; another one is another key
BATCH_ROWS, BATCH_BYTES = 100_000, 1 << 26  # of a file that is converted, at a time at most


def holds_rows(source: str) -> bool:
    """Whether a file is one of sequences, and not of lengths: by its ending, and a .json by how it begins.

    [{"input_ids": …    {"input_ids": …    rows              [12, 7, …    {"12": 1, …    lengths
    """
    path = Path(source)
    if path.suffix.lower() != ".json":
        return _kind(path) is not None
    with path.open("rb") as file:
        begin = file.read(1 << 16).decode("utf-8-sig", "replace")
    return re.match(r'\s*(\[\s*\{|\{\s*"(?!\s*\d+\s*"\s*:))', begin) is not None


def open_split(source: str, split: str = "", storage_options: dict | None = None) -> datasets.Dataset:
    """One split of a source; "" is that of a source without splits. On another machine the same arguments give the same
    rows, of that machine's own copy where the source is at a URL or was converted."""
    splits = open_splits(source, storage_options)
    if split not in splits:
        raise ValueError(f"SOURCE {source!r} has no split {split!r}; it has {', '.join(map(repr, splits))}")
    return splits[split]


def open_splits(
    source: str, storage_options: dict | None = None, cache: Path | None = None
) -> dict[str, datasets.Dataset]:
    """Open or convert a source; "" is one without splits.

    storage_options: of the file system of a URL.
    cache: where what is converted or copied is kept; None: in that of the datasets library.

    Raises FileNotFoundError, ValueError or OSError that names the file, and the column or line, that is wrong.
    """
    if not source:
        raise ValueError("SOURCE is empty; name a folder, a file or a dataset ('.' is this folder)")
    if is_url(source):
        return _load_from_url(source, storage_options, cache)
    if storage_options:
        raise ValueError(f"storage_options would be ignored: {source!r} is no URL; leave them out")
    source = without_protocol(source)
    path = Path(source)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _open_saved(source)
    splits = find_files(source)
    if splits is None:
        return _load_from_hub(source)
    (kind,) = {_kind(file) for files in splits.values() for file in files}
    return {name: _load_files(kind, files, cache) for name, files in splits.items()}


def without_protocol(source: str) -> str:
    """file:///data/rows.parquet -> /data/rows.parquet"""
    return str(place(source)) if URL.match(source) else source


def _load_from_url(url: str, storage_options: dict | None, cache: Path | None) -> dict[str, datasets.Dataset]:
    from packing.files.local_copy import local_copy

    def wanted(name: str) -> bool:
        return _kind(Path(name)) is not None or Path(name).name == "LICENSE"

    copy = local_copy(url, storage_options, wanted, cache)
    try:
        return open_splits(str(copy), cache=cache)
    except (ValueError, OSError) as error:  # says where the copy is; the culprit is the file at the URL
        error.args = tuple(a.replace(str(copy), url) if isinstance(a, str) else a for a in error.args)
        if isinstance(getattr(error, "filename", None), str):
            error.filename = error.filename.replace(str(copy), url)
        raise


def _open_saved(source: str) -> dict[str, datasets.Dataset]:
    """A folder of save_to_disk."""
    import pyarrow as pa

    from packing.files.saved import load_saved

    try:
        return _splits_of(load_saved(source))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"SOURCE {source!r} was not written whole by save_to_disk: {error}") from None
    except (pa.ArrowInvalid, OSError, AttributeError, KeyError, TypeError) as error:  # the last three: what columns are
        if getattr(error, "errno", None) is not None:  # the system's word: not readable, for one
            raise
        for file in sorted(Path(source).rglob("*.arrow")):
            try:
                for _ in _arrow_batches(file)[2]:
                    pass
            except (pa.ArrowInvalid, OSError):
                raise ValueError(f"{str(file)!r} is damaged: {error}; make it anew") from None
        raise ValueError(f"SOURCE {source!r} is damaged: {error}; make it anew") from None


def find_files(source: str) -> dict[str, list[Path]] | None:
    """{split: files}, all of one kind, sorted by name; None: source is the name of a dataset on the hub."""
    path = Path(source)
    if path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root, files = path, sorted(f for f in path.rglob("*") if f.is_file() and not _is_hidden(f.relative_to(path)))
        if not any(_kind(file) for file in files):
            raise FileNotFoundError(f"SOURCE {source!r} was not written by save_to_disk, and holds no file {ENDINGS}")
    elif glob.has_magic(source):
        files = sorted(f for f in map(Path, glob.glob(source, recursive=True)) if f.is_file())
        root = Path(*[part for part in path.parts if not glob.has_magic(part)])
        if not files:
            raise FileNotFoundError(f"SOURCE {source!r} matches no file")
    elif HUB_NAME.fullmatch(source) and not path.parent.exists() and _kind(path) is None:
        return None
    else:
        raise FileNotFoundError(
            f"there is no SOURCE {source!r}; give a folder that save_to_disk wrote, a file {ENDINGS}, a folder or a "
            f"quoted glob of such files, or OWNER/NAME of a dataset on the hub{path_suggestion(source)}"
        )
    files = [file for file in files if _kind(file) and file.name not in ABOUT] if len(files) > 1 else files
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        raise ValueError(f"files of several kinds, {_listed(kinds.values())}; give a glob for one: 'FOLDER/*.parquet'")
    if not all(kinds):
        raise ValueError(f"{str(files[0])!r} is no file {ENDINGS}; convert it")
    return _by_split(files, root)


def _by_split(files: list[Path], root: Path) -> dict[str, list[Path]]:
    """By the words in their names, or in the name of the folder that they are in; {"": all} if all say the same."""
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        name = file.name.removesuffix(".gz")
        split = _split_of(name[: name.rindex(".")]) or (_split_of(file.parent.name) if file.parent != root else None)
        splits.setdefault(split, []).append(file)
    if len(splits) == 1:
        return {"": files}
    if None in splits:
        unnamed = splits.pop(None)
        split, (named, *_) = next(iter(splits.items()))
        raise ValueError(
            f"{str(named)!r} is named as of split {split!r}, but {str(unnamed[0])!r} as of none; "
            "give a glob for those that belong together, or move the others away"
        )
    return {split: splits[split] for split in SPLITS if split in splits}


def _split_of(name: str) -> str | None:
    """ "wiki_train-00000-of-00002" -> "train"; None where no word says so, or two do."""
    found = {SPLIT_OF_WORD[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLIT_OF_WORD}
    return found.pop() if len(found) == 1 else None


def _kind(file: Path) -> str | None:
    """The builder for a file's ending; None: it has another."""
    name = file.name.lower()
    if name.endswith((".jsonl.gz", ".json.gz")):
        return "json"
    return KINDS.get(Path(name).suffix)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _listed(files) -> str:
    return " and ".join(repr(str(file)) for file in files)


# Opening files


def _load_files(kind: str, files: list[Path], cache: Path | None) -> datasets.Dataset:
    """All rows of files of one kind, in the order of the files."""
    import datasets

    opened = [(file, *READERS[kind](file)) for file in files]
    with_rows = [(file, schema, is_stream) for file, schema, is_stream in opened if schema is not None]
    if not with_rows:
        raise ValueError(f"{_listed(files[:1])} {'has' if len(files) == 1 else 'and the other files have'} no rows")
    features = _common_features([(file, schema) for file, schema, _ in with_rows])
    files = [file for file, _, _ in with_rows]
    if all(is_stream for _, _, is_stream in with_rows):
        loaded = datasets.concatenate_datasets([_map_stream(file) for file in files])
    else:
        loaded = _convert(kind, files, features, cache)
    return datasets.Dataset(
        loaded.data, info=datasets.DatasetInfo(features=loaded.features), fingerprint=loaded._fingerprint
    )


def _map_stream(file: Path) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    try:
        dataset = datasets.Dataset.from_file(str(file))
        for batch in dataset.data.to_batches():
            batch.validate(full=True)  # offsets lead into memory: kernels do not look
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None
    return dataset


def _convert(kind: str, files: list[Path], features: datasets.Features, cache: Path | None) -> datasets.Dataset:
    """Into an Arrow stream that is kept, under what the system says of the files."""
    stats = [(str(file.absolute()), file.stat()) for file in files]
    stamps = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
    key = xxhash.xxh3_128_hexdigest(repr((FORM, kind, stamps, str(features))).encode())

    def make(folder: Path) -> None:
        if kind == "json":
            write_rows(files, folder / "rows.arrow")
        else:
            _write_batches(kind, files, features, folder / "rows.arrow")

    return kept_rows(key, make, cache)


def _write_batches(kind: str, files: list[Path], features: datasets.Features, path: Path) -> None:
    import pyarrow as pa
    from datasets.table import cast_table_to_features

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        for file in files:
            for batch in _read_batches(kind, file):
                writer.write_table(cast_table_to_features(pa.Table.from_batches([batch]), features))


def _read_batches(kind: str, file: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    try:
        for batch in BATCHES[kind](file):
            batch.validate(full=True)
            yield batch
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise _damaged(file, error) from None


def _parquet_batches(file: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        about = opened.metadata
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        yield from opened.iter_batches(max(1, min(BATCH_ROWS, BATCH_BYTES * about.num_rows // max(1, size))))


def _load_from_hub(source: str) -> dict[str, datasets.Dataset]:
    import datasets

    try:
        return _splits_of(datasets.load_dataset(*source.split(":")))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"there is no file or folder {source!r}, and the hub gave no dataset of that name: {error}"
            f"{path_suggestion(source)}"
        ) from None


def _splits_of(loaded) -> dict[str, datasets.Dataset]:
    import datasets

    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}


# Columns, before anything is converted: file -> (its schema, None if it has no rows; whether it can be mapped)


def _open_parquet(file: Path) -> tuple[pa.Schema | None, bool]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            return opened.schema_arrow if opened.metadata.num_rows else None, False
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def _open_arrow(file: Path) -> tuple[pa.Schema | None, bool]:
    import pyarrow as pa

    try:
        schema, is_stream, batches = _arrow_batches(file)
        return schema if any(batch.num_rows for batch in batches) else None, is_stream
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def _arrow_batches(file: Path) -> tuple[pa.Schema, bool, Iterator[pa.RecordBatch]]:
    """The schema; whether it is a stream, and no file; the batches."""
    import pyarrow as pa

    mapped = pa.memory_map(str(file))
    is_stream = mapped.read(6) != b"ARROW1"
    mapped.seek(0)
    reader = pa.ipc.open_stream(mapped) if is_stream else pa.ipc.open_file(mapped)
    batches = iter(reader) if is_stream else map(reader.get_batch, range(reader.num_record_batches))
    return reader.schema, is_stream, batches


def _open_json(file: Path) -> tuple[pa.Schema | None, bool]:
    return first_columns(file), False


READERS = {"parquet": _open_parquet, "arrow": _open_arrow, "json": _open_json}


BATCHES = {"parquet": _parquet_batches, "arrow": lambda file: _arrow_batches(file)[2]}


def _common_features(schemas: list[tuple[Path, pa.Schema]]) -> datasets.Features:
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


def _joined(known, found):
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


def _features(file: Path, schema: pa.Schema) -> dict:
    import datasets

    try:
        return datasets.Features.from_arrow_schema(schema)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise ValueError(f"{str(file)!r} holds a type of column that datasets has not: {error}") from None


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{str(file)!r} cannot be read, it is damaged or no {file.suffix} file: {error}")
