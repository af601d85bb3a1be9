"""Packing from and to URLs, in Arrow and in Parquet: the same packs and bytes as on this machine, whatever fails."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shelf import Shelf, die, fail

from packing import EpochPacks, cli, load_packed, pack_dataset, packed_info, unpack_dataset, verify_packed
from packing.files.paths import RemotePath, is_url, place
from packing.source.fingerprint import column_prints
from packing.source.open import open_split, open_splits
from packing.store.manifest import FILE, read_manifest
from packing.store.shards import write_shard

datasets.disable_progress_bars()
PACK = {"max_sequence_length": 128, "overlong": "split", "seed": 3}
FORMATS = ["arrow", "parquet"]
URL = "shelf://bucket/a/packed"


def make_table(rows: int = 900, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 150, rows)
    tokens = np.split(rng.integers(0, 30_000, lengths.sum()).astype(np.int32), np.cumsum(lengths)[:-1])
    names = [f"row {i}" * (i % 5) for i in range(rows)]
    return pa.table({"input_ids": pa.array(tokens, pa.list_(pa.int32())), "name": names})


def patch_sizes(patch) -> None:
    patch.setattr("packing.store.contents.SHARD_BYTES", 60_000)
    patch.setattr("packing.store.contents.BATCH_TOKENS", 4096)
    patch.setattr("packing.store.contents.ROW_GROUPS", 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tokens"
    datasets.Dataset(make_table()).save_to_disk(folder, num_shards=3)
    return datasets.load_from_disk(folder)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """format -> a folder of this machine that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch_sizes(patch)
        for format in FORMATS:
            pack_dataset(source, **PACK, output=folder / format, format=format)
    return {format: folder / format for format in FORMATS}


@pytest.fixture(autouse=True)
def shelf(tmp_path_factory, monkeypatch):
    """An empty bucket; its file system is known by the environment, as a real one's credentials are."""
    root, cache, temporary = (tmp_path_factory.mktemp(name) for name in ("shelf", "cache", "temporary"))
    (root / "bucket").mkdir()
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    monkeypatch.setitem(fsspec.config.conf, "shelf", {"root": str(root)})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    patch_sizes(monkeypatch)
    Shelf.forget()
    yield root / "bucket"
    Shelf.forget()
    fsspec.filesystem("memory").store.clear()
    assert list(temporary.glob("*.writing")) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def url_contents(url: str) -> dict[str, bytes]:
    fs, path = fsspec.url_to_fs(url)
    return {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in fs.find(path)}


def shards_of(found: dict) -> list[str]:
    return [name for name in found if re.search(r"data-\d+-of-\d+\.(arrow|parquet)$", name)]


def pack(source, output, **options):
    return pack_dataset(source, **{**PACK, **options}, output=output)


# URLs


def test_what_is_a_url(tmp_path):
    assert is_url("s3://bucket/a") and is_url("memory://a") and is_url("simplecache::s3://bucket/a")
    assert not is_url("file:///a") and not is_url("local:///a") and not is_url("/a") and not is_url("a:b/c")
    assert place(f"file://{tmp_path}/a") == tmp_path / "a" == place(str(tmp_path / "a"))
    folder = place("shelf://bucket/a/", {"root": "x"})
    assert (str(folder / "b.arrow"), (folder / "b.arrow").name) == ("shelf://bucket/a/b.arrow", "b.arrow")
    assert str((folder / "b.arrow").with_suffix(".record")) == "shelf://bucket/a/b.record"
    assert (folder / "").url == folder.url == (folder / "b").parent.url
    assert "x" not in repr(folder)  # options may be secret
    for wrong in ("memory://", "zip://a::s3://b/c"):
        with pytest.raises(ValueError, match="names no folder of one file system"):
            place(wrong)
    with pytest.raises(ValueError, match="was a URL before Path took a slash away; give the URL as a string"):
        place(Path("s3://bucket/packed"))
    with pytest.raises(ValueError, match="storage_options would be ignored"):
        place(tmp_path, {"key": "x"})


# The same packs


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("url", [URL, "memory://a/packed", "file://{}"])
def test_a_url_holds_the_bytes_of_a_local_folder(source, whole, tmp_path, url, format):
    url = url.format(tmp_path / "packed")
    returned = pack(source, url, format=format)
    assert (returned is None) == (format == "parquet" or is_url(url))
    expected = contents(whole[format])
    assert len(shards_of(expected)) > 4
    assert url_contents(url) == expected
    assert str(verify_packed(url, source)).endswith("verified: nothing is wrong")
    assert load_packed(url).to_dict() == datasets.load_from_disk(whole["arrow"]).to_dict()
    if format == "arrow":
        assert datasets.load_from_disk(url).data.equals(datasets.load_from_disk(whole["arrow"]).data)


