"""What PackedTrainer reports: no metric without data, sequences as the only unit, and the objective of a search."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stock_runs import HEADS, make_collator, make_model, make_packs, make_source, make_trainer, without_labels
from training_runs import make_packs as make_pretraining_packs
from training_runs import make_trainer as make_pretraining_trainer
from transformers import EarlyStoppingCallback, integrations, trainer
from transformers.trainer_utils import BestRun, HPSearchBackend

from collate import PackedTrainer
from collate.heads import MaskedLM, PreTraining, QuestionAnswering, SequenceClassification, TokenClassification
from collate.losses import pretraining_loss
from packing import EpochPacks, pack_dataset

# Nothing to count.


def evaluate(head, packs, **options):
    options |= {"data_collator": make_collator(head), "per_device_eval_batch_size": 5}
    with make_trainer(make_model(head), **options) as made:
        evaluated, predicted = made.evaluate(packs), made.predict(packs).metrics
    return [named(evaluated, "eval_"), named(predicted, "test_")]


def named(metrics, prefix):
    names = {name.removeprefix(prefix) for name in metrics if name.startswith(prefix)}
    return {name for name in names if not name.endswith(("runtime", "per_second"))}


@pytest.mark.parametrize("head", [head for head in HEADS if head != "mlm"])
def test_without_labels_no_metric_of_labels_is_reported(head):
    """Control: with labels there is a loss."""
    packs = make_packs(head)
    assert evaluate(head, without_labels(head, packs)) == [{"tokens", "sequences"}] * 2
    assert all("loss" in names for names in evaluate(head, packs))


@pytest.mark.parametrize("head", ["single", "tokens"])
def test_labels_that_are_all_missing_are_none(head):
    packs = make_packs(head)
    hidden = packs.map(lambda pack: {"labels": [-100] * len(pack["labels"])})
    assert evaluate(head, hidden) == [{"tokens", "sequences"}] * 2


def test_the_best_model_is_not_chosen_by_a_loss_that_is_not_there(tmp_path):
    """As stock Trainer: an error that names the metric."""
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"train_dataset": make_packs("single"), "data_collator": make_collator("single")}
    options |= {"eval_dataset": make_packs("single").rename_column("labels", "target")}
    made = make_trainer(make_model("single"), folder=tmp_path, callbacks=[EarlyStoppingCallback()], **options)
    with made as one, pytest.raises(KeyError, match="'eval_loss', which is not found"):
        one.train()


TASKS = [
    SequenceClassification(num_labels=3),
    SequenceClassification(num_labels=1),
    TokenClassification(),
    QuestionAnswering(),
    MaskedLM(),
    MaskedLM(mlm_loss="sequence"),
    PreTraining(),
]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_no_task_has_a_metric_over_nothing(task):
    sums = torch.zeros(len(task.formula.names) + 2, dtype=torch.float64)
    assert task.metrics(sums) == {"tokens": 0, "sequences": 0}


def test_half_an_answer_gives_no_loss():
    task = QuestionAnswering()
    sums = dict.fromkeys(task.formula.names, 0.0) | {"starts": 4.0, "start_loss": 8.0, "start_correct": 1.0}
    metrics = task.metrics(torch.tensor([*sums.values(), 20, 4], dtype=torch.float64))
    assert metrics == {"start_accuracy": 0.25, "tokens": 20, "sequences": 4}


def test_pretraining_has_no_loss_over_nothing():
    packs = make_pretraining_packs(4)
    unlabelled = packs.map(lambda pack: {"next_sentence_label": [-100] * len(pack["next_sentence_label"])})
    with make_pretraining_trainer() as made:
        sums = torch.zeros(len(pretraining_loss("sequence", "nsp").names) + 4)
        assert made.model.metrics(sums) == {"tokens": 0, "sequences": 0}
        made.data_collator.masking_rule = None
        metrics = made.evaluate(unlabelled)
    assert named(metrics, "eval_") == {"tokens", "sequences"}


# One unit of samples.


@pytest.fixture
def watched(caplog):
    """Trainer's own log lines."""
    logger = logging.getLogger("transformers.trainer")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logging.getLogger("transformers").propagate = True
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(before[0])
    logging.getLogger("transformers").propagate = before[1]


