"""Reading a tokenized dataset: which columns hold one value per token, and where each row's tokens lie.

Padding is trimmed where the source says what it is, and refused where it looks like padding that nobody mentions:

attention_mask [0 1 1 1 0 0] -> 1 token skipped at the front, 3 kept        [1 1 0 1] -> refused: a hole
pad_token_id=0 [5 6 7 0 0 0] -> 0 skipped, 3 kept
neither        [[5 6 0 0] [5 0 0 0]] -> refused: every row has one length, and 0 occurs only in runs at the end
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from packing.files.errors import Option, SourceError, suggestion
from packing.numba_tools import njit
from packing.options import checked_pad_token_id
from packing.source.source_files import SourceFiles
from packing.source.token_column import Values, chosen_rows, is_list, null_rows, open_lists, read_lists, refuse_broken

if TYPE_CHECKING:
    import datasets

    from packing.source.token_column import TokenColumn

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"  # says where padding is; never stored

# Columns that packing adds, and those that the collator makes for each batch.
RESERVED = (
    *("sequence_lengths", "sequence_indices", "sequence_starts"),
    *("sequence_cohorts", "sequence_rounds", "sequence_lanes"),
    *("sequence_ids", "position_ids", "cls_positions"),
)

NONE = -1  # no row
WITHOUT = f"give {Option('token_columns')} without it"


@dataclass(frozen=True, eq=False)
class SourceColumns:
    """A dataset's columns, as they are gathered from. Opened in a moment, in any process: see open_columns.

    rows: the dataset's own choice of rows in its tables (after select, shuffle, filter); None = all, in order.
    token_columns: one value per token, input_ids first.
    row_columns: all others but attention_mask, one value per row of the tables.
    files: that the tables lie in.
    """

    table: pa.Table
    rows: np.ndarray | None
    token_columns: tuple[TokenColumn, ...]
    row_columns: dict[str, Values]
    files: SourceFiles


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset's rows, as packing sees them. A row's tokens without padding are `kept` tokens after `skipped`.

    Memory: 4 bytes a row for `kept`, and 4 for `skipped` where there is padding.

    skipped: (rows,) int32; None: no row has padding in front.
    kept: (rows,) int32.
    trimmed_rows, trimmed_tokens: rows with padding, and the padding tokens in all of them.
    ends_alike: whether rows, without padding, end in one token: all of them (True) or those that are True in an array
        of (rows,). None: nobody has looked yet.
    """

    columns: SourceColumns
    skipped: np.ndarray | None
    kept: np.ndarray
    trimmed_rows: int
    trimmed_tokens: int
    ends_alike: bool | np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return len(self.kept)

    @property
    def input_ids(self) -> TokenColumn:
        return self.columns.token_columns[0]


def open_columns(dataset: datasets.Dataset, tokens: Sequence[str], files: SourceFiles | None = None) -> SourceColumns:
    """The columns of a dataset that read_source has checked; tokens: names of its token columns, input_ids first.

    files: the dataset's, as they were before it was read; None: as they are now."""
    table, rows = dataset.data, chosen_rows(dataset)
    columns = tuple(open_lists(name, table.column(name), rows) for name in tokens)
    names = [name for name in table.column_names if name not in (ATTENTION_MASK, *tokens)]
    row_columns = {name: Values.of(table.column(name).chunks, table.column(name).type) for name in names}
    return SourceColumns(table, rows, columns, row_columns, files or SourceFiles.of(dataset))


