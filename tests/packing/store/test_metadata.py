"""What a packed folder says about itself, replaced by anything: verify finds it, loading opens nothing outside."""

import itertools
import json
import os
import shutil
import socket
import sys
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import xxhash

from packing import EpochPacks, cli, load_packed, pack_dataset, packed_info, unpack_dataset, verify_packed
from packing.files.cache import kept_rows
from packing.files.metadata import parse_json, read_json
from packing.files.names import checked_name, checked_path, file_in
from packing.files.saved import load_saved

datasets.disable_progress_bars()
NAMES: list[object] = [
    "../x",
    "/etc/passwd",
    "",
    ".",
    "..",
    "a/b",
    "a\\b",
    "a\0b",
    "C:a",
    "s3://bucket/a",
    "\ud800",
    "ä" * 200,
]
NAMES += [None, 1, True, [], {}, "a/../../b"]


def make_source(count=40):
    rows = {"input_ids": [[i] * (1 + i % 7) for i in range(count)], "text": [f"text {i}" for i in range(count)]}
    source = datasets.Dataset.from_dict(rows | {"label": [i % 3 for i in range(count)]})
    return source.cast_column("label", datasets.ClassLabel(names=["a", "b", "c"]))


@pytest.fixture(scope="module", params=["arrow", "parquet"])
def sound(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "packed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("packing.store.contents.SHARD_BYTES", 1500)
        patch.setattr("packing.store.contents.BATCH_TOKENS", 32)
        pack_dataset(make_source(), 16, output=folder, format=request.param)
    assert len(list(folder.glob("data-*"))) >= 2
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "packed"))


def edit(path, change):
    """Change a JSON file; change returns the new content, or None where it has changed it in place."""
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def recompute(folder):
    """Make the checksums right for the present files, as someone who changes a folder on purpose would."""
    content = json.loads((folder / "manifest.json").read_text())
    for name in content.get("files", {}) if isinstance(content.get("files"), dict) else ():
        if isinstance(name, str) and "\0" not in name and os.path.isfile(folder / name):
            content["files"][name] = xxhash.xxh3_128_hexdigest((folder / name).read_bytes())
    content.pop("checksum", None)
    digest = xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content | {"checksum": digest}))


FILES = [(form, name) for form in ("arrow", "parquet") for name in ("shard", "manifest.json", "dataset_info.json")]
FILES += [("arrow", "state.json")]  # Parquet has none


# Names


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match="'said by' names"):
        checked_name(name, "said by")
    if name != "a/b":
        with pytest.raises(ValueError, match="'said by' names"):
            checked_path(name, "said by")


def test_names_of_files():
    for name in ("data-00000-of-00001.arrow", "0", "b0", "train", "a b", "…", ".hidden", "x" * 255):
        assert checked_name(name, "x") == checked_path(name, "x") == name
    assert checked_path("global_step8/model.pt", "x") == "global_step8/model.pt"


