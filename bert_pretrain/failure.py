"""How a command ends that cannot go on: one line, once, however many processes found out.

alone                   the line on stderr
rank 0 under torchrun   the line in torchrun's report, which ends with it; printed, it would stand above a traceback of
                        torchrun's own
other ranks             nothing: most faults are seen by all ranks, and torchrun ends the others when the first has
                        ended. If it does not, then rank 0 has not seen this one, and it is said after all.
"""

import json
import os
import sys
import time

PATIENCE = 20
"""Seconds in which rank 0 finds the same fault, and whoever started the ranks ends them."""


def say_failure(message: str) -> None:
    """Call it last: ranks but the first may end in it."""
    if rank := int(os.environ.get("RANK", "0")):
        time.sleep(PATIENCE)
        message = f"rank {rank}: {message}"
    # https://docs.pytorch.org/docs/stable/elastic/errors.html: what torchrun reads of a process that has failed
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is None:
        print(message, file=sys.stderr)
        return
    with open(report, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)


def say_end(message: str) -> None:
    """All ranks end together, as they were told to: the first says so."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
