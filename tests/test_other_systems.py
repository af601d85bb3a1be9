"""Nothing that only POSIX has is needed to import the packages, to lock, or to pack."""

import ast
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from packing.files import locks

ROOT = Path(__file__).parent.parent
FILES = [file for package in ("packing", "collate", "bert_pretrain") for file in sorted((ROOT / package).rglob("*.py"))]
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline"}
POSIX_NAMES = {"SIGUSR1", "SIGUSR2", "SIGKILL", "SIGHUP", "SIGALRM", "fork", "getuid", "geteuid", "getgid", "setsid"}
POSIX_NAMES |= {"killpg", "mkfifo", "nice", "uname", "fdatasync", "pread", "sched_getaffinity", "O_NOFOLLOW"}
POSIX_NAMES |= {"O_NONBLOCK", "O_DIRECTORY", "statvfs", "chown", "MAP_SHARED", "madvise"}


def test_no_module_or_name_of_posix_is_taken_for_granted():
    """Modules are imported where ImportError is caught; names are asked for by getattr, or after hasattr."""
    found = []
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        caught = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.Try) and any("ImportError" in ast.unparse(h.type or block) for h in block.handlers)
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in caught:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found += [(file.name, name) for name in names if name.split(".")[0] in POSIX_MODULES]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "signal", "mmap"):
                found += [(file.name, node.attr)] * (node.attr in POSIX_NAMES and f', "{node.attr}")' not in text)
    assert not found


WITHOUT = """
import sys, signal, os
for name in ("fcntl", "resource"):
    sys.modules[name] = None   # an import of it raises ModuleNotFoundError
for name in ("SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
import shutil
shutil._use_fd_functions = False   # as on Windows: the standard library itself uses these
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY"):
    delattr(os, name)
import types
import datasets   # before there is msvcrt: the standard library takes it for Windows then
locked = set()
def locking(descriptor, mode, count):
    assert os.lseek(descriptor, 0, os.SEEK_CUR) > 1 << 30   # behind all that is read
    number = os.fstat(descriptor).st_ino
    if number in locked:
        raise PermissionError(13, "Permission denied")
    locked.add(number)
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
import importlib, pkgutil
def import_all(*packages):
    for package in packages:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
"""

PACK = """
import_all("packing")
from packing import pack_dataset, verify_packed
source = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3], [4, 5, 6]]})
pack_dataset(source, 4, output=sys.argv[1])
assert verify_packed(sys.argv[1], source).ok
assert len(locked) == 1, locked
"""


def run_without_posix(code: str, *arguments: str, before: str = "") -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", before + WITHOUT + code, *arguments], check=True, env=environment, timeout=600
    )


def test_packing_without_posix(tmp_path):
    run_without_posix(PACK, str(tmp_path / "packed"))
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.long
def test_training_is_imported_without_posix():
    """Other libraries may import what they like before."""
    run_without_posix('import_all("collate", "bert_pretrain")', before="from transformers import Trainer, BertModel")


def test_a_lock_is_held_by_one_and_then_gone(tmp_path):
    path = tmp_path / "lock"
    with locks.held(path):
        with pytest.raises(BlockingIOError), locks.held(path):
            pass
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_is_taken_along_is_tried_again(tmp_path, monkeypatch):
    """Between opening and locking the file, its holder ends and removes it: the lock on it protects nothing."""
    path, real, calls = tmp_path / "lock", locks.lock, []

    def lock(descriptor, wait=False):
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        real(descriptor, wait)

    monkeypatch.setattr(locks, "lock", lock)
    with locks.held(path):
        assert len(calls) == 2
        with pytest.raises(BlockingIOError), locks.held(path):
            pass


def test_a_lock_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError), locks.held(tmp_path / name):
            pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_system_without_locks_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", None)
    with pytest.raises(OSError, match="no locks for files"), locks.held(tmp_path / "lock"):
        pass


def test_waiting_by_looking_again_and_again(tmp_path, monkeypatch):
    """As on Windows: msvcrt cannot wait."""
    answers = [OSError(13, "locked"), OSError(13, "locked"), None]

    def locking(descriptor, mode, count):
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "PAUSE", 0)
    monkeypatch.setattr(locks, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    with locks.held(tmp_path / "lock", wait=True):
        assert not answers
