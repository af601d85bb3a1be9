"""Runs that are killed, told to stop, or resumed with damaged or other settings; each ends as the uninterrupted run."""

import contextlib
import ctypes
import errno
import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from killed_runs import PATIENCE, Run, run_killed
from pairs import make_pair, make_tokenizer
from pretraining_models import MAX_LENGTH, make_config
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from training_runs import make_packs, make_trainer
from transformers import BertForMaskedLM, Trainer, TrainingArguments, trainer

from bert_pretrain.cli import main as bert_pretrain
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.new_model import build_model
from bert_pretrain.train.resume import _check_record
from bert_pretrain.train.run_record import run_record
from collate import DataCollatorWithPacking
from collate.training import agreement, checkpoints
from collate.training.agreement import agreed, one_run
from collate.training.checkpoints import DamagedCheckpoint, check_checkpoint, last_checkpoint
from collate.training.resume import ResumesExactly
from collate.training.signals import SaveOnSignal
from packing import pack_dataset
from packing.files.locks import held

EXACT = ("loss", "mlm_", "nsp_", "sequences_seen", "tokens_seen", "grad_norm", "learning_rate", "epoch", "pack")
"""What logs hold beside timings."""
SEEN = ("sequences_seen", "tokens_seen")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A run of 15 steps: 3 epochs of 60 sequences, 5 passes a step, dropout on, logs that straddle checkpoints."""
    folder = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    splits = {
        name: pack_dataset(Dataset.from_list([make_pair(rng, int(n)) for n in lengths]), 64, packer="spfhp")
        for name, lengths in {"train": rng.integers(8, 40, 60), "test": rng.integers(8, 40, 8)}.items()
    }
    DatasetDict(splits).save_to_disk(folder / "packed")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    run = {"dataset": folder / "packed", "tokenizer": folder / "tokenizer", "sequences_per_step": 12}
    run |= {"per_device_train_batch_size": 2, "num_train_epochs": 3, "save_steps": 1, "logging_steps": 2}
    run |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "learning_rate": 0.01}
    run |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return flags(**run)


def flags(**options):
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


WORKERS = [
    flags(dataloader_num_workers=0),
    flags(dataloader_num_workers=2, dataloader_persistent_workers=True),
    flags(dataloader_num_workers=1),
]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    Run(options, output).finish()
    return output


def assert_same_end(output, expected, same_log=True):
    """The same files, byte for byte; optimizer and schedule tensor for tensor; and the same figures in the log."""
    assert (output / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    ours, theirs = last_checkpoint(output), last_checkpoint(expected)
    assert ours.name == theirs.name
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_equal(*(torch.load(folder / name, weights_only=True) for folder in (ours, theirs)))
    if same_log:
        assert figures(output) == figures(expected)
    assert not (output / "_unfinished").exists()


def assert_equal(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        for pair in zip(ours, theirs, strict=True):
            assert_equal(*pair)
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    else:
        assert ours == theirs


def figures(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    return [
        {k: v for k, v in entry.items() if k == "step" or k.removeprefix("eval_").startswith(EXACT)}
        for entry in entries
    ]


# -- killed ------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_ends_as_the_one_that_was_not(options, whole, tmp_path):
    """Workers differ from start to start."""
    moments = run_killed(options, tmp_path / "run", kills=3, seed=0, restarts=WORKERS)
    assert sum(moments.values()) == 3 and moments["saving"], moments
    assert_same_end(tmp_path / "run", whole)
    logged = [entry for entry in figures(whole) if "loss" in entry]
    assert len(logged) == 8 and logged[-1]["sequences_seen"] > 150


LONG_RUNS = {
    "save every step": (12, {"num_train_epochs": 9}, WORKERS),
    "one pass a step, workers": (6, {"per_device_train_batch_size": 8, "num_train_epochs": 5}, WORKERS[1:]),
    "LAMB, cosine, token loss": (
        6,
        {"optimizer": "lamb", "lr_scheduler_type": "cosine", "mlm_loss": "token", "save_steps": 2},
        WORKERS,
    ),
    "evaluation and the best model": (
        6,
        {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2},
        WORKERS[:1],
    ),
    "saved at the end of epochs": (6, {"save_strategy": "epoch", "eval_strategy": "epoch"}, WORKERS[:2]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_RUNS)
def test_runs_that_are_killed_end_as_those_that_were_not(options, tmp_path, name):
    kills, other, restarts = LONG_RUNS[name]
    arguments = [*options, *flags(**other)]
    Run(arguments, tmp_path / "whole").finish()
    moments = run_killed(arguments, tmp_path / "run", kills, seed=len(name), restarts=restarts)
    print(name, moments)
    assert sum(moments.values()) >= (10 if kills > 10 else 3), moments
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_the_command_itself_is_killed(options, whole, tmp_path):
    """Two interpreters, as a user starts them: the first is killed after it has written a checkpoint."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "bert_pretrain.cli", "train", *options, "--output_dir", str(output)]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log)
        while first.poll() is None and not (output / "checkpoint-4").exists():
            time.sleep(0.01)
        first.kill()
        assert first.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert not (output / "model.safetensors").exists()
        assert subprocess.run(command, stdout=log, stderr=log).returncode == 0, (tmp_path / "log").read_text()
    assert "resuming from" in (tmp_path / "log").read_text()
    assert_same_end(output, whole)


