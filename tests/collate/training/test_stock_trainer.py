"""Stock models under PackedTrainer and plain Trainer: what they learn, count and predict is the sequences' own.

The twin is the stock model, with its own loss, on one sequence at a time, and SGD by hand. Float64 and large weights,
as in test_equivalence; in the last step, which is uneven, one rank of two has no packs.
"""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from pretraining_models import make_models
from stock_runs import (
    HEADS,
    LABELS,
    LENGTH,
    WeightedSum,
    deterministic,
    make_collator,
    make_model,
    make_packs,
    make_source,
    make_trainer,
    outcome,
    predict,
    predict_only,
    train,
    train_plain,
    train_unpacked,
    without_labels,
)
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from collate import isolate_sequences, task_for
from collate.losses import count_denominators
from collate.training.order import ArrowRows, EvenedPacks
from collate.training.refused import REFUSED_ARGUMENTS, refuse_arguments
from packing import pack_dataset

WORKERS = {"dataloader_num_workers": 2}
PERSISTENT = WORKERS | {"dataloader_persistent_workers": True}
METRICS = {
    "mlm": {"mlm_loss_per_sequence", "mlm_loss_per_token", "mlm_accuracy_per_sequence", "mlm_accuracy_per_token"},
    "single": {"accuracy"},
    "multi": {"accuracy"},
    "regression": set(),
    "tokens": {"accuracy"},
    "answers": {"start_accuracy", "end_accuracy", "exact_match"},
}


@pytest.fixture(scope="module")
def one_step():
    """1 x 16 packs, for every head."""
    return {head: train(head) for head in HEADS}


@pytest.fixture(scope="module")
def two_epochs():
    """4 x 4 packs, what all variations of a run must equal."""
    return train("mlm", 4, 4, num_train_epochs=2)


