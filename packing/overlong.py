"""Rows with more tokens than a pack has slots: refused, truncated, split or dropped.

max_sequence_length=4, a row [c 1 2 3 4 s]:
error     ValueError            truncate  [c 1 2 s] if every row ends in s, else [c 1 2 3]
drop      nothing               split     [c 1 2 3] [4 s], which remember that they began at 0 and 4
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .source import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences to pack, cut from a source's rows; (num_sequences,) each.

    rows: the source row. begins: the row's token that comes first. lengths: the number of tokens.
    lasts: the row's token that comes last: begins + lengths - 1, unless a truncated sequence keeps the row's last one.
    overlong_rows: the source rows that did not fit. overlong_tokens: how many tokens they lost.
    """

    rows: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    lasts: np.ndarray
    overlong_rows: np.ndarray
    overlong_tokens: int = 0


def cut_sequences(source: Source, max_sequence_length: int, overlong: str) -> Sequences:
    """One sequence per row, and what `overlong` says for rows that do not fit. Whatever is cut or dropped is said."""
    rows = np.flatnonzero(source.kept > max_sequence_length)
    if not len(rows):
        return _whole_rows(source)
    sequences = OVERLONG[overlong](source, rows, max_sequence_length)
    logger.warning(
        "%d of %d rows have more than %d tokens: %s, %d tokens lost; rows %s%s",
        len(rows),
        source.num_rows,
        max_sequence_length,
        {"truncate": "truncated", "split": "split", "drop": "dropped"}[overlong],
        sequences.overlong_tokens,
        ", ".join(map(str, rows[:10].tolist())),
        ", …" if len(rows) > 10 else "",
    )
    return sequences


def _whole_rows(source: Source) -> Sequences:
    rows = np.arange(source.num_rows, dtype=np.int64)
    return Sequences(rows, source.skipped, source.kept, source.skipped + source.kept - 1, rows[:0])


def _error(source: Source, rows: np.ndarray, max_sequence_length: int) -> Sequences:
    others = f" (and {len(rows) - 1} more rows are too long)" if len(rows) > 1 else ""
    raise ValueError(
        f"row {rows[0]} has {source.kept[rows[0]]} tokens, "
        f"more than max_sequence_length={max_sequence_length}{others}; "
        'choose overlong="truncate", "split" or "drop", or raise max_sequence_length'
    )


def _truncate(source: Source, rows: np.ndarray, max_sequence_length: int) -> Sequences:
    """Keep the first tokens; if all rows of the source end in one token, that one closes the cut sequence, too."""
    whole = _whole_rows(source)
    lengths = np.minimum(source.kept, max_sequence_length)
    input_ids = source.token_columns[0]
    closing = input_ids.numbers()[input_ids.starts + whole.lasts]
    lasts = whole.lasts if (closing == closing[0]).all() else whole.begins + lengths - 1
    lost = int((source.kept - lengths).sum())
    return Sequences(whole.rows, whole.begins, lengths, lasts, rows, lost)


def _split(source: Source, rows: np.ndarray, max_sequence_length: int) -> Sequences:
    """As many pieces as needed, all but a row's last one full: a sequence each, all of the same row."""
    pieces = -(-source.kept // max_sequence_length)
    row = np.repeat(np.arange(source.num_rows, dtype=np.int64), pieces)
    number = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    lengths = np.minimum(source.kept[row] - number * max_sequence_length, max_sequence_length)
    begins = source.skipped[row] + number * max_sequence_length
    return Sequences(row, begins, lengths, begins + lengths - 1, rows)


def _drop(source: Source, rows: np.ndarray, max_sequence_length: int) -> Sequences:
    """Leave the rows out."""
    kept = np.flatnonzero(source.kept <= max_sequence_length)
    if not len(kept):
        raise ValueError(
            f"every row has more than max_sequence_length={max_sequence_length} tokens, so that overlong='drop' leaves "
            "nothing to pack; raise max_sequence_length, or truncate or split"
        )
    whole = _whole_rows(source)
    lost = int(source.kept[rows].sum())
    return Sequences(kept, whole.begins[kept], whole.lengths[kept], whole.lasts[kept], rows, lost)


OVERLONG: dict[str, Callable[[Source, np.ndarray, int], Sequences]] = {
    "error": _error,
    "truncate": _truncate,
    "split": _split,
    "drop": _drop,
}
