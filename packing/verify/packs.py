"""Packs by themselves: lengths that add up, limits that hold, and every source row exactly once.

    pack   sequence_lengths   sequence_indices   input_ids       label
    0      [2 3]              [0 1]              5 tokens        2 values        sound
    1      [5]                [2]                4 tokens        1 value         one token is missing
    2      [3]                [1]                3 tokens        1 value         row 1 is there a second time

Memory: a bit for each row of the source that has been seen, and 40 bytes for each piece of a row that was split, or 64
with cohorts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from packing.files.saved import schema_features
from packing.histogram import offsets_of
from packing.numba_tools import njit
from packing.source.rows import INPUT_IDS, Source
from packing.source.token_column import NULLABLE, TokenColumn, is_list, open_lists
from packing.store.info import CELL, INDICES, LENGTHS, STARTS, PackedInfo
from packing.verify.cohorts import CohortCheck, check_order
from packing.verify.files import Block
from packing.verify.findings import Findings

PER_SEQUENCE = ("local_packs", "packs", "slots", "positions", "lengths", "rows", "begins", "cells")
PIECE = ("rows", "begins", "lengths", "packs", "slots")  # kept for each piece of a split row
SEEN_BYTES = 1 << 17  # bytes of the rows that have been seen, looked at together
ADDED = {LENGTHS: pa.int32(), INDICES: pa.int64(), STARTS: pa.int32()} | dict.fromkeys(CELL, pa.int32())


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """The sequences of sound packs of one block, in order: (n,) int64 each.

    packs: number of the pack. slots: the sequence's place in it. positions: the place of its first token in it.
    rows: source row. begins: the row's token that it begins with, by sequence_starts; None without such a column.
    cells: (n, 3) cohort, round and lane; None without cohorts.
    local_packs: number of the pack in the block. pack_starts: for each column, where each pack of the block begins.
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
    cells: np.ndarray | None

    def take(self, chosen: np.ndarray) -> PackedSequences:
        arrays = {name: getattr(self, name) for name in PER_SEQUENCE}
        return replace(self, **{name: array[chosen] for name, array in arrays.items() if array is not None})

    def places(self, column: str, within: np.ndarray) -> np.ndarray:
        """Where values lie in a column; within: their places in their packs (slots or positions)."""
        return self.pack_starts[column][self.local_packs] + within

    def where(self, i: int) -> dict:
        return {"pack": int(self.packs[i]), "sequence": int(self.slots[i]), "row": int(self.rows[i])}


