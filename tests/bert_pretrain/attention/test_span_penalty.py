"""The penalty on learned spans is a term of the loss: the same for any packing, accumulation and number of ranks."""

import json

import pytest
import torch
from pretraining_models import MAX_LENGTH, make_config
from process_group import run_ranks
from slow_training import packed_rows, unpacked_rows
from tiny_runs import history, make_folders, train
from torch.nn.parallel import DistributedDataParallel
from transformers import BertForMaskedLM

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import use_attention
from bert_pretrain.attention.heads.adaptive_span import AdaptiveSpanAttention
from collate import DataCollatorWithPacking
from collate.heads import task_for

PENALTY = 0.01
EMPTY = {"input_ids": [], "sequence_lengths": []}


@pytest.fixture
def collate(tokenizer):
    return DataCollatorWithPacking(tokenizer, pad_to=MAX_LENGTH, max_sequences_per_pack=8)


def spread_spans(model):
    """Spans that differ between heads and layers: 0.1, 0.2, 0.3, 0.4 of all tokens."""
    heads = [module for module in model.modules() if isinstance(module, AdaptiveSpanAttention)]
    for number, head in enumerate(heads):
        head.span_bias_H.data.copy_(torch.tensor([0.1, 0.2], dtype=torch.float64) + 0.2 * number)
    return [head.span_bias_H for head in heads]


def make_model(penalty=PENALTY):
    torch.manual_seed(0)
    options = {"ramp": 7, "penalty": penalty}
    model = PackedBertForPreTraining(make_config(packed_attention="adaptive_span", packed_attention_options=options))
    spread_spans(model.double())
    return model.train()


def gradients(model, batches, denominators=None):
    """{name: gradient}, and the loss, of one optimizer step with these micro-batches."""
    model.zero_grad()
    if denominators is None:
        denominators = sum(model.count_denominators(batch) for batch in batches)
    loss = 0.0
    for batch in batches:
        part = model(**batch, denominators=denominators).loss
        part.backward()
        loss += float(part.detach())
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {
        "loss": torch.tensor(loss, dtype=torch.float64)
    }


def assert_same(found, expected, tolerance=1e-12):
    scale = max(float(x.abs().max()) for x in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale, msg=name)


def test_the_loss_has_the_penalty_and_nothing_else_changes(pairs, collate):
    """The penalty is PENALTY * 48 * (0.15 + 0.35), and its gradient PENALTY * 48 / 2 for each head."""
    batch = collate(packed_rows(pairs, MAX_LENGTH))
    found, without = (gradients(make_model(penalty), [batch]) for penalty in (PENALTY, 0.0))
    without["loss"] += PENALTY * MAX_LENGTH * 0.5
    for name, value in without.items():
        value += PENALTY * MAX_LENGTH / 2 if name.endswith("span_bias_H") else 0
    assert_same(found, without)


def test_it_does_not_depend_on_packing_or_accumulation(pairs, collate):
    rows = packed_rows(pairs, MAX_LENGTH)
    model = make_model()
    expected = gradients(model, [collate(rows)])
    assert_same(gradients(model, [collate(rows[:1]), collate([EMPTY]), collate(rows[1:])]), expected)
    assert_same(gradients(model, [collate([row]) for row in unpacked_rows(rows)]), expected)


def test_a_penalty_for_each_micro_batch_would_be_caught(pairs, collate):
    rows = packed_rows(pairs, MAX_LENGTH)
    model = make_model()
    parts = [collate(rows[:1]), collate(rows[1:])]
    sequences = [model.count_denominators(batch)[-1] for batch in parts]
    expected, weighed = gradients(model, [collate(rows)]), gradients(model, parts)
    for name, value in weighed.items():
        if name.endswith("span_bias_H"):  # the whole penalty in each micro-batch, instead of its share
            value += PENALTY * MAX_LENGTH / 2
    assert len(sequences) == 2 and sequences[0] != sequences[1]
    with pytest.raises(AssertionError):
        assert_same(weighed, expected)


def _one_of_two_ranks(rank, folder):
    batches = torch.load(folder / "batches", weights_only=False)
    model = DistributedDataParallel(make_model(), find_unused_parameters=True)
    denominators = sum(model.module.count_denominators(batch) for batch in batches)
    batch = batches[rank]
    loss = model(**batch, denominators=denominators).loss * 2  # DDP takes the mean over ranks
    loss.backward()
    torch.save({name: p.grad for name, p in model.module.named_parameters()}, folder / f"rank{rank}")


@pytest.mark.long
def test_two_ranks_learn_what_one_learns(pairs, collate, tmp_path):
    rows = packed_rows(pairs, MAX_LENGTH)
    torch.save([dict(collate(rows[:2])), dict(collate(rows[2:]))], tmp_path / "batches")
    run_ranks(_one_of_two_ranks, tmp_path)
    expected = gradients(make_model(), [collate(rows)])
    del expected["loss"]
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"rank{rank}"), expected)


def test_a_stock_models_task_has_the_term_too(pairs, collate):
    batch = dict(collate(packed_rows(pairs, MAX_LENGTH)))
    batch.pop("next_sentence_label")
    losses = []
    for penalty in (PENALTY, 0.0):
        torch.manual_seed(0)
        model = use_attention(BertForMaskedLM(make_config()), "adaptive_span", ramp=7, penalty=penalty).double()
        spread_spans(model)
        losses.append(float(task_for(model)(model, batch).loss.detach()))
    assert losses[0] - losses[1] == pytest.approx(PENALTY * MAX_LENGTH * 0.5, rel=1e-9)


# A run


@pytest.mark.parametrize(("head", "own"), [("adaptive_span", '{"initial": 0.3}'), ("entmax", "{}")])
def test_a_run_that_resumes_learns_the_same_spans(head, own, tmp_path):
    """To the bit; the parameters have moved, and the log has the mean span."""
    folders = make_folders(tmp_path)
    options = {
        "attention": head,
        "attention_options": own,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }
    options |= {"learning_rate": 0.01, "weight_decay": 0.1, "attention_probs_dropout_prob": 0.0}
    assert train(folders, tmp_path / "whole", **options) == 0
    assert train(folders, tmp_path / "parts", **options | {"max_steps": 2}) == 0
    assert train(folders, tmp_path / "parts", **options) == 0
    whole, parts = (PackedBertForPreTraining.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for (name, mine), theirs in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    (learned,) = (p for name, p in whole.named_parameters() if name.endswith(("span_bias_H", "alpha_bias_H")))
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["packed_attention"] == head and learned.unique().numel() > 1
    if head == "adaptive_span":
        assert [entry["attention_span"] > 0 for entry in history(tmp_path / "whole")[:4]] == [True] * 4
