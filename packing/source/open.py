"""SOURCE of a command -> its splits: rows, rows with tokens, or texts to read in blocks.

folder of save_to_disk          opened where it lies; a DatasetDict has splits
a file                          by its ending, see formats.py
folder or glob of files         of one format, one after the other, by name, subfolders too. Names that say train,
                                validation or test make splits
OWNER/NAME, OWNER/NAME:CONFIG   a dataset of the hub, by datasets.load_dataset
any of the first three at a URL copied into the cache first, and then the same: see local_copy.py
"""

from __future__ import annotations

import glob
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from packing.files.errors import Option, OptionError, SourceError, in_split, path_suggestion
from packing.files.names import NamedFile, is_hidden
from packing.files.paths import URL, is_url, place
from packing.options import option
from packing.source.formats import TEXT, Format, endings, format_of, open_files, read_arrow
from packing.source.text_files import DOCUMENTS, TextRows, check_documents, refuse_other_formats, uncompressed
from packing.text.tokenizer import MODES

if TYPE_CHECKING:
    import datasets

    from packing.source.text import Run

logger = logging.getLogger(__name__)

ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "manifest.json")  # files beside data, no rows in them

# Words in a name that say which split a file belongs to, as on the hub.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts become sequences, with the help of the command. What is None was not given."""

    text_column: str | None = option(None, "texts to tokenize; the packs do not keep this column", "NAME")
    text_pair_column: str | None = option(None, "the second texts, to tokenize as pairs", "NAME")
    keep_text: bool = option(False, "keep the columns of texts beside their tokens")
    tokenizer: str | None = option(None, "tokenizer of transformers, for texts", "FOLDER_OR_NAME")
    documents: str | None = option(
        None,
        "what a sequence of a text file is: a paragraph between blank lines (the default), a line, or the file",
        choices=DOCUMENTS,
    )
    tokenize: str = option(
        "auto",
        "how, with the same tokens: each distinct word once where the tokenizer allows it (auto), or an error where it "
        "does not (fast), or text by text (exact)",
        choices=MODES,
    )


class OpenedSource(NamedTuple):
    """Rows with input_ids. are_tokenized: whether they were made here, of texts."""

    splits: dict[str, datasets.Dataset]
    are_tokenized: bool


T = TypeVar("T")


class FoundFiles(NamedTuple):
    """{split: files of one format}; "" is one without splits. left_out: endings of others beside them."""

    format: Format
    splits: dict[str, list[NamedFile]]
    left_out: Counter[str]


Found: TypeAlias = "FoundFiles | dict[str, datasets.Dataset]"


def open_split(source: str, split: str = "") -> datasets.Dataset:
    """One split of a source; "" is that of a source without splits.

    The same arguments give the same rows on another machine, from its own copy of a URL."""
    splits = open_splits(source)
    if split not in splits:
        raise ValueError(f"SOURCE {source!r} has no split {split!r}; it has {', '.join(map(repr, splits))}")
    return splits[split]


def open_splits(source: str) -> dict[str, datasets.Dataset]:
    """The rows of a source, converted where they cannot be read in place; "" is one without splits.

    Raises FileNotFoundError, ValueError or OSError that names the file, and the column or line, that is wrong."""
    return _open(_find(source))