def read_source(
    dataset: datasets.Dataset,
    token_columns: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    may_look_padded: bool = False,
) -> Source:
    """Check a dataset and find its tokens; nothing is copied.

    token_columns: None takes the columns whose rows are as long as those of input_ids, in every row.
    pad_token_id: trim this token at the ends of rows; only for a source without attention_mask.
    may_look_padded: whether rows that look padded are taken as they are.
    Raises SourceError, naming the row and the column, for what cannot be packed.
    """
    check_source(dataset)
    table, rows, files = dataset.data, chosen_rows(dataset), SourceFiles.of(dataset)
    for name in table.column_names:
        files.check()
        if name != INPUT_IDS:  # its rows are checked one by one
            refuse_broken(name, table.column(name))
    input_ids = read_lists(INPUT_IDS, table.column(INPUT_IDS), rows)
    lengths = _read_lengths(input_ids)
    names = _names(table, rows, lengths, token_columns)
    for name in names:
        files.check()
        read_lists(name, table.column(name), rows)  # raises for nulls
    columns, skipped, kept = open_columns(dataset, (INPUT_IDS, *names), files), None, lengths
    if ATTENTION_MASK in table.column_names:
        if pad_token_id is not None:
            given = Option("pad_token_id", pad_token_id)
            what = f"{given} was given, but the column attention_mask says already where padding is"
            raise SourceError(what, cure="leave it out, or remove the column")
        skipped, kept = _trim(_read_mask(table.column(ATTENTION_MASK), rows, lengths), 0)
    elif pad_token_id is not None:
        skipped, kept = _trim(input_ids, checked_pad_token_id(pad_token_id))
    elif not may_look_padded:
        refuse_padding(input_ids, lengths)
    trimmed_rows = 0 if kept is lengths else int(np.count_nonzero(kept != lengths))
    trimmed_tokens = int(lengths.sum(dtype=np.int64) - kept.sum(dtype=np.int64)) if trimmed_rows else 0
    return Source(columns, skipped, kept, trimmed_rows, trimmed_tokens)


def last_tokens(source: Source) -> Iterator[np.ndarray]:
    """The last token of every row, without padding, some rows at a time."""
    for block in source.input_ids.blocks():
        skipped = 0 if source.skipped is None else source.skipped[block.rows]
        yield source.input_ids.numbers()[block.starts + skipped + source.kept[block.rows] - 1]


def closing_token(source: Source) -> int | None:
    """The token that all rows, without padding, end in; None: they differ."""
    closing = next(last_tokens(source))[0]
    return int(closing) if all((found == closing).all() for found in last_tokens(source)) else None


def check_source(dataset: datasets.Dataset) -> None:
    """What can be checked without a look at rows: there are some, and input_ids, and no name that packing needs."""
    if not len(dataset):
        raise SourceError("the dataset is empty: it has no rows to pack")
    table = dataset.data
    columns = table.column_names
    if {"sequence_lengths", "sequence_indices"} <= set(columns):
        what = "the dataset is packed already: it has the columns sequence_lengths and sequence_indices"
        raise SourceError(what, cure="pack its source instead")
    taken = [name for name in RESERVED if name in columns]
    if taken:
        raise SourceError("has a reserved name: packing makes this column", column=taken[0], cure="remove or rename it")
    check_has_tokens(dataset)
    type_ = table.column(INPUT_IDS).type
    if not is_list(type_) or not pa.types.is_integer(type_.value_type):
        cure = "it must be a list of integers: tokenize before packing"
        raise SourceError(f"holds {type_}", column=INPUT_IDS, cure=cure)


def check_has_tokens(dataset: datasets.Dataset, also: str = "") -> None:
    """Raise SourceError without a column input_ids. also: the end of the cure."""
    names = dataset.column_names
    if INPUT_IDS not in names:
        what = f"no column 'input_ids' among {', '.join(names) or 'no columns'}{suggestion(INPUT_IDS, names)}"
        raise SourceError(what, cure=f"tokenize before packing{also}")


def _read_lengths(input_ids: TokenColumn) -> np.ndarray:
    """(rows,) int32 tokens in each row; at least 1."""
    lengths = np.empty(input_ids.num_rows, np.int32)
    for block in input_ids.blocks():
        if not block.lengths.all():
            row = block.first + int(np.argmin(block.lengths != 0))
            raise SourceError("has length 0: its input_ids are empty", row=row, cure="filter out such rows first")
        if (most := block.lengths.max()) >= 2**31:
            row = block.first + int(np.argmax(block.lengths))
            raise SourceError(f"has {most:,} tokens, more than 2**31 - 1", row=row, cure="cut it into several first")
        lengths[block.rows] = block.lengths
    return lengths


