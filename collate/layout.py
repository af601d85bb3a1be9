"""PackLayout: where the sequences of a batch lie, by one stored fact, `sequence_ids`, and every view of it.

Shape letters: B packs, L token slots per pack, T tokens of the batch, N sequences of the batch.
Order is the same everywhere: pack by pack, and inside a pack from left to right.

Two forms. `PackLayout` has real tokens only: T and N change from batch to batch. `SlotLayout` has all slots: T and N
stay, as a GPU wants it; see there.

What needs sizes of the batch, such as an index of all tokens, is a table. The host makes it and sends it to the device.
The rest follows on the device in fixed shapes. So nobody waits for a GPU, where `to_device` brought the batch there.
Ids that were made on the device are copied to the host first, which waits once.
"""

from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from collate.chunks import Chunks, cut_into_chunks
from collate.device.host import copy_on_host, on_host, send, version_of
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
    not count up from 1.
    """

    sequence_ids_BL: Tensor
    host: "PackLayout | None" = None
    """The layout of the same ids on the host, which makes the tables of this one. None on the host itself; elsewhere
    it is made of a copy of the ids, which waits for the device."""

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
            _check_ids(self.sequence_ids_BL, self.is_start_BL)
            return
        if self.host is None:
            copied = in_ordinary_mode(self.sequence_ids_BL.cpu)
            object.__setattr__(self, "host", replace(self, sequence_ids_BL=copied))
        self.host.__dict__["runs_on"] = self.sequence_ids_BL.device

    @view
    def runs_on(self) -> torch.device:
        """Where attention heads work on this batch. The host's layout of a batch on a GPU names the GPU."""
        return self.sequence_ids_BL.device

    @classmethod
    def of(cls, sequence_ids_BL: Tensor) -> "PackLayout":
        """The layout of these ids: made once, and kept as long as the tensor lives.

        Whoever needs the layout of a batch asks here: the isolating hook, attention heads, task heads, each layer.
        Ids that have changed get a new layout. On a CPU a comparison of the ids notices it, also after a write through
        numpy. Elsewhere the tensor's version does, since a comparison would wait for the device.
        """
        version = version_of(sequence_ids_BL)
        layout, made_from = _LAYOUTS.get(sequence_ids_BL, (None, None))
        if layout is not None:
            if sequence_ids_BL.device.type == "cpu":
                is_current = torch.equal(layout.sequence_ids_BL, sequence_ids_BL)
            else:
                is_current = version is not None and made_from == version
            if is_current:
                return layout
        host_ids = on_host(sequence_ids_BL)
        # Layouts hold copies of the ids, which neither keep the batch alive nor change with it. The host's layout of a
        # batch that is elsewhere is made anew: what the batch needs on the host itself is chosen for the host.
        host = None
        if host_ids is not None and host_ids is not sequence_ids_BL:
            host = cls(in_ordinary_mode(host_ids.clone))
        layout = cls(in_ordinary_mode(sequence_ids_BL.clone), host)
        layout.keep_for(sequence_ids_BL)
        return layout

    def keep_for(self, sequence_ids_BL: Tensor) -> None:
        """Whoever asks for the layout of this tensor gets this one."""
        _LAYOUTS[sequence_ids_BL] = self, version_of(sequence_ids_BL)

    @view
    def exact(self) -> "PackLayout":
        """The layout of the real tokens alone: for what reads some tokens of the last layer."""
        return self

    @view
    def is_real_BL(self) -> Tensor:
        """(B, L) bool: True where a slot holds a token."""
        return self.sequence_ids_BL != PADDING

    @view
    def is_start_BL(self) -> Tensor:
        """(B, L) bool: True on the first token of each sequence."""
        return self.is_real_BL & is_start(self.sequence_ids_BL)

    @view
    def token_index(self) -> Tensor:
        """(T,) int64: the slots that hold tokens, counted through the whole batch (pack * L + slot)."""
        return self.table("token_index", lambda layout: layout.is_real_BL.flatten().nonzero().squeeze(1))

    @view
    def token_of_slot(self) -> Tensor:
        """(B * L,) int64: the inverse of `token_index`; -1 on padding."""
        is_real = self.is_real_BL.flatten()
        return torch.where(is_real, is_real.cumsum(0) - 1, -1)

    @view
    def cu_seqlens(self) -> Tensor:
        """(N + 1,) int32: where each sequence begins among the T tokens, and T at the end."""
        return self.table("cu_seqlens", _boundaries)

    @view
    def is_real_token(self) -> Tensor:
        """(T,) bool: False for the tokens of a SlotLayout that are padding. Whatever adds up tokens asks it."""
        return torch.ones_like(self.sequence_of_token, dtype=torch.bool)

    @view
    def is_real_sequence(self) -> Tensor:
        """(N,) bool: False for the sequences of a SlotLayout that are empty, or padding."""
        return torch.ones_like(self.lengths, dtype=torch.bool)

    @view
    def lengths(self) -> Tensor:
        """(N,) int64: tokens of each sequence."""
        return self.cu_seqlens.diff().long()

    @property
    def num_tokens(self) -> int:
        """T; read off a tensor each time, so that a graph of torch.compile takes it for a size that may change."""
        return len(self.token_index)

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @view
    def most_sequences(self) -> int:
        """At least as many as any pack holds."""
        return self.table("most sequences", lambda layout: int(layout.sequence_ids_BL.max()))

    @view
    def sequence_of_token(self) -> Tensor:
        """(T,) int64: which of the batch's sequences a token belongs to, from 0."""
        return self.is_start_BL.flatten()[self.token_index].cumsum(0) - 1

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
        return self.table("length_groups", _groups)

    def chunks(self, size: int) -> Chunks:
        """Every sequence cut into chunks of `size` tokens from its own start; cut once for all layers that ask.

        lengths 5, 2 and size 3: [0 1 2] [3 4 .] [5 6 .]

        Their number depends on the lengths, in a SlotLayout, too: see `collate.chunks`.
        """
        if size < 1:
            raise ValueError(f"chunks of {size} tokens; give a size of at least 1")
        return self.table(
            ("chunks", size),
            lambda layout: cut_into_chunks(size, layout.lengths, layout.sequence_of_token, layout.positions_T),
        )

    def table(self, key: Hashable, make: "Callable[[PackLayout], Made]") -> Made:
        """What `make` returns for the layout on the host, here: made once per key, and sent without a wait.

        The first question sends all tables that the host has by then, in one copy. So whoever knows which will be
        needed asks the host first: see `AttentionHead.prepare`.

        key: all that the result depends on besides the layout; start it with the name of who asks.
        make: gets a layout, of the host if there is one. Its result may depend on sizes: it may hold numbers, and
            tensors in tuples, lists, dicts and dataclasses.
        """
        if key not in self.tables:
            if self.host is None:
                self.tables[key] = in_ordinary_mode(lambda: make(self))
            else:
                self.host.table(key, make)
                self.receive()
        return self.tables[key]

    def from_host(self, make: "Callable[..., Made]", *tensors: Tensor | None) -> Made:
        """What `make` returns for the layout and these tensors of the batch on the host, here.

        make: as in `table`; for what one batch needs once. Tensors that came without `to_device` are copied to the
            host, which waits.
        """
        if self.host is None:
            return in_ordinary_mode(lambda: make(self, *tensors))
        found = [None if x is None else copy_on_host(x) for x in tensors]
        return in_ordinary_mode(lambda: send(make(self.host, *found), self.sequence_ids_BL.device))

    def receive(self) -> None:
        """Get all tables that the host has and this layout lacks, in one copy."""
        made = {} if self.host is None else self.host.tables
        missing = {key: table for key, table in made.items() if key not in self.tables}
        if missing:
            self.tables.update(in_ordinary_mode(lambda: send(missing, self.sequence_ids_BL.device)))

    @view
    def tables(self) -> dict[Hashable, Any]:
        return {}

    def derived(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made once per key where the layout is: for what an attention head needs in each layer.

        key: as in `table`.
        make: uses numbers and views of this layout only, in shapes that do not depend on values: for others, `table`.
            With a tensor from torch.inference_mode() nothing could train.
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

    def in_rows(self, x_T: Tensor) -> Tensor:
        """(T, …) -> (B, L, …): anything on padding, for whoever masks it out."""
        return self.pad(x_T)


@dataclass(frozen=True, eq=False)
class SlotLayout(PackLayout):
    """All slots of a batch as tokens: T = B * L, and N = B * (S + 1). No shape depends on the ids, except for tables of
    chunks and of length groups, whose numbers follow from the lengths.

    The slots of a pack's padding are its last sequence; before it, unused ones are empty.

        sequence_ids [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]]       S = 3
        lengths      [3, 2, 0, 1, 6, 0, 0, 0]
        cu_seqlens   [0, 3, 5, 5, 6, 12, 12, 12, 12]

    A GPU computes a padded slot faster than it changes its plans: kernels, graphs and memory stay those of the batch
    before. Packs have little padding. What the padding computes stays in it, but counts, sums and buffers must leave it
    out, by `is_real_token` and `is_real_sequence`.

    sequence_slots: S, the most sequences in a pack; raises ValueError for a pack of more. Padding stands at the end of
        a pack only; `to_device` sees to it.
    """

    sequence_slots: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.host is None and (most := int(self.sequence_ids_BL.max())) > self.sequence_slots:
            raise ValueError(
                f"a pack holds {most} sequences, more than sequence_slots={self.sequence_slots}; give more slots"
            )

    @view
    def exact(self) -> PackLayout:
        return PackLayout(self.sequence_ids_BL, None if self.host is None else self.host.exact)

    @view
    def most_sequences(self) -> int:
        return self.sequence_slots

    @view
    def _slot_lengths(self) -> Tensor:
        """(B, S + 1) int64: the last is padding."""
        packs = len(self.sequence_ids_BL)
        slot_BL = torch.where(self.is_real_BL, self.sequence_ids_BL.long() - 1, self.sequence_slots)
        counts = slot_BL.new_zeros((packs, self.sequence_slots + 1))
        return counts.scatter_add_(1, slot_BL, torch.ones_like(slot_BL))

    @view
    def token_index(self) -> Tensor:
        return torch.arange(self.sequence_ids_BL.numel(), device=self.sequence_ids_BL.device)

    @view
    def token_of_slot(self) -> Tensor:
        return self.token_index

    @view
    def cu_seqlens(self) -> Tensor:
        return torch.nn.functional.pad(self._slot_lengths.flatten().cumsum(0), (1, 0)).int()

    @view
    def is_real_token(self) -> Tensor:
        return self.is_real_BL.flatten()

    @view
    def is_real_sequence(self) -> Tensor:
        is_real = self._slot_lengths > 0
        is_real[:, -1] = False
        return is_real.flatten()

    @view
    def sequence_of_token(self) -> Tensor:
        packs = torch.arange(len(self.sequence_ids_BL), device=self.sequence_ids_BL.device)
        slot_BL = torch.where(self.is_real_BL, self.sequence_ids_BL.long() - 1, self.sequence_slots)
        return (packs[:, None] * (self.sequence_slots + 1) + slot_BL).flatten()

    @view
    def positions(self) -> Tensor:
        return self.positions_T.unflatten(0, self.sequence_ids_BL.shape) * self.is_real_BL

    def unpad(self, x_BL: Tensor) -> Tensor:
        """(B, L, …) -> (T, …): all slots."""
        return x_BL.flatten(0, 1)

    def pad(self, x_T: Tensor) -> Tensor:
        """(T, …) -> (B, L, …): zero on padding, whatever it held."""
        is_real = self.is_real_token.view(-1, *[1] * (x_T.dim() - 1))
        return torch.where(is_real, x_T, 0).unflatten(0, self.sequence_ids_BL.shape)

    def in_rows(self, x_T: Tensor) -> Tensor:
        return x_T.unflatten(0, self.sequence_ids_BL.shape)


def one_slot(layout: PackLayout) -> SlotLayout:
    """A batch of one slot of padding, where the layout is: for modules that cannot run on no token.

    They run on it, and count nothing: no statistics of a buffer, no term of a loss.
    """
    ids = torch.zeros_like(layout.sequence_ids_BL[:1, :1])
    if layout.host is None:
        return SlotLayout(ids)
    return SlotLayout(ids, SlotLayout(torch.zeros_like(layout.host.sequence_ids_BL[:1, :1])))


def _boundaries(layout: PackLayout) -> Tensor:
    starts = layout.is_start_BL.flatten()[layout.token_index].nonzero().squeeze(1)
    return torch.nn.functional.pad(starts, (0, 1), value=len(layout.token_index)).int()


def _groups(layout: PackLayout) -> LengthGroups:
    return length_groups(layout.cu_seqlens[:-1].long(), layout.lengths, layout.sequence_of_token, layout.positions_T)


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
