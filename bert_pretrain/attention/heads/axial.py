"""`axial`: each sequence folded into a table of ceil(n / c) rows of c tokens; attention along rows, along columns.

    rows  R_i = {j : floor(j / c) = floor(i / c)}        columns  C_i = {j : j = i mod c}        i, j in one sequence
    row pass      r_i = sum_{j in R_i} softmax_j(q_i . k_j / sqrt(K)) v_j
    combine="composed":  context_i = sum_{j in C_i} softmax_j(q_i . k_j / sqrt(K)) r_j
    combine="mean":      context_i = (r_i + sum_{j in C_i} softmax_j(q_i . k_j / sqrt(K)) v_j) / 2

"composed": the column pass uses the same queries and keys, and the row pass's contexts as values. So a context is a
mean of the whole sequence's values: token j has the weight A_column(i, l) A_row(l, j), where l is the token in i's
column and j's row. Exception: a column that ends above the last, unfilled row does not see that row.
"mean": one layer sees a cross, two layers the whole sequence.

Cost: N (c + n / c) K; memory grows alike.
Source: Axial attention (Ho et al. 2019, arXiv 1912.12180, section 3.1), there on images and with separate projections
for the two passes, which a head cannot have: it gets one set of queries, keys and values. "mean" is half the sum of the
package axial-attention's two attentions with shared projections.

Isolation: each table is folded from one sequence, from its own start (on a GPU a table holds a pack, and a mask along
its columns keeps sequences apart: there a NaN passes, a huge number does not); c comes from the options or from the
model's max_sequence_length. With c >= n "composed" is full softmax attention: columns of one token.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bert_pretrain.attention.head import AttentionHead
from bert_pretrain.attention.options import HeadOptions, choice, whole
from bert_pretrain.attention.parts import fold
from bert_pretrain.attention.parts.windows import attend
from collate.layout import PackLayout


@dataclass(frozen=True)
class AxialOptions(HeadOptions):
    """What `use_attention(model, "axial", …)` takes."""

    columns: int | None = whole(None, 1, "None takes the rounded root of max_sequence_length")
    """c: rows get longer and columns shorter as it grows. None: the rounded root of max_sequence_length."""
    combine: str = choice("composed", ("composed", "mean"))
    """"composed" sees the whole sequence in one layer; "mean" a row and a column, with one softmax less in between."""


class AxialAttention(AttentionHead):
    """Softmax attention along the rows and the columns of a table; no parameters."""

    Options = AxialOptions
    supports_dropout = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.columns = self.options.columns or fold.default_stride(self.max_sequence_length)

    def is_one_graph(self, layout: PackLayout) -> bool:
        return False

    def prepare(self, layout: PackLayout) -> None:
        self.folded(layout) if layout.runs_on.type == "cpu" else fold.fold(layout, self.columns)

    def folded(self, layout: PackLayout) -> tuple[fold.Tables, list[Tensor], list[Tensor]]:
        """The tables, and masks along their rows and columns."""
        tables = fold.fold(layout, self.columns)
        rows = layout.derived(("axial rows", self.columns), lambda: fold.row_masks(tables))
        return tables, rows, layout.derived(("axial columns", self.columns), lambda: fold.column_masks(tables))

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        tables, *masks = self.folded(layout)
        contexts = []
        inputs = map(tables.gather, (q_THK, k_THK, v_THK))
        for along_row, along_column, query, key, value in zip(*masks, *inputs, strict=True):
            rows = query.shape[1]
            row = attend(fold.along_rows(query), fold.along_rows(key), fold.along_rows(value), along_row, dropout)
            row = fold.from_rows(row, rows)
            composed = self.options.combine == "composed"
            value = fold.along_columns(row if composed else value)
            column = attend(fold.along_columns(query), fold.along_columns(key), value, along_column, dropout)
            column = fold.from_columns(column, self.columns)
            contexts.append(column if composed else (row + column) / 2)
        return tables.scatter(contexts)
