"""Packing on a local Ray of several workers: the same bytes as in one process, whatever happens to a worker."""

import importlib.util
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from packing import cli, cluster, folder, pack_dataset, verify_packed

datasets.disable_progress_bars()
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
PACK = {"max_sequence_length": 128, "overlong": "split", "seed": 3}
WRITE = cluster._write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_table() -> pa.Table:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 150, 2000)
    rows = np.split(rng.integers(0, 30_000, lengths.sum()).astype(np.int32), np.cumsum(lengths)[:-1])
    return pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32())), "name": [f"row {i}" for i in range(2000)]})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three files."""
    folder = tmp_path_factory.mktemp("source") / "tokens"
    datasets.Dataset(make_table()).save_to_disk(folder, num_shards=3)
    return datasets.load_from_disk(folder)


@pytest.fixture(autouse=True)
def many_shards(monkeypatch):
    monkeypatch.setattr("packing.dataset.SHARD_BYTES", 60_000)
    monkeypatch.setattr("packing.dataset.BATCH_TOKENS", 4096)


@pytest.fixture
def whole(source, tmp_path):
    """The bytes of every file, as one process writes them."""
    pack_dataset(source, **PACK, output=tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("data-*.arrow"))) > 8
    return contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def cluster_here():
    """A Ray of two CPUs, whose workers are processes."""
    import ray

    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]).strip(os.pathsep)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # Ray's of its own future
        patch.setenv("PYTHONPATH", path)  # workers find the functions below
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100_000_000,
            logging_level="ERROR",
            log_to_driver=False,
        )
    yield
    ray.shutdown()


def note_worker(source, key, task):
    notes = Path(task.folder).parent / "workers"
    notes.mkdir(exist_ok=True)
    (notes / f"{task.file} {os.getpid()}").touch()
    time.sleep(0.05)  # so that no worker has done all before the other has begun
    return WRITE(source, key, task)


@needs_ray
def test_the_same_bytes_as_one_process(cluster_here, source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_write", note_worker)
    pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert contents(tmp_path / "packed") == whole
    workers = {int(path.name.split()[1]) for path in (tmp_path / "workers").iterdir()}
    assert len(workers) == 2 and os.getpid() not in workers


@needs_ray
def test_a_source_in_memory_and_chosen_rows(cluster_here, tmp_path):
    chosen = datasets.Dataset(make_table()).shuffle(seed=1).select(range(500))
    pack_dataset(chosen, **PACK, output=tmp_path / "one")
    pack_dataset(chosen, **PACK, output=tmp_path / "packed", engine="ray")
    assert contents(tmp_path / "packed") == contents(tmp_path / "one")


def times(task, what: str) -> int:
    """How often this was asked, across processes: the first answer is 1."""
    marks = Path(task.folder).parent / what
    marks.mkdir(exist_ok=True)
    (marks / f"{time.time_ns()}").touch()
    return len(list(marks.iterdir()))


def die_in_the_middle(source, key, task):
    """The first time, the worker kills itself with a shard half written."""
    if task.file.startswith("data-00004") and times(task, "deaths") == 1:
        real, left = folder.write_bytes, [3]

        def write_bytes(descriptor, data):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor, data)

        folder.write_bytes = write_bytes
    return WRITE(source, key, task)


@needs_ray
def test_a_worker_that_is_killed_is_replaced(cluster_here, source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_write", die_in_the_middle)
    pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert len(list((tmp_path / "deaths").iterdir())) == 2
    assert contents(tmp_path / "packed") == whole  # and nothing beside them
    verification = verify_packed(tmp_path / "packed", source)
    assert verification.ok, str(verification)


def always_die(source, key, task):
    if task.file.startswith("data-00004"):
        os.kill(os.getpid(), signal.SIGKILL)
    return WRITE(source, key, task)


@needs_ray
def test_a_task_that_always_dies_ends_the_run_which_can_go_on(cluster_here, source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "RETRIES", 1)
    monkeypatch.setattr(cluster, "_write", always_die)
    with pytest.raises(ChildProcessError, match="a worker that wrote a shard died 2 times") as error:
        pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert any("run the same again to go on from there" in note for note in error.value.__notes__)
    assert not (tmp_path / "packed").exists()
    kept = contents(tmp_path / ".packed.partial")
    assert any(name.endswith(".arrow") for name in kept)
    monkeypatch.setattr(cluster, "_write", WRITE)
    pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert contents(tmp_path / "packed") == whole


def fail_at_first(source, key, task):
    if task.file.startswith("data-00002") and times(task, "failures") == 1:
        raise OSError(5, "Input/output error", task.file)
    return WRITE(source, key, task)


@needs_ray
def test_a_file_system_that_fails_for_a_moment(cluster_here, source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_write", fail_at_first)
    pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert len(list((tmp_path / "failures").iterdir())) == 2
    assert contents(tmp_path / "packed") == whole


@needs_ray
def test_a_machine_that_does_not_see_the_source(cluster_here, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "RETRIES", 0)
    monkeypatch.setattr("packing.dataset.column_prints", remove_after(tmp_path / "tokens"))
    datasets.Dataset(make_table()).save_to_disk(tmp_path / "tokens")
    with pytest.raises(OSError, match=r"the source cannot be opened: .*data-00000-of-00001\.arrow") as error:
        pack_dataset(datasets.load_from_disk(tmp_path / "tokens"), **PACK, output=tmp_path / "packed", engine="ray")
    assert any("every machine of the cluster must see the source" in note for note in error.value.__notes__)


def remove_after(tokens: Path):
    """The files go after they were read here: as on a machine that never had them."""
    from packing.fingerprint import column_prints

    def prints(dataset):
        found = column_prints(dataset)
        shutil.rmtree(tokens)
        return found

    return prints


@needs_ray
def test_the_command(cluster_here, source, tmp_path, capsys):
    source.save_to_disk(tmp_path / "tokens")
    options = ["--max-sequence-length", "128", "--overlong", "split"]
    assert cli.main([str(tmp_path / "tokens"), str(tmp_path / "one"), *options]) == 0
    assert cli.main([str(tmp_path / "tokens"), str(tmp_path / "ray"), *options, "--engine", "ray"]) == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


def test_what_an_engine_refuses(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "packed"
    with pytest.raises(ValueError, match="unknown engine='spark'; choose from processes, ray"):
        pack_dataset(source, **PACK, output=out, engine="spark")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'dataset-packing\[ray\]'"):
        pack_dataset(source, **PACK, output=out, engine="ray")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    with pytest.raises(ValueError, match="engine='ray' writes a folder; give output="):
        pack_dataset(source, **PACK, engine="ray")
    with pytest.raises(ValueError, match="num_proc=2 would be ignored: engine='ray' takes all CPUs"):
        pack_dataset(source, **PACK, output=out, engine="ray", num_proc=2)
    assert cli.main([str(tmp_path), "--plan-only", "--engine", "ray"]) == 2
    assert "--engine 'ray' would be ignored" in capsys.readouterr().err
    assert not out.exists()
