"""Sources that could mislead packing: damaged inside Arrow, changed during a run, too wide, of odd types."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest

from packing import cli, pack_dataset, unpack_dataset, verify_packed
from packing.store import contents, writing

IDS = [[1, 2, 3], [4, 5], [6]]
COLUMNS = {
    "text": pa.array(["ab", "cde", "f"]),
    "large text": pa.array(["ab", "cde", "f"], pa.large_string()),
    "bytes": pa.array([b"ab", b"cde", b"f"]),
    "list": pa.array([[1], [2, 3], []]),
    "list of text": pa.array([["ab"], ["cd", "e"], []]),
    "text per token": pa.array([["a", "b", "c"], ["d", "e"], ["f"]]),
    "struct": pa.array([{"name": "ab"}, {"name": "cde"}, {"name": "f"}]),
}


def damaged(array):
    """A file whose innermost texts or lists have offsets far beyond the values."""
    if pa.types.is_struct(array.type):
        return pa.StructArray.from_arrays([damaged(array.field(0))], fields=list(array.type))
    if pa.types.is_list(array.type) and not pa.types.is_integer(array.type.value_type):
        return pa.ListArray.from_arrays(array.offsets, damaged(array.values))
    _, offsets, *rest = array.buffers()[:3]
    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    moved = np.frombuffer(offsets, width).copy()
    moved[1] = 1 << 30
    if pa.types.is_list(array.type):
        return pa.Array.from_buffers(array.type, len(array), [None, pa.py_buffer(moved)], children=[array.values])
    return pa.Array.from_buffers(array.type, len(array), [None, pa.py_buffer(moved), *rest])


@pytest.mark.parametrize("name", COLUMNS)
def test_offsets_of_other_columns_that_lead_astray_are_found(name):
    """Arrow itself would follow them, out of the file's memory and to the end of the process."""
    sound, broken = (
        {"input_ids": pa.array(IDS), "other": column} for column in (COLUMNS[name], damaged(COLUMNS[name]))
    )
    assert len(pack_dataset(datasets.Dataset(pa.table(sound)), 8)) == 1
    chunks = pa.concat_tables([pa.table(sound), pa.table(broken)])
    with pytest.raises(ValueError, match="column 'other' is damaged in rows 3 to 5 of its files"):
        pack_dataset(datasets.Dataset(chunks, fingerprint="x"), 8)


def test_a_damaged_text_in_a_saved_source_is_named(tmp_path, capsys):
    """The command refuses it, too, even before it tokenizes."""
    texts = [f"text number {i}" for i in range(200)]
    ids = [[i] * (1 + i % 3) for i in range(200)]
    datasets.Dataset.from_dict({"input_ids": ids, "text": texts}).save_to_disk(tmp_path / "source")
    (path,) = (tmp_path / "source").glob("*.arrow")
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32).tobytes()
    content = path.read_bytes()
    begin = content.index(offsets) + 4 * 100
    path.write_bytes(content[:begin] + np.int32(1 << 30).tobytes() + content[begin + 4 :])
    assert cli.main([str(tmp_path / "source"), str(tmp_path / "packed")]) == 2
    assert "column 'text' is damaged in rows 0 to 199 of its files" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_damaged_features_of_a_saved_source_are_said(tmp_path, capsys):
    """The library's own errors would end the command with a traceback."""
    datasets.Dataset.from_dict({"input_ids": [[1, 2]] * 9}).save_to_disk(tmp_path / "source")
    info = tmp_path / "source" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"features": "input_ids"}))
    assert cli.main([str(tmp_path / "source"), "--plan-only"]) == 2
    assert "source' is damaged: 'str' object has no attribute" in capsys.readouterr().err


