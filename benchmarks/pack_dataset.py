"""From a memory map to a packed folder: how fast, and in how much memory, beside other packers and beside cp?

    pip install 'dataset-packing[reference]'
    python benchmarks/pack_dataset.py               97.6 M int32 tokens, lengths of the paper's Wikipedia, packs of 512
    python benchmarks/pack_dataset.py --memory      peak memory at three sizes
    python benchmarks/pack_dataset.py --rounds 9    the least of more, where other programs run

The source is a folder of save_to_disk in the page cache, opened before the clock starts; the clock stops when a dataset
of packs is on disk and memory-mapped. All take turns, round by round, in one process; the least time of each counts.
"cpu" is processor time, of all threads and child processes: on a machine that others use, compare that.

* ours: pack_dataset(output=…) over the whole set: hashes the source, plans, assigns, gathers, writes and hashes the
  shards, opens the folder. The time in fsync stands in a column of its own: it belongs to the disk, and the others do
  not wait for it. `lpfhp` makes TRL's whole-set packs. `optimal`, the default, plans for a time that depends on the
  distinct lengths and not on the tokens; it stands below the table.
* cp: `cp -r --reflink=never` of the packed folder.
* TRL sees 1,000 rows at a time by default; "whole set" lets it see all. It writes its cache file, without checksums.
* Dataset.map: each of our packs gathered by a function of Python from its source rows. Only a part of the packs, as
  it takes minutes for all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from packing import length_histogram, pack_dataset, packed_info, plan_packs, published_histogram

SLOTS = 512
TOKENS = 97_600_000
PLANNERS = "optimal", "lpfhp"
MAP_SHARE = 50  # Dataset.map gets one pack in so many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=TOKENS, help="in the source, about")
    add("--rounds", type=int, default=5, help="the least time of so many counts")
    add("--folder", type=Path, help="where source and packs are written, and removed; left out: the system's temporary")
    add("--num-proc", type=int, nargs="*", default=[], help="ours by so many processes, too")
    add("--only", metavar="WORD", help="ours, and those with this word in their name")
    add("--memory", action="store_true", help="peak memory instead of speed")
    add("--peak-of", metavar="SOURCE", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    datasets.disable_progress_bars()
    if options.peak_of is not None:
        print(measure_peak(Path(options.peak_of)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="pack_dataset-") as folder:
        print(f"{machine()}\n", flush=True)
        (compare_memory if options.memory else compare_speed)(Path(folder), options)


def write_source(folder: Path, lengths: np.ndarray) -> None:
    """Random tokens, a file after 2**26 of them."""
    draw, datasets_ = np.random.default_rng(0), []
    ends = np.cumsum(lengths)
    for part in np.split(lengths, np.searchsorted(ends, np.arange(2**26, ends[-1], 2**26))):
        tokens = draw.integers(5, 30_000, part.sum(), dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum(part)]).astype(np.int32)
        rows = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
        datasets_.append(datasets.Dataset(pa.table({"input_ids": rows})))
    datasets.concatenate_datasets(datasets_).save_to_disk(folder, num_shards=len(datasets_))


def wikipedia_lengths(sequences: int) -> np.ndarray:
    counts = published_histogram("wikipedia")
    return np.random.default_rng(0).choice(len(counts), sequences, p=counts / counts.sum())


# Speed


class Clock:
    """Seconds of a call without fsync, processor time with it, and how many seconds fsync took."""

    def __init__(self, call: Callable):
        self.synced, real = 0.0, os.fsync

        def fsync(descriptor):
            begin = time.perf_counter()
            real(descriptor)
            self.synced += time.perf_counter() - begin

        os.fsync = fsync
        try:
            begin, cpu = time.perf_counter(), cpu_seconds()
            self.result = call()
            self.seconds, self.cpu = time.perf_counter() - begin - self.synced, cpu_seconds() - cpu
        finally:
            os.fsync = real


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def compare_speed(folder: Path, options) -> None:
    counts = published_histogram("wikipedia")
    mean = (counts * np.arange(len(counts))).sum() / counts.sum()
    write_source(folder / "source", wikipedia_lengths(round(options.tokens / mean)))
    source = datasets.load_from_disk(folder / "source")
    pack_dataset(source, SLOTS, output=folder / "packed")  # to be copied, and mapped; also compiles
    packed = datasets.load_from_disk(folder / "packed")
    ours = partial(pack_dataset, source, SLOTS)
    contenders: dict[str, Callable[..., object]]
    contenders = {f"**ours, {packer}**": partial(ours, packer=packer) for packer in PLANNERS}
    for number in options.num_proc:
        contenders[f"**ours, optimal**, num_proc={number}"] = partial(ours, num_proc=number)
    contenders["cp of the packed folder"] = lambda output: copy(folder / "packed", output)
    if is_installed("trl"):
        contenders["TRL pack_dataset, its default"] = lambda output: pack_by_trl(source, output, {})
        contenders["TRL pack_dataset, whole set"] = lambda output: pack_by_trl(source, output, {"batch_size": None})
    few = datasets.Dataset.from_dict({"sequences": packed["sequence_indices"][: len(packed) // MAP_SHARE]})
    contenders["Dataset.map"] = lambda output: pack_by_map(source, few, output)

    contenders = {name: run for name, run in contenders.items() if "ours" in name or (options.only or name) in name}
    seconds, cpu, synced, packs, tokens = {}, {}, {}, {}, {}
    turns = [name for _ in range(options.rounds) for name in contenders]
    for name in tqdm(turns, unit="run"):
        out = folder / "out"
        clock = Clock(partial(contenders[name], output=out))
        if clock.seconds < seconds.get(name, float("inf")):
            seconds[name], synced[name] = clock.seconds, clock.synced
        cpu[name] = min(clock.cpu, cpu.get(name, clock.cpu))
        if name not in tokens:
            packs[name], tokens[name] = count(clock.result)
        del clock
        shutil.rmtree(out)
        os.sync()  # no contender waits for the writes of another
    facts = packed_info(packed)
    print(f"{facts.source_rows:,} sequences, {facts.num_tokens:,} tokens, packs of {SLOTS}\n")
    print("| | packs | efficiency | seconds | M tokens/s | ours: optimal, lpfhp are faster by | cpu, s | fsync, s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    speeds = {name: tokens[name] / seconds[name] for name in contenders}
    for name, speed in speeds.items():
        efficiency = f"{tokens[name] / packs[name] / SLOTS:.3%}"
        share = f" (1 pack in {MAP_SHARE})" if name == "Dataset.map" else ""
        sync = f"{synced[name]:.3f}" if synced[name] else ""
        ratios = " ×, ".join(f"{speeds[f'**ours, {packer}**'] / speed:.2f}" for packer in PLANNERS)
        cells = name + share, f"{packs[name]:,}", efficiency, f"{seconds[name]:.3f}", f"{speed / 1e6:.1f}"
        print(f"| {' | '.join(cells)} | {ratios} × | {cpu[name]:.2f} | {sync} |")
    histogram = length_histogram(wikipedia_lengths(len(source)), SLOTS)
    for packer in PLANNERS:
        least = min(Clock(lambda packer=packer: plan_packs(histogram, packer=packer)).seconds for _ in range(3))
        print(f"\nof which planning, {packer}: {least:.3f} s")


def copy(packed: Path, out: Path) -> datasets.Dataset:
    subprocess.run(["cp", "-r", "--reflink=never", packed, out], check=True)
    return datasets.load_from_disk(out)


def pack_by_trl(source, out: Path, options: dict):
    from trl import pack_dataset

    out.mkdir()
    options = {"load_from_cache_file": False, "cache_file_name": str(out / "cache.arrow"), **options}
    return pack_dataset(source, SLOTS, "bfd", options)


def pack_by_map(source, packs, out: Path):
    def gather(pack: dict) -> dict:
        rows = source[pack["sequences"]]["input_ids"]
        return {"input_ids": [token for row in rows for token in row], "sequence_lengths": [len(row) for row in rows]}

    out.mkdir()
    features = {name: datasets.Sequence(datasets.Value("int32")) for name in ("input_ids", "sequence_lengths")}
    features = datasets.Features({"sequences": packs.features["sequences"], **features})
    name = str(out / "cache.arrow")
    return packs.map(gather, features=features, load_from_cache_file=False, cache_file_name=name)


def count(packed) -> tuple[int, int]:
    """Packs, and tokens in them."""
    chunks = packed.data.column("input_ids").chunks
    return len(packed), sum(len(chunk.flatten()) for chunk in chunks)


# Memory


def compare_memory(folder: Path, options) -> None:
    """Four times the tokens in as many sequences; then four times the sequences."""
    print("| sequences | tokens | source, MB | peak, MB | bytes per sequence |")
    print("|--:|--:|--:|--:|--:|")
    for sequences, longest in ((2_000_000, 32), (2_000_000, 128), (8_000_000, 32)):
        lengths = np.random.default_rng(0).integers(1, longest, sequences)
        write_source(folder / "source", lengths)
        command = [sys.executable, __file__, "--peak-of", str(folder / "source")]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        cells = f"{sequences:,}", f"{lengths.sum():,}", f"{lengths.sum() * 4 / 1e6:,.0f}", f"{peak / 1e6:,.1f}"
        print(f"| {' | '.join(cells)} | {peak / sequences:.1f} |", flush=True)
        shutil.rmtree(folder / "source")


def measure_peak(source: Path) -> int:
    """Bytes at the peak of pack_dataset beyond those before it, without the pages of mapped files.

    Linux: VmRSS - RssFile, every millisecond, as the kernel keeps no peak of it."""
    few = datasets.load_from_disk(source).select(range(1000))
    pack_dataset(few, SLOTS, output=source.parent / "few", packer="spfhp")  # loads and compiles, once
    dataset, done, peak = datasets.load_from_disk(source), threading.Event(), [memory()]
    before = memory()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    pack_dataset(dataset, SLOTS, output=source.parent / "packed", packer="spfhp")
    done.set()
    watcher.join()
    shutil.rmtree(source.parent / "few")
    shutil.rmtree(source.parent / "packed")
    return peak[0] - before


def memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
        if "kB" in value
    }
    return fields["VmRSS"] - fields["RssFile"]


def is_installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = names[0].partition(": ")[2] if names else "unknown processor"
    packages = [name for name in ("datasets", "pyarrow", "numba", "trl") if is_installed(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    cores = f"{len(os.sched_getaffinity(0))} cores (load {os.getloadavg()[0]:.1f} at the start)"
    return f"{date.today()}, {cpu}, {cores}, {versions}"


if __name__ == "__main__":
    main()
