"""The checkpoint stream hands what a layer chose on to its second run."""

import pytest
import torch
from block_models import block_model, hidden_of, layout_of, run_encoder

from bert_pretrain.attention.parts.choices import chosen
from bert_pretrain.block.placements import PLACEMENTS
from bert_pretrain.block.streams import checkpointed, plain

IDS = [[1] * 9 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 13]
FACTORS = torch.tensor([2.0, 3.0], dtype=torch.float64)


class Wavering:
    """A layer that would choose otherwise in each run: out = x times a factor, 2 and then 3."""

    def __init__(self, asks: bool):
        self.runs, self.made, self.asks = 0, 0, asks

    def __call__(self, x_1TD, layout):
        self.runs += 1
        choice = chosen(self.make, below=2) if self.asks else self.make()
        return (x_1TD * FACTORS[choice]).tanh(), x_1TD.new_empty(0)

    def make(self):
        self.made += 1
        return torch.tensor(self.made - 1)


def gradient(stream, layer):
    layout = layout_of(IDS)
    hidden_TD = hidden_of(layout).div(10).requires_grad_()
    (out_TD,), _ = stream([layer], PLACEMENTS["post"], hidden_TD, layout)
    first, second = (torch.autograd.grad(out_TD.sum(), hidden_TD, retain_graph=again)[0] for again in (True, False))
    assert torch.equal(first, second)
    return first


def test_the_second_run_gets_the_choices_of_the_first():
    expected = gradient(plain, Wavering(asks=True))
    layer = Wavering(asks=True)
    assert torch.equal(gradient(checkpointed, layer), expected)
    assert (layer.runs, layer.made) == (3, 1), "forward, and two backward passes"


def test_a_layer_that_does_not_ask_chooses_again():
    """The negative control: without handing on, the gradient is that of another function."""
    layer = Wavering(asks=False)
    layout = layout_of(IDS)
    hidden_TD = hidden_of(layout).div(10).requires_grad_()
    (out_TD,), _ = checkpointed([layer], PLACEMENTS["post"], hidden_TD, layout)
    (found,) = torch.autograd.grad(out_TD.sum(), hidden_TD)
    assert layer.made == 2 and not torch.allclose(found, gradient(plain, Wavering(asks=True)))


@pytest.mark.parametrize("block", [{}, {"feed_forward": "moe"}, {"feed_forward": "moe", "balance": "bias"}], ids=str)
@pytest.mark.parametrize("head", ["sdpa", "lsh", "routing", "sinkhorn", "clustered"])
def test_layers_that_choose_have_the_gradients_of_plain(head, block):
    found = []
    for stream in ("plain", "checkpoint"):
        model, layout = block_model(head, placement="pre", stream=stream, **block), layout_of(IDS)
        out_TD, of_input, gradients = run_encoder(model, hidden_of(layout), layout)
        found.append([out_TD, of_input, *(x for x in gradients.values() if x is not None)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
