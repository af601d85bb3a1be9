"""What a dataset holds, as a number: the same for the same rows, however they are stored.

    a folder of 3 files, the same rows in one file, in memory, or after a shuffle back: one fingerprint
    another token, another label, another name or type of a column, another order of rows: another one

Hashed with 128 bits of XXH3, which tells any accidental change, and none that somebody has made up on purpose. All
values are read once, at the speed of memory: a dataset's own `_fingerprint` is cheaper, but random for what is made in
memory, and stays when a file is changed in place.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numba import config

from packing.histogram import offsets_of
from packing.source.source_files import SourceFiles
from packing.source.token_column import TEXTS, TokenColumn, Values, chosen_rows, is_list, open_lists

if TYPE_CHECKING:
    import datasets

BLOCK_ROWS = 1 << 12  # hashed by themselves, so that several threads may; part of what a fingerprint is
DIGEST_BYTES = 16
GATHERED_TOKENS = 1 << 20  # gathered at a time, if rows lie apart

DigestBlock = Callable[[int, int], tuple[bytes, int]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class ColumnPrint:
    """One column. bytes: how many were hashed, which is what its values take up. xxh3: hexadecimal."""

    name: str
    type: str
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class RowDigests:
    """Some rows, for each column: the digests of their blocks, end to end, and how many bytes were hashed."""

    digests: tuple[bytes, ...]
    bytes: tuple[int, ...]


def column_prints(dataset: datasets.Dataset) -> tuple[ColumnPrint, ...]:
    """The fingerprint of a datasets.Dataset, column by column.

    Each column's digest is that of its blocks' digests, 4,096 rows each. Memory: some blocks of a column that is no
    list of numbers, a few megabytes of others.
    """
    return join_digests(dataset, [digest_rows(dataset, config.NUMBA_NUM_THREADS)])


def digest_rows(dataset: datasets.Dataset, threads: int = 1) -> RowDigests:
    """The digests of a dataset's rows, or of some of a larger one's, where these begin with a block: rows 0, 4096, …"""
    rows, files = chosen_rows(dataset), SourceFiles.of(dataset)
    digests, sizes = [], []
    for name in dataset.data.column_names:
        digester = _block_digester(dataset.data.column(name), rows, files)
        of_blocks, bytes_of_blocks = _digest_blocks(digester, len(dataset), threads)
        digests.append(bytes(of_blocks))
        sizes.append(int(bytes_of_blocks.sum()))
    return RowDigests(tuple(digests), tuple(sizes))


def join_digests(dataset: datasets.Dataset, parts: Sequence[RowDigests]) -> tuple[ColumnPrint, ...]:
    """The fingerprint, from the digests of all rows in their order, whoever has made them."""
    prints = []
    for i, name in enumerate(dataset.data.column_names):
        digest = xxhash.xxh3_128_hexdigest(b"".join(part.digests[i] for part in parts))
        num_bytes = sum(part.bytes[i] for part in parts)
        prints.append(ColumnPrint(name, str(dataset.data.column(name).type), num_bytes, digest))
    return tuple(prints)


def combined_print(prints: tuple[ColumnPrint, ...]) -> str:
    """One number for all columns and their order."""
    return xxhash.xxh3_128("\n".join(f"{p.name} {p.type} {p.xxh3}" for p in prints).encode()).hexdigest()


def packed_fingerprint(prints: tuple[ColumnPrint, ...], description: str) -> str:
    """By which datasets knows a packed dataset: that of its source, and of the packing facts."""
    return hashlib.sha256(f"{combined_print(prints)} {description}".encode()).hexdigest()[:16]


def array_print(array: pa.Array) -> bytes:
    """The digest of an Arrow array: that of its values, wherever they lie."""
    hasher = _Hasher()
    hasher.add_array(array)
    return hasher.xxh3.digest()


def in_background(function: Callable[..., Result], *arguments: object) -> Future[Result]:
    """Call it in a thread that an interpreter that ends does not wait for: hashing can take minutes."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _digest_blocks(digest_block: DigestBlock, num_rows: int, threads: int) -> tuple[bytearray, np.ndarray]:
    """The digests of all blocks, end to end, and the bytes of each; by several threads, which take them in turn."""
    num_blocks = -(-num_rows // BLOCK_ROWS)
    digests, sizes = bytearray(DIGEST_BYTES * num_blocks), np.zeros(num_blocks, np.int64)
    turns = iter(range(num_blocks))  # next() of it is atomic

    def work() -> None:
        for block in turns:
            digest, sizes[block] = digest_block(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, num_rows))
            digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES] = digest

    workers = [in_background(work) for _ in range(min(threads, num_blocks))]
    for worker in workers:
        worker.result()
    return digests, sizes


