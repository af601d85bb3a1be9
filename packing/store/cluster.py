"""The shard functions on Ray: a cluster reads and writes what one process would, byte for byte.

    driver                                      workers, on any machine
    ranges of texts             ->              TokenizeRows.write: a file of tokens        (text.py)       tasks of Ray
    bytes read                  <-
    ranges of rows              ->              read_range: lengths, digests                (ranges.py)     Ray Data
    Source, fingerprint         <-
    plan + assignment -> ShardTask   ->         open_columns (once a worker), write_shard   (shards.py)     tasks of Ray
    manifest, names        <-   ShardRecord

Tokens do not travel: all machines see the source and the output under the same path, or at a URL. docs/clusters.md says
what travels, and why writing uses plain tasks and not Ray Data.

write_shard is idempotent and names a shard when it is whole: a task whose worker has died runs again, elsewhere.
"""

from __future__ import annotations

import inspect
import logging
import os
import platform
import secrets
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from packing.source.ranges import RangeLost, RangeRead, RangeWrong, Reading, from_arrow, read_range, to_arrow
from packing.source.rows import INPUT_IDS, open_columns
from packing.source.token_column import chosen_rows, open_lists
from packing.store.shards import ShardRecord, ShardTask, write_shard

if TYPE_CHECKING:
    import datasets

    from packing.source.text import RowsTask, TokenizeRows
    from packing.text.outcome import Amount

T = TypeVar("T")

RETRIES = 3  # a task runs again if its worker dies or the file system fails
TASKS_PER_CPU = 2  # at work or waiting: no worker idles, and the driver keeps few indices
END_SECONDS = 60  # tasks have this long to stop
SAMPLED = 256  # rows by which a worker knows the source

Advance = Callable[[int], None]
Opener = Callable[[], "datasets.Dataset"] | None  # None: the dataset opens itself, by the paths of its files


