"""What a run was configured with, saved beside its model in a form that can be given back.

OUTPUT/pretrain.json     every option of PretrainConfig, and the TrainingArguments that are not at their defaults:
                         bert-pretrain train OUTPUT/pretrain.json does the same again
OUTPUT/versions.json     {"torch": "2.13.0", …}
"""

import json
from dataclasses import MISSING, asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from bert_pretrain.train.config import CONFIG_FILE, PretrainConfig

VERSIONS_FILE = "versions.json"
PACKAGES = ("dataset-packing", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "numba")

OF_THIS_CALL = ("resume_from_checkpoint", "local_rank")
"""Not of the run: whether it was interrupted, and which of its processes this is."""

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


def config_record(config: PretrainConfig, training: TrainingArguments) -> dict[str, Any]:
    """Option -> value, as JSON. Call it before sequences_per_step has become packs per pass.

    Secrets are left out: no option that ends in _token.
    """
    record: dict[str, Any] = asdict(config)
    values = training.to_dict()
    for field in fields(TrainingArguments):
        name = field.name
        if name not in values or name in OF_THIS_CALL or name.endswith("_token"):
            continue
        value, default = values[name], None if field.default is MISSING else field.default
        # TrainingArguments makes something of what was not given: [], a filled-in dict, False
        is_made = value in (None, [], {}, default) or (name == "fsdp_config" and not training.fsdp)
        if is_made or (name in CHECKPOINTING and value is False):
            continue
        if name == "accelerator_config" and value.items() <= AcceleratorConfig().to_dict().items():
            continue
        record[name] = value
    return record


def versions() -> dict[str, str]:
    """{package: version} of what decides a run's outcome; those that are not installed are left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_record(folder: str | Path, record: dict[str, Any]) -> None:
    """pretrain.json and versions.json into a folder, which is made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in ((CONFIG_FILE, record), (VERSIONS_FILE, versions())):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
