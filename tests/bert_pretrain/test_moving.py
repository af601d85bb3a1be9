"""Buffers that move after a step: one call serves every module that has them, by whatever trains."""

import torch
from torch import nn
from training_runs import make_packs, make_trainer

from bert_pretrain.attention.heads import routing
from bert_pretrain.moving import (
    AfterStepCallback,
    MovesAfterStep,
    after_step,
    moves_after_step,
    update_after_step,
)


class Counting(MovesAfterStep):
    """A module of anyone's: its buffer is the number of rows that it saw in training."""

    def __init__(self):
        super().__init__()
        self.register_at_least_float32("seen", ())
        self.seen.zero_()

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            x = self.collected(x, torch.tensor(len(x)))
        return x

    def after_step(self):
        if self._statistics is not None:
            self.seen += self.over_ranks(*self._statistics)
        self.forget()


class Bare(nn.Module):
    moved = 0

    def after_step(self):
        self.moved += 1


def test_what_backward_saw_counts_once():
    module = Counting()
    x = torch.ones(3, 2, requires_grad=True)
    for _ in range(2):
        module(x).sum().backward()
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).sum().backward()
    module(x)  # nobody asks for its gradient
    with torch.no_grad():
        module(x)
    module.eval()(x).sum().backward()
    assert module.seen == 0
    after_step(module)
    assert module.seen == 9
    after_step(module)  # a second callback moves nothing
    assert module.seen == 9


def test_every_kind_of_module_is_served():
    model = nn.Sequential(nn.Linear(2, 2), Counting(), Bare())
    assert moves_after_step(model) and not moves_after_step(model[0])
    optimizer = torch.optim.SGD(model[:1].parameters(), lr=0.1)
    handle = update_after_step(optimizer, model)
    model[:2](torch.ones(3, 2)).sum().backward()
    optimizer.step()
    assert model[1].seen == 3 and model[2].moved == 1
    handle.remove()
    optimizer.step()
    assert model[2].moved == 1


def test_under_trainer():
    """A callback moves them once a step, however many passes it has; the old names are the same."""
    with make_trainer(
        train_dataset=make_packs(8), per_device_train_batch_size=2, gradient_accumulation_steps=2
    ) as trainer:
        trainer.model.bare, trainer.model.counting = Bare(), Counting()
        trainer.model.bert.encoder.register_forward_hook(
            lambda _, inputs, output: output.__class__(trainer.model.counting(output.last_hidden_state))
        )
        trainer.add_callback(routing.RoutingCallback())
        trainer.train()
    assert trainer.state.global_step == trainer.model.bare.moved == 2
    assert trainer.model.counting.seen == 4  # passes of one long row each
    assert routing.RoutingCallback is AfterStepCallback and routing.update_after_step is update_after_step
    assert routing.update_centroids is after_step


def test_buffers_stay_wide():
    module = nn.Sequential(nn.Linear(1, 1), Counting()).bfloat16()
    assert module[0].weight.dtype == torch.bfloat16 and module[1].seen.dtype == torch.float32
    assert module.double()[1].seen.dtype == torch.float64
