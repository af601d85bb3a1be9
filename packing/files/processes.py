"""The pool of processes: one function over many tasks, in this process or in several.

They are spawned, not forked: the threads of Arrow, torch and tokenizers do not survive a fork. They end with the
process that started them, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

TASKS_AHEAD = 4  # tasks given to each process in advance: none is idle, and few tasks are held

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """num_proc processes, or this one if it is 1.

    with Workers(2) as workers:
        list(workers.map(len, ["a", "bcd", "ef"]))   # [1, 3, 2]

    Functions, tasks and results are pickled, so a function must be one that can be imported.

    prepare: called once in each process that is started; `prepared()` there gives what it returned.
    """

    def __init__(self, num_proc: int, prepare: Callable[[], object] | None = None):
        self.num_proc, self.prepare = num_proc, prepare
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor is not None:
            self._stop.set()
            self._executor.shutdown(cancel_futures=True)

    def map(
        self, do: Callable[[Task], Result], tasks: Iterable[Task], *, in_order: bool = True, most: int | None = None
    ) -> Iterator[Result]:
        """The results, in the order of the tasks or as they come.

        most: tasks that are handed out at a time; None: TASKS_AHEAD for each process.
        Raises what `do` raises, and ChildProcessError where a process has died.
        """
        if self.num_proc == 1:
            yield from map(do, tasks)
            return
        waiting: deque[Future[Result]] = deque()
        most = TASKS_AHEAD * self.num_proc if most is None else most
        try:
            executor = self._executor or self._start()
            for task in tasks:
                waiting.append(executor.submit(do, task))
                if len(waiting) >= most:
                    yield _take(waiting, in_order)
            while waiting:
                yield _take(waiting, in_order)
        except BrokenProcessPool:
            what = f"one of num_proc={self.num_proc} processes died, perhaps for want of memory: take fewer"
            hint = 'in a script of your own, what starts them must stand under `if __name__ == "__main__":`'
            raise ChildProcessError(f"{what}; {hint}") from None
        finally:
            for future in waiting:
                future.cancel()

    def _start(self) -> ProcessPoolExecutor:
        """All processes start now. One that started after another had died would be waited for without end."""
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._executor = ProcessPoolExecutor(self.num_proc, context, _begin, (self.prepare, self._stop))
        for _ in range(self.num_proc):
            self._executor.submit(int)  # done once the process has started
        return self._executor


def _take(waiting: deque[Future[Result]], in_order: bool) -> Result:
    """The result of the first task, or of one that is done first."""
    if not in_order:
        wait(waiting, return_when=FIRST_COMPLETED)
    done = waiting[0] if in_order else next(future for future in waiting if future.done())
    waiting.remove(done)
    return done.result()


# In the processes that were started

_prepared: Any = None
_stop: Any = None  # the event that is set when the pool ends


def prepared() -> Any:
    """What `prepare` returned in this process."""
    return _prepared


def is_stopped() -> bool:
    """Whether the pool is ending, so that a long task should leave off."""
    return _stop.is_set()


def _begin(prepare: Callable[[], object] | None, stop: object) -> None:
    global _prepared, _stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process works alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _stop = stop
    _prepared = None if prepare is None else prepare()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