@pytest.mark.parametrize("kind", ["packs", "epochs", "unpacked"])
def test_samples_are_sequences(kind, watched):
    source = make_source("mlm")
    packed = pack_dataset(source, 32, seed=4)
    dataset = {"packs": packed, "epochs": EpochPacks(packed), "unpacked": source}[kind]
    assert len(packed) < len(source) == 64
    options = {"train_dataset": dataset, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    options |= {"data_collator": make_collator("mlm", unpacked_rows="keep" if kind == "unpacked" else None)}
    with make_trainer(make_model("mlm"), **options) as made:
        metrics = made.train().metrics
        assert made.num_examples(made.get_train_dataloader()) == 64
        assert made.num_examples(made.get_eval_dataloader(packed if kind == "packs" else dataset)) == 64
        evaluated = made.evaluate(packed if kind == "packs" else dataset)
    assert metrics["train_samples_per_second"] == pytest.approx(128 / metrics["train_runtime"], rel=1e-2)
    assert metrics["train_samples_per_second"] == made.state.log_history[-2]["train_samples_per_second"]
    steps = made.state.global_step
    assert metrics["train_steps_per_second"] == pytest.approx(steps / metrics["train_runtime"], rel=1e-2)
    assert evaluated["eval_samples_per_second"] == pytest.approx(64 / evaluated["eval_runtime"], rel=1e-2)
    assert "  Num examples = 64" in watched.messages


def test_after_a_resume_the_rate_is_of_what_was_trained_since(tmp_path):
    options = {"train_dataset": make_packs("mlm"), "data_collator": make_collator("mlm"), "folder": tmp_path}
    options |= {"per_device_train_batch_size": 6, "save_strategy": "steps", "save_steps": 2}
    packs = make_packs("mlm")
    with make_trainer(make_model("mlm"), max_steps=2, **options) as made:
        made.train()
    with make_trainer(make_model("mlm"), max_steps=3, **options) as made:
        metrics = made.train(resume_from_checkpoint=True).metrics
    last = sum(len(lengths) for lengths in packs["sequence_lengths"][12:])
    assert metrics["train_samples_per_second"] == pytest.approx(last / metrics["train_runtime"], rel=1e-2)


def test_some_packs_of_a_dataset_are_counted_alone():
    packs = make_packs("single").select([3, 1])
    with make_trainer(make_model("single"), data_collator=make_collator("single")) as made:
        expected = sum(map(len, packs["sequence_lengths"]))
        assert made.num_examples(made.get_eval_dataloader(packs)) == expected


# The objective of a search.


def objective(compute_metrics=None, **options):
    """What a search would minimise, and what evaluation said."""
    options |= {"data_collator": make_collator("single"), "compute_metrics": compute_metrics}
    options.setdefault("eval_dataset", make_packs("single"))
    with make_trainer(make_model("single"), **options) as made:
        metrics = made.evaluate()
        return made._default_objective(metrics | {"epoch": 3.0}), metrics


def test_without_metrics_of_the_user_the_loss_is_minimised():
    got, metrics = objective(skip_memory_metrics=False)
    assert "eval_mem_cpu_alloc_delta" in metrics
    assert got == metrics["eval_loss"] and {"eval_accuracy", "eval_tokens", "eval_sequences"} <= metrics.keys()


def test_of_several_evaluation_sets_the_losses_are():
    sets = {"a": make_packs("single"), "b": make_packs("single").select([0, 1])}
    got, metrics = objective(eval_dataset=sets)
    assert got == pytest.approx(metrics["eval_a_loss"] + metrics["eval_b_loss"])


def test_the_users_metrics_alone_are_summed():
    """With any name, even one of ours."""
    got, metrics = objective(lambda prediction: {"f1": np.float32(0.25), "eval_recall": 0.5, "accuracy": 4.0})
    assert got == 4.75
    assert metrics["eval_accuracy"] == 4.0 and metrics["eval_recall"] == 0.5 and type(metrics["eval_f1"]) is float


class Measuring(PackedTrainer):
    """Metrics that evaluation did not give."""

    def evaluate(self, *args, **kwargs):
        return super().evaluate(*args, **kwargs) | {"eval_size": 8.0}


def test_metrics_that_a_subclass_adds_are_summed_as_by_trainer():
    assert objective(kind=Measuring)[0] == 8.0


def test_a_search_without_a_loss_is_refused():
    with pytest.raises(ValueError, match=r"no eval_loss, only .*give the evaluation set labels"):
        objective(eval_dataset=without_labels("single", make_packs("single")))


class TwoTrials:
    """A backend that tries two learning rates."""

    rates = (0.0, 0.3)

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction, **kwargs):
        objectives = {}
        for number, rate in enumerate(self.rates):
            trainer.objective = None
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate}))
            objectives[rate] = trainer.compute_objective(trainer.evaluate())
        best = min(objectives, key=objectives.get)
        return BestRun("best", objectives[best], {"learning_rate": best})


@pytest.mark.parametrize("compute_objective", [None, lambda metrics: -metrics["eval_accuracy"]])
def test_a_search_finds_the_better_model(monkeypatch, compute_objective):
    monkeypatch.setattr(integrations, "hp_params", lambda trial: trial.params)
    monkeypatch.setattr(trainer, "ALL_HYPERPARAMETER_SEARCH_BACKENDS", {HPSearchBackend.OPTUNA: TwoTrials})
    options = {"train_dataset": make_packs("single"), "eval_dataset": make_packs("single")}
    options |= {"data_collator": make_collator("single"), "model_init": lambda: make_model("single")}
    with make_trainer(None, num_train_epochs=6, per_device_train_batch_size=18, **options) as made:
        best = made.hyperparameter_search(
            lambda trial: trial.params, compute_objective, n_trials=2, backend="optuna", direction="minimize"
        )
        assert best.hyperparameters == {"learning_rate": 0.3}
        made.hp_search_backend = HPSearchBackend.OPTUNA
        made.hp_space = lambda trial: {"neftune_noise_alpha": 5.0}
        with pytest.raises(ValueError, match="cannot honour neftune_noise_alpha"):
            made._hp_search_setup(SimpleNamespace(params={}))
