"""What the inputs of a run hold, as numbers and words that a resumed run compares: packs, tokenizer, parameters.

A folder's name says nothing: its files may be replaced, or moved. So every value is read once, at the speed of memory.
"""

import json
from typing import Any

import torch
import xxhash
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from packing import packed_info
from packing.source.fingerprint import column_prints

PACKING_FACTS = ("max_sequence_length", "max_sequences_per_pack", "max_depth", "token_columns", "balance")
"""What a packed dataset knows of its making and training goes by; the packs themselves say the rest."""
TOKENIZER_FACTS = ("special_tokens_map", "all_special_ids", "model_max_length", "padding_side", "truncation_side")
OF_A_CALL = ("truncation", "padding")
"""What a tokenizer notes of its last call."""
PLACES_OF_A_MODEL = ("_name_or_path", "architectures", "transformers_version")


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


def model_contents(model: nn.Module) -> dict[str, Any]:
    """The model's config, but for where it came from and what `PretrainConfig` says already; and its weights then."""
    said = ("packed_attention", "packed_attention_options", "mlm_loss")
    config = model.config.to_dict()
    contents = {name: value for name, value in config.items() if name not in (*PLACES_OF_A_MODEL, *said)}
    return contents | {"parameters": getattr(model, "loaded_parameters", None)}


def parameters_digest(model: nn.Module, without: set[str]) -> str:
    """One number for the parameters and buffers of a model, but for some."""
    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        if name not in without:
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _short(value: Any) -> Any:
    """What is too long to be read is digested."""
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= 100 else xxhash.xxh3_128_hexdigest(text.encode())
