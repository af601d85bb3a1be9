"""Token columns in Arrow memory: where each row's tokens lie, and copying them out without a Python object per row.

A list column is a flat array of tokens and, for each row, an offset into it; a dataset holds it in chunks:

    chunk 0   offsets [0, 3, 5]   tokens [7 7 7 8 8]         row 0 -> starts at 0, 3 tokens
    chunk 1   offsets [0, 2]      tokens [9 9]               row 2 -> starts where chunk 1's tokens lie

Starts are counted from the lowest token in memory, so that one flat view reaches all chunks, and one kernel loop copies
rows from anywhere: slices of chunks, lists with 32-bit or 64-bit offsets and lists of fixed size look the same. Offsets
are read where they lie, in the memory map, when a row is asked for: nothing is kept for each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .kernels import njit

BLOCK_ROWS = 1 << 18  # rows looked at together, where all are; memory follows this and not their number


@dataclass(frozen=True, eq=False)
class TokenColumn:
    """One list column. What is kept is a few numbers for each chunk.

    tokens: all tokens. Numbers: one flat view of unsigned integers as wide as they are, across all chunks.
        Others (strings, booleans, lists): the chunks' values as they are.
    value_type: Arrow type of a token.
    rows: the dataset's own choice of rows; None = all, in order.
    chunk_rows: (chunks + 1,) the first row of each chunk, and the number of rows.
    token_shifts: (chunks,) where the tokens of each chunk begin in `tokens`.
    offsets, offset_shifts: one flat view of all chunks' offsets, and (chunks,) where those of each begin.
    list_size: tokens in every row of a list of fixed size, which has no offsets (offset_shifts are then rows); or 0.
    """

    name: str
    tokens: np.ndarray | pa.ChunkedArray
    value_type: pa.DataType
    rows: np.ndarray | None
    chunk_rows: np.ndarray
    token_shifts: np.ndarray
    offsets: np.ndarray
    offset_shifts: np.ndarray
    list_size: int

    @property
    def num_rows(self) -> int:
        return int(self.chunk_rows[-1]) if self.rows is None else len(self.rows)

    @property
    def is_numbers(self) -> bool:
        """Whether tokens are one flat view of numbers."""
        return isinstance(self.tokens, np.ndarray)

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each of these rows begins in `tokens`, and how many it has: (len(rows),) int64 each."""
        rows = (rows if self.rows is None else self.rows[rows]).astype(np.int64, copy=False)
        starts, lengths = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        if not len(rows):
            return starts, lengths
        places = self.offsets, self.offset_shifts, self.token_shifts, self.list_size
        _find(rows, self.chunk_rows, *places, starts, lengths)
        return starts, lengths

    def blocks(self) -> Iterator[TokenRows]:
        """All rows in order, so many at a time that memory does not follow their number."""
        for first in range(0, self.num_rows, BLOCK_ROWS):
            rows = np.arange(first, min(first + BLOCK_ROWS, self.num_rows))
            yield TokenRows(first, *self.find(rows))

    @property
    def starts(self) -> np.ndarray:
        """(rows,) int64, where each row's tokens begin: 8 bytes a row."""
        return self.find(np.arange(self.num_rows))[0]

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64, tokens in each row: 8 bytes a row."""
        return self.find(np.arange(self.num_rows))[1]

    def numbers(self) -> np.ndarray:
        """The flat view with its own dtype, to be read as numbers."""
        return self.tokens.view(np.dtype(self.value_type.to_pandas_dtype()))

    def buffer(self, buffers: dict[str, np.ndarray], count: int) -> np.ndarray | None:
        """Memory for so many tokens, kept in `buffers` under the column's name; None if they are no numbers."""
        if not self.is_numbers:
            return None
        if self.name not in buffers or len(buffers[self.name]) < count:
            buffers[self.name] = np.empty(count, self.tokens.dtype)
        return buffers[self.name][:count]

    def gather(
        self, starts: np.ndarray, lengths: np.ndarray, lasts: np.ndarray, buffer: np.ndarray | None = None
    ) -> pa.Array:
        """Copy out runs of tokens, end to end: lengths[i] - 1 tokens from starts[i] on, then the one at lasts[i].

        A run's last token is named by itself because a truncated sequence keeps its row's last one.
        buffer: where numbers are copied to, as long as all runs together; None: new memory.
        """
        if not self.is_numbers:
            positions = np.empty(int(lengths.sum()), np.int64)
            _positions(starts, lengths, lasts, positions)
            return take_rows(self.tokens, positions)
        gathered = self.gather_numbers(starts, lengths, lasts, buffer)
        return pa.Array.from_buffers(self.value_type, len(gathered), [None, pa.py_buffer(gathered)])

    def gather_numbers(
        self, starts: np.ndarray, lengths: np.ndarray, lasts: np.ndarray, buffer: np.ndarray | None = None
    ) -> np.ndarray:
        """gather, where tokens are numbers: as unsigned integers as wide as they are."""
        gathered = np.empty(int(lengths.sum()), self.tokens.dtype) if buffer is None else buffer
        _gather(self.tokens, starts, lengths, lasts, gathered)
        return gathered


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Some rows of a TokenColumn, from row `first` on: (rows,) int64 each."""

    first: int
    starts: np.ndarray
    lengths: np.ndarray


def is_list(type_: pa.DataType) -> bool:
    """Whether rows of this type have a length and tokens in one flat array."""
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def list_lengths(column: pa.ChunkedArray, rows: np.ndarray | None) -> np.ndarray:
    """(rows,) int64: the number of tokens in each row, from the offsets."""
    return open_token_column("", column, rows).lengths


def null_rows(column: pa.ChunkedArray, rows: np.ndarray | None) -> np.ndarray:
    """(rows,) bool: where there is no list at all."""
    whole = np.concatenate([np.asarray(chunk.is_null()) for chunk in column.chunks] or [np.empty(0, np.bool_)])
    return whole if rows is None else whole[rows]


def read_token_column(
    name: str, column: pa.ChunkedArray, rows: np.ndarray | None, *, nulls: bool = False
) -> TokenColumn:
    """open_token_column, checked.

    nulls: whether a token may be null; then numbers are kept as Arrow has them, where there is one.
    Raises ValueError, naming the row, where a list is null, or a token that may not be.
    """
    if column.null_count and null_rows(column, rows).any():
        culprit = int(np.argmax(null_rows(column, rows)))
        raise ValueError(f"column {name!r} has no value (null) in row {culprit}; fill it in or leave the row out")
    opened = open_token_column(name, column, rows, nulls=nulls)
    children = [chunk.values for chunk in column.chunks if len(chunk)]
    if not nulls and any(child.null_count for child in children):
        # Positions of nulls, counted as starts are.
        found = [np.flatnonzero(c.is_null()) + s for c, s in zip(children, opened.token_shifts, strict=True)]
        _refuse_nulls(opened, np.sort(np.concatenate(found)))
    return opened


def open_token_column(
    name: str, column: pa.ChunkedArray, rows: np.ndarray | None, *, nulls: bool = False
) -> TokenColumn:
    """Find where tokens and offsets lie. rows: the dataset's own choice (after select, shuffle, filter); None = all.

    Takes a moment for each chunk, none for rows or tokens, and checks nothing.
    """
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    children = [chunk.values for chunk in chunks]
    value_type = column.type.value_type
    is_numbers = pa.types.is_integer(value_type) or pa.types.is_floating(value_type)
    if is_numbers and not (nulls and any(child.null_count for child in children)):
        tokens, token_shifts = _flat_view(children, value_type)
    else:
        tokens = pa.chunked_array(children, value_type)
        token_shifts = _starts([len(child) for child in children])[:-1]
    if pa.types.is_fixed_size_list(column.type):
        # .values is not sliced with the chunk, so the chunk's offset counts
        list_size, offsets = column.type.list_size, np.empty(0, np.uint32)
        offset_shifts = np.array([chunk.offset for chunk in chunks], np.int64)
    else:
        list_size, width = 0, pa.int64() if pa.types.is_large_list(column.type) else pa.int32()
        offsets, offset_shifts = _flat_view([chunk.offsets for chunk in chunks], width)
    chunk_rows = _starts([len(chunk) for chunk in chunks])
    return TokenColumn(name, tokens, value_type, rows, chunk_rows, token_shifts, offsets, offset_shifts, list_size)


def _starts(counts: list[int]) -> np.ndarray:
    """[3, 2] -> [0, 3, 5]"""
    return np.concatenate([[0], np.cumsum(np.array(counts, np.int64))]).astype(np.int64)


def list_array(offsets: np.ndarray, values: pa.Array, type_: pa.DataType) -> pa.Array:
    """Lists of this type: row i holds values[offsets[i] : offsets[i + 1]]."""
    if values.type != type_.value_type:
        values = values.cast(type_.value_type)
    if offsets[-1] >= 2**31:
        raise ValueError(f"{offsets[-1]:,} values are more than a list of 32-bit offsets can hold; take fewer rows")
    array = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)  # pa.array(…, int32) is slower
    return array if array.type == type_ else array.cast(type_)  # pyarrow's cast of list<null> to itself loses values


def take_rows(column: pa.ChunkedArray, indices: np.ndarray) -> pa.Array:
    """column[indices] as one array, at a cost that follows the indices and not the column.

    pyarrow's own take may join all chunks of a column first; here each chunk is asked for its part only.
    """
    if column.num_chunks == 1:
        return column.chunk(0).take(pa.array(indices))
    bounds = np.cumsum([0] + [len(chunk) for chunk in column.chunks])
    chunk_of = np.searchsorted(bounds, indices, side="right") - 1
    order = np.argsort(chunk_of, kind="stable")
    used, begins = np.unique(chunk_of[order], return_index=True)
    taken = []
    for chunk, part in zip(used.tolist(), np.split(order, begins[1:]), strict=True):
        taken.append(column.chunk(chunk).take(pa.array(indices[part] - bounds[chunk])))
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    return pa.concat_arrays(taken).take(pa.array(back)) if taken else pa.array([], column.type)


def _flat_view(children: list[pa.Array], value_type: pa.DataType) -> tuple[np.ndarray, np.ndarray]:
    """One array from the lowest token in memory to the highest, and each chunk's distance from its beginning in tokens.

    Between the chunks lies memory that is none of ours; nobody looks there, because starts lead into chunks only.
    The view owns the chunks' buffers.
    """
    width = value_type.bit_width // 8
    dtype = np.dtype(f"u{width}")
    owners, addresses, ends = [], [], []
    for child in children:
        buffer = child.buffers()[1]
        if buffer is not None and buffer.address % width:  # misaligned, in a hand-made file: a copy is aligned
            copy = np.frombuffer(buffer, np.uint8).copy()
            buffer = pa.py_buffer(copy)
        address = 0 if buffer is None else buffer.address + child.offset * width
        owners.append(buffer)
        addresses.append(address)
        ends.append(address + len(child) * width)
    used = [i for i, child in enumerate(children) if len(child)]
    if not used:
        return np.empty(0, dtype), np.zeros(len(children), np.int64)
    base = min(addresses[i] for i in used)
    span = pa.foreign_buffer(base, max(ends[i] for i in used) - base, base=owners)
    shifts = [(addresses[i] - base) // width if len(child) else 0 for i, child in enumerate(children)]
    return np.frombuffer(span, dtype), np.array(shifts, np.int64)


def _refuse_nulls(column: TokenColumn, nulls: np.ndarray) -> None:
    """Raise for the first row that reaches over one of the null positions (sorted)."""
    for block in column.blocks():
        ends = block.starts + block.lengths
        hit = np.searchsorted(nulls, block.starts, side="left") < np.searchsorted(nulls, ends, side="left")
        if hit.any():
            culprit = block.first + int(np.argmax(hit))
            raise ValueError(
                f"column {column.name!r} has a null token in row {culprit}; fill it in or leave the row out"
            )


@njit(cache=True, nogil=True)
def _find(rows, chunk_rows, offsets, offset_shifts, token_shifts, list_size, starts, lengths):
    """Fills starts and lengths of rows of the table.

    Chunks mostly have equally many rows, so that a division finds a row's chunk; where it does not, halving does."""
    rows_per_chunk, last, chunk = max(chunk_rows[1], 1), len(offset_shifts) - 1, 0
    for i in range(len(rows)):
        row = rows[i]
        if row < chunk_rows[chunk] or row >= chunk_rows[chunk + 1]:
            chunk = min(row // rows_per_chunk, last)
            if row < chunk_rows[chunk] or row >= chunk_rows[chunk + 1]:
                chunk, end = 0, last + 1
                while end - chunk > 1:
                    middle = (chunk + end) // 2
                    if chunk_rows[middle] <= row:
                        chunk = middle
                    else:
                        end = middle
        place = row - chunk_rows[chunk]
        if list_size > 0:
            starts[i], lengths[i] = token_shifts[chunk] + (offset_shifts[chunk] + place) * list_size, list_size
        else:
            at = np.uint64(offset_shifts[chunk] + place)
            first = np.int64(offsets[at])
            starts[i], lengths[i] = token_shifts[chunk] + first, np.int64(offsets[at + np.uint64(1)]) - first


@njit(cache=True, nogil=True)
def _gather(tokens, starts, lengths, lasts, gathered):
    """Copy runs of tokens end to end; fills gathered.

    Indices are unsigned: the test for negative ones would bar the compiler from copying many tokens at once.
    """
    filled = np.uint64(0)
    one = np.uint64(1)
    for run in range(len(starts)):
        start, most = np.uint64(starts[run]), np.uint64(lengths[run]) - one
        for i in range(most):
            gathered[filled + i] = tokens[start + i]
        gathered[filled + most] = tokens[np.uint64(lasts[run])]
        filled += most + one


@njit(cache=True, nogil=True)
def _positions(starts, lengths, lasts, positions):
    """As _gather, but the positions instead of the tokens there; fills positions."""
    filled = 0
    for run in range(len(starts)):
        for i in range(lengths[run] - 1):
            positions[filled + i] = starts[run] + i
        filled += lengths[run]
        positions[filled - 1] = lasts[run]
