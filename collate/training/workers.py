"""A dataloader worker that is killed: who it was, why that happens, and what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

KILLED = "DataLoader worker (pid"
"""How torch's message begins."""


@contextmanager
def names_killed_workers(args: TrainingArguments) -> Iterator[None]:
    """OSError in place of torch's RuntimeError, which strikes wherever the main process is."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(KILLED):
            raise
        last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir or "") else None
        there = "there is no checkpoint yet" if last is None else f"the last checkpoint is {last}"
        raise OSError(
            f"{' '.join(str(error).split()).rstrip('.')}: something outside ended it, most often because memory ran "
            f"out; lower dataloader_num_workers={args.dataloader_num_workers} (with 0 this process makes the batches) "
            f"or dataloader_prefetch_factor, and resume; {there}"
        ) from error
