"""Which position_ids an encoder wants, by its type, and which other arguments contradict sequence_ids."""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from collate.layout import PADDING, is_start

STARTS_AFTER_PADDING_IDX = (
    *("camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""RoBERTa and its relatives: their first position is padding_idx + 1, and they run on others without an error."""

INSTEAD_OF_SEQUENCE_IDS = ("attention_mask", "past_key_values", "encoder_hidden_states")
"""Arguments that would contradict sequence_ids."""


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


def refuse_contradictions(encoder_name: str, arguments: dict) -> None:
    """Raise ValueError for an argument that says something else than sequence_ids."""
    for other in INSTEAD_OF_SEQUENCE_IDS:
        if arguments.get(other) is not None:
            raise ValueError(
                f"{encoder_name} got sequence_ids and {other}; give sequence_ids alone, with 0 on padding: they say "
                "what a mask says, and which tokens belong together"
            )
    if arguments.get("is_causal"):
        raise ValueError(
            f"{encoder_name} got sequence_ids and is_causal=True; leave is_causal out: tokens of a sequence see both "
            "directions"
        )


def refuse_early_positions(sequence_ids_BL: Tensor, position_ids_BL: Tensor | None, start: int) -> None:
    """Raise ValueError for positions below the model's first one. Waits for the device."""
    if position_ids_BL is None or not start:
        return
    first = int(torch.where(sequence_ids_BL == PADDING, start, position_ids_BL).min())
    if first < start:
        raise ValueError(
            f"position_ids begin at {first}, but the first position of this model is {start}; build the collator "
            f"with position_ids_start={start}, or leave position_ids out"
        )
