"""Who writes the shards: this process, several, or a cluster (cluster.py). All write the same bytes; see shards.py.

An engine takes tasks and gives records, in any order. It opens the source where it writes, once for each worker.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext

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

    They are spawned, as Arrow's threads do not survive a fork, and end with this one, however it ends.
    Raises what write_shard raises, and ChildProcessError where a process has died.
    """
    context = multiprocessing.get_context("spawn")
    stop, tasks, waiting = context.Event(), iter(tasks), set()
    with ProcessPoolExecutor(num_proc, context, _begin, (dataset, tuple(token_columns), stop)) as pool:
        try:
            # All workers start now. One that started after another had died would be waited for without end.
            for _ in range(num_proc):
                pool.submit(_ready)
            for task in tasks:
                waiting.add(pool.submit(_write, task))
                if len(waiting) > num_proc:
                    yield from _finished(waiting, advance)
            while waiting:
                yield from _finished(waiting, advance)
        except BrokenProcessPool:
            raise ChildProcessError(
                f"one of num_proc={num_proc} processes died, perhaps for want of memory: take fewer; in a script of "
                'your own, what starts them must stand under `if __name__ == "__main__":`'
            ) from None
        finally:
            stop.set()  # those that still write leave off after a batch, and nobody writes after this
            pool.shutdown(cancel_futures=True)


def _finished(waiting: set, advance: Advance) -> Iterator[ShardRecord]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        waiting.remove(future)
        record = future.result()
        advance(record.packs)
        yield record


# In the workers

_worker: tuple = ()  # columns of the source, and the event that says stop


def _begin(dataset, token_columns: tuple[str, ...], stop) -> None:
    import signal

    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which says stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = open_columns(dataset, token_columns), stop


def _ready() -> None:
    """Nothing: a worker that does it has begun."""


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _write(task: ShardTask) -> ShardRecord:
    columns, stop = _worker

    def stop_if_told(packs: int) -> None:
        if stop.is_set():
            raise InterruptedError(f"{task.file} was left off")

    return write_shard(columns, task, stop_if_told)