def difference(got, expected):
    """The worst of all parameters."""
    pairs = zip(got["parameters"], expected["parameters"], strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def assert_same(got, expected):
    assert difference(got, expected) < 1e-12
    assert len(got["steps"]) == len(expected["steps"])
    changing = {"epoch", "train_runtime", "train_tokens_per_second"}
    for step, other in zip(got["steps"], expected["steps"], strict=True):
        assert {k: v for k, v in step.items() if k not in changing} == pytest.approx(
            {k: v for k, v in other.items() if k not in changing}, rel=1e-6
        )
    if "evaluation" in got and "evaluation" in expected:
        names = [name for name in expected["evaluation"] if name.startswith("eval_")]
        assert [got["evaluation"][n] for n in names] == pytest.approx([expected["evaluation"][n] for n in names])


# (a) The sequences one by one.


def sequences_of(head, packs):
    """Tensors of each sequence, with a batch dimension of 1: rows of the source; masked as the collator does it."""
    if head == "mlm":
        batch = make_collator(head)(packs)
        rows = [
            {name: batch[name][pack][batch["sequence_ids"][pack] == number][None] for name in ("input_ids", "labels")}
            | {"token_type_ids": batch["token_type_ids"][pack][batch["sequence_ids"][pack] == number][None]}
            for pack in range(len(packs))
            for number in range(1, int(batch["sequence_ids"][pack].max()) + 1)
        ]
        return rows
    source, names = make_source(head), ["input_ids", "token_type_ids", *LABELS.get(head, ["labels"])]
    chosen = [index for pack in packs for index in pack["sequence_indices"]]
    return [as_tensors(source[index], names) for index in chosen]


def as_tensors(row, names=("input_ids", "token_type_ids")):
    tensors = {name: torch.tensor(row[name])[None] for name in names}
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def weight_of(head, sequence):
    """What the stock loss of a sequence is a mean over."""
    return int((sequence["labels"] != -100).sum()) if head in ("mlm", "tokens") else 1


def sgd_by_hand(head):
    """Parameters and losses after two steps, 16 packs and what is left."""
    model, losses, packs = make_model(head), [], list(make_packs(head))
    for step in (packs[:16], packs[16:]):
        sequences = sequences_of(head, step)
        weights = [weight_of(head, sequence) for sequence in sequences]
        loss = sum(model(**s).loss * w for s, w in zip(sequences, weights, strict=True)) / sum(weights)
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    return {"parameters": [parameter.detach() for parameter in model.parameters()], "losses": losses}


@pytest.mark.parametrize("head", HEADS)
def test_training_is_that_of_the_sequences_one_by_one(head, one_step):
    expected = sgd_by_hand(head)
    assert difference(one_step[head], expected) < 1e-12
    assert [step["loss"] for step in one_step[head]["steps"]] == pytest.approx(expected["losses"], rel=1e-6)


# (b) Accumulation and ranks.


@pytest.mark.parametrize("head", HEADS)
def test_accumulation_changes_nothing(head, one_step):
    assert_same(train(head, 4, 4), one_step[head])


@pytest.mark.parametrize("head", HEADS)
def test_two_processes_change_nothing(head, one_step, two_processes):
    """2 ranks x 2 passes x 4 packs; in the second step rank 1 has none."""
    got = two_processes[head]
    assert got["processes"] == 2
    assert_same(got, one_step[head])


def test_two_processes_with_packs_in_every_pass(two_processes):
    assert_same(two_processes["22 packs"], train("mlm", packs=22))


@pytest.mark.parametrize(("name", "head"), [("dispatched", "mlm"), ("dispatched by workers", "single")])
def test_batches_that_one_process_deals_out(name, head, one_step, two_processes):
    """Each rank gets whole packs, and makes the layout of its own, here by slots."""
    assert two_processes[name]["processes"] == 2
    assert_same(two_processes[name], one_step[head])


def test_unpacked_rows_that_one_process_deals_out(two_processes):
    """In the last step one rank has none."""
    assert_same(two_processes["dispatched unpacked"], train_unpacked())
    assert "dispatch would drop those that do not share out evenly" in two_processes["dispatched and packed by batches"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("wrap", [ArrowRows, list])
def test_a_batch_of_empty_packs_has_the_columns_of_others(head, wrap):
    packs = make_packs(head, 3)
    evened, collator = EvenedPacks(wrap(packs), 4), make_collator(head).for_dataset(packs).for_prediction()
    full, empty = (collator(evened.__getitems__(chosen)) for chosen in ([0, 1], [3, 3]))
    assert list(empty) == list(full) and not empty["sequence_ids"].any()
    assert [(x.shape, x.dtype) for x in empty.values()] == [(x.shape, x.dtype) for x in full.values()]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("wrap", [ArrowRows, list])
def test_a_batch_of_empty_unpacked_rows_has_the_columns_of_others(head, wrap):
    rows = make_source(head, 3)
    evened = EvenedPacks(wrap(rows), 4)
    collator = make_collator(head, unpacked_rows="keep", pad_to=LENGTH).for_model(make_model(head)).for_dataset(rows)
    full, empty = (collator(evened.__getitems__(chosen)) for chosen in ([0, 1], [3, 3]))
    assert list(empty) == list(full) and not empty["sequence_ids"].any()
    assert [(x.shape, x.dtype) for x in empty.values()] == [(x.shape, x.dtype) for x in full.values()]


def test_a_column_of_empty_packs_is_left_out_where_nothing_says_what_it_belongs_to():
    """Taken for labels of tokens it would be counted."""
    rows = [{"input_ids": [], "sequence_lengths": [], "next_sentence_label": []}]
    assert "next_sentence_label" not in make_collator("mlm", pad_to=LENGTH)(rows)
    evened = EvenedPacks(
        [row | {"next_sentence_label": [1] * len(row["sequence_lengths"])} for row in make_packs("mlm", 3)], 4
    )
    assert count_denominators(make_collator("mlm", pad_to=LENGTH)([evened[3]])).tolist() == [0, 0, 0]


def test_batches_of_an_iterable_dataset_that_one_process_deals_out(two_processes):
    """Together the ranks get every pack once; no layout is that of another batch."""
    packs, model = make_packs("mlm", 16), make_model("mlm")
    whole = make_collator("mlm").for_dataset(packs)(list(packs))
    depth = whole["cls_positions"].shape[1]
    found = two_processes["dealt out"]
    assert [(len(part["packs"]), part["slots"]) for part in found] == [(4, 4 * (depth + 1))] * 4
    assert sorted(pack for part in found for pack in part["packs"]) == sorted(whole["input_ids"].tolist())
    sums = torch.tensor([part["sums"] for part in found], dtype=torch.float64).sum(0)
    torch.testing.assert_close(sums, task_for(model)(model, whole).sums, rtol=1e-12, atol=1e-12)


def test_a_loss_of_ones_own_does_not_depend_on_ranks(two_processes):
    """In training and evaluation; in the second step rank 1 has no packs."""
    expected = train("single", kind=WeightedSum)
    assert_same(train("single", 4, 4, kind=WeightedSum), expected)
    assert_same(two_processes["class weights"], expected)
    assert difference(train("single"), expected) > 1e-4  # the weights are seen


def test_two_processes_shuffle_alike(two_processes):
    """A step has the same packs however many ranks there are."""
    options = {"train_sampling_strategy": "random", "num_train_epochs": 2}
    expected = train("mlm", **options)
    assert_same(two_processes["random"], expected)
    assert difference(train("mlm", num_train_epochs=2), expected) > 1e-3  # shuffling is seen


# (c) Variations that must not matter.

NAMES = [field.name for field in fields(TrainingArguments)]
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in NAMES)
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
VARIATIONS = {
    "two workers": WORKERS,
    "two persistent workers": PERSISTENT,
    "gradient checkpointing": {CHECKPOINTING: True},
    "columns said to be unwanted": {"remove_unused_columns": False},
    "an evaluation every step": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 5},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_these_change_nothing(name, two_epochs):
    options = VARIATIONS[name]
    if "eval_strategy" in options:
        options = options | {"eval_dataset": make_packs("mlm")}
    assert_same(train("mlm", 4, 4, num_train_epochs=2, **options), two_epochs)


def test_compilation_changes_nothing():
    one_layer = {"model_init": lambda: make_model("mlm", num_hidden_layers=1)}
    assert_same(train("mlm", **one_layer, **COMPILED), train("mlm", **one_layer))


@pytest.mark.parametrize("workers", [{}, WORKERS], ids=["no workers", "two workers"])
def test_an_iterable_dataset_changes_nothing(workers, two_epochs):
    """The last step of an epoch is uneven here, too, and the next epoch has other masks."""
    dataset = make_packs("mlm").to_iterable_dataset()
    assert_same(train("mlm", 4, 4, dataset=dataset, max_steps=4, **workers), two_epochs)


def test_a_model_init_changes_nothing(two_epochs):
    """model_init is called twice, and both models are isolated."""
    assert_same(train("mlm", 4, 4, num_train_epochs=2, model_init=lambda: make_model("mlm")), two_epochs)


@pytest.mark.parametrize("kind", ["map-style", "iterable"])
def test_resumed_from_a_checkpoint(kind, two_epochs, tmp_path):
    dataset = make_packs("mlm")
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 2}
    if kind == "iterable":
        dataset, options = dataset.to_iterable_dataset(), options | {"max_steps": 4}
    options |= {"train_dataset": dataset, "data_collator": make_collator("mlm")}
    saving = options | {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with make_trainer(make_model("mlm"), folder=tmp_path, **saving) as trainer:
        trainer.train()
    with make_trainer(make_model("mlm"), folder=tmp_path, **options) as trainer:
        trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), two_epochs)


