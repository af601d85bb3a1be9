"""What a run is, as JSON, in two records.

OUTPUT/pretrain.json     every option of PretrainConfig, and the TrainingArguments that are not at their defaults:
                         bert-pretrain train OUTPUT/pretrain.json does the same again
OUTPUT/versions.json     {"torch": "2.13.0", …}
OUTPUT/run.json          what decides the outcome: options, and what the inputs hold; a resumed run must have the same

A folder's name says nothing about an input: its files may be replaced, or moved. So `run_record` reads every value
once, at the speed of memory.
"""

import json
from contextlib import suppress
from dataclasses import MISSING, asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from bert_pretrain.train.config import CONFIG_FILE, PretrainConfig
from collate.training.checkpoints import write_json
from packing import packed_info
from packing.source.fingerprint import column_prints

VERSIONS_FILE = "versions.json"
PACKAGES = ("dataset-packing", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "numba")

OF_THIS_CALL = ("resume_from_checkpoint", "local_rank")
"""Options that say nothing about the run: whether it was interrupted, and which of its processes this is."""

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")

MAY_CHANGE = {
    # how long, where, and what is written down
    *("max_steps", "num_train_epochs", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "run_name"),
    *("report_to", "disable_tqdm", "include_num_input_tokens_seen", "project", "prediction_loss_only", "debug"),
    *("per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("do_train", "do_eval", "do_predict", "skip_memory_metrics", "include_for_metrics", "batch_eval_metrics"),
    *("push_to_hub", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "label_names"),
    # on what machine: the same numbers but for rounding, and for dropout where the cut into passes differs;
    # packs_per_step says what a step holds
    *("per_device_train_batch_size", "gradient_accumulation_steps", "use_cpu", "local_rank", "deepspeed"),
    *("parallelism_config", "accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "auto_find_batch_size"),
    *("full_determinism", "use_liger_kernel", "liger_kernel_config", "use_cache", "remove_unused_columns"),
    *("length_column_name", "ignore_data_skip", "average_tokens_across_devices"),
}
"""TrainingArguments that may change when a run resumes; all others must stay."""
MAY_CHANGE_PREFIXES = (
    *("logging_", "log_", "eval_", "save_", "hub_", "trackio_", "ddp_", "fsdp", "torch_compile", "dataloader_"),
)
MUST_STAY = {"dataloader_drop_last"}
NOT_TRAINING = {"eval_mlm_probability", "peak_tflops", "tokens_per_pass"}
PLACES = {"dataset", "tokenizer", "model"}
"""Folders may be moved: their contents are compared."""
CHOSEN = "chosen"
"""The part of run.json that is compared with nothing: a run that resumes takes these values where it is told none."""
OF_THE_BEST = (
    *("metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps", "eval_delay"),
    *("save_strategy", "save_steps", "load_best_model_at_end"),
)
"""What decides which checkpoint is the best. It must stay if the run loads the best one at the end."""

PACKING_FACTS = ("max_sequence_length", "max_sequences_per_pack", "max_depth", "token_columns", "balance")
"""What training depends on of the making of a packed dataset; the packs say the rest."""
TOKENIZER_FACTS = ("special_tokens_map", "all_special_ids", "model_max_length", "padding_side", "truncation_side")
OF_A_CALL = ("truncation", "padding")
"""What a tokenizer keeps of its last call."""
PLACES_OF_A_MODEL = ("_name_or_path", "architectures", "transformers_version")


def config_record(config: PretrainConfig, training: TrainingArguments) -> dict[str, Any]:
    """Option -> value, as JSON. Call it before sequences_per_step has become packs per pass.

    Secrets are left out: no option that ends in _token. bf16 is there in any case: a GPU would choose it.
    """
    record: dict[str, Any] = asdict(config)
    values = training.to_dict()
    for field in fields(TrainingArguments):
        name = field.name
        if name not in values or name in OF_THIS_CALL or name.endswith("_token"):
            continue
        value, default = values[name], None if field.default is MISSING else field.default
        # TrainingArguments fills in what nobody gave: [], a dict, False
        is_made = value in (None, [], {}, default) or (name == "fsdp_config" and not training.fsdp)
        if is_made or (name in CHECKPOINTING and value is False):
            continue
        if name == "accelerator_config" and value.items() <= AcceleratorConfig().to_dict().items():
            continue
        record[name] = value
    return record if training.fp16 else record | {"bf16": training.bf16}


def versions() -> dict[str, str]:
    """{package: version} of what decides a run's outcome, as far as it is installed."""
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_config_record(folder: str | Path, record: dict[str, Any]) -> None:
    """Write pretrain.json and versions.json into a folder, and make it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, record)
    write_json(folder / VERSIONS_FILE, versions())


def run_record(
    config: PretrainConfig,
    training: TrainingArguments,
    train: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    test: Dataset | None = None,
    model: PreTrainedModel | None = None,
    is_tf32: bool = False,
) -> dict[str, dict]:
    """What decides the outcome of a run, as JSON; kept in each of its checkpoints, and beside its model at the end.

    Call it when sequences_per_step has become packs per step. It reads all of the data, so one rank does.
    """
    packs = split_batches = None  # sequences_per_step fixes a step's packs for any number of devices
    if config.batch_policy == "packs":
        packs = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
        split_batches = getattr(training.accelerator_config, "split_batches", None)
    arguments = training.to_dict()
    record = {
        "config": {name: value for name, value in asdict(config).items() if name not in PLACES | NOT_TRAINING},
        "training": {
            name: value
            for name, value in arguments.items()
            if name in MUST_STAY or not (name in MAY_CHANGE or name.startswith(MAY_CHANGE_PREFIXES))
        },
        "steps": {
            "packs_per_step": packs,
            "split_batches": split_batches,
            "mixed_precision": training.mixed_precision,  # accelerate launch may set it, too
        },
        "dataset": dataset_contents(train=train, test=test),
        "tokenizer": tokenizer_contents(tokenizer),
        "model": {} if model is None else model_contents(model),
        "best": {name: arguments[name] for name in OF_THE_BEST} | {"eval_mlm_probability": config.eval_mlm_probability},
        "versions": versions(),
        CHOSEN: {"tokens_per_pass": config.tokens_per_pass, "tf32": is_tf32},
    }
    return json.loads(json.dumps(record, default=str))


def dataset_contents(**splits: Dataset | None) -> dict[str, Any]:
    """{"train input_ids": digest of the column, "train max_depth": 8, …}; the same in Arrow, in Parquet or at a URL."""
    contents: dict[str, Any] = {}
    for split, dataset in splits.items():
        if dataset is not None:
            info = packed_info(dataset)
            contents |= {f"{split} {column.name}": column.xxh3 for column in column_prints(dataset)}
            contents |= {f"{split} {name}": getattr(info, name) for name in PACKING_FACTS}
    return contents


def tokenizer_contents(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """{"mask_token": "[MASK]", "model": digest of the vocabulary, "normalizer": {…}, …}: all of tokenizer.json."""
    sections = json.loads(tokenizer.backend_tokenizer.to_str())
    contents = {name: _short(value) for name, value in sections.items() if name not in OF_A_CALL}
    facts = {name: getattr(tokenizer, name) for name in TOKENIZER_FACTS}
    return contents | facts.pop("special_tokens_map") | facts


def model_contents(model: PreTrainedModel) -> dict[str, Any]:
    """The model's config, but for where it came from and what `PretrainConfig` says already; and its first weights."""
    said = ("packed_attention", "packed_attention_options", "mlm_loss")
    config = model.config.to_dict()
    contents = {name: value for name, value in config.items() if name not in (*PLACES_OF_A_MODEL, *said)}
    return contents | {"parameters": getattr(model, "loaded_parameters", None)}


def parameters_digest(model: nn.Module, without: set[str]) -> str:
    """One digest of the parameters and buffers of a model, without some."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        if name not in without:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _short(value: Any) -> Any:
    """The value, or its digest where it is too long to read."""
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= 100 else xxhash.xxh3_128_hexdigest(text.encode())
