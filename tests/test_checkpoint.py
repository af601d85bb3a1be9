"""Checkpoints are stock BERT's, tensor for tensor, in both directions."""

import json

import pytest
import torch
from test_equivalence import make_config, make_models
from transformers import BertForMaskedLM, BertForPreTraining

from bert_pretrain import PackedBertForPreTraining

NOTHING = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
NOT_IN_MASKED_LM = {
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
}
WORDS = torch.tensor([[2, 17, 23, 8, 3, 40, 3]])
TYPES = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
ONE_SEQUENCE = torch.ones_like(WORDS)


def load(model_class, folder):
    model, report = model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    return model.eval(), {name: set(report[name]) for name in NOTHING}


def test_stock_bert_reads_our_checkpoint(tmp_path):
    _, packed = make_models()
    packed.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForPreTraining"]
    stock, report = load(BertForPreTraining, tmp_path)
    assert report == NOTHING
    ours = packed.eval()(WORDS, ONE_SEQUENCE, token_type_ids=TYPES)
    theirs = stock(WORDS, token_type_ids=TYPES)
    torch.testing.assert_close(ours.prediction_logits, theirs.prediction_logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.seq_relationship_logits, theirs.seq_relationship_logits, rtol=0, atol=1e-12)


def test_masked_lm_reads_our_checkpoint(tmp_path):
    _, packed = make_models()
    packed.save_pretrained(tmp_path)
    stock, report = load(BertForMaskedLM, tmp_path)
    assert report == NOTHING | {"unexpected_keys": NOT_IN_MASKED_LM}
    ours = packed.eval()(WORDS, ONE_SEQUENCE, token_type_ids=TYPES).prediction_logits
    torch.testing.assert_close(ours, stock(WORDS, token_type_ids=TYPES).logits, rtol=0, atol=1e-12)


def test_we_read_a_stock_checkpoint(tmp_path):
    stock, _ = make_models()
    stock.save_pretrained(tmp_path)
    packed, report = load(PackedBertForPreTraining, tmp_path)
    assert report == NOTHING
    ours = packed(WORDS, ONE_SEQUENCE, token_type_ids=TYPES)
    theirs = stock.eval()(WORDS, token_type_ids=TYPES)
    torch.testing.assert_close(ours.prediction_logits, theirs.prediction_logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.seq_relationship_logits, theirs.seq_relationship_logits, rtol=0, atol=1e-12)


def test_a_checkpoint_returns_to_us_as_it_was(tmp_path):
    _, packed = make_models("token")
    packed.save_pretrained(tmp_path)
    again, report = load(PackedBertForPreTraining, tmp_path)
    assert report == NOTHING
    assert again.config.mlm_loss == "token" and again.config.packed_attention == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones_like(WORDS)}, "no attention_mask"),
        ({}, "needs sequence_ids"),
        (
            {"sequence_ids": ONE_SEQUENCE, "next_sentence_label": torch.zeros(1, 1, dtype=torch.long)},
            "needs cls_positions",
        ),
    ],
)
def test_inputs_that_cannot_tell_sequences_apart_are_refused(inputs, message):
    _, packed = make_models()
    with pytest.raises(ValueError, match=message):
        packed(WORDS, **inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlm_loss": "batch"}, "unknown mlm_loss 'batch'"),
        ({"packed_attention": "full"}, "unknown attention 'full'; choose from .*'sdpa'"),
        ({"packed_attention": ["sdpa"]}, "1 attention heads for 2 layers"),
        ({"is_decoder": True}, "is for encoders"),
    ],
)
def test_configs_we_cannot_honour_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PackedBertForPreTraining(make_config(**changes))
