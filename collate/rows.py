"""Rows of a dataset in any form -> flat arrays, one value per token or per sequence.

A batch is a list of dicts (of lists, NumPy arrays or torch tensors), one dict of columns, an Arrow table, or a list of
Arrow tables. Arrow is five times as fast as lists.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from collate.columns import (
    ANSWERS,
    BOOKKEEPING,
    INPUT_IDS,
    LABELS,
    LENGTHS,
    MADE_HERE,
    MASK,
    NO_WORD_ID,
    TOKEN_LEVEL,
    WORD_IDS,
)
from packing import assign, length_histogram, plan_packs
from packing.histogram import offsets_of
from packing.source.token_column import chosen_rows, is_list, list_lengths

ADVICE = (
    "pack the dataset with pack_dataset, and with plain Trainer set remove_unused_columns=False (PackedTrainer keeps "
    "them); for rows that hold one sequence each, say unpacked_rows='keep' or 'pack'"
)


@dataclass(frozen=True, eq=False)
class FlatRows:
    """The rows of a batch without their padding.

    sequences_per_row: (rows,). lengths: (N,) tokens of each sequence.
    token_columns: {name: (T, …)}, input_ids among them. sequence_columns: {name: (N, …)}. Both hold numbers only.
    """

    sequences_per_row: np.ndarray
    lengths: np.ndarray
    token_columns: dict[str, np.ndarray]
    sequence_columns: dict[str, np.ndarray]

    @property
    def num_rows(self) -> int:
        return len(self.sequences_per_row)

    @property
    def num_tokens(self) -> int:
        return len(self.token_columns[INPUT_IDS])

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> np.ndarray:
        """(N + 1,) where each sequence begins among the T tokens, and T."""
        return offsets_of(self.lengths)

    @property
    def tokens_per_row(self) -> np.ndarray:
        return np.diff(self.offsets[offsets_of(self.sequences_per_row)])


class Column(NamedTuple):
    """values: (values, …) of all rows; counts: (rows,) how many each row has; None: each row is one value, no list."""

    values: np.ndarray
    counts: np.ndarray | None


@dataclass(frozen=True)
class Levels:
    """Which columns have a value per token, and which per sequence, as far as it is known before a batch.

    named: the token-level columns that the user named, or that a packed dataset has.
    labels: whether labels belong to tokens, by the model's task; None: unknown.
    found: the token-level columns of a dataset of unpacked rows.
    ragged: its columns of lists that are neither; the collator leaves them out.
    seen: whether other columns have a value per token, as batches of several lengths show.
    """

    named: tuple[str, ...] | None = None
    labels: bool | None = None
    found: tuple[str, ...] | None = None
    ragged: tuple[str, ...] = ()
    seen: dict[str, bool] = field(default_factory=dict, compare=False)

    def is_token_level(self, name: str) -> bool | None:
        """None: not known."""
        if name in TOKEN_LEVEL:
            return True
        if self.named is not None:
            return name in self.named
        if self.labels is not None and name in LABELS:
            return self.labels
        return None if self.found is None else name in self.found

    def of(self, dataset: Any) -> "Levels":
        """These, and what all rows of a `datasets.Dataset` of unpacked rows show; other datasets show nothing."""
        table: Any = getattr(dataset, "data", None)
        if not hasattr(table, "column_names") or INPUT_IDS not in table.column_names:
            return self
        lists = [name for name in table.column_names if is_list(table.column(name).type)]
        counts = {name: list_lengths(table.column(name), chosen_rows(dataset)) for name in lists}
        found = tuple(name for name in lists if np.array_equal(counts[name], counts[INPUT_IDS]))
        ragged = tuple(name for name in lists if name not in found and len(np.unique(counts[name])) > 1)
        return replace(self, found=found, ragged=ragged)


def read_packs(rows: Any, levels: Levels, columns: Sequence[str] | None) -> FlatRows:
    """Rows of pack_dataset.

    columns: which to read beside the lengths, and BOOKKEEPING; None: all that hold numbers.
    """
    read = _Reader(rows, columns)
    lengths, per_row = read.lists(LENGTHS)
    token_ids, counts = read.lists(INPUT_IDS)
    tokens_per_row = np.diff(offsets_of(lengths)[offsets_of(per_row)])
    if len(lengths) and lengths.min() < 1:
        raise ValueError("a sequence of the batch has length 0; every sequence needs at least one token")
    _check_counts(INPUT_IDS, counts, tokens_per_row, "tokens")
    in_tokens, in_sequences = {INPUT_IDS: token_ids}, {}
    for name, column in read.others(but=(INPUT_IDS, LENGTHS, MASK)):
        if column.counts is None:
            raise ValueError(f"column {name!r} has one value per row; a pack has one per token or per sequence")
        if levels.is_token_level(name) is None and not counts.any():
            continue  # packs of nothing do not show what a value belongs to
        if _is_token_level(name, column.counts, tokens_per_row, per_row, levels):
            _check_counts(name, column.counts, tokens_per_row, "tokens")
            in_tokens[name] = column.values
        else:
            _check_counts(name, column.counts, per_row, "sequences")
            in_sequences[name] = column.values
    if MASK in read.names:
        _refuse_masked(*read.lists(MASK), tokens_per_row)
    return FlatRows(per_row, lengths.astype(np.int64), in_tokens, in_sequences)


def read_sequences(rows: Any, levels: Levels, columns: Sequence[str] | None) -> FlatRows:
    """Unpacked rows, each one sequence, without what an attention_mask says is padding.

    A value per row becomes a value per sequence, and so does a list, unless it has one value per token. Columns of
    lists of other lengths are left out, as from packs, unless their name says that they belong to the tokens.
    Raises ValueError for lists as long as the tokens in rows of one length, if neither `levels` nor an earlier batch
    tells what they belong to.
    """
    is_empty = [_is_empty_pack(row) for row in rows] if isinstance(rows, Sequence) else []
    if is_empty and all(is_empty):
        return _no_sequences(rows, levels, columns)
    if any(is_empty):
        real = [row for row, empty in zip(rows, is_empty, strict=True) if not empty]
        return replace(read_sequences(real, levels, columns), sequences_per_row=(~np.array(is_empty)).astype(np.int64))
    read = _Reader(rows, columns, needed=(INPUT_IDS,))
    if LENGTHS in read.names:
        raise ValueError("the rows are packed: they have sequence_lengths; leave unpacked_rows out")
    token_ids, lengths = read.lists(INPUT_IDS)
    in_tokens, in_sequences = {INPUT_IDS: token_ids}, {}
    ragged = [name for name in levels.ragged if name not in (columns or ())]
    for name, column in read.others(but=(INPUT_IDS, *ragged)):
        if column.counts is None:
            in_sequences[name] = column.values
        elif _is_list_of_tokens(name, column.counts, lengths, levels):
            _check_counts(name, column.counts, lengths, "tokens")
            in_tokens[name] = column.values
        elif len(set(column.counts.tolist())) == 1:
            in_sequences[name] = column.values.reshape(len(lengths), -1)
        elif name == "labels" or name in (columns or ()):
            _check_counts(name, column.counts, lengths, "tokens")
    return _without_padding(FlatRows(np.ones(len(lengths), np.int64), lengths, in_tokens, in_sequences))


def _no_sequences(rows: Sequence[Mapping[str, Any]], levels: Levels, columns: Sequence[str] | None) -> FlatRows:
    """Empty packs alone, with the columns of unpacked rows as far as the first one shows them.

    Each column is an array (0, …) of what a sequence has. Without `levels` nothing tells the tokens' own apart.
    """
    wanted = None if columns is None else {*columns, *BOOKKEEPING}
    in_tokens, in_sequences = {INPUT_IDS: np.empty(0, np.int64)}, {}
    for name, values in rows[0].items():
        is_list, is_known = np.ndim(values) > 1, levels.is_token_level(name) is not None
        is_left_out = name in (INPUT_IDS, LENGTHS, MASK, *levels.ragged) or not isinstance(values, np.ndarray)
        if is_left_out or (wanted is not None and name not in wanted):
            continue
        if is_list and levels.is_token_level(name):
            in_tokens[name] = values.reshape(0)
        elif not is_list or is_known:
            in_sequences[name] = values
    return FlatRows(np.zeros(len(rows), np.int64), np.zeros(0, np.int64), in_tokens, in_sequences)


def _is_list_of_tokens(name: str, counts: np.ndarray, lengths: np.ndarray, levels: Levels) -> bool:
    """Whether lists have a value per token. Six values in rows of six tokens may also be six labels of a sequence."""
    known, as_many = levels.is_token_level(name), np.array_equal(counts, lengths)
    if known is not None:
        return known
    if len(set(lengths.tolist())) > 1:
        levels.seen[name] = as_many
    if as_many and name not in levels.seen and name not in MADE_HERE:  # those names are refused elsewhere
        raise ValueError(
            f"column {name!r} has {counts[0]} values in each row of the batch, and each row has {lengths[0]} tokens: "
            "whether each token has one, or each sequence a list, is unclear; name the columns with a value per token "
            "as token_columns=[…], [] if there is none, or give the collator the dataset (for_dataset) or, for labels, "
            "the model"
        )
    return as_many and levels.seen.get(name, True)


def _refuse_masked(mask: np.ndarray, counts: np.ndarray, tokens_per_row: np.ndarray) -> None:
    """Raise ValueError for an attention_mask of packs that is not 1 everywhere: they have no padding."""
    _check_counts(MASK, counts, tokens_per_row, "tokens")
    _refuse_numbers(mask)
    if not mask.all():
        raise ValueError(
            "the packs have an attention_mask with zeros, but every token of a pack counts; pack the source "
            "with its attention_mask, which trims padding, or remove the column"
        )


def _is_empty_pack(row: Any) -> bool:
    """Whether a row has no sequence. Such rows even out the packs of ranks."""
    return isinstance(row, Mapping) and LENGTHS in row and not len(row[LENGTHS])


def pack_sequences(flat: FlatRows, max_sequence_length: int, max_sequences_per_pack: int | None) -> FlatRows:
    """The sequences of a batch in as few rows as longest-pack-first needs.

    lengths [3, 5, 2] into 6 slots: rows (5) and (3, 2)
    """
    if flat.num_sequences == 0:
        return flat
    if flat.lengths.max() > max_sequence_length:
        row = int(flat.lengths.argmax())
        raise ValueError(
            f"row {row} of the batch has {flat.lengths[row]} tokens, more than pad_to={max_sequence_length}; "
            "truncate it when tokenizing or give a longer pad_to"
        )
    histogram = length_histogram(flat.lengths, max_sequence_length)
    plan = plan_packs(histogram, max_sequence_length, max_sequences_per_pack, "lpfhp")
    assignment = assign(plan, flat.lengths, num_threads=1)
    order = assignment.sequence_indices.astype(np.int64)
    lengths = flat.lengths[order]
    token = np.repeat(flat.offsets[order] - offsets_of(lengths)[:-1], lengths) + np.arange(flat.num_tokens)
    return FlatRows(
        np.diff(assignment.pack_offsets).astype(np.int64),
        lengths,
        {name: values[token] for name, values in flat.token_columns.items()},
        {name: values[order] for name, values in flat.sequence_columns.items()},
    )


class _Reader:
    """Columns by name, from whatever the batch is."""

    def __init__(self, rows: Any, columns: Sequence[str] | None, needed: Sequence[str] = (INPUT_IDS, LENGTHS)):
        if not isinstance(rows, pa.Table | Mapping):
            rows = list(rows)
            if rows and isinstance(rows[0], pa.Table):
                rows = pa.concat_tables(rows)
        self.rows, self.wanted = rows, columns
        self.names = _names(rows)
        for name in needed:
            if name not in self.names and (not isinstance(rows, list) or rows):
                raise ValueError(f"the rows of the batch have no {name!r}, only {sorted(self.names)}; {ADVICE}")
        is_nothing = isinstance(rows, list) and all(map(_is_empty_pack, rows))  # these need not have any columns
        for name in columns or ():
            if name not in self.names and not is_nothing:
                raise ValueError(f"columns names {name!r}, which is not among {sorted(self.names)}")

    def others(self, but: Sequence[str]) -> Iterator[tuple[str, Column]]:
        """The columns of numbers to read besides, with their names; BOOKKEEPING and the mask where there are any."""
        names = self.names if self.wanted is None else dict.fromkeys([*self.wanted, *BOOKKEEPING, MASK])
        for name in names:
            if name in self.names and name not in but and (column := self.column(name)) is not None:
                yield name, column

    def column(self, name: str) -> Column | None:
        """The values of a column. None: it holds no numbers, but text for example."""
        if isinstance(self.rows, pa.Table):
            column = _from_arrow(name, self.rows.column(name))
        else:
            column = _from_values(name, self._values(name))
        if column is None and self.wanted is not None and name in self.wanted:
            raise _no_numbers(name)
        return column

    def lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of a column of lists that must be there, and how many each row has; ids and lengths are whole."""
        column = self.column(name)
        if column is None:
            raise _no_numbers(name)
        if name in (INPUT_IDS, LENGTHS) and len(column.values) and column.values.dtype.kind not in "iu":
            raise ValueError(f"column {name!r} must hold integers, not {column.values.dtype}")
        if column.counts is None:
            raise ValueError(f"column {name!r} has one value per row; it must have a list")
        return column.values, column.counts

    def _values(self, name: str) -> list:
        if isinstance(self.rows, Mapping):
            return list(self.rows[name])
        for number, row in enumerate(self.rows):
            if name not in row and not _is_empty_pack(row):  # an empty pack need not have the other columns
                raise ValueError(f"row {number} of the batch has no {name!r}, others have; {ADVICE}")
        return [row.get(name, ()) for row in self.rows]


