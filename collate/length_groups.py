"""Sequences of like length side by side: a batch of packs as a few dense (sequences, width, …) tensors.

    lengths 3, 20, 5, 17    ->    width 16: 2 sequences     width 32: 2 sequences

Every sequence has its own place along the first dimension, so no product joins two sequences. Its width is its own
length rounded up to a multiple of 16, whatever its pack mates are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from collate.views import starts_of

WIDTH_STEP = 16
"""A wider step makes fewer groups, but more padding in them."""
NARROWEST_DOUBLED = 6
"""2 ** 6 = 64."""


@dataclass(frozen=True, eq=False)
class LengthGroups:
    """How T tokens lie in groups of like length.

    source: (P,) the token that each slot of all groups shows, group after group; a padding slot repeats the last token
        of its own sequence, so that what is read there is always that sequence's own.
    slot_of_token: (T,) the slot where each token stands.
    shapes: (sequences, width) of each group. members: of each group (sequences,) int64, which of the batch's N.
    key_masks: of each group (sequences, 1, 1, width) bool, True on real tokens; None where there is no padding.
    """

    source: Tensor
    slot_of_token: Tensor
    shapes: list[tuple[int, int]]
    members: list[Tensor]
    key_masks: list[Tensor | None]

    def gather(self, x_T: Tensor) -> list[Tensor]:
        """(T, …) -> of each group (sequences, width, …). The gradient of padding slots is taken for 0."""
        return self.part(Gather.apply(x_T, self.source, self.slot_of_token))

    def part(self, slots: Tensor) -> list[Tensor]:
        """All slots (P, …) -> of each group (sequences, width, …)."""
        parts = slots.split([n * width for n, width in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def scatter(self, parts: list[Tensor]) -> Tensor:
        """Of each group (sequences, width, …) -> (T, …): the inverse of `gather`."""
        return Scatter.apply(torch.cat([part.flatten(0, 1) for part in parts]), self.slot_of_token)


def doubled_widths(lengths: Tensor) -> Tensor:
    """Widths 64, 128, 256 and so on, for few groups: 3, 64, 65 -> 64, 64, 128."""
    powers = torch.tensor([(length - 1).bit_length() if length else 0 for length in lengths.tolist()])
    return torch.where(lengths > 0, 1 << powers.clamp(min=NARROWEST_DOUBLED), 0)


def narrowest_length(width: int, doubled: bool = False) -> int:
    """The least length that has this width."""
    if doubled:
        return width // 2 + 1 if width > 1 << NARROWEST_DOUBLED else 1
    return width - WIDTH_STEP + 1


def length_groups(
    starts: Tensor, lengths: Tensor, sequence_of_token: Tensor, positions_T: Tensor, doubled: bool = False
) -> LengthGroups:
    """Group the sequences of a batch; starts, lengths: (N,) int64. Empty ones are in no group.

    doubled: by `doubled_widths`, instead of multiples of 16.
    """
    widths = doubled_widths(lengths) if doubled else (lengths + WIDTH_STEP - 1) // WIDTH_STEP * WIDTH_STEP
    widths, order = widths.sort(stable=True)
    first_slot = starts_of(widths)[order.argsort()]
    num_empty = int((lengths == 0).sum())
    widths, order = widths[num_empty:], order[num_empty:]
    group_widths, group_sizes = (values.tolist() for values in widths.unique_consecutive(return_counts=True))
    members = list(order.split(group_sizes))
    sources, key_masks = [], []
    for width, group in zip(group_widths, members, strict=True):
        place = torch.arange(width, device=lengths.device)
        last = lengths[group, None] - 1
        sources.append((starts[group, None] + torch.minimum(place, last)).flatten())
        is_real = place <= last
        key_masks.append(None if bool(is_real.all()) else is_real[:, None, None, :])
    return LengthGroups(
        source=torch.cat(sources),
        slot_of_token=first_slot[sequence_of_token] + positions_T,
        shapes=list(zip(group_sizes, group_widths, strict=True)),
        members=members,
        key_masks=key_masks,
    )


# torch's own gradient of an index is a scatter-add into zeros, several times slower on a CPU. Here every token has one
# slot that counts, so the gradient of either step is the other step.


class Gather(torch.autograd.Function):
    """(T, …), source (P,), slot_of_token (T,) -> (P, …)"""

    @staticmethod
    def forward(ctx, x_T, source, slot_of_token):
        ctx.save_for_backward(slot_of_token)
        return x_T.index_select(0, source)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slot_of_token,) = ctx.saved_tensors
        return grad.index_select(0, slot_of_token), None, None


class Scatter(torch.autograd.Function):
    """(P, …), slot_of_token (T,) -> (T, …)"""

    @staticmethod
    def forward(ctx, slots, slot_of_token):
        ctx.save_for_backward(slot_of_token)
        ctx.num_slots = len(slots)
        return slots.index_select(0, slot_of_token)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slot_of_token,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_slots, *grad.shape[1:]).index_copy_(0, slot_of_token, grad), None
