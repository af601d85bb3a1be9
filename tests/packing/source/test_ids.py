"""A token id is an int32, at least 0: any other is refused with row and value, from any kind of source."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from packing import cli, pack_dataset, pack_stream
from packing.source.ranges import Reading, read_range

datasets.disable_progress_bars()

ROWS = [[5, 6, 7], [8], [9, 1, 2]]


def with_id(token, width="int64"):
    rows = [*ROWS, [3, token, 4]]
    return pa.table({"input_ids": pa.array(rows, pa.list_(getattr(pa, width)()))})


@pytest.mark.parametrize("token", [-1, -100, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_ids_that_are_none_are_refused_from_any_source(tmp_path, capsys, monkeypatch, token):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = with_id(token)
    said = rf"row 3 has the token id {token} \(its token 1\)"
    with pytest.raises(ValueError, match=said):
        pack_dataset(datasets.Dataset(table), 8)
    with pytest.raises(ValueError, match=said):
        pack_dataset(datasets.Dataset.from_dict({"input_ids": table.column(0).to_pylist()}), 8)
    with pytest.raises(ValueError, match=said):
        pack_stream(datasets.IterableDataset.from_generator(lambda: iter(table.to_pylist())), 8)
    with pytest.raises(ValueError, match=said):  # what a machine of a cluster reads
        raise ValueError(read_range(datasets.Dataset(table), Reading(None, None, False), 0, 4).error)
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    (tmp_path / "rows.json").write_text(json.dumps(table.to_pylist()))
    for name in ("rows.parquet", "rows.arrow", "rows.jsonl", "rows.json"):
        assert cli.main([str(tmp_path / name), str(tmp_path / "packed")]) == 2
        assert f"row 3 has the token id {token} (its token 1)" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("width", "token", "is_id"),
    [
        ("int8", 127, True),
        ("int8", -1, False),
        ("int16", 2**15 - 1, True),
        ("int16", -5, False),
        ("uint8", 255, True),
        ("uint16", 2**16 - 1, True),
        ("int32", 2**31 - 1, True),
        ("int32", -1, False),
        ("uint32", 2**31 - 1, True),
        ("uint32", 2**31, False),
        ("int64", 2**31 - 1, True),
        ("uint64", 2**64 - 1, False),
        ("uint64", 0, True),
    ],
)
def test_ids_of_every_width(width, token, is_id):
    dataset = datasets.Dataset(with_id(token, width))
    if is_id:
        packed = pack_dataset(dataset, 16)
        assert sorted(np.concatenate(packed["input_ids"][:]).tolist()) == sorted([5, 6, 7, 8, 9, 1, 2, 3, 4, token])
    else:
        with pytest.raises(ValueError, match=f"row 3 has the token id {token} "):
            pack_dataset(dataset, 16)


def test_what_is_padding_need_be_no_id():
    dataset = datasets.Dataset(with_id(7)).map(lambda row: {"input_ids": [*row["input_ids"], -1][:4]})
    assert -1 not in np.concatenate(pack_dataset(dataset, 16, pad_token_id=-1)["input_ids"][:])
    mask = [[token != -1 for token in row] for row in dataset["input_ids"]]
    masked = dataset.add_column("attention_mask", mask)
    assert -1 not in np.concatenate(pack_dataset(masked, 16)["input_ids"][:])
    chosen = datasets.Dataset(with_id(-1)).select([2, 0])  # the row itself is not packed
    assert len(pack_dataset(chosen, 16)) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_foreign_id_is_named_whatever_thread_finds_one(monkeypatch, threads):
    monkeypatch.setattr("numba.config.NUMBA_NUM_THREADS", threads)
    monkeypatch.setattr("packing.source.token_ids.ROWS_PER_THREAD", 4)
    tokens = np.ones(40, np.int64)
    for foreign, row in (([39], 13), ([38, 7], 2), ([0, 39], 0)):
        ids = tokens.copy()
        ids[foreign] = -1
        rows = np.split(ids, range(3, 40, 3))
        with pytest.raises(ValueError, match=rf"row {row} has the token id -1"):
            pack_dataset(datasets.Dataset.from_dict({"input_ids": rows}), 8)


@pytest.mark.parametrize("pad", [2**63, 10**30, -(10**30)])
def test_a_pad_token_of_more_than_64_bits_is_refused(pad):
    with pytest.raises(ValueError, match=rf"pad_token_id={pad} must be a whole number, -\(2\*\*63\) to 2\*\*63 - 1"):
        pack_dataset(datasets.Dataset.from_dict({"input_ids": ROWS}), 8, pad_token_id=pad)