def _block_digester(column: pa.ChunkedArray, rows: np.ndarray | None, files: SourceFiles) -> DigestBlock:
    """(first, end) -> digest of these rows, bytes. How they are hashed follows from these rows alone: others may be in
    another file, or read on another machine."""
    # A name would say that word ids hold None and are no numbers; in blocks without None they are numbers.
    opened = open_lists("", column, rows) if is_list(column.type) else None
    tokens = opened if opened is not None and opened.is_numbers else None
    nulls_somewhere = column.null_count or (tokens is not None and any(c.values.null_count for c in column.chunks))
    values = Values.of(column.chunks, column.type)

    def digest(first: int, end: int) -> tuple[bytes, int]:
        files.check()
        hasher, array = _Hasher(), None
        if nulls_somewhere or tokens is None:
            array = values.part(first, end) if rows is None else values.take(rows[first:end].astype(np.int64))
        if tokens is not None and (array is None or not (array.null_count or array.flatten().null_count)):
            _add_tokens(hasher, tokens, np.arange(first, end))
        else:
            hasher.add_array(array)
        return hasher.xxh3.digest(), hasher.bytes

    return digest


def _add_tokens(hasher: _Hasher, column: TokenColumn, rows: np.ndarray) -> None:
    """Lengths, then all tokens in order: in one piece where they lie in one."""
    starts, lengths = column.find(rows)
    hasher.add(lengths)
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]  # gather copies at least one token
    ends = starts + lengths
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    if not len(starts):
        return
    if len(breaks) * 64 <= len(rows):
        for first, end in zip([0, *breaks], [*breaks, len(starts)], strict=True):
            hasher.add(column.tokens[starts[first] : ends[end - 1]])
        return
    for first, end in _token_batches(lengths):
        part = slice(first, end)
        hasher.add(column.gather_numbers(starts[part], lengths[part], ends[part] - 1))


def _token_batches(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Rows first..end with GATHERED_TOKENS together, or one row with more."""
    before, first = offsets_of(lengths), 0
    while first < len(lengths):
        end = int(np.searchsorted(before, before[first] + GATHERED_TOKENS, side="right")) - 1
        end = max(end, first + 1)
        yield first, end
        first = end


class _Hasher:
    """Feeds an Arrow array's values to XXH3, whatever its offset, its validity bitmap's shape or what nulls cover."""

    def __init__(self) -> None:
        self.xxh3, self.bytes = xxhash.xxh3_128(), 0

    def add(self, data: Any) -> None:
        """Memory: an array or a buffer."""
        if len(data):
            raw = memoryview(data).cast("B")
            self.xxh3.update(raw)
            self.bytes += len(raw)

    def add_array(self, array: pa.Array) -> None:
        self.add(np.array([len(array), array.null_count], np.int64))
        if array.null_count:
            self.add(np.packbits(np.asarray(array.is_valid())))
            array = array.drop_null()
        self._add_values(array)

    def _add_values(self, array: pa.Array) -> None:
        """The values of an array without nulls."""
        type_ = array.type
        if isinstance(array, pa.ExtensionArray):
            self.add_array(array.storage)
        elif pa.types.is_null(type_):
            pass
        elif pa.types.is_boolean(type_):
            self.add(np.packbits(np.asarray(array)))
        elif pa.types.is_dictionary(type_):
            self.add_array(array.dictionary_decode())
        elif is_list(type_):
            self.add(np.asarray(pc.list_value_length(array)))
            self.add_array(array.flatten())
        elif pa.types.is_struct(type_):
            for field in array.flatten():
                self.add_array(field)
        elif type_ in TEXTS:
            self._add_text(array)
        elif pa.types.is_primitive(type_) or pa.types.is_fixed_size_binary(type_) or pa.types.is_decimal(type_):
            width = type_.bit_width // 8
            values = array.buffers()[1]
            if values is not None:
                self.add(values[array.offset * width : (array.offset + len(array)) * width])
        else:  # maps, unions, views: as Arrow would send them
            self.add(pa.record_batch([array], ["values"]).serialize())

    def _add_text(self, array: pa.Array) -> None:
        self.add(np.asarray(pc.binary_length(array)).astype(np.int64))
        is_large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
        _, offsets, values = array.buffers()
        if len(array) and values is not None:
            bounds = np.frombuffer(offsets, np.int64 if is_large else np.int32)
            self.add(values[int(bounds[array.offset]) : int(bounds[array.offset + len(array)])])