def test_views_of_texts_are_refused_with_the_cure():
    texts = pa.array(["a", "b", "c"]).cast(pa.string_view())
    dataset = datasets.Dataset(pa.table({"input_ids": pa.array(IDS), "text": texts}))
    with pytest.raises(ValueError, match=r"holds string_view, .*cast_column\('text', Value\('string'\)\)"):
        pack_dataset(dataset, 8)
    packed = pack_dataset(dataset.cast_column("text", datasets.Value("string")), 8)
    assert sorted(packed["text"][0]) == ["a", "b", "c"]


def test_a_transform_is_refused():
    """Packing reads the columns themselves."""
    dataset = datasets.Dataset.from_dict({"input_ids": IDS})
    with pytest.raises(ValueError, match="has a transform"):
        pack_dataset(dataset.with_transform(lambda rows: {"input_ids": [[9]] * len(rows["input_ids"])}), 8)
    assert len(pack_dataset(dataset.with_format("numpy"), 8)) == 1


def test_a_source_that_changes_while_it_is_packed_is_refused(tmp_path, monkeypatch):
    """The source changes in place after it was hashed: packs might mix old and new values."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 99, n).tolist() for n in rng.integers(1, 30, 2_000)]
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(tmp_path / "source")
    (path,) = (tmp_path / "source").glob("*.arrow")
    source = datasets.load_from_disk(tmp_path / "source")
    monkeypatch.setattr(contents, "SHARD_BYTES", 30_000)
    write = writing.write_packs

    def change_and_write(packing, *arguments):
        with path.open("r+b") as file:
            file.seek(-2_000, os.SEEK_END)
            file.write(b"\x01")
        return write(packing, *arguments)

    monkeypatch.setattr(writing, "write_packs", change_and_write)
    with pytest.raises(ValueError, match=r"of the source was changed while it was packed; remove .*\.packed\.partial"):
        pack_dataset(source, 64, output=tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("num_proc", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_source_that_is_cut_short_while_it_is_packed_is_refused(tmp_path, monkeypatch, num_proc):
    """Reading a mapped file beyond its end kills the process, so the test runs in a child."""
    ids = [[5 + i % 90] * (1 + i % 30) for i in range(40_000)]
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", CUT_SHORT, tmp_path / "source", tmp_path / "packed", str(num_proc)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of the source was changed while it was packed; remove" in done.stdout
    assert not (tmp_path / "packed").exists()


CUT_SHORT = """
import os, sys, time
from pathlib import Path
import datasets
from packing import pack_dataset
from packing.store import contents, writing
datasets.disable_progress_bars()
contents.SHARD_BYTES = 30_000
source, target, num_proc = sys.argv[1:]
(path,) = Path(source).glob("*.arrow")
write = writing.write_packs

def cut_and_write(packing, *arguments):
    time.sleep(0.05)
    os.truncate(path, 4096)
    return write(packing, *arguments)

if __name__ == "__main__":
    writing.write_packs = cut_and_write
    try:
        pack_dataset(datasets.load_from_disk(source), 64, output=target, num_proc=int(num_proc))
    except ValueError as error:
        print(error)
"""


def test_wide_columns_make_small_batches(tmp_path, monkeypatch):
    """An image a sequence would otherwise be gathered for half a million tokens at a time, more than Arrow can hold."""
    monkeypatch.setattr(contents, "BATCH_BYTES", 100_000)
    images = [bytes([i]) * 5_000 for i in range(200)]
    source = datasets.Dataset.from_dict({"input_ids": [[i, i] for i in range(200)], "image": images})
    packed = pack_dataset(source, 8, output=tmp_path / "packed")
    batches = packed.data.column("image").chunks
    assert sum(map(len, batches)) == 50 and 8 <= len(batches) <= 13
    assert max(batch.nbytes for batch in batches) < 110_000
    assert verify_packed(tmp_path / "packed", source).ok
    assert unpack_dataset(packed)["image"][:] == images
    in_memory = pack_dataset(source, 8)
    assert in_memory.to_list() == packed.to_list()
    assert in_memory.data.column("image").num_chunks == len(batches)
