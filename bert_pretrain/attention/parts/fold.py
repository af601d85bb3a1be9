"""Each sequence folded into a table of ceil(n / C) rows of C tokens, sequences with as many rows side by side.

    n = 5, C = 2     0 1        n = 3     0 1      ->    3 rows: 1 table      2 rows: 1 table
                     2 3                  2 .
                     4 .

The rows of a table are the sequence's own chunks: no table holds two sequences, and nothing depends on where in a batch
a sequence lies. Python loops over the different numbers of rows only.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from collate.chunks import Chunks
from collate.layout import PackLayout
from collate.length_groups import Gather, Scatter


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
    valid: of each group (S, R, C) bool, True on tokens. lengths: of each group (S,) int64, tokens of the sequences.
    """

    source: Tensor
    slot_of_token: Tensor
    columns: int
    shapes: list[tuple[int, int]]
    valid: list[Tensor]
    lengths: list[Tensor]

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
    return layout.derived(("fold", columns), lambda: _fold(layout, columns))


def _fold(layout: PackLayout, columns: int) -> Tables:
    chunks = layout.chunks(columns)
    groups = ChunkGroups(chunks)
    return Tables(
        source=chunks.index[groups.order].flatten(),
        slot_of_token=groups.place[chunks.slot_of_token // columns] * columns + chunks.slot_of_token % columns,
        columns=columns,
        shapes=groups.shapes,
        valid=groups.gather(chunks.valid),
        lengths=[layout.lengths[members] for members in groups.members],
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


def row_mask(valid: Tensor) -> Tensor:
    """(S, R, C) -> (S * R, 1, 1, C): the tokens of each row. Every row has one."""
    return valid.flatten(0, 1)[:, None, None]


def column_mask(valid: Tensor) -> Tensor:
    """(S, R, C) -> (S * C, 1, R, R): the tokens of each column; a padding slot, whatever it computes, sees itself."""
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    return (valid.transpose(1, 2).flatten(0, 1)[:, None] | itself)[:, None]


def default_stride(max_sequence_length: int) -> int:
    """The stride that makes rows and columns equally long, at the model's longest sequence."""
    return max(1, round(max_sequence_length**0.5))
