"""What `bert-pretrain train` chooses on a GPU where the user says nothing: precision, the size of a pass, workers.

    bf16                compute capability 8.0 or higher, and --fp16 is not given
    TF32                the same, for products that stay in float32: flags of torch, for the whole process
    tokens_per_pass     from the config and the card's memory, see `default_tokens_per_pass`
    workers             make batches aside, stay between epochs, and prefetch; memory is pinned

A run that resumes keeps the precision and the passes that its record has, on whatever device. On CPUs nothing changes.
From Python, `pretrain` leaves TrainingArguments as they are: nobody can tell a default from what was meant.
"""

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import BertForPreTraining, TrainingArguments
from transformers.utils.import_utils import enable_tf32

from bert_pretrain.block import BlockOptions
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.metrics import attends_fully
from bert_pretrain.train.run_record import CHOSEN
from collate.training.dataloaders import packs_per_pass

logger = logging.getLogger(__name__)

AMPERE = (8, 0)
MOST_TOKENS = 65_536
"""A GPU gains little from larger passes, and the packs of a step are dealt to fewer of them."""
SHARE, SHARE_OF_OTHERS = 0.6, 0.3
"""Of the card's memory, for the model and a pass. The rest: fragments, buffers of products, and what attention heads
other than full attention keep, which the formula does not know."""
MOST_WORKERS, PREFETCHED = 4, 4
"""One worker makes 2 million tokens a second (benchmarks/collator.py); the others are for slow disks."""

Record = Mapping[str, Mapping[str, Any]]


def choose_precision(training: TrainingArguments, said: Collection[str], record: Record | None) -> bool:
    """Set bf16 in `training`, and the flags for TF32. Returns whether products in float32 may be TF32.

    said: the options that the user named. record: `run_record` of the run that resumes.
    """
    is_new = record is None and training.device.type == "cuda" and _capability(training) >= AMPERE
    before: Record = record or {}
    is_open = "bf16" not in said and training.mixed_precision == "no" and training.deepspeed_plugin is None
    if is_open and (is_new or before.get("training", {}).get("bf16", False)):
        training.bf16, training.mixed_precision = True, "bf16"
        why = "the GPU has it" if is_new else "as this run began"
        logger.info("bf16: on, %s; --bf16 False turns it off for a new run", why)
    if training.tf32 is not None:
        return training.tf32
    is_tf32 = is_new or bool(before.get(CHOSEN, {}).get("tf32", False))
    if is_tf32 and training.device.type == "cuda":
        enable_tf32(True)
        logger.info("tf32: on, for products that stay in float32; --tf32 False turns it off for a new run")
    return is_tf32


def choose_passes(
    config: PretrainConfig,
    training: TrainingArguments,
    said: Collection[str],
    record: Record | None,
    model: BertForPreTraining,
    slots_per_pack: int,
) -> PretrainConfig:
    """The configuration with tokens_per_pass, where the user sized passes in no way.

    With batch_policy "packs" a step holds what its passes hold, so no machine may choose their size.
    """
    if "per_device_train_batch_size" in said:
        if config.tokens_per_pass is not None:
            packs_per_pass(config.tokens_per_pass, slots_per_pack, training.per_device_train_batch_size)
        return config
    if config.tokens_per_pass is not None or config.batch_policy == "packs":
        return config
    if record is not None:
        tokens = record.get(CHOSEN, {}).get("tokens_per_pass")
        if tokens is not None:
            logger.info("tokens_per_pass: %s, as this run began", f"{tokens:,}")
        return replace(config, tokens_per_pass=tokens)
    if training.device.type != "cuda":
        return config
    return replace(config, tokens_per_pass=_from_memory(config, training, model, slots_per_pack))


