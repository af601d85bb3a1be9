"""PackedTrainer: a step's loss and gradients do not depend on accumulation, processes or packing."""

import pytest
import torch
from datasets import Dataset
from pairs import make_tokenizer
from pretraining_models import MAX_LENGTH, alone, make_models
from slow_training import pretraining_one_by_one, unpacked_rows
from training_runs import (
    BY_SEQUENCES,
    BY_SEQUENCES_IN_TWO,
    IN_TWO,
    ONE_PROCESS,
    deterministic,
    evaluate,
    make_epochs,
    make_packs,
    make_trainer,
    train,
    train_by_sequences,
)

from collate import DataCollatorWithPacking
from collate.training.order import StepSampler
from packing import pack_dataset


@pytest.fixture(scope="module")
def one_process():
    return {name: train(*run) for name, run in ONE_PROCESS.items()}


def assert_same(got, expected):
    worst = max(float((a - b).abs().max()) for a, b in zip(got["parameters"], expected["parameters"], strict=True))
    assert worst < 1e-12
    assert len(got["steps"]) == len(expected["steps"]) == 2
    for step, other in zip(got["steps"], expected["steps"], strict=True):
        for name in ("loss", "mlm_loss_per_sequence", "mlm_accuracy_per_token", "nsp_loss", "nsp_majority"):
            assert step[name] == pytest.approx(other[name], rel=1e-6), name
        for name in ("sequences_seen", "tokens_seen", "num_input_tokens_seen"):
            assert step[name] == other[name], name
    assert got["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-9)


def test_the_first_step_is_that_of_the_sequences_one_by_one(one_process):
    """And so is the second, of 6 packs: SGD by hand on stock BERT ends at the same parameters."""
    stock, _ = make_models()
    collate = DataCollatorWithPacking(make_tokenizer(), pad_to=MAX_LENGTH, max_sequences_per_pack=8)
    packs = make_packs(22)
    for step, rows in enumerate([range(16), range(16, 22)]):
        stock.zero_grad()
        loss, _ = pretraining_one_by_one(stock, alone(collate([packs[i] for i in rows])), "sequence")
        loss.backward()
        assert one_process["1 x 16"]["steps"][step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter -= 0.05 * parameter.grad
    parameters = zip(one_process["1 x 16"]["parameters"], stock.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in parameters) < 1e-12


@pytest.mark.parametrize("loss", ["", ", token loss"])
def test_accumulation_changes_nothing(one_process, loss):
    """1 x 16 packs = 4 x 4, the uneven last step of 4 + 2 included."""
    assert_same(one_process["4 x 4" + loss], one_process["1 x 16" + loss])


def test_the_two_losses_differ(one_process):
    """A negative control: these comparisons see a difference."""
    with pytest.raises(AssertionError):
        assert_same(one_process["1 x 16, token loss"], one_process["1 x 16"])


@pytest.mark.parametrize(("two", "one"), zip(IN_TWO, ["1 x 16", "1 x 16, token loss", "17 packs"], strict=True))
def test_two_processes_change_nothing(one_process, two_processes, two, one):
    """Rank 1's first pass has no NSP target; the ranks do not divide 22 packs; of 17 rank 1 gets none in the end."""
    assert two_processes[two]["processes"] == 2
    assert_same(two_processes[two], one_process[one])


@pytest.fixture(scope="module")
def by_sequences():
    return {name: train_by_sequences(*run) for name, run in BY_SEQUENCES.items()}


def assert_same_steps(got, expected):
    worst = max(float((a - b).abs().max()) for a, b in zip(got["parameters"], expected["parameters"], strict=True))
    assert worst < 1e-12
    assert len(got["steps"]) == len(expected["steps"]) == 8
    for step, other in zip(got["steps"], expected["steps"], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert (step["sequences_seen"], step["tokens_seen"]) == (other["sequences_seen"], other["tokens_seen"])


def test_every_step_has_as_many_sequences_however_it_is_split(by_sequences, two_processes):
    """24, 24, 24 and 8 of 80, twice: in one pass or eight, on one rank or two, some of whose passes are empty."""
    expected = by_sequences["1 x 16"]
    assert [step["sequences_seen"] for step in expected["steps"]] == [24, 48, 72, 80, 104, 128, 152, 160]
    assert_same_steps(by_sequences["8 x 2"], expected)
    for name in BY_SEQUENCES_IN_TWO:
        assert two_processes[name]["processes"] == 2
        assert_same_steps(two_processes[name], expected)


def test_packed_steps_equal_unpacked_ones_of_the_same_sequences(by_sequences):
    """One sequence a row, in the order of the packed steps: the same parameters, though each epoch has other packs."""
    epochs = make_epochs()
    with make_trainer(
        train_dataset=epochs,
        per_device_train_batch_size=16,
        train_sampling_strategy="random",
        sequences_per_step=24,
    ) as trainer:
        trainer.get_train_dataloader()
        order = trainer._train_order
    rows = {i: row for row in unpacked_rows(list(epochs)) for i in row["sequence_indices"]}
    assert len(rows) == 80
    parameters = None
    for epoch in range(2):
        order.set_epoch(epoch)
        packs, picked = list(epochs), list(order)
        sequences = [i for pack in picked if pack < len(packs) for i in packs[pack]["sequence_indices"]]
        unpacked = Dataset.from_list([rows[i] for i in sequences])
        got = train_unpacked(unpacked, epoch, parameters)
        parameters = got["parameters"]
        assert [step["loss"] for step in got["steps"]] == pytest.approx(
            [step["loss"] for step in by_sequences["1 x 16"]["steps"][4 * epoch : 4 * epoch + 4]], rel=1e-6
        )
    expected = by_sequences["1 x 16"]["parameters"]
    assert max(float((a - b).abs().max()) for a, b in zip(parameters, expected, strict=True)) < 1e-12


def train_unpacked(dataset, epoch, parameters):
    """One epoch of 24 rows per step in their order, with the masks of that epoch, from given parameters."""
    with make_trainer(train_dataset=dataset, per_device_train_batch_size=24) as trainer:
        trainer.set_epoch = lambda _: trainer.data_collator.set_epoch(epoch)
        with torch.no_grad():
            for parameter, value in zip(trainer.model.parameters(), parameters or [], strict=bool(parameters)):
                parameter.copy_(value)
        trainer.train()
    return {
        "parameters": [parameter.detach().clone() for parameter in trainer.model.parameters()],
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def test_logs_tell_the_realised_factor(by_sequences):
    for steps in (run["steps"] for run in by_sequences.values()):
        for step in steps:
            packs = step["packs_per_step"] * step["step"]
            assert packs == pytest.approx(round(packs)) and step["packing_factor"] * packs == pytest.approx(
                step["sequences_seen"]
            )
        assert steps[-1]["packs_per_step"] == 2 * len(make_epochs()) / 8
        assert steps[-1]["packing_factor"] == pytest.approx(80 / len(make_epochs()))


class NotingCollator(DataCollatorWithPacking):
    """Records the sequences of each batch, and their masks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tell = ("sequence_indices",)


def batches_of_run(folder, max_steps, resume=None, **options):
    """What the model gets to see, batch by batch, as ids after masking; an empty pack has no sequences."""
    seen = []
    with make_trainer(
        train_dataset=make_epochs(),
        folder=folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        sequences_per_step=24,
        train_sampling_strategy="random",
        max_steps=max_steps,
        save_strategy="steps",
        save_steps=max_steps,
        data_collator=NotingCollator(make_tokenizer(), pad_to=MAX_LENGTH, max_sequences_per_pack=8),
        **options,
    ) as trainer:
        compute_loss = trainer.compute_loss

        def noting(model, inputs, *args, **kwargs):
            told = inputs.pop("sequence_indices", torch.zeros(0))
            seen.append((trainer.state.global_step, told[told >= 0].tolist(), inputs["input_ids"].tolist()))
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = noting
        trainer.train(resume_from_checkpoint=resume)
    return seen


@pytest.mark.parametrize("workers", [0, 1, "persistent"])
def test_a_resume_within_the_second_epoch_sees_the_same_batches(tmp_path, workers):
    """Whole run without workers: steps 0-3, 4-7, 8-9; resumed at 6 with workers, persistent ones, or none."""
    options = {"dataloader_num_workers": int(workers != 0), "dataloader_persistent_workers": workers == "persistent"}
    whole = batches_of_run(tmp_path / "whole", 10)
    assert len(whole) == 40 and [sum(len(told) for step, told, _ in whole if step == n) for n in (4, 7, 8)] == [
        24,
        8,
        24,
    ]
    first = batches_of_run(tmp_path / "parts", 6, **options)
    second = batches_of_run(tmp_path / "parts", 10, resume=True, **options)
    assert first + second == whole
    epochs = [sorted(i for step, told, _ in whole if step // 4 == epoch for i in told) for epoch in range(2)]
    assert epochs[0] == epochs[1] == list(range(80))


def test_evaluation_on_the_training_packs_leaves_the_epoch_alone(tmp_path):
    """accelerate calls set_epoch of every dataset, with its own epoch, when it is iterated."""
    epochs = make_epochs()
    with make_trainer(train_dataset=epochs, eval_dataset=epochs) as trainer:
        epochs.set_epoch(5)
        assert trainer.evaluate()["eval_sequences"] == 80 and epochs.epoch == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences_per_step": 0}, "sequences_per_step=0 must be a whole number"),
        ({"sequences_per_step": 24}, "set train_sampling_strategy='random'"),
        (
            {
                "sequences_per_step": 24,
                "train_sampling_strategy": "random",
                "accelerator_config": {"split_batches": True},
            },
            "set split_batches=False",
        ),
    ],
)
def test_what_would_tear_steps_is_refused(options, message):
    with pytest.raises(ValueError, match=message), make_trainer(**options):
        pass


def test_sequences_per_step_needs_known_depths():
    rows = unpacked_rows(make_packs(22))
    with (
        make_trainer(
            train_dataset=Dataset.from_list(rows), sequences_per_step=24, train_sampling_strategy="random"
        ) as trainer,
        pytest.raises(ValueError, match="needs a train_dataset of pack_dataset"),
    ):
        trainer.get_train_dataloader()


def test_evaluation_equals_that_of_the_unpacked_sequences():
    """Every sequence in a pack of its own, in batches of 5: the same losses and accuracies."""
    packed = evaluate(make_packs(22), 3)
    unpacked = evaluate(Dataset.from_list(unpacked_rows(make_packs(22))), 5)
    assert unpacked["eval_sequences"] == packed["eval_sequences"] > 40
    assert unpacked == pytest.approx(packed, rel=1e-9)


def test_evaluation_drops_no_packs():
    """Whatever training does with its incomplete last pass."""
    results = []
    for drop_last in (False, True):
        with make_trainer(
            eval_dataset=make_packs(22), per_device_eval_batch_size=5, dataloader_drop_last=drop_last
        ) as trainer:
            results.append(deterministic(trainer.evaluate()))
    assert results[0] == results[1]


def run_metrics(stock, sequences):
    """Every metric of the log, one sequence at a time."""
    rows = []
    for sequence in sequences:
        output = stock(sequence["input_ids"][None], token_type_ids=sequence["token_type_ids"][None])
        predicted = sequence["labels"] != -100
        hits = output.prediction_logits[0].argmax(-1)[predicted] == sequence["labels"][predicted]
        nsp = int(output.seq_relationship_logits.argmax())
        rows.append((hits.tolist(), nsp == sequence["next_sentence_label"], sequence["next_sentence_label"]))
    tokens = [hit for hits, _, _ in rows for hit in hits]
    labels = [label for _, _, label in rows if label is not None]
    return {
        "mlm_accuracy_per_token": sum(tokens) / len(tokens),
        "mlm_accuracy_per_sequence": sum(sum(hits) / len(hits) for hits, _, _ in rows) / len(rows),
        "nsp_accuracy": sum(right for _, right, label in rows if label is not None) / len(labels),
        "nsp_majority": max(sum(labels), len(labels) - sum(labels)) / len(labels),
    }


def test_metrics_equal_those_of_the_sequences_one_by_one():
    """Half of the labels are the model's own predictions, so that accuracies are far from 0 and differ."""
    stock, packed = make_models()
    collate = DataCollatorWithPacking(make_tokenizer(), pad_to=MAX_LENGTH, max_sequences_per_pack=8)
    batch = collate([make_packs(22)[i] for i in range(22)])
    predictions = packed(batch["input_ids"], batch["sequence_ids"], token_type_ids=batch["token_type_ids"])
    own = predictions.prediction_logits.argmax(-1)
    keep = (torch.arange(batch["labels"].numel()).view_as(batch["labels"]) % 2 == 0) | (batch["labels"] == -100)
    batch["labels"] = torch.where(keep, batch["labels"], own)
    metrics = packed.metrics(packed(**batch).sums)
    expected = run_metrics(stock, alone(batch))
    assert 0.2 < expected["mlm_accuracy_per_token"] < 0.8 and expected["nsp_majority"] < 1
    assert expected["mlm_accuracy_per_token"] != pytest.approx(expected["mlm_accuracy_per_sequence"])
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


class SpyingCollator(DataCollatorWithPacking):
    """Notes the epoch, and the shape, of every batch that it makes."""

    notes: list = []  # noqa: RUF012 - shared by the copies that PackedTrainer makes

    def __call__(self, rows):
        batch = super().__call__(rows)
        self.notes.append((int(self._epoch), tuple(batch["input_ids"].shape), tuple(batch["cls_positions"].shape)))
        return batch


def test_epochs_masks_and_shapes_in_a_run(pairs):
    """Two epochs of training, evaluated in between: 0 0 | -1 -1 | 1 1 | -1 -1, all of one shape, on the same masks."""
    packed = pack_dataset(Dataset.from_list(pairs), max_sequence_length=MAX_LENGTH)
    SpyingCollator.notes.clear()
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    collator = SpyingCollator(make_tokenizer())
    with make_trainer(
        train_dataset=packed, eval_dataset=packed, data_collator=collator, eval_strategy="epoch", **options
    ) as trainer:
        trainer.train()
        assert trainer.model.training
    epochs, shapes, slots = zip(*SpyingCollator.notes, strict=True)
    passes = -(-len(packed) // 8)
    assert list(epochs) == [0] * passes + [-1] * passes + [1] * passes + [-1] * passes
    assert {shape[1] for shape in shapes} == {MAX_LENGTH} and len({depth for _, depth in slots}) == 1
    history = trainer.state.log_history
    seen = [entry["sequences_seen"] for entry in history if "loss" in entry]
    assert seen[-1] == 2 * len(pairs) and seen == sorted(seen)


def test_evaluation_sets_are_not_mixed_up_by_persistent_workers(pairs):
    sets = {
        name: pack_dataset(Dataset.from_list(part), MAX_LENGTH)
        for name, part in zip("ab", (pairs[:5], pairs), strict=True)
    }
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    with make_trainer(eval_dataset=sets, **options) as trainer:
        for _ in range(2):
            assert [trainer.evaluate(sets[name])["eval_sequences"] for name in "a"] == [5]
            metrics = trainer.evaluate()
            assert (metrics["eval_a_sequences"], metrics["eval_b_sequences"]) == (5, len(pairs))


def test_counts_go_on_after_a_resume_between_logs(pairs, tmp_path):
    packed = pack_dataset(Dataset.from_list(pairs), max_sequence_length=MAX_LENGTH)
    options = {"per_device_train_batch_size": 2, "logging_steps": 4, "save_steps": 3, "save_strategy": "steps"}

    def run(folder, steps, resume=None):
        with make_trainer(train_dataset=packed, folder=folder, max_steps=steps, **options) as trainer:
            trainer.train(resume_from_checkpoint=resume)
            return [e["sequences_seen"] for e in trainer.state.log_history if "loss" in e]

    whole = run(tmp_path / "whole", 8)
    run(tmp_path / "parts", 3)
    assert run(tmp_path / "parts", 8, resume=True)[-1] == whole[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "cannot honour label_smoothing_factor=0.1"),
        ({"neftune_noise_alpha": 5.0}, "cannot honour neftune_noise_alpha=5.0"),
        ({"compute_metrics": len}, "cannot honour compute_metrics="),
        ({"compute_loss_func": len}, "cannot honour compute_loss_func="),
    ],
)
def test_what_would_be_ignored_is_refused(options, message):
    with pytest.raises(ValueError, match=message), make_trainer(**options):
        pass


def test_predictions_need_a_stock_head():
    with make_trainer() as trainer, pytest.raises(ValueError, match="loss of its own has no predictions per sequence"):
        trainer.predict(make_packs(22))


def test_balanced_packs_are_shuffled_by_whole_steps(pairs):
    source = Dataset.from_list([pair for _ in range(6) for pair in pairs])
    packed = pack_dataset(source, max_sequence_length=MAX_LENGTH, balance=4)
    orders = {}
    for strategy in ("sequential", "random"):
        options = {"per_device_train_batch_size": 4, "train_sampling_strategy": strategy}
        with make_trainer(train_dataset=packed, **options) as trainer:
            loader = trainer.get_train_dataloader()
            for epoch in range(2):
                loader.set_epoch(epoch)
                orders[strategy, epoch] = [tuple(batch["sequence_ids"].flatten().tolist()) for batch in loader]
    steps = orders["sequential", 0]
    assert len(steps) > 3 and len(packed) % 4 and orders["sequential", 1] == steps
    for epoch in range(2):
        assert sorted(orders["random", epoch]) == sorted(steps) and orders["random", epoch][-1] == steps[-1]
    assert len({tuple(order) for order in orders.values()}) == 3


def test_steps_are_drawn_by_seed_and_epoch():
    assert sorted(StepSampler(7, 2, 0)) == list(range(7)) and list(StepSampler(7, 2, 0))[-1] == 6
    sampler = StepSampler(1000, 10, 3)
    first = list(sampler)
    assert list(StepSampler(1000, 10, 3)) == first == list(sampler)
    assert list(StepSampler(1000, 10, 4)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert {tuple(first[i : i + 10]) for i in range(0, 1000, 10)} == {
        tuple(range(i, i + 10)) for i in range(0, 1000, 10)
    }
