"""EpochPacks: every epoch has each sequence exactly once, in packs of the same plan, in any process."""

import copy
import pickle
from collections import Counter
from itertools import pairwise
from operator import methodcaller

import datasets
import numpy as np
import pyarrow as pa
import pytest
import slow_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from selections import SELECTIONS, TOKEN_COLUMNS, make_dataset
from torch.utils.data import DataLoader

from packing import EpochPacks, pack_dataset, packed_info

datasets.disable_progress_bars()


def contents(packs):
    """How often each combination of lengths is packed."""
    return Counter(tuple(sorted(row["sequence_lengths"])) for row in packs)


def check_epoch(epochs, packed, source):
    """Row by row as packed from the source by plain Python; each sequence once; the stored plan."""
    rows = list(epochs)
    assert rows == slow_rows.pack_rows(source, TOKEN_COLUMNS, [row["sequence_indices"] for row in rows])
    assert sorted(i for row in rows for i in row["sequence_indices"]) == sorted(
        i for pack in packed["sequence_indices"] for i in pack
    )
    assert contents(rows) == contents(packed)
    return [row["sequence_indices"] for row in rows]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 60),
    longest=st.integers(2, 30),
    depth=st.none() | st.integers(1, 6),
    balance=st.none() | st.integers(1, 3),
    epoch=st.integers(0, 2**40),
)
def test_every_sequence_exactly_once_in_every_epoch(seed, count, longest, depth, balance, epoch):
    rows = slow_rows.random_rows(seed, count, longest)
    options = {"token_columns": sorted(TOKEN_COLUMNS), "pad_token_id": 0, "balance": balance}
    if balance is not None and count < 40 * balance:
        options.pop("balance")
    packed = pack_dataset(make_dataset(rows), 30, depth, seed=seed, **options)
    epochs = EpochPacks(packed, seed)
    assert len(epochs) == len(packed) and list(epochs) == packed.to_list()
    epochs.set_epoch(epoch)
    check_epoch(epochs, packed, rows)


def many(count=400):
    rows = slow_rows.random_rows(0, count, 30)
    return rows, pack_dataset(make_dataset(rows), 40, token_columns=sorted(TOKEN_COLUMNS))


def test_epochs_differ_and_follow_from_the_seed():
    rows, packed = many()
    epochs, others = EpochPacks(packed, 3), EpochPacks(packed, 3)
    drawn = []
    for epoch in range(4):
        epochs.set_epoch(epoch)
        drawn.append(check_epoch(epochs, packed, rows))
    for epoch in (2, 0, 3, 1):  # whatever came before
        others.set_epoch(epoch)
        assert [row["sequence_indices"] for row in others] == drawn[epoch]
    assert drawn[0] == packed["sequence_indices"][:]
    mates = [{frozenset(pack) for pack in packs if len(pack) > 1} for packs in drawn]
    assert all(len(a & b) < 0.1 * len(a) for i, a in enumerate(mates) for b in mates[:i])
    elsewhere = EpochPacks(packed, 4)
    elsewhere.set_epoch(1)
    assert [row["sequence_indices"] for row in elsewhere] != drawn[1]


@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
def test_any_choice_of_packs(select, tmp_path):
    """From a folder, of which some packs are chosen in some order: those sequences, and no others."""
    rows = slow_rows.random_rows(5, 700, 30)
    folder = tmp_path / "packed"
    pack_dataset(make_dataset(rows), 40, token_columns=sorted(TOKEN_COLUMNS), output=folder)
    packed = datasets.load_from_disk(str(folder))
    packed = packed.filter(lambda row: 1 in row["label"]) if select is SELECTIONS["filter"] else select(packed)
    epochs = EpochPacks(packed)
    assert list(epochs) == packed.to_list()
    epochs.set_epoch(1)
    check_epoch(epochs, packed, rows)


def test_shards_and_missing_values():
    """Several chunks; sequence-level values of which some are missing; lists with 64-bit offsets."""
    rows = [{"input_ids": [i % 7 + 1] * (i % 5 + 1), "answer": None if i % 3 else i, "name": str(i)} for i in range(90)]
    table = pack_dataset(datasets.Dataset.from_list(rows), 12).data.table
    parts = [table.slice(0, 7), table.slice(7, 9), table.slice(16)]
    packed = pack_dataset(datasets.Dataset.from_list(rows), 12)
    packed = datasets.Dataset(pa.concat_tables(parts), info=packed.info)
    epochs = EpochPacks(packed)
    epochs.set_epoch(1)
    for row in epochs:
        for name in ("answer", "name"):
            assert row[name] == [rows[i][name] for i in row["sequence_indices"]]
    assert epochs.__getitems__([2, 0]).schema.types == packed.data.schema.types


