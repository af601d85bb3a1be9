"""A command that fails prints the error once, on one rank or on many; under torchrun at the end of its report."""

import json
import subprocess
import sys

import pytest

from bert_pretrain import cli
from bert_pretrain.cli import main as bert_pretrain

WRONG = ["train", "--lerning_rate", "1"]
MESSAGE = "bert-pretrain train: unknown option --lerning-rate; did you mean --learning-rate?"


@pytest.fixture
def waits(monkeypatch):
    """How long it would have slept; no test waits."""
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    return slept


def test_alone_it_is_a_line(monkeypatch, capsys, waits):
    monkeypatch.delenv("RANK", raising=False)
    assert bert_pretrain(WRONG) == 2
    assert capsys.readouterr().err == MESSAGE + "\n" and not waits


def test_rank_0_tells_torchrun(monkeypatch, capsys, waits, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert bert_pretrain(WRONG) == 2
    assert capsys.readouterr().err == "" and not waits
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == MESSAGE


def test_another_rank_gives_rank_0_time_to_say_it(monkeypatch, capsys, waits):
    monkeypatch.setenv("RANK", "3")
    assert bert_pretrain(WRONG) == 2
    assert waits == [cli.PATIENCE] and capsys.readouterr().err == f"rank 3: {MESSAGE}\n"


@pytest.mark.long
def test_torchrun_ends_with_the_message_and_has_it_once():
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = subprocess.run([*launch, "-m", "bert_pretrain.cli", *WRONG], capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert (run.stdout + run.stderr).count(MESSAGE) == 1
    last = run.stderr[run.stderr.index("Root Cause") :].splitlines()
    assert f"traceback : {MESSAGE}" in last[-2] and "(local_rank: 0)" in "".join(last)
