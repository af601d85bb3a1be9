"""Each sequence folded into a table of ceil(n / C) rows of C tokens, sequences with as many rows side by side.

    n = 5, C = 2     0 1        n = 3     0 1      ->    3 rows: 1 table      2 rows: 1 table
                     2 3                  2 .
                     4 .

The rows of a table are the sequence's own chunks: no table holds two sequences, and nothing depends on where in a batch
a sequence lies. Python loops over the different numbers of rows only.

On a GPU each number would cost launches of its own. There a table holds all rows of a pack, and masks along its columns
keep sequences apart: few rows are wasted, since a pack has little more rows than its tokens fill.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from collate.chunks import Chunks, cut_into_chunks
from collate.layout import PackLayout
from collate.length_groups import Gather, Scatter
from collate.views import starts_of


class ChunkGroups:
    """The chunks of sequences with equally many, side by side: (NC, …) <-> of each group (S sequences, R chunks, …).

    Empty sequences are in no group.

    shapes: (S, R) of each group. members: of each group (S,) int64, which of the batch's N. order: (NC,) int64.
    """

    def __init__(self, chunks: Chunks):
        counts, sequences = chunks.chunks_per_sequence.sort(stable=True)
        num_empty = int((counts == 0).sum())
        counts, sequences = counts[num_empty:], sequences[num_empty:]
        group_counts, group_sizes = (values.tolist() for values in counts.unique_consecutive(return_counts=True))
        self.shapes: list[tuple[int, int]] = list(zip(group_sizes, group_counts, strict=True))
        self.members = list(sequences.split(group_sizes))
        self.order = chunks.chunks_per_sequence[chunks.sequence].argsort(stable=True)  # keeps sequences whole

    @cached_property
    def place(self) -> Tensor:
        """(NC,) the inverse of `order`."""
        return self.order.argsort()

    def gather(self, x: Tensor) -> list[Tensor]:
        parts = _permute(x, self.order, self.place).split([size * count for size, count in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def scatter(self, parts: list[Tensor]) -> Tensor:
        return _permute(torch.cat([part.flatten(0, 1) for part in parts]), self.place, self.order)


def _permute(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    return Gather.apply(x, order, place) if x.is_floating_point() else x[order]


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a batch, in groups of S tables with R rows of C slots each.

    source: (P,) int64, the token that each slot of all groups shows; a padding slot shows its sequence's last token.
    slot_of_token: (T,) int64, where each token stands. columns: C. shapes: (S, R) of each group.
    valid: of each group (S, R, C) bool, True on tokens.
    sequence: of each group (S, R) int64, whose row it is, -1 for nobody's; None where a table is a sequence.
    """

    source: Tensor
    slot_of_token: Tensor
    columns: int
    shapes: list[tuple[int, int]]
    valid: list[Tensor]
    sequence: list[Tensor | None]

    def gather(self, x_T: Tensor) -> list[Tensor]:
        """(T, …) -> of each group (S, R, C, …). The gradient of padding slots is taken for 0."""
        slots = Gather.apply(x_T, self.source, self.slot_of_token)
        parts = slots.split([tables * rows * self.columns for tables, rows in self.shapes])
        return [part.unflatten(0, (*shape, self.columns)) for part, shape in zip(parts, self.shapes, strict=True)]

    def scatter(self, parts: list[Tensor]) -> Tensor:
        """Each group's (S, R, C, …) -> (T, …): the inverse of `gather`; padding slots are dropped."""
        return Scatter.apply(torch.cat([part.flatten(0, 2) for part in parts]), self.slot_of_token)

    def scatter_each(self, found: list[list[Tensor]]) -> tuple[Tensor, ...]:
        """The same for several results of each group, such as contexts and their log sums."""
        return tuple(self.scatter(list(parts)) for parts in zip(*found, strict=True))


def fold(layout: PackLayout, columns: int) -> Tables:
    """Every sequence of the batch in a table of `columns` columns; folded once for all layers that ask."""
    if layout.runs_on.type == "cpu":
        return layout.derived(("fold", columns), lambda: fold_sequences(layout, columns))
    return layout.table(("fold packs", columns), lambda layout: fold_packs(layout, columns))


