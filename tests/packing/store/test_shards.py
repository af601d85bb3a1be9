"""The parts of packing in shards: rows found in any memory, fingerprints of content, shards that any process writes."""

import hashlib
import json
import pickle
import shutil
import tracemalloc
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import slow_rows
import xxhash

from packing import pack_dataset, packed_info
from packing.dataset import prepare_packing
from packing.files.folder import partial_folder
from packing.files.hashed import checksum
from packing.options import PackOptions
from packing.source.fingerprint import column_prints, combined_print
from packing.source.rows import open_columns
from packing.source.token_column import open_lists, read_lists
from packing.store.manifest import read_manifest
from packing.store.shards import write_shard
from packing.store.writing import finish, shard_tasks, start

datasets.disable_progress_bars()


def chunked(rows: list, type_: pa.DataType, cuts: list[int]) -> pa.ChunkedArray:
    bounds = [0, *cuts, len(rows)]
    return pa.chunked_array([pa.array(rows[a:b], type_) for a, b in pairwise(bounds)], type_)


# Where rows lie


@pytest.mark.parametrize("type_", [pa.list_(pa.int32()), pa.large_list(pa.int16())], ids=str)
@pytest.mark.parametrize("cuts", [[], [10, 20, 30], [1, 2, 37], [0, 0, 25, 25]], ids=str)
@pytest.mark.parametrize("chosen", [None, [5, 5, 39, 0]], ids=["all", "chosen"])
def test_rows_are_found_in_any_chunks(type_, cuts, chosen):
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 99, n).tolist() for n in draw.integers(1, 9, 40)]
    choice = None if chosen is None else np.array(chosen)
    column = read_lists("tokens", chunked(rows, type_, cuts), choice)
    expected = rows if chosen is None else [rows[i] for i in chosen]
    starts, lengths = column.find(np.arange(column.num_rows))
    numbers = column.numbers()
    assert [numbers[s : s + n].tolist() for s, n in zip(starts, lengths, strict=True)] == expected


def test_rows_of_a_sliced_list_of_fixed_size():
    whole = pa.array([[i, i + 1] for i in range(20)], pa.list_(pa.int64(), 2))
    column = read_lists("tokens", pa.chunked_array([whole[3:5], whole[7:7], whole[9:20]]), None)
    starts, lengths = column.find(np.array([0, 1, 2, 12]))
    assert column.numbers()[starts].tolist() == [3, 4, 9, 19]
    assert lengths.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("offsets", [[0, 2, 1, 4], [0, 2, 9, 4], [0, -3, 2, 4]], ids=str)
def test_damaged_offsets_are_refused(offsets):
    """Offsets as a flipped bit makes them; without a check they would lead anywhere in memory."""
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32))]
    damaged = pa.Array.from_buffers(pa.list_(pa.int64()), 3, buffers, children=[pa.array([1, 2, 3, 4])])
    column = open_lists("input_ids", pa.chunked_array([damaged]), None)
    assert (column.find(np.arange(3))[1] < 0).any()
    with pytest.raises(ValueError, match=r"column 'input_ids' in row [012] is damaged: its offsets lead out"):
        pack_dataset(datasets.Dataset(pa.table({"input_ids": damaged}), fingerprint="damaged"), 8)


def test_a_source_that_shrinks_while_it_is_packed_is_refused(tmp_path):
    long, short = (datasets.Dataset.from_dict({"input_ids": [[1] * n, [2, 3]]}) for n in (5, 4))
    packing = prepare_packing(long, PackOptions(max_sequence_length=8))
    (task,) = shard_tasks(packing, tmp_path)
    with pytest.raises(ValueError, match="row 0 of the source has fewer tokens than when packing began"):
        write_shard(open_columns(short, ("input_ids",)), task)
    assert list(tmp_path.iterdir()) == []


# Fingerprints

