"""How fast is assign? The published Wikipedia lengths, and long ones, beside a copy of as many bytes.

    python benchmarks/assign.py
    python benchmarks/assign.py --repeats 30      best of more, where other programs run

Each repeat draws with another seed, as re-assigning does, and visits all cases in turn. "cpu" is processor time: where
one thread took less of it than wall time, other programs used the machine. "copy" copies the lengths and the result
once.
"""

from __future__ import annotations

import argparse
import os
import time
import tracemalloc

import numpy as np

from packing import assign, length_histogram, plan_packs, published_histogram

MAX_BYTES = 20  # per sequence, beyond the lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()

    corpora = {"Wikipedia, 512": wikipedia(), "log-normal, 8192": log_normal(1_000_000, 8192)}
    cases = {}
    for name, (lengths, max_sequence_length) in corpora.items():
        plan = plan_packs(length_histogram(lengths, max_sequence_length), packer="spfhp")
        print(f"{name}: {len(lengths):,} sequences, {plan.num_packs:,} packs, {len(plan.repeats):,} strategies")
        start = time.perf_counter()
        result = assign(plan, lengths)
        print(f"  first call {time.perf_counter() - start:.2f} s, with what Numba must load or compile")
        print(f"  peak {peak_bytes(plan, lengths):.1f} bytes per sequence beyond the lengths (at most {MAX_BYTES})")
        for threads in options.threads:
            same = result.equals(assign(plan, lengths, num_threads=threads))
            print(f"  {threads} threads: {'the same assignment' if same else 'ANOTHER ASSIGNMENT'}")
            cases[name, f"assign, {threads} threads"] = assign_case(plan, lengths, threads), len(lengths)
        if max_sequence_length == 8192:
            cases[name, "histogram, plan, assign"] = plan_case(lengths, max_sequence_length), len(lengths)
        cases[name, "copy"] = copy_case(lengths.nbytes + result.sequence_indices.nbytes + result.pack_offsets.nbytes)
    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before, {options.repeats} interleaved repeats\n")
    print(table(cases, measure({case: run for case, (run, _) in cases.items()}, options.repeats), options.repeats))


def wikipedia() -> tuple[np.ndarray, int]:
    """All 16,279,552 lengths of the paper's histogram, in random order."""
    histogram = published_histogram("wikipedia")
    lengths = np.repeat(np.arange(len(histogram)), histogram)
    np.random.default_rng(0).shuffle(lengths)
    return lengths, len(histogram) - 1


def log_normal(count: int, max_sequence_length: int) -> tuple[np.ndarray, int]:
    """Median 600, as long documents are."""
    lengths = np.random.default_rng(0).lognormal(np.log(600), 1.0, count)
    return np.clip(lengths, 1, max_sequence_length).astype(np.int64), max_sequence_length


def assign_case(plan, lengths, threads):
    return lambda seed: assign(plan, lengths, seed, num_threads=threads)


def plan_case(lengths, max_sequence_length):
    def run(seed):
        plan = plan_packs(length_histogram(lengths, max_sequence_length), packer="spfhp")
        return assign(plan, lengths, seed, num_threads=1)

    return run


def copy_case(num_bytes: int):
    source = np.zeros(num_bytes, np.uint8)
    return lambda seed: source.copy(), 0


def peak_bytes(plan, lengths) -> float:
    """Bytes per sequence; NumPy reports its arrays to tracemalloc."""
    tracemalloc.start()
    assign(plan, lengths)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / len(lengths)


def measure(cases: dict, repeats: int) -> dict:
    """(repeats, 2) wall and processor seconds of each case."""
    seconds = {case: [] for case in cases}
    for seed in range(repeats):
        for case, run in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(seed)
            seconds[case].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {case: np.array(rows) for case, rows in seconds.items()}


def table(cases: dict, seconds: dict, repeats: int) -> str:
    lines = [f"{'':<44}{'wall s: best':>12} {'(10-90 %)':>15} {'cpu s: best':>12} {'µs/sequence':>12} {'x copy':>7}"]
    for (name, what), (_, count) in cases.items():
        (wall, cpu), copy = seconds[name, what].min(0), seconds[name, "copy"][:, 0].min()
        low, high = np.percentile(seconds[name, what][:, 0], [10, 90])
        per_sequence = f"{wall / count * 1e6:.4f}" if count else ""
        lines.append(
            f"{f'{name}: {what}':<44}{wall:>12.3f} {f'({low:.3f}-{high:.3f})':>15} {cpu:>12.3f} {per_sequence:>12} "
            f"{wall / copy:>7.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
