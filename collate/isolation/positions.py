"""Which position_ids an encoder wants: where they start, by its type, and how they restart in each sequence."""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from collate.layout import PADDING, is_start

STARTS_AFTER_PADDING_IDX = (
    *("camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""RoBERTa and its relatives: their first position is padding_idx + 1, and they run on others without an error."""


def position_ids_start(config: PretrainedConfig) -> int:
    """The position of a sequence's first token: 0, or padding_idx + 1 for RoBERTa and its relatives."""
    return config.pad_token_id + 1 if config.model_type in STARTS_AFTER_PADDING_IDX else 0


def own_positions(sequence_ids_BL: Tensor) -> Tensor:
    """(B, L) int64 from 0 in each sequence, 0 on padding; shapes are static, so it compiles.

    [[1, 1, 1, 2, 2, 0]] -> [[0, 1, 2, 0, 1, 0]]
    """
    slots = torch.arange(sequence_ids_BL.shape[1], device=sequence_ids_BL.device).expand(sequence_ids_BL.shape)
    first = torch.where(is_start(sequence_ids_BL), slots, 0).cummax(dim=1).values
    return torch.where(sequence_ids_BL == PADDING, 0, slots - first)
