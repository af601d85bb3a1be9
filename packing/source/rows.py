"""Reading a tokenized dataset: which columns hold one value per token, and where each row's tokens lie."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numba import config

from packing.numba_tools import njit
from packing.source.padding import refuse_padding, trim_by_mask, trim_by_token
from packing.source.source_files import SourceFiles
from packing.source.token_column import (
    TokenColumn,
    TokenRows,
    Values,
    is_list,
    list_lengths,
    null_rows,
    open_token_column,
    read_token_column,
)

logger = logging.getLogger(__name__)

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"  # says where padding is; never stored

# Columns that packing adds, and those that the collator makes for each batch.
RESERVED = ("sequence_lengths", "sequence_indices", "sequence_starts", "sequence_ids", "position_ids", "cls_positions")

ROWS_PER_THREAD = 1 << 14  # of ids that are looked at: for fewer a thread is not worth its start

AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


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
    ends_alike: whether all rows, without padding, end in one token; None: nobody has looked yet.
    """

    columns: SourceColumns
    skipped: np.ndarray | None
    kept: np.ndarray
    trimmed_rows: int
    trimmed_tokens: int
    ends_alike: bool | None = None

    @property
    def num_rows(self) -> int:
        return len(self.kept)

    @property
    def input_ids(self) -> TokenColumn:
        return self.columns.token_columns[0]


def open_columns(dataset, token_columns: Sequence[str]) -> SourceColumns:
    """The columns of a datasets.Dataset that read_source has checked; token_columns: their names, input_ids first."""
    table, rows = dataset.data, chosen_rows(dataset)
    columns = tuple(open_token_column(name, table.column(name), rows) for name in token_columns)
    names = [name for name in table.column_names if name not in (ATTENTION_MASK, *token_columns)]
    row_columns = {name: Values.of(table.column(name).chunks, table.column(name).type) for name in names}
    return SourceColumns(table, rows, columns, row_columns, SourceFiles.of(dataset))


def read_source(dataset, token_columns: Sequence[str] | None = None, pad_token_id: int | None = None) -> Source:
    """Check a datasets.Dataset and find its tokens; nothing is copied.

    token_columns: None takes the columns whose rows are as long as those of input_ids, in every row.
    pad_token_id: trim this token at the ends of rows; only for a source without attention_mask.
    """
    source = look_at_rows(dataset, token_columns, pad_token_id)
    say_trimmed(source, pad_token_id)
    return source


def look_at_rows(dataset, token_columns: Sequence[str] | None, pad_token_id: int | None) -> Source:
    """read_source, which says nothing."""
    check_source(dataset)
    table, rows, files = dataset.data, chosen_rows(dataset), SourceFiles.of(dataset)
    for name in table.column_names:
        files.check()
        if name != INPUT_IDS:  # whose rows are looked at one by one
            refuse_broken(name, table.column(name))
    input_ids = read_token_column(INPUT_IDS, table.column(INPUT_IDS), rows)
    lengths = _read_lengths(input_ids)
    names = _token_names(table, rows, lengths, token_columns)
    for name in names:
        files.check()
        read_token_column(name, table.column(name), rows)  # raises for nulls
    columns = open_columns(dataset, (INPUT_IDS, *names))
    skipped, kept = _trim(table, rows, input_ids, lengths, pad_token_id)
    trimmed_rows = trimmed_tokens = 0
    if kept is not lengths:
        trimmed_rows = int(np.count_nonzero(kept != lengths))
        trimmed_tokens = int(lengths.sum(dtype=np.int64) - kept.sum(dtype=np.int64))
    return Source(columns, skipped, kept, trimmed_rows, trimmed_tokens)


