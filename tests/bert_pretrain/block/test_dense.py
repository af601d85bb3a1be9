"""The dense feed-forward: gates, and chunks of tokens that backward computes again."""

import copy
import re

import pytest
import torch
from attention_contract import LAYOUTS, layout_of
from torch.nn import functional as F
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput

from bert_pretrain.block import BlockOptions
from bert_pretrain.block.feed_forwards.dense import DenseFeedForward, GatedIntermediate, chunk_by_chunk

WIDTH, INNER = 8, 64
IDS = LAYOUTS["long and short"]


def make_parts(**changes):
    config = BertConfig(hidden_size=WIDTH, intermediate_size=INNER, initializer_range=0.4, **changes)
    torch.manual_seed(0)
    return config, BertIntermediate(config).double(), BertOutput(config).double()


def make_dense(**options):
    config, intermediate, output = make_parts(hidden_dropout_prob=0.1)
    dense = DenseFeedForward(config, BlockOptions(**options), 0)
    dense.from_dense(intermediate, output)
    return dense


def hidden_of(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layout.num_tokens, WIDTH, generator=generator, dtype=torch.float64)


def run(dense, layout, weights=True):
    """Output with dropout, and all gradients."""
    dense.zero_grad()
    torch.manual_seed(3)
    hidden_TD = hidden_of(layout).requires_grad_()
    out_TD, sums = dense(hidden_TD, layout)
    assert sums.shape == (0,)
    (out_TD * hidden_of(layout, 1)).sum().backward()
    return [out_TD.detach(), hidden_TD.grad, *(p.grad for p in dense.parameters() if p.grad is not None)]


def test_stock_bert_bit_for_bit():
    dense, layout = make_dense(), layout_of(IDS)
    found = run(dense, layout)
    torch.manual_seed(3)
    expected = dense.output.dropout(dense.output.dense(dense.intermediate(hidden_of(layout))))
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("gated", [False, True])
def test_chunks_change_nothing(chunk_size, gated):
    """Output and gradients, dropout on; the last chunk is short. One chunk alone is the same bit for bit."""
    layout = layout_of(IDS)
    expected, found = run(make_dense(gated=gated), layout), run(make_dense(gated=gated, chunk_size=chunk_size), layout)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0 if chunk_size == 1000 else 1e-11)


def kept_numbers(chunk_size):
    """How many numbers the graph of one pass holds, beside its parameters."""
    dense, layout = make_dense(chunk_size=chunk_size), layout_of([[1] * 200])
    dense.eval()  # a dropout's mask has the outer width, with chunks or without
    held = {}
    parameters = {p.data_ptr() for p in dense.parameters()}

    def hold(x):
        if x.untyped_storage().data_ptr() not in parameters:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 8
        return x

    hidden_TD = hidden_of(layout).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        out_TD, _ = dense(hidden_TD, layout)
    out_TD.sum().backward()
    return sum(held.values())


def test_chunks_keep_nothing_of_the_inner_width():
    assert kept_numbers(None) >= 2 * 200 * INNER
    assert kept_numbers(50) < 200 * INNER


def test_chunks_in_evaluation_keep_no_graph():
    dense, layout = make_dense(chunk_size=7), layout_of(IDS)
    with torch.no_grad():
        found, _ = dense.eval()(hidden_of(layout), layout)
        expected, _ = make_dense().eval()(hidden_of(layout), layout)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert chunk_by_chunk(lambda x: x * 2, 3, torch.zeros(0, 2)).shape == (0, 2)


def test_a_gate_by_hand():
    """act(W₁ x + b₁) · (V x + c), as in 2002.05202; a new one changes nothing, bit for bit."""
    plain, gated, layout = make_dense().eval(), make_dense(gated=True).eval(), layout_of(IDS)
    hidden_TD = hidden_of(layout)
    assert torch.equal(gated(hidden_TD, layout)[0], plain(hidden_TD, layout)[0])
    with torch.no_grad():
        gated.intermediate.up.weight.normal_()
        gated.intermediate.up.bias.normal_()
    intermediate, output = gated.intermediate, gated.output.dense
    inner = F.gelu(hidden_TD @ intermediate.dense.weight.T + intermediate.dense.bias)
    inner = inner * (hidden_TD @ intermediate.up.weight.T + intermediate.up.bias)
    torch.testing.assert_close(gated(hidden_TD, layout)[0], inner @ output.weight.T + output.bias, rtol=0, atol=1e-12)


def test_a_gate_stays_and_learns():
    gated, layout = make_dense(gated=True), layout_of(IDS)
    run(gated, layout)
    assert gated.intermediate.up.weight.grad.any()
    again = DenseFeedForward(make_parts()[0], BlockOptions(gated=True), 0)
    again.from_dense(gated.intermediate, gated.output)
    assert again.intermediate is gated.intermediate
    ungated = DenseFeedForward(make_parts()[0], BlockOptions(), 0)
    with pytest.raises(ValueError, match=re.escape("gated=False cannot take a gate out of a trained feed-forward")):
        ungated.from_dense(gated.intermediate, gated.output)
    drawn = copy.deepcopy(gated.intermediate)
    drawn.reset_parameters()
    assert isinstance(drawn, GatedIntermediate) and drawn.up.weight.std() > 0.2 and not drawn.up.bias.any()
