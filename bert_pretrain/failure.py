"""How a command that cannot continue ends: with one line, once, for any number of processes.

alone                   the line on stderr
rank 0 under torchrun   the line in torchrun's report, at its end; printed, it would stand above torchrun's traceback
other ranks             nothing at first: most faults meet all ranks, and torchrun ends the others after rank 0. A rank
                        that still runs after PATIENCE has a fault of its own, and prints the line.
"""

import json
import os
import sys
import time

PATIENCE = 20
"""Seconds in which rank 0 finds the same fault and torchrun ends the other ranks."""


def say_failure(message: str) -> None:
    """Report a fault. Call it last: torchrun may end other ranks than the first while they wait here."""
    if rank := int(os.environ.get("RANK", "0")):
        time.sleep(PATIENCE)
        message = f"rank {rank}: {message}"
    # What torchrun reads after a failure: https://docs.pytorch.org/docs/stable/elastic/errors.html
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is None:
        print(message, file=sys.stderr)
        return
    with open(report, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}, file)


def say_end(message: str) -> None:
    """Report an end that was asked for, which all ranks reach together: only the first prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
