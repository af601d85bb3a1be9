"""What several test modules need from two processes, in one launch for a whole run of the tests:

torchrun --nproc-per-node 2 two_processes.py RESULTS.pt
"""

import os
import subprocess
import sys
from pathlib import Path

import stock_runs
import torch
import training_runs
from process_group import end_process_group


def launch(results: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    run = subprocess.run([*command, __file__, results], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-5000:]


if __name__ == "__main__":
    results = {name: run() for name, run in (stock_runs.TWO_PROCESSES | training_runs.TWO_PROCESSES).items()}
    if torch.distributed.get_rank() == 0:
        torch.save(results, sys.argv[1])
    torch.distributed.barrier()
    end_process_group()