def choose_loading(config: PretrainConfig, training: TrainingArguments, said: Collection[str], slots: int) -> None:
    """Workers that stay and prefetch, for a GPU that must not wait for batches; passes of evaluation like those of
    training. They change no number, so a record lacks them, and another machine chooses anew. slots: of a pack.
    """
    if training.device.type != "cuda":
        return
    if config.tokens_per_pass is not None and "per_device_eval_batch_size" not in said:
        training.per_device_eval_batch_size = packs_per_pass(config.tokens_per_pass, slots)
    if "dataloader_num_workers" not in said:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        training.dataloader_num_workers = min(MOST_WORKERS, max(0, cores // ranks_here - 1))
    if training.dataloader_num_workers == 0:
        return
    if "dataloader_persistent_workers" not in said:
        training.dataloader_persistent_workers = True
    if "dataloader_prefetch_factor" not in said:
        training.dataloader_prefetch_factor = PREFETCHED
    logger.info(
        "dataloader: %d workers that stay, each %s batches ahead; --dataloader-num-workers says otherwise",
        *(training.dataloader_num_workers, training.dataloader_prefetch_factor),
    )


def default_tokens_per_pass(
    model: BertForPreTraining,
    memory: int,
    slots_per_pack: int,
    mlm_probability: float = 0.15,
    is_half: bool = True,
    is_checkpointed: bool = False,
) -> int:
    """Token slots of as many whole packs as a pass should have; at least one, at most MOST_TOKENS.

        (SHARE · memory - 18 · parameters) / bytes of a token

    18: weights, gradients and both averages of Adam in float32, and the weights in 16 bits. memory: bytes of the card.
    """
    share = SHARE if attends_fully(model) else SHARE_OF_OTHERS
    left = share * memory - 18 * model.num_parameters()
    fitting = int(left / bytes_per_token(model, mlm_probability, is_half, is_checkpointed))
    return slots_per_pack * max(1, min(fitting, MOST_TOKENS) // slots_per_pack)


def bytes_per_token(model: BertForPreTraining, mlm_probability: float, is_half: bool, is_checkpointed: bool) -> float:
    """What a token slot costs at the height of a pass: between forward and backward, of full attention.

    D width, F feed-forward width, V vocabulary. A layer keeps 28 D + 4 F bytes (in float32 40 D + 8 F): its residual
    sums and their norms in float32; queries, keys, values, context and the products in the narrower type; two masks of
    dropout. One layer more is for backward, which works on one. Embeddings keep 11 D. The loss has logits in 16
    and 32 bits, their probabilities and two gradients: 16 V for each predicted token.

    Checkpointing keeps the sum that enters a layer, 4 D, or two of them, and makes the rest of one layer again. A
    reversible stream keeps two sums and their gradients, whatever the depth. Chunks keep what enters the feed-forward.
    """
    bert: Any = model.config
    block = BlockOptions.of(getattr(bert, "block", None))
    width = bert.hidden_size
    wide = bert.intermediate_size if block.chunk_size is None else 0
    wide *= (block.top_k if block.feed_forward == "moe" else 1) * (2 if block.gated else 1)
    of_layer = 28 * width + 4 * wide if is_half else 40 * width + 8 * wide
    sums = 4 * width * (2 if block.placement == "residual" else 1)
    of_layers = (bert.num_hidden_layers + 1) * of_layer
    if block.stream == "reversible":
        of_layers = 16 * width + 2 * of_layer
    elif is_checkpointed or block.stream == "checkpoint":
        of_layers = bert.num_hidden_layers * sums + 2 * of_layer
    return of_layers + 11 * width + 16 * mlm_probability * bert.vocab_size


def _from_memory(
    config: PretrainConfig, training: TrainingArguments, model: BertForPreTraining, slots_per_pack: int
) -> int:
    """Of the smallest card of all ranks; logged."""
    card = torch.cuda.get_device_properties(training.device)
    memory = min(_of_all_ranks(training, card.total_memory))
    is_half = training.mixed_precision in ("bf16", "fp16")
    is_checkpointed = bool(training.gradient_checkpointing or getattr(training, "activation_checkpointing", False))
    what = config.mlm_probability, is_half, is_checkpointed
    tokens = default_tokens_per_pass(model, memory, slots_per_pack, *what)
    logger.info(
        "tokens_per_pass: %s, %d packs of %d slots: about %.1f GiB of activations on %s with %.1f GiB; "
        "--tokens-per-pass or --per-device-train-batch-size says otherwise",
        *(f"{tokens:,}", tokens // slots_per_pack, slots_per_pack, tokens * bytes_per_token(model, *what) / 2**30),
        *(card.name, memory / 2**30),
    )
    return tokens


def _capability(training: TrainingArguments) -> tuple[int, int]:
    """Of the oldest card of all ranks."""
    return min(_of_all_ranks(training, torch.cuda.get_device_capability(training.device)))


def _of_all_ranks(training: TrainingArguments, value: Any) -> list[Any]:
    return [value] if training.world_size == 1 else gather_object([value])
