"""Packing on a local Ray of several workers: the same bytes as in one process, whatever happens to a worker.

Workers import this file, so a replacement of cluster._read or cluster._write here runs in them.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from shelf import Shelf, fail

from packing import cli, pack_dataset, verify_packed
from packing.command import pack
from packing.dataset import prepare_packing
from packing.files import hashed
from packing.options import PackOptions
from packing.source import ranges
from packing.source.text import tokenize
from packing.store import cluster
from packing.text.outcome import DifferentTokens

datasets.disable_progress_bars()
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
PACK = {"max_sequence_length": 128, "overlong": "split", "seed": 3}
READ, WRITE, TOKENIZE = cluster._read, cluster._write, cluster._tokenize
ROWS = 20_000  # five blocks of a fingerprint: five ranges


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_table() -> pa.Table:
    rng = np.random.default_rng(0)
    lengths = np.append(rng.integers(1, 20, ROWS - 500), rng.integers(100, 150, 500))
    rows = np.split(rng.integers(0, 30_000, lengths.sum()).astype(np.int32), np.cumsum(lengths)[:-1])
    return pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32())), "name": [f"row {i}" for i in range(ROWS)]})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three files."""
    folder = tmp_path_factory.mktemp("source") / "tokens"
    datasets.Dataset(make_table()).save_to_disk(folder, num_shards=3)
    return datasets.load_from_disk(folder)


@pytest.fixture(autouse=True)
def many_shards_and_ranges(monkeypatch):
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", 200_000)
    monkeypatch.setattr("packing.store.contents.BATCH_TOKENS", 4096)
    monkeypatch.setattr("packing.source.ranges.RANGE_BYTES", 1)


@pytest.fixture
def whole(source, tmp_path):
    """The bytes of every file, as one process writes them."""
    pack_dataset(source, **PACK, output=tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("data-*.arrow"))) > 8
    return contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def cluster_here(tmp_path_factory):
    """A Ray of two CPUs, whose workers are processes. -> the folder of the file system shelf://, which they know"""
    import ray

    shelf = tmp_path_factory.mktemp("urls") / "shelf"
    shelf.mkdir()

    path = os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parents[3])])
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # Ray's of its own future
        patch.setenv("PYTHONPATH", path)  # workers find the functions below
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache of workers")))
        patch.setenv("FSSPEC_SHELF_ROOT", str(shelf))
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100_000_000,
            logging_level="ERROR",
            log_to_driver=False,
        )
    yield shelf
    ray.shutdown()


def times(notes: str | Path, what: str) -> int:
    """The number of calls so far, across processes: the first call returns 1."""
    marks = Path(notes) / what
    marks.mkdir(exist_ok=True)
    (marks / f"{time.time_ns()} {os.getpid()}").touch()
    return len(list(marks.iterdir()))


def workers(notes: Path, what: str) -> set[int]:
    return {int(path.name.split()[1]) for path in (notes / what).iterdir()}


def note_reader(notes, *arguments, **named):
    times(notes, "reads")
    time.sleep(0.3)  # so that no worker finishes everything before the other starts
    return READ(*arguments, **named)


def note_writer(source, key, task):
    times(Path(task.folder).parent, "writes")
    time.sleep(0.05)
    return WRITE(source, key, task)


@needs_ray
def test_the_same_bytes_as_one_process(cluster_here, source, whole, tmp_path, monkeypatch):
    """The driver reads no range and writes no shard."""
    monkeypatch.setattr(cluster, "_read", partial(note_reader, str(tmp_path)))
    monkeypatch.setattr(cluster, "_write", note_writer)
    for alone in (
        "packing.store.engines.column_prints",
        "packing.store.engines.read_checked",
        "packing.source.ranges.read_checked",
    ):
        monkeypatch.setattr(alone, None)
    pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert contents(tmp_path / "packed") == whole
    assert len(list((tmp_path / "reads").iterdir())) == 5
    assert os.getpid() not in workers(tmp_path, "reads")
    assert len(workers(tmp_path, "writes")) == 2 and os.getpid() not in workers(tmp_path, "writes")


