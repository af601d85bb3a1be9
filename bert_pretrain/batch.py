"""Sequences per optimizer step -> packs per forward pass and gradient accumulation."""

import logging
import math

from datasets import Dataset
from transformers import TrainingArguments

from bert_pretrain.config import PretrainConfig
from packing import packed_info

logger = logging.getLogger(__name__)


def set_batch(config: PretrainConfig, training: TrainingArguments, train: Dataset) -> None:
    """Sequences per step -> packs per forward pass and accumulation steps, written into `training`.

    256 sequences per step, packing factor 2.0, 2 devices, at most 40 packs per pass
    -> 128 packs per step, 64 per device, 2 passes of 32.
    """
    if training.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps={training.gradient_accumulation_steps} follows from sequences_per_step; "
            "leave it at 1 and set sequences_per_step and per_device_train_batch_size"
        )
    if training.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size would change the packs per step; set per_device_train_batch_size instead"
        )
    info = packed_info(train)
    factor = info.num_sequences / info.num_packs
    wanted = config.sequences_per_step / factor / training.world_size  # packs per step and device
    if wanted < 0.75:
        raise ValueError(
            f"sequences_per_step={config.sequences_per_step} is less than a pack of {factor:.2f} sequences on each of "
            f"{training.world_size} devices; set it to {math.ceil(factor * training.world_size)} or more"
        )
    passes, packs = _split_step(wanted, training.per_device_train_batch_size)
    training.gradient_accumulation_steps, training.per_device_train_batch_size = passes, packs
    logger.info(
        "packing factor %.3f: %d packs per pass, %d passes, %d devices hold about %.1f sequences a step; asked for %d",
        *(factor, packs, passes, training.world_size, packs * passes * training.world_size * factor),
        config.sequences_per_step,
    )


def _split_step(wanted: float, most: int) -> tuple[int, int]:
    """Passes and packs per pass, `most` at the most: the fewest passes within 3 % of `wanted`, or else the nearest.

    13.6 packs wanted, at most 32 per pass -> 1 pass of 14;  108.8 -> 4 passes of 27;  2.9, at most 2 -> 3 passes of 1
    """
    passes = range(max(1, math.floor(wanted / most)), math.ceil(wanted) + 1)
    choices = [(n, min(most, max(1, round(wanted / n)))) for n in passes]
    return min(choices, key=lambda choice: (max(0.03, abs(choice[0] * choice[1] / wanted - 1)), choice[0]))
