"""Which optimizer a run has, and what a larger batch changes about it."""

import logging
import os
from typing import Any

from accelerate.utils import str_to_bool
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from transformers import BertForPreTraining, Trainer, TrainingArguments

from bert_pretrain.objective import OBJECTIVES
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.counted import counted_info

logger = logging.getLogger(__name__)


def choose_optimizer(
    config: PretrainConfig, training: TrainingArguments, model: nn.Module, train: Dataset
) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """Trainer's `optimizer_cls_and_kwargs`; None: Trainer's own choice, `training.optim`.

    Parameter groups, schedule and clipping are Trainer's in any case: no decay on biases and LayerNorm weights,
    `lr_scheduler_type`, `max_grad_norm`.
    """
    betas = training.adam_beta1, training.adam_beta2
    if config.beta_power:
        betas = power_betas(config, betas, train)
    if config.optimizer == "lamb":
        _refuse_for_lamb(training)
        from bert_pretrain.train.lamb import Lamb  # not at the top: its library takes seconds to import

        shared = {"lr": training.learning_rate, "betas": betas, "eps": training.adam_epsilon}
        return Lamb, shared
    if not config.beta_power:
        return None
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
    if "betas" not in options:
        raise ValueError(
            f"beta_power adjusts Adam's betas, which optim={training.optim.value!r} does not have; choose AdamW or LAMB"
        )
    return optimizer_class, options | {"betas": betas}


def freeze_unlearned(model: BertForPreTraining, objective: str) -> None:
    """Without labels of sentence pairs, keep the parts that only they train as they are.

    Their gradients are 0 and not None, so that an optimizer would decay them step by step, a checkpoint's to nothing.
    """
    if OBJECTIVES[objective].column is None:
        model.bert.pooler.requires_grad_(False)
        model.cls.seq_relationship.requires_grad_(False)


def power_betas(config: PretrainConfig, betas: tuple[float, float], train: Dataset) -> tuple[float, float]:
    """(0.9, 0.999) at a packing factor of 2 -> (0.81, 0.998001)

    "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027), on adjusting hyperparameters: with p
    times as many sequences in a step, a moving average over steps must forget p times as fast to reach back over as
    many sequences.
    """
    if config.batch_policy != "packs":
        raise ValueError(
            f"beta_power is for batch_policy='packs', whose steps hold more sequences than without packing; "
            f"batch_policy={config.batch_policy!r} keeps their number, so the betas must stay: leave out beta_power"
        )
    info = counted_info(train)
    factor = info.num_sequences / info.num_packs
    powered = betas[0] ** factor, betas[1] ** factor
    logger.info("beta_power: betas %s to the packing factor %.4f are (%.6g, %.6g)", betas, factor, *powered)
    return powered


def _refuse_for_lamb(training: TrainingArguments) -> None:
    if training.optim != TrainingArguments.default_optim or training.optim_args:
        raise ValueError(
            f"optim={training.optim.value!r} and optim_args={training.optim_args!r} choose transformers' optimizers, "
            "but optimizer='lamb' is none of these; leave out either"
        )
    launched_with = [f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED")]  # by accelerate launch
    if training.fsdp or training.deepspeed or any(str_to_bool(os.environ.get(name, "0")) for name in launched_with):
        raise ValueError(
            "optimizer='lamb' needs the norms of whole tensors, which fsdp and deepspeed split among processes; "
            "choose optimizer='adamw', or data parallelism without them"
        )