def fold_sequences(layout: PackLayout, columns: int) -> Tables:
    chunks = layout.chunks(columns)
    groups = ChunkGroups(chunks)
    return Tables(
        source=chunks.index[groups.order].flatten(),
        slot_of_token=groups.place[chunks.slot_of_token // columns] * columns + chunks.slot_of_token % columns,
        columns=columns,
        shapes=groups.shapes,
        valid=groups.gather(chunks.valid),
        sequence=[None] * len(groups.shapes),
    )


def fold_packs(layout: PackLayout, columns: int) -> Tables:
    """One group, a table for each pack. A row of nobody shows a token of its pack."""
    packs, slots = layout.sequence_ids_BL.shape
    # and not layout.chunks, which would be sent to the device, too
    chunks = cut_into_chunks(columns, layout.lengths, layout.sequence_of_token, layout.positions_T)
    pack = layout.token_index[chunks.index[:, 0]] // slots
    rows_of_pack = torch.bincount(pack, minlength=packs)
    first, rows = starts_of(rows_of_pack), int(rows_of_pack.max())
    row = pack * rows + torch.arange(chunks.num_chunks) - first[pack]
    source = chunks.index[first.clamp(max=chunks.num_chunks - 1), :1, None].expand(-1, rows, columns).flatten(0, 1)
    sequence = torch.full((packs * rows,), -1)
    valid = torch.zeros(packs * rows, columns, dtype=torch.bool)
    return Tables(
        source=source.index_copy(0, row, chunks.index).flatten(),
        slot_of_token=row[chunks.slot_of_token // columns] * columns + chunks.slot_of_token % columns,
        columns=columns,
        shapes=[(packs, rows)],
        valid=[valid.index_copy(0, row, chunks.valid).unflatten(0, (packs, rows))],
        sequence=[sequence.index_copy(0, row, chunks.sequence).unflatten(0, (packs, rows))],
    )


def along_rows(x: Tensor) -> Tensor:
    """(S, R, C, H, K) -> (S * R, H, C, K): the tokens of each row as keys of one another."""
    return x.flatten(0, 1).transpose(1, 2)


def from_rows(x: Tensor, rows: int) -> Tensor:
    """(S * R, H, C, …) -> (S, R, C, H, …)"""
    return x.transpose(1, 2).unflatten(0, (-1, rows))


def along_columns(x: Tensor) -> Tensor:
    """(S, R, C, H, K) -> (S * C, H, R, K): the tokens of each column as keys of one another."""
    return x.permute(0, 2, 3, 1, 4).flatten(0, 1)


def from_columns(x: Tensor, columns: int) -> Tensor:
    """(S * C, H, R, …) -> (S, R, C, H, …)"""
    return x.unflatten(0, (-1, columns)).movedim(3, 1)


def row_masks(tables: Tables) -> list[Tensor]:
    """Of each group (S * R, 1, 1, C): the tokens of each row; in a row of nobody all."""
    masks = zip(tables.valid, tables.sequence, strict=True)
    found = [valid if sequence is None else valid | (sequence < 0)[..., None] for valid, sequence in masks]
    return [valid.flatten(0, 1)[:, None, None] for valid in found]


def column_masks(tables: Tables) -> list[Tensor]:
    """Of each group (S * C, 1, R, R): the tokens of each column, of the row's sequence; a padding slot sees itself."""
    masks = []
    for valid, sequence in zip(tables.valid, tables.sequence, strict=True):
        seen = valid.transpose(1, 2)[:, :, None]
        if sequence is not None:
            seen = seen & (sequence[:, None, :, None] == sequence[:, None, None])
        itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        masks.append((seen | itself).flatten(0, 1)[:, None])
    return masks


def default_stride(max_sequence_length: int) -> int:
    """The stride that makes rows and columns equally long, at the model's longest sequence."""
    return max(1, round(max_sequence_length**0.5))