def test_a_link_that_leads_out(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    (outside / "a").write_text("a")
    (folder / "a").write_text("a")
    (folder / "link out").symlink_to(outside / "a")
    (folder / "link in").symlink_to(folder / "a")
    (folder / "folder").symlink_to(outside)
    (folder / "circle").symlink_to(folder / "circle")
    (tmp_path / "way in").symlink_to(folder)
    assert file_in(folder, "link in", "x").read_text() == file_in(tmp_path / "way in", "a", "x").read_text() == "a"
    for name in ("link out", "folder/a"):
        with pytest.raises(ValueError, match="is a link that leads out of"):
            file_in(folder, name, "x")
    with pytest.raises((ValueError, OSError)):
        file_in(folder, "circle", "x")
    with pytest.raises(FileNotFoundError):
        file_in(folder, "b", "x")


# JSON


def test_json_of_any_depth_and_size(tmp_path, monkeypatch):
    assert parse_json("[" * 60 + "]" * 60, "it") is not None
    for depth in (70, 900, 2_000, 100_000):
        for opened, closed in (("[", "]"), ('{"a":', "}")):
            with pytest.raises(ValueError, match="it is damaged: it nests more than 64"):
                parse_json(opened * depth + "1" + closed * depth, "it")
    for text in (b"", b"{", b"\xff\xfe\xff", b'"\\ud8"', b"9" * 10_000):
        with pytest.raises(ValueError, match="it is damaged: it is no JSON"):
            parse_json(text, "it")
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    assert read_json(tmp_path / "a.json") == [1, 2, 3]
    monkeypatch.setattr("packing.files.metadata.MAX_BYTES", 8)
    with pytest.raises(ValueError, match="has 9 bytes, and 8 are read at most"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["manifest.json", "dataset_info.json", "state.json"])
@pytest.mark.parametrize("depth", [70, 900, 20_000])
def test_metadata_that_nests_deep(folder, name, depth):
    if (folder / name).exists():
        text = (folder / name).read_text()
        (folder / name).write_text(text[:1] + f'"deep": {"[" * depth}{"]" * depth}, ' + text[1:])
        found = verify_packed(folder).problems
        assert any(name in f"{problem.file} {problem.what}" for problem in found)
        with pytest.raises(ValueError, match="damaged"):
            load_packed(folder)


# What load_from_disk follows


def other_folder(tmp_path):
    return pack_dataset(make_source(30), 16, output=tmp_path / "other")


STATES = {
    "a shard left out": lambda files: files[1:],
    "a shard doubled": lambda files: [files[0], *files],
    "another order": lambda files: files[::-1],
    "no shard": lambda files: [],
    "a path outside": lambda files: [{"filename": "../other/data-00000-of-00001.arrow"}, *files[1:]],
    "an absolute path": lambda files: [{"filename": "/etc/passwd"}, *files[1:]],
    "no name": lambda files: [{}, *files[1:]],
    "no object": lambda files: [1, *files[1:]],
}


@pytest.mark.parametrize("sound", ["arrow"], indirect=True)  # Parquet has no state.json
@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_a_state_that_lists_other_files(folder, tmp_path, change):
    """With checksums that are right: load_from_disk would read what the manifest does not list."""
    other_folder(tmp_path)
    assert verify_packed(folder).ok
    edit(folder / "state.json", lambda state: state.update(_data_files=change(state["_data_files"])))
    recompute(folder)
    assert {problem.file for problem in verify_packed(folder).problems} == {"state.json"}
    with pytest.raises(ValueError, match=r"state\.json"):
        load_packed(folder)


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(name, str)], ids=repr)
def test_a_manifest_that_names_what_is_outside(folder, tmp_path, name):
    """A shard, or another file, with a name that leads outside: refused before anything is opened."""
    (tmp_path / "x").write_bytes(next(iter(folder.glob("data-*"))).read_bytes())
    for change in (
        lambda content: content["shards"][0].update(file=name),
        lambda content: content["files"].update({name: content["files"].pop("dataset_info.json")}),
    ):
        kept = (folder / "manifest.json").read_bytes()
        edit(folder / "manifest.json", change)
        recompute(folder)
        assert not verify_packed(folder).ok
        with pytest.raises(ValueError, match=r"which is no file|which no file can be called"):
            load_packed(folder)
        (folder / "manifest.json").write_bytes(kept)


@pytest.mark.parametrize(("sound", "which"), FILES, indirect=["sound"])
def test_files_that_are_links(folder, tmp_path, which):
    """A link out of the folder is refused, even to the same bytes; a link within it, or to it, works like a file."""
    shard = sorted(folder.glob("data-*"))[0] if which == "shard" else folder / which
    shard.rename(tmp_path / "moved")
    shard.symlink_to(tmp_path / "moved")
    found = verify_packed(folder)
    assert found.problems[0].file == shard.name
    assert "is a link that leads out of" in found.problems[0].what
    with pytest.raises(ValueError, match="is a link that leads out of"):
        load_packed(folder)
    shard.unlink()
    (tmp_path / "moved").rename(shard)
    (tmp_path / "way in").symlink_to(folder)
    assert verify_packed(tmp_path / "way in").ok
    assert load_packed(tmp_path / "way in").num_rows == load_packed(folder).num_rows


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device", "circle"])
@pytest.mark.parametrize(("sound", "which"), FILES, indirect=["sound"])
def test_what_is_no_file(folder, kind, which, capsys, monkeypatch):
    """Opening a pipe would wait for its writer forever."""
    path = sorted(folder.glob("data-*"))[0] if which == "shard" else folder / which
    path.unlink()
    monkeypatch.chdir(folder)  # a socket's path is short
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    else:
        {"pipe": os.mkfifo, "folder": os.mkdir}.get(kind, lambda path: None)(path)
        if kind in ("device", "circle"):
            path.symlink_to("/dev/zero" if kind == "device" else path)
    assert path.name in f"{[str(problem) for problem in verify_packed(folder).problems]}"
    assert cli.main(["verify", str(folder)]) == 1
    assert path.name in capsys.readouterr().out
    with pytest.raises((ValueError, OSError)):
        load_packed(folder)


