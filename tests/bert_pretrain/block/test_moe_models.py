"""Models with experts: any packing, accumulation, number of ranks; checkpoints; stock models; `bert-pretrain train`."""

import copy
import json
from functools import partial

import pytest
import torch
from block_models import block_model
from pretraining_models import MAX_LENGTH, make_config, make_models
from slow_training import packed_rows, unpacked_rows
from stock_runs import make_model, train, train_plain
from tiny_runs import history, make_folders
from tiny_runs import train as command
from training_runs import EXPERTS
from training_runs import train as train_packed

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.block import STREAMS, use_block
from bert_pretrain.block.feed_forwards.moe import MixtureOfExperts
from collate import DataCollatorWithPacking

EXPERT_OPTIONS = {"feed_forward": "moe", "experts": 4, "top_k": 2}
LOGGED = {"sequence": ("balance_loss", "router_z_loss"), "bias": ("router_z_loss",)}


@pytest.fixture
def collate(tokenizer):
    return DataCollatorWithPacking(tokenizer, pad_to=MAX_LENGTH, max_sequences_per_pack=8)


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("balance", EXPERTS)
def test_packing_changes_nothing(pairs, collate, balance, stream):
    """The loss with its terms, all gradients, and what the bias has counted, once."""
    rows, found = packed_rows(pairs, MAX_LENGTH), []
    for given in (rows, unpacked_rows(rows)):
        model = block_model(**EXPERT_OPTIONS, balance=balance, stream=stream, placement="pre")
        output = model(**collate(given))
        output.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        counts = [moe._statistics[0] for moe in mixtures(model)] if balance == "bias" else []
        found.append([output.loss.detach(), *gradients, *counts])
        assert {"loss", *LOGGED[balance]} <= model.metrics(output.sums).keys()
    largest = max(float(x.abs().max()) for x in found[1])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * (largest if x.is_floating_point() else 0))


@pytest.mark.parametrize("balance", EXPERTS)
def test_accumulation_and_ranks_change_nothing(two_processes, balance):
    change = EXPERTS[balance]
    expected = train_packed(17, 16, 1, "sequence", change)
    for found in (train_packed(17, 4, 4, "sequence", change), two_processes[f"experts, {balance}"]):
        for x, y in zip(found["parameters"], expected["parameters"], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
        assert found["buffers"].keys() == expected["buffers"].keys()
        assert all(torch.equal(x, expected["buffers"][name]) for name, x in found["buffers"].items())
        for step, other in zip(found["steps"], expected["steps"], strict=True):
            for name in ("loss", *LOGGED[balance]):
                assert step[name] == pytest.approx(other[name], rel=1e-6)
        assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-9)
    biases = [x for name, x in expected["buffers"].items() if name.endswith("bias_E")]
    assert len(biases) == (2 if balance == "bias" else 0) and all(x.any() for x in biases)


def test_an_upcycled_model_computes_what_the_dense_one_did(pairs, collate):
    _, model = make_models()
    batch = collate(packed_rows(pairs, MAX_LENGTH))
    inputs = {name: batch[name] for name in ("input_ids", "sequence_ids", "position_ids", "token_type_ids")}
    expected = model(**inputs).prediction_logits
    names = {name for name, _ in model.named_parameters()}
    mixed = use_block(copy.deepcopy(model), **EXPERT_OPTIONS)
    torch.testing.assert_close(mixed(**inputs).prediction_logits, expected, rtol=0, atol=1e-10)
    assert {name for name, _ in mixed.named_parameters()} & names
    first, second = (moe.experts[0].dense.weight for moe in mixtures(mixed))
    assert torch.equal(first, model.bert.encoder.layer[0].output.dense.weight) and not torch.equal(first, second)
    with pytest.raises(ValueError, match="experts=3 cannot be made of a model with 4 trained experts"):
        use_block(mixed, experts=3)
    changed = use_block(mixed, balance="bias", top_k=1)
    (moe, _) = mixtures(changed)
    assert moe.options.top_k == 1 and not moe.bias_E.any() and moe.experts[0].dense.weight is first


def test_a_new_model_draws_its_experts_apart():
    torch.manual_seed(0)
    model = PackedBertForPreTraining(make_config(block=EXPERT_OPTIONS | {"gated": True}))
    for moe in mixtures(model):
        for part in ("dense.weight", "intermediate.dense.weight", "intermediate.up.weight"):
            weights = [expert.get_parameter(part) for expert in moe.experts]
            assert all(0.25 < float(weight.std().detach()) < 0.35 for weight in weights)
            assert not any(torch.equal(weights[0], other) for other in weights[1:])
        assert not moe.experts[0].dense.bias.any() and 0.2 < float(moe.router.weight.std().detach()) < 0.4


