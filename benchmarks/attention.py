"""What do the attention heads cost, how good are they, and does a small BERT learn with each of them?

    python benchmarks/attention.py                     all of it, in some eight minutes on two idle cores
    python benchmarks/attention.py --parts cost        one part: cost, quality or pretraining
    python benchmarks/attention.py --parts cost --tokens 2048 --lengths 128 512 2048

cost         forward and backward of each head, at a fixed number of tokens in the batch: sequences of 128 tokens, of
             256, and so on, each less one token, since few lengths are multiples of a head's block. 4 heads of width
             64, all options at their defaults; the stride of strided, fixed and axial is the root of the length. All
             lengths and heads take turns, round by round. The table has the least time, and the greatest in
             parentheses. Views of the layout are made before, as for a model's second layer.
             "slope": time against length in a log-log plot, over the longer half of the lengths: 0 where a batch costs
             the same at any length of its sequences, 1/2 for n sqrt(n), 1 for n^2.
             "cpu / wall": below 1 times the threads, other programs used the machine.
             "beats sdpa from": the least length, interpolated, from which on the head took less time than exact
             attention within each sequence; then the same by processor time.
             Memory: at the peak, beyond the inputs, with the views of the layout. On CUDA max_memory_allocated; on a
             CPU the growth of the resident set of a process that does nothing else (Linux).
quality      performer's error by number of features; lsh by rounds on Reformer's duplication task, weights given; what
             strided and fixed reach in two layers; delta and plain sums when keys are written a second time.
pretraining  BERT of 2 layers of width 128 on the State of the Union messages, packed for 256 tokens, as demo.py makes
             them (--dataset and --tokenizer: made before). All heads train in turn, with the same weights, batches and
             masks. Options are scaled to the length: see SCALED.

One thread, unless --threads says otherwise. With a CUDA device, on that.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packers import machine, memory
from torch import Tensor, nn
from tqdm import tqdm

from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.heads.delta import DeltaAttention
from bert_pretrain.attention.heads.linear import LinearAttention
from bert_pretrain.attention.heads.routing import update_after_step
from collate.layout import PackLayout
from collate.vocabulary import vocabulary_size

NUM_HEADS, HEAD_WIDTH = 4, 64
EXACT = "sdpa"

COST = {
    "sdpa": "n²",
    "persistent": "n²",
    "strided": "n √n",
    "fixed": "n √n",
    "axial": "n √n",
    "routing": "n √n",
    "adaptive_span": "n²",
    "entmax": "n²",
    "clustered": "n √n",
    "lsh": "n log n",
    "sinkhorn": "n + (n/64)²",
}
"""What a docstring says of one sequence, with options as they are here; of all others "n"."""

SCALED = {
    "local": {"window": 32},
    "longformer": {"window": 32},
    "etc": {"window": 32, "global_tokens": 8},
    "bigbird": {"block": 16, "random_blocks": 2},
    "adaptive_span": {"span": 64},
    "entmax": {"top_k": 64},
    "lsh": {"bucket_size": 32},
    "sinkhorn": {"block_size": 32},
    "clustered": {"top_keys": 16},
    "inducing": {"points": 32},
    "linformer": {"rank": 64},
    "nystrom": {"landmarks": 32},
    "performer": {"features": 128},
    "delta": {"chunk": 32},
}
"""Options for sequences of up to 256 tokens."""


def main() -> None:
    parts = {"cost": show_cost, "quality": show_quality, "pretraining": show_pretraining}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=parts, default=list(parts))
    add("--attention", nargs="+", choices=ATTENTION, default=list(ATTENTION), help=f"beside {EXACT}; default: all")
    add("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096], help="of cost's sequences")
    add("--tokens", type=int, default=8192, help="in each of cost's batches")
    add("--rounds", type=int, default=3, help="the least time of so many")
    add("--steps", type=int, default=100, help="optimizer steps of pretraining, for each head")
    add("--sequences-per-step", type=int, default=8, help="of pretraining")
    add("--dataset", type=Path, help="packed folder for pretraining, with the splits train and test")
    add("--tokenizer", type=Path, help="the tokenizer that it was made with")
    add("--threads", type=int, default=1)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of cost; of pretraining by autocast")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--memory-of", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: a key of MEMORY, JSON of arguments
    options = parser.parse_args()
    if options.memory_of is not None:
        torch.set_num_threads(options.threads)
        print(json.dumps(MEMORY[options.memory_of[0]](**json.loads(options.memory_of[1]))))
        return
    if (options.dataset is None) != (options.tokenizer is None):
        parser.error("--dataset and --tokenizer go together")
    for length in options.lengths:
        if options.tokens % length:
            parser.error(f"--tokens {options.tokens} is no multiple of --lengths {length}")
    options.lengths.sort()
    options.attention = [name for name in ATTENTION if name in {EXACT, *options.attention}]
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else f"{options.threads} threads"
    print(f"{machine()}, torch {torch.__version__}, {where}, {options.dtype}")
    for part in options.parts:
        for line in parts[part](options):
            print(line, flush=True)


# Cost


class Case:
    """One head and a batch of sequences, each one token shorter than `length`, and a short one that fills it up."""

    def __init__(self, name: str, length: int, tokens: int, device: str):
        torch.manual_seed(0)
        self.head = ATTENTION[name](num_heads=NUM_HEADS, head_width=HEAD_WIDTH, max_sequence_length=length).to(device)
        self.sequence_ids = (torch.arange(tokens, device=device) // (length - 1) + 1)[None]
        self.layout = PackLayout(self.sequence_ids)

    def run(self, tensors: list[Tensor]) -> None:
        """Forward and backward. tensors: query, key, value and the context's gradient, (T, H, K) each."""
        *inputs, gradient = tensors
        run_head(self.head, inputs, self.layout).backward(gradient)

    def run_anew(self, tensors: list[Tensor]) -> None:
        """The same, with a layout that has no views yet."""
        self.layout = PackLayout(self.sequence_ids)
        self.run(tensors)


