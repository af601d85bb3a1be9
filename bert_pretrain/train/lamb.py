"""LAMB as its paper has it, from pytorch-optimizer's parts.

"Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (arXiv 1904.00962), algorithm 2, φ(z) = z:

    m ← β1 m + (1 - β1) g,  v ← β2 v + (1 - β2) g²,  u = (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + ε) + λ x
    x ← x - lr · ‖x‖ / ‖u‖ · u        for each tensor x; biases and LayerNorm: x ← x - lr · u

The library's LAMB, whatever its options, leaves out both bias corrections or makes only the first, cuts ‖x‖ at 10 (the
word embeddings of BERT begin at 97) and adapts biases like everything else.
"""

import math
from collections.abc import Iterator

import pytorch_optimizer
import torch
from torch import nn


class Lamb(pytorch_optimizer.Lamb):
    """LAMB for a model's parameters or groups of them; gradients are not clipped here, that is Trainer's business.

    A group of one-dimensional parameters alone, which is where BERT's biases and LayerNorm weights are, goes without
    layerwise adaptation: x ← x - lr · u, as the paper's authors trained BERT. Say "adam" (True: without) in a group to
    have it otherwise. ε is added to ‖u‖ besides; a tensor of zeros alone, which has no ‖x‖ to go by, moves by
    lr · u · (1 - β1^t) / √(1 - β2^t).
    """

    clamp = math.inf  # of ‖x‖

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        # weight_decouple=False: λ x is part of u; adam_debias=True: the library corrects nothing, step() does
        super().__init__(params, lr, betas, weight_decay, weight_decouple=False, eps=eps, adam_debias=True)

    def add_param_group(self, group: dict) -> None:
        group["params"] = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        parameters = [given[1] if isinstance(given, tuple) else given for given in group["params"]]  # (name, parameter)
        group.setdefault("adam", all(parameter.ndim < 2 for parameter in parameters))
        super().add_param_group(group)

    def load_state_dict(self, state_dict: dict) -> None:
        """Also of a state that counted the steps of a group: of each of its parameters then."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            step = group.pop("step", None)
            for parameter in group["params"]:
                if step is not None and parameter in self.state:
                    self.state[parameter].setdefault("step", step)

    def step(self, closure=None):
        """One step with both bias corrections, whose t counts the gradients of each parameter.

        The library corrects nothing here, and takes the parameters of a group with the same t for a group.
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