def refuse_foreign_ids(source: Source) -> None:
    """Raise ValueError for a token id that is no int32 from 0 on; padding is not looked at."""
    input_ids = source.input_ids
    type_ = input_ids.value_type
    least = 1 << (31 if type_.bit_width >= 32 else type_.bit_width - 1)  # the lowest id to refuse, without its sign
    if pa.types.is_unsigned_integer(type_) and type_.bit_width < 32:
        return
    for block in input_ids.blocks():
        source.columns.files.check()
        part = slice(block.first, block.first + len(block.starts))
        begins = block.starts if source.skipped is None else block.starts + source.skipped[part]
        row = _first_foreign_of_all(input_ids.tokens, begins, source.kept[part], least)
        if row >= 0:
            tokens = input_ids.numbers()[begins[row] : begins[row] + source.kept[part][row]]
            place = int(np.argmax((tokens < 0) | (tokens >= least)))
            raise ValueError(
                f"row {block.first + row} has the token id {tokens[place]} (its token {place}); ids are from 0 to "
                "2**31 - 1: tokenize anew, or leave the row out (if it marks padding, give it as pad_token_id)"
            )


def _first_foreign_of_all(tokens: np.ndarray, begins: np.ndarray, counts: np.ndarray, least: int) -> int:
    """_first_foreign, by several threads: one alone does not read as fast as memory gives."""
    threads = max(1, min(config.NUMBA_NUM_THREADS, len(begins) // ROWS_PER_THREAD))
    bounds = [len(begins) * i // threads for i in range(threads + 1)]

    def first(part: tuple[int, int]) -> int:
        row = _first_foreign(tokens, begins[slice(*part)], counts[slice(*part)], least)
        return -1 if row < 0 else part[0] + row

    if threads == 1:
        return first((0, len(begins)))
    with ThreadPoolExecutor(threads) as pool:
        return next((row for row in pool.map(first, pairwise(bounds)) if row >= 0), -1)


@njit(cache=True, nogil=True)
def _first_foreign(tokens, begins, counts, least):
    """The first row with a token that is `least` or more without its sign, or -1."""
    for row in range(len(begins)):
        first, bits = np.uint64(begins[row]), np.uint64(0)
        for i in range(np.uint64(counts[row])):
            bits |= np.uint64(tokens[first + i])
        if bits >= np.uint64(least):
            return row
    return -1


def say_trimmed(source: Source, pad_token_id: int | None) -> None:
    """Log how much padding was trimmed, if any, and by what it was known."""
    if source.trimmed_rows:
        logger.warning(
            "%d padding tokens trimmed from %d of %d rows (%s)",
            source.trimmed_tokens,
            source.trimmed_rows,
            source.num_rows,
            f"pad_token_id={pad_token_id}" if pad_token_id is not None else "attention_mask 0",
        )


def closing_token(source: Source) -> int | None:
    """The token that all rows, without padding, end in; None: they differ."""
    tokens, closing = source.input_ids.numbers(), None
    for block in source.input_ids.blocks():
        part = slice(block.first, block.first + len(block.starts))
        skipped = 0 if source.skipped is None else source.skipped[part]
        found = tokens[block.starts + skipped + source.kept[part] - 1]
        closing = found[0] if closing is None else closing
        if not (found == closing).all():
            return None
    return int(closing)


def refuse_broken(name: str, column: pa.ChunkedArray) -> None:
    """Raise ValueError where a damaged file's offsets of texts or lists lead out of its memory: Arrow would follow.

    Also for a type whose values Arrow cannot pick out, such as string_view.
    """
    try:
        pa.array([], column.type).take(pa.array([], pa.int64()))
    except pa.ArrowNotImplementedError:
        raise ValueError(
            f"column {name!r} holds {column.type}, of which Arrow takes no single values; cast it (a view of texts: "
            f"dataset.cast_column({name!r}, Value('string'))), or remove it"
        ) from None
    first = 0
    for chunk in column.chunks:
        # As bytes: whether they are text need not be known, and would have all of them read.
        plain = _as_bytes(chunk.type)
        try:
            (chunk.view(plain) if plain != chunk.type else chunk).validate(full=True)
        except pa.ArrowException as error:
            rows = f"rows {first} to {first + len(chunk) - 1} of its files"
            raise ValueError(f"column {name!r} is damaged in {rows}: {error}; make the file anew") from None
        first += len(chunk)


def _as_bytes(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_list(type_):
        return pa.list_(_as_bytes(type_.value_type))
    if pa.types.is_large_list(type_):
        return pa.large_list(_as_bytes(type_.value_type))
    return AS_BYTES.get(type_, type_)


def chosen_rows(dataset) -> np.ndarray | None:
    """(rows,) where each row of the dataset lies in its table, after select, shuffle or filter; None: in order.

    A view of the dataset's own numbers, in memory or in a file, where they lie in one piece.
    """
    if dataset._indices is None:
        return None
    chunks = [chunk.to_numpy() for chunk in dataset._indices.column(0).chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.uint64), *chunks])


def _read_lengths(input_ids: TokenColumn) -> np.ndarray:
    """(rows,) int32 tokens in each row; at least 1."""
    lengths = np.empty(input_ids.num_rows, np.int32)
    for block in input_ids.blocks():
        _refuse_damage(input_ids, block)
        if not block.lengths.all():
            culprit = block.first + int(np.argmin(block.lengths != 0))
            raise ValueError(
                f"row {culprit} has length 0: its input_ids are empty; filter such rows out before packing"
            )
        if block.lengths.max() >= 2**31:
            culprit = int(np.argmax(block.lengths))
            raise ValueError(
                f"row {block.first + culprit} has {block.lengths[culprit]:,} tokens; a row has at most 2**31 - 1: "
                "cut it into several before packing"
            )
        lengths[block.first : block.first + len(block.lengths)] = block.lengths
    return lengths


def check_source(dataset) -> None:
    """What can be checked without a look at rows: there are some, and input_ids, and no name that packing needs."""
    if not len(dataset):
        raise ValueError("the dataset is empty: it has no rows to pack")
    table = dataset.data
    columns = table.column_names
    if {"sequence_lengths", "sequence_indices"} <= set(columns):
        raise ValueError(
            "the dataset is packed already: it has the columns sequence_lengths and sequence_indices; "
            "pack its source instead"
        )
    taken = [name for name in RESERVED if name in columns]
    if taken:
        raise ValueError(f"column {taken[0]!r} has a reserved name: packing makes it anew; remove or rename the column")
    if INPUT_IDS not in columns:
        raise ValueError(f"no column 'input_ids' among {', '.join(columns) or 'no columns'}; tokenize before packing")
    type_ = table.column(INPUT_IDS).type
    if not is_list(type_) or not pa.types.is_integer(type_.value_type):
        raise ValueError(f"column 'input_ids' holds {type_}; it must be a list of integers: tokenize before packing")


def _token_names(table, rows, lengths: np.ndarray, wanted: Sequence[str] | None) -> list[str]:
    """The token-level columns besides input_ids and attention_mask."""
    candidates = [c for c in table.column_names if c not in (INPUT_IDS, ATTENTION_MASK)]
    if wanted is None:
        return [c for c in candidates if _is_token_level(c, table.column(c), rows, lengths)]
    for name in wanted:
        if name not in table.column_names:
            raise ValueError(f"token_columns names {name!r}, which is not among {', '.join(table.column_names)}")
        column = table.column(name)
        if not is_list(column.type):
            raise ValueError(
                f"token_columns names {name!r}, which holds {column.type} and no list of one value per token"
            )
        _refuse_other_lengths(open_token_column(name, column, rows), lengths)
    return [c for c in candidates if c in wanted]


def _is_token_level(name: str, column: pa.ChunkedArray, rows, lengths: np.ndarray) -> bool:
    """Whether every row is as long as input_ids. Where only rows without a value differ, nobody can tell: refused.

    Refused as well if most rows are as long, but not all: that is no list per sequence, but one value per token gone
    wrong in some rows.
    """
    if not is_list(column.type):
        return False
    if not column.null_count:
        opened = open_token_column(name, column, rows)
        found = _first_other_length(opened, lengths)
        if found is not None and 2 * _count_as_long(opened, lengths) > len(lengths):
            row, length = found
            raise ValueError(
                f"column {name!r} has {length} values in row {row}, where input_ids has {lengths[row]}, but as many as "
                "input_ids in most rows; give token_columns= without it if it is a list for each sequence, or else "
                "make it one value per token, or leave the row out"
            )
        return found is None
    same, missing = list_lengths(column, rows) == lengths, null_rows(column, rows)
    if missing.any() and not missing.all() and (same | missing).all():
        raise ValueError(
            f"column {name!r} has one value per token, but no value (null) in row {int(np.argmax(missing))}; "
            "fill it in, leave the row out, or give token_columns= without it to keep it as a list per pack"
        )
    return bool(same.all())


def _refuse_damage(column: TokenColumn, block: TokenRows) -> None:
    if block.lengths.min() < 0:
        raise ValueError(
            f"column {column.name!r} is damaged in row {block.first + int(np.argmin(block.lengths))}: its offsets lead "
            "out of its tokens; make the file anew"
        )


def _first_other_length(column: TokenColumn, lengths: np.ndarray) -> tuple[int, int] | None:
    """The first row that is not as long as input_ids, and its length; None: there is none."""
    for block in column.blocks():
        _refuse_damage(column, block)
        other = block.lengths != lengths[block.first : block.first + len(block.lengths)]
        if other.any():
            culprit = int(np.argmax(other))
            return block.first + culprit, int(block.lengths[culprit])
    return None


def _count_as_long(column: TokenColumn, lengths: np.ndarray) -> int:
    """Rows that are as long as input_ids."""
    return sum(
        np.count_nonzero(block.lengths == lengths[block.first : block.first + len(block.lengths)])
        for block in column.blocks()
    )


def _refuse_other_lengths(column: TokenColumn, lengths: np.ndarray) -> None:
    found = _first_other_length(column, lengths)
    if found is not None:
        row, length = found
        raise ValueError(
            f"column {column.name!r} has {length} values in row {row}, where input_ids has {lengths[row]}; "
            "a token-level column has one value per token"
        )


def _trim(
    table, rows, input_ids: TokenColumn, lengths: np.ndarray, pad_token_id: int | None
) -> tuple[np.ndarray | None, np.ndarray]:
    """skipped and kept of every row, by what the source says about padding; `lengths` itself where there is none."""
    if ATTENTION_MASK in table.column_names:
        if pad_token_id is not None:
            raise ValueError(
                f"pad_token_id={pad_token_id} was given, but the column attention_mask says already where padding is; "
                "leave pad_token_id out, or remove the column"
            )
        skipped, kept = trim_by_mask(_read_mask(table.column(ATTENTION_MASK), rows, lengths))
    elif pad_token_id is not None:
        skipped, kept = trim_by_token(input_ids, pad_token_id)
    else:
        refuse_padding(input_ids, lengths)
        return None, lengths
    return skipped if skipped.any() else None, kept


def _read_mask(column: pa.ChunkedArray, rows, lengths: np.ndarray) -> TokenColumn:
    type_ = column.type
    if not is_list(type_) or not (pa.types.is_integer(type_.value_type) or pa.types.is_boolean(type_.value_type)):
        raise ValueError(f"column 'attention_mask' holds {type_}; it must be a list of 0 and 1 for each token")
    if pa.types.is_boolean(type_.value_type):
        column = column.cast(pa.large_list(pa.uint8()))  # bits have no address of their own
    mask = read_token_column(ATTENTION_MASK, column, rows)
    _refuse_other_lengths(mask, lengths)
    return mask
