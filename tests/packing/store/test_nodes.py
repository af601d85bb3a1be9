"""Packing on several nodes of Ray: here they are several raylets of one machine, with a CPU and a store each."""

import importlib.util
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from packing import pack_dataset, verify_packed
from packing.store import cluster

datasets.disable_progress_bars()
PACK = {"max_sequence_length": 128, "seed": 3}
READ, WRITE = cluster._read, cluster._write
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]


@pytest.fixture(scope="module")
def nodes():
    """A head without a CPU for work, and three nodes with one each. -> the cluster"""
    import ray
    from ray.cluster_utils import Cluster

    path = os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parents[3])])
    store = {"object_store_memory": 80_000_000}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("PYTHONPATH", path)  # workers find the functions below
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
        for _ in range(3):
            made.add_node(num_cpus=1, **store)
        made.wait_for_nodes()
        ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


def note(folder: str | Path, what: str) -> int:
    """How often, and on which node. -> the count"""
    import ray

    notes = Path(folder) / what
    notes.mkdir(exist_ok=True)
    (notes / f"{time.time_ns()} {os.getpid()} {ray.get_runtime_context().get_node_id()}").touch()
    return len(list(notes.iterdir()))


def nodes_of(folder: Path, what: str) -> set[str]:
    return {path.name.split()[2] for path in (folder / what).iterdir()}


def read(folder, rows, source, key):
    note(folder, "reads")
    time.sleep(0.5)
    if rows.column("first")[0].as_py() == 8192 and note(folder, "reader deaths") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return READ(rows, source, key)


def write(source, key, task):
    folder = Path(task.folder).parent
    note(folder, "writes")
    time.sleep(0.1)
    if task.file.startswith("data-00004") and note(folder, "writer deaths") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return WRITE(source, key, task)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_source(folder: Path) -> datasets.Dataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 40_000)
    rows = pa.ListArray.from_arrays(
        pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32)),
        pa.array(rng.integers(0, 30_000, lengths.sum()).astype(np.int32)),
    )
    datasets.Dataset(pa.table({"input_ids": rows})).save_to_disk(folder, num_shards=3)
    return datasets.load_from_disk(folder)


def test_workers_on_several_nodes_of_which_two_die(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", 100_000)
    monkeypatch.setattr("packing.source.ranges.RANGE_BYTES", 1)
    source = make_source(tmp_path / "tokens")
    pack_dataset(source, **PACK, output=tmp_path / "one")
    pack_dataset(source, **PACK, output=tmp_path / "pool", num_proc=2)
    monkeypatch.setattr(cluster, "_read", partial(read, str(tmp_path)))
    monkeypatch.setattr(cluster, "_write", write)
    pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert len(nodes_of(tmp_path, "writes")) == 3 and len(nodes_of(tmp_path, "reads")) > 1
    for deaths in ("reader deaths", "writer deaths"):
        assert len(list((tmp_path / deaths).iterdir())) == 2  # and the second time it did not die
    assert contents(tmp_path / "packed") == contents(tmp_path / "one") == contents(tmp_path / "pool")
    verification = verify_packed(tmp_path / "packed", source)
    assert verification.ok, str(verification)


def test_a_node_that_is_lost_is_done_without(nodes, tmp_path, monkeypatch):
    """A machine is switched off while it writes: its raylet and all its workers end at once."""
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", 100_000)
    source = make_source(tmp_path / "tokens")
    pack_dataset(source, **PACK, output=tmp_path / "one")
    monkeypatch.setattr(cluster, "_write", write_slowly)
    lost, written = nodes.add_node(num_cpus=1, object_store_memory=80_000_000), []

    class Bar:
        def __init__(self, *arguments, desc="", **named):
            self.desc = desc

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def update(self, count):
            if self.desc == "packing":
                written.append(count)
                if len(written) == 1:
                    nodes.remove_node(lost, allow_graceful=False)

    monkeypatch.setattr("packing.store.writing.progress_bar", Bar)
    nodes.wait_for_nodes()
    pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert len(nodes_of(tmp_path, "writes")) == 4
    assert contents(tmp_path / "packed") == contents(tmp_path / "one")
    assert verify_packed(tmp_path / "packed", source).ok


def write_slowly(source, key, task):
    """Returns only when all four nodes have started."""
    folder, end = Path(task.folder).parent, time.monotonic() + 120
    note(folder, "writes")
    while len(nodes_of(folder, "writes")) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    return WRITE(source, key, task)