def open_sequences(
    source: str,
    texts: TextOptions,
    num_proc: int = 1,
    *,
    longest: int | None = None,
    cache: Path | None = None,
    run: Run | None = None,
    say: Callable[[str], object] = logger.warning,
) -> OpenedSource:
    """The rows of a source with input_ids: as they are, or made of texts by a tokenizer.

    num_proc: processes that tokenize; run: who does it instead of them, see `tokenize`.
    longest: the first text of more tokens ends the work; None: none does.
    cache: where what is converted, copied or made is kept; None: in that of the datasets library.
    say: is called with one line about what was not asked for: the column that is taken, text files that are left out.

    Raises as open_splits does. Raises ValueError for options of texts that do not fit the rows, before it loads a
    tokenizer, which takes long.
    """
    from packing.source.text import check_texts, tokenize
    from packing.text.tokenizer import open_tokenizer

    documents = check_documents(texts.documents or "paragraph")
    found = _find(source, cache, any_ending=texts.tokenizer is not None)
    is_text = isinstance(found, FoundFiles) and found.format.is_text
    if is_text and texts.text_column is not None:
        raise _ignored("text_column", texts.text_column, f"{source!r} is text")
    if not is_text and texts.documents is not None:
        raise _ignored("documents", texts.documents, f"{source!r} holds rows")
    if is_text and texts.tokenizer is None:
        cure = f"{Option('tokenizer', 'FOLDER_OR_NAME')} (a file of lengths has one whole number a line)"
        raise OptionError(f"SOURCE {source!r} holds texts; give what makes tokens of them: {cure}")
    _say_left_out(source, found, say, only_texts=True)
    splits = _open(found, cache, documents)
    if texts.tokenizer is None:
        _in_each(splits, _check_has_tokens)
        return OpenedSource(splits, are_tokenized=False)
    columns = ["text"] if is_text else _text_columns(splits, texts, say)
    _in_each(splits, lambda dataset: check_texts(dataset, columns))
    work = partial(
        tokenize,
        tokenizer=open_tokenizer(texts.tokenizer),
        text_columns=columns,
        keep_text=texts.keep_text,
        num_proc=num_proc,
        longest=longest,
        cache=cache,
        mode=texts.tokenize,
        run=run,
        say=say,
    )
    tokenized = _in_each(splits, work)
    return OpenedSource(tokenized, are_tokenized=True)


def find_texts(source: str, text_column: str | None = None) -> dict[str, list[NamedFile | TextRows]]:
    """{split: texts}, in order; "" is a source without splits. Text files stay as they are, and are read in blocks.

    text_column: of rows. None: the column `text`, or else the only one of strings, which is logged, like files that
        are left out.

    A folder of text and other files is read for its text; a file of another ending is text if it begins like text.
    """
    from packing.source.text import find_text_column

    found = _find(source, for_text=True, any_ending=True)
    if isinstance(found, FoundFiles) and found.format.is_text:
        if text_column is not None:
            raise _ignored("text_column", text_column, f"{source!r} is text")
        _say_left_out(source, found, logger.warning)
        return {name: [uncompressed(file) for file in files] for name, files in found.splits.items()}

    def column_of(dataset: datasets.Dataset) -> str:
        has_text = text_column is None and "text" in dataset.column_names
        return find_text_column(dataset, "text" if has_text else text_column, logger.warning)

    splits = _open(found)
    columns = _in_each(splits, column_of)
    names = {name: f"{source} ({name})" if name else source for name in splits}
    return {name: [TextRows(names[name], dataset, columns[name])] for name, dataset in splits.items()}


def without_protocol(source: str) -> str:
    """file:///data/rows.parquet -> /data/rows.parquet"""
    return str(place(source)) if URL.match(source) else source


def _open(found: Found, cache: Path | None = None, documents: str = "paragraph") -> dict[str, datasets.Dataset]:
    if not isinstance(found, FoundFiles):
        return found
    return {name: open_files(found.format, files, cache, documents) for name, files in found.splits.items()}


def _in_each(splits: dict[str, datasets.Dataset], do: Callable[[datasets.Dataset], T]) -> dict[str, T]:
    """{split: what `do` gives for it}; errors name the split."""
    done = {}
    for name, dataset in splits.items():
        with in_split(name):
            done[name] = do(dataset)
    return done


def _say_left_out(source: str, found: Found, say: Callable[[str], object], only_texts: bool = False) -> None:
    """only_texts: files that hold no text are not worth a word."""
    if isinstance(found, FoundFiles):
        left = Counter({end: n for end, n in found.left_out.items() if not only_texts or format_of(end) is TEXT})
        said = ", ".join(f"{count} {ending}" for ending, count in left.most_common(5)) + ", …" * (len(left) > 5)
        if said:
            say(f"{source}: only {', '.join(found.format.endings)} files are read; left out are {said}")


def _ignored(name: str, value: str, why: str) -> OptionError:
    return OptionError(f"{Option(name, value)} would be ignored: {why}; leave it out")


# Columns of texts


