"""Is packed training as fast as the packing factor says? BERT pretrained in four ways, in turns, real tokens counted.

    python benchmarks/training.py                                       BERT-mini, one CPU thread
    python benchmarks/training.py --dataset demo-output/packed          lengths and tokens of packed folders
    python benchmarks/training.py --ways bucketed packed --steps-per-block 50       beside batches of similar lengths
    python benchmarks/training.py --device cuda --dtype bfloat16 --model bert-base --lengths 128 384 512

padded     rows of max_sequence_length slots, one sequence each; stock transformers' encoder with a padding mask
bucketed   the same, padded to the longest of the batch only; batches of similar lengths, as by transformers'
           group_by_length: random sequences for 50 batches, sorted, cut into batches; those of a block are evenly
           spaced among the 50, so that every block has short and long ones
unpadded   one sequence a row, but padding taken out: PackedBertForPreTraining without packing
packed     several sequences a row: PackedBertForPreTraining

All take equally many sequences per optimizer step; padded, unpadded and packed even the same ones with the same masks,
and their losses are compared before anything is timed. All project predicted positions only, and all have the same
weights, optimizer and dropout (of hidden states: FlashAttention's kernels drop no attention weights). A pass has at
most --slots token slots, so that no way needs more memory than another; a step has as many passes as it takes.

A block is a few optimizer steps of one way, on batches made beforehand; the blocks of the ways alternate, and each is
compared with the block of its round of the first way, "padded" unless --ways leaves it out. Given are medians and, in
parentheses, 10-90 %. On a CPU processor time counts, too: other programs disturb it less. "÷ factor" is 1 where packing
pays in full. The factor is that of the sequences that were padded in that round, since few sequences may be shorter or
longer than most. Batches of similar lengths hold many tokens or few, so compare them in blocks of 50 steps: one sort,
whose batches together are a random sample.
MFU: real work over the device's peak in the same type, --peak-tflops if it is not known. Real work is 6 x encoder
parameters x real tokens + 12 x layers x width x sum of squared lengths + 6 x (D^2 + D V) x predicted tokens.

Without --dataset lengths are drawn from the published Wikipedia histogram, cut off at max_sequence_length, tokens at
random, and packs are made by best fit decreasing, in a few lines of NumPy: so torch, transformers and NumPy are all
that has to be installed.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import BertConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from bert_pretrain.attention.choice import choose_attention
from bert_pretrain.model import PackedBertForPreTraining
from bert_pretrain.train.metrics import peak_flops
from collate.columns import IGNORED
from collate.device.transfer import to_device
from collate.layout import PackLayout

MODELS = {
    "bert-tiny": (2, 128),
    "bert-mini": (4, 256),
    "bert-small": (4, 512),
    "bert-base": (12, 768),
    "bert-large": (24, 1024),
}
"""Layers and width; attention heads are 64 wide."""

VOCABULARY, SYNTHETIC_SEQUENCES, MEGABATCH = 30_522, 20_000, 50
PACKS = 4_000  # read from a packed folder; their order is random
PAD, CLS, SEP, MASK, FIRST_WORD = 0, 1, 2, 3, 4  # of synthetic tokens
WAYS = ("padded", "bucketed", "unpadded", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[128, 256, 512], help="max_sequence_length of synthetic data")
    add("--dataset", type=Path, nargs="+", help="packed folders, one for each length (needs datasets)")
    add("--model", choices=MODELS, default="bert-mini")
    add("--attention", default="auto", help="of the ways without padding")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 by autocast")
    add("--sequences-per-step", type=int, help="default: 32, on CUDA 256")
    add("--slots", type=int, help="most token slots in a pass; default: 16,384, on CUDA 32,768")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="others are compared with the first of them")
    add("--seconds", type=float, default=90, help="for each length")
    add("--steps-per-block", type=int, default=2)
    add("--threads", type=int, default=1, help="of the CPU")
    add("--peak-tflops", type=float, help="of the device, in --dtype")
    options = parser.parse_args()
    options.ways = [way for way in WAYS if way in options.ways]
    on_cuda = options.device.startswith("cuda")
    options.sequences_per_step = options.sequences_per_step or (256 if on_cuda else 32)
    options.slots = options.slots or (32_768 if on_cuda else 16_384)
    torch.set_num_threads(options.threads)
    if options.attention == "auto":
        options.attention, _ = choose_attention(torch.device(options.device), getattr(torch, options.dtype), 64)

    print(machine(options), flush=True)
    sources = options.dataset or options.lengths
    for source in sources:
        corpus = read_corpus(source) if options.dataset else synthetic_corpus(source)
        print(f"\n{compare(corpus, options)}", flush=True)


# What is trained on


@dataclass(frozen=True, eq=False)
class Corpus:
    """Sequences with their masks drawn, and which of them share a pack."""

    max_sequence_length: int
    vocabulary: int
    input_ids: list[np.ndarray]
    labels: list[np.ndarray]
    token_types: list[np.ndarray]
    next_sentence: np.ndarray
    packs: list[np.ndarray]
    """Sequence indices of each pack."""

    @property
    def factor(self) -> float:
        return len(self.input_ids) / len(self.packs)

    @property
    def packing_efficiency(self) -> float:
        return sum(map(len, self.input_ids)) / len(self.packs) / self.max_sequence_length


def synthetic_corpus(max_length: int, sequences: int = SYNTHETIC_SEQUENCES) -> Corpus:
    """Random tokens, as long as Wikipedia's pairs are."""
    rng = np.random.default_rng(0)
    lengths = wikipedia_lengths(sequences, max_length, rng)
    tokens = [np.concatenate([[CLS], rng.integers(FIRST_WORD, VOCABULARY, n - 2), [SEP]]) for n in lengths]
    types = [(np.arange(n) >= n // 2).astype(np.int64) for n in lengths]
    packs = best_fit_decreasing(lengths, max_length)
    packs = [packs[i] for i in rng.permutation(len(packs))]
    ids, labels = map(list, zip(*(mask(row, row >= FIRST_WORD, rng, MASK) for row in tokens), strict=True))
    nsp = rng.integers(0, 2, sequences)
    return Corpus(max_length, VOCABULARY, ids, labels, types, nsp, packs)


def wikipedia_lengths(sequences: int, max_length: int, rng: np.random.Generator) -> np.ndarray:
    """Drawn from the published histogram of pairs of at most 512 tokens, and cut off."""
    csv = Path(__file__).resolve().parents[1] / "packing/data/wikipedia_bert_512.csv"
    values, counts = np.loadtxt(csv, delimiter=",", skiprows=1, dtype=np.int64).T
    return np.minimum(rng.choice(values, sequences, p=counts / counts.sum()), max_length)


def best_fit_decreasing(lengths: np.ndarray, slots: int) -> list[np.ndarray]:
    """Longest first, each into the fullest pack that has room: 5 3 3 2 in packs of 8 -> [5 3] [3 2]."""
    open_packs: list[list[list[int]]] = [[] for _ in range(slots + 1)]  # by the room that is left
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        room = next((room for room in range(length, slots + 1) if open_packs[room]), None)
        pack = open_packs[room].pop() if room is not None else []
        pack.append(int(index))
        open_packs[(slots if room is None else room) - length].append(pack)
    return [np.array(pack) for packs in open_packs for pack in packs]


def read_corpus(folder: Path) -> Corpus:
    """The training split of a packed folder, its sequences and its packs."""
    from datasets import Dataset, load_from_disk

    from packing import packed_info

    packed = load_from_disk(folder)
    packed = packed if isinstance(packed, Dataset) else packed["train"]
    info = packed_info(packed)
    packed = packed.select(range(min(len(packed), PACKS))).with_format("numpy")
    rng = np.random.default_rng(0)
    tokens, types, nsp, packs = [], [], [], []
    for row in packed:
        bounds = np.cumsum(row["sequence_lengths"])[:-1]
        packs.append(np.arange(len(bounds) + 1) + len(tokens))
        tokens += np.split(row["input_ids"].astype(np.int64), bounds)
        types += np.split(row["token_type_ids"].astype(np.int64), bounds)
        nsp += row["next_sentence_label"].tolist()
    vocabulary = int(max(row.max() for row in tokens)) + 1
    special = {int(row[0]) for row in tokens[:100]} | {int(row[-1]) for row in tokens[:100]}
    masked = (mask(row, ~np.isin(row, list(special)), rng, int(tokens[0][1])) for row in tokens)
    ids, labels = map(list, zip(*masked, strict=True))
    return Corpus(info.max_sequence_length, vocabulary, ids, labels, types, np.array(nsp), packs)


def mask(tokens: np.ndarray, ordinary: np.ndarray, rng, mask_token: int) -> tuple[np.ndarray, np.ndarray]:
    """15 % of the tokens masked, none of them special: what the encoder reads, and the labels."""
    where = np.flatnonzero(ordinary)
    chosen = rng.permutation(where)[: max(1, round(0.15 * len(tokens)))]
    masked, labels = tokens.copy(), np.full(len(tokens), IGNORED)
    labels[chosen] = tokens[chosen]
    masked[chosen] = mask_token
    return masked, labels


# The four ways


@dataclass(eq=False)
class Way:
    """One way to train: its model, the rows of its next step, and its measurements."""

    name: str
    model: PackedBertForPreTraining
    rows: Iterator[list[np.ndarray]]
    optimizer: torch.optim.Optimizer
    wall: list[float] = field(default_factory=list)
    """Real tokens per second, block by block."""
    processor: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    efficiency: list[float] = field(default_factory=list)


class PaddedBert(PackedBertForPreTraining):
    """The same weights and losses; the encoder runs on padded rows, as stock transformers runs it."""

    def _encode(self, layout: PackLayout, input_ids, position_ids=None, token_type_ids=None) -> tuple[Tensor, dict]:
        mask = layout.is_real_BL.long()
        hidden_BLD = self.bert(input_ids, attention_mask=mask, token_type_ids=token_type_ids).last_hidden_state
        return layout.unpad(hidden_BLD), {}


def make_way(name: str, corpus: Corpus, options) -> Way:
    layers, width = MODELS[options.model]
    bert = BertConfig(
        vocab_size=corpus.vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=corpus.max_sequence_length,
        attention_probs_dropout_prob=0.0,
    )
    stock = name in ("padded", "bucketed")
    bert.packed_attention = "sdpa" if stock else options.attention
    torch.manual_seed(0)
    model = (PaddedBert if stock else PackedBertForPreTraining)(bert).to(options.device).train()
    if stock:
        model.set_attn_implementation("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return Way(name, model, rows_of(name, corpus, options.sequences_per_step, options.steps_per_block), optimizer)


def rows_of(name: str, corpus: Corpus, sequences_per_step: int, steps_per_block: int) -> Iterator[list[np.ndarray]]:
    """The rows of each optimizer step, endlessly; a row is a list of its sequences."""
    rng = np.random.default_rng(1)
    while name == "bucketed":
        lengths = np.array([len(row) for row in corpus.input_ids])
        order = rng.permutation(len(lengths))
        megabatch = MEGABATCH * sequences_per_step
        for start in range(0, max(1, len(order) - megabatch + 1), megabatch):
            some = order[start : start + megabatch]
            some = some[np.argsort(-lengths[some], kind="stable")]
            batches = np.split(some, range(sequences_per_step, len(some), sequences_per_step))
            stride = max(1, MEGABATCH // steps_per_block)
            for i in (i for first in rng.permutation(stride) for i in range(first, len(batches), stride)):
                yield [batches[i][j : j + 1] for j in range(len(batches[i]))]
    packs_per_step = max(1, round(sequences_per_step / corpus.factor))
    while True:
        order = rng.permutation(len(corpus.packs))
        for start in range(0, len(order) - packs_per_step + 1, packs_per_step):
            packs = [corpus.packs[i] for i in order[start : start + packs_per_step]]
            yield packs if name == "packed" else [pack[i : i + 1] for pack in packs for i in range(len(pack))]


def passes_of(
    rows: list[np.ndarray], corpus: Corpus, width: int | None, slots: int, multiple: int = 1
) -> list[dict[str, Tensor]]:
    """The batches of one step, each of at most so many slots; width None: its longest row, rounded up to a multiple."""
    sizes = [sum(len(corpus.input_ids[i]) for i in row) for row in rows]
    most = max(1, slots // (width or max(sizes)))
    passes = -(-len(rows) // most)
    bounds = np.linspace(0, len(rows), passes + 1).round().astype(int)
    parts = [slice(start, end) for start, end in pairwise(bounds)]
    return [collate(rows[part], corpus, width or -(-max(sizes[part]) // multiple) * multiple) for part in parts]


def collate(rows: list[np.ndarray], corpus: Corpus, width: int, depth: int | None = None) -> dict[str, Tensor]:
    """What DataCollatorWithPacking makes of the rows: see there. depth: sequence slots; None: the most in a row."""
    depth = depth or max(map(len, rows))
    batch = {name: np.zeros((len(rows), width), np.int64) for name in ("input_ids", "position_ids", "token_type_ids")}
    batch["sequence_ids"] = np.zeros((len(rows), width), np.int32)
    batch["labels"] = np.full((len(rows), width), IGNORED)
    batch["cls_positions"] = np.full((len(rows), depth), -1)
    batch["next_sentence_label"] = np.full((len(rows), depth), IGNORED)
    for r, row in enumerate(rows):
        start = 0
        for s, i in enumerate(row):
            here = slice(start, start + len(corpus.input_ids[i]))
            batch["input_ids"][r, here], batch["labels"][r, here] = corpus.input_ids[i], corpus.labels[i]
            batch["position_ids"][r, here] = np.arange(here.stop - here.start)
            batch["token_type_ids"][r, here] = corpus.token_types[i]
            batch["sequence_ids"][r, here] = s + 1
            batch["cls_positions"][r, s], batch["next_sentence_label"][r, s] = start, corpus.next_sentence[i]
            start = here.stop
    return {name: torch.from_numpy(array) for name, array in batch.items()}


# Measuring


def compare(corpus: Corpus, options) -> str:
    """Check that the ways agree, train them in turns, and tabulate."""
    ways = [make_way(name, corpus, options) for name in options.ways]
    check_losses([way for way in ways if way.name != "bucketed"], corpus, options)
    for way in ways:  # warm up: memory, caches, compiled kernels
        run_block(make_way(way.name, corpus, options), corpus, options, 2)
    start, round_ = time.perf_counter(), 0
    while round_ < 3 or time.perf_counter() - start < options.seconds:
        turn = round_ % len(ways)
        for way in ways[turn:] + ways[:turn]:
            run_block(way, corpus, options, options.steps_per_block)
        round_ += 1
    return table(ways, corpus, options)


def steps_of(way: Way, corpus: Corpus, options, num_steps: int) -> list[list[dict[str, Tensor]]]:
    width = None if way.name == "bucketed" else corpus.max_sequence_length
    multiple = 8 if options.device.startswith("cuda") else 1  # tensor cores like it
    return [passes_of(next(way.rows), corpus, width, options.slots, multiple) for _ in range(num_steps)]


def run_block(way: Way, corpus: Corpus, options, num_steps: int) -> None:
    steps = steps_of(way, corpus, options, num_steps)
    synchronize(options)
    wall, processor = time.perf_counter(), time.process_time()
    for passes in steps:
        denominators = torch.stack([counts(batch) for batch in passes]).sum(0).to(options.device)
        for batch in passes:
            loss_of(way, batch, denominators, options).backward()
        way.optimizer.step()
        way.optimizer.zero_grad()
    synchronize(options)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    batches = [batch for passes in steps for batch in passes]
    tokens = sum(int((batch["sequence_ids"] > 0).sum()) for batch in batches)
    way.wall.append(tokens / wall)
    way.processor.append(tokens / processor)
    way.flops.append(sum(real_flops(way.model.config, batch) for batch in batches) / wall)
    way.efficiency.append(tokens / sum(batch["sequence_ids"].numel() for batch in batches))


def loss_of(way: Way, batch: dict[str, Tensor], denominators: Tensor, options) -> Tensor:
    batch = to_device(batch, options.device)
    with torch.autocast(options.device.split(":")[0], getattr(torch, options.dtype), options.dtype != "float32"):
        return way.model(**batch, denominators=denominators).loss


def check_losses(ways: list[Way], corpus: Corpus, options) -> None:
    """Check that without dropout the same sequences have the same loss in every way: all must do the same work."""
    losses = {}
    for way in ways:
        rows = rows_of(way.name, corpus, options.sequences_per_step, options.steps_per_block)
        first = copy.copy(way)
        first.rows = rows
        (passes,) = steps_of(first, corpus, options, 1)
        way.model.eval()
        with torch.no_grad():
            denominators = torch.stack([counts(batch) for batch in passes]).sum(0).to(options.device)
            losses[way.name] = sum(float(loss_of(way, batch, denominators, options)) for batch in passes)
        way.model.train()
    low, high = min(losses.values()), max(losses.values())
    if high - low > (1e-4 if options.dtype == "float32" else 2e-2) * high:
        sys.exit(f"the same sequences have different losses: {losses}; one of the ways computes something else")


def counts(batch: dict[str, Tensor]) -> Tensor:
    """(3,) predicted tokens, sequences, sequences with a next-sentence label; all sequences have both here."""
    sequences = (batch["cls_positions"] >= 0).sum()
    return torch.stack([(batch["labels"] != IGNORED).sum(), sequences, sequences])


def real_flops(config: BertConfig, batch: dict[str, Tensor]) -> float:
    """Floating-point operations of the batch's real tokens, forward and backward."""
    width, layers = config.hidden_size, config.num_hidden_layers
    layout = PackLayout(batch["sequence_ids"])
    parameters = layers * (4 * width**2 + 2 * width * config.intermediate_size)
    attention = 12 * layers * width * float((layout.lengths.double() ** 2).sum())
    predicted = int((batch["labels"] != IGNORED).sum())
    return 6 * parameters * layout.num_tokens + attention + 6 * (width**2 + width * config.vocab_size) * predicted


def synchronize(options) -> None:
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


def table(ways: list[Way], corpus: Corpus, options) -> str:
    layers, width = MODELS[options.model]
    head = (
        f"{options.model}: {layers} layers of {width}; max_sequence_length {corpus.max_sequence_length}, "
        f"packing factor {corpus.factor:.3f}, {options.sequences_per_step} sequences per step, "
        f"{len(ways[0].wall)} blocks of {options.steps_per_block} steps"
    )
    on_cuda, base = options.device.startswith("cuda"), ways[0]
    timed = ("wall",) if on_cuda else ("wall", "processor")
    is_padded = base.name == "padded"
    factors = corpus.packing_efficiency / np.array(base.efficiency)  # of the sequences of each round
    columns = ["", "efficiency", "real tokens/s"]
    for clock in timed:
        columns += [f"x {base.name}, {clock}"] + ["÷ factor"] * is_padded
    lines = [columns + ["MFU"] * on_cuda]
    for way in ways:
        rates = np.array(way.wall)
        line = [way.name, f"{np.mean(way.efficiency):.3f}", f"{np.median(rates):,.0f} {spread(rates, ',.0f')}"]
        for clock in timed:
            ratio = np.array(getattr(way, clock)) / getattr(base, clock)
            line += [f"{np.median(ratio):.3f} {spread(ratio, '.3f')}"]
            line += [f"{np.median(ratio / factors):.2f}"] * is_padded
        if on_cuda:
            peak = options.peak_tflops or known_peak(options)
            line += [f"{np.median(way.flops) / peak / 1e12:.3f}" if peak else "no peak"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([head, "", *rows])


def spread(values: np.ndarray, form: str) -> str:
    low, high = np.percentile(values, [10, 90])
    return f"({low:{form}}-{high:{form}})"


def known_peak(options) -> float | None:
    """TFLOP/s of the device in 16 bits, where it is known."""
    peak = None if options.dtype == "float32" else peak_flops(torch.cuda.get_device_name(options.device))
    return None if peak is None else peak / 1e12


def machine(options) -> str:
    if options.device.startswith("cuda"):
        device = torch.cuda.get_device_name(options.device)
    else:
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        device = f"{names[0].partition(': ')[2] if names else platform.machine()}, {options.threads} threads"
    return (
        f"{date.today()}, {device}, {options.dtype}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, numpy {np.__version__}, attention {options.attention}"
    )


if __name__ == "__main__":
    main()
