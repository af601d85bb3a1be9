"""Models with a reversible stream: whole blocks, beside the same two streams under ordinary autograd."""

import copy

import pytest
import torch
from block_models import HEAD_OPTIONS, hidden_of, layout_of
from pretraining_models import make_config
from process_group import process_group
from slow_streams import two_streams
from small_heads import HERE, SMALL_OPTIONS
from torch.distributed.fsdp import fully_shard

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import ATTENTION, AttentionHead
from bert_pretrain.attention.head import prepare_heads
from bert_pretrain.block import FEED_FORWARDS, reversible
from bert_pretrain.block.branches import added_up
from bert_pretrain.block.reversible import reversed_layers, steps_of

IDS = [[1] * 20 + [2] * 9 + [0] * 4 + [3] * 15, [1] * 7 + [2] * 5 + [3] * 33 + [4] * 3]


def model_of(head="sdpa", layers=3, **block):
    """In float64, in training, with dropout wherever the head allows it."""
    torch.manual_seed(0)
    config = make_config(
        num_hidden_layers=layers,
        block={"placement": "pre", "stream": "reversible", **block},
        packed_attention=head,
        packed_attention_options=SMALL_OPTIONS.get(head, HEAD_OPTIONS.get(head, {})),
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1 if getattr(ATTENTION[head], "supports_dropout", False) else 0.0,
    )
    return PackedBertForPreTraining(config).double().train()


def kept_stream(layers, placement, hidden_TD, layout):
    """A slow twin for STREAMS: it keeps everything."""
    result_TD, sums = two_streams(steps_of(layers, placement, hidden_TD.dtype), hidden_TD, layout)
    of_layers = [torch.cat(pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
    return placement.begin(result_TD.to(hidden_TD.dtype)), added_up(of_layers)


def run(model, stream, layout, dtype=torch.float64):
    """The result, and the gradients of it and of what the layers add to the loss: of the input, and of all weights."""
    encoder = model.bert.encoder
    encoder.stream = stream
    encoder.zero_grad()
    prepare_heads([module for module in encoder.modules() if isinstance(module, AttentionHead)], layout)
    hidden_TD, weights_TD = (hidden_of(layout, seed=seed).to(dtype) for seed in (0, 1))
    torch.manual_seed(3)
    found = encoder(hidden_TD.requires_grad_()[None], layout=layout)
    out_TD = found.last_hidden_state[0]
    ((out_TD * weights_TD).sum() + sum(found.loss_sums.values())).backward()
    return out_TD.detach(), hidden_TD.grad, torch.cat([p.grad.flatten() for p in encoder.parameters()])


def assert_same(model):
    layout = layout_of(IDS)
    for found, expected in zip(run(model, reversed_layers, layout), run(model, kept_stream, layout), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("head", HERE)
def test_gradients_with_every_head(head):
    assert_same(model_of(head))


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
@pytest.mark.parametrize("others", [{}, {"norm": "rms"}, {"share_layers": True}], ids=str)
def test_gradients_in_every_block(feed_forward, others, chunk_size):
    assert_same(model_of(feed_forward=feed_forward, chunk_size=chunk_size, **others))


def distance(found, exact):
    return float((found[2].double() - exact[2].double()).norm() / exact[2].double().norm())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
@pytest.mark.parametrize("head", ["sdpa", "lsh", "routing", "sinkhorn", "linear"])
def test_gradients_in_16_bits_are_as_exact_as_of_a_stream_that_keeps_everything(head, feed_forward, weights):
    """Autocast over weights in float32, or weights in 16 bits: at most 1.5 times as far from those in float32."""
    model, layout = model_of(head, layers=4, feed_forward=feed_forward).float(), layout_of(IDS)
    model.to(weights).float()
    exact = run(model, kept_stream, layout, torch.float32)
    model.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        plain, found = (run(model, stream, layout, weights) for stream in (kept_stream, reversed_layers))
    assert found[0].dtype == plain[0].dtype
    assert distance(found, exact) <= 1.5 * distance(plain, exact)
    assert distance(found, plain) <= 0.5 * distance(plain, exact)


@pytest.mark.parametrize("head", ["sdpa", "lsh"])
def test_24_layers_whose_weights_are_large_lose_nothing_in_16_bits(head, monkeypatch):
    """Branches add as much as they read, as in a trained model. With streams of float32 it would show."""
    model, layout = model_of(head, layers=24).float(), layout_of(IDS)
    with torch.no_grad():
        for weight in model.bert.encoder.parameters():
            if weight.dim() == 2:
                weight *= 1.1 / (weight.shape[1] ** 0.5 * weight.std())
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = (run(model, stream, layout, torch.float32) for stream in (kept_stream, reversed_layers))
        monkeypatch.setattr(reversible, "wide", torch.Tensor.float)
        narrow = run(model, reversed_layers, layout, torch.float32)
    assert distance(found, plain) <= 1e-4
    assert distance(narrow, plain) >= max(1e-3, 10 * distance(found, plain))


def pretraining_loss(model):
    words = torch.arange(96).reshape(2, 48) % 50 + 5
    return model(words, sequence_ids=torch.tensor(IDS), labels=torch.where(words % 3 == 0, words, -100)).loss


def check_fsdp():
    alone, whole, by_layer = (copy.deepcopy(model_of().eval()) for _ in range(3))
    pretraining_loss(alone).backward()
    fully_shard(whole)
    pretraining_loss(whole).backward()
    for found, expected in zip(whole.parameters(), alone.parameters(), strict=True):
        if expected.grad is not None:
            assert torch.equal(found.grad.full_tensor(), expected.grad)
    for layer in by_layer.bert.encoder.layer:
        fully_shard(layer)
    with pytest.raises(ValueError, match="shard the model as a whole"):
        pretraining_loss(fully_shard(by_layer))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # nobody writes into the result
def test_fsdp_shards_the_model_as_a_whole(tmp_path):
    with process_group(tmp_path):
        check_fsdp()
