"""Who writes the shards: this process, several, or a cluster (cluster.py). All write the same bytes; see shards.py.

An engine takes tasks and gives records, in any order. It opens the source where it writes, once for each worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

from packing.files.processes import Workers, is_stopped, prepared
from packing.source.rows import SourceColumns, open_columns
from packing.store.cluster import check_ray, connection
from packing.store.shards import ShardRecord, ShardTask, write_shard

Advance = Callable[[int], None]


def check_engine(engine: str) -> None:
    """Raise ImportError where the engine is not installed."""
    if engine == "ray":
        check_ray()


def opened_engine(engine: str):
    """A context in which an engine is started once, for all that is read and written."""
    return connection() if engine == "ray" else nullcontext()


def write_here(columns: SourceColumns, tasks: Iterable[ShardTask], advance: Advance) -> Iterator[ShardRecord]:
    """One shard after the other, in this process. advance(packs) is called as they are written."""
    for task in tasks:
        yield write_shard(columns, task, advance)


def write_in_pool(
    dataset, token_columns: Sequence[str], tasks: Iterable[ShardTask], num_proc: int, advance: Advance
) -> Iterator[ShardRecord]:
    """By num_proc processes, each of which opens the dataset: its files, or, if it is in memory, a copy.

    Nobody writes after this has ended. Raises what write_shard raises, and ChildProcessError where a process has died.
    """
    with Workers(num_proc, partial(open_columns, dataset, tuple(token_columns))) as workers:
        for record in workers.map(_write, tasks, in_order=False, most=num_proc + 1):
            advance(record.packs)
            yield record


def _write(task: ShardTask) -> ShardRecord:
    """In one of the processes."""

    def stop_if_told(packs: int) -> None:
        if is_stopped():
            raise InterruptedError(f"{task.file} was left off")

    return write_shard(prepared(), task, stop_if_told)
