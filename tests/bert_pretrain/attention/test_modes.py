"""Attention heads in other modes and types: inference before training, autocast, mixed types, default types."""

from functools import partial
from typing import Any

import pytest
import torch
from attention_contract import (
    check_buffers_stay_wide,
    check_constant_value,
    check_default_type,
    check_float16,
    check_inference_first,
    check_mixed_types,
    heads_input,
    layout_of,
    make,
)
from pretraining_models import make_config
from small_heads import HERE, SMALL_OPTIONS
from transformers import AutoModel, BertForMaskedLM, EuroBertConfig, ModernBertConfig

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import ATTENTION, use_attention
from bert_pretrain.attention.heads.etc import EtcAttention
from bert_pretrain.attention.parts import blocks

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 48, "initializer_range": 0.3}


def builds(name):
    """The head with its defaults, and with options so small that a sequence has several chunks."""
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
    """The mask holds tensors of the layout. flex has no gradient on CPUs, so the test looks at the mask."""
    monkeypatch.setattr(blocks, "flex_attention", lambda: lambda query, *_, **__: query)
    head, layout = make(EtcAttention, window=3, global_tokens=3, execution="flex"), layout_of([[1] * 9 + [2] * 2])
    with torch.inference_mode():
        head(*heads_input(layout), layout)
    (mask,) = [kept for key, kept in layout._derived.items() if key[-1] == "flex"]
    tensors = [cell.cell_contents for cell in mask.mask_mod.__closure__]
    tensors = [x for x in (*tensors, *vars(mask).values()) if isinstance(x, torch.Tensor)]
    assert len(tensors) == 3 + 4 and not any(x.is_inference() for x in tensors)


# Types


@pytest.mark.parametrize("name", HERE)
def test_types_may_be_mixed_and_the_default_may_be_another(name):
    for build in builds(name):
        check_mixed_types(build)
        check_default_type(build)
        check_buffers_stay_wide(build)


@pytest.mark.parametrize("name", HERE)
def test_large_numbers_in_float16_stay_finite(name):
    for build in builds(name):
        check_float16(build)


@pytest.mark.parametrize("name", ["strided", "fixed"])
def test_large_numbers_in_float16_stay_finite_in_merged_patterns(name):
    check_float16(partial(ATTENTION[name], stride=4, heads="merged"), scale=100)


NO_MEAN = {
    "persistent": "learned values are mixed in",
    "routing": "0 for a token in no cluster, as published",
    "linformer": "its rows are learned, and those beyond a short sequence hold nothing",
    "nystrom": "the pseudo-inverse is approached, not reached",
    "delta": "a memory that is written to, not a mean",
    "etc_stream": "values of and from global tokens have projections of their own",
}
"""Heads whose context of a constant value is another, and why."""


@pytest.mark.parametrize("name", HERE)
def test_a_constant_value_stays_constant(name):
    for build in builds(name)[name in NO_MEAN :]:
        if name in NO_MEAN:
            with pytest.raises(AssertionError):
                check_constant_value(build)
        else:
            check_constant_value(build)


ROTARY = {
    "eurobert": EuroBertConfig(num_key_value_heads=1, **SIZES),
    "modernbert": ModernBertConfig(layer_types=["full_attention"] * 2, attention_dropout=0.0, **SIZES),
}


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("attention", ["sdpa", "local", "adaptive_span", "entmax", "routing", "lsh"])
def test_rotary_encoders_train_under_autocast(name, attention):
    """Their queries and keys are in float32, their values in bfloat16."""
    torch.manual_seed(0)
    model = use_attention(AutoModel.from_config(ROTARY[name]), attention).train()
    ids = torch.tensor([[1] * 20 + [2] * 9 + [0] * 3 + [3] * 16])
    input_ids = torch.randint(5, 60, ids.shape)
    plain = model(input_ids, sequence_ids=ids).last_hidden_state[ids > 0]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(input_ids, sequence_ids=ids).last_hidden_state[ids > 0]
    hidden.float().square().sum().backward()
    assert hidden.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if attention not in ("routing", "lsh"):  # these choose tokens, and rounding may change a choice
        assert float(((hidden - plain).norm() / plain.norm()).detach()) < 0.05


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("attention", ["local", "adaptive_span", "entmax"])
def test_rotary_encoders_keep_sequences_apart(name, attention):
    """Packed = each sequence alone, hidden states and gradients."""
    torch.manual_seed(0)
    model = use_attention(AutoModel.from_config(ROTARY[name]), attention, **SMALL_OPTIONS[attention]).double()
    ids = torch.tensor([[1] * 20 + [2] * 9 + [0] * 3 + [3] * 16])
    input_ids = torch.randint(5, 60, ids.shape)
    hidden = model(input_ids, sequence_ids=ids).last_hidden_state[ids > 0]
    own = [input_ids[:, ids[0] == number] for number in (1, 2, 3)]
    alone = torch.cat([model(each, sequence_ids=torch.ones_like(each)).last_hidden_state[0] for each in own])
    found, expected = (
        torch.autograd.grad(x.square().sum(), list(model.parameters()), allow_unused=True) for x in (hidden, alone)
    )
    torch.testing.assert_close(hidden, alone, rtol=0, atol=1e-12)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


# Centroids in 16 bits


def move(head, dtype, steps=20):
    layout = layout_of([[1] * 40])
    for seed in range(steps):
        inputs = [x.to(dtype).requires_grad_() for x in heads_input(layout, seed)]
        head(*inputs, layout).sum().backward()
        head.update_centroids()
    return head.centroids_HCK.double()


def test_centroids_move_as_far_in_bfloat16_as_in_float32():
    """After its first steps a centroid keeps 0.999 of itself: in 16 bits most steps would round to zero."""

    def moved(dtype):
        head = make(ATTENTION["routing"], num_clusters=1).to(dtype)
        head.num_updates += 100_000
        before = head.centroids_HCK.double()
        return move(head, dtype) - before

    expected = moved(torch.float32)
    assert float((moved(torch.bfloat16) - expected).norm() / expected.norm()) < 0.02


def test_centroids_move_as_far_under_autocast():
    def moved(autocast):
        head = make(ATTENTION["routing"], num_clusters=1).float()
        before = head.centroids_HCK.double()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return move(head, torch.bfloat16) - before

    assert torch.equal(moved(True), moved(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_centroids_are_saved_and_loaded_in_float32(dtype, tmp_path):
    config = make_config(packed_attention="routing")
    model = PackedBertForPreTraining(config).to(dtype)
    heads = [m for m in model.modules() if isinstance(m, ATTENTION["routing"])]
    heads[0].centroids_HCK.add_(1e-6)
    model.save_pretrained(tmp_path)
    again = PackedBertForPreTraining.from_pretrained(tmp_path, dtype=dtype)
    found = [m for m in again.modules() if isinstance(m, ATTENTION["routing"])]
    assert again.dtype == dtype
    for head, loaded in zip(heads, found, strict=True):
        assert loaded.centroids_HCK.dtype == torch.float32 and torch.equal(loaded.centroids_HCK, head.centroids_HCK)
