"""What comes out of a packed head: values by sequence."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from collate.views import at_least_float32, starts_of


class PerSequence(NamedTuple):
    """One value for each sequence, or one for each of its tokens, in the order of the batch.

    values [[.1, .9], [.7, .3]], lengths None  ->  a row for each of 2 sequences
    values [3, 4, 5, 6, 7], lengths [3, 2]     ->  [3, 4, 5] and [6, 7]
    """

    values: Tensor
    lengths: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor | None, lengths: Tensor | None = None) -> "PerSequence | None":
        """None where there are no values."""
        return None if values is None else cls(values, lengths)

    def split(self) -> tuple[Tensor, ...]:
        """N tensors, one per sequence."""
        return self.values.unbind() if self.lengths is None else self.values.split(self.lengths.tolist())

    def padded(self, fill: float = float("-inf")) -> Tensor:
        """(N, longest, …): values [3, 4, 5, 6, 7], lengths [3, 2] -> [[3, 4, 5], [6, 7, fill]]."""
        if self.lengths is None:
            return self.values
        sequence_T, position_T = places(self.lengths)
        longest = max(self.lengths.tolist(), default=1)
        padded = self.values.new_full((len(self.lengths), longest, *self.values.shape[1:]), fill)
        return padded.index_put((sequence_T, position_T), self.values)

    def take(self, order: Tensor) -> "PerSequence":
        """The sequences in another order: sequence i of the result is sequence order[i] of this."""
        if self.lengths is None:
            return PerSequence(self.values[order])
        first = starts_of(self.lengths)
        lengths = self.lengths[order]
        sequence_T, position_T = places(lengths)
        return PerSequence(self.values[first[order][sequence_T] + position_T], lengths)

    @staticmethod
    def concatenate(parts: Sequence["PerSequence"]) -> "PerSequence":
        """Those of several batches as one."""
        lengths = [part.lengths for part in parts if part.lengths is not None]
        return PerSequence(torch.cat([part.values for part in parts]), torch.cat(lengths) if lengths else None)


def places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """lengths [3, 2] -> the sequence [0, 0, 0, 1, 1] and the position [0, 1, 2, 0, 1] of each of its tokens."""
    sequences = torch.arange(len(lengths), device=lengths.device)
    sequence_T = torch.repeat_interleave(sequences, lengths)
    return sequence_T, torch.arange(len(sequence_T), device=lengths.device) - starts_of(lengths)[sequence_T]


def mean_by_sequence(values_T: Tensor, lengths: Tensor) -> Tensor:
    """(T, …) -> (N, …): values [1, 3, 5], lengths [2, 1] -> [2, 5]. Adds in float32 at least."""
    sequences = torch.arange(len(lengths), device=lengths.device)
    sequence_T = torch.repeat_interleave(sequences, lengths, output_size=len(values_T))
    wide = at_least_float32(values_T)
    sums = wide.new_zeros(len(lengths), *values_T.shape[1:]).index_add(0, sequence_T, wide)
    return (sums / lengths.view(-1, *[1] * (values_T.dim() - 1))).to(values_T.dtype)
