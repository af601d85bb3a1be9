"""unpack_dataset: packed dataset -> the rows that were packed, in their order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import datasets
import numpy as np
import pyarrow as pa

from packing.epochs import EpochPacks
from packing.files.folder import check_target, new_folder
from packing.source.rows import RESERVED
from packing.source.token_column import chosen_rows, read_lists
from packing.store.dataset_files import write_dataset
from packing.store.info import INDICES, STARTS, PackedInfo, packed_info

BATCH_TOKENS = 1 << 20  # gathered at a time
LISTED = 1000  # rows named in the description


def unpack_dataset(packed: datasets.Dataset, output: str | os.PathLike | None = None) -> datasets.Dataset:
    """The rows of the source, a sequence each, from a dataset of pack_dataset.

    input_ids        label   sequence_lengths  sequence_indices          input_ids      label
    [7 8 5 6 4]      [a b]   [2 3]             [0 2]             ->      [7 8]          a
    [9 9 9 9 9]      [c]     [5]               [1]                       [9 9 9 9 9]    c
                                                                         [5 6 4]        b

    Rows come in the source's order, with the source's columns (input_ids first) and types; lists of any length. Pieces
    of a row that was split are joined. Padding stays trimmed, without attention_mask. Rows that were dropped are
    missing, and truncated ones short: packed_info(packed).overlong_rows has them, and so has the result's description.

    output: a folder to write, for load_from_disk; must not exist. None: the result stays in memory.

    Memory: 40 bytes a sequence, and the result where there is no output.

    Raises ValueError for a dataset that was not packed, in which a source row is missing or there twice, or whose
    columns do not belong to its sequences any more.
    """
    if output is not None:
        check_target(output)
    facts = packed_info(packed)
    if facts.source_rows is None:
        raise ValueError("a stream was packed: nobody knows whether all of its rows are there")
    sequences = EpochPacks(packed)
    order, row_offsets = _source_order(packed, sequences.lengths, facts, facts.source_rows)
    features = _features(packed.features, facts)
    info = packed.info.copy()
    info.description, info.features = _description(facts, len(row_offsets) - 1), features
    batches = _batches(sequences, order, row_offsets, features.arrow_schema, facts)
    fingerprint = hashlib.sha256(f"unpacked {packed._fingerprint}".encode()).hexdigest()[:16]
    if output is None:
        table = pa.Table.from_batches(batches, features.arrow_schema)
        return datasets.Dataset(table, info=info, split=packed.split, fingerprint=fingerprint)
    with new_folder(output) as folder:
        split = None if packed.split is None else str(packed.split)
        write_dataset(folder, batches, info, lambda: fingerprint, split)
    return datasets.load_from_disk(str(output))


def _source_order(
    packed: datasets.Dataset, lengths: np.ndarray, facts: PackedInfo, source_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences by their stored number in the order of the source; (rows + 1,) where each row begins among them."""
    rows = stored_numbers(packed, INDICES)
    is_split = STARTS in packed.column_names
    begins = stored_numbers(packed, STARTS) if is_split else np.zeros(len(rows), np.int32)
    order = np.lexsort((begins, rows)) if is_split else np.argsort(rows, kind="stable")
    rows, begins, lengths = rows[order], begins[order].astype(np.int64), lengths[order]
    is_first = np.append(True, rows[1:] != rows[:-1])
    # a row's next piece begins where this one ends; a row that is there twice does not
    torn = np.flatnonzero(~is_first[1:] & (begins[1:] != begins[:-1] + lengths[:-1]))
    if len(torn):
        raise ValueError(f"source row {rows[torn[0] + 1]} is there twice, or lacks a piece; unpack {WHOLE}")
    dropped = np.array(facts.overlong_rows if facts.overlong == "drop" else (), np.int64)
    _refuse_other_rows(rows[is_first], dropped, source_rows)
    if facts.overlong == "split" and len(rows) != facts.num_sequences:
        raise ValueError(f"{facts.num_sequences} sequences were packed, and {len(rows)} are there; unpack {WHOLE}")
    return order, np.append(np.flatnonzero(is_first), len(rows))


def _refuse_other_rows(found: np.ndarray, dropped: np.ndarray, source_rows: int) -> None:
    """Raise ValueError unless these are all rows of the source but those that were dropped. Memory follows `found`."""
    known, extra = np.union1d(found, dropped), np.intersect1d(found, dropped)
    outside = known[(known < 0) | (known >= source_rows)]
    inside = known[(known >= 0) & (known < source_rows)]
    missing = source_rows - len(inside)
    if count := missing + len(outside) + len(extra):
        gap = np.append(np.flatnonzero(inside != np.arange(len(inside))), len(inside))[:1]
        first = min(int(part[0]) for part in (gap if missing else gap[:0], outside, extra) if len(part))
        raise ValueError(f"{count} source rows are not where they were packed, row {first} first; unpack {WHOLE}")


WHOLE = "the whole packed dataset as pack_dataset made it (verify_packed names what is wrong)"


def stored_numbers(packed: datasets.Dataset, name: str) -> np.ndarray:
    """(sequences,) values of a column with one number per sequence, pack after pack."""
    column = read_lists(name, packed.data.column(name), chosen_rows(packed))
    starts, lengths = column.find(np.arange(column.num_rows))
    return column.gather(starts, lengths, starts + lengths - 1).to_numpy()


def _batches(
    sequences: EpochPacks, order: np.ndarray, row_offsets: np.ndarray, schema: pa.Schema, facts: PackedInfo
) -> Iterator[pa.RecordBatch]:
    """Rows, as many at a time as have BATCH_TOKENS. Pieces of a row are gathered as if they shared a pack."""
    ends = np.cumsum(sequences.lengths[order], dtype=np.int64)[row_offsets[1:] - 1]  # where each row's tokens end
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + BATCH_TOKENS, side="right")))
        bounds = row_offsets[first : end + 1]
        table = sequences.table(order[bounds[0] : bounds[-1]], bounds - bounds[0])
        arrays = []
        for field in schema:
            lists = table.column(field.name).combine_chunks()
            if field.name not in facts.token_columns:  # each piece has the row's value
                lists = lists.values.take(pa.array(bounds[:-1] - bounds[0]))
            arrays.append(lists if lists.type == field.type else lists.cast(field.type))
        yield pa.record_batch(arrays, schema)
        first = end


def _features(packed: datasets.Features, facts: PackedInfo) -> datasets.Features:
    """Token-level columns are lists as before, others the values in their lists; what packing added is left out."""
    features = {}
    for name, feature in packed.items():
        if name in facts.token_columns:
            features[name] = feature
        elif name not in RESERVED:
            features[name] = feature[0] if isinstance(feature, list) else feature.feature
    return datasets.Features(features)


def _description(facts: PackedInfo, num_rows: int) -> str:
    said = [f"Unpacked by dataset-packing: {num_rows} of {facts.source_rows} source rows."]
    if facts.overlong_rows:
        what = {"truncate": "Cut short", "split": "Split and joined again", "drop": "Dropped"}[facts.overlong]
        rows = ", ".join(map(str, facts.overlong_rows[:LISTED])) + (", …" if len(facts.overlong_rows) > LISTED else "")
        said.append(
            f"{what}, {len(facts.overlong_rows)} rows of more than {facts.max_sequence_length} tokens, "
            f"{facts.overlong_tokens} tokens lost: {rows}."
        )
    if facts.trimmed_rows:
        said.append(f"Padding trimmed: {facts.trimmed_tokens} tokens from {facts.trimmed_rows} rows.")
    return " ".join(said)
