"""SOURCE and the options that say how to read it -> splits with input_ids, or histograms of lengths."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from packing.command.parser import Parser, add_pack_options
from packing.files.errors import SourceError, suggestion, whole_number

if TYPE_CHECKING:
    import datasets
    import numpy as np

READING = ("overlong", "token_columns", "pad_token_id", "num_proc")
TEXT_OPTIONS = ("text_column", "text_pair_column", "keep_text", "tokenizer")
LENGTHS = "also a file of lengths (.txt, .csv, .json, .npy, .npz)"

SOURCES = """\
SOURCE is one of:
  tokenized                a folder of save_to_disk
  rows.parquet             a file: .parquet, .jsonl, .json, .jsonl.gz, .arrow
  data                     a folder of such files, all of one kind
  'data/train-*.parquet'   a glob, in quotes
  owner/name               a dataset of the hub; owner/name:config where it has several
  s3://bucket/data         files, folders and globs at a URL of any file system that fsspec knows
Rows hold tokens in the column input_ids, or texts: --text-column and --tokenizer tokenize them.
Several splits are packed one by one into TARGET/<split>. Names of files that say train, validation and test are splits.
HF_DATASETS_CACHE says where converted files, copies of URLs and the tokens of texts are kept.
"""


def add_source(parser: Parser, extra: str = "") -> None:
    """The argument SOURCE."""
    parser.add_argument("source", metavar="SOURCE", help=f"sequences or texts to read, see below{extra}")


def add_text_options(parser: Parser) -> None:
    """TEXT_OPTIONS: which column of texts becomes sequences, and by which tokenizer."""
    add = parser.add_argument
    add("--text-column", metavar="NAME", help="texts to tokenize; the packs do not keep this column")
    add("--text-pair-column", metavar="NAME", help="the second texts, to tokenize as pairs")
    add("--keep-text", action="store_true", help="keep the columns of texts beside their tokens")
    add("--tokenizer", metavar="FOLDER_OR_NAME", help="tokenizer of transformers, for --text-column")


def add_reading_options(parser: Parser) -> None:
    """How to read rows, whatever happens to them then."""
    add_pack_options(parser, READING)
    add_text_options(parser)


def check_text_options(arguments: Namespace) -> None:
    """Raise ValueError unless there are a column of texts and a tokenizer, or neither."""
    if arguments.text_column is None:
        refuse_ignored(arguments, TEXT_OPTIONS, "there is no --text-column")
    elif arguments.tokenizer is None:
        raise ValueError("--text-column needs --tokenizer: a folder that save_pretrained wrote, or a name on the hub")
    if arguments.text_pair_column is not None and getattr(arguments, "overlong", None) == "truncate":
        raise ValueError(
            "--overlong truncate would take from the second text of a pair alone; choose split or drop, or raise "
            "--max-sequence-length"
        )


def refuse_ignored(arguments: Namespace, unused: Sequence[str], why: str) -> None:
    """Raise ValueError for an option that is given although this source leaves it unused."""
    for name in unused:
        value = getattr(arguments, name, arguments.defaults.get(name))
        if value != arguments.defaults.get(name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option if value is True else f'{option} {value}'} would be ignored: {why}; leave it out"
            )


def is_lengths(source: str) -> bool:
    """Whether SOURCE is a file of lengths, and not of rows."""
    from packing.source.open import holds_rows

    return Path(source).is_file() and not holds_rows(source)


def load_histograms(arguments: Namespace) -> Iterator[tuple[str, np.ndarray]]:
    """(split, histogram) one after the other, cut to max_sequence_length; "" is a source without splits."""
    from packing.packers.table import checked_length
    from packing.source.lengths import cut_histogram, dataset_histogram, read_histogram

    limit = checked_length(arguments.max_sequence_length)
    if is_lengths(arguments.source):
        unused = (*(name for name in READING if name != "overlong"), *TEXT_OPTIONS, "seed", "balance")
        refuse_ignored(arguments, unused, "a file of lengths holds no rows")
        yield "", cut_histogram(read_histogram(arguments.source), limit, arguments.overlong)
        return
    check_text_options(arguments)
    for name, dataset in load_sequences(arguments).items():
        with naming_split(name):
            read = arguments.overlong, arguments.token_columns, arguments.pad_token_id
            histogram = dataset_histogram(dataset, limit, *read)
        yield name, histogram


def load_sequences(arguments: Namespace, cache: Path | None = None) -> dict[str, datasets.Dataset]:
    """{split: Dataset with input_ids}; a Dataset without splits is {"": Dataset}.

    cache: where converted files and tokens are kept; None: in that of the datasets library."""
    from packing.source.open import open_splits

    num_proc = whole_number("num_proc", arguments.num_proc)
    splits = open_splits(arguments.source, cache=cache)
    if arguments.text_column is not None:
        return _tokenized(splits, arguments, num_proc, cache)
    for name, dataset in splits.items():
        with naming_split(name):
            if "input_ids" not in dataset.column_names:
                names = dataset.column_names
                raise ValueError(
                    f"no column 'input_ids' among {', '.join(names)}{suggestion('input_ids', names)}; tokenize before "
                    f"packing, or let it be done here: --text-column NAME --tokenizer FOLDER_OR_NAME{_hint(dataset)}"
                )
    return splits


def _tokenized(splits: dict, arguments: Namespace, num_proc: int, cache: Path | None) -> dict:
    """The splits with tokens. The tokenizer, which takes long to load, comes after all that can be seen without."""
    from packing.packers.table import checked_length
    from packing.source.text import check_texts, open_tokenizer, tokenize

    texts = [name for name in (arguments.text_column, arguments.text_pair_column) if name is not None]
    for name, dataset in splits.items():
        with naming_split(name):
            check_texts(dataset, texts)
    longest = None
    if getattr(arguments, "overlong", None) == "error":
        longest = checked_length(arguments.max_sequence_length)
    tokenizer = open_tokenizer(arguments.tokenizer)
    tokenized = {}
    for name, dataset in splits.items():
        with naming_split(name):
            tokenized[name] = tokenize(
                dataset, tokenizer, texts, arguments.keep_text, num_proc, longest=longest, cache=cache
            )
    return tokenized


def _hint(dataset) -> str:
    """Where the rows may be, if a source is one JSON object that holds them (GeoJSON, SQuAD)."""
    from packing.source.json_rows import describe_object

    if len(dataset) != 1:
        return ""
    row = dataset[0]
    holds_rows = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values())
    return f" (the source is {describe_object(row)})" if holds_rows else ""


@contextmanager
def naming_split(name: str) -> Iterator[None]:
    """Errors name the split that they come from."""
    try:
        yield
    except SourceError as error:
        error.split = name
        raise
    except ValueError as error:
        raise ValueError(f"split {name!r}: {error}" if name else str(error)) from None


def title(split: str) -> str:
    """What stands before the first line that is printed about a split."""
    return f"{split}: " if split else ""
