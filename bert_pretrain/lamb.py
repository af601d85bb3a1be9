"""LAMB as its paper has it, from pytorch-optimizer's parts.

"Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (arXiv 1904.00962), algorithm 2, φ(z) = z:

    m ← β1 m + (1 - β1) g,  v ← β2 v + (1 - β2) g²,  u = (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + ε) + λ x
    x ← x - lr · ‖x‖ / ‖u‖ · u        for each tensor x; biases and LayerNorm: x ← x - lr · u

The library's LAMB, whatever its options, leaves out both bias corrections or makes only the first, cuts ‖x‖ at 10 (the
word embeddings of BERT begin at 97) and adapts biases like everything else.
"""

import math

import pytorch_optimizer
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
        group["params"] = [group["params"]] if isinstance(group["params"], nn.Parameter) else list(group["params"])
        group.setdefault("adam", all(parameter.ndim < 2 for parameter in group["params"]))
        super().add_param_group(group)

    def step(self, closure=None):
        """One step with both bias corrections, by what the library does without them.

        With c = √(1 - β2^t) / (1 - β1^t), u is c times the library's m / (√v + ε √(1 - β2^t)) + (λ / c) x. Since
        ‖x‖ / ‖u‖ · u does not change with c, only what is not adapted needs c · lr.
        """
        given = [{name: group[name] for name in ("lr", "eps", "weight_decay")} for group in self.param_groups]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            step = group.get("step", 0) + 1
            root = math.sqrt(1 - beta2**step)
            correction = root / (1 - beta1**step)
            group["eps"] *= root
            group["weight_decay"] /= correction
            if group["adam"]:
                group["lr"] *= correction
        try:
            return super().step(closure)
        finally:
            for group, values in zip(self.param_groups, given, strict=True):
                group.update(values)