def _names(table: pa.Table, rows: np.ndarray | None, lengths: np.ndarray, wanted: Sequence[str] | None) -> list[str]:
    """The token-level columns besides input_ids and attention_mask."""
    candidates = [c for c in table.column_names if c not in (INPUT_IDS, ATTENTION_MASK)]
    if wanted is None:
        return [c for c in candidates if _is_token_level(c, table.column(c), rows, lengths)]
    for name in wanted:
        if name not in table.column_names:
            others = f"{', '.join(table.column_names)}{suggestion(name, table.column_names)}"
            raise SourceError(f"{Option('token_columns')} names {name!r}, which is not among {others}")
        column = table.column(name)
        if not is_list(column.type):
            what = f"names {name!r}, which holds {column.type} and no list of one value per token"
            raise SourceError(f"{Option('token_columns')} {what}")
        _refuse_other_lengths(open_lists(name, column, rows), lengths)
    return [c for c in candidates if c in wanted]


def _is_token_level(name: str, column: pa.ChunkedArray, rows: np.ndarray | None, lengths: np.ndarray) -> bool:
    """Whether every row is as long as input_ids. Where only rows without a value differ, nobody can tell: refused.

    Refused as well if most rows are as long, but not all: that is no list per sequence, but one value per token gone
    wrong in some rows.
    """
    if not is_list(column.type):
        return False
    opened = open_lists(name, column, rows)
    if not column.null_count:
        alike, row, length = _compare_lengths(opened, lengths)
        if len(lengths) > alike > len(lengths) / 2:
            raise SourceError(
                f"has {length} values, where input_ids has {lengths[row]}, but as many as input_ids in most rows",
                column=name,
                row=row,
                cure=f"{WITHOUT} if it is a list for each sequence, make it one value per token, or leave the row out",
            )
        return alike == len(lengths)
    same, missing = opened.lengths == lengths, null_rows(column, rows)
    if missing.any() and not missing.all() and (same | missing).all():
        what, row = "has no value (null), and one value per token in other rows", int(np.argmax(missing))
        cure = f"fill it in, leave the row out, or {WITHOUT} to keep it as a list per pack"
        raise SourceError(what, column=name, row=row, cure=cure)
    return bool(same.all())


def _compare_lengths(column: TokenColumn, lengths: np.ndarray) -> tuple[int, int, int]:
    """How many rows are as long as input_ids; the first other row and its length, where there is one."""
    alike, row, length = 0, NONE, 0
    for block in column.blocks():
        same = block.lengths == lengths[block.rows]
        alike += int(np.count_nonzero(same))
        if row == NONE and not same.all():
            place = int(np.argmin(same))
            row, length = block.first + place, int(block.lengths[place])
    return alike, row, length


def _refuse_other_lengths(column: TokenColumn, lengths: np.ndarray) -> None:
    _, row, length = _compare_lengths(column, lengths)
    if row != NONE:
        what = f"has {length} values, where input_ids has {lengths[row]}"
        raise SourceError(what, column=column.name, row=row, cure="a token-level column has one value per token")


def _read_mask(column: pa.ChunkedArray, rows: np.ndarray | None, lengths: np.ndarray) -> TokenColumn:
    type_ = column.type
    if not is_list(type_) or not (pa.types.is_integer(type_.value_type) or pa.types.is_boolean(type_.value_type)):
        raise SourceError(f"holds {type_}", column=ATTENTION_MASK, cure="it must be a list of 0 and 1 for each token")
    if pa.types.is_boolean(type_.value_type):
        column = column.cast(pa.large_list(pa.uint8()))  # bits have no address of their own
    mask = read_lists(ATTENTION_MASK, column, rows)
    _refuse_other_lengths(mask, lengths)
    return mask


def _trim(column: TokenColumn, padding: int) -> tuple[np.ndarray | None, np.ndarray]:
    """What a Source has as skipped and kept, where `padding` at the ends of rows is padding: 0 in a mask, or a token.

    Raises SourceError for a row of padding alone, and for a mask with anything but 1 between its ends."""
    skipped, kept = np.empty(column.num_rows, np.int32), np.empty(column.num_rows, np.int32)
    is_mask, values = column.name == ATTENTION_MASK, column.numbers()
    for block in column.blocks():
        _trim_ends(values, block.starts, block.lengths, padding, skipped[block.rows], kept[block.rows])
        if is_mask:
            begins = block.starts + skipped[block.rows]
            _refuse_holes(values, block.first, begins, kept[block.rows])
    if not kept.all():
        reason = "attention_mask is 0" if is_mask else f"input_ids is {Option('pad_token_id', padding)}"
        what = f"is nothing but padding: {reason} everywhere"
        raise SourceError(what, row=int(np.argmin(kept != 0)), cure="leave the row out")
    return skipped if skipped.any() else None, kept


