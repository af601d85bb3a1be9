"""TrainingArguments that packs cannot honour: one list for PackedTrainer and for the callback of plain Trainer.

And those whose defaults leave a GPU waiting: they are only named.
"""

from typing import Any

import torch
from transformers import TrainingArguments

from collate.isolation.varlen import AMPERE

LOGITS = "it would see the logits of packs, not of sequences"
HALF = "evaluation adds up sums, for which the model stays as it is; set bf16 or fp16"
REFUSED_ARGUMENTS: tuple[tuple[str, tuple, str], ...] = (
    ("label_smoothing_factor", (0, None), "it would replace the loss by one that is not counted over the step"),
    ("neftune_noise_alpha", (None, 0), "its noise is scaled by the length of the whole pack"),
    ("use_liger_kernel", (False,), "it replaces the model's forward, which packs are isolated in"),
    ("bf16_full_eval", (False,), HALF),
    ("fp16_full_eval", (False,), HALF),
    ("include_for_metrics", ([], None), LOGITS),
    ("batch_eval_metrics", (False,), LOGITS),
    ("eval_do_concat_batches", (True,), "predictions of all batches are sorted together"),
    ("dataloader_in_order", (True,), "it takes batches as workers finish them, so that no two runs would be alike"),
    (
        "restore_callback_states_from_checkpoint",
        (False,),
        "it would replace the callback that counts what was seen, whose counts are restored in any case",
    ),
    (
        "train_sampling_strategy",
        ("random", "sequential"),
        "it is for rows of unequal length, and packs have one length: choose 'random' or 'sequential'",
    ),
)
"""An argument, the values that are harmless, and what any other would do."""


def refuse_arguments(args: TrainingArguments, who: str) -> None:
    """Raise ValueError for the first argument that packs cannot honour.

    who: whose arguments they are, for the message.
    """

    def refuse(what: str, reason: str) -> None:
        raise ValueError(f"{who} cannot honour {what}: {reason}; leave it out")

    for name, harmless, reason in REFUSED_ARGUMENTS:
        value = getattr(args, name, harmless[0])
        if value not in harmless:
            refuse(f"{name}={value!r}", reason)
    if args.world_size > 1 and not args.average_tokens_across_devices:
        refuse("average_tokens_across_devices=False", "a loss is divided by the counts of all ranks")
    for axis in ("cp", "sp", "tp"):
        if getattr(getattr(args, "parallelism_config", None), f"{axis}_size", 1) not in (1, None):
            reason = "it cuts up rows, or repeats them on several ranks, and packs are counted over ranks"
            refuse(f"{axis}_size in parallelism_config", reason)
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would run as nn.DataParallel, which cannot count a loss over "
            f"the step; start one process each: torchrun --nproc-per-node {args.n_gpu} …"
        )


def refuse_data_skip(args: TrainingArguments) -> None:
    """Raise ValueError for ignore_data_skip in a run that resumes."""
    if args.ignore_data_skip:
        raise ValueError(
            "ignore_data_skip=True would start the epoch again and see its sequences twice; leave it out: "
            "Trainer skips what was seen without loading it"
        )


def refuse_torn_batches(collator: Any, dataloader: Any) -> None:
    """Raise ValueError where accelerate deals out batches whose rows are not as many as it counts on."""
    if type(dataloader).__name__ != "DataLoaderDispatcher":
        return
    cure = "set accelerator_config={'dispatch_batches': False} and shard the dataset"
    if collator.emit == "flash":
        raise ValueError(
            f"emit='flash' gives one row per batch, which dispatch would cut into pieces; {cure}, or use "
            "emit='sequence_ids'"
        )
    if collator.unpacked_rows == "pack":
        raise ValueError(
            "unpacked_rows='pack' gives as many rows as a batch needs, and dispatch would drop those that do not share "
            f"out evenly; {cure}, or pack the dataset with pack_dataset"
        )


def wanted_on_gpu(args: TrainingArguments) -> str:
    """What a GPU user may want: "bf16=True, dataloader_num_workers=4, …"; "" where nothing is left, and on CPUs."""
    if args.device.type != "cuda":
        return ""
    workers = args.dataloader_num_workers
    wanted = {
        "bf16=True": args.mixed_precision == "no" and torch.cuda.get_device_capability(args.device) >= AMPERE,
        "dataloader_num_workers=4": workers == 0,
        "dataloader_persistent_workers=True": not args.dataloader_persistent_workers,
        "dataloader_pin_memory=True": not args.dataloader_pin_memory,
        "logging_nan_inf_filter=False": args.logging_nan_inf_filter,  # else each pass waits for its loss
        "a larger per_device_train_batch_size, or PackedTrainer(…, tokens_per_pass=32768)": (
            args.per_device_train_batch_size == type(args).per_device_train_batch_size
        ),
    }
    return ", ".join(name for name, is_wanted in wanted.items() if is_wanted)
