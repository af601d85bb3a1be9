"""The commands write the same bytes whatever the locale, time zone, umask, hash seed, TMPDIR and home they run in."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

WORDS = ["Häuser", "grüßen", "naïve", "東京", "река", "café", "the", "of", "and", "to", "be", "it", "go", "was", "ever"]


def another_file_system(path: Path) -> Path | None:
    """A folder to write to that no file of `path` can be renamed into."""
    folders = [folder for folder in (Path("/dev/shm"), Path.home()) if os.access(folder, os.W_OK)]
    return next((folder for folder in folders if folder.stat().st_dev != path.stat().st_dev), None)


@pytest.fixture
def elsewhere(tmp_path):
    """An unusual environment: ASCII by default, no home, TMPDIR on another file system where there is one."""
    home = tmp_path / "a file, no home"
    home.write_text("", encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "7"}
    environment |= {"TZ": "Pacific/Kiritimati", "HOME": str(home)}
    folder = another_file_system(tmp_path)
    if folder is None:
        yield environment
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        yield environment | {"TMPDIR": scratch}


def run(module, *arguments, folder, environment=None, umask=0o022):
    """Run the command in a new interpreter; returns what it prints."""
    path = os.pathsep.join(str(entry) for entry in sys.path if entry)
    ran = subprocess.run(
        [sys.executable, "-m", f"{module}.cli", *arguments],
        cwd=folder,
        env={**(os.environ if environment is None else environment), "PYTHONPATH": path},
        umask=umask,
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


def commands(folder, text, **surroundings):
    folder.mkdir()
    length = ["--max-sequence-length", "32"]
    run("bert_pretrain", "prepare", "--text", text, "--output", "prepared", *length, folder=folder, **surroundings)
    run("packing", "prepared", "packed", *length, folder=folder, **surroundings)
    run("packing", "verify", "packed", "--source", "prepared", folder=folder, **surroundings)


def files(folder):
    return {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_same_bytes_in_other_surroundings(tmp_path, elsewhere):
    lines = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) + "." for i in range(1, 90)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "words.txt").write_text("\n\n".join(lines), encoding="utf-8")
    commands(tmp_path / "here", tmp_path / "text")
    commands(tmp_path / "there", tmp_path / "text", environment=elsewhere, umask=0o077)
    here, there = files(tmp_path / "here"), files(tmp_path / "there")
    assert len(here) > 10 and list(here) == list(there)
    assert [name for name in here if here[name].read_bytes() != there[name].read_bytes()] == []
    # the umask decides who reads what is written, not mkstemp
    assert {file.stat().st_mode & 0o777 for file in here.values()} == {0o644}
    assert {file.stat().st_mode & 0o777 for file in there.values()} == {0o600}


def test_a_cache_that_cannot_be_written_is_named_with_its_cure(tmp_path, elsewhere):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [1, 2]}\n', encoding="utf-8")
    command = [sys.executable, "-m", "packing.cli", "rows.jsonl", "packed"]
    environment = {name: value for name, value in elsewhere.items() if not name.startswith(("HF_", "XDG_"))}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert f"{elsewhere['HOME']}/.cache/huggingface/datasets/pack-dataset" in line
    assert "set HF_DATASETS_CACHE to a folder that you can write to" in line
    assert not (tmp_path / "packed").exists()
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
