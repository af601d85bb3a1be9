"""What does a packed batch cost in time and bytes, beside padded, flattened and dense-mask collation?

    python benchmarks/collator.py               all of it, in one to two minutes on an idle machine
    python benchmarks/collator.py --rounds 10   best of more, where other programs run

Sequences of random tokens, their lengths drawn from the paper's Wikipedia histogram, lie on disk: once as they are,
once packed into rows of 512. Each batch is 32 packs at random. The stock collators get the same sequences, each in a
row of its own, so all collate the same real tokens. The time is that of DataLoader's work: fetching rows from the
datasets.Dataset, and collating them.

batches  ours from Arrow tables, as PackedTrainer fetches them, and from lists, as Trainer does by default; with what it
         emits: `sequence_ids`, boundaries for flash attention, or a dense mask, boolean or additive. Beside it
         DataCollatorForLanguageModeling, which pads, without and with a stored special_tokens_mask (as run_mlm.py
         stores it), and DataCollatorWithFlattening, which masks nothing. They take turns, round by round.
         fetch, collate, 0 workers: the least time of each batch over the rounds, averaged over the batches; in
         parentheses the averages of the fastest and of the slowest round.
         1, 2 workers: all batches from a DataLoader with persistent workers, read by a loop that does nothing else, in
         the fastest round. cpu: processor time of all processes together, the least round.
         KB: all tensors of the first batch.
masking  the masking rule alone, with its keys, on the tokens of one batch, beside a copy of as many bytes as it
         returns: the least time, and 10-90 %.

One thread per process, as DataLoader's workers have.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from packers import machine
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import BertTokenizer, DataCollatorForLanguageModeling, DataCollatorWithFlattening

from collate import DataCollatorWithPacking
from collate.mask_rows import sequence_keys
from collate.masking import MASKING
from collate.training.order import ArrowRows
from packing import pack_dataset, packed_info, published_histogram

VOCABULARY = 30_000
WORKERS = (0, 1, 2)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
CPUCLOCK_SCHED = 2
"""Linux: the clock (~pid << 3) | 2 is the processor time of another process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=("batches", "masking"), default=["batches", "masking"])
    add("--packs", type=int, default=32, help="packs per batch")
    add("--length", type=int, default=512, help="token slots per pack")
    add("--sequences", type=int, default=20_000, help="how many sequences are packed")
    add("--batches", type=int, default=10, help="batches per round")
    add("--rounds", type=int, default=4, help="the least time of so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="This process .* is multi-threaded, use of fork")
    print(f"{machine()}, torch {torch.__version__}, transformers {metadata.version('transformers')}\n")
    with tempfile.TemporaryDirectory() as folder:
        data = Data.make(Path(folder), options)
        print(data, flush=True)
        for part in options.parts:
            print(flush=True)
            for line in (show_batches if part == "batches" else show_masking)(data, options):
                print(line, flush=True)


# Data.


@dataclass(frozen=True, eq=False)
class Data:
    """Sequences on disk, unpacked and packed; `packs` and `sequences` name the rows of each batch in either."""

    tokenizer: BertTokenizer
    source: datasets.Dataset
    packed: datasets.Dataset
    packs: list[list[int]]
    sequences: list[list[int]]

    @classmethod
    def make(cls, folder: Path, options) -> Data:
        draw = np.random.default_rng(0)
        histogram = published_histogram("wikipedia")[: options.length + 1]
        lengths = draw.choice(len(histogram), options.sequences, p=histogram / histogram.sum())
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        tokens = draw.integers(len(SPECIAL), VOCABULARY, offsets[-1], dtype=np.int32)
        tokens[offsets[:-1]], tokens[offsets[1:] - 1] = CLS, SEP
        columns = {"input_ids": tokens, "special_tokens_mask": (tokens < len(SPECIAL)).astype(np.int8)}
        table = pa.table({name: pa.ListArray.from_arrays(offsets, pa.array(x)) for name, x in columns.items()})
        datasets.Dataset(table).save_to_disk(folder / "source")
        source = datasets.load_from_disk(folder / "source")
        pack_dataset(source.select_columns("input_ids"), options.length, output=folder / "packed")
        packed = datasets.load_from_disk(folder / "packed")
        order = draw.permutation(len(packed))[: options.batches * options.packs].reshape(-1, options.packs).tolist()
        sequences = [list(chain.from_iterable(packed[packs]["sequence_indices"])) for packs in order]
        return cls(make_tokenizer(), source, packed, order, sequences)

    def __str__(self) -> str:
        info, batches = packed_info(self.packed), len(self.packs)
        return (
            f"{info.num_sequences:,} sequences of {info.num_tokens:,} tokens in {len(self.packed):,} packs of "
            f"{info.max_sequence_length}; {batches} batches of {len(self.packs[0])} packs, on average "
            f"{sum(map(len, self.sequences)) / batches:,.1f} sequences"
        )


def make_tokenizer() -> BertTokenizer:
    """A vocabulary of which every fourth token continues a word."""
    from tokenizers import Tokenizer, models

    words = [f"w{i}" if i % 4 else f"##w{i}" for i in range(len(SPECIAL), VOCABULARY)]
    model = models.WordPiece({token: i for i, token in enumerate([*SPECIAL, *words])}, unk_token="[UNK]")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special: dict[str, Any] = dict(zip(names, SPECIAL, strict=True))
    return BertTokenizer(tokenizer_object=Tokenizer(model), **special)


# Batches.


@dataclass(frozen=True, eq=False)
class Contender:
    """One way from rows on disk to a batch."""

    name: str
    rows: str
    masks: bool
    dataset: Any
    indices: list[list[int]]
    collate: Callable[[list], dict]


def contenders(data: Data) -> Iterator[Contender]:
    def packs(name: str, **options) -> Contender:
        collator = DataCollatorWithPacking(data.tokenizer, **options).for_dataset(data.packed)
        masks = collator.masking_rule is not None
        return Contender(f"**ours**, {name}", "Arrow", masks, ArrowRows(data.packed), data.packs, collator)

    yield packs("`sequence_ids`")
    lists = DataCollatorWithPacking(data.tokenizer).for_dataset(data.packed)
    yield Contender("**ours**, `sequence_ids`", "lists", True, data.packed, data.packs, lists)
    yield packs("`flash`", emit="flash")
    yield packs("`flash`", emit="flash", mlm_probability=None)
    yield packs("dense mask, bool", emit="attention_mask")
    yield packs("dense mask, additive", emit="attention_bias")
    plain, stored = data.source.select_columns("input_ids"), data.source
    mlm = DataCollatorForLanguageModeling(data.tokenizer)
    yield Contender("LanguageModeling, padded", "lists", True, plain, data.sequences, mlm)
    yield Contender("the same, special_tokens_mask", "lists", True, stored, data.sequences, mlm)
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    yield Contender("WithFlattening", "lists", False, plain, data.sequences, flat)


class Timed(Dataset):
    """A contender's dataset and its collator, and the seconds that each of them took for each batch."""

    def __init__(self, contender: Contender):
        self.contender, self.fetch, self.collate = contender, [], []

    def __len__(self) -> int:
        return len(self.contender.dataset)

    def __getitems__(self, indices: list[int]):
        start = time.perf_counter()
        rows = self.contender.dataset.__getitems__(indices)
        self.fetch.append(time.perf_counter() - start)
        return rows

    def __call__(self, rows) -> dict:
        start = time.perf_counter()
        batch = self.contender.collate(rows)
        self.collate.append(time.perf_counter() - start)
        return batch


def show_batches(data: Data, options) -> Iterator[str]:
    everyone = list(contenders(data))
    timed = [Timed(contender) for contender in everyone]
    passes = {}  # (contender, workers) -> (rounds, 2) wall and processor seconds per batch
    with contextlib.ExitStack() as stack:
        loaders = {
            (i, workers): stack.enter_context(loader(timed[i] if workers == 0 else everyone[i], everyone[i], workers))
            for workers in WORKERS
            for i in range(len(everyone))
        }
        for _ in tqdm(range(1 + options.rounds), desc="rounds"):  # the first one compiles and starts workers
            for case, batches in loaders.items():
                passes.setdefault(case, []).append(one_pass(batches))
    heads = ["fetch", "collate", "0 workers", "cpu", "1 worker", "cpu", "2 workers", "cpu"]
    yield f"| ms per batch, from | rows | masks | {' | '.join(heads)} | KB | largest tensor |"
    yield f"|---|---|---|{'--:|' * (len(heads) + 1)}---|"
    best = {}
    for i, (contender, times) in enumerate(zip(everyone, timed, strict=True)):
        rounds = np.array([times.fetch, times.collate]).reshape(2, 1 + options.rounds, -1)[:, 1:]
        fetch, collate = rounds.min(1).mean(1)
        whole = rounds.sum(0).mean(1)
        best[i] = fetch + collate
        cells = [f"{fetch * 1e3:.2f}", f"{collate * 1e3:.2f}"]
        for workers in WORKERS:
            wall, cpu = np.array(passes[i, workers])[1:].min(0) * 1e3
            spread = f"{best[i] * 1e3:.2f} ({whole.min() * 1e3:.2f}-{whole.max() * 1e3:.2f})"
            cells += [spread if workers == 0 else f"{wall:.2f}", f"{cpu:.2f}"]
        tensors = tensors_of(contender)
        largest = max(tensors, key=lambda name: tensors[name].nbytes)
        shape = " × ".join(map(str, tensors[largest].shape))
        kilobytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e3
        masks = "yes" if contender.masks else "no"
        yield (
            f"| {contender.name} | {contender.rows} | {masks} | {' | '.join(cells)} | {kilobytes:,.1f} "
            f"| {largest}, {shape} |"
        )
    yield ""
    yield from verdict(tensors_of(everyone[0]), options.length)
    stock = min(best[i] for i, c in enumerate(everyone) if isinstance(c.collate, DataCollatorForLanguageModeling))
    for i in (0, 1):
        ratio = f"{best[i] / stock:.3f} of the padded collator's"
        yield f"fetch and collate, {everyone[i].name} from {everyone[i].rows}: {ratio}, at equal real tokens"


@contextlib.contextmanager
def loader(dataset, contender: Contender, workers: int) -> Iterator[DataLoader]:
    """A DataLoader over the contender's batches; its workers end with it."""
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    if isinstance(dataset, Timed):
        yield DataLoader(dataset, batch_sampler=contender.indices, collate_fn=dataset, **options)
        return
    batches = DataLoader(dataset.dataset, batch_sampler=contender.indices, collate_fn=contender.collate, **options)
    try:
        yield batches
    finally:
        if batches._iterator is not None:
            batches._iterator._shutdown_workers()  # type: ignore[attr-defined]


def one_pass(batches: DataLoader) -> tuple[float, float]:
    """Wall and processor seconds per batch."""
    cpu, wall = processor_seconds(batches), time.perf_counter()
    for _ in batches:
        pass
    wall = time.perf_counter() - wall
    return wall / len(batches), (processor_seconds(batches) - cpu) / len(batches)


def processor_seconds(batches: DataLoader) -> float:
    """Processor seconds of this process and of the loader's workers."""
    workers = getattr(batches._iterator, "_workers", [])
    return time.process_time() + sum(time.clock_gettime((~worker.pid << 3) | CPUCLOCK_SCHED) for worker in workers)


def tensors_of(contender: Contender) -> dict[str, torch.Tensor]:
    batch = contender.collate(contender.dataset.__getitems__(contender.indices[0]))
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def verdict(tensors: dict[str, torch.Tensor], length: int) -> Iterator[str]:
    """What isolation adds to a default batch, next to a padded batch of the same shape."""
    yield "a default batch: " + ", ".join(f"{name} {tensor.nbytes:,} bytes" for name, tensor in tensors.items())
    padded = 3 * tensors["input_ids"].nbytes  # input_ids, labels, attention_mask
    isolation = tensors["sequence_ids"].nbytes + tensors["cls_positions"].nbytes
    added = sum(tensor.nbytes for tensor in tensors.values()) - padded
    dense = [name for name, tensor in tensors.items() if list(tensor.shape).count(length) > 1]
    yield (
        f"isolation adds {isolation:,} bytes, sequence_ids and cls_positions; position_ids take the place of a padded "
        f"batch's attention_mask: beside input_ids, labels and attention_mask of this shape it is {added:,} bytes more"
    )
    yield f"tensors of {length} x {length} in a default batch: {', '.join(dense) or 'none'}"


# Masking.


def show_masking(data: Data, options) -> Iterator[str]:
    collator = DataCollatorWithPacking(data.tokenizer).for_dataset(data.packed)
    flat = collator._read(ArrowRows(data.packed).__getitems__(data.packs[0]))
    tokens, offsets = flat.token_columns["input_ids"].astype(np.int64), flat.offsets
    indices = flat.sequence_columns["sequence_indices"].astype(np.int64)
    cases = {"a copy of the bytes returned": lambda: (tokens.copy(), tokens.copy())}
    for masking in MASKING:
        for whole in (False, True):
            rule = DataCollatorWithPacking(data.tokenizer, masking=masking, whole_word_mask=whole).masking_rule
            name = f"`{masking}`, whole words" if whole else f"`{masking}`"
            cases[name] = partial(mask, rule, tokens, offsets, indices)
    rows = [data.source[i]["input_ids"] for i in data.sequences[0]]
    padded = data.tokenizer.pad({"input_ids": rows}, return_tensors="pt")["input_ids"]
    stock, is_special = DataCollatorForLanguageModeling(data.tokenizer), padded < len(SPECIAL)
    cases["stock, on padded rows"] = lambda: stock.torch_mask_tokens(padded.clone(), is_special)
    seconds = {name: [] for name in cases}
    for repeat in range(1 + 20 * options.rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    yield f"| masking {len(tokens):,} tokens of {len(indices)} sequences | ms | 10-90 % | predicted |"
    yield "|---|--:|--:|--:|"
    for name, run in cases.items():
        low, high = np.percentile(seconds[name], [10, 90]) * 1e3
        predicted = "" if name.startswith("a copy") else f"{float((run()[1] != -100).sum()) / len(tokens):.3f}"
        yield f"| {name} | {min(seconds[name]) * 1e3:.3f} | {low:.3f}-{high:.3f} | {predicted} |"


def mask(rule, tokens, offsets, indices):
    return rule(tokens, offsets, sequence_keys(0, 0, indices))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