def _no_numbers(name: str) -> ValueError:
    return ValueError(f"column {name!r} holds no numbers, so it cannot become a tensor; leave it out")


def _names(rows: pa.Table | Mapping | list) -> list[str]:
    if isinstance(rows, pa.Table):
        return rows.column_names
    if isinstance(rows, Mapping):
        return list(rows)
    return list(dict.fromkeys(name for row in rows for name in row))


def _from_values(name: str, values: list[Any]) -> Column | None:
    if name == WORD_IDS:
        values = [_without_none(value) for value in values]
    try:
        arrays = [np.asarray(value) for value in values]
    except ValueError:  # lists of unequal lists
        return None
    is_list = [array.ndim > 0 for array in arrays]
    counts = np.array([len(array) for array in arrays], np.int64) if all(is_list) else None
    if counts is None and any(is_list):
        raise ValueError(f"column {name!r} is a list in some rows of the batch and a single value in others")
    filled = [array for array in arrays if array.ndim == 0 or len(array)]
    if any(array.dtype == object for array in filled):
        lists = [list(value) if is_list[row] else [value] for row, value in enumerate(values)]
        missing = [row for row, value in enumerate(lists) if None in value]
        if missing and not any(isinstance(entry, str) for value in lists for entry in value):
            raise ValueError(f"column {name!r} has a missing value (None) in row {missing[0]} of the batch; fill it in")
        return None
    if not filled:  # an array of nothing still says of what type
        typed = [value for value in values if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"]
        return Column(typed[0][:0] if typed else np.empty(0, np.int64), counts)
    if any(array.dtype.kind not in "biuf" for array in filled) or len({array.shape[1:] for array in filled}) > 1:
        return None
    return Column(np.stack(filled) if counts is None else np.concatenate(filled), counts)


def _without_none(word_ids: Any) -> np.ndarray:
    """[None, 0, 0, None] -> [-1, 0, 0, -1]; NumPy and torch formats of datasets have NaN for None."""
    array = np.asarray(word_ids)
    if array.dtype == object:
        array = np.array([NO_WORD_ID if word is None else word for word in word_ids])
    return np.nan_to_num(array, nan=NO_WORD_ID).astype(np.int64) if array.dtype.kind == "f" else array


def _from_arrow(name: str, column: pa.ChunkedArray) -> Column | None:
    type_ = column.type
    is_plain_list = pa.types.is_list(type_) or pa.types.is_large_list(type_)
    if _is_text(type_.value_type if is_plain_list else type_):
        return None
    if column.null_count:
        raise ValueError(f"column {name!r} has a missing value (null) in the batch; fill it in")
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_):
        return Column(column.to_numpy(), None)
    if not is_plain_list or not (pa.types.is_integer(type_.value_type) or pa.types.is_floating(type_.value_type)):
        return _from_values(name, column.to_pylist())
    lists = column.combine_chunks()  # datasets gives a chunk for each row
    values = lists.flatten()
    if name == WORD_IDS:
        values = values.fill_null(NO_WORD_ID)
    if values.null_count:
        raise ValueError(f"column {name!r} has a missing value (null) in the batch; fill it in")
    return Column(values.to_numpy(), np.diff(lists.offsets.to_numpy()).astype(np.int64))


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