def test_storage_options_reach_every_call(source, whole, shelf, monkeypatch):
    monkeypatch.delitem(fsspec.config.conf, "shelf")
    options = {"root": str(shelf.parent)}
    with pytest.raises(OSError, match=r"TypeError: .* missing .* 'root': 'shelf://bucket"):  # as the file system says
        pack(source, URL)
    pack(source, URL, storage_options=options)
    assert contents(shelf / "a" / "packed") == contents(whole["arrow"])
    assert verify_packed(URL, source, storage_options=options).ok
    assert load_packed(URL, options).num_rows == datasets.load_from_disk(URL, storage_options=options).num_rows
    for wrong in ({"storage_options": options}, {"format": "parquet"}):
        with pytest.raises(ValueError, match="are of an output; give output="):
            pack_dataset(source, **PACK, **wrong)


def test_a_loaded_parquet_folder_is_a_packed_dataset(source, whole):
    arrow = datasets.load_from_disk(whole["arrow"])
    assert len(list(whole["parquet"].glob("data-*.parquet"))) > 4
    by_files = datasets.load_dataset("parquet", data_files=str(whole["parquet"] / "*.parquet"), split="train")
    by_folder = datasets.load_dataset(str(whole["parquet"]), split="train")
    for loaded in (by_files, by_folder, load_packed(whole["parquet"])):
        assert loaded.to_dict() == arrow.to_dict()
        assert loaded.features.arrow_schema.types == arrow.features.arrow_schema.types
        assert packed_info(loaded) == packed_info(arrow)
        assert packed_info(loaded.shuffle(seed=0).select(range(3))) == packed_info(arrow)
        assert verify_packed(loaded, source).ok
    assert unpack_dataset(by_files).to_dict() == unpack_dataset(arrow).to_dict() == source.to_dict()
    ours, theirs = EpochPacks(by_files, seed=1), EpochPacks(arrow, seed=1)
    ours.set_epoch(2), theirs.set_epoch(2)
    assert ours.__getitems__([5, 0]).to_pydict() == theirs.__getitems__([5, 0]).to_pydict()


def test_training_takes_a_loaded_parquet_folder(pairs, tokenizer, tmp_path):
    import torch
    from transformers import BertConfig, BertForMaskedLM, TrainingArguments

    from collate import DataCollatorWithPacking, PackedTrainer

    rows = [{name: pair[name] for name in ("input_ids", "token_type_ids")} for pair in pairs]
    for format in FORMATS:
        pack_dataset(datasets.Dataset.from_list(rows), 32, output=tmp_path / format, format=format)
    parquet = datasets.load_dataset("parquet", data_files=str(tmp_path / "parquet" / "*.parquet"), split="train")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    losses = []
    for packed in (datasets.load_from_disk(tmp_path / "arrow"), parquet, EpochPacks(parquet)):
        torch.manual_seed(0)
        trainer = PackedTrainer(
            model=BertForMaskedLM(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)),
            args=TrainingArguments(
                output_dir=tmp_path / "run",
                max_steps=2,
                report_to=[],
                use_cpu=True,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=packed,
            data_collator=DataCollatorWithPacking(tokenizer, seed=0),
        )
        losses.append(trainer.train().training_loss)
        assert trainer._packed_info.num_sequences == len(rows)
    assert losses[0] == losses[1] == losses[2] > 0


def test_packings_of_parquet_are_not_joined(source, tmp_path):
    """As in Arrow, they are not: sequence_indices of two sources would be mixed up."""
    loaded = []
    for seed in (3, 4):
        pack(source, tmp_path / str(seed), format="parquet", seed=seed)
        loaded.append(load_packed(tmp_path / str(seed)))
    with pytest.raises(ValueError, match="sequence_lengths"):
        datasets.concatenate_datasets(loaded)
    several = datasets.load_dataset("parquet", data_files=str(tmp_path / "*" / "*.parquet"), split="train")
    with pytest.raises(ValueError, match="was given files of several packings"):
        packed_info(several)
    plain = datasets.load_dataset("parquet", data_files=str(tmp_path / "3" / "*.parquet"), split="train")
    assert packed_info(plain).seed == 3
    with pytest.raises(ValueError, match="this dataset was not packed"):
        packed_info(plain.remove_columns("sequence_lengths"))


