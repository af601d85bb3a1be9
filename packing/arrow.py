"""Token columns in Arrow memory: where each row's tokens lie, and copying them out without a Python object per row.

A list column is a flat array of tokens and, for each row, an offset into it; a dataset holds it in chunks:

    chunk 0   offsets [0, 3, 5]   tokens [7 7 7 8 8]         row 0 -> starts at 0, 3 tokens
    chunk 1   offsets [0, 2]      tokens [9 9]               row 2 -> starts where chunk 1's tokens lie

Starts are counted from the lowest token in memory, so that one flat view reaches all chunks, and one kernel loop copies
rows from anywhere: slices of chunks, lists with 32-bit or 64-bit offsets and lists of fixed size look the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .kernels import njit


@dataclass(frozen=True, eq=False)
class TokenColumn:
    """One list column, row by row.

    starts: (rows,) int64, where the row's tokens begin in `tokens`.
    lengths: (rows,) int64, tokens in the row.
    tokens: all tokens. Numbers: one flat view of unsigned integers as wide as they are, across all chunks.
        Others (strings, booleans, lists): the chunks' values as they are.
    value_type: Arrow type of a token.
    """

    name: str
    starts: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray | pa.ChunkedArray
    value_type: pa.DataType

    def numbers(self) -> np.ndarray:
        """The flat view with its own dtype, to be read as numbers."""
        return self.tokens.view(np.dtype(self.value_type.to_pandas_dtype()))

    def gather(self, starts: np.ndarray, lengths: np.ndarray, lasts: np.ndarray) -> pa.Array:
        """Copy out runs of tokens, end to end: lengths[i] - 1 tokens from starts[i] on, then the one at lasts[i].

        A run's last token is named by itself because a truncated sequence keeps its row's last one.
        """
        if isinstance(self.tokens, pa.ChunkedArray):
            positions = np.empty(int(lengths.sum()), np.int64)
            _positions(starts, lengths, lasts, positions)
            return take_rows(self.tokens, positions)
        gathered = np.empty(int(lengths.sum()), self.tokens.dtype)
        _gather(self.tokens, starts, lengths, lasts, gathered)
        return pa.Array.from_buffers(self.value_type, len(gathered), [None, pa.py_buffer(gathered)])


def is_list(type_: pa.DataType) -> bool:
    """Whether rows of this type have a length and tokens in one flat array."""
    return pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)


def list_lengths(column: pa.ChunkedArray, rows: np.ndarray | None) -> np.ndarray:
    """(rows,) int64: the number of tokens in each row, from the offsets; a null row has 0."""
    return _of_rows([_starts_and_lengths(chunk)[1] for chunk in column.chunks], rows)


def null_rows(column: pa.ChunkedArray, rows: np.ndarray | None) -> np.ndarray:
    """(rows,) bool: where there is no list at all."""
    return _of_rows([np.asarray(chunk.is_null()) for chunk in column.chunks], rows, np.bool_)


def read_token_column(
    name: str, column: pa.ChunkedArray, rows: np.ndarray | None, *, nulls: bool = False
) -> TokenColumn:
    """Find every row's tokens. rows: the dataset's own choice of rows (after select, shuffle, filter); None = all.

    nulls: whether a token may be null; then numbers are kept as Arrow has them, where there is one.
    Raises ValueError, naming the row, where a list is null, or a token that may not be.
    """
    if column.null_count and null_rows(column, rows).any():
        culprit = int(np.argmax(null_rows(column, rows)))
        raise ValueError(f"column {name!r} has no value (null) in row {culprit}; fill it in or leave the row out")
    parts = [_starts_and_lengths(chunk) for chunk in column.chunks]
    children = [chunk.values for chunk in column.chunks]
    value_type = column.type.value_type
    has_nulls = any(child.null_count for child in children)
    if (pa.types.is_integer(value_type) or pa.types.is_floating(value_type)) and not (nulls and has_nulls):
        tokens, shifts = _flat_view(children, value_type)
    else:
        tokens = pa.chunked_array(children, value_type)
        shifts = np.cumsum([0] + [len(child) for child in children])
    starts = _of_rows([part[0] + shift for part, shift in zip(parts, shifts, strict=False)], rows)
    lengths = _of_rows([part[1] for part in parts], rows)
    if has_nulls and not nulls:
        # Positions of nulls, counted as `starts` are.
        nulls = [np.flatnonzero(child.is_null()) + shift for child, shift in zip(children, shifts, strict=False)]
        _refuse_nulls(name, np.sort(np.concatenate(nulls)), starts, lengths)
    return TokenColumn(name, starts, lengths, tokens, value_type)


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


def _starts_and_lengths(chunk: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where each row of one chunk begins in chunk.values, and its length; int64."""
    if pa.types.is_fixed_size_list(chunk.type):
        width = chunk.type.list_size  # .values is not sliced with the chunk, so the chunk's offset counts
        starts = (chunk.offset + np.arange(len(chunk), dtype=np.int64)) * width
        return starts, np.full(len(chunk), width, np.int64)
    offsets = chunk.offsets.to_numpy().astype(np.int64)
    return offsets[:-1], np.diff(offsets)


def _of_rows(parts: list[np.ndarray], rows: np.ndarray | None, dtype=np.int64) -> np.ndarray:
    whole = np.concatenate(parts) if parts else np.empty(0, dtype)
    return whole if rows is None else whole[rows]


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


def _refuse_nulls(name: str, nulls: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
    """Raise for the first row that reaches over one of the null positions (sorted)."""
    hit = np.searchsorted(nulls, starts, side="left") < np.searchsorted(nulls, starts + lengths, side="left")
    if hit.any():
        culprit = int(np.argmax(hit))
        raise ValueError(f"column {name!r} has a null token in row {culprit}; fill it in or leave the row out")


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
