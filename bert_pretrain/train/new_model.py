"""Configuration + vocabulary -> the model to pretrain."""

import logging
from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import AutoConfig, BertConfig, PreTrainedConfig, TrainingArguments

from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.choice import choose_attention
from bert_pretrain.block import BlockOptions, use_block
from bert_pretrain.model import PackedBertForPreTraining
from bert_pretrain.places import find_pretrained
from bert_pretrain.train.checks import READ_PACKS
from bert_pretrain.train.config import AUTO, NEW_MODEL, SHAPE, PretrainConfig
from bert_pretrain.train.run_record import parameters_digest
from packing.files.errors import Option, OptionError

logger = logging.getLogger(__name__)


def longest_sequence(*splits: Dataset | None) -> int:
    """sequence_lengths [[3, 5], [8]], [[2, 6]] -> 8; positions start again in each sequence, so no pack needs more."""
    columns = [split.select_columns("sequence_lengths").with_format("arrow") for split in splits if split is not None]
    tables = (table for column in columns for table in column.iter(READ_PACKS))
    return max(pc.max(table["sequence_lengths"].combine_chunks().flatten()).as_py() for table in tables)


def resolve_shape(config: PretrainConfig, max_sequence_length: int) -> PretrainConfig:
    """The same configuration with the numbers of a new model in the place of None; a checkpoint has its own."""
    if config.model is not None:
        return config
    missing: dict[str, Any] = {name: value for name, value in NEW_MODEL.items() if getattr(config, name) is None}
    config = replace(config, **missing)
    assert config.hidden_size is not None
    return replace(
        config,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        max_position_embeddings=config.max_position_embeddings or max_sequence_length,
    )


def build_model(config: PretrainConfig, vocab_size: int, pad_token_id: int, longest: int) -> PackedBertForPreTraining:
    """A new model with the dataset's vocabulary, or the checkpoint to continue from; checked against the data.

    config: of `resolve_shape`. longest: `longest_sequence` of the data.
    Raises ValueError for a model that is too small for the data, or a checkpoint of something else.
    """
    if config.model is None:
        return _new_model(config, vocab_size, pad_token_id, longest)
    return _loaded_model(config, config.model, vocab_size, longest)


def _new_model(config: PretrainConfig, vocab_size: int, pad_token_id: int, longest: int) -> PackedBertForPreTraining:
    shape: dict[str, Any] = {name: getattr(config, name) for name in (*SHAPE, "hidden_dropout_prob")}
    if shape["max_position_embeddings"] < longest:
        raise OptionError(
            f"{Option('max_position_embeddings', config.max_position_embeddings)}, but the longest sequence of "
            f"{config.dataset} has {longest} tokens; give at least as many, or leave it out"
        )
    bert = BertConfig(
        vocab_size=vocab_size,
        attention_probs_dropout_prob=_attention_dropout(config, 0.1),
        pad_token_id=pad_token_id,
        **shape,
        **_own_options(config),
    )
    if block := _block(config, None).changed:
        bert.update({"block": block})
    model = PackedBertForPreTraining(bert)
    logger.info(
        "a new BERT of %.1f million parameters: %d layers of %d",
        *(model.num_parameters() / 1e6, bert.num_hidden_layers, bert.hidden_size),
    )
    return model


def _loaded_model(config: PretrainConfig, name: str, vocab_size: int, longest: int) -> PackedBertForPreTraining:
    place = find_pretrained("model", name)
    bert = _checkpoint_config(name, place)
    if not isinstance(bert, BertConfig):
        raise ValueError(f"{name} is a {bert.model_type} model; only BERT checkpoints can be continued from")
    bert.update(_own_options(config))
    if config.hidden_dropout_prob is not None:
        bert.hidden_dropout_prob = config.hidden_dropout_prob
    bert.attention_probs_dropout_prob = _attention_dropout(config, bert.attention_probs_dropout_prob)
    if bert.vocab_size < vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {bert.vocab_size}, the tokenizer one of {vocab_size}; "
            "prepare the dataset with the checkpoint's own tokenizer"
        )
    if bert.max_position_embeddings < longest:
        raise OptionError(
            f"{name} has {bert.max_position_embeddings} positions, but the longest sequence of {config.dataset} has "
            f"{longest} tokens; prepare it with a max_sequence_length the model can hold"
        )
    loaded: Any = PackedBertForPreTraining.from_pretrained(place, config=bert, output_loading_info=True)
    model, found = loaded
    # the seed draws what the checkpoint lacks
    model.loaded_parameters = parameters_digest(model, without=set(found["missing_keys"]))
    options = _block(config, getattr(bert, "block", None))
    if options.initial != BlockOptions.of(getattr(bert, "block", None)).initial:
        raise OptionError(
            f"{Option('block', config.block)} has initial, which draws the weights of a new model, and "
            f"{Option('model', name)} has its own; leave either out"
        )
    return use_block(model, **config.json_object("block"))


def _block(config: PretrainConfig, before: dict[str, Any] | None) -> BlockOptions:
    """What the user asks for; what is left out is as in the checkpoint's config."""
    try:
        return BlockOptions.of(before).with_changes(config.json_object("block"))
    except ValueError as error:
        raise OptionError(f"{Option('block', config.block)}: {error}") from None


def _own_options(config: PretrainConfig) -> dict[str, Any]:
    """What our model's config has beside stock BERT's."""
    options = config.json_object("attention_options")
    names = config.attention_names
    attention = names[0] if len(names) == 1 else names
    return {"mlm_loss": config.mlm_loss, "packed_attention": attention, "packed_attention_options": options}


def _checkpoint_config(name: str, place: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{Option('model', name)} holds no checkpoint of transformers ({str(error).splitlines()[0]}); give a "
            "folder with config.json and model.safetensors"
        ) from error


def resolve_attention(config: PretrainConfig, training: TrainingArguments) -> PretrainConfig:
    """The same configuration with the dropout that "auto" means; it logs the head that "auto" takes here, and why.

    With "auto" attention dropout is 0 by default, on any device: most fast kernels have none, and what a run learns
    must not depend on where it runs. "auto" itself stays: the model resolves it wherever it runs.
    """
    if AUTO not in config.attention_names:
        return config
    dropout = config.attention_probs_dropout_prob or 0.0
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    bert: Any = config
    if config.model is not None:
        bert = _checkpoint_config(config.model, find_pretrained("model", config.model))
    head_width = bert.hidden_size // bert.num_attention_heads
    chosen, reason = choose_attention(training.device, dtype, head_width, dropout)
    logger.info("attention: %s, chosen by %s: %s; attention_probs_dropout_prob %s", chosen, AUTO, reason, dropout)
    return replace(config, attention_probs_dropout_prob=dropout)


def _attention_dropout(config: PretrainConfig, default: float) -> float:
    """What the user asks for, or else the default, where all chosen heads can drop attention weights."""
    if config.attention_probs_dropout_prob is not None:
        return config.attention_probs_dropout_prob
    if all(getattr(ATTENTION.get(name), "supports_dropout", True) for name in config.attention_names):
        return default
    logger.info("attention_probs_dropout_prob is 0: %s cannot drop attention weights", config.attention)
    return 0.0