def _refuse_holes(mask: np.ndarray, first: int, begins: np.ndarray, kept: np.ndarray) -> None:
    """Raise SourceError unless all that is kept of a mask is 1. first: the number of the first row."""
    row = _first_not_one(mask, begins, kept)
    if row == NONE:
        return
    if np.isin(mask[begins[row] : begins[row] + kept[row]], (0, 1)).all():
        what = "has zeros between ones, and padding can only be at the ends of a row"
        cure = "remove the masked tokens, or the column attention_mask if they are to be attended to"
    else:
        what = "has values other than 0 and 1"
        cure = "if they number several sequences in one row, split the row into its sequences before packing"
    raise SourceError(what, column=ATTENTION_MASK, row=first + row, cure=cure)


def refuse_padding(input_ids: TokenColumn, lengths: np.ndarray) -> None:
    """Raise ValueError if the rows look padded: packed as they are they would fill a pack each, and nobody would know.

    1. There are several rows, and all have one length.
    2. The token that most rows end in twice or more is the suspect (then the same for the rows' beginnings).
    3. It occurs nowhere else, and no row consists of it alone.
    4. Every row ends in it twice or more, or two rows end in different numbers of it.

    lengths: of the rows. Memory, where all are alike: some 40 bytes a row for the moment.
    """
    if len(lengths) < 2 or lengths[0] < 2 or lengths.min() != lengths.max():
        return
    tokens, starts, length = input_ids.numbers(), input_ids.starts, int(lengths[0])
    for side, first, step in (("end", starts + length - 1, -1), ("begin", starts, 1)):
        suspect = _most_repeated(tokens[first], tokens[first + step])
        if suspect is None:
            continue
        runs = np.zeros(len(starts), np.int64)
        if not _count_runs(tokens, first, step, length, suspect, runs):
            continue
        if runs.min() >= 2 or len(np.unique(runs[runs > 0])) > 1:
            culprit = int(np.argmax(runs))
            raise SourceError(
                f"the source looks padded: all {len(lengths)} rows have {length} tokens, and "
                f"{np.count_nonzero(runs)} of them {side} with token {suspect} "
                f"(row {culprit} with {runs[culprit]} of it), which occurs nowhere else",
                cure=f"tokenize without padding, keep the column attention_mask, or give {Option('pad_token_id')}, the "
                f"token to trim (if {suspect} is not padding, give the true id)",
            )


def _most_repeated(outer: np.ndarray, inner: np.ndarray) -> int | None:
    """The token that is most often the last of a row and the one before it, too."""
    values, counts = np.unique(outer[outer == inner], return_counts=True)
    return int(values[np.argmax(counts)]) if len(values) else None


@njit(cache=True, nogil=True)
def _trim_ends(values, starts, lengths, padding, skipped, kept):
    """Fill skipped and kept: `padding` is trimmed at both ends of a row."""
    for row in range(len(starts)):
        first, end = starts[row], starts[row] + lengths[row]
        while first < end and values[first] == padding:
            first += 1
        while end > first and values[end - 1] == padding:
            end -= 1
        skipped[row], kept[row] = first - starts[row], end - first


@njit(cache=True, nogil=True)
def _first_not_one(mask, begins, counts):
    """The first row with a value other than 1, or NONE."""
    one = np.uint64(1)
    for row in range(len(begins)):
        first, other = np.uint64(begins[row]), np.uint64(0)
        for i in range(np.uint64(counts[row])):
            other |= np.uint64(mask[first + i]) ^ one
        if other != 0:
            return row
    return NONE


@njit(cache=True, nogil=True)
def _count_runs(tokens, first, step, length, suspect, runs):
    """Fill runs: how often the suspect repeats from `first` on, going by `step`.

    False if it occurs after its run, or fills a row."""
    for row in range(len(first)):
        run = 0
        while run < length and tokens[first[row] + step * run] == suspect:
            run += 1
        if run == length:
            return False
        for i in range(run, length):
            if tokens[first[row] + step * i] == suspect:
                return False
        runs[row] = run
    return True
