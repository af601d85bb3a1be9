"""Rows with more tokens than a pack has slots: refused, truncated, split or dropped.

max_sequence_length=4, a row [c 1 2 3 4 s]:
error     ValueError            truncate  [c 1 2 s] if every row ends in s, else [c 1 2 3]
drop      nothing               split     [c 1 2 3] [4 s], which remember that they began at 0 and 4
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from packing.files.errors import Option, SourceError
from packing.histogram import index_type
from packing.numba_tools import njit
from packing.options import PackOptions
from packing.source.rows import Source, closing_token

ANSWERS = ("start_positions", "end_positions")  # transformers' names of them

DONE = {"truncate": "truncated", "split": "split", "drop": "dropped"}  # the word for rows that did not fit

_TRUNCATE, _SPLIT, _DROP = (f"{Option('overlong', choice)}" for choice in DONE)
OVERLONG_CURE = f"choose {_TRUNCATE}, {_SPLIT} or {_DROP}, or raise {Option('max_sequence_length')}"


class OverlongError(SourceError):
    """A row has more tokens than a pack has slots. others: how many more rows have; None: nobody has counted."""

    def __init__(self, row: int, tokens: int, max_sequence_length: int, others: int | None = None):
        also = f" (and {others} more rows are too long)" if others else ""
        what = f"has {tokens} tokens, more than {Option('max_sequence_length', max_sequence_length)}{also}"
        super().__init__(what, row=row, cure=OVERLONG_CURE)


@dataclass(frozen=True, eq=False)
class PackSlice:
    """Some packs, as the sequences in them, end to end; all that a worker must be told. Picklable.

    pack 0 holds row 4 and row 1, pack 1 holds tokens 2 to 6 of row 0:
    rows = [4, 1, 0]   lengths = [3, 2, 5]   begins = [0, 0, 2]   ends = [3, 2, 7]   pack_offsets = [0, 2, 3]

    rows: (sequences,) the dataset's row of each. lengths: (sequences,) its tokens.
    begins: (sequences,) the row's token that comes first; None: the row's first.
    ends: (sequences,) one after the row's token that comes last; None: begins + lengths. Only a truncated sequence that
        keeps its row's last token has another.
    pack_offsets: (packs + 1,) where each pack begins among the sequences.
    places: (packs, 3) cohort, round and lane of each; None: there are no cohorts.
    """

    rows: np.ndarray
    lengths: np.ndarray
    begins: np.ndarray | None
    ends: np.ndarray | None
    pack_offsets: np.ndarray
    places: np.ndarray | None = None

    @property
    def num_packs(self) -> int:
        return len(self.pack_offsets) - 1

    def part(self, first: int, end: int) -> PackSlice:
        """Packs first..end."""
        bounds = self.pack_offsets[first : end + 1].astype(np.int64)
        chosen = slice(bounds[0], bounds[-1])
        begins, ends = (None if array is None else array[chosen] for array in (self.begins, self.ends))
        places = None if self.places is None else self.places[first:end]
        return PackSlice(self.rows[chosen], self.lengths[chosen], begins, ends, bounds - bounds[0], places)


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences to pack, cut from a source's rows; (num_sequences,) each.

    Memory: 4 bytes a sequence for lengths, as long as every row is a sequence, and 4 more (8 from 2**32 rows on for
    `rows`) for each other array that is there.

    lengths: int32, the number of tokens.
    rows: the source row; None: every row in order. begins: int32, the row's token that comes first; None: the first.
    ends: int32, one after the row's token that comes last; None: begins + lengths. A truncated sequence may keep the
        row's last token.
    overlong_rows: the source rows that did not fit. overlong_tokens: how many tokens they lost.
    """

    lengths: np.ndarray
    rows: np.ndarray | None
    begins: np.ndarray | None
    ends: np.ndarray | None
    overlong_rows: np.ndarray
    overlong_tokens: int = 0

    def take(self, chosen: np.ndarray, pack_offsets: np.ndarray, places: np.ndarray | None = None) -> PackSlice:
        """These sequences, and which of them share a pack; places: of the packs."""
        rows, begins, ends = (a if a is None else a[chosen] for a in (self.rows, self.begins, self.ends))
        return PackSlice(chosen if rows is None else rows, self.lengths[chosen], begins, ends, pack_offsets, places)

    @property
    def pieces(self) -> np.ndarray:
        """(rows,) the sequences of each row, for overlong="split" """
        return np.ones(len(self.lengths), np.int64) if self.rows is None else np.bincount(self.rows)


def cut_sequences(source: Source, max_sequence_length: int, overlong: str) -> Sequences:
    """One sequence per row, and what `overlong` says for rows that do not fit. `losses` tells what was cut or dropped.

    Raises OverlongError for overlong="error", and ValueError where nothing is left.
    """
    rows = np.flatnonzero(source.kept > max_sequence_length)
    if not len(rows):
        return Sequences(source.kept, None, source.skipped, None, rows)
    return CUTS[overlong](source, rows, max_sequence_length)


