"""Where packs go: places that cannot take any, links, pipes and junk in the way, and who holds the lock."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from packing import cli, pack_dataset, unpack_dataset
from packing.files.folder import new_folder, partial_folder
from packing.files.locks import held, holder

datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def source():
    return datasets.Dataset.from_dict({"input_ids": [[1, 2], [3], [4, 5, 6]], "text": ["a", "b", "c"]})


def partial_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


UNWRITABLE = {
    "a file system that makes no folders": ("/proc/packed", "No such file"),
    "below such a one": ("/proc/new/packed", "No such file"),
    "another one": ("/sys/packed", ""),
    "a device in the path": ("/dev/null/packed", "Not a directory"),
    "a file in the path": ("{tmp}/file/new/packed", "Not a directory"),
    "a dangling link in the path": ("{tmp}/dangling/packed", ""),
    "a name that is too long": ("{tmp}/" + "x" * 300, "File name too long"),
    "a name that is too long with what is added": ("{tmp}/" + "x" * 250, "File name too long"),
    "links in a circle": ("{tmp}/circle/packed", ""),
}


@pytest.mark.parametrize(("output", "said"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_places_that_take_no_output(source, tmp_path, capsys, output, said):
    """One error that names the output and the cure, in both ways of writing; nothing is left."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = sorted(tmp_path.rglob("*"))
    output = output.format(tmp=tmp_path)
    packed = pack_dataset(source, 8)
    for write in (lambda: pack_dataset(source, 8, output=output), lambda: unpack_dataset(packed, output)):
        with pytest.raises(OSError, match=f"{said}.*; choose another output, or make its folder writable") as caught:
            write()
        assert output in str(caught.value)
    source.save_to_disk(tmp_path / "source")
    assert cli.main([str(tmp_path / "source"), output]) == 2
    assert "choose another output" in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*") if "source" not in path.parts) == before