class PackCheck:
    """Checks the packs of one packed dataset, block by block, and at the end what only all of them can show."""

    def __init__(self, facts: PackedInfo, features: datasets.Features, findings: Findings):
        assert facts.source_rows is not None  # checked_facts refuses a stream's
        self.facts, self.source_rows, self.findings = facts, facts.source_rows, findings
        self.features = features
        self._types = {column.name: column.type for column in features.arrow_schema}
        self.packs = self.sequences = self.tokens = self.deepest = 0
        self.overlong_rows = np.array(facts.overlong_rows, np.int64)
        self._seen = np.zeros(-(-self.source_rows // 8), np.uint8)  # a bit for each row
        self._pieces: list[np.ndarray] = []  # (5, n), as in PIECE; with cohorts (8, n): the places, too
        self._cohorts = None if facts.cohort is None else CohortCheck(facts, findings)
        self._schemas: set = set()
        self._check_columns()

    def _check_columns(self) -> None:
        """Check that the dataset's columns are those of a packing."""
        values = {name: type_.value_type if is_list(type_) else None for name, type_ in self._types.items()}
        for name, value in values.items():
            if value is None:
                self.findings.add("columns", f"holds {self._types[name]}, not a list for each pack", column=name)
        absent = [STARTS] if self.facts.overlong != "split" else []
        absent += CELL if self.facts.cohort is None else ()
        added = {name: type_ for name, type_ in ADDED.items() if name not in absent}
        for name, type_ in added.items():
            if name not in values:
                self.findings.add("columns", "is missing", column=name)
            elif values[name] != type_:
                self.findings.add("columns", "type", column=name, found=values[name], expected=type_)
        for name in self.facts.token_columns:
            if name not in values:
                self.findings.add("columns", "is missing: it has one value per token", column=name)
        if INPUT_IDS in values and not pa.types.is_integer(values[INPUT_IDS] or pa.null()):
            self.findings.add("columns", f"holds {self._types[INPUT_IDS]}", column=INPUT_IDS)
        self._needed = (*added, *self.facts.token_columns)
        self.can_be_read = not self.findings.counts["columns"]

    def check(self, block: Block) -> PackedSequences | None:
        """The sequences that can be compared with the source; None: there are none."""
        if not self._check_schema(block) or not block.batch.num_rows:
            self.packs += block.batch.num_rows
            return None
        columns = {
            name: open_lists(name, pa.chunked_array([block.batch.column(name)]), None, nulls=name not in self._needed)
            for name in self._types
        }
        local = np.arange(block.batch.num_rows)
        found = {name: column.find(local) for name, column in columns.items()}
        sound = self._without_nulls(block, columns, found)
        depths, first = found[LENGTHS][1], found[LENGTHS][0][0]
        lengths = columns[LENGTHS].numbers()[first : first + depths.sum()].astype(np.int64)
        per_pack, local_packs = offsets_of(depths), np.repeat(local, depths)
        slots = np.arange(len(lengths)) - per_pack[local_packs]
        ends = offsets_of(lengths)
        tokens = ends[per_pack[1:]] - ends[per_pack[:-1]]
        self.packs, self.sequences = self.packs + len(depths), self.sequences + len(lengths)
        self.tokens, self.deepest = self.tokens + int(tokens.sum()), max(self.deepest, int(depths.max()))

        longest, at = self.facts.max_sequence_length, partial(_at, block)
        wrong = (lengths < 1) | (lengths > longest)
        sound[local_packs[wrong]] = False
        what = f"a length that is not from 1 to max_sequence_length={longest}"
        in_slot = {"sequence": slots, "column": LENGTHS, "found": lengths}
        self.findings.add_all("packs", what, wrong, lambda i: at(local_packs[i]), **in_slot)
        self._check_limits(at, depths, tokens)
        for name, (_, counts) in found.items():
            kind, expected = ("tokens", tokens) if name in self.facts.token_columns else ("sequences", depths)
            sound &= counts == expected
            what = f"number of values, where sequence_lengths says how many {kind} there are"
            self.findings.add_all("packs", what, counts != expected, at, column=name, found=counts, expected=expected)
        chosen = sound[local_packs]
        starts = {name: begin for name, (begin, _) in found.items()}
        positions = (ends[:-1] - ends[per_pack[:-1]][local_packs])[chosen]
        local_packs, slots = local_packs[chosen], slots[chosen]

        def values(name: str) -> np.ndarray:
            return columns[name].numbers()[starts[name][local_packs] + slots].astype(np.int64)

        rows, begins, packs = values(INDICES), values(STARTS) if STARTS in columns else None, local_packs + block.first
        places = None if self._cohorts is None else np.stack([values(name) for name in CELL], 1)
        of_sequences = local_packs, packs, slots, positions, lengths[chosen], rows, begins, places
        return self._check_rows(PackedSequences(columns, starts, *of_sequences))

    def _check_schema(self, block: Block) -> bool:
        """Whether the columns are those of dataset_info.json; adds problems once for each file."""
        schema = block.batch.schema
        found: dict[str, object] = dict(zip(schema.names, schema.types, strict=True))
        found |= {name: f"{count} times" for name, count in Counter(schema.names).items() if count > 1}
        faults = sorted(name for name in {*found, *self._types} if found.get(name) != self._types.get(name))
        if block.file not in self._schemas:
            self._schemas.add(block.file)
            self._check_notes(block)
            for name in faults:
                what = "a column or a type that is not in dataset_info.json"
                types = {"found": found.get(name), "expected": self._types.get(name)}
                self.findings.add("columns", what, file=block.file, column=name, **types)
        return not faults

    def _check_notes(self, block: Block) -> None:
        """Compare the columns that datasets notes in a file's head, with names of classes, too."""
        if block.file is None:
            return
        try:
            found = schema_features(block.batch.schema)
        except ValueError as error:
            self.findings.add("columns", str(error), file=block.file)
            return
        for name in self.features:
            if name in found and found[name] != self.features[name]:
                what = "is another in the file's head than in dataset_info.json"
                values = {"found": found[name], "expected": self.features[name]}
                self.findings.add("columns", what, file=block.file, column=name, **values)

    def _without_nulls(self, block: Block, columns: dict[str, TokenColumn], found: dict) -> np.ndarray:
        """(packs,) whether every list is there, and every value that may not be null."""
        sound = np.ones(block.batch.num_rows, np.bool_)
        for name in columns:
            lists = block.batch.column(name)
            missing = np.asarray(lists.is_null())
            if name in self._needed and name not in NULLABLE and lists.values.null_count:
                begins, counts = found[name]
                before = offsets_of(np.asarray(lists.values.is_null()))
                # begins count in lists.values, which begins where the column's own view does
                missing |= before[begins + counts] > before[begins]
            sound &= ~missing
            self.findings.add_all("packs", "no value (null)", missing, partial(_at, block), column=name)
        return sound

    def _check_limits(self, at: Callable[[int], dict], depths: np.ndarray, tokens: np.ndarray) -> None:
        self.findings.add_all("packs", "holds no sequence", depths == 0, at, column=LENGTHS)
        limits = ("tokens", tokens, "max_sequence_length"), ("sequences", depths, "max_sequences_per_pack")
        for unit, counts, name in limits:
            limit = getattr(self.facts, name)
            if limit is not None:
                what, values = f"{unit}, more than {name}={limit}", {"found": counts, "expected": f"at most {limit}"}
                self.findings.add_all("packs", what, counts > limit, at, column=LENGTHS, **values)

    def _check_rows(self, sequences: PackedSequences) -> PackedSequences:
        """Mark the rows as seen; returns the sequences whose rows exist."""
        rows = sequences.rows
        outside = (rows < 0) | (rows >= self.source_rows)
        what = f"the source has rows 0 to {self.source_rows - 1}"
        self.findings.add_all("sequences", what, outside, sequences.where, column=INDICES, found=rows, row=None)
        if outside.any():
            sequences = sequences.take(~outside)
        if self._cohorts is not None:
            self._cohorts.check(sequences)
        once = self._check_overlong(sequences) if len(self.overlong_rows) else sequences
        again = np.empty(len(once.rows), np.bool_)
        _mark(self._seen, once.rows, again)
        self.findings.add_all("sequences", "this row is there a second time", again, once.where, column=INDICES)
        begins = once.begins
        if begins is not None and not self.facts.trimmed_rows:
            what, values = "a row that was not split begins with its first token", {"column": STARTS, "expected": 0}
            self.findings.add_all("sequences", what, begins != 0, once.where, found=begins, **values)
        if once.cells is not None:
            what, rounds = "a row that was not split lies in a later round", once.cells[:, 1]
            self.findings.add_all("sequences", what, rounds != 0, once.where, column=CELL[1], found=rounds, expected=0)
        return sequences

    def _check_overlong(self, sequences: PackedSequences) -> PackedSequences:
        """Check rows that were too long by what packing did to them; returns the sequences that must be there once."""
        longest, lengths = self.facts.max_sequence_length, sequences.lengths
        cut = np.isin(sequences.rows, self.overlong_rows)
        if self.facts.overlong == "split":
            pieces = sequences.take(cut)
            places = () if pieces.cells is None else pieces.cells.T
            self._pieces.append(np.stack([*(getattr(pieces, name) for name in PIECE), *places]))
            return sequences.take(~cut)
        if self.facts.overlong == "drop":
            what = "this row is listed as dropped and is there"
            self.findings.add_all("sequences", what, cut, sequences.where, column=INDICES)
        else:
            what = "this row is listed as truncated, and is not as long as a pack"
            wrong, values = cut & (lengths != longest), {"found": lengths, "expected": longest}
            self.findings.add_all("sequences", what, wrong, sequences.where, column=LENGTHS, **values)
        return sequences

    def finish(self, source: Source | None) -> None:
        """Check what only all packs together can show. source: with all its rows, where it is known."""
        for name, found in (("packs", self.packs), ("sequences", self.sequences), ("tokens", self.tokens)):
            expected = getattr(self.facts, f"num_{name}")
            if found != expected:
                self.findings.add("packs", f"number of {name}, in all", found=found, expected=expected)
        if self._cohorts is not None:
            self._cohorts.finish()
        if self.deepest != self.facts.max_depth:
            what = "sequences in the deepest pack"
            self.findings.add("packs", what, found=self.deepest, expected=self.facts.max_depth)
        if self.facts.overlong == "split" and len(self.overlong_rows):
            self._check_pieces(source)
        if self.facts.overlong == "drop":
            self._mark_known(self.overlong_rows)
        for first in range(0, len(self._seen), SEEN_BYTES):
            bits = np.unpackbits(~self._seen[first : first + SEEN_BYTES], bitorder="little")
            absent = bits[: self.source_rows - 8 * first]
            what = "this row is in no pack that can be read"
            rows = 8 * first + np.arange(len(absent))
            self.findings.add_all("sequences", what, absent, row=rows)

    def _check_pieces(self, source: Source | None) -> None:
        """The pieces of each row lie end to end; all but a row's last one are full."""
        numbers = len(PIECE) + (self._cohorts is not None) * len(CELL)
        pieces = np.concatenate([np.empty((numbers, 0), np.int64), *self._pieces], axis=1)
        rows, begins, lengths, packs, slots, *places = pieces[:, np.lexsort((pieces[1], pieces[0]))]
        self._mark_known(rows)
        longest = self.facts.max_sequence_length
        is_first, is_last = np.diff(rows, prepend=-1) != 0, np.diff(rows, append=-1) != 0
        skipped = 0 if source is None or source.skipped is None else source.skipped[rows]
        expected = np.where(is_first, skipped, np.roll(begins + longest, 1))
        if self.facts.trimmed_rows and source is None:  # a row can begin after any number of padding tokens
            expected[is_first] = begins[is_first]
        wrong = begins != expected
        twice = wrong & ~is_first & (begins == np.roll(begins, 1))
        short = ~is_last & (lengths != longest) & ~np.roll(twice, -1)
        lost = is_last & (is_first if source is None else begins + lengths != source.kept[rows] + skipped)

        def add(what: str, wrong: np.ndarray, **values: Any) -> None:
            place = {"pack": packs, "sequence": slots, "row": rows, "column": STARTS}
            self.findings.add_all("sequences", what, wrong, **place | values)

        if places:
            check_order(np.stack(places, 1), is_first, add)
        add("this piece of the row is there a second time", twice)
        add("the row's pieces do not lie end to end", wrong & ~twice, found=begins, expected=expected)
        add("a piece that is not the row's last one is not full", short)
        add("the row's last piece is missing", lost)

    def _mark_known(self, rows: np.ndarray) -> None:
        """Mark rows as seen that may be there several times, or not at all."""
        known = rows[(rows >= 0) & (rows < self.source_rows)]  # damaged facts may list any
        _mark(self._seen, known, np.empty(len(known), np.bool_))


def _at(block: Block, local_pack: int) -> dict:
    return {"file": block.file, "pack": block.first + int(local_pack)}


@njit(cache=True, nogil=True)
def _mark(seen, rows, again):
    """Set the bit of each row; fills again: whether it was set already."""
    for i in range(len(rows)):
        byte, bit = rows[i] >> 3, np.uint8(1 << (rows[i] & 7))
        again[i] = (seen[byte] & bit) != 0
        seen[byte] |= bit