# -- two at once -------------------------------------------------------------------------------------------------


def test_a_second_run_into_the_same_folder_is_refused(options, whole, tmp_path, capsys):
    """A second run is refused while the first trains, but not after that was killed; a refused run leaves no trace."""
    output = tmp_path / "run"
    first = Run([*options, *flags(num_train_epochs=3, dataloader_num_workers=2)], output)
    assert first.wait_for_checkpoint()
    first.send(signal.SIGSTOP)
    assert train(options, output) == 2
    (rank,) = first.ranks
    message = f"another run (process {rank.pid} on {platform.node()}) is writing into output_dir='{output}'; wait for"
    assert message in capsys.readouterr().err
    assert train(options, output, max_steps=3, learning_rate=1.0) == 2
    first.send(signal.SIGKILL)  # the lock is not passed to its workers, which live on for a while
    assert first.end() == {-signal.SIGKILL}
    assert train(options, output) == 0
    assert_same_end(output, whole)
    assert not (output / "_lock").exists()


def test_two_ranks_hear_of_the_other_run_and_leave_no_folder(options, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    with held(output / "_lock"):
        run = Run([*options, *flags(ddp_backend="gloo")], output, ranks=2)
        run.ranks[0].join(PATIENCE)
        assert run.ranks[0].exitcode == 2, run.log.read_text()
        run.ranks[1].terminate()
        run.ranks[1].join(PATIENCE)
    assert run.log.read_text().count("is writing into output_dir=") == 1
    assert list(output.iterdir()) == []


def test_a_trainer_holds_its_folder_while_it_trains_and_saves(tmp_path):
    how = {"train_dataset": make_packs(8), "max_steps": 1, "folder": tmp_path / "run"}
    with make_trainer(save_strategy="steps", save_steps=1, **how) as trainer:
        with held_by_another(tmp_path / "run" / "_lock"), pytest.raises(BlockingIOError, match="is writing into outp"):
            trainer.train()
        assert not (tmp_path / "run" / "checkpoint-1").exists()
        trainer.train()
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-1"}
    with make_trainer(save_strategy="no", **how) as trainer, held_by_another(tmp_path / "run" / "_lock"):
        trainer.train()  # it writes nothing


@contextlib.contextmanager
def held_by_another(lock):
    lock.parent.mkdir(exist_ok=True)
    with held(lock):
        yield


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, wait=False):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("packing.files.locks.lock", refuse)
    with one_run(TrainingArguments(str(tmp_path), use_cpu=True), tmp_path):
        pass
    assert f"{tmp_path} cannot be locked (Function not implemented): start no second run in it" in caplog.text


# -- told to stop ------------------------------------------------------------------------------------------------


def test_a_signal_to_all_processes_saves_and_ends(options, whole, tmp_path):
    """The signal goes to the dataloader's workers, too; SIGUSR1 goes to the run alone."""
    output = tmp_path / "run"
    for number, to_group, status in ((signal.SIGTERM, True, 143), (signal.SIGUSR1, False, 138)):
        run = Run([*options, *WORKERS[1], *flags(save_steps=1000)], output)
        assert run.wait_for(lambda run=run: run.log.exists() and "\ntrain " in run.log.read_text()[run.begin :])
        run.send(number, to_group=to_group)
        assert run.end() == {status}, run.log.read_text()
        checkpoint = last_checkpoint(output)
        message = f"{number.name} received: saved {checkpoint.name} and stopped; run the same command again to resume"
        assert message in run.log.read_text()[run.begin :]
        assert not (output / "model.safetensors").exists()
    Run(options, output).finish()
    assert_same_end(output, whole)


def test_control_c_ends_soon_and_says_that_the_checkpoint_stays(options, tmp_path):
    run = Run([*options, *flags(num_train_epochs=100, save_steps=5)], tmp_path / "run")
    assert run.wait_for_checkpoint()
    run.send(signal.SIGINT)
    assert run.end() == {130}
    assert re.search(r"interrupted; .*checkpoint-\d+ stays, and the same command resumes from it", run.log.read_text())
    check_checkpoint(last_checkpoint(tmp_path / "run"))