@needs_ray
def test_packs_with_cohorts(cluster_here, source, tmp_path):
    cohorts = PACK | {"packer": "lpfhp", "cohort": 512}
    pack_dataset(source, **cohorts, output=tmp_path / "one")
    pack_dataset(source, **cohorts, output=tmp_path / "packed", engine="ray")
    assert contents(tmp_path / "packed") == contents(tmp_path / "one")


@needs_ray
def test_a_source_in_memory_and_chosen_rows(cluster_here, tmp_path):
    chosen = datasets.Dataset(make_table()).shuffle(seed=1).select(range(9000))
    pack_dataset(chosen, **PACK, output=tmp_path / "one")
    pack_dataset(chosen, **PACK, output=tmp_path / "packed", engine="ray")
    assert contents(tmp_path / "packed") == contents(tmp_path / "one")


def die_reading(notes, rows, source, key):
    """The worker kills itself the first time."""
    if rows.column("first")[0].as_py() == 8192 and times(notes, "deaths") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return READ(rows, source, key)


def die_writing(source, key, task):
    """The worker kills itself the first time, with a shard half written."""
    if task.file.startswith("data-00004") and times(Path(task.folder).parent, "deaths") == 1:
        real, left = hashed.write_bytes, [3]

        def write_bytes(descriptor, data):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor, data)

        hashed.write_bytes = write_bytes
    return WRITE(source, key, task)


@needs_ray
@pytest.mark.parametrize("what", ["reading", "writing"])
def test_a_worker_that_is_killed_is_replaced(cluster_here, source, whole, tmp_path, monkeypatch, what):
    if what == "reading":
        monkeypatch.setattr(cluster, "_read", partial(die_reading, str(tmp_path)))
    else:
        monkeypatch.setattr(cluster, "_write", die_writing)
    pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert len(workers(tmp_path, "deaths")) == 2
    assert contents(tmp_path / "packed") == whole  # and nothing beside them
    verification = verify_packed(tmp_path / "packed", source)
    assert verification.ok, str(verification)


def always_die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_the_fourth(source, key, task):
    return always_die() if task.file.startswith("data-00004") else WRITE(source, key, task)


def full_at_the_fourth(source, key, task):
    if task.file.startswith("data-00004"):
        raise OSError(28, "No space left on device", str(Path(task.folder) / task.file))
    return WRITE(source, key, task)


ENDS = {
    "a worker dies": (
        die_at_the_fourth,
        ChildProcessError,
        "a worker that wrote a shard died 2 times",
        {"engine": "ray"},
    ),
    "the disk is full": (full_at_the_fourth, OSError, r"No space left on device.*data-00004", {"num_proc": 2}),
}


@needs_ray
@pytest.mark.parametrize("name", ENDS)
def test_a_shard_that_always_fails_ends_the_run_which_any_engine_goes_on_with(
    cluster_here, source, whole, tmp_path, monkeypatch, name
):
    write, kind, said, other = ENDS[name]
    monkeypatch.setattr(cluster, "RETRIES", 1)
    monkeypatch.setattr(cluster, "_write", write)
    with pytest.raises(kind, match=said) as error:
        pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert any("run the same again to continue from there" in note for note in error.value.__notes__)
    assert not (tmp_path / "packed").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".packed.partial").glob("*.arrow")}
    assert kept
    monkeypatch.setattr(cluster, "_write", WRITE)
    pack_dataset(source, **PACK, output=tmp_path / "packed", **other)
    assert contents(tmp_path / "packed") == whole
    assert {name: (tmp_path / "packed" / name).stat().st_mtime_ns for name in kept} == kept  # not written again


@needs_ray
def test_a_reader_that_always_dies_ends_the_run(cluster_here, source, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "RETRIES", 0)
    monkeypatch.setattr(cluster, "_read", always_die)
    with pytest.raises(ChildProcessError, match="a worker that read the source died 1 times"):
        pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert list(tmp_path.iterdir()) == []


