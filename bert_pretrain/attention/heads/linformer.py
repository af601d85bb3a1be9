"""`linformer`: keys and values projected along the sequence, from n tokens to r rows.

    K' = E_n^T K,   V' = F_n^T V            E, F: (max_sequence_length, r) parameters; E_n: the first n rows of E
    context_i = sum_j softmax_j(q_i . k'_j / sqrt(K)) v'_j,    j over the r rows

Cost: N r K over the batch's N tokens; memory N r at most. Source: Wang et al., Linformer (2006.04768), section 4, with
the projections shared between the heads ("headwise sharing").

Isolation: a row of E belongs to a token's position in its own sequence, and each sequence is summed by itself.

It suits long sequences: in one much shorter than max_sequence_length many of the r rows hold little.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretrain.attention.head import longer_than, without_autocast
from bert_pretrain.attention.options import HeadOptions, choice, whole
from bert_pretrain.attention.parts.pieces import SequencePieces
from bert_pretrain.attention.parts.whole_sequences import WholeSequenceHead
from collate.layout import PackLayout
from collate.views import at_least_float32


@torch.no_grad()
def fill_with_means(projection_LR: Tensor) -> None:
    """Each of the r rows is the mean of max_sequence_length / r neighbouring tokens.

    4 positions, r = 2:   1/2 1/2  0   0
                           0   0  1/2 1/2    (transposed)
    """
    length, rank = projection_LR.shape
    row_of_position = torch.arange(length, device=projection_LR.device) * rank // length
    one_hot_LR = F.one_hot(row_of_position, rank).to(projection_LR.dtype)
    projection_LR.copy_(one_hot_LR / one_hot_LR.sum(0).clamp_min(1))


def fill_at_random(projection_LR: Tensor) -> None:
    """Uniform in +-1/sqrt(r), a random projection as in the paper's proof."""
    bound = projection_LR.shape[1] ** -0.5
    nn.init.uniform_(projection_LR, -bound, bound)


FIRST_VALUES: dict[str, Callable[[Tensor], None]] = {"means": fill_with_means, "random": fill_at_random}


@dataclass(frozen=True)
class LinformerOptions(HeadOptions):
    """What `use_attention(model, "linformer", …)` takes."""

    rank: int = whole(128, 1, "give the number of rows that a sequence is projected to")
    """r: rows that a sequence's keys and values are projected to, at most max_sequence_length. More follow full
    attention closer and cost in proportion."""
    initial: str = choice("means", FIRST_VALUES)
    """The first projections. "means" starts near a trained full attention, as attention over means of neighbours;
    "random" as published."""


class LinformerAttention(WholeSequenceHead):
    """Attention over r learned mixtures; `key_projection_LR` and `value_projection_LR` are E and F."""

    Options = LinformerOptions
    supports_dropout = True

    def __init__(self, num_heads: int, head_width: int, max_sequence_length: int, layer_index: int = 0, **options: Any):
        super().__init__(num_heads, head_width, max_sequence_length, layer_index, **options)
        rank = min(self.options.rank, max_sequence_length)
        self.key_projection_LR = nn.Parameter(torch.empty(max_sequence_length, rank))
        self.value_projection_LR = nn.Parameter(torch.empty(max_sequence_length, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for projection_LR in (self.key_projection_LR, self.value_projection_LR):
            FIRST_VALUES[self.options.initial](projection_LR)

    def prepare(self, layout: PackLayout) -> None:
        super().prepare(layout)
        longer_than(layout, self.max_sequence_length)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        self.refuse_longer(layout)  # the projections have a row for each of so many positions
        return super().attend(q_THK, k_THK, v_THK, layout, dropout)

    def mix(
        self, q_PHWK: Tensor, k_PHWK: Tensor, v_PHWK: Tensor, pieces: SequencePieces, dropout: float = 0.0
    ) -> Tensor:
        key_PHRK = project(k_PHWK, pieces, self.key_projection_LR)
        value_PHRK = project(v_PHWK, pieces, self.value_projection_LR)
        return F.scaled_dot_product_attention(q_PHWK, key_PHRK, value_PHRK, dropout_p=dropout)


def project(x_PHWK: Tensor, pieces: SequencePieces, projection_LR: Tensor) -> Tensor:
    """(P, H, W, K) -> (P, H, R, K): the sum over each sequence's tokens, weighed by the row of their position."""
    _, heads, _, head_width = x_PHWK.shape
    tokens_PHWK = pieces.hide_padding(at_least_float32(x_PHWK))
    tokens_PWJ = tokens_PHWK.transpose(1, 2).flatten(2)  # J = H * K: heads share a projection
    rows_PRW = rows_of_slots(projection_LR.to(tokens_PHWK.dtype), pieces).transpose(1, 2)
    # bmm, as matmul would fold the sequences into one product, whose rounding depends on their number
    with without_autocast(x_PHWK):
        rows_PRJ = pieces.total(torch.bmm(rows_PRW, tokens_PWJ))
    return rows_PRJ.unflatten(2, (heads, head_width)).transpose(1, 2).to(x_PHWK.dtype)


def rows_of_slots(projection_LR: Tensor, pieces: SequencePieces) -> Tensor:
    """(P, W, R): the row of each slot's position. What lies beyond the last row is padding; it gets any."""
    number, width = pieces.shape
    length = len(projection_LR)
    if pieces.runs is None:
        return F.pad(projection_LR[:width], (0, 0, 0, max(0, width - length))).expand(number, -1, -1)
    blocks_BJ = F.pad(projection_LR, (0, 0, 0, -length % width)).view(-1, width * projection_LR.shape[1])
    # an embedding, as its gradient does not depend on the order of additions
    return F.embedding(pieces.runs.number.clamp(max=len(blocks_BJ) - 1), blocks_BJ).view(number, width, -1)