@contextmanager
def connection() -> Iterator[None]:
    """The cluster: the one that this process is connected to; else that of RAY_ADDRESS, or one that `ray start` has
    started here; else one of this machine's CPUs, which ends with the context."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True, eq=False)
class SharedSource:
    """A dataset, as the workers get it: itself, by the paths of its files, or a function that opens it.

    rows, types, tokens: what it has where packing began; of the tokens, the XXH3 of SAMPLED rows.
    """

    source: datasets.Dataset | Callable[[], datasets.Dataset]
    rows: int
    types: str
    tokens: str

    @classmethod
    def of(cls, dataset: datasets.Dataset, opener: Opener = None) -> SharedSource:
        return cls(opener or dataset, len(dataset), str(dataset.features), _sampled_tokens(dataset))

    def open(self) -> datasets.Dataset:
        """The dataset, here. Raises OSError where it is another one, as a few rows tell: an old copy, say."""
        dataset = self.source() if callable(self.source) else self.source
        rows, types = len(dataset), str(dataset.features)
        if (rows, types) != (self.rows, self.types):
            told = f"it has {rows:,} rows of {types}, and {self.rows:,} of {self.types} where packing began"
        elif _sampled_tokens(dataset) != self.tokens:
            told = "its tokens are not those that it has where packing began"
        else:
            return dataset
        raise OSError(f"the source is another one on machine {platform.node()!r}: {told}")


def _sampled_tokens(dataset: datasets.Dataset) -> str:
    """XXH3 of input_ids in rows that lie evenly apart. The file may be damaged: nothing has been checked."""
    column = open_lists(INPUT_IDS, dataset.data.column(INPUT_IDS), chosen_rows(dataset))
    starts, lengths = column.find(np.linspace(0, len(dataset) - 1, SAMPLED).astype(np.int64))
    starts, whole = starts[lengths > 0], lengths[lengths > 0]
    tokens = column.gather_numbers(starts, whole, starts + whole - 1)
    return xxhash.xxh3_128_hexdigest(lengths.tobytes() + tokens.tobytes())


# Reading


def read_on_ray(
    source: SharedSource, reading: Reading, ranges: Sequence[tuple[int, int]], advance: Advance
) -> Generator[RangeRead | RangeWrong, None, None]:
    """Each range on some CPU of the cluster, in any order. advance(rows) is called for each that is read.

    Raises OSError where a range cannot be read in RETRIES + 1 rounds, and ChildProcessError where its worker dies as
    often.
    """
    import ray
    import ray.data

    with connection():
        arguments = {"source": [ray.put((source, reading))], "key": secrets.token_hex(8)}
        for _ in range(RETRIES + 1):
            lost = []
            for table in _map_rows(ray, ranges, arguments):
                found = from_arrow(table)
                if isinstance(found, RangeLost):
                    lost.append(found)
                else:
                    advance(found.rows)
                    yield found
            if not lost:
                return
            ranges = [(found.first, found.first + found.rows) for found in lost]
        raise _with_cure(OSError(f"the source cannot be read from row {lost[0].first:,} on: {lost[0].error}"))


def _map_rows(ray: Any, ranges: Sequence[tuple[int, int]], arguments: dict) -> Iterator[pa.Table]:
    """_read on Ray Data: a block of one row for each range, and back."""
    rows = ray.data.from_arrow([pa.table({"first": [first], "end": [end]}) for first, end in ranges])
    rows.context.enable_progress_bars = False  # there is ours
    options = {"batch_size": None, "batch_format": "pyarrow", "num_cpus": 1, "fn_kwargs": arguments}
    if "ray_remote_args" in inspect.signature(rows.map_batches).parameters:  # older than 2.64
        options["max_retries"] = RETRIES
    with warnings.catch_warnings(), _quiet("ray.data"):
        warnings.simplefilter("ignore")  # Ray warns about its own future
        try:
            found = rows.map_batches(_read, **options)
            yield from found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"a worker that read the source failed: {error}") from None
        except ray.exceptions.RayError as error:
            raise ChildProcessError(f"a worker that read the source died {RETRIES + 1} times: {error}") from None


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # errors are raised, so no log is needed
    try:
        yield
    finally:
        logger.setLevel(level)


# Tokenizing and writing


def write_on_ray(
    source: SharedSource, token_columns: Sequence[str], tasks: Iterable[ShardTask], advance: Advance
) -> Iterator[ShardRecord]:
    """Each task on some CPU of the cluster, in any order. advance(packs) is called for each shard that is written.

    Raises what write_shard raises, and ChildProcessError where a task's worker has died RETRIES + 1 times.
    """
    for record in _map_tasks(_write, (source, tuple(token_columns)), tasks, "wrote a shard"):
        advance(record.packs)
        yield record


def tokenize_on_ray(work: TokenizeRows, tasks: Sequence[RowsTask]) -> Iterator[Amount]:
    """Each task on some CPU of the cluster, in any order. All machines must see the cache that the tasks write to.

    Raises what work.write raises, and ChildProcessError where a task's worker has died RETRIES + 1 times.
    """
    yield from _map_tasks(_tokenize, (work,), tasks, "tokenized")


def _map_tasks(function: Callable[..., T], shared: tuple, tasks: Iterable[Any], did: str) -> Iterator[T]:
    """function([what is shared], key, task) of each task. did: what errors say that its worker was there for."""
    import ray

    with connection():
        remote = ray.remote(function).options(num_cpus=1, max_retries=RETRIES, retry_exceptions=[OSError])
        # a list keeps it packed: a worker asks for the dataset once
        source, key = [ray.put(shared)], secrets.token_hex(8)
        waiting: list[Any] = []
        try:
            for task in tasks:
                waiting.append(remote.remote(source, key, task))
                if len(waiting) >= TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1))):
                    yield _next_result(ray, waiting, did)
            while waiting:
                yield _next_result(ray, waiting, did)
        finally:
            _end(ray, waiting)


def _next_result(ray: Any, waiting: list, did: str) -> Any:
    (done, *_), _ = ray.wait(waiting, num_returns=1)
    waiting.remove(done)
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise _with_cure(error.cause) from None
    except ray.exceptions.RayError as error:
        what = f"a worker that {did} died {RETRIES + 1} times, perhaps for want of memory"
        raise ChildProcessError(f"{what}: {error}") from None


def _with_cure(error: Exception) -> Exception:
    if isinstance(error, OSError):
        error.add_note(
            "every machine of the cluster must see the source and the output (of texts, HF_DATASETS_CACHE, too), under "
            "the same path or URL"
        )
    return error


def _end(ray: Any, waiting: list) -> None:
    """Nobody writes after this, unless a put to a URL takes longer; and that puts what belongs there."""
    if not waiting:
        return
    for task in waiting:
        ray.cancel(task)
    ray.wait(waiting, num_returns=len(waiting), timeout=END_SECONDS)


# In the workers

_opened: tuple[str, object] = "", None  # key and source of this worker's last run


def _open(source: list, key: str, prepare: Callable[..., Any]) -> Any:
    """prepare(what the driver has put there), once for all tasks of a run."""
    global _opened
    if _opened[0] != key:
        import ray

        try:
            shared = ray.get(source[0])
        except ray.exceptions.RaySystemError as error:  # Ray wraps errors of opening its files like this
            raise OSError(f"the source cannot be opened: {str(error).splitlines()[0]}") from None
        _opened = key, prepare(*shared)
    return _opened[1]


def _read(rows: pa.Table, source: list, key: str) -> pa.Table:
    first, end = (rows.column(name)[0].as_py() for name in ("first", "end"))
    try:
        dataset, reading = _open(source, key, lambda shared, reading: (shared.open(), reading))
        return to_arrow(read_range(dataset, reading, first, end))
    except (OSError, ValueError) as error:  # ValueError: it cannot be opened; read_range reports faults of rows
        return to_arrow(RangeLost(first, end - first, str(error)))


def _write(source: list, key: str, task: ShardTask) -> ShardRecord:
    columns = _open(source, key, lambda shared, token_columns: open_columns(shared.open(), token_columns))
    return write_shard(columns, task)


def _tokenize(source: list, key: str, task: RowsTask) -> Amount:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it has one CPU
    return _open(source, key, lambda work: work).write(task)
