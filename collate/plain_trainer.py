"""What a plain `transformers.Trainer` must be told about packs, as a callback; PackedTrainer knows it by itself."""

import inspect

from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from collate.isolation import is_isolated, position_ids_start

INSTEAD = "use collate.PackedTrainer, which counts a loss over the whole optimizer step"


class SetEpoch(TrainerCallback):
    """Counts epochs from the one that training begins or resumes in: state.epoch itself is a fraction of max_steps
    where the dataset has no length."""

    def __init__(self, collator):
        self.collator = collator
        self.next_epoch = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.next_epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(self.next_epoch)
        self.next_epoch += 1


class PlainTrainerCallback(SetEpoch):
    """SetEpoch, and a ValueError at the begin of training for what plain Trainer would get wrong with packs:

    * a stock model that was not isolated ignores sequence_ids: its sequences would read each other;
    * positions that begin elsewhere than the model's own;
    * stock losses under gradient accumulation or on several ranks (huggingface/transformers#47688);
    * rows that accelerate repeats to even out ranks, or columns that Trainer strips;
    * tokens counted from an attention_mask, which packs have none of, or a square one.
    """

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if args.remove_unused_columns:
            raise ValueError("remove_unused_columns=True strips sequence_lengths; set remove_unused_columns=False")
        check_model(self.collator, model)
        _check_loss(args, model)
        if args.world_size > 1 and args.accelerator_config.even_batches:
            raise ValueError(
                "accelerate repeats packs to even out the ranks; set accelerator_config={'even_batches': False}, or "
                "use collate.PackedTrainer"
            )
        if str(args.include_num_input_tokens_seen) in ("True", "non_padding"):
            raise ValueError(
                f"include_num_input_tokens_seen={args.include_num_input_tokens_seen!r} counts an attention_mask, which "
                "packs have none of; set it to 'all' (slots) or use collate.PackedTrainer (real tokens)"
            )
        if self.collator.emit == "flash" and type(train_dataloader).__name__ == "DataLoaderDispatcher":
            raise ValueError(
                "emit='flash' gives one row per batch, which dispatch would cut into pieces; set "
                "accelerator_config={'dispatch_batches': False} and shard the dataset, or use emit='sequence_ids'"
            )


def check_model(collator, model: nn.Module | None) -> None:
    """The model honours what the collator emits, and its positions begin where the collator's do."""
    stock = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None) if model is not None else None
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


def _check_loss(args, model: nn.Module | None) -> None:
    """Stock encoders take a mean per micro-batch, whatever Trainer believes."""
    if not type(model).__module__.startswith("transformers."):
        return
    for name, value in (("gradient_accumulation_steps", args.gradient_accumulation_steps), ("ranks", args.world_size)):
        if value > 1:
            raise ValueError(
                f"{name}={value}: {type(model).__name__} averages its loss over each batch, and packs of unequal "
                f"numbers of sequences would be weighted unequally; {INSTEAD}"
            )