def test_control_c_is_kept_where_compiled_code_loses_the_exception(monkeypatch):
    """A callback of ctypes reports what is raised in it, and goes on: the negative control."""

    @ctypes.CFUNCTYPE(None)
    def press():
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        lost = []
        with monkeypatch.context() as patch:
            patch.setattr(sys, "unraisablehook", lambda given: lost.append(given.exc_type))
            press()
        assert lost == [KeyboardInterrupt]
        for event in ("on_substep_end", "on_step_end", "on_prediction_step"):
            with SaveOnSignal() as stop, pytest.raises(KeyboardInterrupt):
                press()
                getattr(stop, event)(None, None, None)
        with SaveOnSignal() as stop, pytest.raises(KeyboardInterrupt):
            press()
            signal.raise_signal(signal.SIGINT)  # pressed again
        with SaveOnSignal() as stop:
            press()
        with pytest.raises(KeyboardInterrupt):
            stop.end_if_received()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_ranks_agree_on_the_step_and_go_on(options, tmp_path):
    """The signal reaches one rank; then both are killed; resumed, they end like two that were never interrupted."""
    options = [*options, *flags(sequences_per_step=16, ddp_backend="gloo")]
    Run(options, tmp_path / "whole", ranks=2).finish()
    output = tmp_path / "run"
    first = Run(options, output, ranks=2)
    assert first.wait_for_checkpoint()
    first.send(signal.SIGTERM, ranks=[1])
    assert first.end() == {143}, first.log.read_text()
    second = Run(options, output, ranks=2)
    assert second.wait_for_checkpoint()
    assert second.kill()
    Run(options, output, ranks=2).finish()
    assert_same_end(output, tmp_path / "whole")
    names = {path.name for path in last_checkpoint(output).iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "manifest.json"} <= names


def test_one_rank_goes_on_as_two(options, tmp_path):
    """The same sequences in each step, so the same losses up to rounding. Dropout is off."""
    options = [*options, *flags(sequences_per_step=16, hidden_dropout_prob=0, attention_probs_dropout_prob=0)]
    Run(options, tmp_path / "whole").finish()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "run" / "checkpoint-5")
    Run([*options, *flags(ddp_backend="gloo")], tmp_path / "run", ranks=2).finish()
    ours, theirs = figures(tmp_path / "run"), figures(tmp_path / "whole")
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert {k: our.get(k) for k in SEEN} == {k: their.get(k) for k in SEEN}
        name = "loss" if "loss" in their else "eval_loss"
        assert our[name] == pytest.approx(their[name], rel=1e-4)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


# -- resumed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy_of_whole(whole, tmp_path):
    for name in ("checkpoint-6", "checkpoint-7"):
        shutil.copytree(whole / name, tmp_path / "run" / name)
    return tmp_path / "run"


def train(options, output, **other):
    return bert_pretrain(["train", *options, "--output_dir", str(output), *flags(**other)])


def test_a_damaged_checkpoint_is_refused(options, copy_of_whole, tmp_path, capsys):
    newest = copy_of_whole / "checkpoint-7"
    optimizer = newest / "optimizer.pt"
    contents = bytearray(optimizer.read_bytes())
    contents[len(contents) // 2] ^= 1
    optimizer.write_bytes(contents)
    damage = f"{newest} is damaged: optimizer.pt has other contents than were written; "
    assert train(options, copy_of_whole) == 2
    assert damage + "delete the folder to resume from checkpoint-6" in capsys.readouterr().err
    assert train(options, tmp_path / "other", resume_from_checkpoint=newest) == 2
    assert damage + "name another checkpoint-N folder" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    shutil.rmtree(newest)
    assert train(options, copy_of_whole, max_steps=7) == 0
    check_checkpoint(newest)


def test_each_file_of_a_checkpoint_is_read_once_to_check_it(options, copy_of_whole, monkeypatch):
    read, check = [], checkpoints.checksum
    monkeypatch.setattr(checkpoints, "checksum", lambda path: read.append(path) or check(path))
    assert train(options, copy_of_whole, max_steps=7) == 0  # no step is trained, and so none is saved
    newest = copy_of_whole / "checkpoint-7"
    assert sorted(read) == sorted(path for path in newest.iterdir() if path.name != "manifest.json")


def test_two_ranks_refuse_a_damaged_checkpoint_once_and_none_waits_for_the_other(options, copy_of_whole):
    """Only rank 0 reads it; rank 1 gets the error, prints nothing, and is ended as torchrun would end it."""
    (copy_of_whole / "checkpoint-7" / "scheduler.pt").unlink()
    run = Run([*options, *flags(ddp_backend="gloo")], copy_of_whole, ranks=2)
    first, second = run.ranks
    first.join(PATIENCE)
    assert first.exitcode == 2, run.log.read_text()
    second.terminate()
    second.join(PATIENCE)
    said = run.log.read_text()
    assert said.count("checkpoint-7 is damaged: scheduler.pt is missing; delete the folder to resume from") == 1


class OfTwoRanks:
    def __init__(self, should_save):
        self.world_size, self.should_save = 2, should_save


@pytest.mark.parametrize("answer", [("checkpoint-8", None), (None, DamagedCheckpoint("is damaged"))])
def test_ranks_agree_on_what_one_of_them_found(monkeypatch, answer):
    """The answer, or the error; gather_object is a list of what each of them says."""

    def look():
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    said = []
    for should_save in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(agreement, "gather_object", lambda own: said.extend(own) or list(said))
            outcome = contextlib.nullcontext() if answer[1] is None else pytest.raises(DamagedCheckpoint, match="is d")
            with outcome:
                assert agreed(OfTwoRanks(should_save), look if should_save else None) == answer[0]
    assert said == [answer]


def test_nodes_that_find_different_checkpoints_are_refused(monkeypatch):
    monkeypatch.setattr(agreement, "gather_object", lambda own: [*own, ("checkpoint-6", None)])
    with pytest.raises(ValueError, match=r"the nodes found different things: \['checkpoint-8', 'checkpoint-6'\]"):
        agreed(OfTwoRanks(True), lambda: "checkpoint-8")


def rewrite(checkpoint, change):
    """The tensors of the model change, and the manifest matches."""
    file = checkpoint / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "xxh3_128": checkpoints.checksum(file)}
    checkpoints.write_json(checkpoint / "manifest.json", checkpoints.with_own_hash(manifest["files"]))


