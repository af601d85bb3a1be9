"""How good and fast are our packers, and how much memory do they need, beside slow twins and other packages of PyPI?

    pip install 'dataset-packing[reference]'
    python benchmarks/packers.py                        3,000 and 100,000 lengths drawn from the paper's Wikipedia

Every contender gets the same lengths, in the same random order, and returns which sequences share a pack. A check
follows that its packs hold every token once, and are not too long. They run in turn, round by round, in one process;
the least time counts. Peak memory is the growth of a separate process during the run. Contenders that need minutes skip
the longer list. A contender that is not installed is listed with its name on PyPI.

* ours: length_histogram, plan_packs and assign, shuffling included. TRL and grain gather the tokens, too.
* the slow twins are the textbook packers of tests/reference/slow_packers.py. That of nnlshp only solves the least
  squares, densely, over all strategies of three sequences or less; it makes no packs.
* TRL sees 1,000 rows at a time by default; "whole set" lets it see all.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from packing import PACKERS, assign, length_histogram, plan_packs, published_histogram

TESTS = Path(__file__).resolve().parents[1] / "tests/reference"
FEW = 5_000  # sequences up to which the slow ones run
PATIENCE = 20  # seconds; slower ones run only once


@dataclass(frozen=True)
class Contender:
    """One way from lengths to packs."""

    name: str
    run: Callable
    """What prepare returned -> tokens in each pack, or a function that says so; None if it makes no packs."""
    prepare: Callable = lambda lengths, slots: (lengths, slots)
    """Not timed: the lengths as the contender takes them."""
    depth: int | None = None
    package: str | None = None
    """Its name on PyPI, where it is not ours."""
    most: int = 10**9
    """Sequences that it can do in a minute or so."""


def contenders() -> Iterator[Contender]:
    for depth in (None, 3):
        for packer in PACKERS:
            yield Contender(_name(packer, depth), _ours(packer, depth), depth=depth)
    yield Contender("twin of spfhp: worst fit decreasing", _twin("worst_fit_decreasing"), most=FEW)
    yield Contender("twin of lpfhp: best fit decreasing", _twin("best_fit_decreasing"), most=FEW)
    yield Contender("twin of nnlshp, depth 3: dense least squares", _dense_nnls, depth=3, most=FEW)
    yield Contender("TRL pack_dataset, its default", _trl(None), _dataset, package="trl")
    yield Contender("TRL pack_dataset, whole set", _trl("all"), _dataset, package="trl")
    yield Contender("LightBinPack obfd", _lightbinpack, _as_list, package="lightbinpack")
    yield Contender("binpacking to_constant_volume", _binpacking, _as_list, package="binpacking", most=FEW)
    yield Contender("grain best fit, 64 open packs", _grain, _grain_source, package="grain")


def _name(packer: str, depth: int | None) -> str:
    return f"**{packer}**" if depth is None else f"**{packer}**, depth {depth}"


# Ours


def _ours(packer: str, depth: int | None) -> Callable:
    def run(prepared):
        lengths, slots = prepared
        plan = plan_packs(length_histogram(lengths, slots), slots, depth, packer)
        assignment = assign(plan, lengths)
        return lambda: np.add.reduceat(lengths[assignment.sequence_indices], assignment.pack_offsets[:-1])

    return run


def _twin(name: str) -> Callable:
    def run(prepared):
        lengths, slots = prepared
        packs = getattr(_reference(), name)(lengths.tolist(), slots)
        return lambda: [sum(pack) for pack in packs]

    return run


def _dense_nnls(prepared) -> None:
    lengths, slots = prepared
    _reference().dense_nnls(length_histogram(lengths, slots), 3)


def _reference():
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return importlib.import_module("slow_packers")


# Other packages


def _as_list(lengths, slots):
    return lengths.tolist(), slots


def _dataset(lengths, slots):
    """A tokenized dataset in memory; which tokens does not matter."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pa.array(np.ones(offsets[-1], np.int32))
    rows = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), tokens)
    return datasets.Dataset(pa.table({"input_ids": rows})), slots


def _trl(window: str | None) -> Callable:
    def run(prepared):
        from trl import pack_dataset

        dataset, slots = prepared
        options = {"keep_in_memory": True, "load_from_cache_file": False}
        packed = pack_dataset(dataset, slots, "bfd", options | ({"batch_size": None} if window else {}))
        return lambda: [sum(lengths) for lengths in packed["seq_lengths"]]

    return run


def _lightbinpack(prepared):
    from lightbinpack import obfd

    lengths, slots = prepared
    packs = obfd(lengths, slots)
    return lambda: [sum(lengths[i] for i in pack) for pack in packs]


def _binpacking(prepared):
    from binpacking import to_constant_volume

    lengths, slots = prepared
    packs = to_constant_volume(dict(enumerate(lengths)), slots)  # a dict: {sequence: length}
    return lambda: [sum(pack.values()) for pack in packs]


def _grain_source(lengths, slots):
    return [{"tokens": np.ones(length, np.int32)} for length in lengths], slots


def _grain(prepared):
    import grain
    from grain.experimental import BestFitPackIterDataset

    rows, slots = prepared
    source = grain.MapDataset.source(rows).to_iter_dataset()
    packs = list(BestFitPackIterDataset(source, length_struct={"tokens": slots}, num_packing_bins=64))
    return lambda: [np.count_nonzero(pack["tokens"]) for pack in packs]


# Measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--histogram", choices=("wikipedia", "squad"), default="wikipedia", help="lengths are drawn from it")
    add("--sequences", type=int, nargs="+", default=[3_000, 100_000], help="how many lengths")
    add("--rounds", type=int, default=3, help="the least time of so many counts")
    add("--only", metavar="WORD", help="contenders with this word in their name only")
    add("--memory-of", metavar="NAME", help=argparse.SUPPRESS)  # in a process of its own: bytes that one run takes
    options = parser.parse_args()
    if options.memory_of is not None:
        print(measure_memory(options))
        return
    print(f"{machine()}\n")
    print("| sequences | contender | packs | above the bound | µs per sequence | peak memory, MB |")
    print("|--:|---|--:|--:|--:|--:|", flush=True)
    for sequences in options.sequences:
        for line in compare(sequences, options):
            print(line, flush=True)


def draw_lengths(histogram: str, sequences: int) -> tuple[np.ndarray, int]:
    """Random lengths of a published histogram, and its max_sequence_length."""
    counts = published_histogram(histogram)
    rng = np.random.default_rng(0)
    return rng.choice(len(counts), sequences, p=counts / counts.sum()).astype(np.int64), len(counts) - 1


def compare(sequences: int, options) -> Iterator[str]:
    """The lines of the table for so many sequences."""
    lengths, slots = draw_lengths(options.histogram, sequences)
    everyone = [c for c in contenders() if options.only is None or options.only in c.name]
    ready = {c.name: c for c in everyone if is_installed(c) and sequences <= c.most}
    warm_up(ready.values(), slots)
    seconds, packs = measure_time(ready, lengths, slots, options.rounds)
    histogram = length_histogram(lengths, slots)
    bounds = {depth: proven_bound(histogram, depth) for depth in {c.depth for c in everyone}}
    for contender in everyone:
        if not is_installed(contender):
            yield f"| {sequences:,} | {contender.name} | not installed: `pip install {contender.package}` | | | |"
        elif contender.name not in ready:
            yield f"| {sequences:,} | {contender.name} | not run: takes minutes | | | |"
        else:
            found, bound = packs[contender.name], bounds[contender.depth]
            gap = "" if found is None else f"{found - bound:,} ({(found - bound) / bound:.3%})"
            count = "none" if found is None else f"{found:,}"
            time_each = f"{seconds[contender.name] / sequences * 1e6:,.3f}"
            memory = memory_in_own_process(contender, sequences, options)
            yield f"| {sequences:,} | {contender.name} | {count} | {gap} | {time_each} | {memory} |"


def is_installed(contender: Contender) -> bool:
    try:
        return contender.package is None or bool(metadata.version(contender.package))
    except metadata.PackageNotFoundError:
        return False


def warm_up(ready, slots: int) -> None:
    """Imports and compilation, which are paid once and not per sequence."""
    few = np.random.default_rng(1).integers(1, slots + 1, 200)
    for contender in ready:
        if contender.run is not _dense_nnls:
            contender.run(contender.prepare(few, slots))


def measure_time(ready, lengths, slots, rounds) -> tuple[dict[str, float], dict[str, int | None]]:
    """The least seconds, and the packs, of each contender."""
    seconds, packs = {}, {}
    turns = [contender for _ in range(rounds) for contender in ready.values()]
    for contender in tqdm(turns, desc=f"{len(lengths):,} sequences", unit="run"):
        if seconds.get(contender.name, 0) > PATIENCE:
            continue
        prepared = contender.prepare(lengths, slots)
        start = time.perf_counter()
        result = contender.run(prepared)
        took = time.perf_counter() - start
        seconds[contender.name] = min(took, seconds.get(contender.name, took))
        packs[contender.name] = None if result is None else checked(contender, np.asarray(result()), lengths, slots)
    return seconds, packs


def checked(contender: Contender, tokens: np.ndarray, lengths: np.ndarray, slots: int) -> int:
    """The number of packs that hold anything."""
    if tokens.max() > slots or tokens.sum() != lengths.sum():
        sys.exit(f"{contender.name}: {tokens.sum():,} tokens, {tokens.max():,} in a pack; {lengths.sum():,} were given")
    return int(np.count_nonzero(tokens))


def proven_bound(histogram: np.ndarray, depth: int | None) -> int:
    """The best lower bound that any packer of ours proves."""
    return max(plan_packs(histogram, max_sequences_per_pack=depth, packer=packer).lower_bound for packer in PACKERS)


def memory_in_own_process(contender: Contender, sequences: int, options) -> str:
    command = [sys.executable, __file__, "--memory-of", contender.name, "--sequences", str(sequences)]
    done = subprocess.run([*command, "--histogram", options.histogram], capture_output=True, text=True)
    if done.returncode != 0:
        return "not measured"
    megabytes = int(done.stdout.split()[-1]) / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 1 else "< 1"  # less may come from what the warm-up left free


def measure_memory(options) -> int:
    """Bytes at the peak of one run beyond those before it. Linux: writing 5 to clear_refs resets the peak."""
    (contender,) = [c for c in contenders() if c.name == options.memory_of]
    lengths, slots = draw_lengths(options.histogram, options.sequences[0])
    warm_up([contender], slots)
    prepared = contender.prepare(lengths, slots)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmHWM")
    result = contender.run(prepared)  # kept: what it returns counts
    peak = memory("VmHWM")
    del result
    return max(0, peak - before)


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    others = [c.package for c in contenders() if c.package and is_installed(c)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ["numpy", "numba", *dict.fromkeys(others)])
    cores = f"{len(os.sched_getaffinity(0))} cores (load {os.getloadavg()[0]:.1f} at the start)"
    return f"{date.today()}, {cpu}, {cores}, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    main()
