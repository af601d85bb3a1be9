"""How fast, and how right, is packed training on one GPU? One command, at most six minutes; a CPU can try it out.

    python benchmarks/gpu.py                              all parts, on the first CUDA device
    python benchmarks/gpu.py --parts base compiled        some of them
    python benchmarks/gpu.py --table rows.jsonl           only the tables, of rows that an earlier run left
    python benchmarks/gpu.py --device cpu --quick         a trial in seconds: tiny sizes, whose figures mean nothing

ceilings     what the card can do: bytes copied, and a product of two 8192 x 8192 matrices
correctness  a BERT of two layers beside float32 on the CPU, losses and gradients; and the tests for CUDA, if pytest is
             installed
base         BERT-base trained in four ways, in turns: padded, bucketed, unpadded, packed (see benchmarks/training.py)
compiled     padded and packed, both compiled, beside packed as it is
sweep        packed, with each exact attention and several sizes of a pass
large        BERT-large, padded and packed
heads        each attention head alone, on sequences of at most 512 and of at most 4,096 tokens

Each part is a process with a clock: it is killed when its time is over. Each row is printed, and appended to --output,
as a line of JSON as soon as it is known; where rounds go on, a later line replaces it. So a killed run keeps what it
has. What cannot run has the reason under "error".

A pass has equally many token slots in each way, unpadded ones excepted: they have equally many tokens. It is a step of
AdamW, with dropout; the batch goes to the device in it. tokens_per_second counts real tokens. times_padded compares
them with padded ones, times_eager with the same way uncompiled. by_factor is times_padded divided by what packing
promises for these sequences, 1 where it pays in full. mfu: real work over the card's peak in 16 bits. pass_gib: memory
that a pass adds to what lay there. waits: how often the host waits for the GPU in a pass; launches: the kernels that it
starts. On a CPU the time is the processor's.

It needs torch, transformers and NumPy. The sequences are those of benchmarks/training.py, drawn once: --batches has
them in an npz of a megabyte, which another machine can use as well. torch keeps compiled kernels: a second run
compiles in less time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
import transformers
from gpu_turns import autocast, how_to_compile, in_turns, one_line, prepared, rounded, seen_in
from torch import Tensor
from training import Corpus, make_way, synchronize

from bert_pretrain.attention.head import prepare_heads
from bert_pretrain.attention.table import ATTENTION
from collate.device.transfer import to_device
from collate.layout import PackLayout

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = {"ceilings": 15, "correctness": 45, "base": 60, "compiled": 120, "sweep": 35, "large": 35, "heads": 50}
"""Seconds of each part, its start included: six minutes in all."""
STARTING = 15  # of them, at most, for imports and for the first touch of the card


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=CLOCKS, default=list(CLOCKS))
    add("--device", default="cuda")
    add("--dtype", choices=("float32", "bfloat16"), help="bfloat16 by autocast; default: on CUDA")
    add("--model", choices=training.MODELS, default="bert-base", help="of base, compiled and sweep")
    add("--attention", default="auto", help="of the ways without padding")
    add("--ways", nargs="+", choices=training.WAYS, default=list(training.WAYS), help="of base and compiled")
    add("--slots", type=int, default=65_536, help="token slots of a pass")
    add("--compile-mode", help="of torch.compile, such as max-autotune")
    add("--seconds", type=int, help="the clock of each part, instead of its own")
    add("--output", type=Path, default=Path("build/gpu_rows.jsonl"), help="rows are appended")
    add("--batches", type=Path, default=Path("build/gpu_batches.npz"), help="made where it is missing")
    add("--quick", action="store_true", help="tiny sizes, and all parts in this process: for trials")
    add("--table", type=Path, help="print the tables of such rows, and nothing else")
    add("--run", choices=CLOCKS, help=argparse.SUPPRESS)  # a part, in the process that has its clock
    options = parser.parse_args(arguments)
    if options.table:
        print(tables(read_rows(options.table)))
        return
    complete(options)
    if options.on_cuda and not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here; --device cpu --quick tries the benchmark out")
    corpus = prepared(options.batches, options.length)
    if options.run:
        run_part(options.run, corpus, options)
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("", encoding="utf-8")
    for part in options.parts:
        if options.quick:
            run_part(part, corpus, options)
        else:
            command = [sys.executable, str(Path(__file__).resolve()), *(arguments or sys.argv[1:]), "--run", part]
            seconds = options.seconds or CLOCKS[part]
            if why := failure_of(command, seconds):
                write({"part": part, "row": part, "error": why}, options)
    print(tables(read_rows(options.output)))


def complete(options) -> None:
    """Set what follows from the device, and what benchmarks/training.py wants to know."""
    options.on_cuda = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if options.on_cuda else "float32")
    options.length, options.threads, options.peak_tflops = 64 if options.quick else 512, 1, None
    options.sequences_per_step, options.steps_per_block = 16, 1
    if options.quick:
        options.model, options.slots = "bert-tiny", 512
    if not options.on_cuda:
        torch.set_num_threads(options.threads)


def failure_of(command: list[str], seconds: float) -> str:
    """Run a command; after so many seconds kill it, and all that it has started. -> why it failed, or nothing."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"killed after {seconds} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"ended with status {status}" if status else ""


