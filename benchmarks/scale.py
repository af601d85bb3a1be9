"""A plan and an assignment for a hundred million sequences: seconds and bytes each, and what 10^11 tokens cost.

    python benchmarks/scale.py                              10^7 and 10^8 lengths
    python benchmarks/scale.py --sequences 1e7 --apart 8    and the loss of packing each of 8 shards alone

Lengths are those of the paper's Wikipedia, drawn shard by shard, each from its own seed: as a cluster would read them
from its shards. All are kept (uint16), for one plan and one assign(). Peak: of the process's own memory, beyond what it
had before.

"apart": each shard has its own plan, for the same sequences in three orders: random; by length with a noise of 100
tokens (standard deviation), like a corpus whose sources have shards of their own; by length.

The estimate is a formula, not a measurement: see costs().
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np

from packing import assign, length_histogram, plan_packs, published_histogram

SHARD = 1 << 22  # sequences
SLOTS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sequences", type=float, nargs="+", default=[1e7, 1e8])
    add("--apart", type=int, default=0, help="also pack each of so many shards by itself")
    add("--packer", default="optimal")
    add("--tokens", type=float, default=1e11, help="of the estimate, int32, as long as Wikipedia's")
    add("--rate", type=float, default=200e6, help="tokens a second that a machine gathers, hashes and writes")
    add("--hash-rate", type=float, default=2e9, help="bytes a second that a machine hashes")
    add("--storage", type=float, default=1e9, help="bytes a second that a machine reads and writes of shared storage")
    options = parser.parse_args()
    print(
        f"{date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, packer {options.packer}"
    )
    warm_up(options.packer)
    measured = {}
    for sequences in map(int, options.sequences):
        measured[sequences] = run_whole(Shards(sequences), options)
        if options.apart:
            run_apart(Shards(sequences), options)
    print_costs(measured[max(measured)], options)


class Shards:
    """Synthetic shards: shards[i] -> (sequences,) uint16 lengths, the same whenever it is asked for."""

    def __init__(self, sequences: int):
        counts = published_histogram("wikipedia")
        # a table of 2**16 lengths in the published shares: a look-up a sequence
        bounds = np.round(np.cumsum(counts) / counts.sum() * 2**16).astype(int)
        self.table = np.repeat(np.arange(len(counts)), np.diff(bounds, prepend=0)).astype(np.uint16)
        self.bounds = [*range(0, sequences, SHARD), sequences]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        draw = np.random.default_rng(i)
        return self.table[draw.integers(0, 2**16, self.bounds[i + 1] - self.bounds[i], dtype=np.uint16)]

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))


class Steps:
    """Wall seconds of each step, and the peak of memory over all of them."""

    def __init__(self):
        self.seconds, self._before, self.peak = {}, memory(), 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> Steps:
        self._watcher.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, memory() - self._before)

    @contextmanager
    def step(self, name: str):
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - begin


def memory() -> int:
    """Linux: VmRSS - RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(sign * int(fields[name].split()[0]) * 1024 for sign, name in ((1, "VmRSS"), (-1, "RssFile")))


def warm_up(packer: str) -> None:
    """Loads and compiles, once."""
    lengths = Shards(600_000)[0]
    plan = plan_packs(length_histogram(lengths, SLOTS), packer=packer)
    assign(plan, lengths)


def run_whole(shards: Shards, options) -> dict:
    sequences = shards.bounds[-1]
    with Steps() as steps:
        lengths = np.empty(sequences, np.uint16)
        for i, (first, end) in enumerate(zip(shards.bounds[:-1], shards.bounds[1:], strict=True)):
            lengths[first:end] = shards[i]
        with steps.step("histogram"):
            histogram = length_histogram(lengths, SLOTS)
        with steps.step("plan"):
            plan = plan_packs(histogram, SLOTS, packer=options.packer)
        with steps.step("assign"):
            assignment = assign(plan, lengths)
        assert assignment.num_sequences == sequences and assignment.num_packs == plan.num_packs
    say("whole", plan, steps)
    return {
        **steps.seconds,
        "plan": plan,
        "plan_seconds": steps.seconds["plan"],
        "sequences": sequences,
        "peak": steps.peak,
    }