def read_at_last(notes, dataset, reading, first, end):
    """The file system fails the first time."""
    if first == 8192 and times(notes, "failures") == 1:
        raise OSError(5, "Input/output error")
    return ranges.read_range(dataset, reading, first, end)


def fail_reading(notes, rows, source, key):
    cluster.read_range = partial(read_at_last, notes)
    try:
        return READ(rows, source, key)
    finally:
        cluster.read_range = ranges.read_range


def fail_writing(source, key, task):
    if task.file.startswith("data-00002") and times(Path(task.folder).parent, "failures") == 1:
        raise OSError(5, "Input/output error", task.file)
    return WRITE(source, key, task)


@needs_ray
@pytest.mark.parametrize("what", ["reading", "writing"])
def test_a_file_system_that_fails_for_a_moment(cluster_here, source, whole, tmp_path, monkeypatch, what):
    if what == "reading":
        monkeypatch.setattr(cluster, "_read", partial(fail_reading, str(tmp_path)))
    else:
        monkeypatch.setattr(cluster, "_write", fail_writing)
    pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert len(list((tmp_path / "failures").iterdir())) == 2
    assert contents(tmp_path / "packed") == whole


def removed_after_reading(tokens: Path):
    def join(*arguments):
        found = ranges.join_ranges(*arguments)
        shutil.rmtree(tokens)
        return found

    return join


@needs_ray
@pytest.mark.parametrize("when", ["before it is read", "before it is written"])
def test_a_machine_that_does_not_see_the_source(cluster_here, tmp_path, monkeypatch, when):
    """The driver has opened the files before they are deleted, as on a machine that never had them."""
    monkeypatch.setattr(cluster, "RETRIES", 0)
    datasets.Dataset(make_table()).save_to_disk(tmp_path / "tokens")
    source = datasets.load_from_disk(tmp_path / "tokens")
    if when == "before it is read":
        shutil.rmtree(tmp_path / "tokens")
    else:
        monkeypatch.setattr("packing.store.engines.join_ranges", removed_after_reading(tmp_path / "tokens"))
    with pytest.raises(OSError, match=r"the source cannot be opened: .*data-00000-of-00001\.arrow") as error:
        pack_dataset(source, **PACK, output=tmp_path / "packed", engine="ray")
    assert any("every machine of the cluster must see the source" in note for note in error.value.__notes__)
    assert list(tmp_path.glob("*packed*")) == []


@needs_ray
def test_what_is_wrong_with_a_source_is_said_as_by_one_process(cluster_here, tmp_path):
    padded = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]] * 5000, "attention_mask": [[1, 1], [0]] * 5000})
    for engine in ("processes", "ray"):
        with pytest.raises(ValueError, match="row 1 is nothing but padding: attention_mask is 0 everywhere"):
            pack_dataset(padded, **PACK, output=tmp_path / "packed", engine=engine)