def test_columns_of_every_kind_in_parquet(tmp_path):
    rows = range(40)
    tokens = [list(range(1, 2 + i % 7)) for i in rows]
    dataset = datasets.Dataset.from_dict(
        {
            "input_ids": tokens,
            "token_type_ids": [[0] * len(t) for t in tokens],
            "flags": [[i % 2 == 0 for i in t] for t in tokens],
            "weights": [[i / 3 for i in t] for t in tokens],
            "words": [[f"w{i}" for i in t] for t in tokens],
            "label": [i % 3 for i in rows],
            "nested": [{"name": f"n{i}", "values": list(range(i % 3))} for i in rows],
            "none": [None if i % 4 else "a" for i in rows],
        },
        features=datasets.Features(
            {
                "input_ids": datasets.LargeList(datasets.Value("uint16")),
                "token_type_ids": datasets.List(datasets.Value("int8")),
                "flags": datasets.List(datasets.Value("bool")),
                "weights": datasets.List(datasets.Value("float32")),
                "words": datasets.List(datasets.Value("large_string")),
                "label": datasets.ClassLabel(names=["low", "mid", "high"]),
                "nested": {"name": datasets.Value("string"), "values": datasets.List(datasets.Value("int16"))},
                "none": datasets.Value("string"),
            }
        ),
    )
    packed = {format: tmp_path / format for format in FORMATS}
    for format, folder in packed.items():
        pack_dataset(dataset, 16, output=folder, format=format)
        assert verify_packed(folder, dataset).ok
    arrow, parquet = (load_packed(folder) for folder in packed.values())
    assert parquet.to_dict() == arrow.to_dict()
    assert {**parquet.features, "sequence_lengths": None} == {**arrow.features, "sequence_lengths": None}
    assert unpack_dataset(parquet).to_dict() == dataset.to_dict()
    times = datasets.Dataset(pa.table({"input_ids": tokens, "when": pa.array([0] * 40, pa.time32("s"))}))
    with pytest.raises(ValueError, match=r"column 'when' holds .*, no type of Parquet: it would be .*time32\[ms\]"):
        pack_dataset(times, 16, output=tmp_path / "times", format="parquet")
    empty = datasets.Dataset(pa.table({"input_ids": tokens, "empty": pa.array([{}] * 40, pa.struct([]))}))
    with pytest.raises(ValueError, match=r"column 'empty' holds list<.*>, no type of Parquet: .*take format='arrow'"):
        pack_dataset(empty, 16, output=tmp_path / "empty", format="parquet")
    with pytest.raises(ValueError, match="unknown format 'csv'; choose from arrow, parquet"):
        pack_dataset(dataset, 16, output=tmp_path / "csv", format="csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == FORMATS


def test_row_groups_do_not_grow_with_the_dataset(whole):
    batch = read_manifest(whole["parquet"]).batch_packs
    for file in whole["parquet"].glob("*.parquet"):
        about = pq.ParquetFile(file).metadata
        groups = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        assert groups[:-1] == [batch] * (len(groups) - 1) and groups[-1] <= batch
    assert len(groups) > 1


# Killed


def run_in_child(function, *arguments, **options) -> int:
    """Fork, since everything is imported and compiled here. Returns the exit status; negative: a signal ended it."""
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            function(*arguments, **options)
            status = 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def pack_and_die(source, what: str, number: int, **options) -> None:
    Shelf.forget()
    Shelf.at = {what: (number, die)}
    pack(source, URL, **options)


@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_every_kind_of_step(source, whole, shelf, format):
    """A child that dies at the n-th call, then another at another call …; the last run is not disturbed."""
    expected, died = contents(whole[format]), 0
    shards = len(shards_of(expected))
    puts = 2 * shards + 3 + (format == "arrow")  # a shard and its record, two manifests, the files about the dataset
    steps = [("put", 1), ("putting", 2), ("has put", 3), ("putting", 3), ("putting", 4), ("put", 7)]
    steps += [("remove", n) for n in (1, shards)] + [("putting", n) for n in (1, 2, 3, shards + 2, shards + 3)]
    for what, number in steps:
        died += run_in_child(pack_and_die, source, what, number, format=format) == -signal.SIGKILL
        found = url_contents(URL)
        assert ("state.json" if format == "arrow" else "dataset_info.json") not in found or found == expected
        if format == "arrow" and found != expected:
            with pytest.raises(FileNotFoundError):
                datasets.load_from_disk(URL)
        if found == expected:
            break
        with pytest.raises((ValueError, FileNotFoundError), match=r"has not finished|no manifest|no packed"):
            load_packed(URL)
    assert died >= 10
    if found != expected:
        pack(source, URL, format=format)
    assert url_contents(URL) == expected
    # one that nothing disturbs, and its last put
    for file in url_contents(URL):
        (shelf / "a" / "packed" / file).unlink()
    Shelf.forget()
    pack(source, URL, format=format)
    assert Shelf.done["put"] == puts
    assert url_contents(URL) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_killed_before_the_last_file(source, whole, format):
    expected = contents(whole[format])
    puts = 2 * len(shards_of(expected)) + 3 + (format == "arrow")
    assert run_in_child(pack_and_die, source, "putting", puts, format=format) == -signal.SIGKILL
    last = "state.json" if format == "arrow" else "dataset_info.json"
    assert url_contents(URL) == {name: data for name, data in expected.items() if name != last}
    pack(source, URL, format=format)
    assert url_contents(URL) == expected


def kill_at_random(source, whole, shelf, kills: int, seed: int) -> int:
    draw, killed, takes = random.Random(seed), 0, 0.0
    for number in range(kills):
        url, format = f"{URL}-{number}", FORMATS[number % 2]
        if number % 6 < 2:
            begin = time.monotonic()
            assert run_in_child(pack, source, f"{url}-timed", format=format) == 0
            takes = time.monotonic() - begin
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                pack(source, url, format=format)
            os._exit(0)
        time.sleep(draw.uniform(0, takes))
        os.kill(child, signal.SIGKILL)
        died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        killed += died
        if died and url_contents(url) != contents(whole[format]):
            pack(source, url, format=format)
        assert url_contents(url) == contents(whole[format])
    return killed


def test_killed_at_random_moments(source, whole, shelf):
    kill_at_random(source, whole, shelf, 2, seed=0)  # this compares; whether the kills came in time is chance


@pytest.mark.long
def test_killed_at_many_random_moments(source, whole, shelf):
    assert kill_at_random(source, whole, shelf, 40, seed=1) >= 5  # how many come in time is chance


def begin_and_die(source, **options) -> dict[str, bytes]:
    """The manifest and three shards with their records, and a fourth without."""
    assert run_in_child(pack_and_die, source, "put", 9, **options) == -signal.SIGKILL
    Shelf.forget()
    found = url_contents(URL)
    assert len(shards_of(found)) == 4 and sum(name.endswith(".record") for name in found) == 3
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_finished_shards_are_not_put_again(source, whole, format):
    begin_and_die(source, format=format)
    pack(source, URL, format=format)
    shards = len(shards_of(contents(whole[format])))
    assert Shelf.done["put"] == 2 * (shards - 3) + 2 + (format == "arrow")
    assert url_contents(URL) == contents(whole[format])


def test_a_finished_shard_that_was_damaged_meanwhile_is_put_again(source, whole, shelf):
    found = begin_and_die(source)
    for number, name in enumerate(sorted(shards_of(found))[:3]):
        path = shelf / "a" / "packed" / name
        data = bytearray(path.read_bytes())
        if number == 0:
            data[len(data) // 2] ^= 1
        elif number == 1:
            del data[-1:]
        path.write_bytes(data) if number < 2 else path.unlink()
    pack(source, URL)
    assert url_contents(URL) == contents(whole["arrow"])


def test_what_a_killed_process_leaves_here_is_removed(source, whole):
    begin_and_die(source)
    temporary = Path(tempfile.gettempdir())
    assert len(list(temporary.glob("pack-dataset-*.writing"))) == 1  # the run died while it put this
    pack(source, URL)
    assert list(temporary.iterdir()) == []


# Refused


def test_other_options_sources_and_formats_are_refused(source, whole):
    kept = begin_and_die(source)
    changed = datasets.Dataset(make_table(seed=1).slice(0, 900))
    shorter = source.select(range(800))
    for other, options, message in (
        (source, {"seed": 4}, "seed was 3 and is 4"),
        (source, {"format": "parquet"}, "format was 'arrow' and is 'parquet'"),
        (changed, {}, "source's column 'input_ids' has changed"),
        (shorter, {}, "the source had 900 rows and has 800"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*or remove '{URL}' to start over"):
            pack(other, URL, **options)
        assert url_contents(URL) == kept
    pack(source, URL)
    assert url_contents(URL) == contents(whole["arrow"])


def test_a_folder_that_is_there_is_refused(source, shelf):
    pack(source, URL)
    found = url_contents(URL)
    with pytest.raises(FileExistsError, match=f"output '{URL}' exists already"):
        pack(source, URL)
    assert url_contents(URL) == found
    (shelf / "mine").mkdir()
    (shelf / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match=r"holds other files, 'thesis\.txt' for one"):
        pack(source, "shelf://bucket/mine")
    manifest = shelf / "a" / "packed" / FILE
    manifest.write_text(manifest.read_text().replace('"seed": 3', '"seed": 5'))
    with pytest.raises(ValueError, match=r"manifest\.json' is damaged.*remove 'shelf://"):
        pack(source, URL)
    with pytest.raises(ValueError, match="is a URL, and this is written to a folder of this machine"):
        unpack_dataset(datasets.load_from_disk(URL), "shelf://bucket/unpacked")


def test_a_source_beneath_which_packs_lie_is_not_overwritten(source, shelf):
    """Its files have the names that packs have."""
    source.save_to_disk(shelf / "data", num_shards=1)
    pack(source, "shelf://bucket/data/packed", seed=4)
    found = contents(shelf)
    with pytest.raises(FileExistsError, match=r"holds other files, 'data-00000-of-00001\.arrow' for one"):
        pack(source, "shelf://bucket/data")
    assert contents(shelf) == found


def test_an_object_that_stands_for_an_empty_folder_is_no_file(source, whole, shelf, monkeypatch):
    """The consoles of object stores make such objects."""
    put_sources(shelf)
    real = Shelf.find

    def find(self, path, detail=False, **options):
        name = f"{path.rstrip('/')}/"
        found = real(self, path, detail=True, **options) | {name: {"name": name, "type": "file", "size": 0}}
        return found if detail else list(found)

    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "find", find)
        assert open_split("shelf://bucket/many").num_rows == 900
        pack(source, URL)
    assert contents(shelf / "a" / "packed") == contents(whole["arrow"])


def test_a_started_packing_takes_no_other_splits(source, tmp_path):
    """Neither here nor at a URL."""
    Shelf.at = {"put": (4, fail)}
    source.save_to_disk(tmp_path / "train")
    datasets.DatasetDict({"train": source}).save_to_disk(tmp_path / "splits")
    assert cli.main([str(tmp_path / "splits"), URL, "--overlong", "split"]) == 2
    Shelf.forget()
    found = url_contents(URL)
    with pytest.raises(ValueError, match="it had split 'train', and now there is a dataset without splits"):
        pack(source, URL)
    assert url_contents(URL) == found


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(source, shelf, monkeypatch):
    """fsspec's own exists and find would say that there is nothing."""
    pack(source, URL)
    found = contents(shelf)

    def deny(self, *arguments, **options):
        raise PermissionError("AccessDenied")

    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "ls", deny)
        patch.setattr(Shelf, "info", deny)
        fs, path = fsspec.url_to_fs(URL)
        assert not fs.exists(path) and not fs.find(path)
        with pytest.raises(PermissionError, match="AccessDenied; the credentials"):
            pack(source, URL, seed=4)
        with pytest.raises(PermissionError, match="AccessDenied; the credentials"):
            place(URL).exists()
    assert contents(shelf) == found


@pytest.mark.parametrize("what", ["another one's", "not there"])
def test_another_run_that_writes_there_is_found(source, what, monkeypatch):
    """There is no lock: a run that overwrites or deletes a shard is noticed before the folder is finished."""
    from packing.store import engines

    def write_and_lose(columns, task, advance):
        record = write_shard(columns, task, advance)
        if task.file.startswith("data-00002"):
            shard = RemotePath(f"{task.folder}/{task.file}")
            if what == "not there":
                shard.unlink()
            else:
                (Path(fsspec.config.conf["shelf"]["root"]) / shard.with_suffix(".record").url[8:]).write_text(
                    json.dumps({**record.__dict__, "xxh3": "0" * 32})
                )
        return record

    monkeypatch.setattr(engines, "write_shard", write_and_lose)
    with pytest.raises(OSError, match=f"data-00002-of-.* was written, and is {what} in '{URL}'"):
        pack(source, URL)
    with pytest.raises(ValueError, match="has not finished"):
        load_packed(URL)


def test_memory_is_of_one_process(source):
    with pytest.raises(ValueError, match="'memory://packed' is in the memory of this process"):
        pack(source, "memory://packed", num_proc=2)


# A file system that fails


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("what", ["put", "putting"])
def test_a_put_that_fails(source, whole, what, format):
    Shelf.at = {what: (8, fail)}
    with pytest.raises(
        OSError, match=r"ShelfError: the shelf fell down: 'shelf://bucket/a/packed/data-00003-of-"
    ) as caught:
        pack(source, URL, format=format)
    note = f"3 finished shards are kept in '{URL}': run the same again to continue from there"
    assert [note in said for said in caught.value.__notes__] == [True]
    Shelf.forget()
    pack(source, URL, format=format)
    assert url_contents(URL) == contents(whole[format])


def test_a_run_that_fails_before_its_first_shard_says_what_is_left(source, tmp_path, capsys):
    source.save_to_disk(tmp_path / "tokens")
    Shelf.at = {"putting": (2, fail)}
    assert cli.main([str(tmp_path / "tokens"), URL, "--overlong", "split"]) == 2
    assert f"started in '{URL}': run the same again, or remove that folder" in capsys.readouterr().err
    assert list(url_contents(URL)) == [FILE]


def test_a_copy_that_fails_names_both_ends(shelf, tmp_path):
    put_sources(shelf)
    Shelf.at = {"get": (2, fail)}
    with pytest.raises(OSError, match=r"ShelfError: the shelf fell down: 'shelf://bucket/many \(copied into /.*CACHE"):
        open_split("shelf://bucket/many")


def test_a_put_that_loses_bytes(source, whole, monkeypatch):
    real, short = Shelf.put_file, []

    def put_short(self, lpath, rpath, **options):
        real(self, lpath, rpath, **options)
        if ".arrow" in rpath and not short:
            short.append(rpath)
            os.truncate(self._real(rpath), 1000)

    monkeypatch.setattr(Shelf, "put_file", put_short)
    with pytest.raises(OSError, match=r"1,000 of [\d,]+ bytes are there after the file was put: 'shelf://"):
        pack(source, URL)
    pack(source, URL)
    assert url_contents(URL) == contents(whole["arrow"])


def test_a_disk_here_that_is_full_is_named(source, monkeypatch):
    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("packing.files.hashed.write_bytes", full)
    with pytest.raises(OSError, match=r"No space left.*pack-dataset-.*\.writing for shelf://.*TMPDIR says where"):
        pack(source, URL)


def test_a_disk_here_without_locks_is_named(source, monkeypatch):
    def no_locks(descriptor, what):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(OSError, match=r"No locks available; temporary files want .* TMPDIR says .*pack-dataset-"):
        pack(source, URL)


def test_buckets_protocols_and_packages_that_are_not_there(source, shelf, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no such bucket or folder; make it first.*'shelf://bukcet/packed/"):
        pack(source, "shelf://bukcet/packed")
    (shelf / ".readonly").touch()
    with pytest.raises(PermissionError, match=r"AccessDenied; the credentials in the environment .* do not allow it"):
        pack(source, URL)
    assert not (shelf / "a").exists()
    with pytest.raises(ValueError, match="'shell://a/b': no file system is known as 'shell'"):
        pack(source, "shell://a/b")
    fsspec.register_implementation("nowhere", "no_such_package.fs.Nowhere", errtxt="Install it", clobber=True)
    with pytest.raises(ImportError, match=r"'nowhere://a/b' needs a package .* pip install no_such_package"):
        pack(source, "nowhere://a/b")
    source.save_to_disk(tmp_path / "tokens")
    for wrong in ("shell://a/b", "nowhere://a/b"):
        for arguments in ([wrong, "packed"], [str(tmp_path / "tokens"), wrong], ["verify", wrong]):
            assert cli.main(arguments) == 2
            assert capsys.readouterr().err.count("\n") == 1


def test_folders_are_made_where_a_file_system_wants_them(source, whole, tmp_path, monkeypatch):
    """sftp does, for one; Shelf above refuses to make a bucket."""

    class Drawer(Shelf):
        protocol = "drawer"
        root_marker = "/"

        def _real(self, path):
            return self.root / path.strip("/")

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + str(path).removeprefix("drawer://").strip("/")

        def info(self, path, **options):
            return {**super().info(path), "name": self._strip_protocol(path)}

        def put_file(self, lpath, rpath, **options):
            self._real(rpath).write_bytes(Path(lpath).read_bytes())

        def mkdir(self, path, create_parents=True, **options):
            self._real(path).mkdir(parents=create_parents)

    fsspec.register_implementation("drawer", Drawer, clobber=True)
    pack(source, "drawer://deep/er/packed", storage_options={"root": str(tmp_path)})
    assert contents(tmp_path / "deep" / "er" / "packed") == contents(whole["arrow"])


# Sources


def put_sources(shelf: Path) -> dict[str, str]:
    """The same rows at several URLs."""
    table = make_table()
    dataset = datasets.Dataset(table)
    dataset.save_to_disk(shelf / "saved", num_shards=2)
    for name in ("one", "many/_hidden", "many/deep"):
        (shelf / name).mkdir(parents=True)
    pq.write_table(table, shelf / "one" / "rows.parquet")
    pq.write_table(table, shelf / "many" / "_hidden" / "rows.parquet")
    (shelf / "many" / "thesis.txt").write_text("all of it")
    for number, (first, count) in enumerate([(0, 500), (500, 400)]):
        pq.write_table(table.slice(first, count), shelf / "many" / "deep" / f"part-{number}.parquet")
    dataset.to_json(shelf / "one" / "rows.jsonl")
    return {
        "file": "shelf://bucket/one/rows.parquet",
        "lines": "shelf://bucket/one/rows.jsonl",
        "saved": "shelf://bucket/saved",
        "folder": "shelf://bucket/many",
        "glob": "shelf://bucket/many/*/part-*.parquet",
    }


def test_sources_at_urls(source, whole, shelf, tmp_path):
    for name, url in put_sources(shelf).items():
        opened = open_split(url)
        assert opened.to_dict() == source.to_dict(), name
        got = Shelf.done["get"]
        assert open_split(url).to_dict() == source.to_dict()
        assert Shelf.done["get"] == got  # kept
        if name != "lines":  # whose numbers have 64 bits
            pack(opened, tmp_path / name)
            assert {f: d for f, d in contents(tmp_path / name).items() if f in shards_of(contents(whole["arrow"]))} == {
                f: d for f, d in contents(whole["arrow"]).items() if f.endswith(".arrow")
            }
    copied = {path.name for path in Path(datasets.config.HF_DATASETS_CACHE).rglob("*")}
    assert "thesis.txt" not in copied and "_hidden" not in copied


def test_a_source_that_has_changed_is_copied_again(shelf):
    pq.write_table(make_table(), shelf / "rows.parquet")
    before = column_prints(open_split("shelf://bucket/rows.parquet"))
    pq.write_table(make_table(seed=1), shelf / "rows.parquet")
    assert column_prints(open_split("shelf://bucket/rows.parquet")) != before


def test_a_copy_that_was_killed_goes_on(shelf):
    put_sources(shelf)

    def die_at_the_second_file():
        Shelf.at = {"getting": (1, die)}
        real = Shelf.get_file

        def get_file(self, rpath, lpath, **options):
            Path(lpath).write_bytes(b"half")
            if Shelf.done["get"] == 1:
                die()
            real(self, rpath, lpath, **options)

        Shelf.get_file = get_file
        open_split("shelf://bucket/many")

    assert run_in_child(die_at_the_second_file) == -signal.SIGKILL
    assert open_split("shelf://bucket/many").num_rows == 900
    assert Shelf.done["get"] == 1  # of two


def test_a_copy_that_loses_bytes(shelf, monkeypatch):
    """A file cut after a whole JSON line: nothing but its size tells."""
    lines = [json.dumps({"input_ids": [i]}) + "\n" for i in range(300)]
    (shelf / "rows.jsonl").write_text("".join(lines))
    real = Shelf.get_file

    def get_short(self, rpath, lpath, **options):
        real(self, rpath, lpath, **options)
        os.truncate(lpath, len("".join(lines[:200])))

    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "get_file", get_short)
        with pytest.raises(OSError, match=r"4,090 of 6,190 bytes of 'rows\.jsonl' have come: 'shelf://bucket/rows"):
            open_split("shelf://bucket/rows.jsonl")
    assert open_split("shelf://bucket/rows.jsonl").num_rows == 300


def test_a_source_that_changes_while_it_is_copied(shelf, monkeypatch):
    """Otherwise one file would be old, and one new."""
    (shelf / "many").mkdir()
    for number in range(2):
        (shelf / "many" / f"part-{number}.jsonl").write_text('{"input_ids": [1]}\n')
    real = Shelf.get_file

    def get_and_change(self, rpath, lpath, **options):
        real(self, rpath, lpath, **options)
        (shelf / "many" / "part-1.jsonl").write_text('{"input_ids": [2]}\n')

    with monkeypatch.context() as patch:
        patch.setattr(Shelf, "get_file", get_and_change)
        with pytest.raises(ValueError, match="'shelf://bucket/many' was changed while it was copied; start again once"):
            open_split("shelf://bucket/many")
    assert open_split("shelf://bucket/many").to_dict() == {"input_ids": [[1], [2]]}


def test_what_is_wrong_with_a_source_is_said_by_its_url(shelf, capsys, tmp_path):
    put_sources(shelf)
    damaged = shelf / "many" / "deep" / "part-1.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    (shelf / "one" / "rows.txt").write_text("1\n")
    for source, message in {
        "shelf://bucket/many": "'shelf://bucket/many/deep/part-1.parquet' cannot be read, it is damaged",
        "shelf://bucket/none/rows.parquet": "there is no file at 'shelf://bucket/none/rows.parquet'",
        "shelf://bucket/none/*.parquet": "'shelf://bucket/none/*.parquet' matches no file",
        "shelf://bucket/one": "files of several kinds, 'shelf://bucket/one/rows.jsonl' and",
        "shelf://bucket/one/rows.txt": "SOURCE 'shelf://bucket/one/rows.txt' holds texts; give what makes tokens",
    }.items():
        assert cli.main([source, str(tmp_path / "packed")]) == 2
        assert message in capsys.readouterr().err
    with (
        pytest.raises(OSError, match=r"TypeError: .* missing .* 'root': 'shelf://bucket/one"),
        pytest.MonkeyPatch.context() as p,
    ):
        p.delitem(fsspec.config.conf, "shelf")
        open_split("shelf://bucket/one")
    with pytest.raises(ValueError, match="has no split 'train'; it has ''"):
        open_split("shelf://bucket/saved", "train")
    assert open_splits(f"file://{shelf}/saved")[""].num_rows == 900


# Other processes


def write_elsewhere(root: str, cache: str, url: str, tasks: list) -> tuple:
    """The other process gets only these arguments."""
    from packing.source.rows import open_columns

    fsspec.register_implementation("shelf", Shelf, clobber=True)
    fsspec.config.conf["shelf"] = {"root": root}
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    opened = open_split(url)
    columns = open_columns(opened, ("input_ids",))
    return column_prints(opened), [write_shard(columns, task) for task in tasks]


def test_another_process_opens_and_writes_the_same(source, whole, shelf, tmp_path):
    from packing.dataset import prepare_packing
    from packing.options import PackOptions
    from packing.store.writing import finish, output_folder, shard_tasks, start

    source.save_to_disk(shelf / "tokens")
    packing = prepare_packing(open_split("shelf://bucket/tokens"), PackOptions(**PACK), to_write=True)
    with output_folder(URL) as folder, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        manifest = start(packing, folder)
        tasks = list(shard_tasks(packing, folder))
        arguments = str(shelf.parent), str(tmp_path / "cache"), "shelf://bucket/tokens", tasks
        prints, records = pool.submit(write_elsewhere, *arguments).result()
        finish(packing, manifest, folder, records)
    assert prints == column_prints(source)
    assert url_contents(URL) == contents(whole["arrow"])


# The command


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_from_url_to_url(shelf, tmp_path, capsys, format):
    table = make_table()
    splits = {"train": table.slice(0, 600), "test": table.slice(600)}
    (shelf / "data").mkdir()
    for name, part in splits.items():
        pq.write_table(part, shelf / "data" / f"{name}.parquet")
    options = ["--overlong", "split", "--format", format]
    assert cli.main([str(shelf / "data"), str(tmp_path / "packed"), *options]) == 0
    expected = contents(tmp_path / "packed")
    Shelf.at = {"putting": (8, fail)}
    command = ["shelf://bucket/data", URL, *options]
    assert cli.main(command) == 2
    assert f"3 finished shards are kept in '{URL}': run the same again" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        datasets.load_from_disk(URL)
    assert cli.main(["shelf://bucket/data/train.parquet", URL, *options]) == 2
    assert "it had split 'test', split 'train', and now there is a dataset without splits" in capsys.readouterr().err
    Shelf.forget()
    assert cli.main(command) == 0
    assert url_contents(URL) == expected
    assert cli.main(command) == 2
    assert f"output '{URL}' exists already" in capsys.readouterr().err
    assert cli.main(["verify", URL, "--source", "shelf://bucket/data"]) == 0
    assert capsys.readouterr().out.count("verified: nothing is wrong") == 2
    assert {name: len(packs) for name, packs in load_packed(URL).items()} == {
        name: len(packs) for name, packs in load_packed(tmp_path / "packed").items()
    }
    if format == "parquet":
        loaded = datasets.load_dataset(str(tmp_path / "packed"))
        assert loaded.num_rows == load_packed(tmp_path / "packed").num_rows
        loaded["test"].save_to_disk(tmp_path / "saved")
        for packs in (loaded["train"], loaded["test"].select([0]), datasets.load_from_disk(tmp_path / "saved")):
            with pytest.raises(ValueError, match=r"files of several packings, .* open the folder with load_packed"):
                packed_info(packs)  # of which it would be the first one's
    assert list(load_packed(URL)) == ["train", "test"]
    found = {name: packed_info(packs).source_rows for name, packs in load_packed(tmp_path / "packed").items()}
    assert found == {"train": 600, "test": 300}


def test_options_that_would_be_ignored(tmp_path, capsys):
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("length,count\n3,2\n")
    for work in ("--plan-only", "--compare"):
        assert cli.main([str(lengths), work, "--format", "parquet"]) == 2
        assert "--format parquet would be ignored" in capsys.readouterr().err


# Verify


@pytest.mark.parametrize("format", FORMATS)
def test_verify_finds_what_is_wrong_at_a_url(source, shelf, format, capsys):
    pack(source, URL, format=format)
    folder, draw = shelf / "a" / "packed", random.Random(0)
    for path in sorted(folder.iterdir()):
        sound = path.read_bytes()
        for damaged in (_flipped(sound, draw.randrange(len(sound)), 1 << draw.randrange(8)), sound[:-2], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            found = verify_packed(URL, source)
            assert any(path.name in str(problem) for problem in found.problems), (path.name, str(found))
        path.write_bytes(sound)
    assert verify_packed(URL, source).ok
    assert not verify_packed(URL, source.shuffle(seed=0)).ok
    (folder / "data-more").write_text("")
    assert cli.main(["verify", URL]) == 1
    assert "file data-more: does not belong here" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=f"'{URL}s' is not a folder"):
        verify_packed(f"{URL}s")


def _flipped(data: bytes, place: int, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[place] ^= bit
    return bytes(flipped)


def test_verify_of_parquet_without_its_manifest(source, whole, tmp_path):
    """Packs are still read, and the missing file is reported."""
    for path in whole["parquet"].iterdir():
        if path.name != FILE and not path.name.startswith("data-00001"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    found = verify_packed(tmp_path, source)
    assert found.counts["sequences"] > 0 and found.counts["source"] == 0
    assert any("manifest.json: is missing" in str(problem) for problem in found.problems)
