"""Every value of the packs against the source, by the rule for rows that are too long, and without padding.

    source row 4   [0 c 1 2 3 4 s]   padding in front: 1 token skipped, 6 kept
    max_sequence_length=4            truncate [c 1 2 s]     split [c 1 2 3] [4 s]     drop: not there

A row's tokens alone decide what each of its sequences must be. A kernel compares numbers, text and lists of numbers
where they lie, in both memory maps. Other values are copied out and compared by their digests, by halves where these
differ.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from packing.numba_tools import njit, prefetch
from packing.source.fingerprint import array_print
from packing.source.rows import Source, read_source
from packing.source.sequences import Sequences, cut_sequences
from packing.source.token_column import TEXTS, TokenColumn, Values, is_list, open_lists
from packing.store.info import CELL, INDICES, LENGTHS, STARTS, PackedInfo
from packing.verify.findings import Findings
from packing.verify.packs import PackedSequences


def source_check(
    dataset: datasets.Dataset, facts: PackedInfo, packed: datasets.Features, padding: int | None, findings: Findings
) -> SourceCheck | None:
    """What compares packs with their source; None, and a finding, where the packs cannot come from it."""
    try:
        source = read_source(dataset, facts.token_columns, padding)
        sequences = cut_sequences(source, facts.max_sequence_length, facts.overlong)
    except (ValueError, TypeError) as error:
        findings.add("source", f"packing would refuse this source: {error}")
        return None
    check = SourceCheck(source, facts, findings, sequences)
    check.choose_columns(dataset.features, packed)
    return check


class SourceCheck:
    """Compares packs with the source that they are said to be made from, block by block.

    Memory: 4 bytes a source row for its length, and 4 each where there is padding, or rows are cut.
    """

    def __init__(self, source: Source, facts: PackedInfo, findings: Findings, sequences: Sequences):
        self.source, self.facts, self.findings = source, facts, findings
        self._names: list[str] = []  # the columns that can be compared
        self._row_columns: dict[str, TokenColumn | None] = {}  # None: they are no runs of numbers
        self._keeps_closing = facts.overlong == "truncate" and sequences.ends is not None
        overlong = tuple(sequences.overlong_rows.tolist())
        if overlong != facts.overlong_rows:
            other = sorted({*overlong} ^ {*facts.overlong_rows})
            what = f"rows with more than {facts.max_sequence_length} tokens are not the ones that the packs' facts list"
            findings.add("source", what, row=other[0], found=len(overlong), expected=len(facts.overlong_rows))
        counts = {"source_rows": source.num_rows, "overlong_tokens": sequences.overlong_tokens}
        counts |= {"trimmed_rows": source.trimmed_rows, "trimmed_tokens": source.trimmed_tokens}
        for name, found in counts.items():
            if found != (expected := getattr(facts, name)):
                what = f"{name.replace('_', ' ')} of the source differ from the packs' facts"
                findings.add("source", what, found=found, expected=expected)

    def choose_columns(self, features: datasets.Features, packed: datasets.Features) -> None:
        """Find the columns to compare: those of both, with one type of value."""
        columns = self.source.columns
        token_names = [column.name for column in columns.token_columns]
        for name in (*token_names, *columns.row_columns):
            expected = _inner(features[name]) if name in token_names else features[name]
            if name not in packed:
                self.findings.add("source", "the packs have no such column", column=name)
            elif (found := _inner(packed[name])) != expected:
                self.findings.add("source", "type of a value", column=name, found=found, expected=expected)
            else:
                self._names.append(name)
                if name in columns.row_columns:
                    self._row_columns[name] = as_runs(columns.row_columns[name], columns.rows)
        for name in packed:
            if name not in (*token_names, *columns.row_columns, LENGTHS, INDICES, STARTS, *CELL):
                self.findings.add("source", "the source has no such column", column=name)

    @property
    def has_all_rows(self) -> bool:
        return self.source.num_rows == self.facts.source_rows

    @property
    def looked_at(self) -> str:
        return f"{self.source.num_rows:,} rows, {len(self._names)} columns compared"

    def check(self, sequences: PackedSequences) -> None:
        """Compare the sequences of one block."""
        source, longest = self.source, self.facts.max_sequence_length
        sequences = sequences.take(sequences.rows < source.num_rows)  # the facts' source_rows has shown the others
        kept = source.kept[sequences.rows].astype(np.int64)
        skipped = np.zeros_like(kept) if source.skipped is None else source.skipped[sequences.rows].astype(np.int64)
        begins, lengths = skipped, kept
        if self.facts.overlong == "split" and sequences.begins is not None:
            begins = sequences.begins
            first = begins - skipped
            exists = (first >= 0) & (first < kept) & (first % longest == 0)
            what = f"no piece of the row begins there: they begin every {longest} tokens"
            self.findings.add_all("source", what, ~exists, sequences.where, column=STARTS, found=begins)
            lengths = np.where(exists, np.minimum(kept - first, longest), -1)
        elif self.facts.overlong == "truncate":
            lengths = np.minimum(kept, longest)
        same, values = sequences.lengths == lengths, {"found": sequences.lengths, "expected": lengths}
        self.findings.add_all("source", "length", (lengths >= 0) & ~same, sequences.where, column=LENGTHS, **values)
        for name, of_source in self._row_columns.items():
            self._check_values(name, of_source, sequences)
        lasts = (skipped + kept if self._keeps_closing else begins + lengths) - 1
        if not same.all():
            sequences, begins, lengths, lasts = sequences.take(same), begins[same], lengths[same], lasts[same]
        for column in self.source.columns.token_columns:
            if column.name in self._names:
                self._check_tokens(column, sequences, begins, lengths, lasts)

    def _check_tokens(
        self, truth: TokenColumn, sequences: PackedSequences, begins: np.ndarray, lengths: np.ndarray, lasts: np.ndarray
    ) -> None:
        name, packed = truth.name, sequences.columns[truth.name]
        starts, _ = truth.find(sequences.rows)
        places = sequences.places(name, sequences.positions)
        firsts, differing = np.full(len(places), -1), np.zeros(len(places), np.int64)
        if packed.is_numbers and truth.is_numbers:
            both = packed.tokens, places, truth.tokens, starts + begins, lengths, starts + lasts
            _compare(*both, firsts, differing)
        else:
            found = packed.gather(places, lengths, places + lengths - 1)
            expected = _as(truth.gather(starts + begins, lengths, starts + lasts), found.type)
            where = _differing_places(found, expected)
            ends = np.cumsum(lengths)
            run = np.searchsorted(ends, where, side="right")
            np.add.at(differing, run, 1)
            firsts[run[::-1]] = (where - (ends - lengths)[run])[::-1]  # the first one of a run comes last, and stays

        def describe(i: int) -> dict:
            source_place = (lasts if firsts[i] == lengths[i] - 1 else begins + firsts)[i]
            found, expected = _value(packed, places[i] + firsts[i]), _value(truth, starts[i] + source_place)
            return sequences.where(i) | {"found": found, "expected": expected}

        what, positions = "first of the sequence's values that differ", sequences.positions + firsts
        self.findings.add_all("source", what, differing > 0, describe, position=positions, column=name)

    def _check_values(self, name: str, of_source: TokenColumn | None, sequences: PackedSequences) -> None:
        packed, places = sequences.columns[name], sequences.places(name, sequences.slots)
        of_packs = _packed_runs(packed)
        if of_source is not None and of_packs is not None:
            differing = _differing_runs(of_packs, places, of_source, sequences.rows)
        else:
            found = packed.gather(places, np.ones_like(places), places)
            differing = np.zeros(len(places), np.bool_)
            differing[_differing_places(found, self._row_values(name, sequences.rows, found.type))] = True

        def describe(i: int) -> dict:
            expected = self._row_values(name, sequences.rows[i : i + 1], packed.value_type)[0].as_py()
            return sequences.where(i) | {"found": _value(packed, places[i]), "expected": expected}

        self.findings.add_all("source", "value", differing, describe, column=name)

    def _row_values(self, name: str, rows: np.ndarray, type_: pa.DataType) -> pa.Array:
        columns = self.source.columns
        rows = rows if columns.rows is None else columns.rows[rows].astype(np.int64)
        return _as(columns.row_columns[name].take(rows), type_)


def as_runs(column: Values, rows: np.ndarray | None = None) -> TokenColumn | None:
    """Values as runs of numbers, each a row, where they lie in memory; None: they are no such values.

    a number          a run of one
    text or bytes     its bytes
    a list of numbers itself
    """
    type_ = column.type
    if any(chunk.null_count for chunk in column.chunks):
        return None
    if _is_number(type_):
        chunks = [pa.FixedSizeListArray.from_arrays(chunk, 1) for chunk in column.chunks]
        type_ = pa.list_(type_, 1)
    elif type_ in TEXTS:
        is_large = type_ in (pa.large_string(), pa.large_binary())
        type_ = pa.large_list(pa.uint8()) if is_large else pa.list_(pa.uint8())
        chunks = [_bytes(chunk, type_) for chunk in column.chunks]
    elif is_list(type_) and _is_number(type_.value_type):
        chunks = column.chunks
        if any(chunk.values.null_count for chunk in chunks):
            return None
    else:
        return None
    return open_lists("", pa.chunked_array(chunks, type_), rows)


def _is_number(type_: pa.DataType) -> bool:
    return pa.types.is_integer(type_) or pa.types.is_floating(type_)


def _bytes(chunk: pa.Array, type_: pa.DataType) -> pa.Array:
    """Text as lists of bytes, in the same memory."""
    _, offsets, data = chunk.buffers()
    count = 0 if data is None else data.size
    values = pa.Array.from_buffers(pa.uint8(), count, [None, data])
    return pa.Array.from_buffers(type_, len(chunk), [None, offsets], 0, chunk.offset, [values])


def _packed_runs(packed: TokenColumn) -> TokenColumn | None:
    """The values of a column of the packs, one a run."""
    if packed.values is not None:
        return as_runs(packed.values)
    values = pa.Array.from_buffers(packed.value_type, len(packed.tokens), [None, pa.py_buffer(packed.tokens)])
    return as_runs(Values.of([values], values.type))


def _differing_runs(found: TokenColumn, places: np.ndarray, expected: TokenColumn, rows: np.ndarray) -> np.ndarray:
    """(values,) bool: which ones differ, in their lengths or in a number."""
    (places, lengths), (starts, others) = found.find(places), expected.find(rows)
    differing = (lengths != others) | (found.value_type != expected.value_type)
    there = np.flatnonzero(~differing & (lengths > 0))
    firsts, counts = np.empty(len(there), np.int64), np.zeros(len(there), np.int64)
    places, starts, lengths = places[there], starts[there], lengths[there]
    _compare(found.tokens, places, expected.tokens, starts, lengths, starts + lengths - 1, firsts, counts)
    differing[there] = counts > 0
    return differing


def _differing_places(found: pa.Array, expected: pa.Array) -> np.ndarray:
    """Where two arrays of one type and length differ. Floats compare by bits: nan equals nan, 0 differs from -0."""
    differing, parts = [], [(0, len(found))]
    while parts:
        first, count = parts.pop()
        if array_print(found.slice(first, count)) == array_print(expected.slice(first, count)):
            continue
        if count == 1:
            differing.append(first)
        else:
            half = count // 2
            parts += [(first + half, count - half), (first, half)]
    return np.array(differing, np.int64)


def _value(column: TokenColumn, place: int) -> object:
    at = np.array([place])
    return column.gather(at, np.ones(1, np.int64), at)[0].as_py()


def _as(array: pa.Array, type_: pa.DataType) -> pa.Array:
    return array if array.type == type_ else array.cast(type_)


def _inner(feature: Any) -> Any:
    """The feature of a list's values; datasets may write a list feature as a Python list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


@njit(cache=True, nogil=True)
def _compare(found, places, expected, starts, lengths, lasts, firsts, differing):
    """Compare runs of tokens: lengths[i] - 1 from starts[i] on, then the one at lasts[i].

    Fills firsts: where each run first differs, and differing: in how many tokens. Unsigned indices let the processor
    compare many tokens at once; only a run that differs is searched. The run after next is loaded ahead.
    """
    one = np.uint64(1)
    for run in range(len(places)):
        coming = np.uint64(starts[min(run + 2, len(starts) - 1)])
        for _ in range(4):  # cache lines of 4-byte tokens
            prefetch(expected, coming)
            coming += np.uint64(16)
        place, start, most = np.uint64(places[run]), np.uint64(starts[run]), np.uint64(lengths[run]) - one
        count = 0
        for i in range(most):
            count += found[place + i] != expected[start + i]
        last_differs = found[place + most] != expected[np.uint64(lasts[run])]
        differing[run] = count + last_differs
        if count:
            for i in range(most):
                if found[place + i] != expected[start + i]:
                    firsts[run] = np.int64(i)
                    break
        elif last_differs:
            firsts[run] = np.int64(most)
