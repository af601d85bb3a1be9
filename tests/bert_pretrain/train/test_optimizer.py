"""Optimizers, their parameter groups, schedules and clipping, as a run gets them."""

import copy
import functools
import math

import numpy as np
import pytest
import pytorch_optimizer
import torch
from flag_runs import train
from pretraining_models import make_config
from safetensors.torch import load_file
from slow_training import lamb_step
from torch import nn
from training_runs import make_packs, make_trainer
from transformers import BertForPreTraining, Trainer, TrainingArguments

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import ATTENTION
from bert_pretrain.train.config import SEQUENCES_PER_STEP, PretrainConfig
from bert_pretrain.train.optimizer import Lamb, choose_optimizer

ONE_DIMENSIONAL = {"strength_bias_H", "span_bias_H", "alpha_bias_H"}  # parameters of heads: one number a head


def make_parameters():
    """Matrices of small and large norm, and vectors, one of them of zeros, in Trainer's two groups."""
    rng = np.random.default_rng(0)
    sizes = {(7, 5): 0.3, (40, 30): 10.0, (5,): 0.3, (3,): 0.0}
    parameters = [nn.Parameter(torch.tensor(rng.normal(size=size) * scale)) for size, scale in sizes.items()]
    groups = [{"params": parameters[:2], "weight_decay": 0.01}, {"params": parameters[2:], "weight_decay": 0.0}]
    return parameters, groups


def draw_gradients(rng, parameters):
    for parameter in parameters:
        parameter.grad = torch.tensor(rng.normal(size=parameter.shape) * 10.0 ** rng.integers(-4, 2))


def error_of_lamb(make, mistake=None):
    """(tensors,) worst relative difference to the paper's algorithm over 30 steps with warm-up."""
    parameters, groups = make_parameters()
    optimizer = make(groups, lr=1e-2, betas=(0.8, 0.99), eps=1e-8)
    states = [(parameter.detach().numpy().copy(), 0.0, 0.0) for parameter in parameters]
    rng, errors = np.random.default_rng(1), []
    for step in range(1, 31):
        rate = 1e-2 * min(1, step / 10)
        for group in optimizer.param_groups:
            group["lr"] = rate
        draw_gradients(rng, parameters)
        for i, parameter in enumerate(parameters):
            rules = {"t": step, "lr": rate, "betas": (0.8, 0.99), "eps": 1e-8, "adapted": parameter.ndim == 2}
            rules |= {"weight_decay": 0.01 if parameter.ndim == 2 else 0.0} | (mistake or {})
            states[i] = lamb_step(*states[i], parameter.grad.numpy(), **rules)
        optimizer.step()
        pairs = [(a.detach().numpy(), b) for a, (b, _, _) in zip(parameters, states, strict=True)]
        errors.append([abs(a - b).max() / (abs(b).max() or 1.0) for a, b in pairs])
    assert all(group["lr"] == rate and group["eps"] == 1e-8 for group in optimizer.param_groups)  # given back
    return np.max(errors, 0)


def test_lamb_is_that_of_its_paper():
    """Both bias corrections, any norm of the weights, decay within the update, vectors without adaptation."""
    assert float(make_parameters()[0][1].detach().norm()) > 300  # the library alone would cut it at 10
    # nearly: the library adds eps to the norm of the update
    assert max(error_of_lamb(Lamb)) < 1e-9


@pytest.mark.parametrize(
    ("mistake", "tensors"),
    [
        ({"t": 10**6}, [2, 3]),  # no bias correction; what is adapted has its scale from its own norm
        ({"weight_decay": 0.0}, [0, 1]),
        ({"adapted": False}, [0, 1]),
        ({"adapted": True}, [2]),
        ({"betas": (0.9, 0.99)}, [0, 1, 2, 3]),
        ({"betas": (0.8, 0.999)}, [0, 1, 2, 3]),
    ],
)
def test_each_rule_of_lamb_shows(mistake, tensors):
    assert min(error_of_lamb(Lamb, mistake)[tensors]) > 1e-5


LATE = {0: 0, 1: 3, 2: 1, 3: 5}
"""Parameter: steps before its first gradient. The second skips step 6 besides."""


