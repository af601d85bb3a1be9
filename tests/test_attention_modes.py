"""Attention heads in other modes and types: inference before training, autocast, mixed types, default types."""

from functools import partial

import pytest
import torch
from attention_contract import check_inference_first, heads_input, layout_of, make
from test_attention import HERE, SMALL_OPTIONS
from test_equivalence import make_config
from transformers import BertForMaskedLM

from bert_pretrain.attention import ATTENTION, pattern, use_attention
from bert_pretrain.attention.etc import EtcAttention


def builds(name):
    """The head as it is by default, and with so small options that a sequence has several chunks."""
    return [ATTENTION[name], partial(ATTENTION[name], **SMALL_OPTIONS.get(name, {}))]


# Inference before training


@pytest.mark.parametrize("name", HERE)
def test_a_batch_can_be_evaluated_first_and_trained_on_then(name):
    for build in builds(name):
        check_inference_first(build)


@pytest.mark.parametrize("name", ["sdpa", "local", "routing"])
def test_a_model_is_trained_on_a_batch_that_it_saw_in_inference_mode(name):
    """The layout is kept on the batch's own sequence_ids."""
    torch.manual_seed(0)
    model = use_attention(BertForMaskedLM(make_config()).double(), name, **SMALL_OPTIONS.get(name, {})).eval()
    ids = torch.tensor([[1] * 20 + [2] * 9 + [0] * 3 + [3] * 16])
    batch = {"input_ids": torch.randint(5, 60, ids.shape), "sequence_ids": ids}
    with torch.inference_mode():
        seen = model(**batch).logits
    logits = model.train()(**batch).logits
    logits.logsumexp(-1).sum().backward()
    assert torch.equal(logits, seen)


def test_what_flex_keeps_can_be_saved_for_backward_too(monkeypatch):
    """Its mask holds tensors of the layout; flex itself has no gradient on CPUs, so that the mask is looked into."""
    monkeypatch.setattr(pattern, "flex_functions", lambda: (lambda query, *_, **__: query, lambda mask, *_, **__: mask))
    head, layout = make(EtcAttention, window=3, global_tokens=3, execution="flex"), layout_of([[1] * 9 + [2] * 2])
    with torch.inference_mode():
        head(*heads_input(layout), layout)
    (mask_mod,) = [kept for key, kept in layout._derived.items() if key[-1] == "flex"]
    tensors = [cell.cell_contents for cell in mask_mod.__closure__]
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
    assert len(tensors) == 5 and not any(x.is_inference() for x in tensors)
