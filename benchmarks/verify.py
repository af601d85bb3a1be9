"""How fast does verify_packed check a packed folder, beside a copy of the packs' tokens?

    python benchmarks/verify.py                       97.6 million int32 tokens
    python benchmarks/verify.py --sequences 50000     smaller; memory does not grow with tokens

Lengths are drawn from the published Wikipedia histogram, tokens at random; the source is what save_to_disk wrote, and
both are in the page cache. "copy" is one memcpy of the packs' tokens in memory. Rates are tokens a second, best of the
repeats; where other programs run, the ratio to the copy says more.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from packing import pack_dataset, published_histogram, unpack_dataset, verify_packed

SEQUENCES = 381_400  # 97.6 million tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where some gigabytes are free; default: the system's own")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tokens = write_source(Path(folder) / "source", options.sequences)
        source = datasets.load_from_disk(str(Path(folder) / "source"))
        packed = Path(folder) / "packed"
        open_packed = pack_dataset(source, 512, packer="spfhp", output=packed)
        room, filled = np.empty(tokens, np.int32), np.ones(tokens, np.int32)
        cases = {
            "copy": lambda: np.copyto(room, filled),
            "verify": lambda: refuse(verify_packed(packed)),
            "verify, with the source": lambda: refuse(verify_packed(packed, source)),
            "unpack, in memory": lambda: unpack_dataset(open_packed),
        }
        print(
            f"{options.sequences:,} sequences, {tokens:,} tokens; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        )
        seconds = {name: [] for name in cases}
        for repeat in range(options.repeats + 1):
            for name, run in cases.items():
                start = time.perf_counter()
                run()
                if repeat:  # the first one loads or compiles kernels
                    seconds[name].append(time.perf_counter() - start)
        copy = min(seconds["copy"])
        for name, taken in seconds.items():
            best = min(taken)
            print(f"{name:24} {best:7.3f} s   {tokens / best / 1e6:8,.0f} M tokens/s   {best / copy:6.1f} x copy")
        tracemalloc.start()
        refuse(verify_packed(packed, source))
        print(f"peak of verify, with the source: {tracemalloc.get_traced_memory()[1] / 1e6:.1f} MB of arrays")


def write_source(folder: Path, count: int) -> int:
    """Returns the number of tokens."""
    rng, histogram = np.random.default_rng(0), published_histogram("wikipedia")
    lengths = rng.choice(len(histogram), count, p=histogram / histogram.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(5, 30000, offsets[-1], dtype=np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(tokens))
    table = pa.table({"input_ids": lists, "label": pa.array(rng.integers(0, 3, count))})
    datasets.Dataset(table).save_to_disk(folder)
    return int(offsets[-1])


def refuse(verification) -> None:
    if not verification.ok:
        raise SystemExit(str(verification))


if __name__ == "__main__":
    main()