def test_an_iterable_dataset_is_not_resumed_beyond_its_first_epoch(tmp_path):
    options = {"per_device_train_batch_size": 16, "train_dataset": make_packs("mlm").to_iterable_dataset()}
    options |= {"data_collator": make_collator("mlm"), "save_strategy": "steps", "save_steps": 3}
    with make_trainer(make_model("mlm"), folder=tmp_path, max_steps=3, **options) as trainer:
        trainer.train()
    resumed = make_trainer(make_model("mlm"), folder=tmp_path, max_steps=4, **options)
    with resumed as trainer, pytest.raises(ValueError, match=r"cannot resume training in epoch 1.* without a length"):
        trainer.train(resume_from_checkpoint=True)


# (d) Evaluation and prediction.


def unpacked(head):
    """The source, with the row numbers by which masks are drawn."""
    source = make_source(head)
    return source.add_column("sequence_indices", list(range(len(source))))


@pytest.mark.parametrize("head", HEADS)
def test_evaluation_on_packed_data_equals_that_on_unpacked_data(head):
    packed = pack_dataset(make_source(head), LENGTH, seed=4)
    evaluations = []
    for dataset, options in (
        (packed, {}),
        (unpacked(head), {"unpacked_rows": "keep"}),
        (unpacked(head), {"unpacked_rows": "pack", "pad_to": LENGTH}),
    ):
        collator = make_collator(head, **options)
        with make_trainer(make_model(head), data_collator=collator, per_device_eval_batch_size=7) as trainer:
            evaluations.append(deterministic(trainer.evaluate(dataset)))
    assert evaluations[0]["eval_sequences"] == 64
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-10)
    assert evaluations[2] == pytest.approx(evaluations[0], rel=1e-10)


