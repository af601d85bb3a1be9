"""One run at a time writes into an output_dir: of two, one would leave its model and the other its record."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from transformers import TrainingArguments

from collate.training.agreement import agreed
from packing.files.locks import held, holder

logger = logging.getLogger(__name__)

LOCK = "_lock"
"""In output_dir. Uploads to the hub leave out what begins with an underscore."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems of clusters say that are mounted without locks."""

_here: set[Path] = set()
"""Folders that this process holds: who trains within a run does not wait for itself."""


@contextmanager
def one_run(arguments: TrainingArguments, folder: str | os.PathLike) -> Iterator[None]:
    """Hold the folder, which is made: the first rank does, and the system frees it however that process ends.

    Raises BlockingIOError on all ranks while another run holds it.
    """
    folder = Path(folder).absolute()
    if folder in _here:
        yield
        return
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]  # the nearest first
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        agreed(arguments, lambda: _enter(stack, folder) if arguments.process_index == 0 else None)
        _here.add(folder)
        stack.callback(_here.discard, folder)
        yield


def _enter(stack: ExitStack, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    try:
        stack.enter_context(held(lock))
    except BlockingIOError:
        raise BlockingIOError(
            f"another run{holder(lock)} is writing into output_dir={str(folder)!r}; wait for it, stop it, or give "
            "another output_dir"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): start no second run in it", folder, error.strerror)


def _remove_empty(made: list[Path]) -> None:
    """What a run that was refused has made."""
    with suppress(OSError):
        for folder in made:
            os.rmdir(folder)
