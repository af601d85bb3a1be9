"""Flipped bits in a packed folder's Arrow files: every reader refuses them or reads on; no process dies.

Arrow follows offsets of texts and lists wherever they lead, so each test runs in a child that may die.
"""

import os
import random

import datasets
import numpy as np
import pyarrow as pa
import pytest

from packing import EpochPacks, load_packed, pack_dataset, unpack_dataset, verify_packed

datasets.disable_progress_bars()
COUNT = 60
TEXTS = [f"text {i}" * (i % 4) for i in range(COUNT)]
COLUMNS = {
    "text": pa.array(TEXTS),
    "large text": pa.array(TEXTS, pa.large_string()),
    "bytes": pa.array([text.encode() for text in TEXTS]),
    "large bytes": pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    "texts with nulls": pa.array([text or None for text in TEXTS]),
    "list": pa.array([[i] * (i % 3) for i in range(COUNT)]),
    "large list": pa.array([[i] * (i % 3) for i in range(COUNT)], pa.large_list(pa.int64())),
    "list of texts": pa.array([[text] * (i % 3) for i, text in enumerate(TEXTS)]),
    "pair of texts": pa.array([[text, "b"] for text in TEXTS], pa.list_(pa.string(), 2)),
    "nested": pa.array([[[text]] * (i % 3) for i, text in enumerate(TEXTS)]),
    "struct": pa.array([{"a": text, "b": [i]} for i, text in enumerate(TEXTS)]),
    "structs": pa.array([[{"a": text}] * (i % 3) for i, text in enumerate(TEXTS)]),
    "text per token": pa.array([["x" * i] * (1 + i % 5) for i in range(COUNT)]),
}


def read_epochs(packed):
    epochs = EpochPacks(packed)
    for epoch in (0, 1):
        epochs.set_epoch(epoch)
        epochs.__getitems__(range(len(epochs))).to_pylist()


def open_folder(folder):
    """As a user may call it; errors of `datasets` for a head that it cannot read are not ours."""
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError("datasets does not open it") from error


READERS = {
    "EpochPacks": lambda folder: read_epochs(open_folder(folder)),
    "EpochPacks, shuffled": lambda folder: read_epochs(open_folder(folder).shuffle(seed=0)),
    "unpack_dataset": lambda folder: unpack_dataset(open_folder(folder)).to_list(),
    "load_packed": lambda folder: load_packed(folder).to_list(),
    "verify": verify_packed,
    "verify a dataset": lambda folder: verify_packed(open_folder(folder)),
    "verify a shuffled dataset": lambda folder: verify_packed(open_folder(folder).shuffle(seed=0)),
}


def packed_folder(column, folder):
    source = pa.table({"input_ids": pa.array([[i] * (1 + i % 5) for i in range(COUNT)]), "other": column})
    pack_dataset(datasets.Dataset(source), 16, output=folder)
    (shard,) = folder.glob("data-*.arrow")
    return shard


def survives(function) -> bool:
    """Whether a child that calls it ends without a signal and without an error."""
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def read_with_flips(folder, shard, flips):
    """ValueError and OSError are what a damaged file may raise."""
    whole = shard.read_bytes()
    for place, bit in flips:
        content = bytearray(whole)
        content[place] ^= 1 << bit
        shard.write_bytes(content)
        for name, read in READERS.items():
            try:
                read(folder)
            except (ValueError, OSError):
                assert not name.startswith("verify") or "dataset" in name
        shard.write_bytes(whole)


def offset_bytes(shard):
    """Where the shard has offsets and bitmaps, as opposed to numbers, texts and padding."""
    content = shard.read_bytes()
    with pa.memory_map(str(shard)) as file, pa.ipc.open_stream(file) as reader:
        table = reader.read_all()
        found = []
        for column in table.columns:
            for chunk in column.chunks:
                found += [buffer for buffer in chunk.buffers() if buffer is not None and buffer.size]
        base = min(buffer.address for buffer in found)
        first = content.index(next(b for b in found if b.address == base).to_pybytes()[:64])
        return [first + buffer.address - base + i for buffer in found for i in range(min(buffer.size, 64))]


@pytest.mark.parametrize("name", COLUMNS)
def test_no_flipped_bit_ends_a_reader(name, tmp_path):
    folder = tmp_path / "packed"
    shard = packed_folder(COLUMNS[name], folder)
    for read in READERS.values():
        read(folder)  # nothing is wrong yet; and all is compiled
    places, draw = offset_bytes(shard), random.Random(0)
    flips = [(draw.choice(places), draw.randrange(8)) for _ in range(6)]
    assert survives(lambda: read_with_flips(folder, shard, flips))


@pytest.mark.long
@pytest.mark.parametrize("name", COLUMNS)
def test_no_flipped_bit_anywhere_ends_a_reader(name, tmp_path):
    folder = tmp_path / "packed"
    shard = packed_folder(COLUMNS[name], folder)
    size, draw = shard.stat().st_size, random.Random(1)
    flips = [(draw.randrange(size), draw.randrange(8)) for _ in range(300)]
    flips += [(place, 7 - place % 3) for place in offset_bytes(shard)[::3]]
    assert survives(lambda: read_with_flips(folder, shard, flips))


def shard_with_far_text(folder):
    """The offset of one text leads a gigabyte away."""
    shard = packed_folder(pa.array([f"text number {i}" for i in range(COUNT)]), folder)
    order = np.concatenate(load_packed(folder)["sequence_indices"][:])
    offsets = np.cumsum([0, *(len(f"text number {i}") for i in order)], dtype=np.int32)
    content = shard.read_bytes()
    begin = content.index(offsets[:20].tobytes()) + 4 * 10
    shard.write_bytes(content[:begin] + np.int32(1 << 30).tobytes() + content[begin + 4 :])
    return shard


def test_the_column_is_named(tmp_path):
    shard = shard_with_far_text(tmp_path / "packed")

    def check():
        for read in (EpochPacks, unpack_dataset):
            with pytest.raises(ValueError, match="column 'other' is damaged in rows 0 to "):
                read(open_folder(tmp_path / "packed"))
        with pytest.raises(ValueError, match="column 'other' is damaged in rows 0 to "):
            load_packed(tmp_path / "packed")
        for packed in (open_folder(tmp_path / "packed"), open_folder(tmp_path / "packed").shuffle(seed=0)):
            assert any("cannot be read" in problem.what for problem in verify_packed(packed).problems)
        found = verify_packed(tmp_path / "packed").problems
        assert {problem.file for problem in found if problem.check == "files"} == {shard.name}

    assert survives(check)