@pytest.mark.parametrize("more", [{"gated": True}, {"balance": "bias"}], ids=["gated", "bias"])
def test_a_model_with_experts_comes_back(tmp_path, pairs, collate, more):
    model = block_model(**EXPERT_OPTIONS, **more).eval()
    for moe in mixtures(model):
        if moe.options.balance == "bias":
            moe.bias_E.normal_()
    model.save_pretrained(tmp_path)
    loaded = PackedBertForPreTraining.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    again, found = loaded
    assert not found["missing_keys"] and not found["unexpected_keys"]
    batch = collate(packed_rows(pairs, MAX_LENGTH))
    for x, y in zip(again.eval().state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(again(**batch).loss, model(**batch).loss)


def test_a_stock_model_trains_with_experts():
    """PackedTrainer adds the terms there, too; by accumulation or not."""
    expected, found = (train("mlm", *passes, change=EXPERTS["sequence"]) for passes in ((16, 1), (4, 4)))
    for x, y in zip(found["parameters"], expected["parameters"], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    for step, other in zip(found["steps"], expected["steps"], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-6) and step["balance_loss"] > 0
        weighted = 0.5 * step["balance_loss"] + 0.1 * step["router_z_loss"]
        assert step["loss"] == pytest.approx(step["mlm_loss_per_token"] + weighted, rel=1e-6)
    assert len(mixtures(EXPERTS["sequence"](make_model("mlm")))) == 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("experts"))


def test_a_run_with_experts_logs_their_terms_and_resumes(folders, tmp_path):
    block = json.dumps({**EXPERT_OPTIONS, "balance": "bias", "bias_speed": 0.01})
    options = {"num_hidden_layers": 2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    options |= {"hidden_dropout_prob": 0.0, "block": block}
    assert command(folders, tmp_path / "whole", **options) == 0
    assert command(folders, tmp_path / "parts", max_steps=2, **options) == 0
    assert command(folders, tmp_path / "parts", **options) == 0
    logs = [[entry for entry in history(tmp_path / name) if "loss" in entry] for name in ("whole", "parts")]
    assert [[entry["loss"], entry["router_z_loss"]] for entry in logs[0]] == [
        [entry["loss"], entry["router_z_loss"]] for entry in logs[1]
    ]
    whole, parts = (PackedBertForPreTraining.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    assert any(moe.bias_E.any() for moe in mixtures(whole))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4}, "experts=4 is for experts, which feed_forward='dense' does not have"),
        ({"experts": 8}, "experts=8 is for experts"),  # the default, which nobody who has none should give
        ({"gated": True, "balance": "sequence"}, "balance='sequence' is for experts"),
        ({"feed_forward": "moe", "balance": "bias", "balance_weight": 0.01}, "balance_weight=0.01 has no meaning with"),
        ({"feed_forward": "moe", "experts": 1}, r"top_k=2 must be a whole number, 1 to 1; a token goes to some"),
        ({"feed_forward": "moe", "experts": 0}, "experts=0 must be a whole number, at least 1"),
        ({"feed_forward": "moe", "balance": "sequences"}, "unknown balance 'sequences'; did you mean 'sequence'"),
        ({"feed_forward": "moe", "z_loss": -1}, "z_loss=-1 must be a number from 0 on; 0 turns it off"),
        ({"feed_forward": "moe", "bias_speed": True}, "bias_speed=True must be a number"),
        ({"feed_forward": "moe", "bias_speed": 0.1}, "bias_speed=0.1 has no meaning with balance='sequence'"),
        ({"gated": 1}, "gated=1 must be true or false"),
    ],
)
def test_what_options_are_wrong_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        use_block(make_models()[1], **options)


def test_a_plain_trainer_is_refused_where_experts_add_to_the_loss():
    """With a bias that moves and no z-loss they add nothing."""
    for options, names in (({}, "balance_loss, router_z_loss"), ({"balance": "bias"}, "router_z_loss")):
        with pytest.raises(ValueError, match=f"add {names} to its loss, which its own forward leaves out"):
            train_plain(change=partial(use_block, **EXPERT_OPTIONS, **options))
    train_plain(change=partial(use_block, **EXPERT_OPTIONS, balance="bias", z_loss=0), max_steps=1)