def test_a_name_with_nul_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="has a NUL in its name"):
        pack_dataset(source, 8, output=f"{tmp_path}/a\0b")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_system_that_refuses_a_folder(source, tmp_path, monkeypatch, code):
    """Not writable, no space, a quota: tests may run as root, whom permissions do not stop."""
    real = os.open

    def refuse(path, flags, *arguments, **options):
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="choose another output, or make its folder writable") as caught:
        pack_dataset(source, 8, output=tmp_path / "new" / "packed")
    assert caught.value.errno == code
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_to_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("packing.files.folder.os.access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="choose another output, or make its folder writable"):
        pack_dataset("no dataset, which would be the next error", 8, output=tmp_path / "packed")


@pytest.mark.parametrize("to", ["a folder", "nothing"])
def test_a_partial_folder_that_is_a_link_is_refused(source, tmp_path, to):
    """Its target may belong to someone else."""
    elsewhere = tmp_path / "elsewhere"
    if to == "a folder":
        elsewhere.mkdir()
    partial_of(tmp_path / "packed").symlink_to(elsewhere)
    with pytest.raises(FileExistsError, match="it is a link, and would be followed; remove it"):
        pack_dataset(source, 8, output=tmp_path / "packed")
    assert not elsewhere.exists() or list(elsewhere.iterdir()) == []
    partial_of(tmp_path / "packed").unlink()
    pack_dataset(source, 8, output=tmp_path / "packed")


def test_a_lock_that_is_a_link_is_refused(source, tmp_path):
    tmp_path.joinpath(".packed.partial.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="choose another output"):
        pack_dataset(source, 8, output=tmp_path / "packed")
    assert not (tmp_path / "mine").exists()


def test_the_lock_is_held_until_the_folder_has_its_name(tmp_path, monkeypatch):
    """Another run at this moment would write into the folder that is being finished."""
    real, seen = os.rename, []

    def rename(old, new):
        for moment in ("before", "after"):
            with pytest.raises(BlockingIOError), held(tmp_path / ".packed.partial.lock"):
                pass
            if moment == "before":
                with pytest.raises(BlockingIOError, match=r"another run \(process .* is writing"), partial_folder(new):
                    pass
                real(old, new)
            seen.append(moment)

    monkeypatch.setattr("packing.files.folder.os.rename", rename)
    with partial_folder(tmp_path / "packed") as folder:
        (folder / "file").write_text("a")
    assert seen == ["before", "after"]
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["file"]


def test_an_error_leaves_nothing_of_either_kind(tmp_path):
    for make in (partial_folder, new_folder):
        with pytest.raises(ZeroDivisionError), make(tmp_path / "new" / "packed") as folder:
            (folder / "file").write_text("a")
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


def test_two_of_either_kind_are_refused_at_once_and_the_holder_is_named(tmp_path):
    """Otherwise prepare would find only at its end, hours later, that the folder is there."""
    for first in (partial_folder, new_folder):
        for second in (partial_folder, new_folder):
            with first(tmp_path / "out") as folder:
                (folder / "data-0").write_text("a")
                who = rf"another run \(process {os.getpid()} on .+\) is writing '.*out.*'; wait for it"
                with pytest.raises(BlockingIOError, match=who), second(tmp_path / "out"):
                    pass
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
            shutil.rmtree(tmp_path / "out")


HOLDS_AND_FORKS = """
import os, sys, time
from pathlib import Path
from packing.files.locks import held, holder
with held(Path(sys.argv[1])):
    if not os.fork():
        print("held", flush=True)  # by the worker, when it has let go
        sys.stdin.read()  # until the test ends
        os._exit(0)
    time.sleep(1000)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_that_outlives_its_parent_keeps_nobody_out(tmp_path):
    """Data loaders live on for seconds after a kill: only the parent holds the lock."""
    lock, command = tmp_path / "lock", [sys.executable, "-c", HOLDS_AND_FORKS, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), held(lock):
            pass
        assert holder(lock).startswith(f" (process {parent.pid} on ")
        parent.kill()
        parent.wait()
        with held(lock):
            assert holder(lock).startswith(f" (process {os.getpid()} on ")
        assert holder(lock) == ""


def started(source, output: Path) -> Path:
    """A partial folder with a finished shard, of a run that ended before its end."""
    partial = partial_of(output)
    shutil.copytree(output, partial)
    (partial / "state.json").unlink()
    shutil.rmtree(output)
    return partial


JUNK = {
    "a file": lambda place: place.joinpath("notes.txt").write_text("mine"),
    "a hidden file": lambda place: place.joinpath(".notes").write_text("mine"),
    "a shard of no such packing": lambda place: place.joinpath("data-00007-of-00008.arrow").write_text("mine"),
    "a folder": lambda place: place.joinpath("notes").mkdir(),
    "a link": lambda place: place.joinpath("link").symlink_to("/etc"),
    "a link by the name of a shard": lambda place: place.joinpath("data-00000-of-00001.record").symlink_to(
        "/etc/passwd"
    ),
    "a pipe by the name of a file": lambda place: os.mkfifo(place / "dataset_info.json.fifo"),
    "a pipe": lambda place: os.mkfifo(place / "state.json"),
}


@pytest.mark.parametrize("with_shards", [True, False])
@pytest.mark.parametrize("make", JUNK.values(), ids=JUNK)
def test_what_others_put_into_a_partial_folder_is_refused(source, tmp_path, make, with_shards):
    """A foreign file would become part of the output. It stays, and so do finished shards."""
    output = tmp_path / "packed"
    pack_dataset(source, 8, output=output)
    whole = {path.name: path.read_bytes() for path in output.iterdir()}
    partial = started(source, output)
    if not with_shards:
        for path in partial.iterdir():
            path.unlink()
    make(partial)
    (junk,) = {path.name for path in partial.iterdir()} - {*whole, "LICENSE"} or {"state.json"}
    before = sorted(partial.iterdir())
    with pytest.raises(FileExistsError, match=f"{junk}' was not put there by this packing.*; move it away"):
        pack_dataset(source, 8, output=output)
    assert sorted(partial.iterdir()) == before
    (partial / junk).rmdir() if junk == "notes" else (partial / junk).unlink()
    pack_dataset(source, 8, output=output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole


def test_what_lies_beside_splits_in_a_partial_folder_is_refused(source, tmp_path, capsys):
    datasets.DatasetDict(train=source, test=source).save_to_disk(tmp_path / "source")
    partial = partial_of(tmp_path / "packed")
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to(tmp_path)):
        for name in ("other", "train"):
            partial.mkdir()
            make(partial / name)
            expected = 0 if make == Path.mkdir and name == "train" else 2
            assert cli.main([str(tmp_path / "source"), str(tmp_path / "packed")]) == expected
            said = capsys.readouterr().err
            assert expected == 0 or f"{name}' was not put there by this packing" in said
            shutil.rmtree(partial if expected else tmp_path / "packed", ignore_errors=True)


def test_what_a_killed_run_was_writing_is_removed(source, tmp_path):
    partial = partial_of(tmp_path / "packed")
    partial.mkdir()
    (partial / ".data-00000-of-00001.arrow.0123456789abcdef.writing").write_text("half")
    pack_dataset(source, 8, output=tmp_path / "packed")
    assert not [path for path in (tmp_path / "packed").iterdir() if path.name.startswith(".")]
