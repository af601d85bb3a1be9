"""Ranks that must agree: on what lies on the disk, and on who writes into an output_dir."""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import gather_object
from transformers import TrainingArguments

from packing.files.folder import no_empty_parents
from packing.files.locks import held, holder

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

LOCK = "_lock"
"""In output_dir. Uploads to the hub leave out what begins with an underscore."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""The errors of file systems that are mounted without locks, as on some clusters."""

_here: set[Path] = set()
"""Folders that this process holds, so that training within a run does not wait for itself."""


def agreed(arguments: TrainingArguments, look: Callable[[], Found]) -> Found:
    """What `look` returns or raises, on all ranks. Rank 0 calls it, or with save_on_each_node one rank of each node.

    If all ranks read the same files and one alone found them damaged, the others would wait for it forever.
    """
    if arguments.world_size == 1:
        return look()
    answers: list[tuple[Any, Exception | None]] = []
    if arguments.should_save:
        try:
            answers.append((look(), None))
        except Exception as error:  # the other ranks must hear of any error
            answers.append((None, error))
    answers = gather_object(answers)
    for _, raised in answers:
        if raised is not None:
            raise raised
    found = [answer for answer, _ in answers]
    if any(other != found[0] for other in found):
        raise ValueError(f"the nodes found different things: {found}; make their output folders alike, or share one")
    return found[0]


@contextmanager
def one_run(arguments: TrainingArguments, folder: str | os.PathLike) -> Iterator[None]:
    """Make the folder and hold it: of two runs in it, one would leave its model and the other its record.

    The first rank holds it, and the system frees it however that process ends.
    Raises BlockingIOError on all ranks while another run holds it.
    """
    folder = Path(folder).absolute()
    if folder in _here:
        yield
        return
    with no_empty_parents(folder / LOCK), ExitStack() as stack:
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
