"""tokens_per_pass: passes sized in token slots, by PackedTrainer; and what it tells GPU users."""

from types import SimpleNamespace

import pytest
import torch
from pretraining_models import MAX_LENGTH
from training_runs import make_epochs, make_packs, make_trainer
from transformers import TrainingArguments

from collate.training.dataloaders import packs_per_pass, said_packs_per_pass
from collate.training.refused import wanted_on_gpu


@pytest.mark.parametrize(
    ("tokens", "slots", "packs"), [(65_536, 512, 128), (512, 512, 1), (1023, 512, 1), (1024, 512, 2), (48, 1, 48)]
)
def test_a_pass_takes_as_many_whole_packs_as_fit(tokens, slots, packs):
    for given in (None, packs):
        assert packs_per_pass(tokens, slots, given) == packs


@pytest.mark.parametrize(
    ("tokens", "given", "message"),
    [
        (511, None, "tokens_per_pass=511 is less than the 512 token slots of one pack; set it to 512 or more, or pack"),
        (0, None, "tokens_per_pass=0 must be a whole number, at least 1"),
        (1.5, None, "tokens_per_pass=1.5 must be a whole number"),
        (
            2048,
            3,
            "tokens_per_pass=2048 is 4 packs of 512 token slots, but per_device_train_batch_size=3 disagrees",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tokens, given, message):
    with pytest.raises(ValueError) as refused:
        packs_per_pass(tokens, 512, given)
    assert message in str(refused.value)


def test_the_default_of_transformers_says_nothing(tmp_path):
    for given, said in (({}, None), ({"per_device_train_batch_size": 3}, 3)):
        assert said_packs_per_pass(TrainingArguments(str(tmp_path), use_cpu=True, **given)) == said


def outcome(**how):
    with make_trainer(train_dataset=make_packs(22), **how) as trainer:
        given, own = trainer.args.per_device_train_batch_size, trainer._train_batch_size
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return (given, own), losses, [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_tokens_per_pass_is_per_device_train_batch_size_in_tokens():
    in_packs = outcome(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    in_tokens = outcome(tokens_per_pass=4 * MAX_LENGTH + 1, gradient_accumulation_steps=4)
    assert in_tokens[:2] == in_packs[:2] and in_tokens[0] == (4, 4) and len(in_tokens[1]) == 2
    assert all(map(torch.equal, in_tokens[2], in_packs[2]))


def test_the_arguments_of_the_caller_stay():
    with make_trainer(train_dataset=make_packs(22)) as trainer:
        arguments = trainer.args  # the caller's own
    again = type(trainer)(
        trainer.model,
        arguments,
        train_dataset=make_packs(22),
        data_collator=trainer.data_collator,
        tokens_per_pass=3 * MAX_LENGTH,
    )
    assert arguments.per_device_train_batch_size == 8 and again.args.per_device_train_batch_size == 3


def test_a_step_of_sequences_takes_passes_of_tokens():
    """Its passes must have room for the step, however they are sized."""
    how = {"train_dataset": make_epochs(), "sequences_per_step": 24, "train_sampling_strategy": "random"}
    with make_trainer(**how, tokens_per_pass=16 * MAX_LENGTH, max_steps=1) as trainer:
        trainer.train()
    assert trainer.state.log_history[0]["sequences_seen"] == 24
    with (
        make_trainer(**how, tokens_per_pass=MAX_LENGTH, max_steps=1) as trainer,
        pytest.raises(ValueError, match=r"a step has 1 slots: .* set gradient_accumulation_steps=\d+"),
    ):
        trainer.train()


def test_the_slots_of_a_pack_must_be_known():
    unknown = {"data_collator": SimpleNamespace(), "tokens_per_pass": 512}
    with (
        pytest.raises(ValueError, match="tokens_per_pass needs to know how many token slots a pack has; give a train_"),
        make_trainer(train_dataset=make_packs(22), **unknown),
    ):
        pass
    with make_trainer(train_dataset=make_epochs(), **unknown) as trainer:  # the dataset says it
        assert trainer.args.per_device_train_batch_size == 512 // MAX_LENGTH


class OnGpu(TrainingArguments):
    """Arguments whose device is a GPU, though nothing is there."""

    device = property(lambda self: torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "given", "wanted"),
    [
        ((8, 0), {}, ["bf16", "workers=4", "persistent", "nan_inf", "pass"]),
        ((7, 5), {}, ["workers=4", "persistent", "nan_inf", "pass"]),
        ((9, 0), {"bf16": True, "per_device_train_batch_size": 64}, ["workers=4", "persistent", "nan_inf"]),
        (
            (9, 0),
            {
                "fp16": True,
                "per_device_train_batch_size": 64,
                "dataloader_num_workers": 2,
                "dataloader_persistent_workers": True,
                "logging_nan_inf_filter": False,
            },
            [],
        ),
    ],
)
def test_what_a_gpu_user_may_want(tmp_path, monkeypatch, capability, given, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    training = OnGpu(str(tmp_path), use_cpu=True, report_to="none", **given)
    training.dataloader_pin_memory = True  # use_cpu turned it off
    before = training.to_dict()
    said = wanted_on_gpu(training)
    found = [name for name in ("bf16", "workers=4", "persistent", "pin_memory", "nan_inf", "pass") if name in said]
    assert found == wanted and training.to_dict() == before


def test_one_line_says_it_and_none_on_cpus(monkeypatch, caplog):
    caplog.set_level("INFO", logger="collate.training.trainer")
    with make_trainer(train_dataset=make_packs(22)):
        assert "faster" not in caplog.text
    monkeypatch.setattr("collate.training.trainer.wanted_on_gpu", lambda args: "bf16=True")
    with make_trainer(train_dataset=make_packs(22)) as trainer:
        assert caplog.text.count("make training on a GPU faster, and stay as they are: bf16=True") == 1
    assert not trainer.args.bf16
