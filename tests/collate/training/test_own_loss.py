"""An overridden compute_loss: the same loss in training and in evaluation, and that of the sequences, not of packs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stock_runs import (
    LENGTH,
    WEIGHTS,
    WeightedSum,
    make_collator,
    make_model,
    make_packs,
    make_source,
    make_trainer,
    outcome,
)
from training_runs import make_packs as make_pretraining_packs
from training_runs import make_trainer as make_pretraining_trainer

from collate import PackedTrainer
from packing import pack_dataset


class Weighted(PackedTrainer):
    """Class weights as transformers' documentation shows them, a mean over the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.get("logits")
        num_labels = self.model.config.num_labels
        loss = torch.nn.CrossEntropyLoss(WEIGHTS[:num_labels])(logits.view(-1, num_labels), labels.view(-1))
        return (loss, outputs) if return_outputs else loss


class Seven(PackedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch) * 0 + 7.0


class Doubled(PackedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


def run(kind, head="single", packs_per_pass=18, passes=1, **options):
    options |= {"per_device_train_batch_size": packs_per_pass, "gradient_accumulation_steps": passes}
    options |= {"train_dataset": make_packs(head), "data_collator": make_collator(head)}
    with make_trainer(make_model(head), kind, per_device_eval_batch_size=18, **options) as trainer:
        before = trainer.evaluate(make_packs(head))
        trainer.train()
        return outcome(trainer) | {"before": before, "after": trainer.evaluate(make_packs(head))}


def by_hand(head, is_mean):
    """Loss and parameters of one step of SGD on the sequences one by one."""
    model, logits, labels = make_model(head), [], []
    chosen = [index for pack in make_packs(head)["sequence_indices"] for index in pack]
    for row in make_source(head).select(chosen):
        out = model(torch.tensor(row["input_ids"])[None], token_type_ids=torch.tensor(row["token_type_ids"])[None])
        logits.append(out.logits.flatten(0, -2))
        labels.append(torch.tensor(row["labels"]).view(-1))
    logits, labels = torch.cat(logits), torch.cat(labels)
    weights = WEIGHTS[: logits.shape[-1]]
    if is_mean:
        loss = F.cross_entropy(logits, labels, weights)
    else:
        loss = F.cross_entropy(logits, labels, weights, reduction="sum") / (labels != -100).sum()
    loss.backward()
    with torch.no_grad():
        return float(loss), [parameter - 0.05 * parameter.grad for parameter in model.parameters()]


def assert_trained(got, loss, parameters):
    assert got["steps"][0]["loss"] == pytest.approx(loss, rel=1e-6)
    worst = max(float((a - b).abs().max()) for a, b in zip(got["parameters"], parameters, strict=True))
    assert worst < 1e-12


@pytest.mark.parametrize("head", ["single", "tokens"])
@pytest.mark.parametrize("kind", [Weighted, WeightedSum])
def test_class_weights_as_documented_are_those_of_the_sequences(kind, head):
    """The same loss in evaluation; the accuracy beside it is that of the task."""
    loss, parameters = by_hand(head, kind is Weighted)
    got = run(kind, head)
    assert_trained(got, loss, parameters)
    assert got["before"]["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert got["before"]["eval_accuracy"] == run(PackedTrainer, head)["before"]["eval_accuracy"]
    assert got["before"]["eval_loss"] != pytest.approx(run(PackedTrainer, head)["before"]["eval_loss"], rel=1e-3)


def test_a_sum_over_the_step_does_not_depend_on_passes():
    loss, parameters = by_hand("single", is_mean=False)
    assert_trained(run(WeightedSum, packs_per_pass=5, passes=4), loss, parameters)


def test_evaluation_has_the_loss_of_training_whatever_the_batches():
    for size in (1, 5, 18):
        with make_trainer(
            make_model("single"), WeightedSum, data_collator=make_collator("single"), per_device_eval_batch_size=size
        ) as trainer:
            assert trainer.evaluate(make_packs("single"))["eval_loss"] == pytest.approx(by_hand("single", False)[0])
            assert trainer.predict(make_packs("single")).metrics["test_loss"] == pytest.approx(
                by_hand("single", False)[0]
            )


@pytest.mark.parametrize("head", ["single", "multi", "regression", "tokens", "answers", "mlm"])
def test_a_constant_loss_is_seen_in_evaluation(head):
    got = run(Seven, head)
    assert got["before"]["eval_loss"] == got["after"]["eval_loss"] == 7.0
    assert [step["loss"] for step in got["steps"]] == [7.0]


@pytest.mark.parametrize("head", ["single", "answers", "mlm"])
def test_a_loss_made_of_ours(head):
    got, ours = run(Doubled, head, 5, 4), run(PackedTrainer, head, 5, 4)
    assert got["before"]["eval_loss"] == pytest.approx(2 * ours["before"]["eval_loss"])
    assert got["steps"][0]["loss"] == pytest.approx(2 * ours["steps"][0]["loss"], rel=1e-6)


def test_a_loss_that_is_set_on_the_trainer():
    with make_trainer(make_model("single"), data_collator=make_collator("single")) as trainer:
        trainer.compute_loss = lambda model, inputs, **kwargs: torch.tensor(3.0)
        assert trainer.evaluate(make_packs("single"))["eval_loss"] == 3.0


def test_a_model_with_a_loss_of_its_own():
    packs = make_pretraining_packs(8)
    with make_pretraining_trainer(eval_dataset=packs) as trainer:
        ours = trainer.evaluate()
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: 2 * compute_loss(*args, **kwargs)
        doubled = trainer.evaluate()
    assert doubled["eval_loss"] == pytest.approx(2 * ours["eval_loss"])
    assert doubled["eval_nsp_accuracy"] == ours["eval_nsp_accuracy"]


def test_without_labels_there_is_no_loss():
    packs = make_packs("single").rename_column("labels", "target")
    with make_trainer(make_model("single"), Weighted, data_collator=make_collator("single")) as trainer:
        assert "eval_loss" not in trainer.evaluate(packs)
        assert np.isfinite(trainer.predict(packs).predictions).all()


class Changed(PackedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs["labels"] = 1 - inputs["labels"]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class MoreOutputs(PackedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs, output_hidden_states=True).loss


class Calling(PackedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class OwnSteps(PackedTrainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return None, None, None


@pytest.mark.parametrize(
    ("kind", "head", "options", "message"),
    [
        (
            Weighted,
            "single",
            {"packs_per_pass": 5, "passes": 4},
            "several passes or ranks.*loss_is_scaled_for_ga = True",
        ),
        (Calling, "answers", {}, "cannot call the model for QuestionAnswering.*super"),
        (Changed, "single", {}, "compute_loss changed 'labels' before"),
        (MoreOutputs, "single", {}, "gives the model 'output_hidden_states', which a packed head cannot honour"),
        (OwnSteps, "single", {}, "OwnSteps.prediction_step would never be called"),
    ],
)
def test_what_cannot_be_honoured_is_refused(kind, head, options, message):
    with pytest.raises(ValueError, match=message):
        run(kind, head, **options)


class ByWeights(PackedTrainer):
    """A column of weights, one per sequence."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = inputs.pop("weights")
        loss_N = F.cross_entropy(model(**inputs).logits, inputs["labels"], reduction="none")
        return (loss_N * weights).sum() / weights.sum()


@pytest.mark.parametrize("form", [None, "keep"])
def test_weights_of_sequences_are_those_of_their_losses(form):
    """Slots that broadcast would multiply each loss by the mean of all weights."""
    source = make_source("single")
    source = source.add_column("weights", [float(row["labels"] == 1) for row in source])
    packs = source if form else pack_dataset(source, LENGTH)
    options = {"data_collator": make_collator("single", unpacked_rows=form), "per_device_eval_batch_size": len(packs)}
    with make_trainer(make_model("single"), ByWeights, **options) as trainer:
        found = trainer.evaluate(packs)["eval_loss"]
    with make_trainer(make_model("single"), PackedTrainer, **options) as trainer:
        ones = source.filter(lambda row: row["labels"] == 1).remove_columns("weights")
        expected = trainer.evaluate(ones if form else pack_dataset(ones, LENGTH))["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-6)


class OfItsOwnModel(PackedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return F.cross_entropy(self.model(**inputs).logits, labels)


def test_another_model_than_the_given_one_is_named():
    options = {"data_collator": make_collator("single")}
    message = r"if it called self\.model, whose outputs have a row per pack"
    with (
        make_trainer(make_model("single"), OfItsOwnModel, **options) as trainer,
        pytest.raises(ValueError, match=message),
    ):
        trainer.evaluate(make_packs("single"))
