"""Runs of `bert-pretrain` in processes of their own, to be killed and started again. Imported by test_resume.py.

A new interpreter imports for more than ten seconds. So runs are forked from multiprocessing's forkserver, which has
imported everything, runs nothing and has no threads.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

PRELOAD = ["killed_runs", "bert_pretrain.cli", "bert_pretrain.train.pretrain", "transformers.trainer", "collate"]
PATIENCE = 300
"""Seconds after which a run that shows no sign of life has failed."""


def context():
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOAD)
    return forkserver


def _command(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for dataloader workers, as in a process of a user's
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in a shell's background inherit that it is ignored
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from bert_pretrain.cli import main

    sys.exit(main(arguments))


class Run:
    """`bert-pretrain train` on one or more gloo ranks, each a process that leads a group of its own."""

    def __init__(self, arguments: list[str], output: Path, ranks: int = 1):
        self.output, self.log = output, output.with_suffix(".log")
        self.begin = len(self.log.read_text()) if self.log.exists() else 0  # where this run's log begins
        self.known, self.began = set(self._checkpoints()), time.time()
        arguments = ["train", *arguments, "--output_dir", str(output)]
        environments = [{}] if ranks == 1 else _rank_environments(ranks)
        self.ranks = [
            context().Process(target=_command, args=(arguments, str(self.log), environment))
            for environment in environments
        ]
        for rank in self.ranks:
            rank.start()

    def _checkpoints(self) -> list[str]:
        return [path.name for path in self.output.glob("checkpoint-*")]

    def is_running(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def is_saving(self) -> bool:
        """Whether the run is saving, or was when it was killed."""
        with contextlib.suppress(FileNotFoundError):  # it has just become a checkpoint
            return any(path.stat().st_mtime > self.began for path in self.output.glob("_unfinished/checkpoint-*"))
        return False

    def wait_for(self, is_reached) -> bool:
        """False: the run ended before."""
        begin = time.monotonic()
        while self.is_running():
            if is_reached():
                return True
            assert time.monotonic() < begin + PATIENCE, self.log.read_text()
            time.sleep(0.003)
        return False

    def wait_for_checkpoint(self) -> bool:
        """A checkpoint that this run has written."""
        return self.wait_for(lambda: bool(set(self._checkpoints()) - self.known))

    def send(self, number: int, ranks=None, to_group: bool = False) -> None:
        for rank in self.ranks if ranks is None else [self.ranks[i] for i in ranks]:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                try:
                    (os.killpg if to_group else os.kill)(rank.pid, number)
                except ProcessLookupError:  # it has only just started, and leads no group yet
                    os.kill(rank.pid, number)

    def kill(self) -> bool:
        """Whether the kill came before the run ended by itself."""
        self.send(signal.SIGKILL, to_group=True)
        return self.end() == {-signal.SIGKILL}

    def end(self) -> set[int]:
        """The exit statuses; negative: the signal that killed the process."""
        for rank in self.ranks:
            rank.join(PATIENCE)
            assert rank.exitcode is not None, self.log.read_text()
        return {rank.exitcode for rank in self.ranks}

    def finish(self) -> None:
        assert self.end() == {0}, self.log.read_text()


def _rank_environments(ranks: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared["LOCAL_WORLD_SIZE"] = str(ranks)
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_killed(arguments: list[str], output: Path, kills: int, seed: int, restarts=((),), ranks: int = 1) -> dict:
    """Kill a run `kills` times, at random moments of its start and training, every third time while it saves.

    restarts: options for each start, in turn. Returns how many kills came at which moment.
    """
    draw = random.Random(seed)
    moments = {"starting": 0, "training": 0, "saving": 0}
    starts = 0
    while sum(moments.values()) < kills:
        run = Run([*arguments, *restarts[starts % len(restarts)]], output, ranks)
        starts += 1
        kind = sum(moments.values()) % 3
        if kind == 0:
            reached = run.wait_for(run.is_saving)
            time.sleep(draw.uniform(0, 0.01))
        elif kind == 1:
            reached = run.wait_for_checkpoint()
            time.sleep(draw.uniform(0, 0.3))
        else:
            reached = True
            time.sleep(draw.uniform(0, 1.5))
        if not run.kill():
            assert run.end() <= {0, -signal.SIGKILL}, run.log.read_text()
            assert reached or starts < 10 * kills, "the run ends before it can be killed: make it longer"
            if run.end() == {0}:
                break
        moments["saving" if run.is_saving() else "training" if run._checkpoints() else "starting"] += 1
    final = Run([*arguments, *restarts[starts % len(restarts)]], output, ranks)
    final.finish()
    return moments
