"""What a plain `transformers.Trainer` must know about packs, as a callback; PackedTrainer needs none."""

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from collate.columns import HEADS_OF_TOKENS
from collate.heads.loss_rows import rows_of
from collate.isolation.encoders import REFUSED
from collate.isolation.hook import is_isolated
from collate.isolation.positions import position_ids_start
from collate.training.hooks import overrides_callback
from collate.training.refused import refuse_arguments, refuse_data_skip, refuse_torn_batches

PLAIN = "plain Trainer on packs"
MASKS_OF = {"attention_mask": ("sdpa",), "attention_bias": ("sdpa", "eager")}
"""Attention implementations that read these masks as they are meant."""


@overrides_callback
class SetEpoch(TrainerCallback):
    """Calls target.set_epoch at the start of every epoch.

    It counts epochs from the one in which training starts or resumes. Where the dataset has no length, state.epoch is a
    share of max_steps plus the epochs that have ended, and Trainer resumes by skipping from the dataset's start. That
    is right within the first epoch; beyond it this refuses to resume.
    """

    def __init__(self, target: Any):
        self.target = target
        self.next_epoch = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.next_epoch = int(state.epoch or 0)
        if not self.next_epoch or train_dataloader is None or has_length(train_dataloader):
            return
        if state.epoch > 1:
            raise ValueError(
                f"cannot resume training in epoch {state.epoch:.2f} of a dataset without a length: Trainer would skip "
                f"{state.global_step} steps from its start, and not from the start of that epoch; use a dataset with a "
                "length"
            )
        self.next_epoch = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.target.set_epoch(self.next_epoch)
        self.next_epoch += 1


@overrides_callback
class PlainTrainerCallback(SetEpoch):
    """SetEpoch, and a ValueError at the start of training for what plain Trainer would get wrong with packs.

    That is: models that are not isolated, foreign positions and masks, heads that read one sequence per row, stock
    losses that must be counted over passes or ranks, or that leave out what modules add to them, packs that accelerate
    repeats, columns that Trainer strips, and the arguments in collate.training.refused. An evaluation checks the model
    and these arguments, too.

    Evaluation is not exact: plain Trainer averages the losses of batches by their rows, and evaluation has the masks of
    the epoch.
    """

    def __init__(self, collator: Any):
        super().__init__(collator)
        self.collator = collator
        self.is_checked = False

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        """Evaluation without training before it."""
        if not self.is_checked:
            self._check_model(model)
            refuse_arguments(args, PLAIN)

    def _check_model(self, model: nn.Module | None) -> None:
        check_model(self.collator, model)
        _check_mask(self.collator.emit, model)
        if model is not None and _has_stock_loss(model):
            _check_head(model)
        self.collator.learn_task(_stock(model))
        self.is_checked = True

    def on_train_begin(self, args, state, control, train_dataloader=None, model=None, **kwargs):
        super().on_train_begin(args, state, control, train_dataloader=train_dataloader, **kwargs)
        if args.remove_unused_columns:
            raise ValueError("remove_unused_columns=True strips sequence_lengths; set remove_unused_columns=False")
        self._check_model(model)
        if model is not None and _has_stock_loss(model):
            _check_loss(args, model)
        if args.world_size > 1 and args.accelerator_config.even_batches:
            raise ValueError(
                "accelerate repeats packs to even out the ranks; set accelerator_config={'even_batches': False}, or "
                "use collate.PackedTrainer"
            )
        if str(args.include_num_input_tokens_seen) in ("True", "non_padding"):
            raise ValueError(
                f"include_num_input_tokens_seen={args.include_num_input_tokens_seen!r} counts an attention_mask, which "
                "packs lack; set it to 'all' (slots) or use collate.PackedTrainer (real tokens)"
            )
        refuse_arguments(args, PLAIN)
        if state.global_step:
            refuse_data_skip(args)
        refuse_torn_batches(self.collator, train_dataloader)