def test_a_head_that_says_other_classes(folder):
    """The notes of `datasets` in each file: load_dataset trusts them for Parquet."""
    edit(folder / "dataset_info.json", lambda info: info["features"]["label"]["feature"].update(names=["x", "y", "z"]))
    recompute(folder)
    found = verify_packed(folder).problems
    assert {problem.column for problem in found} == {"label"}
    assert {problem.file for problem in found} == {path.name for path in folder.glob("data-*")}


# Splits


@pytest.fixture(scope="module")
def sound_splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    datasets.DatasetDict({name: make_source(20) for name in ("train", "test")}).save_to_disk(folder / "source")
    assert cli.main([str(folder / "source"), str(folder / "packed"), "--max-sequence-length", "16"]) == 0
    return folder / "packed"


@pytest.fixture
def splits(sound_splits, tmp_path):
    return Path(shutil.copytree(sound_splits, tmp_path / "splits"))


def test_splits_are_verified_by_the_command(splits, capsys):
    assert cli.main(["verify", str(splits)]) == 0
    assert set(load_packed(splits)) == {"train", "test"}


@pytest.mark.parametrize("name", [*NAMES, "nowhere", "test", "train"], ids=repr)
def test_split_names(splits, tmp_path, capsys, name):
    """A split that leads elsewhere, is missing or stands twice."""
    shutil.copytree(splits / "test", tmp_path / "x")
    (splits / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test", name]}))
    assert cli.main(["verify", str(splits)]) == 1
    assert "not verified" in capsys.readouterr().out
    with pytest.raises((ValueError, FileNotFoundError)):
        load_packed(splits)


DICTS = [None, 1, "x", [], {}, {"splits": None}, {"splits": []}, {"splits": "train"}, {"splits": {"train": 1}}]


@pytest.mark.parametrize("content", DICTS, ids=repr)
def test_a_list_of_splits_that_is_none(splits, capsys, content):
    (splits / "dataset_dict.json").write_text(json.dumps(content))
    assert cli.main(["verify", str(splits)]) == 1
    assert "dataset_dict.json' is damaged" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"dataset_dict\.json' is damaged"):
        load_packed(splits)


def test_a_split_left_out(splits, capsys):
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert cli.main(["verify", str(splits)]) == 1
    assert "belongs to packs that dataset_dict.json does not list" in capsys.readouterr().out


def test_a_dataset_beside_its_splits(splits, capsys):
    """load_from_disk would open that instead."""
    for file in (splits / "test").iterdir():
        shutil.copy(file, splits)
    assert cli.main(["verify", str(splits)]) == 1
    assert "state.json does not belong beside dataset_dict.json" in capsys.readouterr().out


def test_a_split_that_is_a_link(splits, tmp_path, capsys):
    (splits / "test").rename(tmp_path / "moved")
    (splits / "test").symlink_to(tmp_path / "moved")
    assert cli.main(["verify", str(splits)]) == 1
    assert "test: not verified: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="is a link that leads out of"):
        load_packed(splits)


# Sources, and packed datasets that save_to_disk wrote: names are names of files in the folder, too