def _text_columns(splits: dict[str, datasets.Dataset], texts: TextOptions, say: Callable[[str], object]) -> list[str]:
    """The one or two columns to tokenize."""
    from packing.source.text import find_text_column

    if texts.text_column is not None:
        return [name for name in (texts.text_column, texts.text_pair_column) if name is not None]
    name, dataset = next(iter(splits.items()))
    with in_split(name):
        if "input_ids" in dataset.column_names:
            what = f"{Option('tokenizer', texts.tokenizer)} would be ignored: rows have input_ids"
            raise SourceError(what, cure=f"leave it out, or name the texts: {Option('text_column', 'NAME')}")
        return [find_text_column(dataset, None, say)]


def _check_has_tokens(dataset: datasets.Dataset) -> None:
    from packing.source.json_rows import about_single_object
    from packing.source.rows import check_has_tokens

    options = f"{Option('text_column', 'NAME')} {Option('tokenizer', 'FOLDER_OR_NAME')}"
    check_has_tokens(dataset, f", or let it be done here: {options}{about_single_object(dataset)}")


# Where it lies


def _find(source: str, cache: Path | None = None, for_text: bool = False, any_ending: bool = False) -> Found:
    """Files of one format; or rows that are open: a folder of save_to_disk, or a dataset of the hub."""
    from packing.files.local_copy import local_copy

    if not source:
        raise ValueError("SOURCE is empty; name a folder, a file or a dataset ('.' is this folder)")
    name_of: Callable[[Path], str] = str
    if is_url(source):
        path = str(copy := local_copy(source, None, partial(_to_copy, for_text), cache))
        name_of = partial(_url_of, source, copy)
    else:
        path = without_protocol(source)
    if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
        return _open_saved(path, source)
    return find_files(path, for_text, any_ending, name_of) or _load_from_hub(source)


def _to_copy(for_text: bool, names: set[str]) -> set[str]:
    """Those files of a folder at a URL that will be read: rows or texts, if it has both."""
    formats = {name: format for name in names if (format := format_of(name)) is not None}
    is_saved = any(Path(name).name in ("state.json", "dataset_dict.json") for name in names)
    wanted = {name for name, format in formats.items() if format.is_text is (for_text and not is_saved)}
    return (wanted or {*formats}) | {name for name in names if Path(name).name == "LICENSE"}


def _url_of(url: str, copy: Path, file: Path) -> str:
    """The URL of a file, in the copy of what is at another: of the folder, or the glob, that it is from."""
    if file == copy:
        return url
    first, chain, rest = url.partition("::")
    root = first[: found.start()].rpartition("/")[0] if (found := MAGIC.search(first)) else first.rstrip("/")
    return f"{root}/{file.relative_to(copy).as_posix()}{chain}{rest}"


def _open_saved(folder: str, source: str) -> dict[str, datasets.Dataset]:
    """A folder of save_to_disk. source: what errors call it."""
    import pyarrow as pa

    from packing.files.saved import load_saved

    called = repr(source) if folder == without_protocol(source) else f"{source!r} (its copy in {folder})"
    try:
        return _splits_of(load_saved(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"SOURCE {called} was not written whole by save_to_disk: {error}") from None
    except (pa.ArrowInvalid, OSError, AttributeError, KeyError, TypeError) as error:  # the last three: what columns are
        if getattr(error, "errno", None) is not None:  # the system's word: not readable, for one
            raise
        for file in sorted(Path(folder).rglob("*.arrow")):
            try:
                for _ in read_arrow(file)[2]:
                    pass
            except (pa.ArrowInvalid, OSError):
                raise ValueError(f"{str(file)!r} is damaged: {error}; make the file again") from None
        raise ValueError(f"SOURCE {called} is damaged: {error}; make it again") from None


def _load_from_hub(source: str) -> dict[str, datasets.Dataset]:
    import datasets

    try:
        return _splits_of(datasets.load_dataset(*source.split(":")))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"there is no file or folder {source!r}, and the hub gave no dataset of that name: {error}"
            f"{path_suggestion(source)}"
        ) from None


def _splits_of(loaded: datasets.Dataset | datasets.DatasetDict) -> dict[str, datasets.Dataset]:
    import datasets

    return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}


