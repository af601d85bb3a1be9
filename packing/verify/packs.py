"""Packs by themselves: lengths that add up, limits that hold, and every source row exactly once.

    pack   sequence_lengths   sequence_indices   input_ids       label
    0      [2 3]              [0 1]              5 tokens        2 values        sound
    1      [5]                [2]                4 tokens        1 value         one token is missing
    2      [3]                [1]                3 tokens        1 value         row 1 is there a second time

Which rows have been seen is a bit for each row of the source: nothing is kept for each sequence, but for the pieces of
rows that were split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from packing.files.saved import schema_features
from packing.numba_tools import njit
from packing.source.rows import INPUT_IDS, Source
from packing.source.token_column import NULLABLE, TokenColumn, is_list, open_token_column
from packing.store.info import PackedInfo
from packing.verify.files import Block
from packing.verify.findings import Findings

LENGTHS, INDICES, STARTS = "sequence_lengths", "sequence_indices", "sequence_starts"
PER_SEQUENCE = ("local_packs", "packs", "slots", "positions", "lengths", "rows", "begins")
SEEN_BYTES = 1 << 17  # of the rows that have been seen, looked at together
ADDED = {LENGTHS: pa.int32(), INDICES: pa.int64(), STARTS: pa.int32()}


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """The sequences of sound packs of one block, in order: (n,) int64 each.

    packs: number of the pack. slots: of the sequence in it. positions: of its first token in it.
    rows: source row. begins: the row's token that it begins with, by sequence_starts; None without such a column.
    local_packs: number of the pack in the block. pack_starts: of each column, where each pack of the block begins.
    """

    columns: dict[str, TokenColumn]
    pack_starts: dict[str, np.ndarray]
    local_packs: np.ndarray
    packs: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    begins: np.ndarray | None

    def take(self, chosen: np.ndarray) -> PackedSequences:
        arrays = {name: getattr(self, name) for name in PER_SEQUENCE}
        return replace(self, **{name: array[chosen] for name, array in arrays.items() if array is not None})

    def places(self, column: str, within: np.ndarray) -> np.ndarray:
        """Where values lie in a column; within: their number in their pack, slots or positions."""
        return self.pack_starts[column][self.local_packs] + within

    def where(self, i: int) -> dict:
        return {"pack": int(self.packs[i]), "sequence": int(self.slots[i]), "row": int(self.rows[i])}


class PackCheck:
    """Judges the packs of one packed dataset, block by block, and at the end what only all of them can show."""

    def __init__(self, facts: PackedInfo, features: datasets.Features, findings: Findings):
        assert facts.source_rows is not None  # checked_facts refuses a stream's
        self.facts, self.source_rows, self.findings = facts, facts.source_rows, findings
        self.schema, self.features = features.arrow_schema, features
        self.packs = self.sequences = self.tokens = self.deepest = 0
        self.overlong_rows = np.array(facts.overlong_rows, np.int64)
        self._seen = np.zeros(-(-self.source_rows // 8), np.uint8)  # a bit for each row
        self._pieces: list[PackedSequences] = []
        self._schemas: set = set()
        self._check_features(features)

    def _check_features(self, features: datasets.Features) -> None:
        """The columns that the dataset says it has are those of a packing."""
        for name in self.schema.names:
            if not is_list(self.schema.field(name).type):
                what = f"holds {self.schema.field(name).type} and no list for each pack"
                self.findings.add("columns", what, column=name)
        added = {name: type_ for name, type_ in ADDED.items() if name != STARTS or self.facts.overlong == "split"}
        for name, type_ in added.items():
            if name not in features:
                self.findings.add("columns", "is missing", column=name)
            elif self._value_type(name) != type_:
                self.findings.add("columns", "type", column=name, found=self._value_type(name), expected=type_)
        for name in self.facts.token_columns:
            if name not in features:
                self.findings.add("columns", "is missing: it has one value per token", column=name)
        if INPUT_IDS in features and not pa.types.is_integer(self._value_type(INPUT_IDS) or pa.null()):
            self.findings.add("columns", f"holds {self.schema.field(INPUT_IDS).type}", column=INPUT_IDS)
        self._needed = (*added, *self.facts.token_columns)
        self.can_be_read = not self.findings.counts["columns"]

    def _value_type(self, name: str) -> pa.DataType | None:
        type_ = self.schema.field(name).type
        return type_.value_type if is_list(type_) else None

    def check(self, block: Block) -> PackedSequences | None:
        """The sequences that can be compared with the source; None: there are none."""
        if not self._check_schema(block) or not block.batch.num_rows:
            self.packs += block.batch.num_rows
            return None
        columns = self._open(block)
        local = np.arange(block.batch.num_rows)
        found = {name: column.find(local) for name, column in columns.items()}
        sound = self._without_nulls(block, columns, found)
        depths, first = found[LENGTHS][1], found[LENGTHS][0][0]
        lengths = columns[LENGTHS].numbers()[first : first + depths.sum()].astype(np.int64)
        per_pack, local_packs = _offsets(depths), np.repeat(local, depths)
        slots = np.arange(len(lengths)) - per_pack[local_packs]
        ends = _offsets(lengths)
        tokens = ends[per_pack[1:]] - ends[per_pack[:-1]]
        self.packs, self.sequences = self.packs + len(depths), self.sequences + len(lengths)
        self.tokens, self.deepest = self.tokens + int(tokens.sum()), max(self.deepest, int(depths.max()))

        wrong = np.flatnonzero((lengths < 1) | (lengths > self.facts.max_sequence_length))
        sound[local_packs[wrong]] = False
        self.findings.add_all(
            "packs",
            f"a length that is not from 1 to max_sequence_length={self.facts.max_sequence_length}",
            wrong,
            lambda i: self._at(block, local_packs[i], sequence=int(slots[i]), column=LENGTHS, found=int(lengths[i])),
        )
        self._check_limits(block, depths, tokens)
        for name, (_, counts) in found.items():
            expected = tokens if name in self.facts.token_columns else depths
            sound &= counts == expected
            self._check_counts(block, name, counts, expected)
        chosen = sound[local_packs]
        starts = {name: begin for name, (begin, _) in found.items()}
        local_packs, slots = local_packs[chosen], slots[chosen]
        positions = (ends[:-1] - ends[per_pack[:-1]][np.repeat(local, depths)])[chosen]
        rows = _values(columns[INDICES], starts[INDICES][local_packs] + slots)
        begins = None
        if STARTS in columns:
            begins = _values(columns[STARTS], starts[STARTS][local_packs] + slots)
        packs = local_packs + block.first
        sequences = PackedSequences(
            columns, starts, local_packs, packs, slots, positions, lengths[chosen], rows, begins
        )
        return self._check_rows(sequences)

    def _check_counts(self, block: Block, name: str, counts: np.ndarray, expected: np.ndarray) -> None:
        kind = "tokens" if name in self.facts.token_columns else "sequences"
        self.findings.add_all(
            "packs",
            f"number of values, where sequence_lengths says how many {kind} there are",
            np.flatnonzero(counts != expected),
            lambda i: self._at(block, i, column=name, found=int(counts[i]), expected=int(expected[i])),
        )

    def _check_schema(self, block: Block) -> bool:
        """Said once for each file."""
        schema = block.batch.schema
        faults = {}
        for name in {*schema.names, *self.schema.names}:
            if schema.names.count(name) != 1 or name not in self.schema.names:
                faults[name] = f"{schema.names.count(name)} times" if name in schema.names else None
            elif schema.field(name).type != self.schema.field(name).type:
                faults[name] = schema.field(name).type
        if block.file not in self._schemas:
            self._schemas.add(block.file)
            self._check_notes(block)
            for name, found in sorted(faults.items()):
                expected = self.schema.field(name).type if name in self.schema.names else None
                what = "a column or a type that dataset_info.json does not say"
                self.findings.add("columns", what, file=block.file, column=name, found=found, expected=expected)
        return not faults

    def _check_notes(self, block: Block) -> None:
        """datasets notes columns in a file's head: names of classes, and in Parquet the packing facts."""
        if block.file is None:
            return
        try:
            found = schema_features(block.batch.schema)
        except ValueError as error:
            self.findings.add("columns", str(error), file=block.file)
            return
        for name in self.features:
            if name in found and found[name] != self.features[name]:
                what = "the file's head says something else of it than dataset_info.json"
                values = {"found": found[name], "expected": self.features[name]}
                self.findings.add("columns", what, file=block.file, column=name, **values)

    def _open(self, block: Block) -> dict[str, TokenColumn]:
        opened = {}
        for name in self.schema.names:
            column = pa.chunked_array([block.batch.column(name)])
            opened[name] = open_token_column(name, column, None, nulls=name not in self._needed)
        return opened

    def _without_nulls(self, block: Block, columns: dict[str, TokenColumn], found: dict) -> np.ndarray:
        """(packs,) whether every list is there, and every value of a column that has none missing."""
        sound = np.ones(block.batch.num_rows, np.bool_)
        for name in columns:
            lists = block.batch.column(name)
            missing = np.asarray(lists.is_null())
            if name in self._needed and name not in NULLABLE and lists.values.null_count:
                begins, counts = found[name]
                before = np.concatenate([[0], np.cumsum(np.asarray(lists.values.is_null()))])
                # offsets count in lists.values, which begins where the column's own view does
                missing |= before[begins + counts] > before[begins]
            sound &= ~missing
            describe = partial(self._at, block, column=name)
            self.findings.add_all("packs", "no value (null)", np.flatnonzero(missing), describe)
        return sound

    def _check_limits(self, block: Block, depths: np.ndarray, tokens: np.ndarray) -> None:
        longest, deepest = self.facts.max_sequence_length, self.facts.max_sequences_per_pack
        self.findings.add_all(
            "packs",
            f"tokens, more than max_sequence_length={longest}",
            np.flatnonzero(tokens > longest),
            lambda i: self._at(block, i, column=LENGTHS, found=int(tokens[i]), expected=f"at most {longest}"),
        )
        self.findings.add_all(
            "packs", "holds no sequence", np.flatnonzero(depths == 0), lambda i: self._at(block, i, column=LENGTHS)
        )
        if deepest is not None:
            self.findings.add_all(
                "packs",
                f"sequences, more than max_sequences_per_pack={deepest}",
                np.flatnonzero(depths > deepest),
                lambda i: self._at(block, i, column=LENGTHS, found=int(depths[i]), expected=f"at most {deepest}"),
            )

    def _at(self, block: Block, local_pack: int, **where: Any) -> dict:
        return {"file": block.file, "pack": block.first + int(local_pack), **where}

    def _check_rows(self, sequences: PackedSequences) -> PackedSequences:
        """Mark the rows as seen; returns the sequences whose rows exist."""
        outside = (sequences.rows < 0) | (sequences.rows >= self.source_rows)
        if outside.any():
            self.findings.add_all(
                "sequences",
                f"the source has rows 0 to {self.source_rows - 1}",
                np.flatnonzero(outside),
                lambda i: sequences.where(i) | {"column": INDICES, "found": int(sequences.rows[i]), "row": None},
            )
            sequences = sequences.take(~outside)
        once = sequences
        if len(self.overlong_rows):
            cut = np.isin(sequences.rows, self.overlong_rows)
            once = self._check_overlong(sequences, cut)
        again = np.empty(len(once.rows), np.bool_)
        _mark(self._seen, once.rows, again)
        self.findings.add_all(
            "sequences",
            "this row is there a second time",
            np.flatnonzero(again),
            lambda i: once.where(i) | {"column": INDICES},
        )
        begins = once.begins
        if begins is not None and not self.facts.trimmed_rows:
            self.findings.add_all(
                "sequences",
                "a row that was not split begins with its first token",
                np.flatnonzero(begins),
                lambda i: once.where(i) | {"column": STARTS, "found": int(begins[i]), "expected": 0},
            )
        return sequences

    def _check_overlong(self, sequences: PackedSequences, cut: np.ndarray) -> PackedSequences:
        """By what was done to rows with too many tokens; returns the sequences that must be there once."""
        longest = self.facts.max_sequence_length
        if self.facts.overlong == "split":
            self._pieces.append(sequences.take(cut))
            return sequences.take(~cut)
        if self.facts.overlong == "drop":
            what = "this row is listed as dropped and is there"
            at = np.flatnonzero(cut)
            self.findings.add_all("sequences", what, at, lambda i: sequences.where(i) | {"column": INDICES})
        else:
            self.findings.add_all(
                "sequences",
                "this row is listed as truncated, and is not as long as a pack",
                np.flatnonzero(cut & (sequences.lengths != longest)),
                lambda i: (
                    sequences.where(i) | {"column": LENGTHS, "found": int(sequences.lengths[i]), "expected": longest}
                ),
            )
        return sequences

    def finish(self, source: Source | None) -> None:
        """Check what only all packs together can show. source: with all its rows, where it is known."""
        for name, found in (("packs", self.packs), ("sequences", self.sequences), ("tokens", self.tokens)):
            expected = getattr(self.facts, f"num_{name}")
            if found != expected:
                self.findings.add("packs", f"number of {name}, in all", found=found, expected=expected)
        if self.deepest != self.facts.max_depth:
            what = "sequences in the deepest pack"
            self.findings.add("packs", what, found=self.deepest, expected=self.facts.max_depth)
        if self.facts.overlong == "split" and len(self.overlong_rows):
            self._check_pieces(source)
        for first in range(0, len(self._seen), SEEN_BYTES):
            bits = np.unpackbits(~self._seen[first : first + SEEN_BYTES], bitorder="little")
            absent = np.flatnonzero(bits) + 8 * first
            absent = absent[absent < self.source_rows]
            if self.facts.overlong == "drop":
                absent = np.setdiff1d(absent, self.overlong_rows)
            what = "this row is in no pack that can be read"
            self.findings.add_all("sequences", what, absent, lambda row: {"row": row})

    def _check_pieces(self, source: Source | None) -> None:
        """The pieces of each row lie end to end; all but a row's last one are full."""
        names = "rows", "begins", "lengths", "packs", "slots"
        parts = self._pieces
        rows, begins, lengths, packs, slots = (
            np.concatenate([getattr(p, name) for p in parts] or [np.empty(0, np.int64)]) for name in names
        )
        order = np.lexsort((begins, rows))
        rows, begins, lengths, packs, slots = (a[order] for a in (rows, begins, lengths, packs, slots))
        known = rows[rows < self.source_rows]
        _mark(self._seen, known, np.empty(len(known), np.bool_))
        longest = self.facts.max_sequence_length

        def where(i: int) -> dict:
            return {"pack": int(packs[i]), "sequence": int(slots[i]), "row": int(rows[i]), "column": STARTS}

        is_first = np.append(True, rows[1:] != rows[:-1])[: len(rows)]
        is_last = np.append(rows[1:] != rows[:-1], True)[: len(rows)]
        expected = np.append(0, (begins + longest)[:-1])[: len(rows)]
        skipped = None if source is None else source.skipped
        if self.facts.trimmed_rows and source is None:  # a row can begin after any number of padding tokens
            expected[is_first] = begins[is_first]
        else:
            expected[is_first] = 0 if skipped is None else skipped[rows[is_first]]
        wrong = begins != expected
        twice = wrong & ~is_first & (begins == np.append(0, begins[:-1])[: len(rows)])
        self.findings.add_all("sequences", "this piece of the row is there a second time", np.flatnonzero(twice), where)
        self.findings.add_all(
            "sequences",
            "the row's pieces do not lie end to end",
            np.flatnonzero(wrong & ~twice),
            lambda i: where(i) | {"found": int(begins[i]), "expected": int(expected[i])},
        )
        short = ~is_last & (lengths != longest) & ~np.append(twice[1:], False)[: len(rows)]
        self.findings.add_all(
            "sequences", "a piece that is not the row's last one is not full", np.flatnonzero(short), where
        )
        if source is None:
            lost = is_first & is_last
        else:
            row_ends = source.kept[rows] + (0 if skipped is None else skipped[rows])
            lost = is_last & (begins + lengths != row_ends)
        self.findings.add_all("sequences", "the row's last piece is missing", np.flatnonzero(lost), where)


def _values(column: TokenColumn, places: np.ndarray) -> np.ndarray:
    return column.numbers()[places].astype(np.int64)


def _offsets(counts: np.ndarray) -> np.ndarray:
    """[3, 2] -> [0, 3, 5]"""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


@njit(cache=True, nogil=True)
def _mark(seen, rows, again):
    """Set the bit of each row; fills again: whether it was set."""
    for i in range(len(rows)):
        byte, bit = rows[i] >> 3, np.uint8(1 << (rows[i] & 7))
        again[i] = (seen[byte] & bit) != 0
        seen[byte] |= bit
