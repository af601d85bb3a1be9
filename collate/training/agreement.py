"""Ranks that must agree on what lies on the disk: one looks, all are told, and an error is raised by all or by none."""

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import gather_object
from transformers import TrainingArguments

Found = TypeVar("Found")


def agreed(arguments: TrainingArguments, look: Callable[[], Found]) -> Found:
    """What `look` returns or raises, on all ranks; it is called on rank 0, or with save_on_each_node once on each node.

    Without it all ranks would read the same files, and if one alone found them damaged, the others would wait for it.
    """
    if arguments.world_size == 1:
        return look()
    answers: list[tuple[Found | None, Exception | None]] = []
    if arguments.should_save:
        try:
            answers.append((look(), None))
        except Exception as error:  # whatever it is, the others must hear of it
            answers.append((None, error))
    answers = gather_object(answers)
    for _, error in answers:
        if error is not None:
            raise error
    found = [answer for answer, _ in answers]
    if any(other != found[0] for other in found):
        raise ValueError(f"the nodes found different things: {found}; make their output folders alike, or share one")
    return found[0]