def test_facts_and_lengths():
    _, packed = many(100)
    epochs = EpochPacks(packed)
    epochs.set_epoch(2)
    assert packed_info(epochs) == packed_info(packed)
    lengths, offsets = epochs.pack_lengths()
    assert [lengths[a:b].tolist() for a, b in pairwise(offsets)] == [row["sequence_lengths"] for row in epochs]
    assert epochs.__getitems__([len(packed) - 1]).to_pylist() == [epochs[-1]]
    with pytest.raises(IndexError, match=f"pack {len(packed)} of {len(packed)}"):
        epochs[len(packed)]


def test_a_balanced_dataset_is_balanced_in_every_epoch():
    draw = np.random.default_rng(0)
    rows = [{"input_ids": [7] * int(n)} for n in draw.integers(1, 60, 3000)]
    packed = pack_dataset(datasets.Dataset.from_list(rows), 64, balance=8)
    plain = pack_dataset(datasets.Dataset.from_list(rows), 64)
    spread = {}
    for name, dataset in (("balanced", packed), ("plain", plain)):
        epochs = EpochPacks(dataset)
        epochs.set_epoch(5)
        lengths, offsets = epochs.pack_lengths()
        costs = np.add.reduceat(lengths.astype(np.int64) ** 2, offsets[:-1])[: len(epochs) // 8 * 8].reshape(-1, 8)
        spread[name] = costs.sum(1).std() / costs.sum(1).mean()
    assert spread["balanced"] < 0.1 * spread["plain"]


@pytest.mark.parametrize(
    ("start", "persistent"),
    [("fork", True), ("fork", False), ("spawn", True)],
    ids=["forked, persistent", "forked anew", "spawned, persistent"],
)
def test_workers_hear_of_epochs(start, persistent):
    _, packed = many(60)
    epochs, here = EpochPacks(packed, 1), EpochPacks(packed, 1)
    loader = DataLoader(
        epochs,
        batch_size=8,
        collate_fn=methodcaller("to_pylist"),
        num_workers=1,
        persistent_workers=persistent,
        multiprocessing_context=start,
    )
    for epoch in range(3):
        epochs.set_epoch(epoch)
        here.set_epoch(epoch)
        assert [row for batch in loader for row in batch] == list(here)


def test_copies_and_pickles():
    """A pickle holds no tokens twice, keeps the epoch, and is then independent; a shallow copy follows the original."""
    _, packed = many(60)
    epochs = EpochPacks(packed, 1)
    epochs.set_epoch(3)
    other, twin = pickle.loads(pickle.dumps(epochs)), copy.copy(epochs)
    assert list(other) == list(epochs) == list(twin)
    epochs.set_epoch(4)
    assert list(twin) == list(epochs) != list(other) and (twin.epoch, other.epoch) == (4, 3)
    assert copy.deepcopy(epochs)[0] == epochs[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda packed: datasets.Dataset.from_dict({"input_ids": [[1]]}), "was not packed"),
        (lambda packed: packed.with_transform(lambda row: row), "has a transform"),
        (lambda packed: packed.select([]), "has no rows"),
        (lambda packed: packed.add_column("more", [[1]] * len(packed)), "column 'more' has 1 values in row"),
        (
            lambda packed: packed.map(lambda row: {"sequence_lengths": row["sequence_lengths"] + [1]}),
            "column 'input_ids' has",
        ),
    ],
    ids=["not packed", "transform", "empty", "column", "lengths"],
)
def test_refused(make, message):
    _, packed = many(60)
    with pytest.raises(ValueError, match=message):
        EpochPacks(make(packed))


def test_refused_numbers():
    _, packed = many(60)
    with pytest.raises(ValueError, match="seed=-1"):
        EpochPacks(packed, -1)
    with pytest.raises(ValueError, match="epoch=-1"):
        EpochPacks(packed).set_epoch(-1)
