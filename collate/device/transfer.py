"""A batch goes to a device: one pinned buffer, one copy, and its layout comes along from the host.

    batch = to_device(collator(rows), "cuda")
    loss = model(**batch).loss

A collator's batch does the same by itself where it is sent: `batch.to("cuda")`, which accelerate and Trainer call.
"""

from collections.abc import Mapping
from dataclasses import replace
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

    Raises ValueError for by_slots=True if padding stands elsewhere, or if cls_positions has fewer slots than a pack has
    sequences.
    """
    device = torch.device(device)
    is_here = device.type == "cpu"
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    sent = tensors if is_here else in_ordinary_mode(lambda: send(tensors, device))
    elsewhere = {name: x.to(device) for name, x in batch.items() if isinstance(x, Tensor) and name not in sent}
    there = CollatedBatch({**batch, **elsewhere, **sent})
    ids = tensors.get("sequence_ids")
    if ids is None or ids.dim() != 2 or not ids.numel() or (is_here and not by_slots):
        return there
    try:
        host: PackLayout | None = _layout_by_slots(ids, batch, by_slots)
        if host is None:  # that of the ids may be in use on the host: see PackLayout.of
            host = PackLayout.of(ids) if is_here else PackLayout(in_ordinary_mode(ids.clone))
    except ValueError:
        if by_slots:
            raise
        # Where accelerate deals out batches, other ranks send memory that holds nothing yet. Of ids that are wrong for
        # good, the model asks for the layout, and refuses them.
        return there
    layout = host if is_here else replace(host, sequence_ids_BL=there["sequence_ids"].data, host=host)
    layout.keep_for(there["sequence_ids"])
    return there


def _layout_by_slots(ids: Tensor, batch: Mapping[str, Any], by_slots: bool | None) -> SlotLayout | None:
    """None where the batch goes by its tokens."""
    if not _is_padded_at_the_end(ids):
        if by_slots:
            raise ValueError("by_slots=True needs packs with padding at their end only; give packs of the collator")
        return None
    if by_slots is False or (by_slots is None and float((ids != PADDING).float().mean()) < FULL):
        return None
    slots = batch["cls_positions"].shape[1] if "cls_positions" in batch else _rounded_up(int(ids.max()))
    return SlotLayout(in_ordinary_mode(ids.clone), sequence_slots=slots)


def _is_padded_at_the_end(sequence_ids_BL: Tensor) -> bool:
    is_real = sequence_ids_BL != PADDING
    return not bool((is_real[:, 1:] & ~is_real[:, :-1]).any())


def _rounded_up(count: int) -> int:
    """To a power of two, so that few numbers of sequence slots come up."""
    return 1 << max(3, (count - 1).bit_length())