def test_a_saved_folder_that_names_what_is_outside(tmp_path, capsys):
    make_source().save_to_disk(tmp_path / "outside")
    for name in NAMES:
        make_source().save_to_disk(tmp_path / "saved")
        edit(tmp_path / "saved" / "state.json", lambda state, name=name: state["_data_files"][0].update(filename=name))
        with pytest.raises(ValueError, match=r"state\.json' names"):
            load_saved(tmp_path / "saved")
        assert cli.main([str(tmp_path / "saved"), "--plan-only"]) == 2
        assert "state.json' names" in capsys.readouterr().err
        shutil.rmtree(tmp_path / "saved")
    datasets.DatasetDict(train=make_source()).save_to_disk(tmp_path / "splits")
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["../outside"]}')
    with pytest.raises(ValueError, match=r"dataset_dict\.json' names '\.\./outside'"):
        load_saved(tmp_path / "splits")


# Every value of every file, replaced by each of these

VALUES = [None, -1, 0, 10**9, 2**63, 1e308, "x", "", [], {}, [[[[]]]], {"a": {"b": 1}}, True]


def places_of(content, place=()):
    """The keys that lead to each value in a JSON document."""
    if place:
        yield place
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places_of(value, (*place, key))


def replaced(content, place, value):
    content = json.loads(json.dumps(content))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


PREFIX = "Packed by dataset-packing, format 1: "


def documents(folder):
    """(what to replace in, how to write it back) of each file, and of the packing facts in one of them."""
    for name in ("manifest.json", "dataset_info.json", "state.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            yield name, content, lambda content: content
    info = json.loads((folder / "dataset_info.json").read_text())
    facts = json.loads(info["description"].removeprefix(PREFIX))
    yield "dataset_info.json", facts, lambda facts: info | {"description": PREFIX + json.dumps(facts)}


def mutations(folder):
    for name, content, wrapped in documents(folder):
        for place, value in itertools.product(list(places_of(content)), VALUES):
            yield name, place, value, wrapped(replaced(content, place, value))


class Work:
    """Count function calls, and the peak of memory in bytes."""

    def __enter__(self):
        self.calls = 0
        tracemalloc.start()
        sys.setprofile(self._count)
        return self

    def _count(self, frame, event, argument):
        self.calls += event in ("call", "c_call")

    def __exit__(self, *exception):
        sys.setprofile(None)
        self.bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def check_mutations(folder, chosen):
    rows, facts = load_packed(folder).to_list(), packed_info(load_packed(folder))
    verify_packed(folder)
    with Work() as usual:
        assert verify_packed(folder).ok
    for name, place, value, content in chosen:
        kept = {path: path.read_bytes() for path in folder.iterdir()}
        (folder / name).write_text(json.dumps(content))
        assert not verify_packed(folder).ok or content == json.loads(kept[folder / name]), (name, place, value)
        recompute(folder)
        with Work() as work:
            ok = verify_packed(folder).ok
        assert work.calls < 5 * usual.calls and work.bytes < usual.bytes + (1 << 24), (name, place, value)
        try:
            loaded = load_packed(folder)
        except (ValueError, OSError):
            assert not ok, (name, place, value)
        else:
            assert not ok or (loaded.to_list() == rows and packed_info(loaded) == facts), (name, place, value)
        for path, content in kept.items():
            path.write_bytes(content)


def test_some_values_replaced(folder):
    check_mutations(folder, itertools.islice(mutations(folder), 0, None, 101))


@pytest.mark.long
def test_every_value_replaced(folder):
    check_mutations(folder, mutations(folder))


@pytest.mark.parametrize("rows", [10**9, 2**62])
def test_billions_of_rows_that_all_files_agree_on(folder, rows):
    """Facts and manifest agree, and the checksums are right: only what the shards can hold reveals the fault."""
    edit(folder / "manifest.json", lambda content: content.update(source_rows=rows, sequences=rows, tokens=rows))
    edit(
        folder / "manifest.json",
        lambda content: (
            [
                shard.update(sequences=rows * (i == 0), tokens=rows * (i == 0))
                for i, shard in enumerate(content["shards"])
            ]
            and None
        ),
    )
    info = json.loads((folder / "dataset_info.json").read_text())
    facts = json.loads(info["description"].removeprefix(PREFIX))
    facts |= {"source_rows": rows, "num_sequences": rows, "num_tokens": rows}
    info["description"] = PREFIX + json.dumps(facts)
    values = info["features"]["sequence_lengths"]["feature"]
    values |= {"id": info["description"]} if "id" in values else {}  # Parquet
    (folder / "dataset_info.json").write_text(json.dumps(info))
    recompute(folder)
    with Work() as work:
        found = verify_packed(folder).problems
    assert any(f"source_rows={rows:,} are more than" in problem.what for problem in found)
    assert work.bytes < 1 << 24


# Files at a URL


def test_an_archive_whose_names_lead_out_of_the_cache(tmp_path, monkeypatch):
    """A file system may list any name: copies stay inside the cache."""
    import zipfile

    from packing.files import local_copy

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("rows/../../../escaped.jsonl", "{}")
    with pytest.raises(ValueError, match="which is no file"):
        local_copy.local_copy(f"zip://rows::file://{tmp_path}/rows.zip")
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "a/b.arrow", ""])
def test_a_cache_whose_seal_names_what_is_outside(tmp_path, name):
    """The copy is made again; a file outside is not opened."""
    made = []

    def make(folder):
        made.append(folder)
        with pa.ipc.new_stream(str(folder / "rows.arrow"), pa.schema({"a": pa.int64()})) as writer:
            writer.write_table(pa.table({"a": [1, 2]}))

    kept_rows("key", make, tmp_path)
    shutil.copy(tmp_path / "key" / "rows.arrow", tmp_path / "outside.arrow")
    edit(tmp_path / "key" / "seal.json", lambda seal: {name: seal["rows.arrow"]})
    assert kept_rows("key", make, tmp_path)["a"][:] == [1, 2]
    assert len(made) == 2
    assert kept_rows("key", make, tmp_path)["a"][:] == [1, 2]
    assert len(made) == 2


