"""Reformer's layer as transformers has it, with its weights in ours: lsh attention on reversible streams."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from attention_contract import layout_of
from pretraining_models import make_config
from torch import Tensor
from transformers import BertModel, ReformerConfig
from transformers.models.reformer.modeling_reformer import ReformerLayer

from bert_pretrain.attention import use_attention
from bert_pretrain.attention.heads.lsh import num_buckets
from bert_pretrain.block import PLACEMENTS, STREAMS, use_block

WIDTH, HEADS, BUCKET, ROUNDS, LAYERS = 32, 2, 8, 2, 3


def stock_layers(length: int) -> list[Any]:
    torch.manual_seed(0)
    config = ReformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=WIDTH // HEADS,
        feed_forward_size=64,
        attn_layers=["lsh"] * LAYERS,
        lsh_attn_chunk_length=BUCKET,
        num_hashes=ROUNDS,
        num_buckets=num_buckets(length, BUCKET),
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=False,
        hidden_act="gelu",
    )
    layers = [ReformerLayer(config, index).double().train() for index in range(LAYERS)]
    for layer in layers:
        attention = layer.attention.self_attention
        attention._len_norm = partial(attention._len_norm, epsilon=0.0)  # else a key is shorter by 1e-6 of its length
    return layers


def our_layers(stock: list[Any]) -> list[Any]:
    """Layers of ours with the weights of stock ones."""
    model = BertModel(make_config(num_hidden_layers=LAYERS, layer_norm_eps=1e-12))
    use_attention(model, "lsh", bucket_size=BUCKET, num_rounds=ROUNDS, duplicates="count")
    layers: list[Any] = use_block(model, placement="pre", stream="reversible").double().train().encoder.layer
    for ours, theirs in zip(layers, stock, strict=True):
        attention, output = ours.attention.self, ours.attention.output
        with torch.no_grad():
            for bias in (attention.query.bias, attention.value.bias, output.dense.bias):
                bias.zero_()  # it has none
            # its scores are not divided by sqrt(K), so our queries are larger
            attention.query.weight.copy_(theirs.attention.self_attention.query_key.weight * (WIDTH // HEADS) ** 0.5)
            attention.value.weight.copy_(theirs.attention.self_attention.value.weight)
            output.dense.weight.copy_(theirs.attention.output.dense.weight)
        output.LayerNorm.load_state_dict(theirs.attention.layer_norm.state_dict())
        ours.intermediate.dense.load_state_dict(theirs.feed_forward.dense.dense.state_dict())
        ours.output.dense.load_state_dict(theirs.feed_forward.output.dense.state_dict())
        ours.output.LayerNorm.load_state_dict(theirs.feed_forward.layer_norm.state_dict())
    return layers


def run_stock(layers: list[Any], ours: list[Any], x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of both streams, and the gradient of its weighted sum; parameters get theirs."""
    first, second, buckets = x[None], x[None], []
    for layer, our in zip(layers, ours, strict=True):
        rotations = our.attention.self.attention_head.rotations[..., : num_buckets(len(x), BUCKET) // 2]
        with mock.patch.object(torch, "randn", lambda *_, rotations=rotations, **__: rotations):
            out = layer(first, second)
        first, second = out.attn_output, out.hidden_states
        buckets.append(out.buckets)
    result = ((first + second) / 2)[0]
    of_first = of_second = weights[None] / 2
    for layer, chosen in zip(reversed(layers), reversed(buckets), strict=True):
        back = layer.backward_pass(first, second, of_first, of_second, buckets=chosen)
        first, second = back.attn_output, back.hidden_states
        of_first, of_second = back.grad_attn_output, back.grad_hidden_states
    return result, (of_first + of_second)[0]


@pytest.mark.parametrize("length", [BUCKET, 32, 48])
def test_it_equals_reformer_layer(length):
    """Several layers with both streams: the result and the gradients. Up to one bucket stock attends fully."""
    stock = stock_layers(length)
    ours, layout = our_layers(stock), layout_of([[1] * length])
    x, weights = (torch.randn(length, WIDTH, dtype=torch.float64) for _ in range(2))
    expected, expected_gradient = run_stock(stock, ours, x, weights)
    hidden = x.clone().requires_grad_()
    (found,), _ = STREAMS["reversible"](ours, PLACEMENTS["pre"], hidden, layout)
    (found * weights).sum().backward()
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-11)
    close(found, expected)
    close(hidden.grad, expected_gradient)
    for our, theirs in zip(ours, stock, strict=True):
        close(our.attention.self.value.weight.grad, theirs.attention.self_attention.value.weight.grad)
        query_grad = theirs.attention.self_attention.query_key.weight.grad
        close(our.attention.self.query.weight.grad * (WIDTH // HEADS) ** 0.5, query_grad)
        close(our.intermediate.dense.weight.grad, theirs.feed_forward.dense.dense.weight.grad)
