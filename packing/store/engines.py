"""Who reads the source and writes the shards: this process, several of this machine, or a cluster (cluster.py).

All read the same and write the same bytes; see ranges.py and shards.py. An engine opens the source where it works, once
for each worker.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import datasets

from packing.files.processes import Workers, is_stopped, prepared
from packing.files.progress import progress_bar
from packing.options import PackOptions
from packing.source.fingerprint import ColumnPrint, column_prints, in_background
from packing.source.ranges import Reading, join_ranges, row_ranges
from packing.source.rows import Source, check_source, open_columns
from packing.source.token_ids import read_checked
from packing.store.cluster import Advance, Opener, SharedSource, connection, read_on_ray, tokenize_on_ray, write_on_ray
from packing.store.contents import Packing
from packing.store.shards import ShardRecord, ShardTask, write_shard

if TYPE_CHECKING:
    from packing.source.text import Run


def check_engine(engine: str) -> None:
    """Raise ImportError where the engine is not installed."""
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ImportError("engine='ray' needs Ray: pip install 'dataset-packing[ray]', here and on every machine")


def opened_engine(engine: str) -> AbstractContextManager[None]:
    """A context in which an engine is started once, for all that is read and written."""
    check_engine(engine)
    return connection() if engine == "ray" else nullcontext()


def tokenizer_of(engine: str) -> Run | None:
    """Who tokenizes texts; None: processes of this machine."""
    return tokenize_on_ray if engine == "ray" else None


def read(
    dataset: datasets.Dataset, options: PackOptions, to_hash: bool, opener: Opener = None, progress: bool = False
) -> tuple[Source, Callable[[], tuple[ColumnPrint, ...]] | None]:
    """The source, and what waits for its fingerprint; None if not to_hash.

    opener: opens the same dataset on another machine. Raises ValueError for what cannot be packed.
    """
    reading = Reading(options.token_columns, options.pad_token_id, to_hash)
    if options.engine != "ray":
        source = read_checked(dataset, reading.token_columns, reading.pad_token_id)
        return source, in_background(column_prints, dataset).result if to_hash else None
    check_source(dataset)
    with (
        progress_bar(total=len(dataset), desc="reading", unit="row", disable=not progress) as bar,
        closing(read_on_ray(SharedSource.of(dataset, opener), reading, row_ranges(dataset), bar.update)) as ranges,
    ):
        source, prints = join_ranges(dataset, reading, ranges)
    return source, None if prints is None else lambda: prints


def write_shards(packing: Packing, tasks: Iterable[ShardTask], advance: Advance) -> Generator[ShardRecord, None, None]:
    """Write all shards, and give their records in any order. advance(packs) is called as packs are written.

    Nobody writes after this has ended. Raises what write_shard raises, and ChildProcessError where a process has died.
    """
    dataset, columns = packing.dataset, packing.facts.token_columns
    num_proc = min(packing.options.num_proc, len(packing.shard_files))
    if packing.options.engine == "ray":
        yield from write_on_ray(SharedSource.of(dataset, packing.opener), columns, tasks, advance)
    elif num_proc == 1:
        for task in tasks:
            yield write_shard(packing.source.columns, task, advance)
    else:  # each process opens the dataset: its files, or, if it is in memory, a copy
        with Workers(num_proc, partial(open_columns, dataset, columns)) as workers:
            for record in workers.map(_write, tasks, in_order=False, most=num_proc + 1):
                advance(record.packs)
                yield record


def _write(task: ShardTask) -> ShardRecord:

    def stop_if_told(packs: int) -> None:
        if is_stopped():
            raise InterruptedError(f"{task.file} stays unfinished: the pool ends")

    return write_shard(prepared(), task, stop_if_told)
