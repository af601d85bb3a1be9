"""How long sequences are, from a file or a dataset: source -> histogram. Packing is planned on nothing else.

lengths: one whole number a sequence                    histogram: how many sequences have each length
    .txt   one a line: 12⏎ 7⏎ 7⏎
    .csv   a column `length`, or a column alone             .csv   columns `length` and `count`, or two columns alone
    .json  [12, 7, 7]                                       .json  {"7": 2, "12": 1}
    .npy   (sequences,) integers                            .npy   (lengths, 2): a row is length, count
    .npz   an array `lengths`                               .npz   an array `histogram`, indexed by length
"""

from __future__ import annotations

import csv
import json
import re
import warnings
import zipfile
from collections.abc import Callable
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from packing.files.errors import Option, OptionError, check_known
from packing.histogram import length_histogram
from packing.options import OVERLONG, PackOptions
from packing.source.json_rows import check_depth
from packing.source.sequences import OVERLONG_CURE

if TYPE_CHECKING:
    import datasets

# The data of arXiv 2107.02027; packing/data/README.md says where it comes from.
PUBLISHED = {"wikipedia": "wikipedia_bert_512.csv", "squad": "squad_1_1_384.csv"}


def published_histogram(name: str) -> np.ndarray:
    """The histogram of the paper's "wikipedia" (513,) or "squad" (385,): int64, indexed by length."""
    check_known("histogram", name, PUBLISHED)
    with resources.as_file(resources.files("packing") / "data" / PUBLISHED[name]) as path:
        return read_histogram(path)