def run_head(head: nn.Module, inputs: Sequence[Tensor], layout: PackLayout) -> Tensor:
    """The context of queries, keys and values. A head that projects the layer's input gets the keys for that."""
    hidden = {"hidden_TD": inputs[1].flatten(1)} if head.needs_hidden else {}
    return head(*inputs, layout, **hidden)


def measure_cost(names, lengths, tokens: int, rounds: int, device: str = "cpu", dtype: str = "float32"):
    """{(name, length): (rounds, 2) wall and processor seconds}, {…: bytes at the peak}, {name: why it is missing}."""
    tensors = make_tensors(tokens, device, dtype)
    cases, failed = {}, {}
    for name in names:
        made = {(name, length): Case(name, length, tokens, device) for length in lengths}
        try:
            for case in made.values():  # the first run compiles, and makes the views of the layout
                case.run(tensors)
            cases |= made
        except (ValueError, RuntimeError, NotImplementedError) as error:
            failed[name] = str(error).splitlines()[0]
    seconds = {key: [] for key in cases}
    for _ in tqdm(range(rounds), desc="cost: rounds"):
        for key, case in cases.items():
            clear_gradients(case.head, tensors)
            seconds[key].append(timed(partial(case.run, tensors), device))
    ready = [name for name in names if name not in failed]
    arguments = {"names": ready, "lengths": list(lengths), "tokens": tokens, "dtype": dtype}
    peaks = in_own_process("cost", device, **arguments)
    peaks = {key: peaks[f"{key[0]} {key[1]}"] for key in cases}
    return {key: np.array(rows) for key, rows in seconds.items()}, peaks, failed


def cost_memory(names, lengths, tokens: int, device: str, dtype: str) -> dict[str, int]:
    """Bytes at the peak of each "name length"."""
    tensors, peaks = make_tensors(tokens, device, dtype), {}
    for name in names:
        for length in lengths:
            case = Case(name, length, tokens, device)
            for measure in (lambda run: run(), partial(peak_bytes, device=device)):  # the first run does not count
                clear_gradients(case.head, tensors)
                peaks[f"{name} {length}"] = measure(partial(case.run_anew, tensors))
    return peaks


