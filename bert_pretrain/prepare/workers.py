"""One function over many tasks, in this process or in several; results come in the order of the tasks."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

TASKS_AHEAD = 4
"""Tasks handed out per process before their results are asked for: none is idle, and not all of the text is held."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """num_proc processes, or this one if it is 1.

    with Workers(2) as workers:
        list(workers.map(len, ["a", "bcd", "ef"]))   # [1, 3, 2]

    They are started afresh (spawned) rather than forked: the tokenizer's, Arrow's and torch's threads do not survive a
    fork. Functions, tasks and results are pickled, so a function must be one that can be imported.
    """

    def __init__(self, num_proc: int):
        self.num_proc = num_proc
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.num_proc > 1:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.num_proc, mp_context=context, initializer=_begin)
        return self

    def __exit__(self, *exception) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Raises what the function raises, and ChildProcessError where a process has died."""
        if self._executor is None:
            yield from map(function, tasks)
            return
        ahead = deque()
        try:
            for task in tasks:
                ahead.append(self._executor.submit(function, task))
                if len(ahead) >= TASKS_AHEAD * self.num_proc:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise ChildProcessError(
                f"one of num_proc={self.num_proc} processes died, perhaps for want of memory: take fewer; in a script "
                'of your own, what starts them must stand under `if __name__ == "__main__":`'
            ) from None
        finally:
            for future in ahead:
                future.cancel()


def _begin() -> None:
    """Once in each process: it works alone, and ends when the process that started it does, however that ended."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, too, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
