"""PackedTrainer: a step's loss and gradients do not depend on accumulation, processes or packing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from reference import pretraining_one_by_one, unpacked_rows
from test_equivalence import MAX_LENGTH, alone, make_models
from training_runs import ONE_PROCESS, TWO_PROCESSES, evaluate, make_packs, train

from collate import DataCollatorWithPacking

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def one_process():
    return {name: train(*run) for name, run in ONE_PROCESS.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    results = tmp_path_factory.mktemp("ddp") / "results.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = subprocess.run([*launch, HERE / "training_runs.py", results], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(results)


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
    """A negative control for the comparisons here: they do see a difference."""
    with pytest.raises(AssertionError):
        assert_same(one_process["1 x 16, token loss"], one_process["1 x 16"])


@pytest.mark.parametrize(("two", "one"), zip(TWO_PROCESSES, ["1 x 16", "1 x 16, token loss", "17 packs"], strict=True))
def test_two_processes_change_nothing(one_process, two_processes, two, one):
    """Rank 1's first pass has no NSP target; the ranks do not divide 22 packs; of 17 rank 1 gets none in the end."""
    assert two_processes[two]["processes"] == 2
    assert_same(two_processes[two], one_process[one])


def test_evaluation_equals_that_of_the_unpacked_sequences():
    """Every sequence in a pack of its own, in batches of 5: the same losses and accuracies."""
    packed = evaluate(make_packs(22), 3)
    unpacked = evaluate(Dataset.from_list(unpacked_rows(make_packs(22))), 5)
    assert unpacked["eval_sequences"] == packed["eval_sequences"] > 40
    assert unpacked == pytest.approx(packed, rel=1e-9)
