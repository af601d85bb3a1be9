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
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from packing.files.errors import SourceError
from packing.histogram import offsets_of
from packing.numba_tools import njit, prefetch

if TYPE_CHECKING:
    import datasets

ROWS_AT_ONCE = 1 << 18  # rows looked at together, where all are; memory follows this and not their number
AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
TEXTS = (*AS_BYTES, *AS_BYTES.values())
NULLABLE = ("word_ids",)  # a tokenizer's word ids are None for special tokens, which are in no word


@dataclass(frozen=True, eq=False)
class TokenColumn:
    """One list column. What is kept is a few numbers for each chunk.

    tokens: all tokens that are numbers: one flat view of unsigned integers as wide as they are, across all chunks.
    values: all other tokens (strings, booleans, lists): the chunks' values as they are; None for numbers.
    value_type: Arrow type of a token.
    rows: the dataset's own choice of rows; None = all, in order.
    chunk_rows: (chunks + 1,) the first row of each chunk, and the number of rows.
    token_shifts, token_counts: (chunks,) where the tokens of each chunk begin in `tokens`, and how many there are.
    offsets, offset_shifts: one flat view of all chunks' offsets, and (chunks,) where those of each begin.
    list_size: tokens in every row of a list of fixed size, which has no offsets (offset_shifts are then rows); or 0.
    """

    name: str
    tokens: np.ndarray
    values: Values | None
    value_type: pa.DataType
    rows: np.ndarray | None
    chunk_rows: np.ndarray
    token_shifts: np.ndarray
    token_counts: np.ndarray
    offsets: np.ndarray
    offset_shifts: np.ndarray
    list_size: int

    @property
    def num_rows(self) -> int:
        return int(self.chunk_rows[-1]) if self.rows is None else len(self.rows)

    @property
    def is_numbers(self) -> bool:
        """Whether tokens are one flat view of numbers."""
        return self.values is None

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each of these rows begins in `tokens`, and how many it has: (len(rows),) int64 each.

        How many is -1 where a damaged file's offsets lead out of its tokens.
        """
        rows = (rows if self.rows is None else self.rows[rows]).astype(np.int64, copy=False)
        starts, lengths = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        if not len(rows):
            return starts, lengths
        tokens = self.token_shifts, self.token_counts
        _find(rows, self.chunk_rows, *tokens, self.offsets, self.offset_shifts, self.list_size, starts, lengths)
        return starts, lengths

    def blocks(self) -> Iterator[TokenRows]:
        """All rows in order, so many at a time that memory does not follow their number. Refuses a damaged file."""
        for first in range(0, self.num_rows, ROWS_AT_ONCE):
            block = TokenRows(first, *self.find(np.arange(first, min(first + ROWS_AT_ONCE, self.num_rows))))
            if block.lengths.min() < 0:
                row, what = first + int(np.argmin(block.lengths)), "is damaged: its offsets lead out of its tokens"
                raise SourceError(what, column=self.name, row=row, cure="make the file again")
            yield block

    @property
    def starts(self) -> np.ndarray:
        """(rows,) int64, where each row's tokens begin: 8 bytes a row."""
        return self.find(np.arange(self.num_rows))[0]

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64, tokens in each row: 8 bytes a row."""
        return self.find(np.arange(self.num_rows))[1]

    def numbers(self) -> np.ndarray:
        """The flat view with the type of its numbers."""
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
        if self.values is not None:
            positions = np.empty(int(lengths.sum()), np.int64)
            _positions(starts, lengths, lasts, positions)
            return self.values.take(positions)
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

    @property
    def rows(self) -> slice:
        """Where these rows lie among all."""
        return slice(self.first, self.first + len(self.starts))


def chosen_rows(dataset: datasets.Dataset) -> np.ndarray | None:
    """(rows,) where each row of the dataset lies in its table, after select, shuffle or filter; None: in order.

    A view of the dataset's own numbers, in memory or in a file, where they lie in one piece.
    """
    if dataset._indices is None:
        return None
    chunks = [chunk.to_numpy() for chunk in dataset._indices.column(0).chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.uint64), *chunks])


def refuse_broken(name: str, column: pa.ChunkedArray) -> None:
    """Raise ValueError where a damaged file's offsets of texts or lists lead out of its memory: Arrow would follow.

    Also for a type whose values Arrow cannot pick out, such as string_view.
    """
    try:
        pa.array([], column.type).take(pa.array([], pa.int64()))
    except pa.ArrowNotImplementedError:
        what = f"holds {column.type}, of which Arrow takes no single values"
        cure = f"cast it (a view of texts: dataset.cast_column({name!r}, Value('string'))), or remove it"
        raise SourceError(what, column=name, cure=cure) from None
    first = 0
    for chunk in column.chunks:
        # Bytes are enough: to check that they are text, Arrow would read them all.
        plain = _as_bytes(chunk.type)
        try:
            (chunk.view(plain) if plain != chunk.type else chunk).validate(full=True)
        except pa.ArrowException as error:
            rows = f"rows {first} to {first + len(chunk) - 1} of its files"
            raise SourceError(f"is damaged in {rows}: {error}", column=name, cure="make the file again") from None
        first += len(chunk)


def _as_bytes(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_list(type_):
        return pa.list_(_as_bytes(type_.value_type))
    if pa.types.is_large_list(type_):
        return pa.large_list(_as_bytes(type_.value_type))
    return AS_BYTES.get(type_, type_)


def is_list(type_: pa.DataType) -> bool:
    """Whether rows of this type have a length and tokens in one flat array."""
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def list_lengths(column: pa.ChunkedArray, rows: np.ndarray | None) -> np.ndarray:
    """(rows,) int64: the number of tokens in each row, from the offsets."""
    return open_lists("", column, rows).lengths


def null_rows(column: pa.ChunkedArray, rows: np.ndarray | None) -> np.ndarray:
    """(rows,) bool: where there is no list at all."""
    whole = np.concatenate([np.asarray(chunk.is_null()) for chunk in column.chunks] or [np.empty(0, np.bool_)])
    return whole if rows is None else whole[rows]


def read_lists(name: str, column: pa.ChunkedArray, rows: np.ndarray | None, *, nulls: bool = False) -> TokenColumn:
    """open_lists, checked.

    nulls: whether a token may be null; then numbers are kept as Arrow has them, where there is one.
    Raises ValueError, naming the row, where a list is null, or a token that may not be.
    """
    if column.null_count and null_rows(column, rows).any():
        culprit = int(np.argmax(null_rows(column, rows)))
        raise SourceError("has no value (null)", column=name, row=culprit, cure="fill it in or leave the row out")
    nulls = nulls or name in NULLABLE
    opened = open_lists(name, column, rows, nulls=nulls)
    children = [chunk.values for chunk in column.chunks if len(chunk)]
    if not nulls and any(child.null_count for child in children):
        # Positions of nulls, counted as starts are.
        found = [np.flatnonzero(c.is_null()) + s for c, s in zip(children, opened.token_shifts, strict=True)]
        _refuse_nulls(opened, np.sort(np.concatenate(found)))
    return opened


def open_lists(name: str, column: pa.ChunkedArray, rows: np.ndarray | None, *, nulls: bool = False) -> TokenColumn:
    """Find where tokens and offsets lie. rows: the dataset's own choice (after select, shuffle, filter); None = all.

    Takes a moment for each chunk, none for rows or tokens, and checks nothing.
    """
    nulls = nulls or name in NULLABLE
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    children = [chunk.values for chunk in chunks]
    value_type = column.type.value_type
    is_numbers = pa.types.is_integer(value_type) or pa.types.is_floating(value_type)
    values = None
    if is_numbers and not (nulls and any(child.null_count for child in children)):
        tokens, shifts = _flat_view(children, value_type)
    else:
        tokens, values = np.empty(0, np.uint8), Values.of(children, value_type)
        shifts = values.bounds[:-1]
    if pa.types.is_fixed_size_list(column.type):
        # .values is not sliced with the chunk, so the chunk's offset counts
        size, offsets = column.type.list_size, np.empty(0, np.uint32)
        offset_shifts = np.array([chunk.offset for chunk in chunks], np.int64)
    else:
        size, width = 0, pa.int64() if pa.types.is_large_list(column.type) else pa.int32()
        offsets, offset_shifts = _flat_view([chunk.offsets for chunk in chunks], width)
    chunk_rows = offsets_of([len(chunk) for chunk in chunks])
    counts = np.array([len(child) for child in children], np.int64)
    return TokenColumn(name, tokens, values, value_type, rows, chunk_rows, shifts, counts, offsets, offset_shifts, size)


def list_array(offsets: np.ndarray, values: pa.Array, type_: pa.DataType) -> pa.Array:
    """Lists of this type: row i holds values[offsets[i] : offsets[i + 1]]."""
    if values.type != type_.value_type:
        values = values.cast(type_.value_type)
    if offsets[-1] >= 2**31:
        raise ValueError(f"{offsets[-1]:,} values are more than a list of 32-bit offsets can hold; take fewer rows")
    bounds = pa.py_buffer(offsets.astype(np.int32, copy=False))
    array = pa.Array.from_buffers(pa.list_(values.type), len(offsets) - 1, [None, bounds], children=[values])
    return array if array.type == type_ else array.cast(type_)  # pyarrow's cast of list<null> to itself loses values


@dataclass(frozen=True, eq=False)
class Values:
    """A column that is no list of numbers, or the tokens of one: its chunks, and where each begins.

    bounds: (chunks + 1,) kept, because counting them each time would take longer than copying some rows.
    """

    chunks: list[pa.Array]
    bounds: np.ndarray
    type: pa.DataType

    @classmethod
    def of(cls, chunks: list[pa.Array], type_: pa.DataType) -> Values:
        return cls(chunks, offsets_of([len(chunk) for chunk in chunks]), type_)

    def take(self, indices: np.ndarray) -> pa.Array:
        """The values at these indices as one array, at a cost that follows the indices and not the column.

        pyarrow's own take may join all chunks of a column first; here each chunk is asked for its part only.
        """
        if len(self.chunks) == 1:
            return self.chunks[0].take(pa.array(indices))
        chunk_of = np.searchsorted(self.bounds, indices, side="right") - 1
        order = np.argsort(chunk_of, kind="stable")
        used, begins = np.unique(chunk_of[order], return_index=True)
        taken = []
        for chunk, part in zip(used.tolist(), np.split(order, begins[1:]), strict=True):
            taken.append(self.chunks[chunk].take(pa.array(indices[part] - self.bounds[chunk])))
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_arrays(taken).take(pa.array(back)) if taken else pa.array([], self.type)

    def part(self, first: int, end: int) -> pa.Array:
        """Values first..end as one array; of a single chunk it is a view."""
        chunk = int(np.searchsorted(self.bounds, first, side="right")) - 1
        parts = []
        while first < end:
            begin, stop = int(self.bounds[chunk]), min(int(self.bounds[chunk + 1]), end)
            parts.append(self.chunks[chunk].slice(first - begin, stop - first))
            first, chunk = stop, chunk + 1
        return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)


def _flat_view(children: list[pa.Array], value_type: pa.DataType) -> tuple[np.ndarray, np.ndarray]:
    """One array from the lowest token in memory to the highest, and each chunk's distance from its beginning in tokens.

    The memory between the chunks is not ours; nobody looks there, because starts lead into chunks only.
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
            row = block.first + int(np.argmax(hit))
            raise SourceError("has a null token", column=column.name, row=row, cure="fill it in or leave the row out")