def run_part(part: str, corpus: Corpus, options) -> None:
    """Rows of one part, each printed and kept as soon as it is known."""
    seconds = 0 if options.quick else max(5, (options.seconds or CLOCKS[part]) - STARTING)
    options.ends = time.perf_counter() + seconds
    for row in PARTS[part](corpus, options):
        write({"part": part} | row, options)


def write(row: dict[str, Any], options) -> None:
    line = json.dumps({"date": str(date.today()), "device": machine(options)} | row)
    print(line, flush=True)
    with options.output.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def machine(options) -> str:
    name = torch.cuda.get_device_name(options.device) if options.on_cuda else platform.machine()
    return f"{name}, {options.dtype}, torch {torch.__version__}, transformers {transformers.__version__}"


# The parts


def ceilings(corpus: Corpus, options) -> Iterator[dict[str, Any]]:
    size = 256 if options.quick else 8192
    dtype = torch.bfloat16 if options.on_cuda else torch.float32
    a, b = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
    words = torch.zeros(size * size * 4, device=options.device)
    there = torch.empty_like(words)
    seconds = fastest(lambda: there.copy_(words), options)
    yield {"row": "copy", "gigabytes_per_second": rounded(2 * words.nbytes / seconds / 1e9)}
    seconds = fastest(lambda: a @ b, options)
    yield {"row": f"product of {size} x {size}", "tflops": rounded(2 * size**3 / seconds / 1e12)}


def fastest(run: Callable[[], Any], options, times: int = 5, each: int = 4) -> float:
    """Seconds of one call, in the fastest of a few rounds."""
    found = []
    for _ in range(times):
        synchronize(options)
        start = time.perf_counter()
        for _ in range(each):
            run()
        synchronize(options)
        found.append((time.perf_counter() - start) / each)
    return min(found)


def correctness(corpus: Corpus, options) -> Iterator[dict[str, Any]]:
    """A BERT without dropout, losses and gradients, here and in float32 on the CPU; then the tests."""
    cases = [("auto", options.dtype, False), ("auto", options.dtype, True), ("sdpa", "float32", False)]
    cases += [("auto", "float32", False)] * options.on_cuda
    on_cpu = argparse.Namespace(**vars(options) | {"device": "cpu", "dtype": "float32", "on_cuda": False})
    batch = training.collate(corpus.packs[:8], corpus, corpus.max_sequence_length, max(map(len, corpus.packs)))
    true_loss, true_gradients = pass_without_dropout(batch, corpus, on_cpu, "sdpa", False)
    for attention, dtype, is_compiled in cases:
        row: dict[str, Any] = {"row": f"{attention}, {dtype}{', compiled' * is_compiled}"}
        here, limit = argparse.Namespace(**vars(options) | {"dtype": dtype}), 1e-3 if dtype == "float32" else 5e-2
        try:
            loss, gradients = pass_without_dropout(batch, corpus, here, attention, is_compiled)
            row["loss_apart"] = rounded(abs(loss - true_loss) / true_loss)
            row["gradients_apart"] = rounded((gradients - true_gradients).norm() / true_gradients.norm())
            row["agrees"] = row["loss_apart"] < limit and row["gradients_apart"] < limit
        except Exception as error:
            row["error"] = one_line(error)
        yield row
    if options.on_cuda and find_spec("pytest"):
        tests = ["tests/bert_pretrain/attention/test_cuda.py", "-p", "no:cacheprovider"]
        run = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, capture_output=True, text=True)
        yield {"row": tests[0], "agrees": run.returncode == 0, "last_line": run.stdout.strip().rpartition("\n")[2]}


def pass_without_dropout(
    batch: dict[str, Tensor], corpus: Corpus, options, attention: str, is_compiled: bool
) -> tuple[float, Tensor]:
    """The loss, and the gradients of all parameters as one vector, on the host. Weights are the same each time."""
    settings = vars(options) | {"model": "bert-tiny", "attention": attention}
    model = make_way("packed", corpus, argparse.Namespace(**settings)).model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if is_compiled:
        model.compile(**how_to_compile(options))
    with autocast(options):
        loss = model(**to_device(batch, options.device)).loss
    loss.backward()
    gradients = [x.grad.float().cpu().flatten() for x in model.parameters() if x.grad is not None]
    return float(loss.detach()), torch.cat(gradients)


def base(corpus: Corpus, options) -> Iterator[dict[str, Any]]:
    return in_turns([(way, {"model": options.model}) for way in training.WAYS if way in options.ways], corpus, options)


