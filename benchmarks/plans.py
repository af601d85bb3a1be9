"""How near the optimum is each packer's plan, and what does it cost, beside the slow twins?

    python benchmarks/plans.py                 all of it, in some four minutes
    python benchmarks/plans.py --parts depths  one part: depths, subsamples, twins, counts or start

Plans are made from histograms alone: no sequence is touched. Times are wall time, the least of --repeats.

depths      every packer at every depth, on the paper's Wikipedia and SQuAD histograms
subsamples  `optimal` on 10 corpora of 3,000 to 20,000 lengths drawn from these, at depths 3, 4 and none
twins       the packers beside the slow twins of tests/reference/slow_packers.py: the paper's two greedy algorithms in
            plain Python, and dense non-negative least squares over all strategies (SciPy). They alternate, the dense
            solver runs once
counts      the same lengths, counted in millions and in trillions
start       import and first plan in a new process, with an empty and with a filled cache of compiled code
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from packers import machine
from tqdm import tqdm

from packing import PACKERS, length_histogram, plan_packs, published_histogram

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/reference"))
import slow_packers

DEPTHS = (2, 3, 4, 8, 16, None)
CORPORA = {"Wikipedia 512": "wikipedia", "SQuAD 384": "squad"}


def main() -> None:
    parts = {"depths": depths, "subsamples": subsamples, "twins": twins, "counts": counts, "start": start}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repeats", type=int, default=3, help="the least time of so many counts")
    options = parser.parse_args()
    print(machine())
    for name in options.parts:
        print(flush=True)
        for line in parts[name](options.repeats):
            print(line, flush=True)


def depths(repeats: int) -> Iterator[str]:
    yield "| histogram | depth | packer | packs | above the bound | ms |"
    yield "|---|--:|---|--:|--:|--:|"
    cases = [(corpus, depth) for corpus in CORPORA for depth in DEPTHS]
    for corpus, depth in tqdm(cases, desc="depths"):
        histogram = published_histogram(CORPORA[corpus])
        plans, seconds = {}, {}
        for name in PACKERS:
            plans[name], seconds[name] = least_time(partial(plan_packs, histogram, None, depth, name), repeats)
        bound = max(plan.lower_bound for plan in plans.values())
        for name, plan in plans.items():
            above = f"{plan.num_packs - bound:,} ({plan.num_packs / bound - 1:.3%})"
            milliseconds = f"{seconds[name] * 1e3:,.1f}"
            yield f"| {corpus} | {depth or 'none'} | {name} | {plan.num_packs:,} | {above} | {milliseconds} |"


def subsamples(repeats: int) -> Iterator[str]:
    draw = np.random.default_rng(0)
    gaps, times = [], []
    for number in tqdm(range(10), desc="subsamples"):
        published = published_histogram(list(CORPORA.values())[number % 2])
        lengths = draw.choice(len(published), int(draw.integers(3_000, 20_001)), p=published / published.sum())
        for depth in (3, 4, None):
            histogram = length_histogram(lengths, len(published) - 1)
            plan, seconds = least_time(partial(plan_packs, histogram, None, depth), repeats)
            gaps.append(plan.num_packs - plan.lower_bound)
            times.append(seconds)
    yield (
        f"optimal on {len(gaps)} subsamples: {gaps.count(0)} at the bound, {gaps.count(1)} one pack above it, "
        f"{sum(gap > 1 for gap in gaps)} further; median {np.median(times):.2f} s, at most {max(times):.2f} s"
    )


def twins(repeats: int) -> Iterator[str]:
    yield "| histogram | depth | packer | ms | twin, ms | times as fast | packs | the twin's |"
    yield "|---|--:|---|--:|--:|--:|--:|--:|"
    long = np.clip(np.random.default_rng(0).lognormal(np.log(600), 1.0, 1_000_000).astype(int), 1, 8192)
    histograms = {name: published_histogram(corpus) for name, corpus in CORPORA.items()}
    histograms["1 M log-normal, 8192"] = length_histogram(long, 8192)
    for corpus, histogram in histograms.items():
        for name, depth in [(name, depth) for name in ("spfhp", "lpfhp") for depth in (3, None)]:
            limit, as_list = len(histogram) - 1, histogram.tolist()
            (plan, seconds), (packs, slow) = least_times(
                [
                    partial(PACKERS[name], histogram, limit, depth),
                    partial(slow_packers.pack_histogram, as_list, limit, depth, emptiest=name == "spfhp"),
                ],
                repeats,
            )
            yield twin_line(corpus, depth, name, seconds, slow, f"{plan.num_packs:,}", f"{packs:,}")
    for corpus in CORPORA:
        histogram = histograms[corpus]
        plan, seconds = least_time(partial(PACKERS["nnlshp"], histogram, len(histogram) - 1, 3), repeats)
        _, slow = least_time(partial(slow_packers.dense_nnls, histogram, 3), 1)
        yield twin_line(corpus, 3, "nnlshp", seconds, slow, f"{plan.num_packs:,}", "solves only")


def twin_line(corpus, depth, name, seconds, slow, packs, twins_packs) -> str:
    return (
        f"| {corpus} | {depth or 'none'} | {name} | {seconds * 1e3:,.2f} | {slow * 1e3:,.1f} | {slow / seconds:,.0f} "
        f"| {packs} | {twins_packs} |"
    )


def counts(repeats: int) -> Iterator[str]:
    yield "| packer | ms at 10^6 sequences | at 10^12 | ratio |"
    yield "|---|--:|--:|--:|"
    shares = published_histogram("wikipedia") / published_histogram("wikipedia").sum()
    few, many = (np.floor(shares * total).astype(np.int64) for total in (10**6, 10**12))
    for name in PACKERS:
        (_, a), (_, b) = least_times(
            [partial(plan_packs, histogram, None, 3, name) for histogram in (few, many)], repeats
        )
        yield f"| {name}, depth 3 | {a * 1e3:,.1f} | {b * 1e3:,.1f} | {b / a:.2f} |"


def start(repeats: int) -> Iterator[str]:
    yield "| seconds in a new process | nothing compiled yet | compiled before |"
    yield "|---|--:|--:|"
    programs = {"import packing": "import packing"} | {
        f"import, first plan by {name}": f"import packing; packing.plan_packs([0, 5, 3, 9, 2], 8, 3, {name!r})"
        for name in PACKERS
    }
    programs["import, first plan and assign"] = (
        "import packing; plan = packing.plan_packs([0, 1, 2]); packing.assign(plan, [1, 2, 2])"
    )
    for what, program in programs.items():
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"NUMBA_CACHE_DIR": cache}
            seconds = []
            for _ in range(1 + repeats):
                begin = time.perf_counter()
                subprocess.run([sys.executable, "-c", program], env=environment, check=True)
                seconds.append(time.perf_counter() - begin)
        yield f"| {what} | {seconds[0]:.1f} | {min(seconds[1:]):.2f} |"


def least_time(run, repeats: int):
    """What it returns, and the least seconds."""
    return least_times([run], repeats)[0]


def least_times(runs, repeats: int) -> list[tuple]:
    """The same for several that alternate; the first round, which may compile, does not count if there are others."""
    results, seconds = [None] * len(runs), [[] for _ in runs]
    for _ in range(repeats + (repeats > 1)):
        for i, run in enumerate(runs):
            begin = time.perf_counter()
            results[i] = run()
            seconds[i].append(time.perf_counter() - begin)
    return [(result, min(all_seconds[1:] or all_seconds)) for result, all_seconds in zip(results, seconds, strict=True)]


if __name__ == "__main__":
    main()