def find_files(
    source: str, for_text: bool = False, any_ending: bool = False, name_of: Callable[[Path], str] = str
) -> FoundFiles | None:
    """The files of one format that a source names, sorted; None: it is the name of a dataset on the hub.

    for_text: of text and rows beside each other, take the text; if False, the rows.
    any_ending: a single file is text, too, if its ending is that of no format and it begins like text.
    name_of: what errors call a file.
    """
    path = Path(source)
    if path.is_file():
        root, files = path.parent, [path]
    elif path.is_dir():
        root = path
        files = sorted(f for f in path.rglob("*") if f.is_file() and not is_hidden(f.relative_to(path).as_posix()))
    elif glob.has_magic(source):
        files = sorted(f for f in map(Path, glob.glob(source, recursive=True)) if f.is_file())
        root = Path(*[part for part in path.parts if not glob.has_magic(part)])
        if not files:
            raise FileNotFoundError(f"SOURCE {source!r} matches no file{path_suggestion(str(root))}")
    elif HUB_NAME.fullmatch(source) and not path.parent.exists() and format_of(source) is None:
        return None
    else:
        raise FileNotFoundError(
            f"there is no SOURCE {source!r}; give a folder that save_to_disk wrote, a file {endings()}, a folder or a "
            f"quoted glob of such files, or OWNER/NAME of a dataset on the hub{path_suggestion(source)}"
        )
    named = [NamedFile(file, name_of(file)) for file in files]
    formats = {TEXT: named} if any_ending and len(named) == 1 and not path.is_dir() else {}
    formats = _by_format(named) or formats
    if not formats and path.is_dir():
        raise FileNotFoundError(
            f"SOURCE {source!r} was not written by save_to_disk, and holds no file {endings()}{_there_are(files)}"
        )
    if not formats:
        raise ValueError(f"{str(named[0])!r} is no file {endings()}; convert it, or name it .txt if it holds text")
    if len(formats) > 1:
        formats = {format: files for format, files in formats.items() if format.is_text is for_text} or formats
    if len(formats) > 1:
        firsts = [str(files[0]) for files in formats.values()]
        one = firsts[0][: firsts[0].rfind("/") + 1] + "*" + Path(firsts[0]).suffix
        raise ValueError(f"files of several kinds, {' and '.join(map(repr, firsts))}; give a glob for one: {one!r}")
    ((format, chosen),) = formats.items()
    if format.is_text:
        for file in chosen:
            refuse_other_formats(file)
    others = [file.path for file in named if file not in chosen and file.path.name not in ABOUT]
    return FoundFiles(format, _by_split(chosen, root, format), Counter(path.suffix or path.name for path in others))


def _by_format(files: list[NamedFile]) -> dict[Format, list[NamedFile]]:
    """Files of an ending that no format has are not in it."""
    formats: dict[Format, list[NamedFile]] = {}
    for file in files:
        format = format_of(file.path.name)
        if format is not None and (len(files) == 1 or file.path.name not in ABOUT):
            formats.setdefault(format, []).append(file)
    return formats


def _by_split(files: list[NamedFile], root: Path, format: Format) -> dict[str, list[NamedFile]]:
    """By the words in their names, or in the name of the folder that they are in; {"": all} if all say the same.

    Texts have names of all kinds: where one says no split, none does."""
    splits: dict[str | None, list[NamedFile]] = {}
    for file in files:
        name = file.path.name.removesuffix(".gz")
        in_folder = _split_of(file.path.parent.name) if file.path.parent != root else None
        splits.setdefault(_split_of(name.rpartition(".")[0]) or in_folder, []).append(file)
    if len(splits) == 1 or (format.is_text and None in splits):
        return {"": files}
    if None in splits:
        unnamed = splits.pop(None)
        split, (named, *_) = next(iter(splits.items()))
        what = f"{str(named)!r} is named as of split {split!r}, but {str(unnamed[0])!r} as of none"
        raise ValueError(f"{what}; give a glob for those that belong together, or move the others away")
    return {split: splits[split] for split in SPLITS if split in splits}


def _split_of(name: str) -> str | None:
    """ "wiki_train-00000-of-00002" -> "train"; None where no word says so, or two do."""
    found = {SPLIT_OF_WORD[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLIT_OF_WORD}
    return found.pop() if len(found) == 1 else None


def _there_are(files: list[Path]) -> str:
    kinds = Counter(file.suffix or file.name for file in files)
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    return f"; there are {said}; name files one by one if they hold text and end otherwise" if kinds else ""