def check_model(collator: Any, model: nn.Module | None) -> None:
    """Raise ValueError unless the model honours what the collator emits, and positions start where its own do."""
    stock = _stock(model)
    if stock is None:
        return
    takes_ids = "sequence_ids" in inspect.signature(stock.forward).parameters
    if collator.emit == "sequence_ids" and not takes_ids and not is_isolated(stock):
        raise ValueError(
            f"{type(stock).__name__} ignores sequence_ids, so packed sequences would read each other; call "
            "collate.isolate_sequences(model) after loading it"
        )
    expected, given = position_ids_start(stock.config), collator.position_ids_start or 0
    if expected != given:
        raise ValueError(
            f"the collator's positions begin at {given}, those of {type(stock).__name__} at {expected}; give the "
            f"collator model=model, or position_ids_start={expected}"
        )


def check_forward(model: nn.Module) -> None:
    """Raise ValueError for a forward that is not transformers' own, whose loss a task stands for."""
    for part in (model, _stock(model)):
        if part is not None and not type(part).forward.__module__.startswith(("transformers.", "peft.", "torch.")):
            name = type(part).__name__
            raise ValueError(
                f"{name} has a forward of its own, and a loss in it would be ignored; if the stock loss is meant, give "
                "PackedTrainer task=collate.task_for(model), or else a collate.heads.Task of your own"
            )


def _check_mask(emit: str, model: nn.Module | None) -> None:
    """Raise ValueError for a mask that the model's attention would take for something else."""
    stock = _stock(model)
    if stock is None or emit == "sequence_ids":
        return
    name, implementation = type(stock).__name__, stock.config._attn_implementation
    if is_isolated(stock):
        raise ValueError(f"{name} was isolated, so it takes no mask beside sequence_ids; use emit='sequence_ids'")
    if stock.config.model_type in REFUSED:
        raise ValueError(f"{name} leaks between packed sequences {REFUSED[stock.config.model_type]}")
    if emit == "flash":
        if "flash" not in implementation:
            raise ValueError(
                f"emit='flash' is for flash attention, but {name} uses {implementation!r}; load it with "
                "attn_implementation='flash_attention_2', or use emit='sequence_ids' and isolate_sequences"
            )
        return
    if implementation not in MASKS_OF[emit]:
        raise ValueError(
            f"emit={emit!r} is right for {' or '.join(MASKS_OF[emit])} only, but {name} uses {implementation!r}; use "
            "emit='sequence_ids' and isolate_sequences"
        )
    if "sliding_attention" in (getattr(stock.config, "layer_types", None) or ()):
        raise ValueError(
            f"one mask for all layers would replace the sliding windows of {name}; use emit='sequence_ids' and "
            "isolate_sequences"
        )


def _stock(model: nn.Module | None) -> PreTrainedModel | None:
    if model is None:
        return None
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _has_stock_loss(model: nn.Module) -> bool:
    """Whether transformers' own forward computes the loss."""
    return type(model).forward.__module__.startswith(("transformers.", "peft."))


def _check_head(model: nn.Module) -> None:
    stock = _stock(model)
    if not any(parent.__name__.endswith(HEADS_OF_TOKENS) for parent in type(stock).__mro__):
        raise ValueError(
            f"{type(stock).__name__} makes one prediction per row, or reads the row as one sequence, but a pack "
            "holds several; use collate.PackedTrainer, whose heads read sequences"
        )


def _check_loss(args: TrainingArguments, model: nn.Module) -> None:
    """Stock encoders take a mean per micro-batch, whatever Trainer believes (huggingface/transformers#47688)."""
    if rows := rows_of(model):
        raise ValueError(
            f"modules of {type(model).__name__} add {', '.join(row.name for row in rows)} to its loss, which its own "
            "forward leaves out; use collate.PackedTrainer, which adds them"
        )
    counts = {"gradient_accumulation_steps": args.gradient_accumulation_steps, "ranks": args.world_size}
    for name, value in (counts | {"GPUs in one process": args.n_gpu}).items():
        if value > 1:
            raise ValueError(
                f"{name}={value}: {type(model).__name__} averages its loss over each batch, and packs of unequal "
                "numbers of sequences would be weighted unequally; use collate.PackedTrainer, which counts a loss over "
                "the whole optimizer step"
            )
