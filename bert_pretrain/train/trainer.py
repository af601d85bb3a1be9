"""PretrainTrainer: PackedTrainer with a meter, an evaluation of its own masking rate, a model card and a record."""

import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput

from bert_pretrain.model import PackedBertForPreTraining
from bert_pretrain.train.batch import counted_info
from bert_pretrain.train.card import model_card
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.console import LinesAboveBar, LinesCallback
from bert_pretrain.train.hub import SaysWhatFailed
from bert_pretrain.train.metrics import Meter, known_peak
from bert_pretrain.train.run_record import write_config_record
from collate import DataCollatorWithPacking
from collate.training.checkpoints import what_is_saved
from collate.training.hooks import overrides_callback, overrides_trainer
from packing.files.errors import Option, OptionError

logger = logging.getLogger(__name__)


@overrides_callback
class _TiedTogether(TrainerCallback):
    """While FSDP cuts the model up, each layer is a part, and so are the embedding and the head together.

    accelerate (1.15) puts the vocabulary projection beside the embedding that shares its weight. It puts the bias that
    the projection shares elsewhere. torch refuses: "shared with a parameter already managed by another group".
    """

    def __init__(self, model: PackedBertForPreTraining):
        self.model, self.head = model, model.cls.predictions
        self.head.__dict__["weight"] = self.head.decoder.weight  # accelerate sees that they are tied
        model.__dict__["get_output_embeddings"] = lambda: self.head
        layers: Any = model.bert.encoder.layer
        # BertEmbeddings would be a part of its own, and holds what is tied
        model._no_split_modules = {type(layer).__name__ for layer in layers}

    def on_train_begin(self, args, state, control, **kwargs):
        self.head.__dict__.pop("weight", None)
        self.model.__dict__.pop("get_output_embeddings", None)


@overrides_callback
class _LogsLastStep(TrainerCallback):
    """Logs the last steps, even if logging_steps does not divide max_steps, or is more."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            logger.info(
                "finished already: step %d of %d; raise max_steps or num_train_epochs to train on",
                *(state.global_step, state.max_steps),
            )

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # Trainer logs a step once


@overrides_trainer
class PretrainTrainer(SaysWhatFailed):
    """A pretraining run's trainer.

    config: of the run. record: what is saved beside every model, `bert_pretrain.train.run_record`.
    objective: "nsp", "sop" or "none", for the card.
    eval_data_collator: of evaluation; its masks are the same every time.

    Logs have, beside PackedTrainer's metrics, those of `metrics.Meter`. A loss that is no number ends the run, and
    nothing saves a model with such parameters.
    """

    objective: str
    model: PackedBertForPreTraining

    def __init__(
        self,
        *args: Any,
        config: PretrainConfig,
        record: dict[str, Any],
        objective: str,
        eval_data_collator: DataCollatorWithPacking,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.config, self.record, self.objective = config, record, objective
        self.args.logging_nan_inf_filter = False  # it logs 0 for a loss of NaN, and waits for the device at every pass
        self.eval_data_collator = eval_data_collator
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise OptionError(
                f"{Option('fsdp', self.args.fsdp)} cannot be honoured on {self.args.device.type}: accelerate would "
                "train by DDP instead; leave it out, or train on GPUs"
            )
        if self.is_fsdp_enabled:
            self.add_callback(_TiedTogether(self.model))
        self.add_callback(_LogsLastStep())
        self.meter = Meter(self.model, self.args.device, known_peak(self.args.device, config.peak_tflops))
        # a notebook has neither callback: Trainer shows a table of its own there
        bar, printer = self.pop_callback(ProgressCallback), self.pop_callback(PrinterCallback)
        if bar is not None or printer is not None:
            has_bar = bar is not None and sys.stderr.isatty()  # a bar is litter in a file
            self.add_callback(LinesAboveBar() if has_bar else LinesCallback())

    def _bound(self, collator: DataCollatorWithPacking, dataset: Any, is_training: bool) -> DataCollatorWithPacking:
        return super()._bound(collator if is_training else self.eval_data_collator, dataset, is_training)

    # -- time: that of training steps only -----------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.meter.reset()
        output = super().train(*args, **kwargs)
        seen = self._progress.seen(self.state.global_step)
        if "packing_factor" in seen:
            logger.info(
                "seen by step %d: {sequences_seen:,} sequences, {tokens_seen:,} real tokens; realised packing factor "
                "{packing_factor:.3f}".format(**seen),
                self.state.global_step,
            )
        return output

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        self.meter.run()
        return super().get_batch_samples(self.meter.waiting(epoch_iterator), num_batches, device)

    def _step_counted(self, packs: Tensor, denominators: Tensor) -> None:
        super()._step_counted(packs, denominators)
        self.meter.add_step(packs, denominators[0])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.meter.stopped():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.meter.stopped():
            super()._save_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = self.meter.read(self.args.world_size, self.accelerator.gather) | logs
        super().log(logs, start_time)
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(self._diverged(f"the {name.replace('_', ' ')} is {logs[name]}"))

    # -- a run that diverged: all ranks find it together, or one would wait for another ---------------------------

    def _refuse_diverged(self) -> None:
        """Call it before anything is saved: a bad checkpoint would push a good one out."""
        weights = self.model_wrapped.parameters()
        values = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        values += [self._tr_loss] if hasattr(self, "_tr_loss") else []
        bad = sum((~torch.isfinite(value)).sum().to(self.args.device) for value in values)
        if self.accelerator.reduce(bad, "sum").item():
            raise ValueError(self._diverged("the loss or parameters of the model are not finite"))

    def _diverged(self, what: str) -> str:
        cure = "lower learning_rate, or set more warmup_steps or a lower max_grad_norm"
        if self.args.fp16:
            cure += ", or train with bf16 instead of fp16"
        return (
            f"training diverged: {what} at step {self.state.global_step}, which is not saved; "
            f"{what_is_saved(self.args.output_dir)}; {cure}, and start again in another output_dir"
        )

    # -- what is saved beside the model --------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._refuse_diverged()
        if self.is_world_process_zero():
            write_config_record(output_dir or str(self.args.output_dir), self.record)
        super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, model_name: str | None = None, **kwargs: Any) -> None:
        """README.md in output_dir; Trainer calls this before it pushes to the hub."""
        if not self.is_world_process_zero():
            return
        is_best = self.args.load_best_model_at_end and not self.is_in_train and self.state.best_model_checkpoint
        card = model_card(
            self.args.hub_model_id or model_name or Path(str(self.args.output_dir)).name,
            self.config,
            self.model,
            counted_info(getattr(self.train_dataset, "packed", self.train_dataset)),
            self.objective,
            self.state,
            self._progress.seen(self.state.global_step),
            str(getattr(self.processing_class, "mask_token", None)),
            self.state.best_global_step if is_best else None,
        )
        card.save(Path(str(self.args.output_dir)) / "README.md")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)
