"""What an optimizer step holds: sequences (by default) or packs, and the forward passes that it takes."""

import logging
import math
from dataclasses import replace

import numpy as np
from datasets import Dataset
from transformers import TrainingArguments

from bert_pretrain.train.config import PretrainConfig
from collate.training.dataloaders import packs_per_pass, said_packs_per_pass
from collate.training.order import StepPlan, pack_depths, pack_lengths, plan_steps
from collate.training.rounds import RoundPlan, plan_rounds
from packing import PackedInfo, packed_info
from packing.files.errors import Option, OptionError, whole_number

logger = logging.getLogger(__name__)

FEW_STEPS = 100
"""A run of fewer is a trial, or a beginner's with the defaults of large corpora."""


def set_batch(config: PretrainConfig, training: TrainingArguments, train: Dataset) -> int | None:
    """PackedTrainer's sequences_per_step: None if a step counts packs. It logs what a step holds.

    config.tokens_per_pass, where it is given, says the packs per pass: 16,384 tokens in packs of 512 -> at most 32.
    For batch_policy "sequences" packs per forward pass and accumulation steps follow; it writes them into `training`:
    256 sequences in up to 149 packs, on 2 devices, at most 32 packs per pass -> 75 per device, 3 passes of 25.
    The cut into passes changes rounding and what dropout draws, nothing else.
    """
    if training.auto_find_batch_size:
        raise OptionError(
            f"{Option('auto_find_batch_size')} would change the packs per step; set "
            f"{Option('per_device_train_batch_size')} instead"
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        whole_number(name, getattr(training, name))
    if config.tokens_per_pass is not None:
        slots = packed_info(train).max_sequence_length
        said = said_packs_per_pass(training)
        training.per_device_train_batch_size = packs_per_pass(config.tokens_per_pass, slots, said)
    factor, depths = packing_factor(train), pack_depths(train)
    if config.batch_policy == "packs":
        packs = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
        logger.info(
            "packing factor %.3f: %d packs a step (per_device_train_batch_size %d x gradient_accumulation_steps %d x "
            "%d devices) hold about %.1f sequences",
            *(factor, packs, training.per_device_train_batch_size, training.gradient_accumulation_steps),
            *(training.world_size, packs * factor),
        )
        return None
    if training.gradient_accumulation_steps != 1:
        raise OptionError(
            f"{Option('gradient_accumulation_steps', training.gradient_accumulation_steps)} follows from "
            f"{Option('sequences_per_step')}; leave it at 1 and set {Option('sequences_per_step')} and "
            f"{Option('tokens_per_pass')} (or {Option('per_device_train_batch_size')}), or "
            f"{Option('batch_policy', 'packs')}"
        )
    given = Option("sequences_per_step", config.sequences_per_step)
    if config.sequences_per_step > (sequences := int(depths.sum())):
        what = f"{given} is more than the {sequences:,} sequences of the training split"
        raise OptionError(f"{what}; set it to {sequences} or less")
    plan: StepPlan | RoundPlan
    if packed_info(train).cohort is None:
        plan = plan_steps(depths, config.sequences_per_step)
    else:
        plan = plan_rounds(train, config.sequences_per_step, training.world_size)
    if plan.most_packs < training.world_size:
        raise OptionError(
            f"{given} are {plan.most_packs} packs at the most, less than one for each of {training.world_size} "
            f"devices; set it to {math.ceil(factor * training.world_size)} or more"
        )
    passes, packs = split_step(plan.most_packs, training.world_size, training.per_device_train_batch_size)
    training.gradient_accumulation_steps, training.per_device_train_batch_size = passes, packs
    logger.info(
        "packing factor %.3f: %d sequences a step are %.1f packs on average, %d at most; "
        "devices x passes x packs in a pass: %d x %d x %d at most",
        *(factor, config.sequences_per_step, config.sequences_per_step / factor, plan.most_packs),
        *(training.world_size, passes, packs),
    )
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * plan.num_steps)
    few = "; a model learns little in so few: lower sequences_per_step, or raise num_train_epochs"
    logger.info("an epoch is %d steps, the run %d%s", plan.num_steps, steps, few if steps < FEW_STEPS else "")
    return config.sequences_per_step


def split_step(most_packs: int, devices: int, most_per_pass: int) -> tuple[int, int]:
    """Passes and packs per pass that make room for a step: as few passes as possible, equally large.

    149 packs on 2 devices, at most 32 in a pass -> 3 passes of 25
    """
    per_device = -(-most_packs // devices)
    passes = -(-per_device // most_per_pass)
    return passes, -(-per_device // passes)


def counted_info(split: Dataset) -> PackedInfo:
    """`packed_info`, with the counts of the packs that are there: all that pack_dataset made, or fewer.

    pack_dataset   37 packs of 76 sequences   ->   .select(range(20))   20 packs of 41; packed_info still says 37 of 76
    """
    info = packed_info(split)
    if info.num_packs == len(split):
        return info
    lengths, offsets = pack_lengths(split)
    return replace(
        info,
        num_sequences=len(lengths),
        num_packs=len(split),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        max_depth=int(np.diff(offsets).max()),
    )


def packing_factor(split: Dataset) -> float:
    """Mean sequences per pack, of the packs that are there."""
    info = counted_info(split)
    assert info.num_sequences is not None and info.num_packs is not None  # only a stream does not know
    return info.num_sequences / info.num_packs
