"""Packing that is killed, or whose disk fails: source and finished shards stay, and the next run completes them."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from packing import cli, pack_dataset
from packing.files.folder import partial_folder
from packing.files.hashed import write_bytes
from packing.store import writing
from packing.store.manifest import read_manifest

datasets.disable_progress_bars()
SHARD_BYTES = 60_000
PACK = {"max_sequence_length": 128, "overlong": "split", "seed": 3}


def make_source(folder: Path, first_token: int = 0) -> datasets.Dataset:
    """Three files of 1,000 rows, of up to 150 tokens each, with a column of strings."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 150, 3000)
    tokens = rng.integers(0, 30_000, lengths.sum()).astype(np.int32)
    tokens[0] = first_token
    rows = np.split(tokens, np.cumsum(lengths)[:-1])
    names = [f"row {i}" * (i % 5) for i in range(len(rows))]
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32())), "name": names})
    datasets.Dataset(table).save_to_disk(folder, num_shards=3)
    return datasets.load_from_disk(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "tokens")


@pytest.fixture(autouse=True)
def many_shards(monkeypatch):
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr("packing.store.contents.BATCH_TOKENS", 4096)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The bytes of every file of a packing that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "packed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("packing.store.contents.SHARD_BYTES", SHARD_BYTES)
        patch.setattr("packing.store.contents.BATCH_TOKENS", 4096)
        pack_dataset(source, **PACK, output=output)
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def pack(source, output: Path, **options):
    return pack_dataset(source, **{**PACK, **options}, output=output)


def finished_shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in partial_of(output).glob("data-*.arrow")}


def test_there_are_shards_to_lose(whole):
    assert sum(name.endswith(".arrow") for name in whole) > 10
    assert {"manifest.json", "state.json", "dataset_info.json"} < set(whole)


# Killed


def run_in_child(function, *arguments) -> int:
    """Fork, since everything is imported and compiled here; returns the child's process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    with contextlib.suppress(BaseException):
        function(*arguments)
        status = 0
    os._exit(status)


def kill_after(child: int, seconds: float) -> bool:
    """SIGKILL; returns whether the child was still running."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def duration(source, output: Path) -> float:
    begin = time.monotonic()
    child = run_in_child(pack, source, output)
    assert os.waitpid(child, 0)[1] == 0
    return time.monotonic() - begin


def kill_and_resume(source, whole, folder: Path, kills: int, seed: int, **options):
    """Kill a packing at random moments, so many times or until it is done; then let it end."""
    draw, seen, takes = random.Random(seed), [], 0.0
    for number in range(kills):
        output = folder / str(number)
        if number % 5 == 0:  # measure again, since other programs may run
            takes = duration(source, folder / f"timed {number}")
        killed = kill_after(run_in_child(pack, source, output), draw.uniform(0, takes))
        seen.append((killed, len(finished_shards(output))))
        assert not output.exists() or contents(output) == whole  # never half there
        if not output.exists():
            pack(source, output, **options)
        assert contents(output) == whole
        assert not partial_of(output).exists()
    return seen


def test_killed_at_random_moments(source, whole, tmp_path):
    seen = kill_and_resume(source, whole, tmp_path, 3, seed=0)
    assert len(seen) == 3


@pytest.mark.long
def test_killed_at_many_random_moments(source, whole, tmp_path):
    seen = kill_and_resume(source, whole, tmp_path, 40, seed=1)
    assert sum(killed for killed, _ in seen) >= 5  # how many come in time is chance
    assert len({shards for _, shards in seen}) > 1  # before, between and after shards


@pytest.mark.parametrize("where", ["write", "fsync", "rename", "unlink"])
def test_killed_at_every_kind_of_step(source, whole, tmp_path, where):
    """A child that kills itself at the n-th call, then again with another n; the last run is not disturbed."""
    calls = {"write": (1, 40, 90), "fsync": (1, 2, 21, 48), "rename": (1, 2, 20, 33), "unlink": (1, 12, 25)}[where]
    output = tmp_path / "packed"
    for number in calls:
        child = run_in_child(_die_at, where, number, source, output)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or output.exists()
    if not output.exists():
        pack(source, output)
    assert contents(output) == whole


