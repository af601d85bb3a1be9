"""Configuration + vocabulary -> the model to pretrain."""

import json
import logging
from dataclasses import replace

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import AutoConfig, BertConfig, PreTrainedConfig, TrainingArguments

from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.choice import choose_attention
from bert_pretrain.model import PackedBertForPreTraining
from bert_pretrain.places import find_pretrained
from bert_pretrain.train.config import AUTO, NEW_MODEL, PretrainConfig
from bert_pretrain.train.run_record import parameters_digest

logger = logging.getLogger(__name__)

READ_PACKS = 10_000  # at a time


def longest_sequence(*splits: Dataset | None) -> int:
    """sequence_lengths [[3, 5], [8]], [[2, 6]] -> 8; positions begin anew in each sequence, so no pack needs more."""
    longest = 0
    for split in splits:
        if split is not None:
            for table in split.select_columns("sequence_lengths").with_format("arrow").iter(READ_PACKS):
                longest = max(longest, pc.max(table["sequence_lengths"].combine_chunks().flatten()).as_py())
    return longest


def resolve_shape(config: PretrainConfig, max_sequence_length: int) -> PretrainConfig:
    """The same configuration with the numbers of a new model in the place of None; a checkpoint has its own."""
    if config.model is not None:
        return config
    config = replace(config, **{n: value for n, value in NEW_MODEL.items() if getattr(config, n) is None})
    return replace(
        config,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        max_position_embeddings=config.max_position_embeddings or max_sequence_length,
    )


def build_model(
    config: PretrainConfig, vocabulary_size: int, pad_token_id: int, longest: int
) -> PackedBertForPreTraining:
    """A new model with the dataset's vocabulary, or the checkpoint to continue from; checked against the data.

    config: of `resolve_shape`. longest: `longest_sequence` of the data.
    """
    attention, options = _chosen_attention(config)
    if config.model is None:
        if config.max_position_embeddings < longest:
            raise ValueError(
                f"max_position_embeddings={config.max_position_embeddings}, but the longest sequence of "
                f"{config.dataset} has {longest} tokens; give at least as many, or leave it out"
            )
        bert = BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=_attention_dropout(config, 0.1),
            max_position_embeddings=config.max_position_embeddings,
            pad_token_id=pad_token_id,
            mlm_loss=config.mlm_loss,
            packed_attention=attention,
            packed_attention_options=options,
        )
        model = PackedBertForPreTraining(bert)
        logger.info(
            "a new BERT of %.1f million parameters: %d layers of %d",
            *(model.num_parameters() / 1e6, bert.num_hidden_layers, bert.hidden_size),
        )
        return model
    place = find_pretrained("model", config.model)
    bert = _checkpoint_config(config.model, place)
    if not isinstance(bert, BertConfig):
        raise ValueError(f"{config.model} is a {bert.model_type} model; only BERT checkpoints can be continued from")
    bert.mlm_loss, bert.packed_attention, bert.packed_attention_options = config.mlm_loss, attention, options
    if config.hidden_dropout_prob is not None:
        bert.hidden_dropout_prob = config.hidden_dropout_prob
    bert.attention_probs_dropout_prob = _attention_dropout(config, bert.attention_probs_dropout_prob)
    if bert.vocab_size < vocabulary_size:
        raise ValueError(
            f"{config.model} has a vocabulary of {bert.vocab_size}, the tokenizer one of {vocabulary_size}; "
            "prepare the dataset with the checkpoint's own tokenizer"
        )
    if bert.max_position_embeddings < longest:
        raise ValueError(
            f"{config.model} has {bert.max_position_embeddings} positions, but the longest sequence of "
            f"{config.dataset} has {longest} tokens; prepare it with a max_sequence_length the model can hold"
        )
    model, found = PackedBertForPreTraining.from_pretrained(place, config=bert, output_loading_info=True)
    # what the checkpoint lacks is drawn by the seed
    model.loaded_parameters = parameters_digest(model, without=set(found["missing_keys"]))
    return model


def _checkpoint_config(name: str, place: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={name!r} holds no checkpoint of transformers ({str(error).splitlines()[0]}); give a folder with "
            "config.json and model.safetensors"
        ) from error


def resolve_attention(config: PretrainConfig, training: TrainingArguments) -> PretrainConfig:
    """The same configuration with a name in the place of each "auto", logged with the reason.

    Attention dropout that nobody asked for is 0 with "auto", on any device: most fast kernels have none, and what is
    learned must not depend on where it is learned.
    """
    names = [name.strip() for name in config.attention.split(",")]
    if AUTO not in names:
        return config
    dropout = config.attention_probs_dropout_prob or 0.0
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    bert = config
    if config.model is not None:
        bert = _checkpoint_config(config.model, find_pretrained("model", config.model))
    head_width = bert.hidden_size // bert.num_attention_heads
    chosen, reason = choose_attention(training.device, dtype, head_width, dropout)
    logger.info("attention: %s, chosen by %s: %s; attention_probs_dropout_prob %s", chosen, AUTO, reason, dropout)
    names = [chosen if name == AUTO else name for name in names]
    return replace(config, attention=",".join(names), attention_probs_dropout_prob=dropout)


def _chosen_attention(config: PretrainConfig) -> tuple[str | list[str], dict]:
    """ "local, sdpa" and '{"window": 64}' -> ["local", "sdpa"], {"window": 64}"""
    choices = [name.strip() for name in config.attention.split(",")]
    try:
        options = json.loads(config.attention_options or "{}")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"attention_options={config.attention_options!r} is no JSON: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(
            f'attention_options={config.attention_options!r} must be a JSON object, such as {{"window": 64}}'
        )
    return choices[0] if len(choices) == 1 else choices, options


def _attention_dropout(config: PretrainConfig, default: float) -> float:
    """What was asked for, or else the default, where all chosen heads can drop attention weights."""
    if config.attention_probs_dropout_prob is not None:
        return config.attention_probs_dropout_prob
    heads = [ATTENTION.get(name.strip()) for name in config.attention.split(",")]
    if all(getattr(head, "supports_dropout", True) for head in heads):
        return default
    logger.info("attention_probs_dropout_prob is 0: %s cannot drop attention weights", config.attention)
    return 0.0
