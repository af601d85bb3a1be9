"""The evidence of benchmarks/, in short form: packing changes nothing, and mistakes that change something are found."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import one of the scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("lamb", marks=pytest.mark.long)])
def test_packed_training_is_unpacked_training(benchmark, optimizer):
    """Parameters after 10 steps, against stock BERT on each sequence alone; three mistakes are far from them."""
    right = ["unpacked 4 x 4", "packed 1 x 4", "packed 4 x 1"]
    lines, passed = benchmark("equivalence").compare(optimizer, steps=10, eps=1e-6, right=right)
    assert passed, "\n".join(lines)
    assert len(lines) == 4 + len(right) + 3


def test_a_mistake_would_be_found(benchmark, monkeypatch):
    equivalence = benchmark("equivalence")
    monkeypatch.setattr(equivalence, "RIGHT", {"wrong": equivalence.MISTAKES["positions not reset"]})
    lines, passed = equivalence.compare("adamw", steps=3, eps=1e-6, mistakes=[])
    assert not passed, "\n".join(lines)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_packed_training_is_unpacked_training_over_100_steps(benchmark, optimizer):
    lines, passed = benchmark("equivalence").compare(optimizer, steps=100, eps=1e-6)
    assert passed, "\n".join(lines)


def test_a_trained_model_has_nothing_of_a_twin_in_its_pack(benchmark):
    probe = benchmark("leak_probe")
    model = probe.train(steps=60, packs=16, twins=True, leak=False)
    alone, unrelated, twin = probe.probe(model, 60, isolated=True)
    np.testing.assert_allclose(unrelated, alone, rtol=0, atol=1e-10)
    np.testing.assert_allclose(twin, alone, rtol=0, atol=1e-10)
    broken = probe.probe(model, 60, isolated=False)
    np.testing.assert_allclose(broken[0], alone, rtol=0, atol=1e-10)  # alone: nothing can leak
    assert abs(broken[1:] - alone).max(1).min() > 1e-3


@pytest.mark.long
def test_the_probe_finds_a_leak_and_isolation_ends_it(benchmark):
    """A model that learned to read the answers from its pack mate."""
    probe = benchmark("leak_probe")
    model = probe.train(steps=250, packs=32, twins=True, leak=True)
    _, unrelated, twin = probe.probe(model, 60, isolated=False)
    assert unrelated.mean() - twin.mean() > 1  # nats per masked word
    alone, unrelated, twin = probe.probe(model, 60, isolated=True)
    np.testing.assert_allclose(np.stack([unrelated, twin]), np.stack([alone, alone]), rtol=0, atol=1e-10)


def test_the_demo_compares_three_ways(benchmark, folders, tmp_path, monkeypatch):
    demo = benchmark("demo")
    small = {"TEST_PACKS": 6, "SEQUENCES_PER_STEP": 4, "STEPS_PER_BLOCK": 1, "SORTED": 5}
    small["COMPARED"] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    results = demo.compare(folders["folder"], seconds=0)
    curves = {name: arm["curve"] for name, arm in results["arms"].items()}
    assert list(curves) == ["padded", "bucketed", "packed"]
    seen = {name: [point["sequences_seen"] for point in curve] for name, curve in curves.items()}
    assert seen["padded"] == seen["packed"] and seen["bucketed"][-1] == 4 * 4
    for padded, packed in zip(curves["padded"], curves["packed"], strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], abs=1e-5)
    assert abs(curves["bucketed"][-1]["loss"] - curves["packed"][-1]["loss"]) > 1e-4  # other sequences
    lines = demo.table(results).splitlines()
    assert lines[1].startswith("1 layers of 16, ") and lines[-1].startswith("largest difference of held-out loss")
    demo.plot(results, tmp_path / "ways.png")
    assert (tmp_path / "ways.png").stat().st_size > 10_000


def test_learning_curves_of_padded_and_packed_coincide(benchmark, folders, tmp_path, monkeypatch):
    curves = benchmark("learning_curves")
    monkeypatch.setattr(curves, "POINTS", 2)
    monkeypatch.setattr(curves, "TEST_PACKS", 6)
    monkeypatch.setattr(curves, "MODEL", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    results = curves.run(folders["folder"], sequences=64, seeds=1)
    assert curves.gap(results) < 1e-5
    packed, larger, powered = (np.array(results["curves"][name][0]) for name in list(curves.COLORS)[1:])
    assert packed[-1, 0] == pytest.approx(64, abs=4) and larger[-1, 0] == pytest.approx(64, abs=16)
    assert packed[0, 1] == larger[0, 1] == powered[0, 1] and packed[-1, 1] < packed[0, 1] - 0.01
    assert larger[-1, 1] != powered[-1, 1] != packed[-1, 1]
    assert curves.table(results).count("\n|") == 2 + 3 + 2
    curves.plot(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_last_layers_gradient_shrinks_with_depth_with_pre_and_not_with_post(benchmark):
    """By the root of the depth: 1/2 from 6 to 24 layers."""
    blocks = benchmark("blocks")
    shrinks = {}
    for name in ("post", "pre"):
        norms = [blocks.gradient_norms(depth, 0, batches=2, **blocks.BLOCKS[name]) for depth in blocks.DEPTHS]
        shallow, deep = norms
        assert (len(shallow), len(deep)) == blocks.DEPTHS
        shrinks[name] = deep[-1] / shallow[-1]
    assert shrinks["pre"] < 0.7 < 0.8 < shrinks["post"]


def test_the_evidence_of_blocks_in_short(benchmark, tmp_path, monkeypatch):
    blocks = benchmark("blocks")
    batch = blocks.Language().batch()
    predicted = batch["labels"] >= 0
    assert predicted.any() and (batch["input_ids"][predicted] == blocks.MASK).all()
    assert (batch["sequence_ids"][predicted] > 0).all() and batch["sequence_ids"].max() > 1
    monkeypatch.setattr(blocks, "POINT", 2)
    options = SimpleNamespace(seeds=2, steps=4)
    monkeypatch.setattr(blocks, "DEPTHS", (1, 2))
    memory = {stream: {"6": {"bytes": 2**20}, "12": {"bytes": 2**21}} for stream in blocks.STREAMS}
    found = {"gradients": blocks.show_gradients(options), "training": blocks.show_training(options)}
    found["memory"] = memory, list(blocks.memory_table(memory))
    for part, rows in (("gradients", 4), ("training", 3), ("memory", 3)):
        results, lines = found[part]
        assert "\n".join(lines).count("\n|") == 2 + rows, lines
        blocks.PLOTS[part](results, tmp_path / f"{part}.png")
        assert (tmp_path / f"{part}.png").stat().st_size > 5_000
    curves = found["training"][0]["pre"]["without"]
    assert len(curves) == 2 and len(curves[0]) == 2 and abs(curves[0][0] - np.log(blocks.WORDS)) < 1


def test_the_page_of_blocks_shows_every_picture(monkeypatch, tmp_path):
    docs = BENCHMARKS.parent / "docs"
    monkeypatch.syspath_prepend(str(docs / "pictures"))
    pictures = importlib.import_module("blocks_pictures")
    pictures.draw(tmp_path)
    page = (docs / "blocks.md").read_text(encoding="utf-8")
    for name in pictures.PICTURES:
        assert f"pictures/blocks_{name}.png" in page
        assert (tmp_path / f"blocks_{name}.png").stat().st_size > 5_000


def test_cohorts_and_what_they_cost(benchmark, tmp_path, capsys):
    """Each row of the table follows from the one without cohorts; both ways of the clock write packs."""
    cohorts = benchmark("cohorts")
    cohorts.print_plans("small", np.arange(1, 200) % 50 + 1, 16, "lpfhp")
    plain, *rows = ([cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines())
    assert len(rows) == len(cohorts.LANES) * len(cohorts.COHORTS) and plain[6] == "none"
    for row in rows:
        assert row[11] == f"{int(row[9]) / int(plain[9]) - 1:.2%}" and int(row[9]) >= int(plain[9])
    cohorts.measure("small", np.arange(1, 1200), tmp_path, rounds=1)
    assert capsys.readouterr().out.startswith("| small, 1,199 | ")