def losses(source: Source, sequences: Sequences, options: PackOptions) -> list[str]:
    """What of the source's tokens is not in the sequences, a sentence each; none where all of them are."""
    found = []
    if source.trimmed_rows:
        padding = "attention_mask 0" if options.pad_token_id is None else f"pad_token_id={options.pad_token_id}"
        where = f"{source.trimmed_rows} of {source.num_rows} rows ({padding})"
        found.append(f"{source.trimmed_tokens} padding tokens trimmed from {where}")
    rows = sequences.overlong_rows
    if len(rows):
        found.append(
            f"{len(rows)} of {source.num_rows} rows have more than {options.max_sequence_length} tokens: "
            f"{DONE[options.overlong]}, {sequences.overlong_tokens} tokens lost; rows "
            f"{', '.join(map(str, rows[:10].tolist()))}{', …' if len(rows) > 10 else ''}"
        )
    return found


def refuse_moved_answers(source: Source, sequences: Sequences, overlong: str) -> None:
    """Answers of question answering are token numbers of their row: they would point elsewhere once it is cut."""
    answers = [name for name in ANSWERS if name in source.columns.row_columns]
    if not answers:
        return
    if source.skipped is not None:
        row = int(np.argmax(source.skipped > 0))
        padding = f"{source.skipped[row]} tokens of padding, which packing trims"
        what = f"counts tokens of its row, but row {row} begins with {padding}"
        raise SourceError(what, column=answers[0], cure="tokenize without padding, or with padding_side='right'")
    if len(sequences.overlong_rows) and overlong in ("truncate", "split"):
        cut = f"row {sequences.overlong_rows[0]} would be cut by {Option('overlong', overlong)}"
        cure = f"let the tokenizer cut it (truncation, stride), or say {_DROP}"
        raise SourceError(f"counts tokens of its row, but {cut}", column=answers[0], cure=cure)


def _error(source: Source, rows: np.ndarray, max_sequence_length: int) -> Sequences:
    raise OverlongError(int(rows[0]), int(source.kept[rows[0]]), max_sequence_length, len(rows) - 1)


def _truncate(source: Source, rows: np.ndarray, max_sequence_length: int) -> Sequences:
    """Keep the first tokens; if all rows of the source end in one token, that one closes the cut sequence, too."""
    lengths, ends = np.minimum(source.kept, np.int32(max_sequence_length)), None
    closed = closing_token(source) is not None if source.ends_alike is None else source.ends_alike
    if np.any(closed):
        skipped = np.int32(0) if source.skipped is None else source.skipped
        ends = skipped + (source.kept if np.all(closed) else np.where(closed, source.kept, lengths))
    lost = int(source.kept[rows].sum(dtype=np.int64)) - len(rows) * max_sequence_length
    return Sequences(lengths, None, source.skipped, ends, rows, lost)


def _split(source: Source, rows: np.ndarray, max_sequence_length: int) -> Sequences:
    """As many pieces as needed, all but a row's last one full: a sequence each, all of the same row."""
    pieces = -(-source.kept // np.int32(max_sequence_length))
    count = int(pieces.sum(dtype=np.int64))
    row: np.ndarray = np.empty(count, index_type(source.num_rows))
    begins, lengths = np.empty(count, np.int32), np.empty(count, np.int32)
    skipped = np.zeros(1, np.int32) if source.skipped is None else source.skipped
    _cut_evenly(source.kept, skipped, max_sequence_length, row, begins, lengths)
    return Sequences(lengths, row, begins, None, rows)


def _drop(source: Source, rows: np.ndarray, max_sequence_length: int) -> Sequences:
    kept: np.ndarray = np.flatnonzero(source.kept <= max_sequence_length).astype(index_type(source.num_rows))
    if not len(kept):
        what = f"every row is longer than {Option('max_sequence_length', max_sequence_length)}; nothing is left"
        raise SourceError(what, cure=f"raise it, or choose {_TRUNCATE} or {_SPLIT}")
    begins = None if source.skipped is None else source.skipped[kept]
    lost = int(source.kept[rows].sum(dtype=np.int64))
    return Sequences(source.kept[kept], kept, begins, None, rows, lost)


@njit(cache=True, nogil=True)
def _cut_evenly(kept, skipped, longest, rows, begins, lengths):
    """Fills rows, begins and lengths of all pieces. skipped: of each row, or one 0 for all."""
    piece, step = 0, np.int64(1 if len(skipped) == len(kept) else 0)
    for row in range(len(kept)):
        for first in range(0, kept[row], longest):
            rows[piece], begins[piece] = row, skipped[row * step] + first
            lengths[piece] = min(kept[row] - first, longest)
            piece += 1


CUTS = {"error": _error, "truncate": _truncate, "split": _split, "drop": _drop}
