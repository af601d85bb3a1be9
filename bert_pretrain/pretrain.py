"""Pretrain BERT on a packed dataset: the run, read from top to bottom."""

import json
import logging
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, load_from_disk
from transformers import AutoConfig, BertConfig, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.routing import RoutingAttention, RoutingCallback
from bert_pretrain.loss import MLM_LOSSES
from bert_pretrain.model import PackedBertForPreTraining
from bert_pretrain.tokenizer import load_tokenizer
from collate import DataCollatorWithPacking, PackedTrainer
from packing import packed_info

logger = logging.getLogger(__name__)

CONFIG_FILE = "pretrain.json"
"""What a run was configured with, beside its checkpoints: a resumed run must be configured alike."""


def _help(text: str, default):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run; how to optimize it is transformers' TrainingArguments' business."""

    dataset: str = field(metadata={"help": "Folder written by pack-dataset; splits train and, if there is one, test."})
    tokenizer: str = field(metadata={"help": "Folder or name of the tokenizer that the dataset was made with."})
    model: str | None = _help("BERT checkpoint to continue from; by default a new model is made.", None)
    attention: str = _help(f"Attention head: {', '.join(ATTENTION)}; or one per layer, parted by commas.", "sdpa")
    attention_options: str | None = _help("Options of the attention heads, as JSON: '{\"window\": 64}'.", None)
    mlm_loss: str = _help(
        "What the MLM loss is the mean of: sequence (every sequence weighs the same) or token (every predicted token).",
        MLM_LOSSES[0],
    )
    mlm_probability: float = _help("Share of each sequence's tokens that are predicted.", 0.15)
    sequences_per_step: int = _help(
        "Sequences per optimizer step, over all devices. Packs per step follow from the packing factor, so packing "
        "changes nothing else; per_device_train_batch_size is the most packs in one forward pass.",
        256,
    )
    hidden_size: int = _help("Width of a new model.", 768)
    num_hidden_layers: int = _help("Layers of a new model.", 12)
    num_attention_heads: int = _help("Attention heads per layer of a new model.", 12)
    intermediate_size: int | None = _help("Feed-forward width of a new model; by default 4 x hidden_size.", None)
    hidden_dropout_prob: float = _help("Dropout of a new model's hidden states.", 0.1)
    attention_probs_dropout_prob: float | None = _help(
        "Dropout of attention weights; by default that of the checkpoint, or 0.1 for a new model, and 0 where an "
        "attention head cannot drop weights.",
        None,
    )

    def __post_init__(self) -> None:
        for name in ("sequences_per_step", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.mlm_loss not in MLM_LOSSES:
            raise ValueError(f"unknown mlm_loss {self.mlm_loss!r}; choose from {list(MLM_LOSSES)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )


def pretrain(config: PretrainConfig, training: TrainingArguments) -> PackedTrainer:
    """Train BERT on packed data; the loss is counted per sequence. Returns the trainer, its model trained and saved.

    Goes on from `training.resume_from_checkpoint`, or by itself from the last checkpoint in `training.output_dir`.
    """
    set_seed(training.seed)
    train, test = load_splits(config.dataset)
    tokenizer = load_tokenizer(config.tokenizer)
    model = build_model(config, len(tokenizer), tokenizer.pad_token_id, packed_info(train).max_sequence_length)
    set_batch(config, training, train)
    checkpoint = find_checkpoint(config, training)

    trainer = PackedTrainer(
        model,
        training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPacking(tokenizer, mlm_probability=config.mlm_probability, seed=training.seed),
    )
    if any(isinstance(module, RoutingAttention) for module in model.modules()):
        trainer.add_callback(RoutingCallback())
    if trainer.is_world_process_zero():
        record = Path(training.output_dir) / CONFIG_FILE
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if test is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    return trainer


def load_splits(folder: str) -> tuple[Dataset, Dataset | None]:
    """The packed training split and, where there is one, the test (or validation) split."""
    loaded = load_from_disk(folder)
    if isinstance(loaded, Dataset):
        return loaded, None
    if "train" not in loaded:
        raise ValueError(f"{folder} has no split named train, only {sorted(loaded)}")
    test = loaded.get("test", loaded.get("validation"))
    return loaded["train"], test


def build_model(
    config: PretrainConfig, vocabulary_size: int, pad_token_id: int, max_sequence_length: int
) -> PackedBertForPreTraining:
    """A new model whose vocabulary and positions are the dataset's, or the checkpoint to continue from, checked."""
    attention, options = _chosen_attention(config)
    if config.model is None:
        bert = BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size or 4 * config.hidden_size,
            hidden_dropout_prob=config.hidden_dropout_prob,
            attention_probs_dropout_prob=_attention_dropout(config, 0.1),
            max_position_embeddings=max_sequence_length,
            pad_token_id=pad_token_id,
            mlm_loss=config.mlm_loss,
            packed_attention=attention,
            packed_attention_options=options,
        )
        return PackedBertForPreTraining(bert)
    bert = AutoConfig.from_pretrained(config.model)
    if not isinstance(bert, BertConfig):
        raise ValueError(f"{config.model} is a {bert.model_type} model; only BERT checkpoints can be continued from")
    bert.mlm_loss, bert.packed_attention, bert.packed_attention_options = config.mlm_loss, attention, options
    bert.attention_probs_dropout_prob = _attention_dropout(config, bert.attention_probs_dropout_prob)
    if bert.vocab_size < vocabulary_size:
        raise ValueError(
            f"{config.model} has a vocabulary of {bert.vocab_size}, the tokenizer one of {vocabulary_size}; "
            "prepare the dataset with the checkpoint's own tokenizer"
        )
    if bert.max_position_embeddings < max_sequence_length:
        raise ValueError(
            f"{config.model} has {bert.max_position_embeddings} positions, but the dataset is packed for "
            f"max_sequence_length={max_sequence_length}; prepare it with a max_sequence_length the model can hold"
        )
    return PackedBertForPreTraining.from_pretrained(config.model, config=bert)


def _chosen_attention(config: PretrainConfig) -> tuple[str | list[str], dict]:
    """ "local, sdpa" and '{"window": 64}' -> ["local", "sdpa"], {"window": 64}"""
    choices = [name.strip() for name in config.attention.split(",")]
    try:
        options = json.loads(config.attention_options or "{}")
    except json.JSONDecodeError as error:
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