LAYER = "bert.encoder.layer.0.output.dense.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != LAYER}, f"checkpoint-7 lacks parameters of the model: {LAYER}"),
        (lambda w: w | {"bert.other": torch.zeros(2)}, "checkpoint-7 has parameters of another model: bert.other"),
    ],
)
def test_a_checkpoint_of_other_parameters_is_refused(options, copy_of_whole, capsys, change, message):
    rewrite(copy_of_whole / "checkpoint-7", change)
    assert train(options, copy_of_whole) == 2
    assert message in capsys.readouterr().err


def test_tied_parameters_that_are_saved_once_are_not_missed(options, copy_of_whole, whole, monkeypatch):
    """cls.predictions.decoder.* are those of the embeddings and of cls.predictions.bias; Trainer warned of them."""
    assert not [name for name in load_file(copy_of_whole / "checkpoint-7" / "model.safetensors") if "decoder" in name]
    warned = []
    monkeypatch.setattr(trainer.logger, "warning", lambda *words: warned.append(words))
    assert train(options, copy_of_whole) == 0
    assert not [words for words in warned if "keys" in str(words)]
    assert_same_end(copy_of_whole, whole)


def test_a_run_that_had_ended_trains_no_more(options, tmp_path):
    """It was killed before its last save, within an epoch."""
    assert train(options, tmp_path / "run", max_steps=7) == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model.safetensors").unlink()
    assert train(options, tmp_path / "run", max_steps=7) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-7"


def test_what_is_logged_and_saved_may_change_and_takes_effect(options, copy_of_whole, whole):
    assert train(options, copy_of_whole, logging_steps=5, save_steps=4, save_total_limit=1) == 0
    steps = [entry["step"] for entry in figures(copy_of_whole) if "loss" in entry]
    assert steps == [2, 4, 6, 10, 15]
    assert {path.name for path in copy_of_whole.glob("checkpoint-*")} == {"checkpoint-15"}
    assert_same_end(copy_of_whole, whole, same_log=False)


def test_the_mean_loss_at_the_end_is_of_the_steps_since_the_resume(options, copy_of_whole, whole):
    """Logs are means of two steps, and at the end step 15 alone; checkpoint-7 lies between two logs."""

    def since_log(step):
        running = json.loads((whole / f"checkpoint-{step}" / "since_last_log.json").read_text())
        return running["ranks"][0]["loss"]

    losses = {entry["step"]: entry["loss"] for entry in figures(whole) if "loss" in entry and entry["step"] > 7}
    assert list(losses) == [8, 10, 12, 14, 15]
    logged = sum(loss * (1 if step == 15 else 2) for step, loss in losses.items())
    assert train(options, copy_of_whole) == 0
    history = json.loads((copy_of_whole / "trainer_state.json").read_text())["log_history"]
    (mean,) = (entry["train_loss"] for entry in history if "train_loss" in entry)
    assert mean == pytest.approx((logged - since_log(7)) / 8, rel=1e-5)


def test_without_the_saved_sums_the_log_would_differ(options, copy_of_whole, whole, monkeypatch):
    monkeypatch.setattr(ResumesExactly, "_restore_running_sums", lambda self: None)
    assert train(options, copy_of_whole) == 0
    assert_same_end(copy_of_whole, whole, same_log=False)
    assert figures(copy_of_whole) != figures(whole)


