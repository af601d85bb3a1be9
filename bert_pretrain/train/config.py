"""What a pretraining run is configured with, beside transformers' TrainingArguments."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert_pretrain.objective import OBJECTIVES
from packing.files.errors import Option, OptionError, check_known, whole_number

OPTIMIZERS = ("adamw", "lamb")
BATCH_POLICIES = ("sequences", "packs")
SEQUENCES_PER_STEP = 256
AUTO = "auto"
HEADS = sorted(file.stem for file in (Path(__file__).parents[1] / "attention" / "heads").glob("[a-z]*.py"))
"""The names in ATTENTION, for --help, which does not wait for torch."""

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
"""Options of a new model; a checkpoint has its own."""
NEW_MODEL = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_dropout_prob": 0.1}
"""BERT base."""

CONFIG_FILE = "pretrain.json"
"""What a run was configured with, beside its checkpoints: a resumed run must be configured alike."""


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run; how to optimize it is transformers' TrainingArguments' business."""

    dataset: str = field(metadata={"help": "Folder written by pack-dataset; splits train and, if there is one, test."})
    tokenizer: str = field(metadata={"help": "Folder or name of the tokenizer that the dataset was made with."})
    model: str | None = _help("BERT checkpoint to continue from; by default a new model is made.", None)
    attention: str = _help(
        f"Attention head: {', '.join(HEADS)}; or one per layer, parted by commas. auto: full attention, by the "
        "kernel that is fastest on the device, without attention dropout unless that is asked for.",
        AUTO,
    )
    attention_options: str | None = _help("Options of the attention heads, as JSON: '{\"window\": 64}'.", None)
    block: str | None = _help(
        "What stands around attention in a layer, as JSON: "
        '\'{"placement": "pre", "norm": "rms", "stream": "checkpoint"}\'. By default the block of the checkpoint, or '
        "of BERT; docs/blocks.md has all options.",
        None,
    )
    mlm_loss: str = _help(
        "What the MLM loss is the mean of: sequence (every sequence weighs the same) or token (every predicted token).",
        "sequence",
    )
    objective: str = _help(
        "What is learned of sentence pairs, beside MLM: "
        + ", ".join(f"{name} ({row.learned})" for name, row in OBJECTIVES.items())
        + ", or auto: what the dataset's columns say.",
        AUTO,
    )
    mlm_probability: float = _help("Share of each sequence's tokens that are predicted.", 0.15)
    eval_mlm_probability: float = _help(
        "The same in evaluation, whatever training uses, so that runs can be compared; the masks are always the same.",
        0.15,
    )
    batch_policy: str = _help(
        "What all optimizer steps have equally many of. sequences: sequences_per_step of them, in as many packs as it "
        "takes, so that packing changes nothing but the cost (and what dropout draws). packs: "
        "per_device_train_batch_size x gradient_accumulation_steps x devices of them; see beta_power.",
        BATCH_POLICIES[0],
    )
    sequences_per_step: int = _help(
        "Sequences per optimizer step, over all devices, for batch_policy sequences: exactly as many in every step but "
        "an epoch's last, if any packs add up to it. tokens_per_pass, or per_device_train_batch_size in packs, is the "
        "most in one forward pass; the number of passes follows.",
        SEQUENCES_PER_STEP,
    )
    tokens_per_pass: int | None = _help(
        "Token slots in one forward pass of a device, instead of per_device_train_batch_size: the most for "
        "batch_policy sequences, as many for packs. By default per_device_train_batch_size decides; with batch_policy "
        "sequences on a GPU, the memory of the card.",
        None,
    )
    reassign: bool = _help(
        "Pack the sequences again in every epoch after the first: the same plan, other sequences together.", True
    )
    optimizer: str = _help(
        "adamw: what --optim says, fused AdamW where it exists. lamb: LAMB (arXiv 1904.00962), for steps of thousands "
        "of sequences.",
        OPTIMIZERS[0],
    )
    beta_power: bool = _help(
        "For batch_policy packs, whose steps hold packing factor p times as many sequences: raise adam_beta1 and "
        "adam_beta2 to the power p, as the packing paper (arXiv 2107.02027) does.",
        False,
    )
    peak_tflops: float | None = _help(
        "What one device can do in bfloat16, in TFLOP/s, for model FLOPs utilization (MFU); by default that of the "
        "GPU, if it is a known one.",
        None,
    )
    hidden_size: int | None = _help("Width of a new model; by default 768.", None)
    num_hidden_layers: int | None = _help("Layers of a new model; by default 12.", None)
    num_attention_heads: int | None = _help("Attention heads per layer of a new model; by default 12.", None)
    intermediate_size: int | None = _help("Feed-forward width of a new model; by default 4 x hidden_size.", None)
    max_position_embeddings: int | None = _help(
        "Positions of a new model, at least those of the longest sequence; by default the max_sequence_length of the "
        "packs. More leave room to continue on longer sequences (--model).",
        None,
    )
    hidden_dropout_prob: float | None = _help(
        "Dropout of hidden states; by default that of the checkpoint, or 0.1 for a new model.", None
    )
    attention_probs_dropout_prob: float | None = _help(
        "Dropout of attention weights; by default that of the checkpoint, or 0.1 for a new model, and 0 where an "
        "attention head cannot drop weights.",
        None,
    )

    @property
    def attention_names(self) -> list[str]:
        """ "local, sdpa" -> ["local", "sdpa"]: one name for all layers, or one per layer."""
        return [name.strip() for name in self.attention.split(",")]

    def json_object(self, name: str) -> dict[str, Any]:
        """The value of an option that is JSON; {} where it is not given."""
        given = Option(name, getattr(self, name))
        try:
            found = json.loads(getattr(self, name) or "{}")
        except (json.JSONDecodeError, RecursionError) as error:
            raise OptionError(f"{given} is no JSON: {error}") from None
        if not isinstance(found, dict):
            example = {"attention_options": '{"window": 64}', "block": '{"placement": "pre"}'}[name]
            raise OptionError(f"{given} must be a JSON object, such as {example}")
        return found

    def __post_init__(self) -> None:
        if self.block is not None:  # the same text for the same options: a run that resumes compares it
            object.__setattr__(self, "block", json.dumps(self.json_object("block"), sort_keys=True))
        given = {name: Option(name, value) for name, value in vars(self).items()}
        for name in ("sequences_per_step", "tokens_per_pass", *SHAPE):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name))
            if name in SHAPE and getattr(self, name) is not None and self.model is not None:
                raise OptionError(
                    f"{given[name]} is for a new model, and {given['model']} has its own; leave either out"
                )
        if self.hidden_dropout_prob is not None and not 0 <= self.hidden_dropout_prob < 1:
            raise OptionError(f"{given['hidden_dropout_prob']} must be at least 0 and less than 1")
        for name in ("mlm_probability", "eval_mlm_probability"):
            if not 0 < getattr(self, name) <= 1:
                raise OptionError(f"{given[name]} must be more than 0 and at most 1; BERT's is 0.15")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise OptionError(f"{given['peak_tflops']} must be more than 0; an A100 has 312")
        from collate.losses import MLM_TERMS  # not at the top: it needs torch

        check_known("mlm_loss", self.mlm_loss, MLM_TERMS)
        check_known("objective", self.objective, (AUTO, *OBJECTIVES))
        check_known("batch_policy", self.batch_policy, BATCH_POLICIES)
        check_known("optimizer", self.optimizer, OPTIMIZERS)
        if self.batch_policy == "packs" and self.sequences_per_step != SEQUENCES_PER_STEP:
            raise OptionError(
                f"{given['sequences_per_step']} is for {Option('batch_policy', 'sequences')}; with 'packs' a step "
                f"holds what its packs hold: leave it out, and set {Option('per_device_train_batch_size')} (or "
                f"{Option('tokens_per_pass')}) and {Option('gradient_accumulation_steps')}"
            )
        width, heads = (getattr(self, name) or NEW_MODEL[name] for name in ("hidden_size", "num_attention_heads"))
        if width % heads:
            raise OptionError(
                f"{Option('hidden_size', width)} must be a multiple of {Option('num_attention_heads', heads)}"
            )