COLUMNS = {
    "input_ids": ([[1, 2, 3], [4], [5, 6], [7, 8, 9]], pa.list_(pa.int32())),
    "text": (["a", "bc", None, ""], pa.string()),
    "score": ([0.5, None, 2.0, 3.0], pa.float64()),
    "flag": ([True, False, True, None], pa.bool_()),
    "words": ([["x", None], [], None, ["yz"]], pa.list_(pa.string())),
    "boxes": ([[[1, 2]], [], [[3, 4], [5, 6]], [[0, 0]]], pa.list_(pa.list_(pa.int16()))),
    "meta": ([{"page": 1}, {"page": None}, None, {"page": 4}], pa.struct([("page", pa.int32())])),
    "nothing": ([None] * 4, pa.null()),
    "pair": ([[1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.float32(), 2)),
    "kind": (["p", "q", "p", "q"], pa.dictionary(pa.int8(), pa.string())),
}
CHANGES = {
    "input_ids": [[1, 2, 3], [4], [5, 7], [7, 8, 9]],
    "text": ["a", "b", "c", ""],
    "score": [0.5, 1.0, 2.0, 3.0],
    "flag": [True, False, True, False],
    "words": [["x", None], None, [], ["yz"]],
    "boxes": [[[1, 2]], [[3, 4]], [[5, 6]], [[0, 0]]],
    "meta": [{"page": 1}, None, {"page": None}, {"page": 4}],
    "pair": [[1, 2], [3, 4], [5, 6], [7, 9]],
    "kind": ["p", "q", "q", "q"],
}


def stored(name: str, rows: list) -> dict[str, datasets.Dataset]:
    """The same rows in several shapes of memory."""
    type_ = COLUMNS[name][1]
    one = pa.array(rows, type_)
    framed = pa.concat_arrays([one[2:], one, one[:1]])[2:6]  # a slice, with others around it
    tables = {
        "one chunk": pa.chunked_array([one]),
        "chunks": pa.chunked_array([one[:1], one[1:1], one[1:]]),
        "slice": pa.chunked_array([framed]),
    }
    kept = {shape: datasets.Dataset(pa.table({name: column})) for shape, column in tables.items()}
    backwards = datasets.Dataset(pa.table({name: pa.chunked_array([one.take(pa.array([3, 2, 1, 0]))])}))
    return {**kept, "chosen": backwards.select([3, 2, 1, 0])}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_fingerprint_follows_the_content_and_not_the_memory(name):
    prints = {shape: column_prints(dataset) for shape, dataset in stored(name, COLUMNS[name][0]).items()}
    assert set(prints.values()) == {prints["one chunk"]}
    if name in CHANGES:
        others = {column_prints(dataset) for dataset in stored(name, CHANGES[name]).values()}
        assert len(others) == 1
        assert others.isdisjoint(prints.values())


def test_a_fingerprint_knows_names_types_and_order():
    source = datasets.Dataset.from_dict({"a": [1, 2], "b": [1, 2]})
    others = [
        source,
        source.rename_column("a", "c"),
        source.cast_column("a", datasets.Value("int32")),
        source.select([1, 0]),
        source.select_columns(["b", "a"]),
    ]
    assert len({combined_print(column_prints(other)) for other in others}) == len(others)


def test_a_fingerprint_of_several_blocks(monkeypatch):
    rows = slow_rows.random_rows(0, 500, 20)
    source = datasets.Dataset.from_list(rows)
    whole = column_prints(source)
    shuffled = source.shuffle(seed=1)
    back = shuffled.select(np.argsort(shuffled._indices.column(0).to_numpy()))
    monkeypatch.setattr("packing.source.fingerprint.GATHERED_TOKENS", 100)
    assert column_prints(back) == whole
    monkeypatch.setattr("packing.source.fingerprint.BLOCK_ROWS", 64)
    blocks = column_prints(source)
    assert column_prints(back) == blocks != whole
    assert [b.bytes for b in blocks] >= [w.bytes for w in whole]


@pytest.mark.parametrize("empty", [0, 3, None], ids=["first", "later", "all"])
def test_a_fingerprint_of_chosen_rows_of_which_some_are_empty(empty):
    """Nothing is copied of an empty row, where rows lie apart."""
    rows = [[] if empty is None or i % 7 == empty else [i, i + 1] for i in range(200)]
    source = datasets.Dataset.from_dict({"tags": rows})
    order = np.random.default_rng(0).permutation(200)
    order[0], order[np.flatnonzero(order == 0)[0]] = 0, order[0]
    expected = column_prints(datasets.Dataset.from_dict({"tags": [rows[i] for i in order]}))
    assert column_prints(source.select(order)) == expected


# Shards and their manifest


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", 20_000)
    monkeypatch.setattr("packing.store.contents.BATCH_TOKENS", 1024)
    datasets.Dataset.from_list(slow_rows.random_rows(3, 900, 60)).save_to_disk(tmp_path / "source", num_shards=2)
    return datasets.load_from_disk(tmp_path / "source")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_engine_writes_the_same_bytes(source, tmp_path):
    """By hand, as a cluster would: the last shard first, in workers that get a pickle and open the source."""
    whole = pack_dataset(source, 64, overlong="truncate", output=tmp_path / "whole")
    assert len(whole.cache_files) > 5
    packing = prepare_packing(source, PackOptions(max_sequence_length=64, overlong="truncate"))
    with partial_folder(tmp_path / "packed") as folder:
        manifest = start(packing, folder)
        records = []
        for task in reversed(list(shard_tasks(packing, folder))):
            dataset, task = pickle.loads(pickle.dumps((source, task)))
            columns = open_columns(dataset, packing.facts.token_columns)
            records.insert(0, write_shard(columns, task))
            assert write_shard(columns, task) == records[0]  # again: nothing changes
        finish(packing, manifest, folder, records)
    assert files(tmp_path / "packed") == files(tmp_path / "whole")


def test_tasks_hold_indices_and_no_tokens(source, tmp_path):
    packing = prepare_packing(source, PackOptions(max_sequence_length=64))
    sizes = [len(pickle.dumps(task)) for task in shard_tasks(packing, tmp_path)]
    assert sum(sizes) < 2500 * len(sizes) + 20 * packing.facts.num_sequences  # a schema each, and indices


def test_shards_have_the_size_asked_for(source, tmp_path):
    pack_dataset(source, 64, output=tmp_path / "packed")
    sizes = [path.stat().st_size for path in (tmp_path / "packed").glob("*.arrow")]
    assert max(sizes) < 1.5 * 20_000  # a batch of so few packs has as much metadata as tokens
    assert min(sizes) > 0.7 * max(sizes)


def test_the_manifest_says_what_is_in_the_folder(source, tmp_path):
    packed = pack_dataset(source, 64, 3, output=tmp_path / "packed")
    manifest, info = read_manifest(tmp_path / "packed"), packed_info(packed)
    on_disk = {path.name for path in (tmp_path / "packed").iterdir()}
    assert on_disk == {"manifest.json", *manifest.files, *(shard.file for shard in manifest.shards)}
    for shard in manifest.shards:
        path = tmp_path / "packed" / shard.file
        rows = datasets.Dataset.from_file(str(path))
        found = len(rows), sum(map(len, rows["sequence_lengths"])), sum(map(len, rows["input_ids"]))
        assert (shard.packs, shard.sequences, shard.tokens) == found
        assert (shard.bytes, shard.xxh3) == (path.stat().st_size, xxhash.xxh3_128(path.read_bytes()).hexdigest())
    assert manifest.files == {name: checksum(tmp_path / "packed" / name) for name in manifest.files}
    assert (manifest.packs, manifest.sequences, manifest.tokens) == (
        info.num_packs,
        info.num_sequences,
        info.num_tokens,
    )
    assert (manifest.source_rows, manifest.source_columns) == (900, column_prints(source))
    assert manifest.parameters["max_sequences_per_pack"] == 3
    assert manifest.is_complete


def test_a_manifest_names_no_place_and_no_time(source, tmp_path):
    first = pack_dataset(source, 64, output=tmp_path / "one")
    shutil.copytree(tmp_path / "source", tmp_path / "elsewhere")
    pack_dataset(datasets.load_from_disk(tmp_path / "elsewhere"), 64, output=tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert str(tmp_path) not in (tmp_path / "one" / "manifest.json").read_text()
    assert first._fingerprint == datasets.load_from_disk(tmp_path / "two")._fingerprint


def test_any_flipped_bit_of_a_manifest_is_seen(tmp_path):
    pack_dataset(datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]}), 8, output=tmp_path / "packed")
    path = tmp_path / "packed" / "manifest.json"
    sound, digest = path.read_bytes(), hashlib.sha256(json.dumps(json.loads(path.read_text())).encode()).digest()
    for place in range(0, len(sound), 7):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            read_manifest(tmp_path / "packed")
        except ValueError:
            continue
        content = json.loads(path.read_text())  # white space alone may change unseen
        assert hashlib.sha256(json.dumps(content).encode()).digest() == digest