def test_evaluation_does_not_change_training(options, whole, tmp_path):
    assert train(options, tmp_path / "run", eval_strategy="epoch", logging_steps=5, save_steps=1000) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_leftovers_of_a_killed_save_are_removed(options, copy_of_whole, whole, caplog):
    (copy_of_whole / "_unfinished" / "checkpoint-8").mkdir(parents=True)
    (copy_of_whole / "_unfinished" / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    with caplog.at_level("INFO"):
        assert train(options, copy_of_whole) == 0
    assert "_unfinished with ['checkpoint-8']: a run that was killed while it saved left it" in caplog.text
    assert_same_end(copy_of_whole, whole)


# -- other settings ----------------------------------------------------------------------------------------------


def some_packs(seed=0):
    rng = np.random.default_rng(seed)
    return pack_dataset(Dataset.from_list([make_pair(rng, int(n)) for n in rng.integers(8, 40, 9)]), 64, packer="spfhp")


def record(training=(), config=(), data=0, tokenizer=None, **inputs):
    arguments = TrainingArguments("nowhere", use_cpu=True, **dict(training))
    own = PretrainConfig(**{"dataset": "d", "tokenizer": "t"} | dict(config))
    return run_record(own, arguments, some_packs(data), tokenizer or make_tokenizer(), **inputs)


OTHER_RUNS = [
    ({"learning_rate": 1e-4}, {}, "learning_rate=5e-05, now it is 0.0001"),
    ({"lr_scheduler_type": "cosine"}, {}, "lr_scheduler_type='linear', now it is 'cosine'"),
    ({"warmup_steps": 10}, {}, "warmup_steps"),
    ({"weight_decay": 0.01}, {}, "weight_decay"),
    ({"optim": "adamw_torch"}, {}, "optim="),
    ({"adam_beta2": 0.98}, {}, "adam_beta2"),
    ({"max_grad_norm": 0.5}, {}, "max_grad_norm"),
    ({"seed": 1}, {}, "seed"),
    ({"data_seed": 1}, {}, "data_seed"),
    ({"bf16": True}, {}, "bf16"),
    ({"dataloader_drop_last": True}, {}, "dataloader_drop_last"),
    ({"train_sampling_strategy": "sequential"}, {}, "train_sampling_strategy"),
    ({}, {"mlm_probability": 0.2}, "mlm_probability=0.15, now it is 0.2"),
    ({}, {"sequences_per_step": 8}, "sequences_per_step"),
]


@pytest.mark.parametrize(("training", "config", "message"), OTHER_RUNS)
def test_another_run_is_refused(tmp_path, training, config, message):
    (tmp_path / "run.json").write_text(json.dumps(record()))
    with pytest.raises(ValueError, match=f"was trained with {message}"):
        _check_record(tmp_path, record(training, config))
    _check_record(tmp_path, record())


def test_other_packs_per_step_are_refused(tmp_path):
    """Packs per step may stay the same on other devices; with sequences_per_step they always do."""
    packs = {"batch_policy": "packs"}
    (tmp_path / "run.json").write_text(json.dumps(record(config=packs)))
    _check_record(tmp_path, record({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, packs))
    with pytest.raises(ValueError, match="was trained with packs_per_step=8, now it is 4"):
        _check_record(tmp_path, record({"per_device_train_batch_size": 4}, packs))


def test_other_data_is_refused_and_moved_data_is_not(tmp_path):
    """Held-out data, too."""
    (tmp_path / "run.json").write_text(json.dumps(record(test=some_packs(1))))
    _check_record(tmp_path, record(config={"dataset": "moved", "tokenizer": "moved"}, test=some_packs(1)))
    with pytest.raises(ValueError, match="was trained with dataset train input_ids='"):
        _check_record(tmp_path, record(data=2, test=some_packs(1)))
    with pytest.raises(ValueError, match="was trained with dataset test input_ids='"):
        _check_record(tmp_path, record(test=some_packs(2)))
    with pytest.raises(ValueError, match=r"was trained with dataset test input_ids='.*', now it is None"):
        _check_record(tmp_path, record())


def with_other(change):
    tokenizer = make_tokenizer()
    change(tokenizer)
    return tokenizer


OTHER_TOKENIZERS = {
    "mask_token='[MASK]', now it is '[UNK]'": lambda tokenizer: setattr(tokenizer, "mask_token", "[UNK]"),
    "cls_token='[CLS]', now it is '[SEP]'": lambda tokenizer: setattr(tokenizer, "cls_token", "[SEP]"),
    "added_tokens=": lambda tokenizer: tokenizer.add_tokens(["new"]),
    "normalizer=": lambda tokenizer: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.NFKC()),
    "model_max_length=": lambda tokenizer: setattr(tokenizer, "model_max_length", 7),
}


@pytest.mark.parametrize("message", OTHER_TOKENIZERS)
def test_all_of_the_tokenizer_is_compared(tmp_path, message):
    (tmp_path / "run.json").write_text(json.dumps(record()))
    with pytest.raises(ValueError, match=f"was trained with tokenizer {re.escape(message)}"):
        _check_record(tmp_path, record(tokenizer=with_other(OTHER_TOKENIZERS[message])))
    used = make_tokenizer()
    used(["word1 word2"], padding="max_length", truncation=True, max_length=4)  # it notes its last call
    _check_record(tmp_path, record(tokenizer=used))


def test_a_model_to_continue_from_is_compared_by_its_config_and_weights(tmp_path):
    """The folder of --model may be moved. Weights that it lacks are drawn by the seed, which is compared."""
    torch.manual_seed(0)
    stock = BertForMaskedLM(make_config(hidden_act="gelu"))
    records = {}
    for name, act, change in (("a", "gelu", 0), ("moved", "gelu", 0), ("weights", "gelu", 1), ("config", "relu", 0)):
        stock.config.hidden_act = act
        with torch.no_grad():
            stock.bert.encoder.layer[0].output.dense.weight += change
        stock.save_pretrained(tmp_path / name)
        with torch.no_grad():
            stock.bert.encoder.layer[0].output.dense.weight -= change
        config = PretrainConfig(dataset="d", tokenizer="t", model=str(tmp_path / name), attention="sdpa")
        torch.manual_seed(len(records))  # the pair's head, which the checkpoint lacks
        model = build_model(config, 10, 0, 8)
        records[name] = record(config={"model": config.model}, model=model)
    (tmp_path / "run.json").write_text(json.dumps(records["a"]))
    _check_record(tmp_path, records["moved"])
    with pytest.raises(ValueError, match="was trained with model parameters="):
        _check_record(tmp_path, records["weights"])
    with pytest.raises(ValueError, match="was trained with model hidden_act='gelu', now it is 'relu'"):
        _check_record(tmp_path, records["config"])


def test_what_chooses_the_best_checkpoint_stays_where_one_is_chosen(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5}
    best |= {"save_steps": 5}
    (tmp_path / "run.json").write_text(json.dumps(record(best)))
    _check_record(tmp_path, record(best))
    _check_record(tmp_path, record({"metric_for_best_model": "mlm_accuracy"}))  # none is chosen
    for name, value in {"metric_for_best_model": "mlm_accuracy", "eval_steps": 1, "greater_is_better": True}.items():
        with pytest.raises(ValueError, match=f"was trained with {name}="):
            _check_record(tmp_path, record(best | {name: value}))
    with pytest.raises(ValueError, match="was trained with eval_mlm_probability="):
        _check_record(tmp_path, record(best, {"eval_mlm_probability": 0.3}))
    _check_record(tmp_path, record(config={"eval_mlm_probability": 0.3}))


def test_mixed_precision_by_the_launcher_and_split_batches_are_compared(tmp_path, monkeypatch):
    packs = {"batch_policy": "packs"}
    (tmp_path / "run.json").write_text(json.dumps(record(config=packs)))
    with pytest.raises(ValueError, match="was trained with split_batches=False, now it is True"):
        _check_record(tmp_path, record({"accelerator_config": {"split_batches": True}}, packs))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="was trained with mixed_precision='no', now it is 'bf16'"):
        _check_record(tmp_path, record(config=packs))


