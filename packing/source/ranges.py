"""A source read by ranges of rows, in any process, and joined to what one process would have read.

    rows 0..8192        8192..16384         16384..20000
    read_range          read_range          read_range              on any machine: offsets, masks, and all values once
        \\                   |                   /
         lengths, digests of blocks of 4,096 rows  ->  join_ranges  ->  Source, fingerprint

What comes back is 4 bytes a row (8 where there is padding in front) and 16 bytes a column for 4,096 rows; no token.

Most checks look at single rows. Where ranges disagree (a column is token-level in some only), or one finds something
wrong, this process reads the whole, so the error is that of one process.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from packing.source.fingerprint import BLOCK_ROWS, ColumnPrint, RowDigests, column_prints, digest_rows, join_digests
from packing.source.rows import ATTENTION_MASK, Source, check_source, closing_token, open_columns, refuse_padding
from packing.source.source_files import SourceFiles
from packing.source.token_ids import read_checked

if TYPE_CHECKING:
    import datasets

RANGE_BYTES = 500_000_000  # roughly, the size of a range of the source
NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True)
class Reading:
    """What to read, and how. token_columns, pad_token_id: as read_source has them. to_hash: the fingerprint, too."""

    token_columns: Sequence[str] | None
    pad_token_id: int | None
    to_hash: bool


@dataclass(frozen=True, eq=False)
class RangeRead:
    """What some rows say. skipped, kept, trimmed: as a Source has them. token_columns: input_ids first.

    closing: the token that all of them end in; None: they differ. digests: None if not asked for."""

    first: int
    rows: int
    skipped: np.ndarray | None
    kept: np.ndarray
    trimmed_rows: int
    trimmed_tokens: int
    token_columns: tuple[str, ...]
    closing: int | None
    digests: RowDigests | None


@dataclass(frozen=True)
class RangeWrong:
    """Rows that read_source refuses; error says why, of these rows alone."""

    first: int
    rows: int
    error: str


class RangeLost(RangeWrong):
    """Rows whose files could not be read, for the moment perhaps."""


Range = RangeRead | RangeWrong


def to_arrow(found: Range) -> pa.Table:
    """A row, to travel between processes that trust each other."""
    return pa.table({"range": pa.array([pickle.dumps(found)], pa.large_binary())})


def from_arrow(table: pa.Table) -> Range:
    """What to_arrow was given."""
    return pickle.loads(table.column("range")[0].as_py())


def row_ranges(dataset: datasets.Dataset) -> list[tuple[int, int]]:
    """[(0, 8192), (8192, 16384), (16384, 20000)]: each begins with a block of the fingerprint; nearly equally long."""
    blocks = -(-len(dataset) // BLOCK_ROWS)
    count = max(1, min(blocks, -(-dataset.data.nbytes // RANGE_BYTES)))
    bounds = [min(len(dataset), blocks * i // count * BLOCK_ROWS) for i in range(count + 1)]
    return list(pairwise(bounds))


def read_range(dataset: datasets.Dataset, reading: Reading, first: int, end: int) -> RangeRead | RangeWrong:
    """Rows first..end of a dataset. Raises OSError where its files cannot be read."""
    rows = dataset.select(range(first, end))  # a view
    try:
        source = read_checked(rows, reading.token_columns, reading.pad_token_id)
    except ValueError as error:
        return RangeWrong(first, end - first, str(error))
    trimmed = source.trimmed_rows, source.trimmed_tokens
    names = tuple(column.name for column in source.columns.token_columns)
    digests = digest_rows(rows) if reading.to_hash else None
    return RangeRead(first, end - first, source.skipped, source.kept, *trimmed, names, closing_token(source), digests)


def join_ranges(
    dataset: datasets.Dataset, reading: Reading, parts: Iterable[RangeRead | RangeWrong]
) -> tuple[Source, tuple[ColumnPrint, ...] | None]:
    """What read_checked and column_prints say of the whole. parts: all ranges of it, in any order; taken one by one.

    Raises what read_checked raises, in its words. Memory: that of the Source, and a range.
    """
    check_source(dataset)
    files = SourceFiles.of(dataset)
    kept, skipped = np.empty(len(dataset), np.int32), np.zeros(0, np.int32)
    seen: list[RangeRead] = []
    for part in parts:
        if isinstance(part, RangeWrong) or (seen and part.token_columns != seen[0].token_columns):
            source = read_checked(dataset, reading.token_columns, reading.pad_token_id)
            return source, column_prints(dataset) if reading.to_hash else None
        rows = slice(part.first, part.first + part.rows)
        kept[rows] = part.kept
        if part.skipped is not None:
            skipped = skipped if len(skipped) else np.zeros(len(dataset), np.int32)
            skipped[rows] = part.skipped
        seen.append(replace(part, kept=NOTHING, skipped=None))
    seen.sort(key=lambda part: part.first)
    if [*(part.first for part in seen), len(dataset)] != [0, *(part.first + part.rows for part in seen)]:
        raise RuntimeError(f"the {len(seen)} ranges read are not the {len(dataset):,} rows of the source, each once")
    columns, closing = open_columns(dataset, seen[0].token_columns, files), seen[0].closing
    trimmed = sum(part.trimmed_rows for part in seen), sum(part.trimmed_tokens for part in seen)
    alike = closing is not None and all(part.closing == closing for part in seen)
    source = Source(columns, skipped if len(skipped) else None, kept, *trimmed, alike)
    if reading.pad_token_id is None and ATTENTION_MASK not in dataset.column_names:
        refuse_padding(source.input_ids, kept)  # looks at tokens only where all rows have one length
    digests = [part.digests for part in seen if part.digests is not None]
    return source, join_digests(dataset, digests) if reading.to_hash else None
