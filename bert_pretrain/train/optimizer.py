"""The optimizer of a run: which one, its betas for larger steps, and LAMB."""

import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import pytorch_optimizer
import torch
from accelerate.utils import str_to_bool
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from transformers import BertForPreTraining, PreTrainedModel, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from bert_pretrain.objective import OBJECTIVES
from bert_pretrain.train.batch import packing_factor
from bert_pretrain.train.config import PretrainConfig
from packing.files.errors import Option, OptionError

logger = logging.getLogger(__name__)


def choose_optimizer(
    config: PretrainConfig, training: TrainingArguments, model: PreTrainedModel, train: Dataset
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
        return Lamb, {"lr": training.learning_rate, "betas": betas, "eps": training.adam_epsilon}
    if not config.beta_power:
        return None
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
    optim = OptimizerNames(training.optim).value
    if "betas" not in options:
        what = f"{Option('beta_power')} adjusts Adam's betas, which {Option('optim', optim)} does not have"
        raise OptionError(f"{what}; choose AdamW or LAMB")
    return optimizer_class, options | {"betas": betas}


def freeze_unlearned(model: BertForPreTraining, objective: str) -> None:
    """Without labels of sentence pairs, freeze the parts that only such labels train.

    Their gradients are 0 and not None: an optimizer would decay them step by step, those of a checkpoint to nothing.
    """
    if OBJECTIVES[objective].column is None:
        assert model.bert.pooler is not None
        model.bert.pooler.requires_grad_(False)
        model.cls.seq_relationship.requires_grad_(False)


def power_betas(config: PretrainConfig, betas: tuple[float, float], train: Dataset) -> tuple[float, float]:
    """(0.9, 0.999) at a packing factor of 2 -> (0.81, 0.998001)

    With p times as many sequences in a step, a moving average over steps must forget p times as fast to reach back over
    equally many sequences: "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027).
    """
    if config.batch_policy != "packs":
        raise OptionError(
            f"{Option('beta_power')} is for {Option('batch_policy', 'packs')}, whose steps hold more sequences than "
            f"without packing; {Option('batch_policy', config.batch_policy)} keeps their number, so the betas must "
            f"stay: leave out {Option('beta_power')}"
        )
    factor = packing_factor(train)
    powered = betas[0] ** factor, betas[1] ** factor
    logger.info("beta_power: betas %s to the packing factor %.4f are (%.6g, %.6g)", betas, factor, *powered)
    return powered


def _refuse_for_lamb(training: TrainingArguments) -> None:
    if training.optim != TrainingArguments.default_optim or training.optim_args:
        optim = OptimizerNames(training.optim).value
        raise OptionError(
            f"{Option('optim', optim)} and {Option('optim_args', training.optim_args)} choose transformers' "
            f"optimizers, but {Option('optimizer', 'lamb')} is ours; leave out either"
        )
    by_launch = [os.environ.get(f"ACCELERATE_USE_{name}", "0") for name in ("FSDP", "DEEPSPEED")]  # accelerate launch
    if training.fsdp or training.deepspeed or any(map(str_to_bool, by_launch)):
        raise OptionError(
            f"{Option('optimizer', 'lamb')} needs the norms of whole tensors, which fsdp and deepspeed split among "
            f"processes; choose {Option('optimizer', 'adamw')}, or data parallelism without them"
        )


class Lamb(pytorch_optimizer.Lamb):
    """LAMB as its paper has it, from pytorch-optimizer's parts; it does not clip gradients, as Trainer does.

    "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (arXiv 1904.00962), algorithm 2, φ(z) = z:

        m ← β1 m + (1 - β1) g,  v ← β2 v + (1 - β2) g²,  u = (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + ε) + λ x
        x ← x - lr · ‖x‖ / ‖u‖ · u        for each tensor x; biases and LayerNorm: x ← x - lr · u

    The library's LAMB, whatever its options, leaves out both bias corrections or makes only the first, cuts ‖x‖ at 10
    (the word embeddings of BERT start at 97) and adapts biases like everything else.

    Groups of one-dimensional parameters alone have no layerwise adaptation, as the paper's authors trained BERT. The
    key "adam" of a group overrides this (True: no adaptation). ε is also added to ‖u‖. A tensor of zeros alone has no
    ‖x‖ to go by: it moves by lr · u · (1 - β1^t) / √(1 - β2^t).
    """

    clamp = math.inf  # limit of ‖x‖

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        # weight_decouple=False: λ x is part of u; adam_debias=True: the library corrects nothing, step() does
        super().__init__(params, lr, betas, weight_decay, weight_decouple=False, eps=eps, adam_debias=True)

    def add_param_group(self, group: dict) -> None:
        group["params"] = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        parameters = [given[1] if isinstance(given, tuple) else given for given in group["params"]]  # (name, parameter)
        group.setdefault("adam", all(parameter.ndim < 2 for parameter in parameters))
        super().add_param_group(group)

    def load_state_dict(self, state_dict: dict) -> None:
        """Earlier versions counted the steps of a group, not of a parameter; such a state loads, too."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            step = group.pop("step", None)
            for parameter in group["params"]:
                if step is not None and parameter in self.state:
                    self.state[parameter].setdefault("step", step)

    def step(self, closure=None):
        """One step with both bias corrections; t counts the gradients of each parameter.

        The library corrects nothing here. It sees the parameters of a group that share their t as a group.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = [part for group in groups for part in self._parts(group)]
        try:
            super().step()
            for part in self.param_groups:
                for parameter in part["params"]:
                    self.state[parameter]["step"] = part["step"]
        finally:
            self.param_groups = groups
        return loss

    def _parts(self, group: dict) -> Iterator[dict]:
        """A group for each t among its parameters with a gradient.

        With c = √(1 - β2^t) / (1 - β1^t), u is c times the library's m / (√v + ε √(1 - β2^t)) + (λ / c) x. Since
        ‖x‖ / ‖u‖ · u does not change with c, only what is not adapted needs c · lr.
        """
        by_step: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_step.setdefault(self.state.get(parameter, {}).get("step", 0) + 1, []).append(parameter)
        beta1, beta2 = group["betas"]
        for step, parameters in by_step.items():
            root = math.sqrt(1 - beta2**step)
            correction = root / (1 - beta1**step)
            part = group | {"params": parameters, "step": step - 1}  # the library adds 1
            part["eps"] *= root
            part["weight_decay"] /= correction
            part["lr"] *= correction if group["adam"] else 1
            yield part