# Unpacking


def test_facts_that_a_parquet_file_says_otherwise():
    """In the head of each file, and in dataset_info.json."""
    packed = pack_dataset(make_source(), 16)
    features = packed.features.copy()
    other = packed.info.description.replace('"seed": 0', '"seed": 1')
    features["sequence_lengths"] = datasets.List(datasets.Value("int32", id=other))
    packed.info.features = features
    with pytest.raises(ValueError, match="the packing facts of this dataset are two"):
        packed_info(packed)


@pytest.mark.parametrize("rows", [10**9, 2**60])
def test_unpacking_what_says_that_it_has_billions_of_rows(rows):
    """The work follows the rows that are there."""
    packed = pack_dataset(make_source(), 16)
    facts = json.loads(packed.info.description.removeprefix(PREFIX))
    facts |= {"source_rows": rows, "num_sequences": rows, "num_tokens": rows}
    packed.info.description = PREFIX + json.dumps(facts)
    with Work() as work, pytest.raises(ValueError, match=f"{rows - 40} source rows are not where .*, row 40 first"):
        unpack_dataset(packed)
    assert work.bytes < 1 << 24


FACTS = {
    "rows that were not counted": {"source_rows": 41},
    "more packs than sequences": {"num_packs": 41},
    "no length": {"max_sequence_length": 0},
    "a length of 64 bits": {"max_sequence_length": 2**40},
    "an unknown way": {"overlong": "shorten"},
    "rows twice": {"overlong_rows": [3, 3]},
    "a row that is not there": {"overlong_rows": [40]},
    "no tokens": {"token_columns": []},
    "a truth": {"num_packs": True},
    "a field of nobody": {"other": 1},
    "no object": None,
}


@pytest.mark.parametrize("changes", FACTS.values(), ids=FACTS)
def test_facts_that_cannot_be_true(changes):
    """Every reader refuses them."""
    packed = pack_dataset(make_source(), 16)
    facts = json.loads(packed.info.description.removeprefix(PREFIX))
    packed.info.description = PREFIX + json.dumps(changes and facts | changes)
    for read in (packed_info, EpochPacks, unpack_dataset, verify_packed):
        with pytest.raises(ValueError, match="packing facts"):
            read(packed)
