"""A source read by ranges of rows, in any process, and joined to what one process would have read.

    rows 0..8192        8192..16384         16384..20000
    read_range          read_range          read_range              on any machine: offsets, masks, and all values once
        \\                   |                   /
         lengths, digests of blocks of 4,096 rows  ->  join_ranges  ->  Source, fingerprint

What comes back is 4 bytes a row (8 where there is padding in front) and 16 bytes a column for 4,096 rows; no token.

Most checks of a source are of single rows. Where ranges say different things (a column is token-level in some only), or
one of them finds something wrong, the whole is read by this process, so that what is said is what one process says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from packing.source.fingerprint import BLOCK_ROWS, ColumnPrint, RowDigests, column_prints, digest_rows, join_digests
from packing.source.rows import (
    ATTENTION_MASK,
    Source,
    check_source,
    closing_token,
    open_columns,
    read_source,
    refuse_padding,
)
from packing.source.token_ids import refuse_foreign_ids

RANGE_BYTES = 500_000_000  # of the source in a range, more or less


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
    skipped: np.ndarray | None
    kept: np.ndarray
    trimmed_rows: int
    trimmed_tokens: int
    token_columns: tuple[str, ...]
    closing: int | None
    digests: RowDigests | None

    @property
    def rows(self) -> int:
        return len(self.kept)

    def to_arrow(self) -> pa.Table:
        """A row, to travel."""
        values = {name: getattr(self, name) for name in ROW.names if hasattr(self, name)}
        values["closing"] = None if self.closing is None else str(self.closing)
        if self.digests is not None:
            values |= {"block_digests": self.digests.digests, "block_bytes": self.digests.bytes}
        return _row(values)


@dataclass(frozen=True)
class RangeWrong:
    """Rows that read_source refuses; error says why, of these rows alone."""

    first: int
    rows: int
    error: str

    def to_arrow(self) -> pa.Table:
        return _row({"first": self.first, "rows": self.rows, "error": self.error})


@dataclass(frozen=True)
class RangeLost:
    """Rows whose files could not be read, for the moment perhaps; error says why."""

    first: int
    rows: int
    lost: str

    def to_arrow(self) -> pa.Table:
        return _row({"first": self.first, "rows": self.rows, "lost": self.lost})


ROW = pa.schema(
    {
        "first": pa.int64(),
        "rows": pa.int64(),
        "error": pa.string(),  # of RangeWrong
        "lost": pa.string(),  # of RangeLost; both null: RangeRead
        "skipped": pa.list_(pa.int32()),
        "kept": pa.list_(pa.int32()),
        "trimmed_rows": pa.int64(),
        "trimmed_tokens": pa.int64(),
        "token_columns": pa.list_(pa.string()),
        "closing": pa.string(),  # a number: that of a token of any width
        "block_digests": pa.list_(pa.binary()),
        "block_bytes": pa.list_(pa.int64()),
    }
)


def _row(values: dict) -> pa.Table:
    return pa.table({field.name: pa.array([values.get(field.name)], field.type) for field in ROW}, ROW)


def from_arrow(table: pa.Table) -> RangeRead | RangeWrong | RangeLost:
    """The row that to_arrow made; numbers are views of it."""
    row = {name: table.column(name)[0] for name in ROW.names}
    first, rows = row["first"].as_py(), row["rows"].as_py()
    if row["lost"].is_valid:
        return RangeLost(first, rows, row["lost"].as_py())
    if row["error"].is_valid:
        return RangeWrong(first, rows, row["error"].as_py())
    digests = None
    if row["block_digests"].is_valid:
        digests = RowDigests(tuple(row["block_digests"].as_py()), tuple(row["block_bytes"].as_py()))
    return RangeRead(
        first,
        row["skipped"].values.to_numpy() if row["skipped"].is_valid else None,
        row["kept"].values.to_numpy(),
        row["trimmed_rows"].as_py(),
        row["trimmed_tokens"].as_py(),
        tuple(row["token_columns"].as_py()),
        int(row["closing"].as_py()) if row["closing"].is_valid else None,
        digests,
    )


def row_ranges(dataset) -> list[tuple[int, int]]:
    """[(0, 8192), (8192, 16384), (16384, 20000)]: each begins with a block of the fingerprint; nearly equally long."""
    blocks = -(-len(dataset) // BLOCK_ROWS)
    count = max(1, min(blocks, -(-dataset.data.nbytes // RANGE_BYTES)))
    bounds = [min(len(dataset), blocks * i // count * BLOCK_ROWS) for i in range(count + 1)]
    return list(pairwise(bounds))


def read_range(dataset, reading: Reading, first: int, end: int) -> RangeRead | RangeWrong:
    """Rows first..end of a datasets.Dataset. Raises OSError where its files cannot be read."""
    rows = dataset.select(range(first, end))  # a view
    try:
        source = read_source(rows, reading.token_columns, reading.pad_token_id)
        refuse_foreign_ids(source)
    except ValueError as error:
        return RangeWrong(first, end - first, str(error))
    return RangeRead(
        first,
        source.skipped,
        source.kept,
        source.trimmed_rows,
        source.trimmed_tokens,
        tuple(column.name for column in source.columns.token_columns),
        closing_token(source),
        digest_rows(rows) if reading.to_hash else None,
    )


def join_ranges(
    dataset, reading: Reading, parts: Iterable[RangeRead | RangeWrong]
) -> tuple[Source, tuple[ColumnPrint, ...] | None]:
    """What read_source and column_prints say of the whole. parts: all ranges of it, in any order; taken one by one.

    Raises what read_source raises, in its words. Memory: that of the Source, and a range.
    """
    check_source(dataset)
    kept, skipped, seen, bounds = np.empty(len(dataset), np.int32), None, [], []
    for part in parts:
        if isinstance(part, RangeWrong) or (seen and part.token_columns != seen[0].token_columns):
            return _read_alone(dataset, reading)
        place = slice(part.first, part.first + len(part.kept))
        kept[place] = part.kept
        if part.skipped is not None:
            skipped = np.zeros(len(dataset), np.int32) if skipped is None else skipped
            skipped[place] = part.skipped
        seen.append(replace(part, kept=None, skipped=None))
        bounds.append((place.start, place.stop))
    firsts, ends = zip(*sorted(bounds), strict=True)
    if (*firsts, len(dataset)) != (0, *ends):
        raise RuntimeError(f"the {len(bounds)} ranges read are not the {len(dataset):,} rows of the source, each once")
    seen.sort(key=lambda part: part.first)
    source = Source(
        open_columns(dataset, seen[0].token_columns),
        skipped,
        kept,
        sum(part.trimmed_rows for part in seen),
        sum(part.trimmed_tokens for part in seen),
        seen[0].closing is not None and all(part.closing == seen[0].closing for part in seen),
    )
    if reading.pad_token_id is None and ATTENTION_MASK not in dataset.column_names:
        refuse_padding(source.input_ids, kept)  # looks at tokens only where all rows have one length
    return source, join_digests(dataset, [part.digests for part in seen]) if reading.to_hash else None


def _read_alone(dataset, reading: Reading) -> tuple[Source, tuple[ColumnPrint, ...] | None]:
    source = read_source(dataset, reading.token_columns, reading.pad_token_id)
    refuse_foreign_ids(source)
    return source, column_prints(dataset) if reading.to_hash else None