def _die_at(where: str, number: int, source, output: Path) -> None:
    real, left = getattr(os, where), [number]

    def call(*arguments, **options):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(os, where, call)
    pack(source, output)


def test_killed_between_the_last_file_and_the_name(source, whole, tmp_path):
    output = tmp_path / "packed"
    os.waitpid(run_in_child(_die_before_the_name, source, output), 0)
    assert not output.exists()
    assert contents(partial_of(output)) == whole
    pack(source, output)
    assert contents(output) == whole


def _die_before_the_name(source, output: Path) -> None:
    real = os.rename

    def rename(old, new):
        if new == output:
            os.kill(os.getpid(), signal.SIGKILL)
        real(old, new)

    os.rename = rename  # type: ignore[assignment]
    pack(source, output)


def test_finished_shards_are_not_written_again(source, whole, tmp_path, monkeypatch):
    output = tmp_path / "packed"
    os.waitpid(run_in_child(_die_at, "rename", 13, source, output), 0)
    kept = finished_shards(output)
    assert len(kept) == 6  # the manifest, then a shard and its record each
    stamps = {path.name: path.stat().st_mtime_ns for path in partial_of(output).glob("data-*.arrow")}
    pack(source, output)
    assert contents(output) == whole
    again = [name for name, stamp in stamps.items() if (output / name).stat().st_mtime_ns != stamp]
    assert len(again) <= 1  # at most the one whose record was not there yet


def test_a_finished_shard_that_was_damaged_meanwhile_is_written_again(source, whole, tmp_path):
    output = tmp_path / "packed"
    os.waitpid(run_in_child(_die_at, "rename", 13, source, output), 0)
    shard = sorted(partial_of(output).glob("data-*.arrow"))[2]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    pack(source, output)
    assert contents(output) == whole


# Refused


def killed_half_way(source, output: Path) -> None:
    os.waitpid(run_in_child(_die_at, "rename", 13, source, output), 0)
    assert len(finished_shards(output)) == 6


OTHERWISE = {
    "max_sequence_length": (256, "max_sequence_length was 128 and is 256"),
    "max_sequences_per_pack": (3, "max_sequences_per_pack was None and is 3"),
    "packer": ("spfhp", "packer was 'optimal' and is 'spfhp'"),
    "overlong": ("truncate", "overlong was 'split' and is 'truncate'"),
    "seed": (4, "seed was 3 and is 4"),
    "pad_token_id": (99_999, "pad_token_id was None and is 99999"),
    "balance": (8, "balance was None and is 8"),
}


def test_other_options_are_refused(source, whole, tmp_path):
    output = tmp_path / "packed"
    killed_half_way(source, output)
    kept = contents(partial_of(output))
    for name, (value, message) in OTHERWISE.items():
        with pytest.raises(ValueError, match=f"cannot resume .*: {message}.*remove .*partial' to start over"):
            pack(source, output, **{name: value})
        assert {**contents(partial_of(output)), "lock": b""} == {**kept, "lock": b""}
    pack(source, output)
    assert contents(output) == whole


