"""The benchmark for GPUs: a trial on a CPU, its rows and tables, its clock, and its file of sequences."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_turns  # noqa: E402
import training  # noqa: E402

from bert_pretrain.attention import ATTENTION  # noqa: E402

NOT_NEEDED = ("accelerate", "datasets", "numba", "pandas", "pyarrow", "scipy", "highspy", "matplotlib", "ray")
ALL = {"date", "device", "part", "row"}
SEEN = {"pass_gib", "waits", "launches"}
TIMED = ALL | SEEN | {"model", "attention", "slots", "first_passes_s", "rounds", "tokens_per_second", "mfu"}
TIMED |= {"percentile_10", "percentile_90"}
BESIDE_PADDED = TIMED | {"times_padded", "by_factor"}
KEYS = {
    "ceilings": [ALL | {"gigabytes_per_second"}, ALL | {"tflops"}],
    "correctness": [ALL | {"loss_apart", "gradients_apart", "agrees"}],
    "base": [BESIDE_PADDED],
    "compiled": [BESIDE_PADDED, BESIDE_PADDED | {"times_eager"}],
    "sweep": [TIMED],
    "large": [BESIDE_PADDED],
    "heads": [ALL | SEEN | {"slots", "milliseconds", "tokens_per_second"}],
}


def test_a_trial_on_a_cpu_has_a_row_for_everything(tmp_path):
    """In a process that has torch, transformers and NumPy alone."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED!r})); sys.path.insert(0, 'benchmarks')"
    output = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--quick", "--output", str(output), "--batches", str(tmp_path / "batches.npz")]
    code = f"{hide}; import gpu; gpu.main({arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = gpu.read_rows(output)
    for part, keys in KEYS.items():
        mine = [row for row in rows if row["part"] == part and "error" not in row]
        assert mine and all(row.keys() in keys for row in mine), part
    errors = {row["row"]: row["error"] for row in rows if "error" in row}
    assert {row.split(",")[0] for row in errors} == {"varlen", "flex"}
    assert all("CUDA" in error or "no gradient on CPUs" in error for error in errors.values())
    names = {part: [row["row"] for row in rows if row["part"] == part] for part in KEYS}
    assert names["base"] == list(training.WAYS)
    assert names["compiled"] == ["packed", "packed, compiled", "padded, compiled"]
    assert names["heads"] == [f"{head}, {length}" for length in (64, 512) for head in ATTENTION]
    assert all(row["agrees"] for row in rows if row["part"] == "correctness")
    shown = done.stdout
    assert all(f"\n{part}: " in shown and f"\n| {names[part][-1]} |" in shown for part in KEYS)


def test_a_part_is_killed_with_all_that_it_started(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; from pathlib import Path; time.sleep(1.5); Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.failure_of([sys.executable, "-c", code], 1) == "killed after 1 s"
    time.sleep(1.5)
    assert not mark.exists()
    assert gpu.failure_of([sys.executable, "-c", ""], 60) == ""
    assert gpu.failure_of([sys.executable, "-c", "exit(3)"], 60) == "ended with status 3"


def test_six_minutes_are_enough():
    assert sum(gpu.CLOCKS.values()) <= 360 and gpu.PARTS.keys() == gpu.CLOCKS.keys()


def test_a_killed_run_keeps_its_last_whole_rows(tmp_path):
    row = {"date": "2026-01-01", "device": "cpu", "part": "base", "row": "packed", "rounds": 1}
    lines = [json.dumps(row), json.dumps(row | {"rounds": 2}), json.dumps(row | {"rounds": 4})[:40]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert gpu.read_rows(tmp_path / "rows.jsonl") == [row | {"rounds": 2}]
    assert gpu.tables([row]).splitlines()[-1] == "| packed | 1 |"


def test_the_file_holds_the_same_sequences_in_less_space(tmp_path):
    corpus = training.synthetic_corpus(64, sequences=300)
    gpu_turns.save(corpus, tmp_path / "batches.npz")
    read = gpu_turns.load(tmp_path / "batches.npz")
    for name in ("input_ids", "labels", "token_types", "packs"):
        pairs = zip(getattr(corpus, name), getattr(read, name), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), name
    assert np.array_equal(read.next_sentence, corpus.next_sentence)
    assert (read.max_sequence_length, read.vocabulary, read.factor) == (64, corpus.vocabulary, corpus.factor)
    assert (tmp_path / "batches.npz").stat().st_size < 4 * sum(map(len, corpus.input_ids))


def test_passes_of_a_way_have_one_shape():
    corpus = training.synthetic_corpus(64, sequences=600)
    for way in ("padded", "packed"):
        passes = gpu_turns.passes_of(way, corpus, 512)
        assert len(passes) == gpu_turns.PASSES
        assert {tuple(batch["input_ids"].shape) for batch in passes} == {(8, 64)}
        assert len({batch["cls_positions"].shape for batch in passes}) == 1
    bucketed = gpu_turns.passes_of("bucketed", corpus, 512)
    assert all(batch["input_ids"].numel() <= 8 * 72 for batch in bucketed)
    unpadded = gpu_turns.passes_of("unpadded", corpus, 512)
    tokens = [
        sum(int((x["sequence_ids"] > 0).sum()) for x in y)
        for y in (unpadded, gpu_turns.passes_of("packed", corpus, 512))
    ]
    assert abs(tokens[0] / tokens[1] - 1) < 0.1


def test_packs_of_long_sequences_are_full_of_whole_ones():
    ids = gpu.packed_ids(np.array([30, 20, 40, 10]), 64, 3)
    assert ids.shape == (3, 64) and (ids.max(1).values > 0).all()
    assert [torch.bincount(row)[1:].tolist() for row in ids] == [[30, 20], [40, 10], [30, 20]]


def test_ways_are_compared_round_by_round():
    numbers = {"padded": ([10, 20], 0.5), "packed, compiled": ([19, 38], 1.0), "packed": ([38, 38], 1.0)}
    ways = [
        gpu_turns.Contender(name, None, [], None, {"row": name}, 0, rates, [1.0], [efficiency])
        for name, (rates, efficiency) in numbers.items()
    ]
    rows = [gpu_turns.row_of(way, ways, SimpleNamespace(on_cuda=False)) for way in ways]
    assert [row["times_padded"] for row in rows] == [1, 1.9, 2.85]
    assert [row["by_factor"] for row in rows] == [1, 0.95, 1.425]
    assert rows[1]["tokens_per_second"] == 28 and rows[1]["times_eager"] == "0.750 (0.550-0.950)"
    assert "times_eager" not in rows[0].keys() | rows[2].keys()