def _is_token_level(name: str, counts: np.ndarray, tokens: np.ndarray, sequences: np.ndarray, levels: Levels) -> bool:
    known = levels.is_token_level(name)
    if known is not None:
        return known
    per_token, per_sequence = np.array_equal(counts, tokens), np.array_equal(counts, sequences)
    if per_token and per_sequence and len(counts) and counts.any():
        raise ValueError(
            f"column {name!r} has as many values as tokens and as sequences in every row of the batch, so what they "
            "belong to is unclear; name the columns with a value per token as token_columns=[…]"
        )
    return per_token


def _check_counts(name: str, counts: np.ndarray, expected: np.ndarray, what: str) -> None:
    if not np.array_equal(counts, expected):
        row = int(np.argmax(counts != expected))
        raise ValueError(
            f"row {row} of the batch has {counts[row]} values in {name!r} but {expected[row]} {what} by its "
            f"{'sequence_lengths' if what == 'sequences' else 'lengths'}; leave the column out with columns=[…]"
            + (", or remove it from the dataset" if name in TOKEN_LEVEL else "")
        )


def _refuse_numbers(mask: np.ndarray) -> None:
    """Raise ValueError for an attention_mask with other values than 0 and 1: one that numbers sequences of a row."""
    wrong = mask[(mask != 0) & (mask != 1)]
    if len(wrong):
        raise ValueError(
            f"attention_mask has the value {wrong[0]} in the batch, but must be 0 or 1; if it numbers sequences "
            "in one row, split the row into them"
        )


