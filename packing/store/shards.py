"""Shards of a packed dataset: what one holds is decided before, and a pure function writes it, in any process.

    plan + assignment -> PackSlice per shard -> write_shard -> ShardRecord           (the parent decides, workers copy)

A shard depends on the source's content, its PackSlice and the schema alone, so any engine writes the same bytes:

    columns = open_columns(dataset, token_columns)           # in every worker, once: views of the memory map
    record = write_shard(columns, task)                      # in any order, any number of times

write_shard is idempotent: it leaves a shard that is there, with the bytes that its record says. A shard gets its name
when it has reached the disk, and its record after that, so a file with a record is whole, whenever the power fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from packing.files.errors import Option, OptionError
from packing.files.hashed import checksum, write_file
from packing.files.metadata import build, read_json
from packing.files.paths import Place, place
from packing.histogram import offsets_of
from packing.source.rows import SourceColumns
from packing.source.sequences import PackSlice
from packing.source.token_column import list_array
from packing.store.dataset_files import write_batches
from packing.store.info import CELL

BATCHES_AHEAD = 2  # gathered while another is written


def check_parquet(schema: pa.Schema) -> None:
    """Raise ValueError for a column of a type that Parquet does not have."""
    import pyarrow.parquet as pq

    for column in schema:
        try:
            written = pa.BufferOutputStream()
            pq.write_table(pa.schema([column]).empty_table(), written)
            found = pq.read_schema(pa.BufferReader(written.getvalue())).field(0).type
            fault = "" if found == column.type else f"it would be {found}"
        except pa.ArrowException as error:
            fault = str(error)
        if fault:
            what = f"column {column.name!r} holds {column.type}, no type of Parquet: {fault}"
            raise OptionError(f"{what}; take {Option('format', 'arrow')}, or leave the column out")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write. folder: of the dataset in the making, a path or a URL. file: the shard's name in it.

    batch_packs: packs in a record batch; part of what decides the bytes. storage_options: of a URL's file system.
    Picklable."""

    folder: str
    file: str
    packs: PackSlice
    schema: pa.Schema
    batch_packs: int
    storage_options: dict | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ShardRecord:
    """What is kept of a finished shard. xxh3: 128 bits of XXH3 over the file, in hexadecimal."""

    file: str
    packs: int
    sequences: int
    tokens: int
    bytes: int
    xxh3: str


def gather_packs(
    columns: SourceColumns, packs: PackSlice, schema: pa.Schema, buffers: dict[str, np.ndarray] | None = None
) -> pa.RecordBatch:
    """The packs as one record batch of the packed dataset's schema.

    buffers: kept from call to call, so that tokens are gathered into the same memory; a batch is then good until the
        next call with the same buffers only.
    """
    columns.files.check()
    rows, lengths = packs.rows.astype(np.int64, copy=False), packs.lengths.astype(np.int64)
    begins = 0 if packs.begins is None else packs.begins.astype(np.int64)
    lasts = (begins + lengths if packs.ends is None else packs.ends) - 1
    token_offsets = offsets_of(lengths)[packs.pack_offsets]
    per_pack = packs.pack_offsets.astype(np.int32)
    packed = {
        "sequence_lengths": (per_pack, pa.array(packs.lengths.astype(np.int32, copy=False))),
        "sequence_indices": (per_pack, pa.array(rows)),
    }
    if "sequence_starts" in schema.names:
        starts = np.zeros(len(rows), np.int32) if packs.begins is None else packs.begins.astype(np.int32)
        packed["sequence_starts"] = per_pack, pa.array(starts)
    if packs.places is not None:
        of_sequences = np.repeat(packs.places.T, np.diff(packs.pack_offsets), axis=1)
        packed |= {name: (per_pack, pa.array(values)) for name, values in zip(CELL, of_sequences, strict=True)}
    for column in columns.token_columns:
        starts, found = column.find(rows)
        if (short := found <= lasts).any():
            raise ValueError(f"row {rows[np.argmax(short)]} of the source has fewer tokens than when packing began")
        buffer = None if buffers is None else column.buffer(buffers, int(token_offsets[-1]))
        packed[column.name] = token_offsets, column.gather(starts + begins, lengths, starts + lasts, buffer)
    table_rows = rows if columns.rows is None else columns.rows[rows].astype(np.int64)
    for name, values in columns.row_columns.items():
        packed[name] = per_pack, values.take(table_rows)
    return pa.record_batch([list_array(*packed[field.name], field.type) for field in schema], schema)


def gather_batches(columns: SourceColumns, packs: PackSlice, schema: pa.Schema, step: int) -> Iterator[pa.RecordBatch]:
    """The packs, `step` at a time, gathered by a thread while the caller writes the batch before.

    A batch is good until the next one is asked for: its memory is used again.
    """
    bounds = [(i, min(i + step, packs.num_packs)) for i in range(0, packs.num_packs, step)]
    rooms: list[dict[str, np.ndarray]] = [{} for _ in range(BATCHES_AHEAD + 1)]

    def gather(number: int) -> pa.RecordBatch:
        return gather_packs(columns, packs.part(*bounds[number]), schema, rooms[number % len(rooms)])

    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(gather, number) for number in range(min(BATCHES_AHEAD, len(bounds)))]
        for number in range(len(bounds)):
            batch = ahead.pop(0).result()
            if number + BATCHES_AHEAD < len(bounds):  # its room is that of the batch before this one
                ahead.append(pool.submit(gather, number + BATCHES_AHEAD))
            yield batch


def write_shard(columns: SourceColumns, task: ShardTask, advance: Callable[[int], None] | None = None) -> ShardRecord:
    """Write one shard and its record, unless both are there and agree.

    advance: called with the packs of each batch that is written; what it raises ends the writing.

    Raises OSError where the disk is full or fails; what is finished stays, and nothing has the shard's name.
    """
    path = place(task.folder, task.storage_options) / task.file
    record = read_record(path)
    if record is not None and record.xxh3 == checksum(path):
        if advance is not None:
            advance(record.packs)
        return record
    batches = gather_batches(columns, task.packs, task.schema, task.batch_packs)
    file = write_batches(path, task.schema, batches, advance)
    tokens = int(task.packs.lengths.sum(dtype=np.int64))
    record = ShardRecord(task.file, task.packs.num_packs, len(task.packs.rows), tokens, file.size, file.xxh3)
    write_record(path, record)
    return record


def record_path(shard: Place) -> Place:
    """data-00000-of-00003.arrow -> data-00000-of-00003.record, there until the manifest has all of them."""
    return shard.with_suffix(".record")


def write_record(shard: Place, record: ShardRecord) -> None:
    """After the shard itself is on the disk."""
    write_file(record_path(shard), json.dumps(asdict(record)).encode())


def read_record(shard: Place) -> ShardRecord | None:
    """The record of a finished shard whose file has the size that it says."""
    try:
        record = build(ShardRecord, read_json(record_path(shard)), "the record")
        return record if shard.stat().st_size == record.bytes else None
    except (FileNotFoundError, ValueError):
        return None
