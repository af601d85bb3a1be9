"""Reading a tokenized dataset: which columns hold one value per token, and where each row's tokens lie."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .arrow import TokenColumn, is_list, list_lengths, null_rows, read_token_column
from .padding import refuse_padding, trim_by_mask, trim_by_token

logger = logging.getLogger(__name__)

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"  # says where padding is; never stored

# Columns that packing adds, and those that the collator makes for each batch.
RESERVED = ("sequence_lengths", "sequence_indices", "sequence_starts", "sequence_ids", "position_ids", "cls_positions")


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset's rows, as packing sees them. A row's tokens without padding are `kept` tokens after `skipped`.

    rows: the dataset's own choice of rows in its tables (after select, shuffle, filter); None = all, in order.
    token_columns: one value per token, input_ids first.
    row_columns: names of all others, one value per row.
    skipped, kept: (rows,) int64.
    """

    table: pa.Table
    rows: np.ndarray | None
    token_columns: tuple[TokenColumn, ...]
    row_columns: tuple[str, ...]
    skipped: np.ndarray
    kept: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.kept)

    @property
    def trimmed(self) -> np.ndarray:
        """(rows,) padding tokens trimmed from each row."""
        return self.token_columns[0].lengths - self.kept


def read_source(dataset, token_columns: Sequence[str] | None = None, pad_token_id: int | None = None) -> Source:
    """Check a datasets.Dataset and find its tokens; nothing is copied.

    token_columns: None takes the columns whose rows are as long as those of input_ids, in every row.
    pad_token_id: trim this token at the ends of rows; only for a source without attention_mask.
    """
    table, rows = dataset.data, chosen_rows(dataset)
    if not len(dataset):
        raise ValueError("the dataset is empty: it has no rows to pack")
    _check_columns(table)
    input_ids = read_token_column(INPUT_IDS, table.column(INPUT_IDS), rows)
    if not input_ids.lengths.all():
        culprit = int(np.argmin(input_ids.lengths != 0))
        raise ValueError(f"row {culprit} has length 0: its input_ids are empty; filter such rows out before packing")

    names = _token_names(table, rows, input_ids.lengths, token_columns)
    columns = [read_token_column(name, table.column(name), rows) for name in names]
    row_columns = [c for c in table.column_names if c not in (INPUT_IDS, ATTENTION_MASK, *names)]
    skipped, kept = _trim(table, rows, input_ids, pad_token_id)
    source = Source(table, rows, (input_ids, *columns), tuple(row_columns), skipped, kept)
    if source.trimmed.any():
        logger.warning(
            "%d padding tokens trimmed from %d of %d rows (%s)",
            source.trimmed.sum(),
            np.count_nonzero(source.trimmed),
            source.num_rows,
            f"pad_token_id={pad_token_id}" if pad_token_id is not None else "attention_mask 0",
        )
    return source


def chosen_rows(dataset) -> np.ndarray | None:
    """(rows,) where each row of the dataset lies in its table, after select, shuffle or filter; None: in order."""
    if dataset._indices is None:
        return None
    return dataset._indices.column(0).to_numpy().astype(np.int64)


def _check_columns(table) -> None:
    """There are input_ids, and no column has a name that packing needs."""
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
    if isinstance(wanted, str):
        raise ValueError(f"token_columns={wanted!r} must be a list of column names: [{wanted!r}]")
    for name in wanted:
        if name not in table.column_names:
            raise ValueError(f"token_columns names {name!r}, which is not among {', '.join(table.column_names)}")
        column = table.column(name)
        if not is_list(column.type):
            raise ValueError(
                f"token_columns names {name!r}, which holds {column.type} and no list of one value per token"
            )
        _refuse_other_lengths(name, list_lengths(column, rows), lengths)
    return [c for c in candidates if c in wanted]


def _is_token_level(name: str, column: pa.ChunkedArray, rows, lengths: np.ndarray) -> bool:
    """Whether every row is as long as input_ids. Where only rows without a value differ, nobody can tell: refused."""
    if not is_list(column.type):
        return False
    same = list_lengths(column, rows) == lengths
    if same.all() and not column.null_count:
        return True
    missing = null_rows(column, rows) if column.null_count else np.zeros(len(same), np.bool_)
    if missing.any() and not missing.all() and (same | missing).all():
        raise ValueError(
            f"column {name!r} has one value per token, but no value (null) in row {int(np.argmax(missing))}; "
            "fill it in, leave the row out, or give token_columns= without it to keep it as a list per pack"
        )
    return bool(same.all())


def _refuse_other_lengths(name: str, found: np.ndarray, lengths: np.ndarray) -> None:
    if not np.array_equal(found, lengths):
        culprit = int(np.argmax(found != lengths))
        raise ValueError(
            f"column {name!r} has {found[culprit]} values in row {culprit}, where input_ids has {lengths[culprit]}; "
            "a token-level column has one value per token"
        )


def _trim(table, rows, input_ids: TokenColumn, pad_token_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """skipped and kept of every row, by what the source says about padding."""
    if ATTENTION_MASK in table.column_names:
        if pad_token_id is not None:
            raise ValueError(
                f"pad_token_id={pad_token_id} was given, but the column attention_mask says already where padding is; "
                "leave pad_token_id out, or remove the column"
            )
        return trim_by_mask(_read_mask(table.column(ATTENTION_MASK), rows, input_ids.lengths))
    if pad_token_id is not None:
        return trim_by_token(input_ids, pad_token_id)
    refuse_padding(input_ids)
    return np.zeros_like(input_ids.lengths), input_ids.lengths


def _read_mask(column: pa.ChunkedArray, rows, lengths: np.ndarray) -> TokenColumn:
    type_ = column.type
    if not is_list(type_) or not (pa.types.is_integer(type_.value_type) or pa.types.is_boolean(type_.value_type)):
        raise ValueError(f"column 'attention_mask' holds {type_}; it must be a list of 0 and 1 for each token")
    if pa.types.is_boolean(type_.value_type):
        column = column.cast(pa.large_list(pa.uint8()))  # bits have no address of their own
    mask = read_token_column(ATTENTION_MASK, column, rows)
    _refuse_other_lengths(ATTENTION_MASK, mask.lengths, lengths)
    return mask