@needs_ray
def test_machines_convert_files_into_a_cache_of_their_own(cluster_here, source, tmp_path, monkeypatch):
    """Workers have their own cache, and the files that the driver converted are gone before they start."""
    source.to_parquet(tmp_path / "rows.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = ["--max-sequence-length", "128", "--overlong", "split"]
    assert cli.main(["rows.parquet", "one", *options]) == 0
    monkeypatch.setattr("packing.store.engines.row_ranges", removed_before(tmp_path / "cache"))
    assert cli.main(["rows.parquet", "packed", *options, "--engine", "ray"]) == 0
    assert contents(tmp_path / "packed") == contents(tmp_path / "one")


def shorter_source():
    return datasets.Dataset(make_table()).select(range(ROWS - 1))


def shuffled_source():
    return datasets.Dataset(make_table()).shuffle(seed=0)


def no_source():
    raise ValueError("'rows.parquet' cannot be converted")


OTHERS = {
    "shorter": (shorter_source, "another one on machine '.*': it has 19,999 rows of .*, and 20,000 of .* where"),
    "shuffled": (shuffled_source, "another one on machine '.*': its tokens are not those that it has where packing"),
    "none": (no_source, r"'rows\.parquet' cannot be converted"),
}


@needs_ray
@pytest.mark.parametrize("name", OTHERS)
def test_a_machine_that_sees_another_source(cluster_here, source, monkeypatch, name):
    opener, said = OTHERS[name]
    monkeypatch.setattr(cluster, "RETRIES", 0)
    with pytest.raises(OSError, match=f"the source cannot be read from row .*{said}") as error:
        prepare_packing(source, PackOptions(**PACK, engine="ray"), to_write=True, opener=opener)
    assert any("every machine of the cluster must see the source" in note for note in error.value.__notes__)


def test_how_workers_know_a_source(source):
    """Rows, types and some tokens tell a source; its place does not."""
    shared = cluster.SharedSource.of(source)
    assert len(shared.open()) == ROWS
    assert cluster.SharedSource.of(datasets.Dataset(make_table())).tokens == shared.tokens
    for opener, said in (OTHERS["shorter"], OTHERS["shuffled"]):
        with pytest.raises(OSError, match=said):
            cluster.SharedSource.of(source, opener).open()


def test_a_source_is_opened_from_any_folder(tmp_path, monkeypatch):
    """Workers are in a folder of their own."""
    (tmp_path / "rows-0.jsonl").write_text('{"input_ids": [1, 2]}\n')
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    openers = []
    for name in ("rows-0.jsonl", "*.jsonl", f"file://{tmp_path}/rows-0.jsonl", f"file://{tmp_path}/*.jsonl"):
        openers.append(pack.opener("", cli.make_parser().parse_args([name, "packed"])))
    monkeypatch.chdir("/")
    assert [opener().to_dict() for opener in openers] == [{"input_ids": [[1, 2]]}] * 4


def removed_before(cache: Path):
    def look(dataset):
        shutil.rmtree(cache)
        return ranges.row_ranges(dataset)

    return look


def see_shelf() -> None:
    """A worker of a user has the package of its file system installed; this one is registered."""
    fsspec.register_implementation("shelf", Shelf, clobber=True)


def read_from_shelf(rows, source, key):
    see_shelf()
    return READ(rows, source, key)


def write_to_shelf(source, key, task):
    see_shelf()
    if task.file.startswith("data-00003"):
        Shelf.at["put"] = Shelf.done["put"] + 1, fail_once
    return WRITE(source, key, task)


def fail_once() -> None:
    if times(Path(os.environ["FSSPEC_SHELF_ROOT"]).parent, "failures") == 1:  # in a worker
        fail()


@needs_ray
def test_from_url_to_url(cluster_here, source, whole, tmp_path, monkeypatch):
    """Workers copy the source to their own cache, and the file system fails for a moment."""
    root = cluster_here
    monkeypatch.setitem(fsspec.config.conf, "shelf", {"root": str(root)})
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(cluster, "_read", read_from_shelf)
    monkeypatch.setattr(cluster, "_write", write_to_shelf)
    see_shelf()
    (root / "bucket").mkdir()
    source.save_to_disk(root / "bucket" / "tokens", num_shards=2)
    options = ["--max-sequence-length", "128", "--overlong", "split", "--seed", "3", "--engine", "ray"]
    assert cli.main(["shelf://bucket/tokens", "shelf://bucket/packed", *options]) == 0
    assert len(list((root.parent / "failures").iterdir())) == 2
    assert contents(root / "bucket" / "packed") == whole


@needs_ray
def test_the_command(cluster_here, source, tmp_path, capsys):
    source.save_to_disk(tmp_path / "tokens")
    options = ["--max-sequence-length", "128", "--overlong", "split"]
    assert cli.main([str(tmp_path / "tokens"), str(tmp_path / "one"), *options]) == 0
    assert cli.main([str(tmp_path / "tokens"), str(tmp_path / "ray"), *options, "--engine", "ray"]) == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


ALONE = """
import sys, warnings
warnings.simplefilter("ignore")
from packing import cli
from packing.store import contents
contents.SHARD_BYTES = 200_000
contents.BATCH_TOKENS = 4096
sys.exit(cli.main(sys.argv[1:]))
"""


def ray_processes() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it has just ended
            continue
        if b"raylet" in command or b"gcs_server" in command or command.startswith(b"ray::"):
            found.add(int(path.parent.name))
    return found


@needs_ray
@pytest.mark.long
def test_the_command_alone_leaves_no_process_and_no_noise(source, whole, tmp_path):
    source.save_to_disk(tmp_path / "tokens")
    before = ray_processes()
    options = ["--max-sequence-length", "128", "--overlong", "split", "--seed", "3", "--engine", "ray"]
    command = [sys.executable, "-c", ALONE, str(tmp_path / "tokens"), str(tmp_path / "packed"), *options]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "packed") == whole
    assert done.stdout.startswith(f"{ROWS:,} rows") and done.stdout.endswith(f"written to {tmp_path / 'packed'}\n")
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert any(line.startswith("reading: 100%") for line in lines), done.stderr
    ours = ("reading:", "packing:", "197 of 20000 rows have more than 128 tokens")
    assert [line for line in lines if not line.startswith(ours)] == []
    end = time.monotonic() + 30
    while ray_processes() - before and time.monotonic() < end:
        time.sleep(0.2)
    assert ray_processes() - before == set()


