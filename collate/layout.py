"""PackLayout: where the sequences of a batch lie, by one stored fact, `sequence_ids`, and every view of it.

Shape letters: B packs, L token slots per pack, T real tokens of the batch, N sequences of the batch.
Order is the same everywhere: pack by pack, and inside a pack from left to right.
"""

from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from collate.chunks import Chunks, cut_into_chunks
from collate.length_groups import LengthGroups, length_groups
from collate.views import in_ordinary_mode, view

Made = TypeVar("Made")

PADDING = 0
"""The `sequence_ids` value of a slot that holds no token."""

_LAYOUTS: MutableMapping[Tensor, tuple["PackLayout", int | None]] = WeakIdKeyDictionary()
"""Of each tensor of ids that is alive: its layout, and the tensor's version then. See PackLayout.of."""


@dataclass(frozen=True, eq=False)
class PackLayout:
    """The layout of a batch of packs, as lazy views that are computed once and shared by all layers. Make it by `of`.

    sequence_ids_BL: (B, L) integers; 1, 2, 3… from left to right in each pack, 0 on padding.

        sequence_ids [[1, 1, 1, 2, 2, 0]]
        positions    [[0, 1, 2, 0, 1, 0]]      cu_seqlens [0, 3, 5]      lengths [3, 2]

    Raises ValueError for no packs, and for ids that no packing produces: a sequence in two pieces, or numbers that do
    not count up from 1. It looks at ids on the CPU only, the collator's: elsewhere it would wait for the device.
    """

    sequence_ids_BL: Tensor

    def __post_init__(self) -> None:
        if self.sequence_ids_BL.dim() != 2 or self.sequence_ids_BL.is_floating_point():
            raise ValueError(
                f"sequence_ids must be (packs, slots) integers, got {tuple(self.sequence_ids_BL.shape)} "
                f"{self.sequence_ids_BL.dtype}"
            )
        if not self.sequence_ids_BL.numel():
            packs, slots = self.sequence_ids_BL.shape
            raise ValueError(f"sequence_ids has {packs} packs of {slots} slots; give at least one pack and one slot")
        if self.sequence_ids_BL.device.type == "cpu":
            _check_ids(self.sequence_ids_BL, self._is_start_BL)

    @classmethod
    def of(cls, sequence_ids_BL: Tensor) -> "PackLayout":
        """The layout of these ids: made once, and kept as long as the tensor lives.

        Whoever needs the layout of a batch asks here: the isolating hook, attention heads, task heads, each layer.
        Ids that have changed get a new layout. On a CPU a comparison of the ids notices it, also after a write through
        numpy. Elsewhere the tensor's version does, since a comparison would wait for the device.
        """
        version = None if sequence_ids_BL.is_inference() else sequence_ids_BL._version
        layout, made_from = _LAYOUTS.get(sequence_ids_BL, (None, None))
        if layout is not None:
            if sequence_ids_BL.device.type == "cpu":
                is_current = torch.equal(layout.sequence_ids_BL, sequence_ids_BL)
            else:
                is_current = version is not None and made_from == version
            if is_current:
                return layout
        # it holds a copy of the ids, which neither keeps the batch alive nor changes with it
        layout = cls(in_ordinary_mode(sequence_ids_BL.clone))
        _LAYOUTS[sequence_ids_BL] = layout, version
        return layout

    @view
    def is_real_BL(self) -> Tensor:
        """(B, L) bool: True where a slot holds a token."""
        return self.sequence_ids_BL != PADDING

    @view
    def _is_start_BL(self) -> Tensor:
        """(B, L) bool: True on the first token of each sequence."""
        return self.is_real_BL & is_start(self.sequence_ids_BL)

    @view
    def token_index(self) -> Tensor:
        """(T,) int64: the slots that hold tokens, counted through the whole batch (pack * L + slot)."""
        return self.is_real_BL.flatten().nonzero().squeeze(1)

    @view
    def token_of_slot(self) -> Tensor:
        """(B * L,) int64: the inverse of `token_index`; -1 on padding."""
        is_real = self.is_real_BL.flatten()
        return torch.where(is_real, is_real.cumsum(0) - 1, -1)

    @view
    def cu_seqlens(self) -> Tensor:
        """(N + 1,) int32: where each sequence begins among the T tokens, and T at the end."""
        starts = self._is_start_BL.flatten()[self.token_index].nonzero().squeeze(1)
        return torch.nn.functional.pad(starts, (0, 1), value=len(self.token_index)).int()

    @view
    def lengths(self) -> Tensor:
        """(N,) int64: tokens of each sequence."""
        return self.cu_seqlens.diff().long()

    @view
    def num_tokens(self) -> int:
        return len(self.token_index)

    @view
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @view
    def sequence_of_token(self) -> Tensor:
        """(T,) int64: which of the batch's sequences a token belongs to, from 0."""
        return self._is_start_BL.flatten()[self.token_index].cumsum(0) - 1

    @view
    def positions_T(self) -> Tensor:
        """(T,) int64: each token's place in its own sequence, from 0."""
        tokens = torch.arange(self.num_tokens, device=self.token_index.device)
        return tokens - self.cu_seqlens.long()[self.sequence_of_token]

    @view
    def positions(self) -> Tensor:
        """(B, L) int64: each token's place in its own sequence, from 0; 0 on padding."""
        return self.pad(self.positions_T)

    @view
    def length_groups(self) -> LengthGroups:
        """The sequences side by side, those of like length together; needs at least one sequence."""
        return length_groups(self.cu_seqlens[:-1].long(), self.lengths, self.sequence_of_token, self.positions_T)

    def chunks(self, size: int) -> Chunks:
        """Every sequence cut into chunks of `size` tokens from its own start; cut once for all layers that ask.

        lengths 5, 2 and size 3: [0 1 2] [3 4 .] [5 6 .]
        """
        if size < 1:
            raise ValueError(f"chunks of {size} tokens; give a size of at least 1")
        token_views = self.lengths, self.sequence_of_token, self.positions_T
        return self.derived(("chunks", size), lambda: cut_into_chunks(size, *token_views))

    def derived(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made once per key: for views of this layout that an attention head needs in each layer.

        key: all that the result depends on besides the layout; start it with the name of who asks.
        make: uses numbers and views of this layout only. With a tensor from torch.inference_mode() nothing could train.
        """
        if key not in self._derived:
            self._derived[key] = in_ordinary_mode(make)
        return self._derived[key]

    @view
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    @view
    def attention_mask(self) -> Tensor:
        """(B, 1, L, L) bool, True = attend: query and key are tokens of one sequence.

        [[1, 1, 2, 0]] -> 1 1 0 0
                          1 1 0 0
                          0 0 1 0
                          0 0 0 0
        """
        same_BLL = self.sequence_ids_BL[:, :, None] == self.sequence_ids_BL[:, None, :]
        return (same_BLL & self.is_real_BL[:, None, :])[:, None]

    def attention_bias(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, 1, L, L) float to be added to the scores: 0 within a sequence, the type's least number elsewhere.

        The least number and not -inf: a padding query has no key at all, and a softmax over -inf alone is NaN.
        """
        bias = torch.zeros(self.attention_mask.shape, dtype=dtype, device=self.sequence_ids_BL.device)
        return bias.masked_fill_(~self.attention_mask, torch.finfo(dtype).min)

    def unpad(self, x_BL: Tensor) -> Tensor:
        """(B, L, …) -> (T, …): the real tokens only."""
        return x_BL.flatten(0, 1).index_select(0, self.token_index)

    def pad(self, x_T: Tensor) -> Tensor:
        """(T, …) -> (B, L, …): the inverse of `unpad`, zero on padding."""
        padded = x_T.new_zeros(self.sequence_ids_BL.numel(), *x_T.shape[1:])
        return padded.index_copy(0, self.token_index, x_T).unflatten(0, self.sequence_ids_BL.shape)


def is_start(sequence_ids_BL: Tensor) -> Tensor:
    """(B, L) bool: True where a sequence, or a stretch of padding, begins."""
    changes = sequence_ids_BL[:, 1:] != sequence_ids_BL[:, :-1]
    return torch.nn.functional.pad(changes, (1, 0), value=True)


def holds_sequence(sequence_ids_BL: Tensor, slots: int) -> Tensor:
    """(B, slots) bool, which of a pack's sequence slots hold one: [[1, 1, 2, 0]], slots 3 -> [[True, True, False]]."""
    return torch.arange(slots, device=sequence_ids_BL.device) < sequence_ids_BL.amax(1)[:, None]


def _check_ids(sequence_ids_BL: Tensor, is_start_BL: Tensor) -> None:
    """Refuse ids that do not count 1, 2, 3… over contiguous sequences."""
    expected_BL = torch.where(sequence_ids_BL != PADDING, is_start_BL.cumsum(1), PADDING)
    wrong = (sequence_ids_BL != expected_BL).nonzero()
    if len(wrong):
        pack, slot = wrong[0].tolist()
        raise ValueError(
            f"sequence_ids of pack {pack} must count 1, 2, 3… from left to right with each sequence in one piece; "
            f"slot {slot} has {int(sequence_ids_BL[pack, slot])} where {int(expected_BL[pack, slot])} was expected"
        )
