"""Every sequence cut into chunks of C tokens from its own start: the ground for attention over blocks.

    lengths 5, 2 and C = 3     chunks   [0 1 2] [3 4 .]   [5 6 .]
                               sequence  0       0         1
                               number    0       1         0        in its own sequence

No chunk crosses a boundary, and nothing depends on where in the row, or in the batch, a sequence lies.

Of a SlotLayout T and N stay from batch to batch, and so do the shapes of `slot_of_token` and `chunks_per_sequence`. NC
does not: it is the sum of ceil(length / C), which is between T / C and T / C + N. So heads that work on chunks compile
with NC as a size that may change.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from collate.length_groups import Gather, Scatter
from collate.views import starts_of, view

NO_CHUNK = -1


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of a batch. NC chunks of C slots, sequence by sequence, from its start to its end.

    index: (NC, C) int64, the token in each slot; padding slots, at the end of a sequence's last chunk, show the
        sequence's last token, so that what is read there is always its own.
    valid: (NC, C) bool, True on real tokens.
    sequence: (NC,) int64, which of the N sequences a chunk belongs to. number: (NC,) int64, its number in that, from 0.
    chunks_per_sequence: (N,) int64. slot_of_token: (T,) int64, where each token stands among the NC * C slots.
    """

    index: Tensor
    valid: Tensor
    sequence: Tensor
    number: Tensor
    chunks_per_sequence: Tensor
    slot_of_token: Tensor

    @property
    def num_chunks(self) -> int:
        return len(self.index)

    @property
    def size(self) -> int:
        """C"""
        return self.index.shape[1]

    @view
    def first(self) -> Tensor:
        """(N,) int64: the first chunk of each sequence."""
        return starts_of(self.chunks_per_sequence)

    @view
    def positions(self) -> Tensor:
        """(NC, C) int64: the position of each slot in its sequence; those of padding follow the last token's."""
        return self.number[:, None] * self.size + torch.arange(self.size, device=self.index.device)

    def neighbour(self, offset: int) -> Tensor:
        """(NC,) int64: the chunk `offset` further on in the same sequence; NO_CHUNK (-1) where there is none.

        chunks of sequences 0 0 0 1, offset 1 -> [1, 2, -1, -1]; offset -1 -> [-1, 0, 1, -1]
        """
        number = self.number + offset
        inside = (number >= 0) & (number < self.chunks_per_sequence[self.sequence])
        return torch.where(inside, self.first[self.sequence] + number, NO_CHUNK)

    def gather(self, x_T: Tensor) -> Tensor:
        """(T, …) -> (NC, C, …). Padding slots get no gradient: mask them out of whatever follows."""
        return Gather.apply(x_T, self.index.flatten(), self.slot_of_token).unflatten(0, self.index.shape)

    def scatter(self, x: Tensor) -> Tensor:
        """(NC, C, …) -> (T, …): the inverse of `gather`; padding slots are dropped."""
        return Scatter.apply(x.flatten(0, 1), self.slot_of_token)


def cut_into_chunks(size: int, lengths: Tensor, sequence_of_token: Tensor, positions_T: Tensor) -> Chunks:
    """Chunks of `size` tokens; lengths (N,), sequence_of_token and positions_T (T,): int64."""
    chunks_per_sequence = (lengths + size - 1) // size
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), chunks_per_sequence)
    first_chunk = starts_of(chunks_per_sequence)
    number = torch.arange(len(sequence), device=lengths.device) - first_chunk[sequence]
    position = number[:, None] * size + torch.arange(size, device=lengths.device)
    last = lengths[sequence, None] - 1
    return Chunks(
        index=starts_of(lengths)[sequence, None] + torch.minimum(position, last),
        valid=position <= last,
        sequence=sequence,
        number=number,
        chunks_per_sequence=chunks_per_sequence,
        slot_of_token=first_chunk[sequence_of_token] * size + positions_T,
    )
