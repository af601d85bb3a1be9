"""Processes that talk by gloo, in the one order of ending that cannot hang.

DistributedDataParallel may hold the last reference to its group. It then joins the group's threads while it holds
Python's lock, and a thread that still drops a reference to something of Python waits for that lock, forever. So what
uses a group ends, with its frame, before the group does.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = 300
"""Seconds for what takes ten: the machine may be busy."""


@contextmanager
def process_group(folder: Path, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """A group that meets in a folder. In its block call functions; hold no DistributedDataParallel there."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    try:
        yield
    finally:
        end_process_group()


def end_process_group() -> None:
    """Call it where no frame holds a DistributedDataParallel."""
    gc.collect()
    dist.destroy_process_group()


def run_ranks(work: Callable[[int, Path], None], folder: Path, ranks: int = 2) -> None:
    """work(rank, folder) in as many processes, as one group. Raises what one raises, or TimeoutError."""
    context = torch.multiprocessing.spawn(_run, (work, folder, ranks), nprocs=ranks, join=False)
    assert context is not None
    try:
        for _ in range(ranks):  # join waits until one more has ended
            if context.join(PATIENCE):
                return
        raise TimeoutError(f"processes of {ranks} still run after {PATIENCE} seconds")
    finally:
        for process in context.processes:
            process.kill()


def _run(rank: int, work: Callable[[int, Path], None], folder: Path, ranks: int) -> None:
    with process_group(folder, rank, ranks):
        work(rank, folder)
