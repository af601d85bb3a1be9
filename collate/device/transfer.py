"""A batch goes to a device: one pinned buffer, one copy, and its layout comes along from the host.

    batch = to_device(collator(rows), "cuda")
    loss = model(**batch).loss

A collator's batch does the same by itself where it is sent: `batch.to("cuda")`, which accelerate and Trainer call.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from collate.device.host import send
from collate.layout import PADDING, PackLayout, SlotLayout
from collate.views import in_ordinary_mode

FULL = 0.75
"""Of the slots of a batch: with fewer tokens, padding costs more than fixed shapes save."""


class CollatedBatch(dict[str, Any]):
    """A batch as a dict. On its way to a device it takes what the host knows of it along."""

    def to(self, device: torch.device | str | int, non_blocking: bool = True) -> Self:
        """The batch on a device: see `to_device`. non_blocking: for callers of tensors' `to`; it never blocks."""
        return type(self)(to_device(self, device))


def to_device(
    batch: Mapping[str, Any], device: torch.device | str | int, by_slots: bool | None = None
) -> CollatedBatch:
    """The batch on a device, with its layout. Call it once per rank, after batches are dealt out.

    by_slots: whether all batches have the shapes of their slots, see `SlotLayout`; True is also for CPUs. None: on an
        accelerator, if at least three quarters of the slots hold tokens, and padding stands at the end of each pack.

    Raises ValueError for by_slots=True if padding stands elsewhere.
    """
    device = torch.device(device)
    is_here = device.type == "cpu"
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    sent = {} if is_here else in_ordinary_mode(lambda: send(tensors, device))
    there = CollatedBatch({**batch, **sent})
    ids = tensors.get("sequence_ids")
    if ids is None or ids.dim() != 2 or not ids.numel() or (is_here and not by_slots):
        return there
    can = _is_padded_at_the_end(ids)
    if by_slots and not can:
        raise ValueError("by_slots=True needs packs with padding at their end only; give packs of the collator")
    if can and (by_slots or (by_slots is None and float((ids != PADDING).float().mean()) >= FULL)):
        slots = batch["cls_positions"].shape[1] if "cls_positions" in batch else _rounded_up(int(ids.max()))
        layout: PackLayout = SlotLayout(in_ordinary_mode(ids.clone), sequence_slots=slots)
        if not is_here:
            layout = SlotLayout(there["sequence_ids"].data, layout, slots)
    else:
        layout = PackLayout(there["sequence_ids"].data, PackLayout.of(ids))
    layout.keep_for(there["sequence_ids"])
    return there


def _is_padded_at_the_end(sequence_ids_BL: Tensor) -> bool:
    is_real = sequence_ids_BL != PADDING
    return not bool((is_real[:, 1:] & ~is_real[:, :-1]).any())


def _rounded_up(count: int) -> int:
    """To a power of two, so that few numbers of sequence slots come up."""
    return 1 << max(3, (count - 1).bit_length())
