"""SOURCE and the options that say how to read it -> splits with input_ids, or histograms of lengths."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from packing.command.parser import Parser, add_options
from packing.files.errors import Option, OptionError, in_split, whole_number
from packing.source.formats import endings
from packing.source.open import OpenedSource, TextOptions, open_sequences

if TYPE_CHECKING:
    import numpy as np

    from packing.source.text import Run

logger = logging.getLogger(__name__)

READING = ("overlong", "token_columns", "pad_token_id", "num_proc")
TEXT_OPTIONS = tuple(each.name for each in fields(TextOptions))
LENGTH_FILES = "or a file of lengths (.txt, .csv, .json, .npy, .npz)"

SOURCES = f"""\
SOURCE is one of:
  tokenized                a folder of save_to_disk
  rows.parquet             a file: {endings()}
                           (also .gz of {endings(compressed=True)})
  data                     a folder of such files, all of one kind
  'data/train-*.parquet'   a glob, in quotes
  owner/name               a dataset of the hub; owner/name:config where it has several
  s3://bucket/data         files, folders and globs at a URL of any file system that fsspec knows
Rows hold tokens in the column input_ids, or texts in --text-column (by default the only column of strings), which
--tokenizer tokenizes. Each document of a .txt file becomes a sequence; --documents says what a document is.
Each split is packed into its own folder TARGET/<split>; files named for train, validation and test are splits.
The folder HF_DATASETS_CACHE keeps converted files, copies of URLs and the tokens of texts.
"""


def add_source(parser: Parser, more: str = "see below") -> None:
    """The argument SOURCE."""
    parser.add_argument("source", metavar="SOURCE", help=f"sequences or texts to read; {more}")


def add_text_options(parser: Parser) -> None:
    """Which texts become sequences, and by which tokenizer."""
    add_options(parser, TEXT_OPTIONS, TextOptions)


def add_reading_options(parser: Parser) -> None:
    """The options that say how to read rows."""
    add_options(parser, READING)
    add_text_options(parser)


def check_text_options(arguments: Namespace) -> None:
    """Raise ValueError for a column of texts without a tokenizer, and for options that need either one."""
    if arguments.text_column is None:
        unused = ("text_pair_column",) if arguments.tokenizer is not None else ("text_pair_column", "keep_text")
        refuse_ignored(arguments, unused, "there is no --text-column")
    elif arguments.tokenizer is None:
        raise ValueError("--text-column needs --tokenizer: a folder that save_pretrained wrote, or a name on the hub")
    if arguments.text_pair_column is not None and getattr(arguments, "overlong", None) == "truncate":
        raise ValueError(
            "--overlong truncate would cut only the second text of a pair; choose split or drop, or raise "
            "--max-sequence-length"
        )


def refuse_ignored(arguments: Namespace, unused: Sequence[str], why: str) -> None:
    """Raise ValueError for a given option that this source does not use."""
    for name in unused:
        value = getattr(arguments, name, arguments.defaults.get(name))
        if value != arguments.defaults.get(name):
            given = Option(name) if value is True else Option(name, value)
            raise OptionError(f"{given} would be ignored: {why}; leave it out")


def is_lengths(arguments: Namespace) -> bool:
    """Whether SOURCE is a file of lengths, not of rows or texts."""
    from packing.source.lengths import holds_lengths

    asked_for_texts = arguments.tokenizer is not None or arguments.text_column is not None
    return Path(arguments.source).is_file() and holds_lengths(arguments.source, asked_for_texts)


def load_histograms(arguments: Namespace) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (split, histogram), cut to max_sequence_length; "" is a source without splits."""
    from packing.packers.table import checked_length
    from packing.source.lengths import cut_histogram, dataset_histogram, read_histogram

    longest, overlong = checked_length(arguments.max_sequence_length), arguments.overlong
    if is_lengths(arguments):
        unused = (
            *(name for name in READING if name != "overlong"),
            *TEXT_OPTIONS,
            "seed",
            "balance",
            "cohort",
            "cohort_lanes",
        )
        refuse_ignored(arguments, unused, "a file of lengths holds no rows")
        histogram = read_histogram(arguments.source)
        if count := int(histogram[longest + 1 :].sum()):
            logger.warning("%d sequences have more than %d tokens: overlong=%r", count, longest, overlong)
        yield "", cut_histogram(histogram, longest, overlong)
        return
    check_text_options(arguments)
    read = {name: getattr(arguments, name) for name in READING}
    for name, dataset in load_sequences(arguments).splits.items():
        with in_split(name):
            histogram = dataset_histogram(dataset, longest, logger.warning, **read)
        yield name, histogram


def load_sequences(arguments: Namespace, cache: Path | None = None, run: Run | None = None) -> OpenedSource:
    """The splits of SOURCE, with input_ids; a Dataset without splits is {"": Dataset}.

    cache: the folder for converted files and tokens; None: the cache of the datasets library.
    run: who tokenizes; None: num_proc processes."""
    from packing.packers.table import checked_length

    longest = None
    if getattr(arguments, "overlong", None) == "error":
        longest = checked_length(arguments.max_sequence_length)
    return open_sequences(
        arguments.source,
        TextOptions(**{name: getattr(arguments, name) for name in TEXT_OPTIONS}),
        whole_number("num_proc", arguments.num_proc),
        longest=longest,
        cache=cache,
        run=run,
        say=lambda words: print(f"pack-dataset: {words}", file=sys.stderr),
    )


def title(split: str) -> str:
    """The beginning of what is printed about a split."""
    return f"{split}: " if split else ""