def compiled(corpus: Corpus, options) -> Iterator[dict[str, Any]]:
    ways = [("packed", False), ("packed", True), ("padded", True)]
    settings = [(way, {"model": options.model, "is_compiled": is_it}) for way, is_it in ways if way in options.ways]
    return in_turns(settings, corpus, options)


def sweep(corpus: Corpus, options) -> Iterator[dict[str, Any]]:
    """Each alone, one after another: a part of the time for each."""
    exact = ("varlen", "flex", "sdpa") if options.on_cuda else ("sdpa",)
    cases = [(exact[0], options.slots * n // 4) for n in (1, 2, 8)] + [(name, options.slots) for name in exact]
    start, end = time.perf_counter(), options.ends
    for i, (attention, slots) in enumerate(cases):
        options.ends = start + (end - start) * (i + 1) / len(cases)
        settings = {"model": options.model, "attention": attention, "slots": slots}
        yield from in_turns([("packed", settings)], corpus, options)
        if options.on_cuda:  # give the memory back, for the next one
            gc.collect()
            torch.cuda.empty_cache()


def large(corpus: Corpus, options) -> Iterator[dict[str, Any]]:
    model, slots = (options.model, options.slots) if options.quick else ("bert-large", options.slots // 2)
    ways = [(way, {"model": model, "slots": slots}) for way in ("padded", "packed")]
    return in_turns(ways, corpus, options)


def heads(corpus: Corpus, options) -> Iterator[dict[str, Any]]:
    """Forward and backward of one layer's head. Lengths above 512 are those of the corpus, times eight."""
    lengths = np.array([len(row) for row in corpus.input_ids])
    for times, most in ((1, corpus.max_sequence_length), (8, 8 * corpus.max_sequence_length)):
        ids = packed_ids(lengths * times, most, max(1, options.slots // 2 // most))
        for name in ATTENTION:
            row: dict[str, Any] = {"row": f"{name}, {most}", "slots": ids.numel()}
            try:
                row |= measured_head(name, ids, most, options)
            except Exception as error:
                row["error"] = one_line(error)
            yield row
            if options.on_cuda:
                torch.cuda.empty_cache()


def packed_ids(lengths: np.ndarray, slots: int, packs: int) -> Tensor:
    """(packs, slots) sequence_ids: sequences in the order of the corpus, each pack filled as far as they fit."""
    ids, pack, number, start = torch.zeros(packs, slots, dtype=torch.int32), 0, 0, 0
    for length in np.resize(lengths, packs * slots).tolist():
        if start + length > slots:
            pack, number, start = pack + 1, 0, 0
        if pack == packs:
            return ids
        number += 1
        ids[pack, start : start + length] = number
        start += length
    return ids


def measured_head(name: str, ids: Tensor, most: int, options) -> dict[str, Any]:
    count, width = (2, 16) if options.quick else (12, 64)
    head: Any = ATTENTION[name](num_heads=count, head_width=width, max_sequence_length=most).to(options.device)
    tokens = int((ids > 0).sum())

    def step() -> None:
        there = to_device({"sequence_ids": ids.clone()}, options.device)["sequence_ids"]
        layout = PackLayout.of(there)
        prepare_heads([head], layout)
        with autocast(options):
            hidden = {"hidden_TD": inputs[1].flatten(1)} if head.needs_hidden else {}
            head(*inputs, layout, **hidden).backward(gradient)

    first = PackLayout.of(to_device({"sequence_ids": ids}, options.device)["sequence_ids"]).num_tokens
    dtype = getattr(torch, options.dtype)
    *inputs, gradient = (torch.randn(first, count, width, device=options.device, dtype=dtype) for _ in range(4))
    for x in inputs:
        x.requires_grad_()
    step()
    seconds = fastest(step, options, times=1 if options.quick else 3, each=1)
    measured = {"milliseconds": rounded(seconds * 1e3), "tokens_per_second": round(tokens / seconds)}
    return measured | seen_in(step, options)


PARTS: dict[str, Callable[[Corpus, Any], Iterator[dict[str, Any]]]] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "base": base,
    "compiled": compiled,
    "sweep": sweep,
    "large": large,
    "heads": heads,
}


# The tables


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The last line of each row. A line that a killed run left half written is none."""
    rows: dict[tuple, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["part"], row["row"], row.get("attention"), row.get("slots")] = row
    return list(rows.values())


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown, one table a part."""
    lines = []
    for part in CLOCKS:
        mine = [row for row in rows if row["part"] == part]
        columns = list(dict.fromkeys(name for row in mine for name in row if name not in ("date", "device", "part")))
        if mine:
            lines += ["", f"{part}: {mine[0]['date']}, {mine[0]['device']}", "", f"| {' | '.join(columns)} |"]
            lines += [f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(shown(row.get(name)) for name in columns)} |" for row in mine]
    return "\n".join(lines)


def shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "/")


if __name__ == "__main__":
    main()
