"""Experts on a GPU: the grouped product against one product an expert, and models that wait for nothing."""

from unittest import mock

import pytest
import torch
from attention_contract import layout_of
from pretraining_models import make_config

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.block.feed_forwards.moe import MixtureOfExperts
from collate import PackLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BLOCK = {"feed_forward": "moe", "experts": 8, "top_k": 2}
IDS = [[1] * 100 + [2] * 28 + [3] * 60 + [0] * 68, [1] * 250 + [0] * 6]


def small_bert(**block):
    torch.manual_seed(0)
    config = make_config(hidden_size=64, intermediate_size=128, max_position_embeddings=256, block=BLOCK | block)
    return PackedBertForPreTraining(config).cuda()


def mixture(**block):
    return next(module for module in small_bert(**block).modules() if isinstance(module, MixtureOfExperts))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [438, 3])  # of 3 tokens some experts get none
def test_the_grouped_product_is_the_loop(gated, tokens):
    moe = mixture(gated=gated).bfloat16()
    layout = PackLayout(torch.ones(1, tokens, dtype=torch.int32, device="cuda"))
    hidden_TD, results = torch.randn(tokens, 64, device="cuda").bfloat16(), []
    for grouped in (True, False):
        moe.zero_grad()
        inputs = hidden_TD.clone().requires_grad_()
        with mock.patch("bert_pretrain.block.feed_forwards.moe.is_grouped", lambda *_, grouped=grouped: grouped):
            out_TD, _ = moe(inputs, layout)
        out_TD.float().square().sum().backward()
        results.append([out_TD.detach(), inputs.grad, *(p.grad for p in moe.parameters())])
    for found, expected in zip(*results, strict=True):
        scale = max(float(expected.float().abs().max()), 1e-3)
        assert float((found.float() - expected.float()).abs().max()) <= 0.03 * scale


@pytest.mark.parametrize("balance", ["sequence", "bias"])
def test_a_model_in_bfloat16_is_near_one_on_a_cpu(balance):
    model = small_bert(balance=balance).train()
    words = torch.arange(2 * 256).view(2, 256) % 50 + 5
    batch = {"input_ids": words, "sequence_ids": layout_of(IDS).sequence_ids_BL}
    batch["labels"] = torch.where((words % 7 == 0) & (batch["sequence_ids"] > 0), words, -100)
    on_gpu = {name: x.cuda() for name, x in batch.items()}
    with torch.autocast("cuda", torch.bfloat16):
        found = model(**on_gpu).loss
    found.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    expected = model.cpu()(**batch).loss
    assert float((found.cpu() - expected).abs().detach()) < 0.05 * float(expected.detach())
