"""How much efficiency does packing a stream lose against packing it as a whole, and what does it cost?

    python benchmarks/stream.py                 in a minute or two
    python benchmarks/stream.py --sequences N   of so many sequences

Lengths are drawn from the paper's Wikipedia histogram, for packs of 512 tokens; tokens are random.

loss   packing efficiency of pack_stream by buffer_size, beside pack_dataset's whole-set plan of the same sequences
speed  sequences a second that come out of the stream, beside the same stream unpacked; the runs alternate, the median
       of --repeats counts
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from packers import machine

from packing import length_histogram, pack_stream, plan_packs, published_histogram

BUFFER_SIZES = (100, 1_000, 10_000, 100_000)
LONGEST = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    print(machine())
    source = random_sequences(options.sequences)
    for part in (loss(source), speed(source.select(range(min(20_000, len(source)))), options.repeats)):
        print(flush=True)
        for line in part:
            print(line, flush=True)


def random_sequences(count: int) -> datasets.Dataset:
    histogram, draw = published_histogram("wikipedia"), np.random.default_rng(0)
    lengths = draw.choice(len(histogram), count, p=histogram / histogram.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = draw.integers(5, 30_000, offsets[-1], np.int32)
    # some hundred rows a chunk, as a file has them
    rows = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(tokens))
    return datasets.Dataset(pa.Table.from_batches(pa.table({"input_ids": rows}).to_batches(max_chunksize=1_000)))


def loss(source: datasets.Dataset) -> Iterator[str]:
    lengths = pc.list_value_length(source.data.column("input_ids")).to_numpy()
    plan = plan_packs(length_histogram(lengths, LONGEST))
    yield f"{len(source):,} sequences, {plan.num_tokens:,} tokens"
    yield "| packed | packs | packing efficiency | loss in points |"
    yield "|---|--:|--:|--:|"
    yield f"| as a whole, {plan.packer} | {plan.num_packs:,} | {plan.packing_efficiency:.4f} | |"
    for buffer_size in BUFFER_SIZES:
        stream = pack_stream(source.to_iterable_dataset(), LONGEST, buffer_size=buffer_size)
        packs = sum(1 for _ in stream.with_format("arrow"))
        efficiency = plan.num_tokens / (packs * LONGEST)
        points = 100 * (plan.packing_efficiency - efficiency)
        yield f"| {buffer_size:,} at a time | {packs:,} | {efficiency:.4f} | {points:.2f} |"


def speed(source: datasets.Dataset, repeats: int) -> Iterator[str]:
    def generate() -> Iterator[dict]:
        yield from rows

    rows = source.to_list()
    stream, generated = source.to_iterable_dataset(), datasets.IterableDataset.from_generator(generate)
    cases = {
        "Arrow source, rows as lists": (stream, pack_stream(stream, LONGEST)),
        "Arrow source, rows as Arrow": (
            stream.with_format("arrow"),
            pack_stream(stream, LONGEST).with_format("arrow"),
        ),
        "Python generator, rows as lists": (generated, pack_stream(generated, LONGEST)),
    }
    yield f"{len(source):,} sequences, buffer_size=10,000, one process"
    yield "| stream | unpacked, sequences/s | packed, sequences/s | ratio |"
    yield "|---|--:|--:|--:|"
    for name, streams in cases.items():
        runs = [[seconds(exhaust, each) for each in streams] for _ in range(repeats)]
        unpacked, packed = (len(source) / statistics.median(times) for times in zip(*runs, strict=True))
        yield f"| {name} | {unpacked:,.0f} | {packed:,.0f} | {packed / unpacked:.2f} |"


def exhaust(rows: Iterable) -> None:
    for _ in rows:
        pass


def seconds(function: Callable, *arguments) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