def test_what_an_engine_refuses(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "packed"
    with pytest.raises(ValueError, match="unknown engine 'spark'; choose from processes, ray"):
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
    assert "--engine ray would be ignored" in capsys.readouterr().err
    assert not out.exists()


def tokenize_noted(source, key, task):
    """The worker kills itself the first time, with the third file half written."""
    notes = task.file.parents[3]
    times(notes, "tokenized")
    if task.file.name == "000002.arrow" and times(notes, "deaths") == 1:
        hashed.write_bytes = always_die
    time.sleep(0.1)
    return TOKENIZE(source, key, task)


@needs_ray
def test_workers_tokenize_texts(cluster_here, tokenizer, tmp_path, monkeypatch):
    """The driver tokenizes nothing, and a worker that is killed is replaced."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [f"w{i % 50} w{i % 7} w3" for i in range(ROWS)]
    datasets.Dataset.from_dict({"text": texts, "label": range(ROWS)}).save_to_disk(tmp_path / "texts")
    monkeypatch.setattr("packing.source.text.TASK_BYTES", 30_000)
    command = [str(tmp_path / "texts"), "--max-sequence-length", "128", "--tokenizer", str(tmp_path / "tokenizer")]
    for engine in ("processes", "ray"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache of {engine}")
        if engine == "ray":
            monkeypatch.setattr(cluster, "_tokenize", tokenize_noted)
            monkeypatch.setattr("packing.source.text.TokenizeRows._encoder", None)
        assert cli.main([command[0], str(tmp_path / engine), *command[1:], "--engine", engine]) == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "processes")
    assert contents(tmp_path / "cache of ray") == contents(tmp_path / "cache of processes")
    assert len(workers(tmp_path, "tokenized")) >= 2 and os.getpid() not in workers(tmp_path, "tokenized")
    assert len(workers(tmp_path, "deaths")) == 2


def differ(source, key, task):
    raise DifferentTokens("we must") if task.file.name.startswith("0") else OSError(2, "No such file", "cache")


@needs_ray
def test_what_workers_raise_about_texts(cluster_here, tokenizer, tmp_path, monkeypatch):
    """Different tokens begin anew text by text; a cache that a machine does not see ends the run, which says so."""
    monkeypatch.setattr(cluster, "RETRIES", 0)
    monkeypatch.setattr(cluster, "_tokenize", differ)
    said = []
    with pytest.raises(OSError, match="No such file") as error:
        tokenize(
            datasets.Dataset.from_dict({"text": ["w1"]}),
            tokenizer,
            ["text"],
            cache=tmp_path,
            run=cluster.tokenize_on_ray,
            say=said.append,
        )
    assert any("HF_DATASETS_CACHE" in note for note in error.value.__notes__)
    assert said == ["all texts are tokenized one by one, since " + str(DifferentTokens("we must"))]