def test_other_versions_are_said_and_a_record_without_contents_is_refused(tmp_path, caplog):
    before = record()
    before["versions"]["torch"] = "2.1.0"
    (tmp_path / "run.json").write_text(json.dumps(before))
    _check_record(tmp_path, record())
    assert "was trained with torch 2.1.0, now it is" in caplog.text
    for part in ("dataset", "tokenizer"):
        (tmp_path / "run.json").write_text(json.dumps({name: before[name] for name in before if name != part}))
        with pytest.raises(ValueError, match=f"run.json does not say what its {part} held: an earlier version"):
            _check_record(tmp_path, record())


@pytest.mark.parametrize("content", [b"", b'{"config": {', b"[]", b'{"config": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_record_is_refused_by_name(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'run.json'))} is damaged \(.+\); delete it"):
        _check_record(tmp_path, {"config": {}})


def change_packs_in_place(folder):
    """One token changes in the file that training maps; fingerprint and lengths stay."""
    (file,) = (folder / "train").glob("data-*.arrow")
    whole = load_from_disk(str(folder / "train")).data.column("input_ids").chunk(0).flatten().to_numpy()
    raw, tokens = bytearray(file.read_bytes()), whole.tobytes()
    at = raw.index(tokens)
    raw[at + 8] ^= 1
    file.write_bytes(raw)


def change_mask_token(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"mask_token": "[MASK]"', '"mask_token": "[UNK]"'))


@pytest.mark.parametrize(
    ("option", "change", "message"),
    [
        ("dataset", change_packs_in_place, "was trained with dataset train input_ids="),
        ("tokenizer", change_mask_token, "was trained with tokenizer mask_token='[MASK]', now it is '[UNK]'"),
    ],
)
def test_inputs_that_were_changed_in_place_are_refused(
    options, copy_of_whole, whole, tmp_path, capsys, option, change, message
):
    place = options.index(f"--{option}") + 1
    shutil.copytree(options[place], tmp_path / option)
    other = [*options[:place], str(tmp_path / option), *options[place + 1 :]]
    assert train(other, copy_of_whole, max_steps=7) == 0  # a copy is the same
    change(tmp_path / option)
    assert train(other, copy_of_whole) == 2
    assert message in capsys.readouterr().err
    shutil.copytree(whole, tmp_path / "finished", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert train(other, tmp_path / "finished") == 2
    assert "its model would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    "training",
    [
        {"max_steps": 100},
        {"num_train_epochs": 9},
        {"logging_steps": 1, "save_steps": 7, "save_total_limit": 2, "report_to": "none", "run_name": "again"},
        {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 1},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"activation_checkpointing": True, "ddp_find_unused_parameters": False, "log_level": "error"},
    ],
)
def test_what_leaves_the_result_as_it_is_may_change(tmp_path, training):
    (tmp_path / "run.json").write_text(json.dumps(record()))
    _check_record(tmp_path, record(training))


NO_DROPOUT = {"attention_probs_dropout_prob": 0.0}
OTHER_ATTENTION = [
    ("varlen", "flex", NO_DROPOUT, True),
    ("sdpa", "varlen", NO_DROPOUT, True),
    ("local,varlen", "local, sdpa", NO_DROPOUT, True),
    ("varlen", "auto", NO_DROPOUT, True),  # an earlier version recorded what auto chose
    ("auto,local", "sdpa,local", NO_DROPOUT, True),
    ("auto", "local", NO_DROPOUT, False),
    ("sdpa", "flex", {}, False),  # dropout 0.1, then none
    ("varlen", "local", NO_DROPOUT, False),
    ("local,varlen", "sdpa,local", NO_DROPOUT, False),
]


@pytest.mark.parametrize(("before", "now", "dropout", "is_alike"), OTHER_ATTENTION)
def test_full_attention_may_change_its_kernel(tmp_path, caplog, before, now, dropout, is_alike):
    """ "auto" chooses another head on another device; the computation must be the same."""
    (tmp_path / "run.json").write_text(json.dumps(record(config=dropout | {"attention": before})))
    if is_alike:
        with caplog.at_level("INFO"):
            _check_record(tmp_path, record(config=dropout | {"attention": now}))
        assert f"was trained with {before}, now it is {now}: the same function" in caplog.text
        with pytest.raises(ValueError, match=r"attention_probs_dropout_prob=0\.0, now it is 0\.5"):
            _check_record(tmp_path, record(config={"attention": now, "attention_probs_dropout_prob": 0.5}))
    else:
        with pytest.raises(ValueError, match=f"was trained with attention='{before}', now it is '{now}'"):
            _check_record(tmp_path, record(config=dropout | {"attention": now}))


def test_a_finished_run_is_overwritten_by_none_but_itself(options, tmp_path, capsys):
    """It left no checkpoint to compare with."""
    output, once = tmp_path / "run", {"save_strategy": "no", "max_steps": 2}
    assert train(options, output, **once) == 0
    assert last_checkpoint(output) is None
    files = {file: (output / file).read_bytes() for file in ("model.safetensors", "pretrain.json", "run.json")}
    assert train(options, output, **once, learning_rate=0.02) == 2
    message = f"{output} was trained with --learning-rate 0.01, now it is 0.02; its model would be overwritten"
    assert message in capsys.readouterr().err
    assert files == {file: (output / file).read_bytes() for file in files}
    (output / "model.safetensors").unlink()
    assert train(options, output, **once) == 0
    assert files == {file: (output / file).read_bytes() for file in files}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("run.json", "has no run.json, so bert-pretrain train did not write it"),
        ("optimizer.pt", "--save-only-model True"),
    ],
)
def test_a_checkpoint_that_lacks_what_training_needs_is_refused(options, whole, tmp_path, capsys, missing, message):
    shutil.copytree(whole / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    manifest = tmp_path / "run" / "checkpoint-6" / "manifest.json"
    listed = json.loads(manifest.read_text())
    del listed["files"][missing]
    checkpoints.write_json(manifest, checkpoints.with_own_hash(listed["files"]))
    (manifest.parent / missing).unlink()
    assert train(options, tmp_path / "run") == 2
    assert message in capsys.readouterr().err


# -- PackedTrainer without the command ---------------------------------------------------------------------------


def test_the_best_model_an_upload_and_the_limit_see_the_folder_by_its_last_name(tmp_path, monkeypatch):
    uploaded = []

    def upload(self, folder):
        check_checkpoint(folder)
        uploaded.append(Path(folder))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", upload)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    packs = make_packs(8)
    how = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    how |= {"load_best_model_at_end": True, "save_total_limit": 2, "per_device_train_batch_size": 4}
    with make_trainer(train_dataset=packs, eval_dataset=packs, folder=tmp_path, **how) as trainer:
        trainer.args.push_to_hub = True
        trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir()
    assert uploaded == [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {best.name, "checkpoint-4"} | (
        {"checkpoint-3"} if best.name == "checkpoint-4" else set()
    )
    for checkpoint in tmp_path.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).parent == tmp_path
    assert not (tmp_path / "_unfinished").exists()


def test_a_damaged_checkpoint_is_refused_by_the_trainer_and_skipping_no_data_too(tmp_path):
    packs = make_packs(8)
    how = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "folder": tmp_path}
    with make_trainer(train_dataset=packs, **how) as trainer:
        trainer.train()
    refusal = pytest.raises(ValueError, match="ignore_data_skip=True would start the epoch again")
    with make_trainer(train_dataset=packs, ignore_data_skip=True, **how) as trainer, refusal:
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    refusal = pytest.raises(ValueError, match=r"checkpoint-2 is damaged: scheduler\.pt is missing")
    with make_trainer(train_dataset=packs, **how) as trainer, refusal:
        trainer.train(resume_from_checkpoint=True)


