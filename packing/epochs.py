"""EpochPacks: the same sequences in other packs each epoch, without another copy of the dataset."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from packing.assignment import Assignment, assign, checked_seed
from packing.balance import balance_packs
from packing.cohorts import PacksOfCells, cell_numbers, fill_cells, in_other_order
from packing.draws import make_key
from packing.histogram import index_type, offsets_of
from packing.plan import PackPlan
from packing.source.token_column import TokenColumn, chosen_rows, list_array, list_lengths, read_lists, refuse_broken
from packing.store.info import CELL, LENGTHS, packed_info

REASSIGN = np.uint64(2**64 - 4)  # a stream of draws beside those of assign (lengths) and balance (2**64 - 1 to - 3)


class EpochPacks:
    """A packed dataset that re-assigns its sequences with each set_epoch: same plan, another assignment.

        epoch 0   [A A A C C] [B B B D D]      as pack_dataset stored it
        epoch 1   [B B B C C] [A A A D D]      every sequence once, and as many packs of each strategy

    packed: a dataset of pack_dataset, or some of its rows (select, shuffle); whole packs in any case.
    seed: of the assignments. Epoch e is drawn by assign() under a key of (seed, e): the same on every machine, process
        and resume. A dataset with `balance` is balanced again in every epoch. With cohorts, each cell is drawn by
        itself, and the cohorts come in another order: pieces of a document stay in order.

    A map-style dataset for DataLoader, with the columns of `packed`: epochs[3] is a pack as a dict, and
    `__getitems__([3, 1])` an Arrow table, which DataCollatorWithPacking reads. packed_info(epochs) is that of `packed`.
    Workers of a DataLoader hear of a new epoch between batches, and draw its assignment for themselves. docs/packing.md
    says what memory it takes.

    Raises ValueError for a dataset that was not packed, is damaged, has no rows, a transform of its own, or whose
    columns no longer belong to its sequences.
    """

    def __init__(self, packed: datasets.Dataset, seed: int = 0):
        self.seed = int(checked_seed(seed))
        self._epoch = _SharedNumber()
        if isinstance(packed, datasets.Dataset):
            for name in packed.column_names:  # once: what a process that is started opens is this
                refuse_broken(name, packed.data.column(name))
        self._open(packed)

    def _open(self, packed: datasets.Dataset) -> None:
        if isinstance(packed, datasets.IterableDataset):
            what = "EpochPacks needs a packed datasets.Dataset, got a stream"
            cure = "shuffle that before pack_stream, and set_epoch"
            raise TypeError(f"{what}; to pack a stream again, give its source another order: {cure}")
        self.packed, self._info = packed, packed_info(packed)
        if packed.format["type"] == "custom":
            raise ValueError("the packed dataset has a transform, which new packs would not pass; remove it")
        if not len(packed):
            raise ValueError("the packed dataset has no rows, so there is nothing to re-assign")
        table, rows = packed.data, chosen_rows(packed)
        depths = list_lengths(table.column(LENGTHS), rows)
        self._pack_offsets = offsets_of(depths)  # (packs + 1,) among the sequences, in their stored order
        if not depths.all():
            raise ValueError(f"row {int(np.argmin(depths))} of the packed dataset holds no sequence; leave it out")
        stored = read_lists(LENGTHS, table.column(LENGTHS), rows)
        lengths = stored.gather(stored.starts, stored.lengths, stored.starts + stored.lengths - 1)
        self.lengths = lengths.to_numpy().astype(np.int32, copy=False)  # (sequences,) in their stored order
        if (shortest := self.lengths.min()) < 1:
            raise ValueError(f"the packed dataset has a sequence of length {shortest}; lengths are at least 1")
        self._token_offsets = offsets_of(self.lengths)
        tokens = np.diff(self._token_offsets[self._pack_offsets])
        self._columns: dict[str, tuple[TokenColumn, pa.DataType]] = {}
        for name in table.column_names:
            is_token_level = name in self._info.token_columns
            column = read_lists(name, table.column(name), rows, nulls=not is_token_level)
            _check_counts(name, column.lengths, tokens if is_token_level else depths, is_token_level)
            self._columns[name] = column, table.column(name).type
        self._stored_places = None if self._info.cohort is None else self._read_places()
        self._drawn: tuple[int, Assignment, np.ndarray | None] | None = None

    def _read_places(self) -> np.ndarray:
        """(packs, 3) cohort, round and lane of each, as stored."""
        found = []
        for name in CELL:
            if name not in self._columns:
                what = f"the packed dataset has cohorts, and column {name!r} is missing, which says where packs belong"
                raise ValueError(f"{what}; keep it, or pack without cohorts")
            column = self._columns[name][0]
            starts, depths = column.find(np.arange(column.num_rows))
            values = column.gather(starts, depths, starts + depths - 1).to_numpy()
            of_packs = values[self._pack_offsets[:-1]]
            if (other := values != np.repeat(of_packs, depths)).any():
                row = int(np.searchsorted(self._pack_offsets, np.argmax(other), side="right")) - 1
                what = f"column {name!r} has several values in row {row} of the packed dataset"
                raise ValueError(f"{what}, and a pack lies in one cohort, round and lane; pack the source again")
            found.append(of_packs)
        return np.stack(found, 1).astype(np.int64)

    # Views of the dataset's memory must not be pickled, as they would be copied.

    def __getstate__(self) -> dict:
        return {"packed": self.packed, "seed": self.seed, "epoch": self._epoch}

    def __setstate__(self, state: dict) -> None:
        self.seed, self._epoch = state["seed"], state["epoch"]
        self._open(state["packed"])

    @property
    def info(self) -> datasets.DatasetInfo:
        """That of the packed dataset; packed_info reads it."""
        return self.packed.info

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def epoch(self) -> int:
        return self._epoch.value

    def set_epoch(self, epoch: int) -> None:
        """Other packs from the next batch on, in this process and in its dataloader workers."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must be at least 0")
        self._epoch.value = int(epoch)

    @property
    def assignment(self) -> Assignment:
        """This epoch's; sequences are numbered as they lie in `packed`."""
        return self._of_epoch()[0]

    @property
    def places(self) -> np.ndarray | None:
        """(packs, 3) cohort, round and lane of this epoch's packs; None: the dataset has no cohorts."""
        return self._of_epoch()[1]

    def _of_epoch(self) -> tuple[Assignment, np.ndarray | None]:
        epoch = self.epoch
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = None  # the old one's memory is free before the new one is made
            self._drawn = epoch, *self._draw(epoch)
        return self._drawn[1:]

    def _draw(self, epoch: int) -> tuple[Assignment, np.ndarray | None]:
        if epoch == 0:
            stored: np.ndarray = np.arange(self.num_sequences, dtype=index_type(self.num_sequences))
            return Assignment(stored, self._pack_offsets), self._stored_places
        key = make_key(np.uint64(make_key(np.uint64(self.seed), REASSIGN)), np.uint64(epoch))
        if self._stored_places is not None:
            return self._draw_cells(self._stored_places, np.uint64(key))
        assignment = assign(self.plan, self.lengths, int(key))
        if self._info.balance is not None and self._info.balance <= len(self):
            assignment = balance_packs(assignment, self.lengths, self._info.balance, int(key))
        return assignment, None

    def _draw_cells(self, places: np.ndarray, key: np.uint64) -> tuple[Assignment, np.ndarray]:
        """Every cell anew, the cohorts in another order."""
        in_order = places.copy()
        in_order[:, 0] = in_other_order(places[:, 0], key)
        packs = PacksOfCells(self.lengths, self._pack_offsets, cell_numbers(in_order))
        assignment, order = fill_cells(packs, self.lengths, packs.slot_cells, key)
        return assignment, places[order]

    @cached_property
    def plan(self) -> PackPlan:
        """The packs' own: each one's ascending lengths are a strategy."""
        lengths, offsets, repeats = _strategies(self.lengths, self._pack_offsets)
        limit = self._info.max_sequences_per_pack
        return PackPlan(self._info.max_sequence_length, limit, lengths, offsets, repeats, self._info.packer)

    def pack_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """This epoch's lengths of all sequences, pack after pack; (packs + 1,) where each pack begins among them."""
        assignment = self.assignment
        return self.lengths[assignment.sequence_indices], assignment.pack_offsets.astype(np.int64)

    def __len__(self) -> int:
        return len(self._pack_offsets) - 1

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index]).to_pylist()[0]

    def __getitems__(self, indices: Sequence[int]) -> pa.Table:
        """Some packs as one table, in the order of indices."""
        packs = np.asarray(indices, np.int64).reshape(-1)
        outside = (packs < -len(self)) | (packs >= len(self))
        if outside.any():
            raise IndexError(f"pack {packs[outside][0]} of {len(self)}")
        packs = packs % len(self)
        assignment = self.assignment
        begins = assignment.pack_offsets[packs].astype(np.int64)
        per_pack = offsets_of(assignment.pack_offsets[packs + 1].astype(np.int64) - begins)
        places = np.repeat(begins - per_pack[:-1], np.diff(per_pack)) + np.arange(per_pack[-1])
        return self.table(assignment.sequence_indices[places].astype(np.int64), per_pack)

    def table(self, sequences: np.ndarray, per_pack: np.ndarray) -> pa.Table:
        """Sequences by their stored number, per_pack[i] to per_pack[i + 1] in pack i."""
        rows = np.searchsorted(self._pack_offsets, sequences, side="right") - 1
        first = self._pack_offsets[rows]
        lengths = self.lengths[sequences].astype(np.int64)
        of_tokens = lengths, self._token_offsets[sequences] - self._token_offsets[first], offsets_of(lengths)[per_pack]
        of_sequences = np.ones_like(sequences), sequences - first, per_pack
        arrays = {}
        for name, (column, type_) in self._columns.items():
            counts, places, offsets = of_tokens if name in self._info.token_columns else of_sequences
            starts = column.find(rows)[0] + places
            arrays[name] = list_array(offsets, column.gather(starts, counts, starts + counts - 1), type_)
        return pa.table(arrays)