def _without_padding(flat: FlatRows) -> FlatRows:
    """The tokens where the attention_mask is 1; the mask itself is left out."""
    tokens = {name: values for name, values in flat.token_columns.items() if name != MASK}
    mask = flat.token_columns.get(MASK, np.ones(flat.num_tokens, np.int64))
    _refuse_numbers(mask)
    real = mask != 0
    row_of_token = np.repeat(np.arange(flat.num_rows), flat.lengths)
    kept = np.bincount(row_of_token[real], minlength=flat.num_rows)
    if flat.num_rows and not kept.all():
        raise ValueError(f"row {int(kept.argmin())} of the batch holds no token; leave such rows out")
    places, ends = np.flatnonzero(real), kept.cumsum()
    span = places[ends - 1] - places[ends - kept] + 1  # each row's first 1 to its last
    if (span != kept).any():
        raise ValueError(
            f"row {int(np.argmax(span != kept))} of the batch has zeros inside its attention_mask; only padding at the "
            "ends can be cut off"
        )
    found = [name for name in ANSWERS if name in flat.sequence_columns]
    in_front = places[ends - kept] - (flat.offsets[:-1])
    if found and in_front.any():
        row = int(in_front.argmax())
        raise ValueError(
            f"row {row} of the batch has {in_front[row]} padding tokens in front, which {found[0]!r} counts; tokenize "
            "with padding=False or padding_side='right'"
        )
    return replace(flat, lengths=kept, token_columns={name: values[real] for name, values in tokens.items()})
