"""Is this checkout slower than another one? Training and collating on a CPU, in turns, by processor time.

    git worktree add /tmp/before COMMIT
    python benchmarks/two_checkouts.py /tmp/before --rounds 20

training   optimizer steps of BERT-mini, as benchmarks/training.py makes and times them, at each of --lengths, with
           each of --attention
collating  batches of 32 packs of 512 with masks, as benchmarks/collator.py fetches and collates them

Each checkout works in a process of its own, with its own benchmarks, on one thread. Both do the same work, one after
the other; each round begins with the other one. Given is the rate of this checkout divided by the rate of the other:
the median, and 10-90 %. Above 1 this one is faster. The last column divides times instead, for limits that are stated
so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("other", type=Path, help="folder of the other checkout")
    add("--parts", nargs="+", choices=("training", "collating"), default=["training", "collating"])
    add("--ways", nargs="+", default=["unpadded", "packed"], help="of training: see benchmarks/training.py")
    add("--lengths", nargs="+", type=int, default=[128, 512])
    add("--attention", nargs="+", default=["sdpa"], help="attention heads of training")
    add("--rounds", type=int, default=15)
    add("--work", nargs="+", help=argparse.SUPPRESS)  # what a process does, told by a line each time
    options = parser.parse_args()
    if options.work:
        work(options.other, *options.work)
        return
    print(f"{date.today()}, {options.rounds} rounds, one thread, processor time\n")
    print("| work | rate, this ÷ other | 10-90 % | time, this ÷ other |\n|---|--:|--:|--:|")
    choices = product(options.attention, options.ways, map(str, options.lengths))
    cases = [["training", way, length, attention] for attention, way, length in choices]
    for case in [case for case in [*cases, ["collating"]] if case[0] in options.parts]:
        ratios = in_turns(options.other, case, options.rounds)
        low, middle, high = np.percentile(ratios, [10, 50, 90])
        print(f"| {' '.join(case)} | {middle:.3f} | {low:.3f}-{high:.3f} | {1 / middle:.3f} |", flush=True)


def in_turns(other: Path, case: list[str], rounds: int) -> np.ndarray:
    """The rates of this checkout divided by the other's, round by round."""
    workers = [start(checkout, case) for checkout in (HERE, other.resolve())]
    rates: list[list[float]] = [[], []]
    try:
        for round_ in range(rounds):
            for i in (0, 1) if round_ % 2 else (1, 0):
                rates[i].append(ask(workers[i]))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return np.array(rates[0]) / np.array(rates[1])


def start(checkout: Path, case: list[str]) -> subprocess.Popen:
    """A process of a checkout that waits to be asked, ready and warm."""
    command = [sys.executable, __file__, str(checkout), "--work", *case]
    paths = os.pathsep.join([str(checkout), str(checkout / "benchmarks")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    worker = subprocess.Popen(command, cwd=checkout, env=environment, text=True, **pipes)  # type: ignore[call-overload]
    ask(worker)
    return worker


def ask(worker: subprocess.Popen) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        sys.exit("a process has ended before its answer; its error stands above")
    return float(answer)


def work(checkout: Path, part: str, *about: str) -> None:
    """Answer each line with a rate, as long as there are lines."""
    sys.path[:1] = [str(checkout), str(checkout / "benchmarks")]  # in place of this script's folder
    import collate

    assert collate.__file__ is not None and Path(collate.__file__).is_relative_to(checkout), collate.__file__
    answers = sys.stdout
    sys.stdout = sys.stderr
    with tempfile.TemporaryDirectory() as folder:
        rate = trainer(*about) if part == "training" else collator(Path(folder))
        rate()
        for _ in sys.stdin:
            print(rate(), file=answers, flush=True)


def trainer(way: str, length: str, attention: str) -> Callable[[], float]:
    """Real tokens per second in two optimizer steps."""
    import torch
    import training

    torch.set_num_threads(1)
    options = Namespace(device="cpu", dtype="float32", model="bert-mini", attention=attention, slots=16_384)
    options.sequences_per_step, options.steps_per_block = 32, 2
    corpus = training.synthetic_corpus(int(length), 4_000)
    made = training.make_way(way, corpus, options)

    def rate() -> float:
        training.run_block(made, corpus, options, options.steps_per_block)
        return made.processor[-1]

    return rate


def collator(folder: Path) -> Callable[[], float]:
    """Batches per second, the fastest of five rounds of ten batches."""
    import collator as benchmark
    import torch

    torch.set_num_threads(1)
    data = benchmark.Data.make(folder, Namespace(length=512, sequences=20_000, batches=10, packs=32))
    ours = next(iter(benchmark.contenders(data)))

    def rate() -> float:
        seconds = []
        for _ in range(5):
            start = time.process_time()
            for indices in ours.indices:
                ours.collate(ours.dataset.__getitems__(indices))
            seconds.append(time.process_time() - start)
        return len(ours.indices) / min(seconds)

    return rate


if __name__ == "__main__":
    main()
