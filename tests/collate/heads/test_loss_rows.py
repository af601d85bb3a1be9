"""Terms that modules add to a loss: their value and gradients by hand, for any packing, accumulation and ranks."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from adding_models import LOGGED, Scale, terms_by_hand, weighted, with_terms
from pretraining_models import MAX_LENGTH, alone, make_models
from slow_training import packed_rows, pretraining_one_by_one
from stock_runs import make_collator, make_model, make_packs, train_plain
from stock_runs import make_trainer as make_stock_trainer
from stock_runs import train as train_stock
from torch import nn
from training_runs import train

from collate import DataCollatorWithPacking, PackedTrainer, PackLayout, task_for, to_device
from collate.heads.loss_rows import added_sums, rows_of
from collate.heads.table import with_rows_of
from collate.losses import Mean, count_denominators, pretraining_loss

EMPTY = {"input_ids": [], "sequence_lengths": []}


@pytest.fixture
def collate(tokenizer):
    return DataCollatorWithPacking(tokenizer, pad_to=MAX_LENGTH, max_sequences_per_pack=8)


@pytest.fixture
def rows(pairs):
    pairs[3]["next_sentence_label"] = -100
    return packed_rows(pairs, MAX_LENGTH)


def adding_models():
    """A stock model whose last layer is scaled as by the other's modules; and one whose modules add terms."""
    stock, packed = make_models()
    packed = with_terms(packed)
    for scale in packed.bert.encoder.scales:
        stock.bert.encoder.layer[-1].register_forward_hook(scale)
    return stock, packed


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_near(found, expected):
    scale = max(float(x.abs().max()) for x in expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * scale)


def test_the_terms_are_those_of_the_sequences_one_by_one(rows, collate):
    batch = collate(rows)
    stock, packed = adding_models()
    expected, hidden = pretraining_one_by_one(stock, alone(batch), "sequence")
    terms = terms_by_hand(packed, hidden)
    by_hand = expected + weighted(terms)
    by_hand.backward()
    of_scales = [scale.scale.grad for scale in packed.bert.encoder.scales]
    expected_gradients = [p.grad for p in stock.parameters()]
    packed.zero_grad()
    output = packed(**batch)
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-12)
    own = dict(packed.named_parameters())
    assert_near([own[name].grad for name, _ in stock.named_parameters()], expected_gradients)
    assert_near([scale.scale.grad for scale in packed.bert.encoder.scales], of_scales)
    metrics = packed.metrics(output.sums)
    assert {name: metrics[name] for name in LOGGED} == pytest.approx(
        {n: float(x.detach()) for n, x in terms.items()}, rel=1e-12
    )
    assert metrics["loss"] == pytest.approx(float(output.loss.detach()), rel=1e-12)


def test_micro_batches_add_up(rows, collate):
    _, packed = adding_models()
    batch = collate(rows)
    expected = packed(**batch)
    expected.loss.backward()
    expected_gradients = gradients(packed)
    packed.zero_grad()
    parts = [{name: x[i : i + 2] for name, x in batch.items()} for i in range(0, len(rows), 2)]
    parts.append(collate([EMPTY]))  # what a rank without packs computes
    counts = sum(packed.count_denominators(part) for part in parts)
    assert counts.tolist() == [*count_denominators(batch).tolist(), int((batch["sequence_ids"] > 0).sum()), 23]
    outputs = [packed(**part, denominators=counts) for part in parts]
    sum(output.loss for output in outputs).backward()
    assert_near(gradients(packed), expected_gradients)
    assert float(sum(output.loss.detach() for output in outputs)) == pytest.approx(
        float(expected.loss.detach()), rel=1e-12
    )
    sums = sum(output.sums for output in outputs)
    assert packed.metrics(sums) == pytest.approx(packed.metrics(expected.sums), rel=1e-12)
    mean = torch.stack([packed(**part).loss.detach() for part in parts]).mean()  # negative control
    assert abs(float(mean - expected.loss.detach())) > 1e-3


def test_padding_adds_nothing(rows, collate):
    _, packed = adding_models()
    exact, by_slots = collate([*rows, EMPTY]), to_device(collate([*rows, EMPTY]), "cpu", by_slots=True)
    found = []
    for batch in (exact, by_slots):
        packed.zero_grad()
        output = packed(**batch)
        output.loss.backward()
        found.append([output.loss.detach(), output.sums, *gradients(packed)])
    assert_near(found[1][1:2], found[0][1:2])
    assert_near(found[1][2:], found[0][2:])
    packed.zero_grad()
    output = packed(**collate([EMPTY]))
    output.loss.backward()
    assert float(output.loss.detach()) == 0 and not any(grad.any() for grad in gradients(packed))


def test_without_such_modules_nothing_changes(rows, collate):
    _, packed = make_models()
    batch = collate(rows)
    assert rows_of(packed) == () and torch.equal(packed.count_denominators(batch), count_denominators(batch))
    loss = pretraining_loss("sequence", "nsp")
    assert loss.plus(()) is loss and added_sums(packed, (), PackLayout.of(batch["sequence_ids"]), {}) == {}
    stock = make_model("mlm")
    assert task_for(stock).added == ()


