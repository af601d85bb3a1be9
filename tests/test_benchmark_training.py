"""The training benchmark: its packs, its four ways over the same sequences, and what must be installed for it."""

import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import training  # noqa: E402

NOT_NEEDED = ("accelerate", "datasets", "numba", "pandas", "pyarrow", "scipy", "highspy", "matplotlib", "ray")


@pytest.fixture(scope="module")
def corpus():
    return training.synthetic_corpus(64, sequences=600)


def options(**changes):
    settings = {"device": "cpu", "dtype": "float32", "model": "bert-tiny", "attention": "sdpa", "slots": 1024}
    return SimpleNamespace(**settings, sequences_per_step=8, steps_per_block=2, **changes)


def test_best_fit_decreasing_holds_each_sequence_once():
    packs = training.best_fit_decreasing(np.array([3, 5, 2, 3]), 8)
    assert sorted(map(sorted, packs)) == [[0, 1], [2, 3]]
    lengths = np.random.default_rng(0).integers(1, 33, 500)
    packs = training.best_fit_decreasing(lengths, 64)
    assert sorted(np.concatenate(packs)) == list(range(500))
    assert max(lengths[pack].sum() for pack in packs) <= 64
    assert len(packs) <= 1.05 * lengths.sum() / 64


def test_three_ways_take_the_same_sequences_and_all_as_many(corpus):
    steps = {name: list(islice(training.rows_of(name, corpus, 8, 2), 5)) for name in training.WAYS}
    flat = {name: [sorted(np.concatenate(rows)) for rows in taken] for name, taken in steps.items()}
    assert flat["padded"] == flat["unpadded"] == flat["packed"] != flat["bucketed"]
    assert {len(step) for step in flat["bucketed"]} == {8}
    assert abs(np.mean([len(step) for step in flat["packed"]]) - 8) < 1.5
    deepest = {name: max(len(row) for rows in taken for row in rows) for name, taken in steps.items()}
    assert deepest["packed"] > 1 and {deepest[name] for name in training.WAYS if name != "packed"} == {1}


def test_buckets_are_of_like_length_and_a_pass_has_no_more_slots(corpus):
    rows = next(training.rows_of("bucketed", corpus, 8, 2))
    (batch,) = training.passes_of(rows, corpus, None, 1024)
    lengths = (batch["sequence_ids"] > 0).sum(1)
    assert batch["input_ids"].shape[1] == lengths.max() and lengths.min() > lengths.max() - 16
    passes = training.passes_of(rows, corpus, 64, 128)
    assert [tuple(batch["input_ids"].shape) for batch in passes] == [(2, 64)] * 4


def test_the_ways_agree_and_one_that_does_not_is_found_out(corpus):
    ways = [training.make_way(name, corpus, options()) for name in ("padded", "unpadded", "packed")]
    training.check_losses(ways, corpus, options())
    with torch.no_grad():
        ways[2].model.bert.embeddings.position_embeddings.weight *= 10
    with pytest.raises(SystemExit, match="the same sequences have different losses"):
        training.check_losses(ways, corpus, options())


def test_real_work_does_not_count_padding(corpus):
    config = training.make_way("packed", corpus, options()).model.config
    batch = training.collate([np.array([0, 1])], corpus, 200)
    n = np.array([len(corpus.input_ids[i]) for i in (0, 1)])
    predicted = sum(int((corpus.labels[i] != -100).sum()) for i in (0, 1))
    parameters = 2 * (4 * 128 * 128 + 2 * 128 * 512)
    expected = 6 * parameters * n.sum() + 12 * 2 * 128 * (n**2).sum()
    expected += 6 * (128 * 128 + 128 * training.VOCABULARY) * predicted
    assert training.real_flops(config, batch) == expected


def test_it_runs_with_torch_transformers_and_numpy_alone():
    """One short run, in a process that cannot import the other packages that the project uses."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED!r})); sys.path.insert(0, 'benchmarks')"
    arguments = ["--model", "bert-tiny", "--lengths", "32", "--sequences-per-step", "4", "--seconds", "0"]
    code = f"{hide}; sys.argv = ['training.py', *{arguments!r}]; import training; training.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-4:]] == list(training.WAYS)