@njit(cache=True, nogil=True)
def _find(rows, chunk_rows, token_shifts, token_counts, offsets, offset_shifts, list_size, starts, lengths):
    """Fills starts and lengths of rows of the table; a length is -1 where offsets lead out of a chunk's tokens.

    Chunks mostly have equally many rows, so that a division finds a row's chunk; where it does not, halving does."""
    chunks_per_row, last = 1.0 / max(chunk_rows[1], 1), len(offset_shifts) - 1
    for i in range(len(rows)):
        row = rows[i]
        chunk = min(int((row + 0.5) * chunks_per_row), last)
        if row < chunk_rows[chunk] or row >= chunk_rows[chunk + 1]:
            chunk = np.searchsorted(chunk_rows, row, side="right") - 1
        place = np.uint64(offset_shifts[chunk] + row - chunk_rows[chunk])
        if list_size > 0:
            first = np.int64(place) * list_size
            end = first + list_size
        else:
            first, end = np.int64(offsets[place]), np.int64(offsets[place + np.uint64(1)])
        is_inside = 0 <= first <= end <= token_counts[chunk]
        starts[i], lengths[i] = token_shifts[chunk] + first, end - first if is_inside else -1


@njit(cache=True, nogil=True)
def _gather(tokens, starts, lengths, lasts, gathered):
    """Copy runs of tokens end to end; fills gathered.

    Indices are unsigned: the test for negative ones would bar the compiler from copying many tokens at once. The
    beginning of the run after next is asked for ahead; hardware follows a run only once it has waited for its first.
    """
    filled = np.uint64(0)
    one = np.uint64(1)
    for run in range(len(starts)):
        coming = np.uint64(starts[min(run + 2, len(starts) - 1)])
        for _ in range(4):  # cache lines of 4-byte tokens
            prefetch(tokens, coming)
            coming += np.uint64(16)
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
