"""What benchmarks/gpu.py trains: sequences from a file, passes of one shape, and ways that take turns."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
from torch import Tensor
from training import Corpus, known_peak, make_way, real_flops, synchronize

from bert_pretrain.model import PackedBertForPreTraining
from collate.device.transfer import to_device

SEQUENCES, PASSES = 2_600, 8
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


# The batches


def prepared(path: Path, length: int) -> Corpus:
    """Sequences and packs from a file, or drawn, and written to it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save(training.synthetic_corpus(length, SEQUENCES if length > 64 else 300), path)
    corpus = load(path)
    if corpus.max_sequence_length != length:
        sys.exit(f"{path} has sequences of {corpus.max_sequence_length} tokens, not {length}; name another --batches")
    return corpus


def save(corpus: Corpus, path: Path) -> None:
    """All sequences one after another; of packs, the sequences and where each ends."""
    flat = {name: np.concatenate(getattr(corpus, name)) for name in ("input_ids", "labels", "token_types", "packs")}
    smallest: dict[str, Any] = {
        name: values.astype(np.min_scalar_type(-int(np.abs(values).max()))) for name, values in flat.items()
    }
    np.savez_compressed(
        path,
        sizes=np.array([corpus.max_sequence_length, corpus.vocabulary]),
        lengths=np.array([len(row) for row in corpus.input_ids]),
        next_sentence=corpus.next_sentence,
        depths=np.array([len(pack) for pack in corpus.packs]),
        **smallest,
    )


def load(path: Path) -> Corpus:
    with np.load(path) as saved:
        arrays = {name: saved[name].astype(np.int64) for name in saved.files}
    (length, vocabulary), ends = arrays["sizes"].tolist(), arrays["lengths"].cumsum()[:-1]
    ids, labels, types = (np.split(arrays[name], ends) for name in ("input_ids", "labels", "token_types"))
    packs = np.split(arrays["packs"], arrays["depths"].cumsum()[:-1])
    return Corpus(length, vocabulary, ids, labels, types, arrays["next_sentence"], packs)