def read_histogram(path: str | PathLike) -> np.ndarray:
    """Read a file of lengths or of a histogram, by its ending: (longest + 1,) int64, indexed by length.

    The longest is the longest that is listed, even if its count is 0. Raises ValueError, naming the file and the first
    thing in it that is wrong.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{str(path)!r} ends in none of {', '.join(READERS)}: the ending says how to read lengths")
    try:
        histogram = READERS[path.suffix.lower()](path)
        if not histogram.any():
            raise ValueError("it counts no sequence")
    except (ValueError, UnicodeDecodeError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise ValueError(f"cannot read lengths from {str(path)!r}: {error}") from None
    return histogram


def holds_lengths(file: str | PathLike, may_hold_text: bool = False) -> bool:
    """Whether a file is one of lengths, and not of rows or texts: by its ending and by how it starts.

    .json   [12, 7, …   {"12": 1, …     lengths     [{"input_ids": …   {"input_ids": …   ["a", …   rows
    .csv    length,count   12,3         lengths     any other first line                 rows
    .txt    12 in its first line        lengths     words                                text

    may_hold_text: texts were asked for: a .csv or a .txt holds them, whatever it looks like.
    """
    path = Path(file)
    ending = path.suffix.lower()
    if ending not in READERS or (may_hold_text and ending in (".csv", ".txt")):
        return False
    if ending in (".npy", ".npz"):
        return True
    with path.open("rb") as opened:
        start = opened.read(1 << 16).decode("utf-8-sig", "replace")
    if ending == ".json":
        return re.match(r'\s*(\[\s*["{]|\{\s*"(?!\s*\d+\s*"\s*:))', start) is None
    if ending == ".csv":
        names = [name.strip(' "').lower() for name in start.partition("\n")[0].strip().split(",")]
        return "length" in names or all(name.isdecimal() for name in names)
    return re.match(r"(\s*#.*\n)*\s*[-+]?\d[-+.\d \t\r]*($|\n|#)", start) is not None


def dataset_histogram(
    dataset: datasets.Dataset, max_sequence_length: int, say: Callable[[str], None] = lambda said: None, **options: Any
) -> np.ndarray:
    """What pack_dataset would plan on: (max_sequence_length + 1,) int64, read from list offsets, not from tokens.

    say: called with each sentence about what is lost. options: of PackOptions, such as overlong."""
    from packing.source.rows import read_source
    from packing.source.sequences import cut_sequences, losses

    asked = PackOptions(max_sequence_length=max_sequence_length, **options)
    source = read_source(dataset, asked.token_columns, asked.pad_token_id)
    sequences = cut_sequences(source, asked.max_sequence_length, asked.overlong)
    for sentence in losses(source, sequences, asked):
        say(sentence)
    return length_histogram(sequences.lengths, asked.max_sequence_length)


def cut_histogram(histogram: np.ndarray, max_sequence_length: int, overlong: str = "error") -> np.ndarray:
    """What pack_dataset's `overlong` makes of longer lengths: (max_sequence_length + 1,) int64.

    [0, 0, 1, 0, 0, 3] with max_sequence_length=3, three sequences of length 5:
    truncate [0, 0, 1, 3]    split [0, 0, 4, 3]    drop [0, 0, 1, 0]    error: ValueError
    """
    kept = np.zeros(max_sequence_length + 1, np.int64)
    kept[: len(histogram)] = histogram[: max_sequence_length + 1]
    lengths = max_sequence_length + 1 + np.flatnonzero(histogram[max_sequence_length + 1 :])
    if not len(lengths):
        return kept
    counts = histogram[lengths]
    check_known("overlong", overlong, OVERLONG)
    if overlong == "error":
        what = f"{counts.sum()} sequences are longer than {Option('max_sequence_length', max_sequence_length)}"
        raise OptionError(f"{what}, up to {lengths[-1]} tokens; {OVERLONG_CURE}")
    if overlong == "truncate":
        kept[max_sequence_length] += counts.sum()
    elif overlong == "split":
        kept[max_sequence_length] += (counts * (lengths // max_sequence_length)).sum()
        np.add.at(kept, lengths % max_sequence_length, counts)
        kept[0] = 0  # a length that splits evenly has no rest
    if not kept.any():
        limit = Option("max_sequence_length", max_sequence_length)
        raise OptionError(f"every sequence is longer than {limit}; nothing is left")
    return kept


# One reader an ending: path -> histogram.


def _read_text(path: Path) -> np.ndarray:
    table = _load_numbers(path, ndmin=2)
    if table.size and table.shape[1] > 1:
        raise ValueError(f"it has {table.shape[1]} numbers in a line; give one length a line, or a .csv")
    return length_histogram(table.ravel())


def _read_csv(path: Path) -> np.ndarray:
    """With a header, the columns that it names; without one, the columns in this order: length, count."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = [name.strip().lower() for name in next(csv.reader(file), [])]
    if not names:
        raise ValueError("it is empty")
    has_header = not all(name.isdecimal() for name in names)
    if has_header and "length" not in names:
        raise ValueError(f"its header {', '.join(names)} names no column `length`")
    if not has_header and len(names) > 2:
        raise ValueError(f"it has {len(names)} columns and no header; name the columns `length` and `count`")
    names = names if has_header else ["length", "count"][: len(names)]
    columns = [names.index(name) for name in ("length", "count") if name in names]
    form = {"delimiter": ",", "quotechar": '"', "comments": None}  # other columns may hold text: "a, b", C#
    table = _load_numbers(path, skiprows=int(has_header), usecols=columns, ndmin=2, **form)
    return _from_counts(table) if len(columns) == 2 else length_histogram(table[:, 0])


def _read_json(path: Path) -> np.ndarray:
    content = path.read_bytes()
    check_depth(content)
    content = json.loads(content.decode("utf-8"))
    if isinstance(content, list):
        return length_histogram(content)
    if not isinstance(content, dict):
        raise ValueError("it holds neither a list of lengths nor an object of counts per length")
    return _from_counts([[int(length), count] for length, count in content.items()])


def _read_npy(path: Path) -> np.ndarray:
    array = np.load(path, allow_pickle=False)
    if array.ndim == 1 and array.dtype.kind in "iu" and array[:1].tolist() == [0]:
        raise ValueError(
            "its first number is 0, and a length is at least 1. Flat arrays are lengths, one a sequence; a histogram "
            "that is indexed by length goes into an .npz, as its array `histogram`"
        )
    return _from_counts(array) if array.ndim == 2 else length_histogram(array)


def _read_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        found = [name for name in ("lengths", "histogram") if name in arrays.files]
        if len(found) != 1:
            raise ValueError(f"it holds {', '.join(arrays.files)}; name one array `lengths` or `histogram`")
        array = arrays[found[0]]
    if found == ["lengths"]:
        return length_histogram(array)
    if array.ndim != 1:
        raise ValueError(f"its array `histogram` has shape {array.shape}; it must be flat, indexed by length")
    pairs = np.stack([np.arange(array.size, dtype=array.dtype), array], axis=1)
    return _from_counts(pairs if array[:1].any() else pairs[1:])  # length 0 is refused, not left out


READERS = {".txt": _read_text, ".csv": _read_csv, ".json": _read_json, ".npy": _read_npy, ".npz": _read_npz}


def _load_numbers(path: Path, **form: Any) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty file is an error of its own
        return np.loadtxt(path, np.int64, encoding="utf-8-sig", **form)


def _from_counts(table: ArrayLike) -> np.ndarray:
    """(n, 2) lengths and their counts -> histogram. If a length stands there twice, its counts add up."""
    array = np.asarray(table)
    if not array.size:
        raise ValueError("it counts no sequence")
    if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"lengths and counts must be two columns of whole numbers, not {array.dtype} {array.shape}")
    lengths, counts = array.astype(np.int64).T
    if lengths.min() < 1:
        raise ValueError(f"it lists length {lengths.min()}, but a length is at least 1; leave it out")
    if counts.min() < 0:
        raise ValueError(f"it counts {counts.min()} sequences of length {lengths[counts.argmin()]}")
    histogram = np.zeros(lengths.max() + 1, np.int64)
    np.add.at(histogram, lengths, counts)
    return histogram