def predicted_one_by_one(head, rows):
    """(N, …) the stock model on each row alone; what is ragged is padded."""
    model, results = make_model(head).eval(), []
    for row in rows:
        with torch.no_grad():
            output = model(**as_tensors(row))
        if head == "answers":
            results.append(torch.stack([output.start_logits[0], output.end_logits[0]], 1))
        else:
            results.append(output.logits[0])
    if head in ("tokens", "answers"):
        return torch.nn.utils.rnn.pad_sequence(results, batch_first=True, padding_value=float("-inf")).numpy()
    return torch.stack(results).numpy()


def labels_of(head, source):
    if head == "answers":
        return np.stack([source["start_positions"], source["end_positions"]], 1)
    if head == "tokens":
        rows = [torch.tensor(row) for row in source["labels"]]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100).numpy()
    return np.array(source["labels"])


def assert_predicted(got, head, rows):
    expected, labels = predicted_one_by_one(head, rows), labels_of(head, Dataset.from_list(list(rows)))
    for predictions, label_ids in [(got["predictions"], got["labels"]), *got["given"]]:
        np.testing.assert_allclose(predictions, expected, rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(label_ids, labels)
    assert len(got["given"]) == 2  # of predict and evaluate
    assert got["metrics"]["eval_rows"] == len(labels)


def of_packs(head):
    """The rows of the source that make_packs has, in their order."""
    source = make_source(head)
    return [source[i] for i in sorted(index for pack in make_packs(head)["sequence_indices"] for index in pack)]


PREDICTED = [head for head in HEADS if head != "mlm"]


@pytest.mark.parametrize("head", PREDICTED)
def test_predictions_are_in_the_order_of_the_source(head, two_processes):
    rows = of_packs(head)
    assert_predicted(predict(head, make_packs(head)), head, rows)
    assert_predicted(two_processes[f"predict {head}"], head, rows)


def test_predictions_of_masked_tokens(two_processes):
    """Token ids of the predicted tokens by sequence, in the source's order."""
    got = predict("mlm", make_packs("mlm"))
    both = two_processes["predict mlm"]
    for name in ("predictions", "labels"):
        np.testing.assert_array_equal(got[name], both[name])
    assert got["predictions"].shape == got["labels"].shape == (len(of_packs("mlm")), 3)
    source = make_source("mlm")
    for row, labels in zip(of_packs("mlm"), got["labels"], strict=True):
        assert {label for label in labels.tolist() if label != -100} <= set(row["input_ids"]) - {2, 3}
    assert len(source) > len(got["labels"])


def test_rows_that_were_dropped_have_no_prediction():
    source = make_source("tokens")
    short = [row for row in source if len(row["input_ids"]) <= 12]
    packed = pack_dataset(source, 12, overlong="drop")
    assert 0 < len(short) < len(source)
    assert_predicted(predict("tokens", packed), "tokens", short)


def test_rows_that_were_split_have_a_prediction_for_each_piece(two_processes):
    packed = pack_dataset(make_source("tokens"), 12, overlong="split")
    pieces = []
    for pack in packed:
        facts = zip(pack["sequence_indices"], pack["sequence_starts"], pack["sequence_lengths"], strict=True)
        offset = 0
        for index, start, length in facts:
            names = ("input_ids", "token_type_ids", "labels")
            piece = {name: pack[name][offset : offset + length] for name in names}
            pieces.append(((index, start), piece))
            offset += length
    pieces = [piece for _, piece in sorted(pieces, key=lambda item: item[0])]
    assert len(pieces) > len(make_source("tokens"))
    assert_predicted(predict("tokens", packed), "tokens", pieces)
    assert_predicted(two_processes["predict split"], "tokens", pieces)


def test_predictions_of_rows_that_were_not_packed(two_processes):
    """Over two processes, too, where empty rows fill up some ranks."""
    source = make_source("single")
    options = {"data_collator": make_collator("single", unpacked_rows="keep")}
    assert_predicted(predict("single", source, **options), "single", list(source))
    assert_predicted(two_processes["predict unpacked"], "single", list(source))


def test_predictions_without_labels(two_processes):
    expected = predicted_one_by_one("single", of_packs("single"))
    got = predict_only("single", without_labels("single", make_packs("single")))
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    np.testing.assert_allclose(two_processes["predict without labels"], expected, rtol=1e-10)


# (e) Plain Trainer.


@pytest.fixture(scope="module")
def plain():
    return train_plain()


def test_plain_trainer_learns_what_packed_trainer_learns(plain, two_epochs):
    """Its own steps are 1 x 16; PackedTrainer's were 4 x 4."""
    assert difference(plain, two_epochs) < 1e-12
    losses = [[step["loss"] for step in run["steps"]] for run in (plain, two_epochs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


PLAIN_VARIATIONS = {name: VARIATIONS[name] for name in list(VARIATIONS)[:3]}
PLAIN_VARIATIONS["compiled"] = COMPILED | {"torch_compile_backend": "eager"}


@pytest.mark.parametrize("name", PLAIN_VARIATIONS)
def test_these_change_nothing_under_plain_trainer(name, plain):
    assert_same(train_plain(**PLAIN_VARIATIONS[name]), plain)


def test_plain_trainer_resumed_and_evaluated(plain, tmp_path):
    """In the middle of its two epochs; an evaluation in between changes nothing."""
    options = {"folder": tmp_path, "eval_dataset": make_packs("mlm"), "eval_strategy": "steps", "eval_steps": 1}
    train_plain(max_steps=1, save_strategy="steps", save_steps=1, **options)
    assert_same(train_plain(resume=True, **options), plain)


def test_plain_trainer_with_an_iterable_dataset(plain):
    got = train_plain(make_packs("mlm").to_iterable_dataset(), max_steps=4)
    assert_same(got, plain)


def test_plain_trainer_and_labels_of_tokens():
    """1 x 18: the label of a token means the same in a row of several sequences."""
    options = {"per_device_train_batch_size": 18, "num_train_epochs": 1}
    assert difference(train_plain(make_packs("tokens"), head="tokens", **options), train("tokens", 18)) < 1e-12


def test_control_plain_trainer_is_wrong_under_accumulation(plain):
    """What the callback refuses: four passes of 4 instead of one of 16 make another loss and other parameters."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    wrong = train_plain(with_callback=False, **options)
    assert wrong["steps"][0]["loss"] > 2 * plain["steps"][0]["loss"]
    assert difference(wrong, plain) > 1e-2


def test_control_without_isolation_losses_differ(plain):
    wrong = train_plain(with_callback=False, isolated=False)
    assert abs(wrong["steps"][0]["loss"] / plain["steps"][0]["loss"] - 1) > 1e-3
    assert difference(wrong, plain) > 1e-3


REFUSED = [
    ({"isolated": False}, "BertForMaskedLM ignores sequence_ids.*call collate.isolate_sequences"),
    ({"remove_unused_columns": True}, "remove_unused_columns=True strips sequence_lengths"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4: BertForMaskedLM averages.*PackedTrainer"),
    ({"include_num_input_tokens_seen": "non_padding"}, "counts an attention_mask"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: next(iter(value)) if value else "")
def test_plain_trainer_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_plain(**options)


class OtherArguments:
    """TrainingArguments that claim what this machine does not have: several ranks, GPUs."""

    def __init__(self, args, changes):
        self._args, self._changes = args, changes

    def __getattr__(self, name):
        return self._changes[name] if name in self._changes else getattr(self._args, name)


def begin_training(model, emit="sequence_ids", train_dataloader=None, unpacked_rows=None, **changes):
    """What the callback does at the start of a training that is right except for the changes."""
    callback = make_collator("mlm", emit=emit, unpacked_rows=unpacked_rows, pad_to=LENGTH).callback()
    options = {"remove_unused_columns": False, "include_num_input_tokens_seen": "no"}
    with make_trainer(make_model("mlm"), Trainer, **options) as trainer:
        args = OtherArguments(trainer.args, changes)
        callback.on_train_begin(args, trainer.state, trainer.control, model=model, train_dataloader=train_dataloader)


REFUSED_BY_BOTH = {
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "batch_eval_metrics": True,
    "include_for_metrics": ["inputs"],
    "eval_do_concat_batches": False,
    "dataloader_in_order": False,
    "restore_callback_states_from_checkpoint": True,
    "train_sampling_strategy": "group_by_length",
}


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_what_packed_trainer_refuses_the_callback_refuses(name):
    options = {name: REFUSED_BY_BOTH[name]}
    for who, run in (
        ("PackedTrainer", lambda: make_trainer(make_model("mlm"), **options).__enter__()),
        ("plain Trainer on packs", lambda: train_plain(**options)),
    ):
        with pytest.raises(ValueError, match=f"{who} cannot honour {name}="):
            run()


def test_the_list_holds_what_is_refused_and_no_default():
    assert {"use_liger_kernel", "fp16_full_eval", *REFUSED_BY_BOTH} == {name for name, *_ in REFUSED_ARGUMENTS}
    with make_trainer(make_model("mlm"), Trainer) as trainer:
        refuse_arguments(trainer.args, "nobody")
        for name, value in {"use_liger_kernel": True, "fp16_full_eval": True, "n_gpu": 2}.items():
            with pytest.raises(ValueError, match="cannot"):
                refuse_arguments(OtherArguments(trainer.args, {name: value}), "nobody")
        with pytest.raises(ValueError, match="cannot honour average_tokens_across_devices=False"):
            refuse_arguments(
                OtherArguments(trainer.args, {"world_size": 2, "average_tokens_across_devices": False}), "nobody"
            )
        sizes = SimpleNamespace(cp_size=2)
        with pytest.raises(ValueError, match="cannot honour cp_size"):
            refuse_arguments(OtherArguments(trainer.args, {"parallelism_config": sizes}), "nobody")


class OwnForward(BertForMaskedLM):
    """A model whose loss may be right under accumulation and over ranks."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class NoForward(BertForMaskedLM):
    """A model with the stock loss."""


def stock(head="mlm", model_class=None, isolated=True, **changes):
    model = make_model(head, **changes)
    if model_class is not None:
        model = model_class(model.config)
    return isolate_sequences(model) if isolated else model


def with_attention(implementation, model=None):
    model = stock(isolated=False) if model is None else model
    model.config._attn_implementation_internal = implementation
    return model


def modernbert():
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    return AutoModelForMaskedLM.from_config(
        AutoConfig.for_model("modernbert", **sizes, **special, intermediate_size=32)
    )


def deberta():
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model("deberta-v2", **sizes, intermediate_size=32))


class DataLoaderDispatcher:
    """accelerate's, by its name."""

    def __len__(self):
        return 1


NOT_BEGUN = {
    "ranks": (lambda: stock(), {"world_size": 2}, "ranks=2: BertForMaskedLM averages"),
    "GPUs": (lambda: stock(), {"n_gpu": 2}, "GPUs in one process=2"),
    "a subclass": (
        lambda: stock(model_class=NoForward),
        {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps=2: NoForward averages",
    ),
    "even batches": (
        lambda: stock(model_class=OwnForward),
        {"world_size": 2},
        "accelerator_config={'even_batches': False}",
    ),
    "a classifier": (lambda: stock("single"), {}, "BertForSequenceClassification makes one prediction per row"),
    "questions": (lambda: stock("answers"), {}, "BertForQuestionAnswering .* reads the row as one sequence"),
    "sentence pairs": (lambda: stock(model_class=BertForPreTraining), {}, "BertForPreTraining makes one prediction"),
    "next sentences": (lambda: stock(model_class=BertForNextSentencePrediction), {}, "makes one prediction per row"),
    "positions": (
        lambda: isolate_sequences(RobertaForMaskedLM(roberta_config())),
        {},
        "positions begin at 0, those of RobertaForMaskedLM at 2",
    ),
    "a bool mask under eager": (
        lambda: with_attention("eager"),
        {"emit": "attention_mask"},
        "right for sdpa only, but BertForMaskedLM uses 'eager'",
    ),
    "a mask and ids": (lambda: stock(), {"emit": "attention_bias"}, "takes no mask beside sequence_ids"),
    "a mask and windows": (modernbert, {"emit": "attention_bias"}, "replace the sliding windows of ModernBert"),
    "a mask that is ignored": (deberta, {"emit": "attention_bias"}, "leaks between packed sequences in attention"),
    "flash without flash": (lambda: with_attention("sdpa"), {"emit": "flash"}, "is for flash attention, but"),
    "flash that is torn": (
        lambda: with_attention("flash_attention_2"),
        {"emit": "flash", "train_dataloader": DataLoaderDispatcher()},
        "one row per batch, which dispatch would cut",
    ),
    "rows that dispatch would drop": (
        lambda: stock(),
        {"unpacked_rows": "pack", "train_dataloader": DataLoaderDispatcher()},
        "unpacked_rows='pack' gives as many rows as a batch needs, and dispatch would drop",
    ),
}


@pytest.mark.parametrize("name", NOT_BEGUN)
def test_plain_trainer_does_not_begin_with(name):
    make, changes, message = NOT_BEGUN[name]
    with pytest.raises(ValueError, match=message):
        begin_training(make(), **changes)


def test_plain_trainer_begins():
    begin_training(stock())
    begin_training(stock("tokens"))
    begin_training(stock(model_class=OwnForward), gradient_accumulation_steps=4)
    begin_training(with_attention("sdpa"), emit="attention_mask")
    begin_training(with_attention("eager"), emit="attention_bias")
    begin_training(with_attention("flash_attention_2"), emit="flash")


def test_plain_trainer_does_not_evaluate_what_it_would_not_train():
    collator = make_collator("mlm")
    options = {"remove_unused_columns": False, "include_num_input_tokens_seen": "no"}
    options |= {"data_collator": collator, "callbacks": [collator.callback()], "eval_dataset": make_packs("mlm")}
    with make_trainer(make_model("mlm"), Trainer, **options) as trainer:
        with pytest.raises(ValueError, match="BertForMaskedLM ignores sequence_ids"):
            trainer.evaluate()
        isolate_sequences(trainer.model)
        assert trainer.evaluate()["eval_loss"] > 0


# (f) What is counted and logged.


@pytest.mark.parametrize("head", HEADS)
def test_counts_and_metrics_are_logged(head, one_step):
    steps, packs = one_step[head]["steps"], list(make_packs(head))
    for step, seen in zip(steps, (packs[:16], packs), strict=True):
        lengths = [length for pack in seen for length in pack["sequence_lengths"]]
        assert step["sequences_seen"] == len(lengths)
        assert step["tokens_seen"] == step["num_input_tokens_seen"] == sum(lengths)
        assert METRICS[head] <= step.keys()
    evaluation = one_step[head]["evaluation"]
    assert {f"eval_{name}" for name in METRICS[head]} <= evaluation.keys()
    assert (evaluation["eval_sequences"], evaluation["eval_tokens"]) == (len(lengths), sum(lengths))


@pytest.mark.parametrize("head", ["single", "tokens"])
def test_accuracy_is_that_of_the_predictions(head):
    got = predict(head, make_packs(head))
    is_label = got["labels"] != -100
    hits = (got["predictions"].argmax(-1) == got["labels"])[is_label]
    assert 0 < hits.mean() < 1
    assert got["metrics"]["eval_accuracy"] == pytest.approx(hits.mean())


def test_ragged_columns_do_no_harm():
    """Lists that are empty in one pack and not in the next are no column of numbers."""
    packed = make_packs("single").to_list()
    packed[0]["ragged"], packed[1]["ragged"] = [[] for _ in packed[0]["ragged"]], [[1] for _ in packed[1]["ragged"]]
    batch = make_collator("single")(packed[:2])
    assert "ragged" not in batch and batch["labels"].shape == batch["extra"].shape


# (g) Other models, and refusals.


def roberta_config():
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    return RobertaConfig(
        **sizes, intermediate_size=32, max_position_embeddings=LENGTH + 2, initializer_range=0.3, type_vocab_size=2
    )


def test_positions_of_roberta_are_found():
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(roberta_config()).double()
    with make_trainer(model, data_collator=make_collator("single")) as trainer:
        got = trainer.predict(make_packs("single")).predictions
    model.eval()
    expected = [model(**as_tensors(row)).logits[0] for row in of_packs("single")]
    np.testing.assert_allclose(got, torch.stack(expected).detach().numpy(), rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocess_logits_for_metrics": lambda logits, labels: logits}, "preprocess_logits_for_metrics="),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics="),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True"),
        ({"train_sampling_strategy": "group_by_length"}, "packs have one length"),
    ],
)
def test_what_would_be_ignored_is_refused(options, message):
    with pytest.raises(ValueError, match=message), make_trainer(make_model("single"), **options):
        pass


def test_a_loss_that_would_be_ignored_is_refused():
    model = OwnForward(make_model("mlm").config)
    with pytest.raises(ValueError, match="OwnForward has a forward of its own"), make_trainer(model):
        pass
    with make_trainer(model, task=task_for(model)) as trainer:
        assert trainer.task == task_for(make_model("mlm"))


def test_collators_that_know_no_packs_are_refused():
    options = {"train_dataset": make_packs("single"), "data_collator": default_data_collator}
    message = "default_data_collator knows nothing of packs"
    with make_trainer(make_model("single"), **options) as trainer, pytest.raises(ValueError, match=message):
        trainer.train()


def test_datasets_without_labels_are_refused():
    dataset = without_labels("single", make_packs("single"))
    options = {"train_dataset": dataset, "data_collator": make_collator("single")}
    with make_trainer(make_model("single"), **options) as trainer, pytest.raises(ValueError, match="without labels"):
        trainer.train()


def test_a_model_with_a_loss_of_its_own_can_be_made_by_model_init():
    with make_trainer(None, model_init=lambda: make_models()[1]) as trainer:
        assert trainer.task.count is not None
    with pytest.raises(ValueError, match="cannot honour compute_metrics"):
        make_trainer(None, model_init=lambda: make_models()[1], compute_metrics=len).__enter__()