# Memory


def peak_bytes(folder: Path, sequences: int, longest: int) -> int:
    """Python's and NumPy's memory at the peak of pack_dataset, source and packs on disk."""
    lengths = np.random.default_rng(0).integers(1, longest, sequences)
    rows = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        pa.array(np.random.default_rng(1).integers(0, 9999, lengths.sum()).astype(np.int32)),
    )
    datasets.Dataset(pa.table({"input_ids": rows})).save_to_disk(folder / "source")
    source = datasets.load_from_disk(folder / "source")
    tracemalloc.start()
    try:
        pack_dataset(source, 128, packer="spfhp", output=folder / "packed")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_follows_sequences_and_not_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr("packing.store.contents.BATCH_TOKENS", 1 << 14)
    monkeypatch.setattr("packing.source.token_column.ROWS_AT_ONCE", 1 << 10)
    monkeypatch.setattr("packing.histogram.BLOCK", 1 << 10)
    peak_bytes(tmp_path / "warm", 1000, 20)
    few, longer, more = (
        peak_bytes(tmp_path / name, count, longest)
        for name, count, longest in (("few", 50_000, 12), ("longer", 50_000, 96), ("more", 200_000, 12))
    )
    assert longer - few < 1_000_000  # for 2.1 million more tokens, 8.6 MB
    assert (more - few) / 150_000 < 18  # 12 bytes a sequence, 4 a pack