def late_run(optimizer, parameters, seed, steps=range(1, 10)):
    """[step][parameter]: whether it had a gradient, and what it was then."""
    rng, seen = np.random.default_rng(seed), []
    for step in steps:
        draw_gradients(rng, parameters)
        for i, parameter in enumerate(parameters):
            if step <= LATE[i] or (i, step) == (1, 6):
                parameter.grad = None
        gradients = [None if parameter.grad is None else parameter.grad.numpy().copy() for parameter in parameters]
        optimizer.step()
        seen.append((gradients, [parameter.detach().numpy().copy() for parameter in parameters]))
    return seen


def late_errors(steps_of):
    """Worst relative difference of each parameter to the paper's algorithm; steps_of(step, count): its t."""
    parameters, groups = make_parameters()
    states = [(parameter.detach().numpy().copy(), 0.0, 0.0) for parameter in parameters]
    counts, errors = [0] * len(parameters), []
    for step, (gradients, values) in enumerate(late_run(Lamb(groups, lr=1e-2), parameters, 4), 1):
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                counts[i] += 1
                rules = {"t": steps_of(step, counts[i]), "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6}
                rules |= {"weight_decay": 0.01 if i < 2 else 0.0, "adapted": i < 2}
                states[i] = lamb_step(*states[i], gradient, **rules)
        pairs = zip(values, [state[0] for state in states], strict=True)
        errors.append([abs(ours - paper).max() / (abs(paper).max() or 1) for ours, paper in pairs])
    assert counts == [9, 5, 8, 4]
    return np.max(errors, 0)


def test_lamb_counts_the_steps_of_each_parameter():
    """A parameter whose first gradient comes late counts its own steps t; those of its group would be too many."""
    assert max(late_errors(lambda step, count: count)) < 1e-6
    assert max(late_errors(lambda step, count: step)[[1, 2, 3]]) > 0.05


def test_lamb_without_layerwise_adaptation_is_torchs_adam_for_late_parameters():
    ours, theirs = make_parameters()[0], make_parameters()[0]
    ours_seen = late_run(Lamb([{"params": ours, "adam": True}], lr=1e-2, eps=1e-8), ours, 5)
    theirs_seen = late_run(torch.optim.Adam(theirs, lr=1e-2, eps=1e-8), theirs, 5)
    for (_, our_values), (_, their_values) in zip(ours_seen, theirs_seen, strict=True):
        for our_value, their_value in zip(our_values, their_values, strict=True):
            np.testing.assert_allclose(our_value, their_value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("is_old", [False, True], ids=["own steps", "a group's steps"])
def test_lamb_resumes_late_parameters_and_states_of_before(is_old):
    """An old state counts the steps of groups: exact for parameters that had a gradient in each."""
    parameters, groups = make_parameters()
    optimizer = Lamb(groups, lr=1e-2)
    late_run(optimizer, parameters, 6, range(1, 5))
    state = copy.deepcopy(optimizer.state_dict())
    assert [state["state"][i]["step"] for i in range(3)] == [4, 1, 3] and 3 not in state["state"]
    assert not any("step" in group for group in state["param_groups"])
    if is_old:
        for group in state["param_groups"]:
            group["step"] = 4
        for own in state["state"].values():
            del own["step"]
    others = copy.deepcopy(parameters)
    resumed = Lamb([{"params": others[:2]}, {"params": others[2:]}], lr=1e-2)
    resumed.load_state_dict(state)
    late_run(optimizer, parameters, 7, range(5, 8))
    late_run(resumed, others, 7, range(5, 8))
    alike = [torch.equal(a, b) for a, b in zip(parameters, others, strict=True)]
    assert alike == [True, not is_old, not is_old, True]
    assert not any("step" in group for group in resumed.param_groups)


def test_lamb_takes_named_parameters():
    model, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    for lamb, module in ((Lamb(model.named_parameters()), model), (Lamb(twin.parameters()), twin)):
        module(torch.ones(4)).square().sum().backward()
        lamb.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    groups = Lamb([{"params": [("bias", model.bias)]}, {"params": [("weight", model.weight)]}]).param_groups
    assert [group["adam"] for group in groups] == [True, False]


def test_a_closure_of_lamb_makes_the_gradients():
    (parameter, *_), _ = make_parameters()
    optimizer = Lamb([parameter], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    before = parameter.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(parameter, before) and optimizer.state[parameter]["step"] == 1


@pytest.mark.parametrize("options", [{}, {"weight_decouple": False}, {"weight_decouple": False, "adam_debias": True}])
def test_the_librarys_own_lamb_is_not_the_papers(options):
    """Once it is mended there, `bert_pretrain.train.optimizer` is no longer needed."""
    assert max(error_of_lamb(functools.partial(pytorch_optimizer.Lamb, **options))) > 1e-3


def test_lamb_goes_on_from_its_state_bit_for_bit():
    rng = np.random.default_rng(3)
    parameters, groups = make_parameters()
    optimizer = Lamb(groups, lr=1e-2)
    for _ in range(3):
        draw_gradients(rng, parameters)
        optimizer.step()
    others = copy.deepcopy(parameters)
    resumed = Lamb([{"params": others[:2], "weight_decay": 0.5}, {"params": others[2:]}], lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        draw_gradients(rng, parameters)
        for other, parameter in zip(others, parameters, strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


@pytest.mark.parametrize("attention", ATTENTION)
def test_no_decay_on_biases_and_layernorm_weights(attention):
    """By name, for every attention head with its own parameters; the decayed ones are matrices, the others vectors."""
    model = PackedBertForPreTraining(make_config(packed_attention=attention))
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        is_spared = last == "bias" or "LayerNorm" in name or last in ONE_DIMENSIONAL
        assert (name not in decayed) == is_spared, name
        assert (parameter.ndim == 1) == is_spared, name


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_run_has_the_optimizer_it_asked_for(folders, tmp_path, optimizer):
    options = ["--weight_decay", "0.01", "--adam_epsilon", "1e-6", "--adam_beta1", "0.8", "--save_steps", "2"]
    assert train(folders, tmp_path / optimizer, "--optimizer", optimizer, *options) == 0
    state = torch.load(tmp_path / optimizer / "checkpoint-2" / "optimizer.pt")
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.01, 0.0]
    assert all(group["betas"] == (0.8, 0.999) and group["eps"] == 1e-6 for group in state["param_groups"])
    assert [group.get("adam") for group in state["param_groups"]] == (
        [False, True] if optimizer == "lamb" else [None, None]
    )
    model = BertForPreTraining.from_pretrained(tmp_path / optimizer)
    names = dict(model.named_parameters())
    assert sum(len(group["params"]) for group in state["param_groups"]) == len(names)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_without_labels_of_pairs_their_head_stays_as_it_was(folders, tmp_path, optimizer):
    first, decay = tmp_path / "first", ["--optimizer", optimizer, "--weight_decay", "0.1", "--learning_rate", "0.01"]
    assert train(folders, first, "--max_steps", "1") == 0
    for objective in ("none", "auto"):
        options = [*decay, "--model", str(first), "--objective", objective]
        assert train(folders, tmp_path / objective, *options) == 0
    before, unlabelled, labelled = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "none", "auto"))
    for name, value in before.items():
        is_of_pairs = name.startswith(("bert.pooler.", "cls.seq_relationship."))
        assert torch.equal(unlabelled[name], value) == is_of_pairs, name
        assert not torch.equal(labelled[name], value), name


def test_an_interrupted_run_with_lamb_ends_alike(folders, tmp_path):
    options = ["--optimizer", "lamb", "--hidden_dropout_prob", "0", "--attention_probs_dropout_prob", "0"]
    options += ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 1e-6}', "--save_steps", "2"]
    assert train(folders, tmp_path / "whole", *options) == 0
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    assert train(folders, tmp_path / "parts", *options, "--resume_from_checkpoint", checkpoint) == 0
    whole, parts = (BertForPreTraining.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_polynomial_schedule_warms_up_and_ends_where_it_is_told():
    """lr_end beside warm-up: linear up to the rate, then a polynomial down to lr_end."""
    with make_trainer(
        train_dataset=make_packs(22),
        per_device_train_batch_size=4,
        learning_rate=0.1,
        max_steps=10,
        warmup_steps=4,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"lr_end": 0.01, "power": 2.0},
    ) as trainer:
        trainer.train()
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        final = trainer.lr_scheduler.get_last_lr()[0]
    expected = [0.1 * step / 4 for step in range(4)] + [0.09 * (1 - step / 6) ** 2 + 0.01 for step in range(6)]
    assert rates == pytest.approx(expected) and final == pytest.approx(0.01)


@pytest.mark.parametrize(("packs_per_pass", "passes"), [(16, 1), (4, 4)])
def test_the_gradient_of_the_whole_step_is_clipped(packs_per_pass, passes):
    with make_trainer(
        train_dataset=make_packs(16),
        per_device_train_batch_size=packs_per_pass,
        gradient_accumulation_steps=passes,
        max_grad_norm=0.25,
        learning_rate=0.5,
    ) as trainer:
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        trainer.train()
        moved = [a.detach() - b for a, b in zip(trainer.model.parameters(), before, strict=True)]
        norm = next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    assert norm > 1  # it had to be clipped
    length = math.sqrt(sum(float((step**2).sum()) for step in moved))
    assert length == pytest.approx(0.5 * 0.25, rel=1e-5)  # clip_grad_norm_ adds 1e-6 to the norm


def configured(folder, policy="packs", training=None, **changes):
    config = PretrainConfig(dataset="", tokenizer="", batch_policy=policy, **changes)
    arguments = TrainingArguments(str(folder), use_cpu=True, adam_beta1=0.9, adam_beta2=0.98, **training or {})
    return config, arguments, BertForPreTraining(make_config())


@pytest.fixture
def packs(folders):
    from datasets import load_from_disk

    from packing import packed_info

    packs = load_from_disk(folders["packed"])["train"]
    info = packed_info(packs)
    return packs, info.num_sequences / info.num_packs


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_betas_to_the_power_of_the_packing_factor(packs, tmp_path, caplog, optimizer):
    packs, factor = packs
    assert factor > 1.5
    with caplog.at_level("INFO"):
        _, options = choose_optimizer(*configured(tmp_path, optimizer=optimizer, beta_power=True), packs)
    assert options["betas"] == (0.9**factor, 0.98**factor)
    assert f"to the packing factor {factor:.4f} are ({0.9**factor:.6g}, {0.98**factor:.6g})" in caplog.text
    config, arguments, model = configured(tmp_path, optimizer=optimizer)
    chosen = choose_optimizer(config, arguments, model, packs)
    assert chosen is None if optimizer == "adamw" else chosen[1]["betas"] == (0.9, 0.98)
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.98)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "sequences", "beta_power": True}, r"beta_power is for batch_policy='packs'.*must stay"),
        ({"beta_power": True, "training": {"optim": "sgd"}}, r"optim='sgd' does not have"),
        ({"optimizer": "lamb", "training": {"optim": "sgd"}}, r"optim='sgd'.*but optimizer='lamb' is ours"),
        ({"optimizer": "lamb", "training": {"optim_args": "a=1"}}, r"optim_args='a=1'.*leave out either"),
    ],
)
def test_what_does_not_fit_is_refused(packs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        choose_optimizer(*configured(tmp_path, **changes), packs[0])


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match=r"unknown optimizer 'lars'; choose from adamw, lamb"):
        PretrainConfig(dataset="", tokenizer="", optimizer="lars")