def passes_of(way: str, corpus: Corpus, slots: int) -> list[dict[str, Tensor]]:
    """The first passes of one way, on the host, all of the same shape where the way has one."""
    length = corpus.max_sequence_length
    sequences = [np.array([i]) for i in np.concatenate(corpus.packs)]
    if way == "bucketed":
        parts = [list(part) for part in buckets(sequences, corpus, slots)]
        parts = [parts[i] for i in np.random.default_rng(0).permutation(len(parts))]
        widths = [-(-max(len(corpus.input_ids[i]) for (i,) in part) // 8) * 8 for part in parts]
    else:
        rows = corpus.packs if way == "packed" else sequences
        a_pass = slots / length * (corpus.factor if way == "unpadded" else 1)
        count = min(max(1, round(a_pass)), len(rows))
        parts = [rows[i : i + count] for i in range(0, len(rows) - count + 1, count)]
        widths = [length] * len(parts)
    deepest = max(map(len, corpus.packs)) if way == "packed" else 1
    chosen = list(zip(parts, widths, strict=True))[:PASSES]
    return [training.collate(part, corpus, width, deepest) for part, width in chosen]


def buckets(sequences: list[np.ndarray], corpus: Corpus, slots: int) -> Iterator[list[np.ndarray]]:
    """Longest first, as many as have room padded to the longest of them; all sequences in a few passes."""
    ordered = sorted(sequences, key=lambda row: -len(corpus.input_ids[row[0]]))
    while ordered:
        count = max(1, slots // len(corpus.input_ids[ordered[0][0]]))
        yield ordered[:count]
        ordered = ordered[count:]


# Training in turns


@dataclass(eq=False)
class Contender:
    """One way to train, its passes, and what was measured."""

    name: str
    model: PackedBertForPreTraining
    passes: list[dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    about: dict[str, Any]
    turn: int = 0
    rates: list[float] = field(default_factory=list)
    """Real tokens per second, round by round; so are all lists here."""
    flops: list[float] = field(default_factory=list)
    efficiency: list[float] = field(default_factory=list)

    def forget(self) -> None:
        """Measure anew."""
        self.rates, self.flops, self.efficiency = [], [], []

    def next_pass(self) -> dict[str, Tensor]:
        self.turn += 1
        batch = self.passes[(self.turn - 1) % len(self.passes)]
        return batch | {"sequence_ids": batch["sequence_ids"].clone()}  # its layout must be made anew, as in training

    def step(self, batch: dict[str, Tensor], options) -> None:
        with autocast(options):
            loss = self.model(**to_device(batch, options.device)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def autocast(options) -> Any:
    if options.dtype == "float32":
        return nullcontext()
    return torch.autocast(options.device.split(":")[0], getattr(torch, options.dtype))


def named(way: str, is_compiled: bool) -> str:
    return f"{way}, compiled" if is_compiled else way


def contender(
    way: str, corpus: Corpus, options, model: str, attention: str = "", slots: int = 0, is_compiled: bool = False
) -> Contender:
    """A way that is ready to be timed, warm, with what a pass needs."""
    slots = slots or options.slots
    chosen = argparse.Namespace(**vars(options) | {"model": model, "attention": attention or options.attention})
    made = make_way(way, corpus, chosen)
    if is_compiled:
        made.model.compile(**how_to_compile(options))
    about: dict[str, Any] = {"row": named(way, is_compiled), "model": model, "slots": slots}
    about["attention"] = "sdpa, padding mask" if way in ("padded", "bucketed") else chosen.attention
    ready = Contender(about["row"], made.model, passes_of(way, corpus, slots), made.optimizer, about)
    start = time.perf_counter()
    for _ in range(len(ready.passes) if is_compiled else 2):  # so that nothing is left to compile
        ready.step(ready.next_pass(), options)
    synchronize(options)
    ready.about["first_passes_s"] = round(time.perf_counter() - start, 2)
    ready.about |= seen_in(lambda: ready.step(ready.next_pass(), options), options)
    return ready


def in_turns(ways: list[tuple[str, dict[str, Any]]], corpus: Corpus, options, passes: int = 2) -> Iterator[dict]:
    """Time the ways round by round until the part's end; rows after 1, 2, 4, 8… rounds and at the end.

    Each has a row of its own already when it is ready: the next one may take long to compile.
    """
    ready: list[Contender] = []
    for way, settings in ways:
        try:
            ready.append(contender(way, corpus, options, **settings))
        except Exception as error:
            yield {"row": named(way, settings.get("is_compiled", False)), **settings, "error": one_line(error)}
        else:
            time_round(ready[-1], passes, options)
            yield row_of(ready[-1], ready[-1:], options)
            ready[-1].forget()
    rounds, shown = 0, 0
    while ready and (rounds == 0 or time.perf_counter() < options.ends):
        for next_one in ready[rounds % len(ready) :] + ready[: rounds % len(ready)]:
            time_round(next_one, passes, options)
        rounds += 1
        if rounds & (rounds - 1) == 0:
            yield from (row_of(one, ready, options) for one in ready)
            shown = rounds
    if rounds != shown:
        yield from (row_of(one, ready, options) for one in ready)


def time_round(way: Contender, passes: int, options) -> None:
    batches = [way.next_pass() for _ in range(passes)]
    synchronize(options)
    clock = time.perf_counter if options.on_cuda else time.process_time
    start = clock()
    for batch in batches:
        way.step(batch, options)
    synchronize(options)
    seconds = clock() - start
    tokens = sum(int((batch["sequence_ids"] > 0).sum()) for batch in batches)
    way.rates.append(tokens / seconds)
    way.flops.append(sum(real_flops(way.model.config, batch) for batch in batches) / seconds)
    way.efficiency.append(tokens / sum(batch["sequence_ids"].numel() for batch in batches))


def row_of(way: Contender, everyone: list[Contender], options) -> dict[str, Any]:
    """What all rounds so far say, compared round by round: with the padded way, if any, and with itself eager."""
    row = way.about | {"rounds": len(way.rates), "tokens_per_second": round(float(np.median(way.rates)))}
    row |= {f"percentile_{p}": round(float(np.percentile(way.rates, p))) for p in (10, 90)}
    rates = np.array(way.rates)
    for padded in (other for other in everyone if other.name.startswith("padded")):
        times = np.median(rates / padded.rates)
        row["times_padded"] = rounded(times)
        row["by_factor"] = rounded(times / (np.mean(way.efficiency) / np.mean(padded.efficiency)))
    for eager in everyone:
        if way.name == named(eager.name, True):
            low, middle, high = np.percentile(rates / eager.rates, [10, 50, 90])
            row["times_eager"] = f"{middle:.3f} ({low:.3f}-{high:.3f})"
    peak = known_peak(options) if options.on_cuda else None
    row["mfu"] = rounded(np.median(way.flops) / peak / 1e12) if peak else None
    return row


def how_to_compile(options) -> dict[str, Any]:
    """A trial leaves out the compiler of kernels, which takes minutes on a CPU."""
    return {"backend": "eager"} if options.quick else {"mode": options.compile_mode}


def seen_in(step: Callable[[], None], options) -> dict[str, Any]:
    """Memory, waits and launches of one step; None on a CPU, which has none of them."""
    if not options.on_cuda:
        return {"pass_gib": None, "waits": None, "launches": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    peak = torch.cuda.max_memory_allocated() - before
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in said)
    launches = sum(event.count for event in profile.key_averages() if event.key in LAUNCHES)
    return {"pass_gib": rounded(peak / 2**30), "waits": waits, "launches": launches}


def rounded(value) -> float:
    """To four digits."""
    return float(f"{float(value):.4g}")


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