def test_accumulation_and_ranks_change_nothing(two_processes):
    expected = train(17, 16, 1, "sequence", with_terms)
    assert all(step[name] > 0 for step in expected["steps"] for name in LOGGED)
    for found in (train(17, 4, 4, "sequence", with_terms), two_processes["terms of modules"]):
        assert_same_run(found, expected)
    assert two_processes["terms of modules"]["processes"] == 2


def assert_same_run(found, expected):
    assert_near(found["parameters"], expected["parameters"])
    assert len(found["steps"]) == len(expected["steps"]) == 2
    for step, other in zip(found["steps"], expected["steps"], strict=True):
        assert {name: step[name] for name in LOGGED} == pytest.approx({n: other[n] for n in LOGGED}, rel=1e-6)
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-9)
    assert {f"eval_{name}" for name in LOGGED} <= found["evaluation"].keys()


def test_a_stock_model_has_them_too(two_processes):
    """In PackedTrainer, by any number of passes and ranks; the first step's loss by hand."""
    expected = train_stock("mlm", change=with_terms)
    for found in (train_stock("mlm", 4, 4, change=with_terms), two_processes["terms of a stock model's modules"]):
        assert_same_run(found, expected)
    model, packs = make_model("mlm", with_terms), make_packs("mlm")
    batch = make_collator("mlm").for_dataset(packs)(list(packs.select(range(16))))
    task, layout = task_for(model), PackLayout.of(batch["sequence_ids"])
    inputs = {"input_ids": batch["input_ids"], "sequence_ids": batch["sequence_ids"]}
    hidden_BLD = model.bert(**inputs, token_type_ids=batch["token_type_ids"]).last_hidden_state
    hidden = layout.unpad(hidden_BLD).split(layout.lengths.tolist())
    terms = terms_by_hand(model, hidden)
    metrics = task.metrics(task(model, batch).sums)
    assert {name: metrics[name] for name in LOGGED} == pytest.approx(
        {n: float(x.detach()) for n, x in terms.items()}, rel=1e-12
    )
    first = expected["steps"][0]
    of_masks = first["mlm_loss_per_token"]
    assert first["loss"] == pytest.approx(of_masks + float(weighted(terms).detach()), rel=1e-6)
    assert task.count(batch).tolist()[2:] == [layout.num_tokens, layout.num_sequences]
    assert copy.copy(task).added == rows_of(model)


@pytest.mark.long
def test_a_compiled_stock_model_has_them_too():
    expected = train_stock("mlm", 4, 4, change=with_terms)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert_same_run(train_stock("mlm", 4, 4, change=with_terms, **compiled), expected)


def test_terms_that_contradict_each_other():
    class Other(Scale):
        loss_rows = (Mean("scale_penalty", "scale_squared", "sequences", weight=0.1),)

    class Misspelt(Scale):
        loss_rows = (Mean("scale_penalty", "scale_squared", "token"),)

    assert len(rows_of(nn.ModuleList([Scale(1.0), Scale(2.0)]))) == 1
    with pytest.raises(ValueError, match=r"add 'scale_penalty' to its loss as .* and as .*; give all layers the same"):
        rows_of(nn.ModuleList([Scale(1.0), Other(1.0)]))
    with pytest.raises(ValueError, match=r"row 'scale_penalty': 'token'; did you mean 'tokens'\?; choose from seq"):
        rows_of(Misspelt(1.0))


def test_a_sum_that_nobody_gives(rows, collate):
    _, packed = adding_models()
    packed.bert.loss_rows = (Mean("silence", "quiet", "tokens"),)
    with pytest.raises(RuntimeError, match="nobody gave 'quiet', the sum of the term 'silence'"):
        packed(**collate(rows))


def test_denominators_must_be_those_of_the_loss(rows, collate):
    _, packed = adding_models()
    batch = collate(rows)
    message = "denominators mlm_tokens, mlm_sequences, pairs, tokens, sequences got 3 of them; count them as"
    with pytest.raises(ValueError, match=message):
        packed(**batch, denominators=count_denominators(batch))


def test_losses_that_would_leave_them_out_are_refused():
    with pytest.raises(ValueError, match=re.escape("add activity, drift, scale_penalty to its loss, which its own")):
        train_plain(change=with_terms)
    with pytest.raises(ValueError, match="the task SimpleNamespace would leave out; derive it from collate"):
        with_rows_of(Scale(1.0), SimpleNamespace())

    class OwnLoss(PackedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.sum()

    class Doubled(PackedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 2 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)

    options = {"train_dataset": make_packs("mlm"), "data_collator": make_collator("mlm")}
    options |= {"per_device_train_batch_size": 16, "max_steps": 1}
    message = "of its own would leave out; let it call super"
    with (
        make_stock_trainer(make_model("mlm", with_terms), OwnLoss, **options) as trainer,
        pytest.raises(ValueError, match=message),
    ):
        trainer.train()
    found = []
    for kind in (PackedTrainer, Doubled):
        with make_stock_trainer(make_model("mlm", with_terms), kind, **options) as trainer:
            trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert found[1] == pytest.approx(2 * found[0], rel=1e-6)
