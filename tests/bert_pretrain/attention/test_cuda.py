"""Attention heads on a GPU: the kernels that CPUs do not have, against exact attention per sequence."""

import pytest
import torch
from attention_contract import heads_input, layout_of
from transformers import BertConfig

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.choice import choose_attention
from bert_pretrain.attention.parts import blocks
from collate import PackLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
IDS = [[1] * 100 + [2] * 28 + [3] * 60 + [0] * 68, [1] * 250 + [0] * 6, [0] * 5 + [1] * 17 + [2] * 200 + [3] * 34]


def run(attention, layout, inputs, dtype):
    inputs = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    context = attention(*inputs, layout)
    (context.float() * torch.linspace(-1, 1, context.numel(), device="cuda").view_as(context)).sum().backward()
    return [context.detach().float().cpu(), *(x.grad.float().cpu() for x in inputs)]


@pytest.mark.parametrize("name", ATTENTION)
def test_a_gpu_computes_what_a_cpu_does(name):
    """bfloat16 on the GPU beside float32 on the CPU, values and gradients; full attention beside sdpa."""
    layout, on_gpu = layout_of(IDS), PackLayout(torch.tensor(IDS, device="cuda"))
    inputs = [x / 3 for x in heads_input(layout, heads=2, width=64)]
    sizes = {"num_heads": 2, "head_width": 64, "max_sequence_length": 256}
    torch.manual_seed(0)
    twin = ATTENTION["sdpa" if name in ("varlen", "flex") else name](**sizes).float()
    torch.manual_seed(0)
    attention = ATTENTION[name](**sizes).to("cuda", torch.bfloat16 if name == "varlen" else torch.float32)
    dtype = torch.bfloat16 if name == "varlen" else torch.float32
    expected_inputs = [x.float().requires_grad_() for x in inputs]
    context = twin(*expected_inputs, layout)
    (context * torch.linspace(-1, 1, context.numel()).view_as(context)).sum().backward()
    expected = [context.detach(), *(x.grad for x in expected_inputs)]
    tolerance = 3e-2 if name == "varlen" else 2e-3
    for found, wanted in zip(run(attention, on_gpu, inputs, dtype), expected, strict=True):
        assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@pytest.mark.parametrize("name", ATTENTION)
def test_a_mate_changes_nothing_on_a_gpu(name):
    layout = PackLayout(torch.tensor([[1] * 100 + [2] * 28 + [3] * 60 + [0] * 68], device="cuda"))
    dtype = torch.bfloat16 if name == "varlen" else torch.float32
    attention = ATTENTION[name](num_heads=2, head_width=64, max_sequence_length=256).to("cuda", dtype)
    inputs = [x.to("cuda", dtype) for x in heads_input(layout_of(layout.sequence_ids_BL.cpu()), heads=2, width=64)]
    mate = (layout.sequence_of_token == 1)[:, None, None]
    before = attention(*inputs, layout)
    after = attention(*(torch.where(mate, x.flip(0) * 100, x) for x in inputs), layout)
    moved = float((after - before)[~mate.flatten()].abs().max())
    assert moved <= (1e-5 if name == "routing" else 0)  # a GPU adds a token's clusters up in any order


def small_bert(attention):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    config = BertConfig(vocab_size=100, max_position_embeddings=256, packed_attention=attention, **sizes, **off)
    return PackedBertForPreTraining(config)


def loss_and_gradients(model, ids, dtype):
    device = model.device
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 100, ids.shape, generator=generator)
    labels = torch.where((torch.rand(ids.shape, generator=generator) < 0.3) & (ids > 0), input_ids, -100)
    batch = {"input_ids": input_ids, "sequence_ids": ids, "labels": labels}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = model(**{name: x.to(device) for name, x in batch.items()}).loss
    loss.backward()
    return float(loss), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bert_with_the_attention_that_auto_chooses(dtype):
    """A whole model under autocast: loss and gradients beside those of a CPU in float32."""
    name, _ = choose_attention(torch.device("cuda"), dtype, head_width=64)
    assert name in ("varlen", "flex")
    ids = torch.tensor(IDS, dtype=torch.int32)
    expected, gradients = loss_and_gradients(small_bert("sdpa"), ids, torch.float32)
    found, found_gradients = loss_and_gradients(small_bert(name).cuda(), ids, dtype)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 5e-3
    assert abs(found - expected) <= tolerance * expected and found_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        # a bias of keys has a gradient of 0, up to rounding
        allowed = tolerance * max(float(gradient.norm()), 1e-2)
        assert float((found_gradients[key] - gradient).norm()) <= 2 * allowed, key


def test_flex_makes_one_mask_for_all_layers_of_a_batch(monkeypatch):
    made, make = [], blocks.block_mask
    monkeypatch.setattr(blocks, "block_mask", lambda *args: made.append(1) or make(*args))
    model = small_bert("flex").cuda()
    for width in (250, 100, 37):  # a different number of tokens each time
        loss, gradients = loss_and_gradients(model, torch.tensor(IDS, dtype=torch.int32)[:, :width], torch.float32)
        assert loss > 0 and gradients
    assert len(made) == 3