class _SharedNumber:
    """A whole number in memory that this process shares with those it forks or spawns.

    multiprocessing's own may be pickled only when a process starts; elsewhere a pickle of this is a number of its own.
    """

    def __init__(self, value: int = 0, memory: Any = None):
        self._memory = multiprocessing.RawValue("q", value) if memory is None else memory

    @property
    def value(self) -> int:
        return self._memory.value

    @value.setter
    def value(self, value: int) -> None:
        self._memory.value = value

    def __reduce__(self):
        is_starting = multiprocessing.context.get_spawning_popen() is not None
        return _SharedNumber, (0, self._memory) if is_starting else (self.value,)


def _check_counts(name: str, found: np.ndarray, expected: np.ndarray, is_token_level: bool) -> None:
    if not np.array_equal(found, expected):
        row = int(np.argmax(found != expected))
        raise ValueError(
            f"column {name!r} has {found[row]} values in row {row} of the packed dataset, which has {expected[row]} "
            f"{'tokens' if is_token_level else 'sequences'} by its sequence_lengths; it was changed after packing: "
            "pack the source again, or remove the column"
        )


def _strategies(lengths: np.ndarray, pack_offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """strategy_lengths, strategy_offsets and repeats of a plan that has these packs.

    packs [2 1] [3] [1 2]  ->  (1, 2) x 2 and (3,) x 1, in an order that does not depend on that of the packs
    """
    depths = np.diff(pack_offsets)
    ascending = lengths[np.lexsort((lengths, np.repeat(np.arange(len(depths)), depths)))]
    # Packs are alike if they were up to the slot before and have one length in this; those that end keep their group.
    group, groups = np.zeros(len(depths), np.int64), 0
    for slot in range(int(depths.max())):
        longer = np.flatnonzero(depths > slot)
        content = group[longer] * (int(lengths.max()) + 1) + ascending[pack_offsets[longer] + slot]
        alike, number = np.unique(content, return_inverse=True)
        group[longer] = groups + number
        groups += len(alike)
    _, example, repeats = np.unique(group, return_index=True, return_counts=True)
    offsets = offsets_of(depths[example])
    slots = np.repeat(pack_offsets[example] - offsets[:-1], depths[example]) + np.arange(offsets[-1])
    return ascending[slots], offsets, repeats
