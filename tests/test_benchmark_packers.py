"""benchmarks/packers.py: every packer takes part, wrong packs are found, and packages that are missing are named."""

import importlib.util
import sys
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from packing import PACKERS

PATH = Path(__file__).parents[1] / "benchmarks/packers.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_packers", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ours_and_only_those(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "memory_in_own_process", lambda *_: "7")
    options = Namespace(histogram="squad", only="**", rounds=1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in benchmark.compare(300, options)]
    assert [row[1] for row in rows] == [f"**{name}**{depth}" for depth in ("", ", depth 3") for name in PACKERS]
    for sequences, _, packs, gap, time_each, memory in rows:
        assert sequences == "300"
        assert 100 < int(packs) < 300
        assert int(gap.split()[0]) >= 0
        assert float(time_each.replace(",", "")) > 0
        assert memory == "7"


def test_who_is_not_installed_is_listed(benchmark, monkeypatch):
    def no_version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(benchmark.metadata, "version", no_version)
    options = Namespace(histogram="squad", only="LightBinPack", rounds=1)
    (line,) = benchmark.compare(300, options)
    assert "not installed: `pip install lightbinpack`" in line


def test_who_takes_minutes_sits_out(benchmark):
    options = Namespace(histogram="squad", only="twin of lpfhp", rounds=1)
    (line,) = benchmark.compare(100_000, options)
    assert "not run: takes minutes" in line


@pytest.mark.parametrize("tokens", [[5, 4], [5, 3, 3]], ids=["lost", "overfull"])
def test_wrong_packs_end_the_run(benchmark, tokens):
    (contender,) = [c for c in benchmark.contenders() if c.name == "**spfhp**"]
    lengths = np.array([5, 3, 3])
    assert benchmark.checked(contender, np.array([5, 6]), lengths, 6) == 2
    with pytest.raises(SystemExit, match=r"\*\*spfhp\*\*: .* 11 were given|tokens"):
        benchmark.checked(contender, np.array(tokens), lengths, 4 if len(tokens) == 3 else 6)
