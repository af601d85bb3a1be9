"""Attention to keys that are not the queries: sequence i of `layout` sees the keys of sequence i of `key_layout`.

    queries of sequence i    . . a b c        keys end where queries end: key 4 stands beside c,
    its keys                 0 1 2 3 4        and a window around a is one around key 2

Who finds no key, as in an empty sequence of keys, gets a context of 0.

one by one      on CPUs, without dropout: `collate.isolation.pieces`
varlen          on CUDA in 16 bits, without dropout: `collate.isolation.varlen`
side by side    elsewhere: (N, longest), masked; it pads each sequence to the longest
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from collate.isolation.pieces import OneByOne, pieces_of_tokens
from collate.isolation.varlen import attend_varlen, takes_varlen
from collate.layout import PackLayout
from collate.length_groups import Gather, Scatter


def attend_other_keys(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    layout: PackLayout,
    key_layout: PackLayout,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """The context (T, H, K) of queries (T, H, K), keys and values (T of key_layout, H, K), scores scaled by 1/sqrt(K).

    window: a query sees the keys at most so many tokens from its own place. Raises ValueError unless both layouts have
    as many sequences.
    """
    if layout.num_sequences != key_layout.num_sequences:
        raise ValueError(
            f"key_layout has {key_layout.num_sequences} sequences, layout {layout.num_sequences}; each sequence of "
            "queries needs its keys, which may be none: give both as SlotLayout with as many packs and sequence_slots"
        )
    inputs = (q_THK, k_THK, v_THK)
    if not len(k_THK):
        return q_THK * 0 + (k_THK.sum() + v_THK.sum()) * 0
    if q_THK.device.type == "cpu" and not dropout:
        pieces = pieces_of_tokens(layout, key_layout, window)
        rows = (x.transpose(0, 1).unsqueeze(0) for x in inputs)
        return OneByOne.apply(*rows, pieces).squeeze(0).transpose(0, 1)
    if not dropout and takes_varlen(q_THK, window is not None):
        return attend_varlen(*inputs, layout, key_layout, window)
    return attend_side_by_side(*inputs, layout, key_layout, dropout, window)


def attend_side_by_side(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    layout: PackLayout,
    key_layout: PackLayout,
    dropout: float,
    window: int | None,
) -> Tensor:
    """One call for all sequences, each padded to the longest."""
    queries, keys = side_by_side(layout), side_by_side(key_layout)
    shift = (key_layout.lengths - layout.lengths)[:, None, None]
    key = torch.arange(keys.width, device=q_THK.device)
    seen = keys.is_real[:, None] & torch.ones(queries.width, 1, dtype=torch.bool, device=q_THK.device)
    if window is not None:
        seen = seen & ((torch.arange(queries.width, device=q_THK.device)[:, None] + shift - key).abs() <= window)
    finds = seen.any(-1, keepdim=True)
    query, key, value = (rows.gather(x).transpose(1, 2) for rows, x in ((queries, q_THK), (keys, k_THK), (keys, v_THK)))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=(seen | ~finds)[:, None], dropout_p=dropout)
    return queries.scatter(torch.where(finds[:, None], context, 0).transpose(1, 2))


@dataclass(frozen=True, eq=False)
class SideBySide:
    """Sequences as rows (N, width). index: (N, width), the token in each slot; is_real: (N, width) bool."""

    index: Tensor
    is_real: Tensor
    slot_of_token: Tensor

    @property
    def width(self) -> int:
        return self.index.shape[1]

    def gather(self, x_T: Tensor) -> Tensor:
        """(T, …) -> (N, width, …)"""
        return Gather.apply(x_T, self.index.flatten(), self.slot_of_token).unflatten(0, self.index.shape)

    def scatter(self, x: Tensor) -> Tensor:
        """(N, width, …) -> (T, …)"""
        return Scatter.apply(x.flatten(0, 1), self.slot_of_token)


def side_by_side(layout: PackLayout) -> SideBySide:
    return layout.table("side by side", _side_by_side)


def _side_by_side(layout: PackLayout) -> SideBySide:
    place = torch.arange(int(layout.lengths.max()))
    last = layout.lengths[:, None] - 1
    return SideBySide(
        index=(layout.cu_seqlens[:-1, None].long() + torch.minimum(place, last)).clamp(min=0),
        is_real=place <= last,
        slot_of_token=layout.sequence_of_token * len(place) + layout.positions_T,
    )
