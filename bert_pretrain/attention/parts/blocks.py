"""FlexAttention's masks, pack by pack: which blocks of 128 x 128 slots of a pack hold a pair that is seen.

    sequence_ids of a pack, blocks of 2     1 1 | 1 2 | 2 2 | 0 0
    first and last id of each block         1 1   1 2   2 2    -
    blocks seen                             x x . .        two blocks share a sequence where their ids overlap
                                            x x x .
                                            . x x .
                                            . . . .

So it takes B (L / 128)^2 steps of fixed shape, and no pair of tokens is looked at. Within a block the kernel asks the
predicate: in slots, a sequence is an interval from `start` to `stop`, and padding an empty one, which sees nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.layout import PackLayout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK_SLOTS = 128
"""Slots of a block, as FlexAttention has it by default."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(pack, head, slot of the query, slot of the key), integer tensors -> bool."""


def flex_attention() -> Callable:
    """torch's function, compiled; within a graph as it is, since the graph compiles it."""
    if not torch.compiler.is_compiling():
        return compiled_flex_attention()
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def compiled_flex_attention() -> Callable:
    """Compiled once, and only when first asked for."""
    from torch.nn.attention.flex_attention import flex_attention

    # For CPUs torch writes code that does not compile where sizes are variables: there each shape gets its own.
    return torch.compile(flex_attention, dynamic=None if torch.cuda.is_available() else False)


@dataclass(frozen=True, eq=False)
class Spans:
    """Where each slot's sequence lies in its pack: start and stop, (B, L) int32 slots; 0 and 0 for padding."""

    start: Tensor
    stop: Tensor


def spans_of(layout: PackLayout) -> Spans:
    """Made once for all layers."""
    return layout.derived("spans in packs", lambda: _spans_of(layout))


def _spans_of(layout: PackLayout) -> Spans:
    is_real, ids = layout.is_real_BL, layout.sequence_ids_BL
    start = torch.where(is_real, torch.arange(ids.shape[1], device=ids.device) - layout.positions, 0)
    length = layout.pad(layout.lengths[layout.sequence_of_token])
    return Spans(start.int(), torch.where(is_real, start + length, 0).int())


def in_blocks(values_BL: Tensor) -> Tensor:
    """(B, L) -> (B, R, 128), 0 or False beyond L."""
    return F.pad(values_BL, (0, -values_BL.shape[1] % BLOCK_SLOTS)).unflatten(1, (-1, BLOCK_SLOTS))


def share_sequence(ids_BL: Tensor, key_ids_BL: Tensor) -> Tensor:
    """(B, R of queries, R of keys) bool: blocks whose ids overlap, so that they may share a sequence."""
    (first, last), (key_first, key_last) = (_first_and_last(in_blocks(ids)) for ids in (ids_BL, key_ids_BL))
    return (first[:, :, None] <= key_last[:, None]) & (key_first[:, None] <= last[:, :, None])


def are_one_sequence(ids_BL: Tensor) -> Tensor:
    """(B, R, R) bool: blocks that hold the tokens of one sequence, the same, and nothing else."""
    ids = in_blocks(ids_BL)
    first = ids[..., 0]
    is_one = (ids == first[..., None]).all(-1) & (first > 0)
    return is_one[:, :, None] & is_one[:, None] & (first[:, :, None] == first[:, None])


def _first_and_last(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest id of each block; of one without tokens, what no id overlaps."""
    return torch.where(ids > 0, ids, torch.iinfo(ids.dtype).max).amin(-1), ids.amax(-1)


def within(distance: int, slots: int, key_slots: int, device: torch.device) -> Tensor:
    """(R of queries, R of keys) bool: blocks with a pair of slots at most so far apart."""
    block, key_block = (torch.arange(-(-number // BLOCK_SLOTS), device=device) for number in (slots, key_slots))
    return ((block[:, None] - key_block).abs() - 1) * BLOCK_SLOTS + 1 <= distance


def hold(is_special_BL: Tensor) -> Tensor:
    """(B, R, R) bool: blocks whose queries or keys hold a special token."""
    special = in_blocks(is_special_BL).any(-1)
    return special[:, :, None] | special[:, None]


def block_mask(seen: Tensor, is_full: Tensor | None, mask_mod: MaskMod, slots: int, key_slots: int) -> "BlockMask":
    """FlexAttention's mask.

    seen: (B, H or 1, R of queries, R of keys) bool, blocks that it looks at. is_full: like it, blocks in which all is
        seen, so that it need not ask mask_mod.
    """
    from torch.nn.attention.flex_attention import BlockMask

    partial = seen if is_full is None else seen & ~is_full
    tables: dict[str, Any] = {}
    for kind, dense in (("", partial), ("full_", is_full)):
        for side, table in (("kv", dense), ("q", None if dense is None else dense.mT)):
            number, which = (None, None) if table is None else _in_order(table)
            tables |= {f"{kind}{side}_num_blocks": number, f"{kind}{side}_indices": which}
    return BlockMask(seq_lengths=(slots, key_slots), BLOCK_SIZE=(BLOCK_SLOTS, BLOCK_SLOTS), mask_mod=mask_mod, **tables)


def _in_order(seen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block of queries sees, and which: those first, in their order."""
    return seen.sum(-1, dtype=torch.int32), seen.to(torch.int8).argsort(stable=True, dim=-1, descending=True).int()