def test_another_source_is_refused(source, tmp_path):
    output = tmp_path / "packed"
    killed_half_way(source, output)
    changed = make_source(tmp_path / "changed", first_token=7)
    others = {
        "source's column 'input_ids' has changed": changed,
        "had 3,000 rows and has 2,999": source.select(range(2999)),
        "had the columns input_ids, name and has input_ids, title": source.rename_column("name", "title"),
        "source's column 'input_ids' has changed; the source's column 'name' has": source.shuffle(seed=0),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            pack(other, output)
    assert len(finished_shards(output)) == 6


def test_the_same_rows_stored_otherwise_are_the_same_source(source, whole, tmp_path):
    output = tmp_path / "packed"
    killed_half_way(source, output)
    shuffled = source.shuffle(seed=0)
    back = np.argsort(shuffled._indices.column(0).to_numpy())
    pack(shuffled.select(back), output)
    ours = contents(output)
    assert {name for name in whole if ours[name] != whole[name]} <= {"dataset_info.json", "manifest.json"}


def test_another_version_is_refused(source, tmp_path):
    output = tmp_path / "packed"
    killed_half_way(source, output)
    manifest = read_manifest(partial_of(output))
    manifest.versions["pyarrow"] = "1.0"
    manifest.write(partial_of(output))
    with pytest.raises(ValueError, match=r"pyarrow was '1\.0' and is "):
        pack(source, output)


def test_a_damaged_manifest_is_refused(source, tmp_path):
    output = tmp_path / "packed"
    killed_half_way(source, output)
    path = partial_of(output) / "manifest.json"
    sound = path.read_text()
    for damaged in (sound[:-30], sound.replace('"seed": 3', '"seed": 4'), "[]", json.dumps({"format": "another"})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json' is damaged.* remove "):
            pack(source, output)


def test_two_runs_at_once_are_refused(source, whole, tmp_path):
    output = tmp_path / "packed"
    killed_half_way(source, output)
    with pytest.raises(ZeroDivisionError), partial_folder(output):
        child = run_in_child(pack, source, output)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        with pytest.raises(
            BlockingIOError,
            match=r"another run \(process \d+ on .+\) is writing '.*packed\.partial'; wait for it, or stop it",
        ):
            pack(source, output)
        raise ZeroDivisionError
    pack(source, output)
    assert contents(output) == whole


# A disk that fails


def failing_write(number: int, code: int):
    left = [number]

    def write(descriptor, data):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(code, os.strerror(code))
        write_bytes(descriptor, data)

    return write


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails(source, whole, tmp_path, monkeypatch, code):
    output, before = tmp_path / "packed", contents(Path(source.cache_files[0]["filename"]).parent)
    with monkeypatch.context() as patch:
        patch.setattr("packing.files.hashed.write_bytes", failing_write(400, code))
        with pytest.raises(OSError, match=r"\.arrow") as caught:
            pack(source, output)
    assert caught.value.errno == code
    kept = finished_shards(output)
    (note,) = caught.value.__notes__
    assert f"{len(kept)} finished shards are kept in '{partial_of(output)}': run the same again" in note
    assert kept.items() < whole.items()
    assert not list(partial_of(output).glob("*.writing"))
    assert contents(Path(source.cache_files[0]["filename"]).parent) == before
    pack(source, output)
    assert contents(output) == whole


def test_a_write_that_fails_before_anything_is_finished_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr("packing.files.hashed.write_bytes", failing_write(5, errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        pack(source, tmp_path / "new" / "packed")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_grow(source, whole, tmp_path):
    """A real failure: in a child, the kernel refuses to let a file grow."""
    output = tmp_path / "packed"
    child = run_in_child(_pack_with_little_room, source, output, tmp_path / "error")
    assert os.waitpid(child, 0)[1] == 0
    assert "File too large" in (tmp_path / "error").read_text()
    assert not output.exists()
    pack(source, output)
    assert contents(output) == whole


def _pack_with_little_room(source, output: Path, error: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, limits[1]))
    try:
        pack(source, output)
    except OSError as caught:
        error.write_text(str(caught))


def test_a_disk_without_room_is_seen_before(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("packing.files.folder.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"1,\d\d\d,\d\d\d bytes are to be written, and 1,000 are free; make space"):
        pack(source, tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="choose another output, or make its folder writable"):
        pack(source, tmp_path / "file" / "packed")
    assert contents(tmp_path) == {"file": b"mine"}


def test_an_interrupt_says_how_to_go_on(source, whole, tmp_path, monkeypatch):
    calls, real = [], os.rename

    def rename(*arguments):
        calls.append(arguments)
        if len(calls) == 14:
            raise KeyboardInterrupt
        real(*arguments)

    output = tmp_path / "packed"
    with monkeypatch.context() as patch:
        patch.setattr("packing.files.folder.os.rename", rename)
        with pytest.raises(KeyboardInterrupt) as caught:
            pack(source, output)
    assert "6 finished shards are kept in" in caught.value.__notes__[0]
    pack(source, output)
    assert contents(output) == whole


# The command


@pytest.fixture
def two_splits(source, tmp_path):
    splits = {"train": source.select(range(2000)), "test": source.select(range(2000, 2500))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    arguments = [str(tmp_path / "splits"), str(tmp_path / "packed"), "--overlong", "truncate"]
    assert cli.main([*arguments[:1], str(tmp_path / "whole"), *arguments[2:]]) == 0
    return arguments


def interrupt_at(number: int):
    real, left = os.rename, [number]

    def rename(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(*arguments)

    return rename


@pytest.mark.parametrize("number", [3, 7, 14])
def test_an_interrupted_command_says_how_to_go_on_and_does(two_splits, tmp_path, capsys, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr("packing.files.folder.os.rename", interrupt_at(number))
        assert cli.main(two_splits) == 130
    error = capsys.readouterr().err
    if number == 3:  # two manifests, and no shard
        assert "pack-dataset: interrupted; nothing was written" in error
        assert not partial_of(tmp_path / "packed").exists()
    else:
        assert "finished shards are kept in" in error
        assert "run the same again to continue from there" in error
    assert not (tmp_path / "packed").exists()
    assert cli.main(two_splits) == 0
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_command_with_other_options_or_splits_is_refused(two_splits, source, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("packing.files.folder.os.rename", interrupt_at(7))
        assert cli.main(two_splits) == 130
    assert cli.main([*two_splits, "--seed", "5"]) == 2
    assert "cannot resume the packing in " in (error := capsys.readouterr().err)
    assert ": seed was 0 and is 5; give the options" in error
    source.save_to_disk(tmp_path / "single")
    assert cli.main([str(tmp_path / "single"), *two_splits[1:]]) == 2
    assert "it had split 'test', split 'train', and now there is a dataset without splits" in capsys.readouterr().err
    assert cli.main(two_splits) == 0


def test_a_command_on_a_full_disk(two_splits, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("packing.files.hashed.write_bytes", failing_write(400, errno.ENOSPC))
        assert cli.main(two_splits) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device: '" in error
    assert ".arrow'; " in error
    assert "finished shards are kept in" in error
    assert cli.main([*two_splits, "--num-proc", "0"]) == 2
    assert "--num-proc 0 must be a whole number, at least 1" in capsys.readouterr().err
    assert cli.main(two_splits) == 0
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_damaged_source_is_named(two_splits, tmp_path, capsys):
    (damaged,) = (tmp_path / "splits" / "test").glob("*.arrow")
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    assert cli.main(two_splits) == 2
    assert f"pack-dataset: '{damaged}' is damaged: Expected to be able to read " in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


# Several processes


def test_any_number_of_processes_writes_the_same_bytes(source, whole, tmp_path):
    pack(source, tmp_path / "packed", num_proc=2)
    assert contents(tmp_path / "packed") == whole


def test_a_worker_that_is_killed_is_said(source, whole, tmp_path):
    def kill_one():
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(ChildProcessError, match="one of num_proc=2 processes died"):
        pack(source, tmp_path / "packed", num_proc=2)
    killer.join()
    pack(source, tmp_path / "packed")
    assert contents(tmp_path / "packed") == whole


def test_workers_end_with_a_run_that_is_killed(source, whole, tmp_path):
    output = tmp_path / "packed"
    child = run_in_child(_pack_slowly_by_two, source, output)
    while len(finished_shards(output)) < 2:
        time.sleep(0.01)
    workers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    assert len(workers) >= 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not output.exists()
    pack(source, output)
    assert contents(output) == whole
    until = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < until
        time.sleep(0.05)


def _pack_slowly_by_two(source, output: Path) -> None:
    """The process that collects the records is slow, so the workers wait for tasks when it is killed."""
    real = writing.shard_tasks

    def tasks(packing, folder):
        for number, task in enumerate(real(packing, folder)):
            time.sleep(0 if number < 4 else 600)
            yield task

    writing.shard_tasks = tasks
    pack(source, output, num_proc=2)