@pytest.mark.parametrize("how", ["fsdp", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_lamb_is_refused_where_tensors_are_split(packs, tmp_path, monkeypatch, how):
    config, arguments, model = configured(tmp_path, optimizer="lamb")
    if how == "fsdp":
        arguments.fsdp = True  # afterwards: TrainingArguments wants a process group
    else:
        monkeypatch.setenv(how, "true")
    with pytest.raises(ValueError, match="optimizer='lamb' needs the norms of whole tensors"):
        choose_optimizer(config, arguments, model, packs[0])


def test_a_run_of_packs_with_powered_betas(folders, packs, tmp_path):
    """A resumed run has them, too, and does not raise them to the power twice."""
    options = ["--batch_policy", "packs", "--beta_power", "True", "--per_device_train_batch_size", "4"]
    options += ["--sequences_per_step", str(SEQUENCES_PER_STEP)]  # the default, which packs do not use
    assert train(folders, tmp_path / "bert", *options, "--optimizer", "lamb", "--save_steps", "2") == 0
    checkpoint = str(tmp_path / "bert" / "checkpoint-2")
    again = ["--resume_from_checkpoint", checkpoint]
    assert train(folders, tmp_path / "again", *options, "--optimizer", "lamb", "--save_steps", "2", *again) == 0
    for run in ("bert", "again"):
        state = torch.load(tmp_path / run / "checkpoint-4" / "optimizer.pt")
        assert [group["betas"] for group in state["param_groups"]] == [(0.9 ** packs[1], 0.999 ** packs[1])] * 2


def test_refused_before_anything_is_written(folders, tmp_path, capsys):
    assert train(folders, tmp_path / "bert", "--beta_power", "True") == 2
    assert "--beta-power is for --batch-policy packs" in capsys.readouterr().err
    assert not (tmp_path / "bert").exists()
