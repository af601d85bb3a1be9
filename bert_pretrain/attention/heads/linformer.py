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

from bert_pretrain.attention.head import without_autocast
from bert_pretrain.attention.options import check_choice, check_integer
from bert_pretrain.attention.parts.whole_sequences import Real, WholeSequenceHead, zero_padding
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


INITIAL: dict[str, Callable[[Tensor], None]] = {"means": fill_with_means, "random": fill_at_random}


@dataclass(frozen=True)
class LinformerOptions:
    """What `use_attention(model, "linformer", …)` takes."""

    rank: int = 128
    """r: rows that a sequence's keys and values are projected to, at most max_sequence_length. More follow full
    attention closer and cost in proportion."""
    initial: str = "means"
    """The first projections. "means" starts near a trained full attention, as attention over means of neighbours;
    "random" as published."""

    def __post_init__(self) -> None:
        check_integer(self, "rank", 1, "give the number of rows that a sequence is projected to")
        check_choice(self, "initial", INITIAL)


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
            INITIAL[self.options.initial](projection_LR)

    def attend(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: PackLayout, dropout: float = 0.0) -> Tensor:
        self.refuse_longer(layout)  # the projections have a row for each of so many positions
        return super().attend(q_THK, k_THK, v_THK, layout, dropout)

    def mix(self, q_SHWK: Tensor, k_SHWK: Tensor, v_SHWK: Tensor, real_S11W: Real, dropout: float = 0.0) -> Tensor:
        key_SHRK = project(k_SHWK, real_S11W, self.key_projection_LR)
        value_SHRK = project(v_SHWK, real_S11W, self.value_projection_LR)
        return F.scaled_dot_product_attention(q_SHWK, key_SHRK, value_SHRK, dropout_p=dropout)


def project(x_SHWK: Tensor, real_S11W: Real, projection_LR: Tensor) -> Tensor:
    """(S, H, W, K) -> (S, H, R, K): the sum over each sequence's tokens, weighed by the row of their position."""
    sequences, heads, width, head_width = x_SHWK.shape
    missing = max(0, width - len(projection_LR))  # a width is rounded up, beyond the last row: these slots are padding
    tokens_SHWK = zero_padding(at_least_float32(x_SHWK), real_S11W)
    projection_RW = F.pad(projection_LR[:width], (0, 0, 0, missing)).T.to(tokens_SHWK.dtype)
    tokens_SWJ = tokens_SHWK.transpose(1, 2).flatten(2)  # J = H * K: heads share a projection
    # bmm, as matmul would fold the sequences into one product, whose rounding depends on their number
    with without_autocast(x_SHWK):
        rows_SRJ = torch.bmm(projection_RW.expand(sequences, -1, -1), tokens_SWJ)
    return rows_SRJ.unflatten(2, (heads, head_width)).transpose(1, 2).to(x_SHWK.dtype)
