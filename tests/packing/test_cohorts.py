"""Cohorts: every piece once, in order, at most one of a document in a round; cells as any packer packs them."""

import hashlib
import json
import re
from collections import Counter

import datasets
import numpy as np
import pytest
import slow_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_cohorts import assign_slowly, cut_slowly, disorders

from packing import (
    EpochPacks,
    PackPlan,
    cli,
    length_histogram,
    load_packed,
    pack_dataset,
    packed_info,
    plan_packs,
    unpack_dataset,
    verify_packed,
)
from packing.cohorts import PacksOfCells, cell_numbers, cut_cohorts, fill_cells, in_other_order, plan_cohorts
from packing.options import PackOptions
from packing.packers.each import plan_each
from packing.packers.lpfhp import lpfhp

datasets.disable_progress_bars()
TOKEN_COLUMNS = ["input_ids", "token_type_ids", "weights", "words"]

documents = st.lists(st.integers(1, 40), min_size=1, max_size=40)  # tokens of each


def cut(tokens, longest):
    """Pieces of each document, and the length of each piece."""
    pieces = np.array([-(-n // longest) for n in tokens])
    lengths = [min(longest, n - first) for n in tokens for first in range(0, n, longest)]
    return pieces, np.array(lengths, np.int32)


def one_each(histogram, max_sequence_length, max_sequences_per_pack):
    """A packer that packs nothing."""
    found = histogram.nonzero()[0].tolist()
    return PackPlan.from_strategies([(n,) for n in found], histogram[found].tolist(), max_sequence_length)


def test_rounds_draw_their_packs():
    """Documents of 3, 1, 2 and 2 pieces in cohorts of 3: rounds of 3, 2 and 1 pieces in the first, 1 and 1 or fewer."""
    pieces, lengths = np.array([3, 1, 2, 2]), np.array([4, 4, 2, 3, 4, 1, 4, 4])
    plan = plan_cohorts(cut_cohorts(pieces, 3, 1, seed=0), lengths, 4, None, "spfhp")
    assignment, places = plan.assign(lengths, 0)
    rows, piece = np.repeat(np.arange(4), pieces), np.array([0, 1, 2, 0, 0, 1, 0, 1])
    assert (np.diff(places @ [100, 10, 1]) >= 0).all()
    for pack, (cohort, number, lane) in enumerate(places.tolist()):
        assert lane == 0 and set(piece[assignment.pack(pack)]) == {number} and cohort in (0, 1)
    assert sorted(assignment.sequence_indices.tolist()) == list(range(8))
    first = {row for pack in np.flatnonzero(places[:, 0] == 0) for row in rows[assignment.pack(pack)].tolist()}
    assert len(first) == 3


@settings(max_examples=100, deadline=None)
@given(
    tokens=documents,
    longest=st.integers(3, 12),
    cohort=st.integers(1, 12),
    lanes=st.integers(1, 5),
    depth=st.none() | st.integers(1, 4),
    packer=st.sampled_from(["spfhp", "lpfhp", one_each]),
    seed=st.integers(0, 2**64 - 1),
)
def test_cohorts_are_those_of_the_slow_twin(tokens, longest, cohort, lanes, depth, packer, seed):
    pieces, lengths = cut(tokens, longest)
    cells = cut_slowly(pieces.tolist(), cohort, lanes, seed)
    cohorts = cut_cohorts(pieces, cohort, lanes, seed)
    places = cohorts.places(cohorts.cells)
    assert [tuple(place) for place in places.tolist()] == [
        next(cell for cell, sequences in cells.items() if i in sequences) for i in range(len(lengths))
    ]
    plan = plan_cohorts(cohorts, lengths, longest, depth, packer)
    assert plan.plan.histogram().tolist() == length_histogram(lengths, longest).tolist()
    assert plan.plain.num_packs == plan_packs(length_histogram(lengths, longest), longest, depth, packer).num_packs
    assert plan.plan.lower_bound >= plan.plain.lower_bound
    assignment, found = plan.assign(lengths, seed)
    plans = {
        cell: plan_packs(length_histogram(lengths[sequences], longest), longest, depth, packer)
        for cell, sequences in cells.items()
    }
    packs = [(tuple(place), assignment.pack(i).tolist()) for i, place in enumerate(found.tolist())]
    assert packs == assign_slowly(cells, plans, lengths.tolist(), seed)


@settings(max_examples=100, deadline=None)
@given(tokens=documents, cohort=st.integers(1, 40), lanes=st.integers(1, 8))
def test_in_every_round_lanes_have_as_many_pieces_give_or_take_one(tokens, cohort, lanes):
    pieces, _ = cut(tokens, 4)
    cohorts = cut_cohorts(pieces, cohort, lanes, 0)
    counts = np.bincount(cohorts.cells, minlength=cohorts.num_cells).reshape(-1, lanes)
    assert (counts.max(1) - counts.min(1) <= 1).all()
    for ranks in range(1, lanes + 1):
        if lanes % ranks == 0:  # lane l is on rank l % ranks
            of_ranks = counts.reshape(len(counts), -1, ranks).sum(1)
            assert (of_ranks.max(1) - of_ranks.min(1) <= 1).all()


@settings(max_examples=100, deadline=None)
@given(
    cells=st.lists(st.lists(st.integers(1, 20), max_size=25), min_size=1, max_size=8).filter(any),
    depth=st.none() | st.integers(1, 5),
)
def test_plans_at_once_are_plans_one_by_one(cells, depth):
    """lpfhp over all cells in one kernel, and any packer called for each: the same strategies, cell by cell."""
    lengths = np.array([n for cell in cells for n in sorted(cell)], np.int32)
    offsets = np.cumsum([0, *map(len, cells)])

    def called(*arguments):  # a callable is not known to the table
        return lpfhp(*arguments)

    fast, slow = (plan_each(lengths, offsets, 20, depth, packer) for packer in ("lpfhp", called))
    for name in ("strategy_lengths", "strategy_offsets", "repeats", "strategy_counts"):
        assert getattr(fast, name).tolist() == getattr(slow, name).tolist(), name
    assert fast.packer == slow.packer == "lpfhp"
    for cell, end, count in zip(cells, np.cumsum(fast.strategy_counts), fast.strategy_counts, strict=True):
        placed = Counter()
        for s in range(end - count, end):
            first, last = fast.strategy_offsets[s : s + 2]
            placed += Counter(fast.strategy_lengths[first:last].tolist() * int(fast.repeats[s]))
        assert placed == Counter(cell)


def test_any_packer_plans_cells():
    pieces, lengths = cut([30, 7, 12, 25, 9, 40, 16, 3], 16)
    cohorts = cut_cohorts(pieces, 4, 2, 1)
    packs = {name: plan_cohorts(cohorts, lengths, 16, None, name) for name in ("optimal", "nnlshp", "lpfhp")}
    assert packs["optimal"].plan.num_packs <= packs["lpfhp"].plan.num_packs
    assert [plan.plan.packer for plan in packs.values()] == ["optimal", "nnlshp", "lpfhp"]


def test_other_lengths_are_refused():
    packs = PacksOfCells(np.array([1, 2, 3]), np.array([0, 2, 3]), np.array([0, 1]))
    fill_cells(packs, np.array([3, 2, 1]), np.array([1, 0, 0]), np.uint64(0))
    for lengths, cells in (([3, 2, 2], [1, 0, 0]), ([3, 2, 1], [0, 0, 1]), ([3, 2], [1, 0])):
        with pytest.raises(ValueError, match="slots for other lengths than its sequences have"):
            fill_cells(packs, np.array(lengths), np.array(cells), np.uint64(0))


def test_choices_are_equally_likely():
    """Four sequences of one length in two packs of a cell, and two packs of another cell: chi-squared over seeds."""
    packs = PacksOfCells(np.array([1, 1, 1, 1, 2, 2]), np.array([0, 2, 4, 5, 6]), np.array([0, 0, 1, 1]))
    lengths, cells = np.array([2, 1, 1, 2, 1, 1]), np.array([1, 0, 0, 1, 0, 0])
    counts: Counter = Counter()
    for seed in range(3000):
        assignment, order = fill_cells(packs, lengths, cells, np.uint64(seed))
        mates = frozenset(frozenset(assignment.pack(i).tolist()) for i in (0, 1))
        counts[mates, assignment.pack(2)[0], tuple(order.tolist())] += 1
        assert sorted(order.tolist()[:2]) == [0, 1]
    assert len(counts) == 3 * 2 * 4  # partners, the first of the second cell, the order of packs in both cells
    chi2 = sum((count - 125) ** 2 / 125 for count in counts.values())
    assert chi2 < 49.7  # 99.9 % of chi-squared with 23 degrees of freedom


def test_small_helpers():
    assert cell_numbers(np.array([[0, 0, 1], [3, 0, 0], [0, 0, 1], [0, 2, 0]])).tolist() == [0, 2, 0, 1]
    found = in_other_order(np.array([3, 3, 5, 8]), np.uint64(1))
    assert found[0] == found[1] and sorted({*found.tolist()}) == [0, 1, 2]


def test_the_stream_is_frozen():
    """The same on every machine and in every version: a seed in a paper must stay valid."""
    tokens = np.arange(3000) * 7919 % 997 + 1
    pieces, lengths = cut(tokens.tolist(), 128)
    plan = plan_cohorts(cut_cohorts(pieces, 256, 8, 7), lengths, 128, None, "lpfhp")
    assignment, places = plan.assign(lengths, 7)
    arrays = assignment.sequence_indices.astype("<i8"), places.astype("<i8")
    assert hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest() == FROZEN


FROZEN = "f5eddf400ae3cf8d4cf7b3ff8f3688fd24f4e73d023ae35b61c5a07ebb919f2f"

# Datasets


def make_source(seed=0, count=40, longest=60, padded=False):
    rows = slow_rows.random_rows(seed, count, longest, padded)
    return rows, datasets.Dataset.from_list(rows)


def pack(source, longest=16, cohort=8, cohort_lanes=2, packer="lpfhp", **options):
    options = {"overlong": "split", "token_columns": TOKEN_COLUMNS} | options
    return pack_dataset(source, longest, packer=packer, cohort=cohort, cohort_lanes=cohort_lanes, **options)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 40),
    longest=st.integers(2, 30),
    cohort=st.integers(1, 50),
    lanes=st.integers(1, 4),
    depth=st.none() | st.integers(1, 4),
    padded=st.booleans(),
    epoch=st.integers(1, 2**40),
)
def test_every_piece_once_and_in_order_in_every_epoch(seed, count, longest, cohort, lanes, depth, padded, epoch):
    rows, source = make_source(seed, count, padded=padded)
    lanes = min(lanes, cohort)
    packed = pack(source, longest, cohort, lanes, max_sequences_per_pack=depth, seed=seed)
    facts = packed_info(packed)
    assert (facts.cohort, facts.cohort_lanes) == (cohort, lanes)
    assert facts.plain_packs == len(pack_dataset(source, longest, depth, "lpfhp", overlong="split", seed=seed))
    epochs, stored = EpochPacks(packed, seed), list(packed)
    for number in (0, epoch):
        epochs.set_epoch(number)
        packs = list(epochs)
        assert not slow_rows.faults(packs, rows, TOKEN_COLUMNS, longest, depth, "split")
        assert sum(len(one["input_ids"]) for one in packs) == facts.num_tokens
        order = {}  # the cohorts come in another order
        cohorts = [order.setdefault(one["sequence_cohorts"][0], len(order)) for one in packs]
        again = [
            one | {"sequence_cohorts": [c] * len(one["sequence_cohorts"])}
            for one, c in zip(packs, cohorts, strict=True)
        ]
        assert disorders(again, cohort, lanes) == set()
        assert epochs.places.tolist() == [
            [one[f"sequence_{name}"][0] for name in ("cohorts", "rounds", "lanes")] for one in packs
        ]
        assert cell_contents(packs) == cell_contents(stored)
    unpacked = unpack_dataset(packed).to_list()
    assert [row["input_ids"] for row in unpacked] == [
        slow_rows.trim(row["input_ids"], row.get("attention_mask", [1] * len(row["input_ids"]))) for row in rows
    ]


def cell_contents(packs):
    """How often each combination of lengths lies in each cell."""
    cells = ("sequence_cohorts", "sequence_rounds", "sequence_lanes")
    return Counter((tuple(p[name][0] for name in cells), tuple(sorted(p["sequence_lengths"]))) for p in packs)


def test_packs_without_cohorts_or_shuffled_are_in_no_order():
    """The negative control of `disorders`."""
    _, source = make_source()
    packed = pack(source)
    assert disorders(list(packed), 8, 2) == set()
    assert {"an earlier cell", "pieces out of order"} <= disorders(list(packed.shuffle(seed=0)), 8, 2)
    plain = [
        one | {f"sequence_{name}": [0] * len(one["sequence_lengths"]) for name in ("cohorts", "rounds", "lanes")}
        for one in pack_dataset(source, 16, overlong="split")
    ]
    assert {"a round is not the piece", "a cohort is too large"} <= disorders(plain, 8, 2)


def test_epochs_differ_and_follow_from_the_seed():
    _, source = make_source(count=120)
    packed = pack(source)
    epochs, others = EpochPacks(packed, 3), EpochPacks(packed, 3)
    drawn = []
    for epoch in range(3):
        epochs.set_epoch(epoch)
        drawn.append([one["sequence_indices"] for one in epochs])
    for epoch in (2, 0, 1):
        others.set_epoch(epoch)
        assert [one["sequence_indices"] for one in others] == drawn[epoch]
    assert drawn[0] == packed["sequence_indices"][:]
    orders = [epochs.places[:, 0].tolist()]
    epochs.set_epoch(1)
    orders.append(epochs.places[:, 0].tolist())
    assert orders[0] != orders[1] and drawn[0] != drawn[1] != drawn[2]


def test_some_packs_keep_their_places():
    """A slice, and packs in another order: each pack says where it belongs."""
    _, source = make_source(count=60)
    packed = pack(source)
    for chosen in (packed.select(range(20, 50)), packed.shuffle(seed=1)):
        epochs = EpochPacks(chosen)
        assert list(epochs) == chosen.to_list()
        epochs.set_epoch(1)
        assert cell_contents(list(epochs)) == cell_contents(chosen)
    with pytest.raises(ValueError, match="has cohorts, and column 'sequence_lanes' is missing"):
        EpochPacks(packed.remove_columns("sequence_lanes"))
    mixed = packed.map(lambda one: {"sequence_rounds": [*one["sequence_rounds"][:-1], 7]})
    with pytest.raises(ValueError, match=r"'sequence_rounds' has several values in row \d+ of the packed dataset"):
        EpochPacks(mixed)


# Folders


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_write_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", 20_000)
    monkeypatch.setattr("packing.store.contents.BATCH_TOKENS", 1024)
    _, source = make_source(count=300)
    source.save_to_disk(tmp_path / "source")
    source = datasets.load_from_disk(tmp_path / "source")
    pack(source, output=tmp_path / "one")
    assert len(list((tmp_path / "one").glob("data-*"))) > 2
    pack(source, output=tmp_path / "two", num_proc=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_parquet_holds_the_same(tmp_path):
    _, source = make_source()
    pack(source, output=tmp_path / "packed", format="parquet")
    packed = load_packed(tmp_path / "packed")
    assert packed.to_list() == pack(source).to_list()
    assert packed_info(packed) == packed_info(pack(source))
    assert verify_packed(tmp_path / "packed", source).ok


def test_an_interrupted_packing_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr("packing.store.contents.SHARD_BYTES", 20_000)
    _, source = make_source(count=300)
    pack(source, output=tmp_path / "whole")
    from packing.store import engines

    real, written = engines.write_shard, []

    def fail_at_the_third(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engines, "write_shard", fail_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            pack(source, output=tmp_path / "again")
    for other in ({"cohort": 16}, {"cohort_lanes": 4}, {"seed": 1}):
        with pytest.raises(ValueError, match=f"cannot resume the packing in .*{next(iter(other))} was"):
            pack(source, output=tmp_path / "again", **other)
    pack(source, output=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert (manifest["parameters"]["cohort"], manifest["parameters"]["cohort_lanes"]) == (8, 2)


def test_without_cohorts_no_file_speaks_of_them(tmp_path):
    _, source = make_source()
    pack_dataset(source, 16, overlong="split", output=tmp_path / "packed")
    for name in ("manifest.json", "dataset_info.json"):
        assert "cohort" not in (tmp_path / "packed" / name).read_text()


# Options and the command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cohort": 0, "overlong": "split"}, "cohort=0 must be a whole number, at least 1: the documents that"),
        ({"cohort": 8}, "cohort=8 keeps pieces of documents in order, which only overlong='split' makes; give it in"),
        ({"cohort": 8, "overlong": "truncate"}, "give it in place of overlong='truncate'"),
        (
            {"cohort": 8, "overlong": "split", "balance": 4},
            "balance=4 would choose an order of packs beside that of cohort=8; leave out either",
        ),
        ({"cohort": 4, "overlong": "split"}, "cohort_lanes=8 is more than the 4 documents of a cohort"),
        ({"cohort_lanes": 4}, "cohort_lanes=4 would be ignored: there is no cohort; give it, too"),
        ({"cohort_lanes": 0}, "cohort_lanes=0 must be a whole number, at least 1"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackOptions(**options)


def test_the_command(tmp_path, capsys):
    _, source = make_source()
    source.save_to_disk(tmp_path / "source")
    options = ["--max-sequence-length", "16", "--packer", "lpfhp", "--cohort", "8", "--cohort-lanes", "2"]
    split = [*options, "--overlong", "split", "--token-columns", *TOKEN_COLUMNS]
    assert cli.main(["plan", str(tmp_path / "source"), *split]) == 0
    said = capsys.readouterr().out
    assert cli.main(["pack", str(tmp_path / "source"), str(tmp_path / "packed"), *split]) == 0
    assert said.strip() in capsys.readouterr().out
    facts = packed_info(datasets.load_from_disk(tmp_path / "packed"))
    more = facts.num_packs / facts.plain_packs - 1
    assert re.search(r"cohorts +5  of 8 documents in 2 lanes", said)
    assert f"cohorts take {more:.2%} more packs" in said and f" {facts.plain_packs}  efficiency" in said
    assert cli.main(["verify", str(tmp_path / "packed"), "--source", str(tmp_path / "source")]) == 0
    capsys.readouterr()
    for arguments, message in (
        (["pack", str(tmp_path / "source"), str(tmp_path / "no"), *options], "--cohort 8 keeps pieces of documents in"),
        (["compare", str(tmp_path / "source"), "--cohort", "8"], "--cohort 8 would be ignored: it is for pack-dataset"),
        (["plan", str(write_lengths(tmp_path)), *options], "--cohort 8 would be ignored: a file of lengths holds no"),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def write_lengths(folder):
    (folder / "lengths.txt").write_text("3\n4\n")
    return folder / "lengths.txt"
