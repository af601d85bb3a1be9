"""The shard functions on Ray: tasks of a cluster write what one process would, byte for byte.

    driver                                    workers, on any machine
    plan + assignment -> ShardTask     ->     open_columns (once a worker), write_shard
    manifest, names        <-     ShardRecord

What travels is indices: some 12 bytes a sequence. The tokens are read from the source's files and written to the output
by the worker, so that all machines must see both under the same path (NFS, Lustre, a mounted bucket that can rename).
A source in memory travels once to each machine.

write_shard is idempotent and names a shard when it is whole: a task whose worker has died is run again, elsewhere.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from .shards import ShardRecord, ShardTask, write_shard
from .source import SourceColumns, open_columns

RETRIES = 3  # of one task, after its worker has died or the file system has failed
TASKS_PER_CPU = 2  # at work or waiting: no worker waits for the driver, which keeps no more indices than that
END_SECONDS = 60  # that tasks have to leave off


def check_ray() -> None:
    """Raise ImportError where there is no Ray."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError("engine='ray' needs Ray: pip install 'dataset-packing[ray]', here and on every machine")


def write_on_ray(
    dataset, token_columns: Sequence[str], tasks: Iterable[ShardTask], advance: Callable[[int], None]
) -> Iterator[ShardRecord]:
    """Each task on some CPU of the cluster, in any order. advance(packs) is called for each shard that is written.

    The cluster: the one that this process is connected to; else that of RAY_ADDRESS, or one that `ray start` has
    started here; else one of this machine's CPUs, which ends with the call.

    Raises what write_shard raises, and ChildProcessError where a task's worker has died RETRIES + 1 times.
    """
    import ray

    with _connection(ray):
        write = ray.remote(_write).options(num_cpus=1, max_retries=RETRIES, retry_exceptions=[OSError])
        # in a list: whoever unpacks it asks for the dataset, which a worker does once
        source = [ray.put((dataset, tuple(token_columns)))]
        key, tasks, waiting = secrets.token_hex(8), iter(tasks), []
        try:
            for task in tasks:
                waiting.append(write.remote(source, key, task))
                if len(waiting) >= TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1))):
                    yield _next_record(ray, waiting, advance)
            while waiting:
                yield _next_record(ray, waiting, advance)
        finally:
            _end(ray, waiting)


@contextmanager
def _connection(ray):
    if ray.is_initialized():
        yield
        return
    ray.init(logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def _next_record(ray, waiting: list, advance: Callable[[int], None]) -> ShardRecord:
    (done, *_), _ = ray.wait(waiting, num_returns=1)
    waiting.remove(done)
    try:
        record = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise _with_cure(error.cause) from None
    except ray.exceptions.RayError as error:
        raise ChildProcessError(
            f"a worker that wrote a shard died {RETRIES + 1} times, perhaps for want of memory: {error}"
        ) from None
    advance(record.packs)
    return record


def _with_cure(error: Exception) -> Exception:
    if isinstance(error, OSError):
        error.add_note("every machine of the cluster must see the source and the output, under the same path")
    return error


def _end(ray, waiting: list) -> None:
    """Nobody writes after this."""
    if not waiting:
        return
    for task in waiting:
        ray.cancel(task)
    ray.wait(waiting, num_returns=len(waiting), timeout=END_SECONDS)


# In the workers

_opened: tuple[str, SourceColumns] | None = None  # of the last run that this worker wrote for


def _write(source: list, key: str, task: ShardTask) -> ShardRecord:
    global _opened
    if _opened is None or _opened[0] != key:
        import ray

        try:
            dataset, token_columns = ray.get(source[0])
        except ray.exceptions.RaySystemError as error:  # in this form comes what opening its files has raised
            raise OSError(f"the source cannot be opened: {str(error).splitlines()[0]}") from None
        _opened = key, open_columns(dataset, token_columns)
    return write_shard(_opened[1], task)