def make_tensors(tokens: int, device: str, dtype: str) -> list[Tensor]:
    """Query, key, value and the context's gradient, (T, H, K) each."""
    torch.manual_seed(0)
    shape = (tokens, NUM_HEADS, HEAD_WIDTH)
    return [torch.randn(shape, device=device, dtype=getattr(torch, dtype), requires_grad=i < 3) for i in range(4)]


def clear_gradients(module: nn.Module, tensors=()) -> None:
    for tensor in [*module.parameters(), *tensors]:
        tensor.grad = None


def timed(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall and processor seconds."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Bytes at the peak of a run beyond those before it; on a CPU of the whole process, on Linux only."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return 0
    with contextlib.suppress(AttributeError):  # only glibc has it: gives free memory of the heap back
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    before = memory("VmHWM")
    run()
    return max(0, memory("VmHWM") - before)


def in_own_process(part: str, device: str, **arguments) -> dict[str, float]:
    """`MEMORY[part]`: on CUDA here, else in a new process, whose glibc hands larger blocks back once they are free."""
    arguments = arguments | {"device": device}
    if device.startswith("cuda"):
        return MEMORY[part](**arguments)
    command = [sys.executable, __file__, "--memory-of", part, json.dumps(arguments)]
    done = subprocess.run(command, env=os.environ | GLIBC, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def slope(lengths, values) -> float:
    """The slope of a straight line through the longer half, at least two, of the points in a log-log plot."""
    half = max(2, (len(lengths) + 1) // 2)
    return float(np.polyfit(np.log(lengths[-half:]), np.log(values[-half:]), 1)[0])


def crossover(lengths, ratios) -> str:
    """The length from which on a ratio stays below 1, interpolated between two points.

    lengths 128 256 512, ratios 2 1.5 0.75    ->    "382"
    """
    longer = [i for i, ratio in enumerate(ratios) if ratio >= 1]
    if not longer:
        return f"≤ {lengths[0]}"
    last = longer[-1]
    if last == len(lengths) - 1:
        return "never here" if len(longer) == len(lengths) else f"not at {lengths[last]}"
    x, y = np.log(lengths[last : last + 2]), np.log(ratios[last : last + 2])
    return f"{np.exp(x[0] - y[0] * (x[1] - x[0]) / (y[1] - y[0])):,.0f}"


def show_cost(options) -> Iterator[str]:
    lengths, names = options.lengths, options.attention
    seconds, peaks, failed = measure_cost(names, lengths, options.tokens, options.rounds, options.device, options.dtype)
    heads = [name for name in names if name not in failed]
    wall, cpu = ({key: rows[:, i].min() for key, rows in seconds.items()} for i in (0, 1))
    columns = " | ".join(f"n = {length:,}" for length in lengths)
    what = f"{options.tokens:,} tokens in sequences of n - 1, {options.rounds} rounds"
    yield f"\nms, forward and backward, {what}: the least (the greatest)\n"
    yield f"| head | a sequence costs | {columns} | slope | slope, cpu | cpu / wall | beats {EXACT} from | in cpu |"
    yield f"|---|---|{'--:|' * (len(lengths) + 5)}"
    for name in heads:
        times, cpu_times = ([best[name, length] for length in lengths] for best in (wall, cpu))
        cells = [f"{wall[name, n] * 1e3:,.0f} ({seconds[name, n][:, 0].max() * 1e3:,.0f})" for n in lengths]
        cells += [f"{slope(lengths, values):.2f}" for values in (times, cpu_times)] if len(lengths) > 1 else ["", ""]
        total = sum(seconds[name, length].sum(0) for length in lengths)
        cells += [f"{total[1] / total[0]:.2f}"]
        cells += [
            crossover(lengths, [best[name, n] / best[EXACT, n] for n in lengths]) if name != EXACT else ""
            for best in (wall, cpu)
        ]
        yield f"| {name} | {COST.get(name, 'n')} | {' | '.join(cells)} |"
    for name, reason in failed.items():
        yield f"| {name} | not run: {reason} |{' |' * (len(lengths) + 5)}"
    size = getattr(torch, options.dtype).itemsize * options.tokens * NUM_HEADS * HEAD_WIDTH
    yield f"\nMB at the peak, beyond queries, keys, values and the context's gradient, {size / 1e6:,.1f} MB each\n"
    yield f"| head | {columns} | slope |"
    yield f"|---|{'--:|' * (len(lengths) + 1)}"
    for name in heads:
        values = [peaks[name, length] for length in lengths]
        cells = [f"{value / 1e6:,.0f}" for value in values]
        cells.append(f"{slope(lengths, values):.2f}" if len(lengths) > 1 and all(values) else "")
        yield f"| {name} | {' | '.join(cells)} |"


# Quality


def show_quality(options) -> Iterator[str]:
    yield from show_performer()
    yield from show_lsh()
    yield from show_reach()
    yield from show_memory()


def packed(lengths) -> PackLayout:
    """Sequences of these lengths in one row."""
    return PackLayout(torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))[None])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def performer_errors(features, spread: float, draws: int = 5, length: int = 256, **options) -> np.ndarray:
    """(features, draws): distance to softmax attention, as a multiple of the distance of the plain mean of values.

    spread: the standard deviation of queries and keys.
    """
    generator = torch.Generator().manual_seed(0)
    size = (length, NUM_HEADS, HEAD_WIDTH)
    query, key, value = (torch.randn(size, generator=generator) for _ in range(3))
    shape = {"num_heads": NUM_HEADS, "head_width": HEAD_WIDTH, "max_sequence_length": length}
    inputs = query * spread, key * spread, value, packed([length])
    exact = ATTENTION[EXACT](**shape)(*inputs)
    of_mean = (value.mean(0) - exact).norm()

    def error(number: int, seed: int) -> float:
        head = ATTENTION["performer"](**shape, features=number, seed=seed, **options)
        return float((head(*inputs) - exact).norm() / of_mean)

    return np.array([[error(number, seed) for seed in range(draws)] for number in features])


def show_performer() -> Iterator[str]:
    features = [16, 64, 256, 1024, 4096]
    yield (
        "\nperformer: distance to softmax attention, 1 is that of the plain mean of values: median of 5 draws. Slope: "
        "of the last three; known: error as m^(-1/2), without epsilon and once features are many\n"
    )
    yield f"| variance of queries, keys | epsilon | {' | '.join(f'm = {number:,}' for number in features)} | slope |"
    yield f"|--:|--:|{'--:|' * (len(features) + 1)}"
    for spread, epsilon in tqdm([(0.25, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 1e-4), (1.0, 1e-4)], desc="performer"):
        errors = np.median(performer_errors(features, spread, epsilon=epsilon), axis=1)
        cells = [f"{error:.3f}" for error in errors] + [f"{slope(features, errors):.2f}"]
        yield f"| {spread**2:.2f} | {epsilon:g} | {' | '.join(cells)} |"


SYMBOLS = 128


def duplication(likeness: float, length: int = 1024, sequences: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reformer's task, 0 w 0 w: each token of the second half must read the token at its place in the first half.

    Queries (T, H, K), the same as keys: a unique code for the place in w, with noise on both copies, so that their
    cosine is about `likeness`. Values (T, H, K): a code of the symbol in the first half, 0 in the second. Also the
    codes (symbols, K), and the symbol of each token (T,).
    """
    generator = torch.Generator().manual_seed(0)

    def units(*shape: int) -> Tensor:
        return unit(torch.randn(*shape, HEAD_WIDTH, generator=generator))

    codes = units(SYMBOLS)
    half = length // 2
    symbols = torch.randint(SYMBOLS, (sequences, half), generator=generator)
    symbols[:, 0] = 0
    place = units(sequences, half, NUM_HEADS)
    copies = [likeness**0.5 * place + (1 - likeness) ** 0.5 * units(sequences, half, NUM_HEADS) for _ in range(2)]
    query = 60 * HEAD_WIDTH**0.5 * torch.cat(copies, 1).flatten(0, 1)  # so long that softmax takes the nearest key
    value = codes[symbols][:, :, None].expand(-1, -1, NUM_HEADS, -1)
    value = torch.cat([value, torch.zeros_like(value)], 1).flatten(0, 1)
    return query, value, codes, torch.cat([symbols, symbols], 1).flatten()


def lsh_accuracy(rounds, likeness: float, length: int = 1024, seeds: int = 3) -> list[tuple[float, float]]:
    """By number of rounds: the share of second halves' symbols that are read, and the distance to exact attention.

    rounds: None stands for exact attention, over the same shared queries and keys.
    """
    query, value, codes, symbols = duplication(likeness, length)
    layout = packed([length] * (len(query) // length))
    second = layout.positions_T >= length // 2

    def contexts(number: int | None, seed: int) -> Tensor:
        settings = {"bucket_size": length} if number is None else {"bucket_size": 32, "num_rounds": number}
        shape = {"num_heads": NUM_HEADS, "head_width": HEAD_WIDTH, "max_sequence_length": length}
        return ATTENTION["lsh"](**shape, **settings, seed=seed)(query, query, value, layout)[second]

    exact = contexts(None, 0)
    results = []
    for number in rounds:
        found = [contexts(number, seed) for seed in range(1 if number is None else seeds)]
        right = [((context @ codes.T).argmax(-1) == symbols[second, None]).float().mean() for context in found]
        errors = [relative(context, exact) for context in found]
        results.append((float(np.mean(right)), float(np.mean(errors))))
    return results


def show_lsh() -> Iterator[str]:
    rounds = [1, 2, 4, 8]
    yield (
        "\nlsh: Reformer's duplication task, sequences of 1,024 tokens, buckets of 32: symbols of the second half that "
        f"are read (of {SYMBOLS}), and in parentheses the distance to exact attention, relative\n"
    )
    heads = ("1 round" if number == 1 else f"{number} rounds" for number in rounds)
    yield f"| cosine of the two copies | {' | '.join(heads)} | exact |"
    yield f"|---|{'--:|' * (len(rounds) + 1)}"
    for likeness in tqdm((0.95, 0.85, 0.7), desc="lsh"):
        found = lsh_accuracy([*rounds, None], likeness)
        yield f"| {likeness} | {' | '.join(f'{right:.1%} ({error:.2f})' for right, error in found)} |"


def attends(name: str, lengths, num_heads: int = 2, max_sequence_length: int | None = None, **options) -> np.ndarray:
    """(H, T, T) bool: does the context of row i move with the value or the key of column j? By gradients, one layer."""
    torch.manual_seed(0)
    layout, tokens = packed(lengths), sum(lengths)
    head = ATTENTION[name](num_heads, 8, max_sequence_length or max(lengths), **options).double()
    query, key, value = (torch.randn(tokens, num_heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    return _nonzero(run_head(head, (query, key, value), layout), (key, value))


def reach(name: str, lengths, layers: int, num_heads: int = 2, **options) -> np.ndarray:
    """(T, T) bool: does the output of row i after some layers move with the input of column j? By gradients.

    A layer: projections to queries, keys and values, the head, a projection back, added to what was there.
    """
    torch.manual_seed(0)
    layout, width = packed(lengths), 8 * num_heads
    start = torch.randn(sum(lengths), 1, width, dtype=torch.float64, requires_grad=True)
    hidden = start[:, 0]
    for index in range(layers):
        head = ATTENTION[name](num_heads, 8, max(lengths), index, **options).double()
        *inputs, back = torch.randn(4, width, width, dtype=torch.float64) / width**0.5
        projected = ((hidden @ weight).unflatten(1, (num_heads, 8)) for weight in inputs)
        context = head(*projected, layout, hidden_TD=hidden)
        hidden = hidden + context.flatten(1) @ back
    return _nonzero(hidden[:, None], (start,))[0]


def _nonzero(output: Tensor, inputs: tuple[Tensor, ...]) -> np.ndarray:
    """(H, T, T) bool of an output (T, H, K) and inputs (T, H, K): whose gradient is not 0."""
    rows = []
    for i in range(len(output)):
        gradients = torch.autograd.grad(output[i].sum(), inputs, retain_graph=True, allow_unused=True)
        moves = [(gradient != 0).any(2).T for gradient in gradients if gradient is not None]
        rows.append(torch.stack(moves).any(0))
    return torch.stack(rows, 1).numpy()


REACHING = {
    "strided": ("strided", {"heads": "split"}),
    "strided, merged": ("strided", {"heads": "merged"}),
    "fixed": ("fixed", {"heads": "split"}),
    "fixed, merged": ("fixed", {"heads": "merged"}),
    "axial, mean": ("axial", {"combine": "mean"}),
    "local, window 10": ("local", {"window": 10}),
}


def show_reach() -> Iterator[str]:
    lengths = [100, 37, 64]
    yield (
        f"\nreach: pairs of tokens of one sequence, lengths {', '.join(map(str, lengths))} in one pack, stride "
        f"{round(max(lengths) ** 0.5)}, where one moves with the other; and pairs of different sequences\n"
    )
    yield "| head | 1 layer | 2 layers | least of a token, 2 layers | different sequences |"
    yield "|---|--:|--:|--:|--:|"
    same = packed(lengths).attention_mask[0, 0].numpy()
    for what, (name, options) in tqdm(REACHING.items(), desc="reach"):
        if name in ("strided", "fixed", "local"):
            options = options | {"execution": "chunks"}
        one, two = (reach(name, lengths, layers, **options) for layers in (1, 2))
        least = ((two & same).sum(1) / same.sum(1)).min()
        yield (
            f"| {what} | {one[same].mean():.1%} | {two[same].mean():.1%} | {least:.1%} "
            f"| {int(two[~same].sum())} of {int((~same).sum()):,} |"
        )


def overwriting(pairs: int, draws: int = 8) -> dict[str, np.ndarray]:
    """Write `pairs` values under as many keys, half of them again with other values, and read all keys.

    For each memory (2, 2), for keys written twice and once: the share of reads whose nearest value, by cosine, is the
    newest one; and the relative distance to it. Keys: random directions of HEAD_WIDTH dimensions. The tokens that read
    have a key that writes nothing. "plain sum" is delta's memory without its correction.
    """
    generator = torch.Generator().manual_seed(pairs)
    twice, shape = pairs // 2, (pairs, draws, HEAD_WIDTH)
    keys = unit(torch.randn(shape, generator=generator))
    old, new = torch.randn((2, *shape), generator=generator)
    new[twice:] = old[twice:]
    written_keys, written = torch.cat([keys, keys[:twice]]), torch.cat([old, new[:twice]])
    layout = packed([len(written) + pairs])
    sizes = {"num_heads": draws, "head_width": HEAD_WIDTH, "max_sequence_length": len(written) + pairs}
    nothing = torch.zeros_like(keys)

    def read(head: nn.Module, scale: float, silent: float) -> Tensor:
        """The outputs of the reading tokens, which stand at the end."""
        query = torch.cat([torch.zeros_like(written_keys), keys]) * scale
        key = torch.cat([written_keys * scale, nothing + silent])
        return head(query, key, torch.cat([written, nothing]), layout)[len(written) :]

    delta, linear = DeltaAttention(**sizes), LinearAttention(**sizes)
    with torch.no_grad():
        delta.strength_weight_HK.zero_()
        delta.strength_bias_H.fill_(30.0)  # beta = 1
        reads = {
            # in the backward direction the reading tokens come first and find nothing: half of the mean is 0
            "delta": 2 * read(delta, 1.0, 0.0),
            "plain sum": torch.einsum("phk,whk,whv->phv", keys, written_keys, written),
            "linear": read(linear, HEAD_WIDTH**0.5, -1e4),  # elu(-1e4) + 1 = 0
        }
    everything = unit(torch.cat([new, old[:twice]]))
    results = {}
    for name, found in reads.items():
        right = torch.einsum("phk,whk->phw", unit(found), everything).argmax(-1) == torch.arange(pairs)[:, None]
        halves = slice(twice), slice(twice, None)
        results[name] = np.array([(right[h].float().mean(), relative(found[h], new[h])) for h in halves])
    return results


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def show_memory() -> Iterator[str]:
    pairs = [8, 16, 32, 64, 128, 256]
    yield (
        f"\ndelta: keys of {HEAD_WIDTH} dimensions, half of them written twice: reads that point to the newest value, "
        "and in parentheses the distance to it, relative\n"
    )
    yield f"| memory | keys written | {' | '.join(f'{number} keys' for number in pairs)} |"
    yield f"|---|---|{'--:|' * len(pairs)}"
    found = [overwriting(number) for number in pairs]
    for name in found[0]:
        for half, times in enumerate(("twice", "once")):
            cells = ["{:.0%} ({:.2f})".format(*results[name][half]) for results in found]
            yield f"| {name} | {times} | {' | '.join(cells)} |"


# Pretraining


class Run:
    """A small BERT with one attention head, and its measurements."""

    def __init__(self, name: str, bert, device: str, dtype: str):
        from demo import LEARNING_RATE

        from bert_pretrain import PackedBertForPreTraining

        torch.manual_seed(0)
        bert = copy.deepcopy(bert)
        bert.packed_attention, bert.packed_attention_options = name, SCALED.get(name, {})
        self.name, self.device = name, device
        self.precision = partial(torch.autocast, device.partition(":")[0], torch.bfloat16, dtype == "bfloat16")
        self.model: Any = PackedBertForPreTraining(bert).train()
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, eps=1e-6)
        update_after_step(self.optimizer, self.model)  # routing's centroids
        self.losses: list[Any] = []  # tensors until the end, then numbers
        self.tokens_per_second: list[float] = []
        self.before = self.after = 0.0  # held-out loss
        self.peak = 0.0  # bytes of a forward and backward pass

    def why_not(self, batch: dict[str, Tensor]) -> str | None:
        """Why this head cannot be trained here; None if a copy can make a step."""
        model = self.model
        self.model = copy.deepcopy(model)
        try:
            self.pass_both_ways(batch)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            return str(error).splitlines()[0]
        finally:
            self.model = model
        return None

    def pass_both_ways(self, batch: dict[str, Tensor]) -> Tensor:
        with self.precision():
            loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def step(self, batch: dict[str, Tensor]) -> None:
        self.losses.append(self.pass_both_ways(batch))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, batches: list[dict[str, Tensor]]) -> None:
        for batch in batches:
            self.step(batch)

    def block(self, batches: list[dict[str, Tensor]]) -> None:
        seconds, _ = timed(partial(self.steps, batches), self.device)
        tokens = sum(int((batch["sequence_ids"] > 0).sum()) for batch in batches)
        self.tokens_per_second.append(tokens / seconds)

    @torch.no_grad()
    def held_out(self, batches: list[dict[str, Tensor]]) -> float:
        """MLM loss per token."""
        self.model.eval()
        with self.precision():
            sums = sum(self.model(**batch).sums for batch in batches)
        self.model.train()
        return self.model.metrics(sums)["mlm_loss_per_token"]


class Data:
    """The packs, the collator, and a model that fits them."""

    def __init__(self, dataset: str, tokenizer: str, sequences_per_step: int, device: str):
        from datasets import load_from_disk
        from demo import MAX_LENGTH, MODEL, factor
        from transformers import AutoTokenizer, BertConfig

        from collate import DataCollatorWithPacking

        made_by = AutoTokenizer.from_pretrained(tokenizer)
        self.train, self.test = (load_from_disk(dataset)[split].with_format("numpy") for split in ("train", "test"))
        self.collator, self.device = DataCollatorWithPacking(made_by, pad_to=MAX_LENGTH), device
        self.packs_per_step = max(1, round(sequences_per_step / factor(self.train)))
        size: dict[str, Any] = MODEL | {
            "intermediate_size": 4 * MODEL["hidden_size"],
            "max_position_embeddings": MAX_LENGTH,
        }
        no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = BertConfig(vocab_size=vocabulary_size(made_by), **size, **no_dropout)

    def step(self, number: int) -> dict[str, Tensor]:
        return self._batch(self.collator, self.train, number * self.packs_per_step, self.packs_per_step)

    def held_out(self) -> list[dict[str, Tensor]]:
        return [self._batch(self.collator.for_evaluation(), self.test, start, 20) for start in range(0, 100, 20)]

    def _batch(self, collate, packs, start: int, count: int) -> dict[str, Tensor]:
        made = collate([packs[i % len(packs)] for i in range(start, start + count)])
        return {name: tensor.to(self.device) for name, tensor in made.items()}


def pretrain(names, steps: int, dtype: str = "float32", **data) -> tuple[list[Run], dict[str, str], int]:
    """Train all in turn, block by block: the runs, why others were not run, and the size of the vocabulary.

    data: the arguments of Data.
    """
    source = Data(**data)
    runs = [Run(name, source.bert, source.device, dtype) for name in names]
    failed = {run.name: reason for run in runs if (reason := run.why_not(source.step(0))) is not None}
    runs = [run for run in runs if run.name not in failed]
    held_out, per_block = source.held_out(), max(1, steps // 10)
    for run in runs:
        run.before = run.held_out(held_out)
    for number, first in enumerate(tqdm(range(0, steps, per_block), desc="pretraining: blocks")):
        batches = [source.step(i) for i in range(first, min(steps, first + per_block))]
        for run in runs[number % len(runs) :] + runs[: number % len(runs)]:
            run.block(batches)
    peaks = in_own_process("pretraining", names=[run.name for run in runs], dtype=dtype, **data)
    for run in runs:
        run.losses, run.after, run.peak = torch.stack(run.losses).tolist(), run.held_out(held_out), peaks[run.name]
    return runs, failed, source.bert.vocab_size


def pretraining_memory(names, dtype: str, **data) -> dict[str, int]:
    """Bytes at the peak of a forward and backward pass."""
    source, peaks = Data(**data), {}
    for name in names:
        run, batch = Run(name, source.bert, source.device, dtype), source.step(0)
        run.step(batch)
        clear_gradients(run.model)
        peaks[name] = peak_bytes(partial(run.pass_both_ways, batch), source.device)
    return peaks


def show_pretraining(options) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        dataset, tokenizer = options.dataset, options.tokenizer
        if dataset is None:
            from demo import prepare

            prepare(Path(folder) / "demo")
            dataset, tokenizer = Path(folder) / "demo/packed", Path(folder) / "demo/prepared/tokenizer"
        data = {"dataset": str(dataset), "tokenizer": str(tokenizer), "device": options.device}
        data["sequences_per_step"] = options.sequences_per_step
        runs, failed, vocabulary = pretrain(options.attention, options.steps, options.dtype, **data)
    exact = next(run for run in runs if run.name == EXACT)
    yield (
        f"\n{options.steps} steps of about {options.sequences_per_step} sequences, vocabulary {vocabulary:,}: loss "
        f"(MLM and NSP) in the first and last tenth, held-out MLM loss per token, real tokens/s (median, 10-90 %), "
        f"times {EXACT} in the same block, MB at the peak of a forward and backward pass, "
        "with the gradients of the weights\n"
    )
    yield f"| head | loss: first | last | held out: before | after | tokens/s | times {EXACT} | MB | options |"
    yield f"|---|{'--:|' * 7}---|"
    tenth = max(1, options.steps // 10)
    for run in runs:
        # the first block warms up, if there are others
        rates, exact_rates = (np.array(r.tokens_per_second[1:] or r.tokens_per_second) for r in (run, exact))
        times = rates / exact_rates
        cells = [np.mean(run.losses[:tenth]), np.mean(run.losses[-tenth:]), run.before, run.after]
        settings = ", ".join(f"{name} {value}" for name, value in SCALED.get(run.name, {}).items())
        yield (
            f"| {run.name} | {' | '.join(f'{cell:.3f}' for cell in cells)} | {middle(rates, ',.0f')} "
            f"| {middle(times, '.2f')} | {run.peak / 1e6:,.0f} | {settings} |"
        )
    for name, reason in failed.items():
        yield f"| {name} | not run: {reason} |{' |' * 7}"


def middle(values: np.ndarray, form: str) -> str:
    low, high = np.percentile(values, [10, 90])
    return f"{np.median(values):{form}} ({low:{form}}-{high:{form}})"


MEMORY: dict[str, Callable[..., dict]] = {"cost": cost_memory, "pretraining": pretraining_memory}
"""What runs in a process of its own."""


if __name__ == "__main__":
    main()