def run_apart(shards: Shards, options) -> None:
    """Packs of shards that are packed each by itself."""
    lengths, draw = np.concatenate(list(shards)), np.random.default_rng(0)
    noise = draw.normal(0, 100, len(lengths)).astype(np.float32)
    orders = {
        "by chance": lengths,
        "like lengths together": lengths[np.argsort(lengths + noise)],
        "sorted": np.sort(lengths),
    }
    together = plan_packs(length_histogram(lengths, SLOTS), SLOTS, packer=options.packer)
    print(f"\n{len(lengths):,} sequences, {options.apart} shards, each packed by itself; together")
    print(f"{together.num_packs:,} packs, efficiency {together.packing_efficiency:.3%}\n")
    print("| order of sequences | packs | more than together | efficiency | points lost |")
    print("|---|--:|--:|--:|--:|")
    for name, ordered in orders.items():
        histograms = [length_histogram(shard, SLOTS) for shard in np.array_split(ordered, options.apart)]
        packs = sum(plan_packs(histogram, SLOTS, packer=options.packer).num_packs for histogram in histograms)
        efficiency = together.num_tokens / (packs * SLOTS)
        lost = 100 * (together.packing_efficiency - efficiency)
        more = packs / together.num_packs - 1
        print(f"| {name} | {packs:,} | {more:.3%} | {efficiency:.3%} | {lost:.3f} |", flush=True)


def say(name: str, plan, steps: Steps) -> None:
    count = plan.num_sequences
    print(f"\n{count:,} sequences, {plan.num_tokens:,} tokens, {plan.num_packs:,} packs, {name}")
    for step, seconds in steps.seconds.items():
        print(f"  {step:<46} {seconds:>9.2f} s {seconds / count * 1e9:>8.2f} ns a sequence")
    print(f"  {'peak memory':<46} {steps.peak / 1e6:>9,.0f} MB {steps.peak / count:>7.1f} bytes a sequence", flush=True)


def costs(whole: dict, options, machines: int) -> dict[str, float]:
    """Seconds of packing options.tokens on so many machines, from seconds a sequence as measured here.

    All machines: read and hash all of the source once, at the slower of hashing and storage. The driver alone: counts,
    plans, assigns; the plan does not grow with the sequences. Then all machines: read and write each token, at the
    slower of gathering and storage.
    """
    sequences = options.tokens / whole["plan"].num_tokens * whole["sequences"]
    num_bytes = 4 * options.tokens
    driver = (whole["histogram"] + whole["assign"]) / whole["sequences"] * sequences + whole["plan_seconds"]
    reading = num_bytes / min(options.hash_rate, options.storage) / machines
    writing = max(options.tokens / options.rate, 2 * num_bytes / options.storage) / machines
    return {"read": reading, "plan and assign": driver, "write": writing, "all": reading + driver + writing}


def print_costs(whole: dict, options) -> None:
    sequences = options.tokens / whole["plan"].num_tokens * whole["sequences"]
    each = whole["peak"] / whole["sequences"]
    print(f"\nEstimate for {options.tokens:.0e} int32 tokens in {sequences:,.0f} sequences:")
    print(f"a machine packs {options.rate / 1e6:,.0f} M tokens/s, hashes {options.hash_rate / 1e9:g} GB/s, reads and")
    print(
        f"writes {options.storage / 1e9:g} GB/s; the driver needs, gets and sends {each:.1f}, 4 and 8 bytes a sequence,"
    )
    print(f"{each * sequences / 1e9:.1f}, {4 * sequences / 1e9:.1f} and {8 * sequences / 1e9:.1f} GB in all.\n")
    print("| machines | machines read, s | driver plans and assigns, s | machines write, s | all, s | machine hours |")
    print("|--:|--:|--:|--:|--:|--:|")
    for machines in (1, 4, 16, 64):
        cost = costs(whole, options, machines)
        cells = " | ".join(f"{seconds:,.0f}" for seconds in cost.values())
        print(f"| {machines} | {cells} | {machines * cost['all'] / 3600:,.2f} |")


if __name__ == "__main__":
    main()
