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
from bert_pretrain.attention.parts.fold import along_rows, fold, from_rows, row_mask
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

    def near(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Found:
        tables = fold(layout, self.stride)
        found = []
        inputs = map(tables.gather, (q_THK, k_THK, v_THK))
        for valid, query, key, value in zip(tables.valid, *inputs, strict=True):
            parts = self.softmax(along_rows(query), along_rows(key), along_rows(value), row_mask(valid), dropout)
            found.append([from_rows(x, valid.shape[1]) for x in parts])
        return tables.scatter_each(found)

    def far(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float) -> Found:
        """Each table's queries, all rows together, against the table's summaries."""
        tables = fold(layout, self.stride)
        found = []
        inputs = map(tables.gather, (q_THK, k_THK, v_THK))
        for lengths, query, key, value in zip(tables.lengths, *inputs, strict=True):
            rows = query.shape[1]
            last_slot, valid = last_summary(lengths, rows, self.stride, self.summary)
            key, value = (summaries(x, last_slot).transpose(1, 2) for x in (key, value))
            mask, query = valid[:, None, None], query.flatten(1, 2).transpose(1, 2)
            if not self.split:
                mask = mask & other_rows(rows, self.stride, self.summary, mask.device)
            parts = self.softmax(query, key, value, mask, dropout)
            found.append([x.transpose(1, 2).unflatten(1, (rows, self.stride)) for x in parts])
        return tables.scatter_each(found)


def last_summary(lengths: Tensor, rows: int, columns: int, summary: int) -> tuple[Tensor, Tensor]:
    """The slots (S, c) of the last c tokens in the last row, and which of a table's R c summary tokens exist."""
    slot = (lengths - (rows - 1) * columns)[:, None] + torch.arange(-summary, 0, device=lengths.device)
    valid = torch.ones(len(lengths), (rows - 1) * summary, dtype=torch.bool, device=lengths.device)
    return slot.clamp(min=0), torch.cat([valid, slot >= 0], 1)


def summaries(x: Tensor, last_slot: Tensor) -> Tensor:
    """(S, R, C, H, K) -> (S, R c, H, K): the last c tokens of each row."""
    tables, _, columns = x.shape[:3]
    table = torch.arange(tables, device=x.device)[:, None]
    last = x[:, -1].flatten(0, 1).index_select(0, (table * columns + last_slot).flatten())
    return torch.cat([x[:, :-1, -last_slot.shape[1] :].flatten(1, 2), last.unflatten(0, last_slot.shape)], 1)


def other_rows(rows: int, columns: int, summary: int, device: torch.device) -> Tensor:
    """(R C, R c) bool: summaries of other rows than the query's; its own are in its block already."""
    row = torch.arange(rows, device=device)
    return row.repeat_interleave(columns)[:, None] != row.repeat_interleave(summary)
