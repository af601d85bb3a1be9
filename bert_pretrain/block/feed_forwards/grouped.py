"""All experts' products at once, on a GPU: their tokens lie expert by expert, and only the GPU knows how many each has.

torch's grouped product takes where each expert's rows end, as a tensor on the device, so the host waits for nothing.
Its kernels are for bfloat16 and rows of whole 16 bytes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_pretrain.attention.head import without_autocast

ALIGNED = 8
"""Numbers in bfloat16 that make 16 bytes."""


def is_grouped(hidden_TD: Tensor, experts: Any) -> bool:
    """Whether the grouped product takes these tokens, in autocast's type where that is on."""
    is_aligned = not any(width % ALIGNED for width in experts[0].dense.weight.shape)
    return hidden_TD.device.type == "cuda" and is_aligned and _computed_in(hidden_TD) == torch.bfloat16


def _computed_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def grouped_outputs(experts: Any, hidden_TD: Tensor, token_P: Tensor, counts_E: Tensor) -> Tensor:
    """(P, D): the outputs of all experts for their rows, the first expert's first.

    token_P: (P,) which token each row is; counts_E: (E,) how many rows each expert has.
    """
    with without_autocast(hidden_TD):
        ends_E = counts_E.cumsum(0).int()
        first: Any = experts[0].intermediate
        rows_PD = _with_ones(hidden_TD.to(_computed_in(hidden_TD))).index_select(0, token_P)
        inner_PF = first.intermediate_act_fn(_product(rows_PD, [e.intermediate.dense for e in experts], ends_E))
        if hasattr(first, "up"):
            inner_PF = inner_PF * _product(rows_PD, [e.intermediate.up for e in experts], ends_E)
        return _product(_with_ones(inner_PF), [e.dense for e in experts], ends_E)


def _with_ones(x_PD: Tensor) -> Tensor:
    """(P, D) -> (P, D + 8): a column of ones, which meets the bias, and zeros up to whole 16 bytes."""
    more = x_PD.new_zeros(len(x_PD), ALIGNED)
    more[:, 0] = 1
    return torch.cat([x_PD, more], 1)


def _product(rows: Tensor, linears: Sequence[nn.Linear], ends_E: Tensor) -> Tensor:
    """Rows with a column of ones, each times the weights of its expert, plus their bias."""
    weight = torch.stack([linear.weight for linear in linears])
    bias = F.pad(torch.stack([linear.bias for linear in linears])[..., None], (0, ALIGNED - 1))
    return F.grouped_mm(rows, torch.cat([weight, bias], -1).to(rows.dtype).transpose(1, 2), offs=ends_E)