class Bomb:
    """An object that executes code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


BAD_FILES = {
    "a bomb": lambda file: torch.save(Bomb(), file),
    "a bare pickle": lambda file: file.write_bytes(pickle.dumps(Bomb(), protocol=2)),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_file_that_is_no_state_is_named_and_not_executed(tmp_path, monkeypatch, file):
    """In a checkpoint of a plain Trainer, which has no manifest, or with a forged one."""
    monkeypatch.chdir(tmp_path)
    how = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "folder": tmp_path / "run"}
    with make_trainer(train_dataset=make_packs(4), **how) as trainer:
        trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    (checkpoint / "manifest.json").unlink()
    whole = (checkpoint / file).read_bytes()
    for name, spoil in BAD_FILES.items():
        (checkpoint / file).write_bytes(whole)
        spoil(checkpoint / file)
        how["max_steps"] = 2
        message = rf"checkpoint-1 is damaged: {file} holds more .*resume from another checkpoint"
        refusal = pytest.raises(DamagedCheckpoint, match=message)
        with make_trainer(train_dataset=make_packs(4), **how) as trainer, refusal:
            trainer.train(resume_from_checkpoint=True)
        assert not (tmp_path / "executed").exists(), name


def test_a_state_that_is_no_json_is_named(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{")
    refusal = pytest.raises(DamagedCheckpoint, match=r"checkpoint-1 is damaged: trainer_state\.json cannot be read")
    with make_trainer(train_dataset=make_packs(4), folder=tmp_path) as trainer, refusal:
        trainer.train(resume_from_checkpoint=str(checkpoint))


class KilledCollator(DataCollatorWithPacking):
    """As by a machine that is out of memory."""

    def __call__(self, rows):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)


@pytest.mark.parametrize("what", ["train", "evaluate"])
def test_a_killed_worker_is_named(what):
    collator = KilledCollator(make_tokenizer(), pad_to=MAX_LENGTH, max_sequences_per_pack=8)
    packs = make_packs(4)
    options = {"train_dataset": packs, "eval_dataset": packs, "data_collator": collator, "dataloader_num_workers": 1}
    message = r"DataLoader worker \(pid.*outside ended it.*lower dataloader_num_workers=1.*there is no checkpoint yet"
    with make_trainer(**options) as trainer, pytest.raises(OSError, match=message):
        getattr(trainer, what)()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dataloader_in_order": False}, "no two runs would be alike"),
        ({"restore_callback_states_from_checkpoint": True}, "the callback that counts what was seen"),
    ],
)
def test_what_cannot_be_resumed_exactly_is_refused(tmp_path, option, message):
    with pytest.raises(ValueError, match=message), make_trainer(folder=tmp_path, **option):
        pass


def test_a_run_that_is_made_longer_follows_the_new_schedule_at_once(tmp_path):
    packs = make_packs(8)
    how = {"save_strategy": "steps", "save_steps": 1, "folder": tmp_path, "lr_scheduler_type": "linear"}
    for steps in (2, 4):
        with make_trainer(train_dataset=packs, per_device_train_batch_size=4, max_steps=steps, **how) as trainer:
            trainer.train(resume_from_checkpoint=steps > 2)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([0.05, 0.025, 0.025, 0.0125])
