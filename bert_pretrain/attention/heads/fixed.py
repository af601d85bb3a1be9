"""`fixed`: the token's own block of l tokens, and the last c tokens of every block.

    own block  B_i = {j : floor(j / l) = floor(i / l)}       summaries  C = the last c tokens of each block
    heads="split":  the first half of the heads attends over B_i, the other over C
    heads="merged": every head attends over the union of B_i and C, in one softmax

Cost: N (l + c n / l) K, so N sqrt(n) K with l near sqrt(n); memory grows alike.
Source: Sparse Transformer (Child et al. 2019, arXiv 1904.10509, sections 4.2 and 4.3), there causal with
C = {j : j mod l >= l - c}. Here both directions. As a sequence rarely fills its last block, the summary there is the
sequence's own last c tokens: every token can see a summary of every block.

Isolation: positions and n are the sequence's own, and l comes from the options or from the model's max_sequence_length.
Blocks are the rows of the sequence's own table (`bert_pretrain.attention.parts.fold`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_pretrain.attention.heads.strided import Found, StrideOptions, StridePattern
from bert_pretrain.attention.options import whole
from bert_pretrain.attention.parts.fold import Tables, along_rows, fold, from_rows, row_masks
from bert_pretrain.attention.parts.pattern import Sees
from collate.layout import PackLayout


@dataclass(frozen=True)
class FixedOptions(StrideOptions):
    """What `use_attention(model, "fixed", …)` takes."""

    summary: int = whole(4, 1, "without a summary no token sees another block")
    """c: the last tokens of each block, which all tokens of the sequence see."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride is not None and self.summary > self.stride:
            raise ValueError(
                f"{type(self).__name__}: summary={self.summary} is more than a block of stride={self.stride}; lower it"
            )


class FixedAttention(StridePattern):
    """Softmax attention over the token's own block and the last tokens of every block; no parameters."""

    Options = FixedOptions

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.summary = min(self.options.summary, self.stride)  # a stride derived from a short model may be shorter

    def sees(self, device: torch.device) -> Sees:
        stride, summary, num_near, split = self.stride, self.summary, self.num_near, self.split

        def sees(head, query, key, length, stride=stride, summary=summary, num_near=num_near):
            near = query // stride == key // stride
            in_last = (key >= length - summary) & (key // stride == (length - 1) // stride)
            far = (key % stride >= stride - summary) | in_last
            return torch.where(head < num_near, near, far) if split else near | far

        return sees

    def prepare_chunks(self, layout: PackLayout) -> None:
        fold(layout, self.stride)

    def near(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Found:
        tables = fold(layout, self.stride)
        masks = layout.derived((*self.cache_key(), "near"), lambda: row_masks(tables))
        found = []
        inputs = map(tables.gather, (q_THK, k_THK, v_THK))
        for mask, query, key, value in zip(masks, *inputs, strict=True):
            parts = self.softmax(along_rows(query), along_rows(key), along_rows(value), mask, dropout)
            found.append([from_rows(x, query.shape[1]) for x in parts])
        return tables.scatter_each(found)

    def far(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Found:
        """Each table's queries, all rows together, against the table's summaries."""
        tables = fold(layout, self.stride)
        masks = layout.derived((*self.cache_key(), "far"), lambda: self.far_masks(tables))
        found = []
        inputs = map(tables.gather, (q_THK, k_THK, v_THK))
        for (slot, mask), query, key, value in zip(masks, *inputs, strict=True):
            rows = query.shape[1]
            key, value = (summaries(x, slot).transpose(1, 2) for x in (key, value))
            parts = self.softmax(query.flatten(1, 2).transpose(1, 2), key, value, mask, dropout)
            found.append([x.transpose(1, 2).unflatten(1, (rows, self.stride)) for x in parts])
        return tables.scatter_each(found)

    def far_masks(self, tables: Tables) -> list[tuple[Tensor, Tensor]]:
        """Of each group the slots (S, R c) of the last c tokens of each row, and which a query sees."""
        found = []
        for valid, sequence in zip(tables.valid, tables.sequence, strict=True):
            (count, rows, columns), device = valid.shape, valid.device
            row = torch.arange(rows, device=device)
            in_row = valid.sum(-1)[..., None] + torch.arange(-self.summary, 0, device=device)
            mask = (in_row >= 0).flatten(1)[:, None, None]
            if sequence is not None:
                same = sequence[:, None, :, None, None] == sequence[:, None, None, :, None]
                mask = mask & spread(same.expand(*same.shape[:-1], self.summary).flatten(3), columns)
                mask = mask | ~mask.any(-1, keepdim=True)  # a softmax over nothing is NaN
            if not self.split:
                other = (row[:, None] != row)[..., None].expand(-1, -1, self.summary).flatten(1)
                mask = mask & spread(other[None, None], columns)  # its own row's are in its block already
            table = torch.arange(count, device=device)[:, None, None]
            slot = (table * rows + row[:, None]) * columns + in_row.clamp(min=0)
            found.append((slot.flatten(1), mask))
        return found


def spread(mask: Tensor, columns: int) -> Tensor:
    """(S, 1, R, M) -> (S, 1, R C, M): the mask of a row for each of its tokens."""
    return mask[:, :, :, None].expand(-1, -1, -1, columns, -1).flatten(2, 3)


def summaries(x: Tensor, slot: Tensor) -> Tensor:
    """(S, R, C, H, K) -> (S, R c, H, K): the tokens in these slots."""
    return x.flatten(0, 2).index_select(0, slot.flatten()).unflatten(0, slot.shape)
