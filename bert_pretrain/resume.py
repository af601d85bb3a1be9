"""Which checkpoint a run goes on from."""

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from bert_pretrain.config import CONFIG_FILE, PretrainConfig

logger = logging.getLogger(__name__)


def find_checkpoint(config: PretrainConfig, training: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the one asked for, or the last in output_dir; it must be of such a run."""
    checkpoint = training.resume_from_checkpoint
    if checkpoint is None and os.path.isdir(training.output_dir):
        checkpoint = get_last_checkpoint(training.output_dir)
    if checkpoint is None:
        return None
    if not os.path.isdir(checkpoint):
        raise ValueError(f"resume_from_checkpoint={checkpoint!r} is no folder; name a checkpoint-N folder")
    saved_file = Path(checkpoint).parent / CONFIG_FILE
    saved = json.loads(saved_file.read_text(encoding="utf-8")) if saved_file.exists() else {}
    for name, value in asdict(config).items():
        if name in saved and saved[name] != value:
            raise ValueError(
                f"{checkpoint} was trained with {name}={saved[name]!r}, now it is {value!r}; give the old value to "
                "resume, or another output_dir to begin anew"
            )
    logger.info("resuming from %s", checkpoint)
    return checkpoint
