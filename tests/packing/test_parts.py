"""Many source shards: histograms that add up, when each shard may be packed by itself, an assignment part by part."""

from collections import Counter
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa
import pytest

from packing import length_histogram, pack_dataset, plan_packs, published_histogram
from packing.parts import add_histograms, assign_part, deal_lengths, deal_packs, deal_shares, plan_each

datasets.disable_progress_bars()


def wikipedia(sequences: int) -> np.ndarray:
    counts = published_histogram("wikipedia")
    return np.random.default_rng(0).choice(len(counts), sequences, p=counts / counts.sum())


def test_histograms_of_shards_add_up():
    lengths = wikipedia(10_000)
    shards = [length_histogram(part) for part in np.split(lengths, [10, 3000])]  # each to its longest
    assert add_histograms(shards).tolist() == length_histogram(lengths).tolist()
    assert add_histograms([[0, 2, 1], [0, 1, 0, 5]]).tolist() == [0, 3, 1, 5]


def test_shards_like_the_whole_may_be_packed_each_by_itself():
    lengths = wikipedia(200_000)
    plans = plan_each([length_histogram(shard, 512) for shard in np.split(lengths, 8)], 512, packer="spfhp")
    assert sum(plan.num_sequences for plan in plans) == 200_000
    together = plan_packs(length_histogram(lengths, 512), packer="spfhp")
    assert together.num_packs <= sum(plan.num_packs for plan in plans) <= together.num_packs * 1.001


def test_shards_sorted_by_length_are_refused():
    """They would lose 7 points of efficiency."""
    shards = [length_histogram(shard, 512) for shard in np.split(np.sort(wikipedia(200_000)), 8)]
    with pytest.raises(ValueError, match="Pack the shards together") as error:
        plan_each(shards, 512, packer="spfhp")
    assert "the 8 shards packed each by itself" in str(error.value)
    apart = sum(plan.num_packs for plan in plan_each(shards, 512, packer="spfhp", tolerance=1.0))
    together = plan_packs(add_histograms(shards), packer="spfhp")
    lost = together.packing_efficiency - together.num_tokens / (apart * 512)
    assert 0.06 < lost < 0.09


def test_the_tolerance_is_what_it_says():
    """Packs more than together, as a share of those: allowed up to it, and not one pack beyond."""
    histograms = [[0, 0, 0, 100], [0, 100, 0, 0]]  # 3 3 3 … and 1 1 1 …; together (1 3), apart (3) and (1 1 1 1)
    assert sum(plan.num_packs for plan in plan_each(histograms, 4, tolerance=0.25)) == 125
    with pytest.raises(ValueError, match=r"take 125 packs .*, 25.00% more than together .* allows 24.00%"):
        plan_each(histograms, 4, tolerance=0.24)
    with pytest.raises(ValueError, match=r"tolerance=0.001 allows 0.10%; the worst is shard 0 \(75.000%\)"):
        plan_each(histograms, 4)


def test_files_sorted_by_length_pack_together_like_any_others(tmp_path):
    """Workers gather from all files: the plan does not care which row lies where."""
    rng = np.random.default_rng(0)
    lengths = np.sort(wikipedia(2000))
    rows = np.split(rng.integers(0, 30_000, lengths.sum()).astype(np.int32), np.cumsum(lengths)[:-1])
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
    datasets.Dataset(table).save_to_disk(tmp_path / "tokens", num_shards=8)
    shuffled = table.take(rng.permutation(len(rows)))
    datasets.Dataset(shuffled).save_to_disk(tmp_path / "shuffled", num_shards=8)
    packs = {}
    for name in ("tokens", "shuffled"):
        packed = pack_dataset(
            datasets.load_from_disk(tmp_path / name), 512, packer="spfhp", output=tmp_path / f"{name} p"
        )
        packs[name] = Counter(tuple(sorted(pack)) for pack in packed["sequence_lengths"])
    assert packs["tokens"] == packs["shuffled"]
    packed = datasets.load_from_disk(tmp_path / "tokens p")
    assert sum(len({row // 250 for row in pack}) > 1 for pack in packed["sequence_indices"]) > len(packed) / 4


def assign_in_parts(shards: list[np.ndarray], plan, num_parts: int, seed: int):
    """As a cluster does, one step after the other."""
    parts = deal_packs(plan, num_parts, seed)
    histograms = [length_histogram(shard, plan.max_sequence_length) for shard in shards]
    starts = np.cumsum([0, *map(len, shards)])
    shares = deal_shares(histograms, parts, seed)
    taken = [
        (int(start), lengths, deal_lengths(lengths, share, i, seed))
        for i, (start, lengths, share) in enumerate(zip(starts[:-1], shards, shares, strict=True))
    ]
    return [assign_part(parts, part, taken, seed) for part in range(num_parts)], parts


@pytest.mark.parametrize("num_parts", [1, 2, 7])
def test_an_assignment_in_parts_is_one_of_the_whole_plan(num_parts):
    lengths = wikipedia(30_000).astype(np.uint16)
    plan = plan_packs(length_histogram(lengths, 512), packer="spfhp")
    shards = np.split(lengths, [5000, 5001, 22_000])
    assignments, parts = assign_in_parts(shards, plan, num_parts, seed=5)
    assert sum(part.num_packs for part in parts) == plan.num_packs
    indices = np.concatenate([assignment.sequence_indices for assignment in assignments])
    assert np.array_equal(np.sort(indices), np.arange(30_000))
    found = Counter()
    for assignment in assignments:
        for first, end in pairwise(assignment.pack_offsets.tolist()):
            found[tuple(np.sort(lengths[assignment.sequence_indices[first:end]]).tolist())] += 1
    expected = Counter()
    for strategy, repeats in zip(plan.strategies, plan.repeats.tolist(), strict=True):
        expected[strategy] += repeats
    assert found == expected
    again, _ = assign_in_parts(shards, plan, num_parts, seed=5)
    assert all(a.equals(b) for a, b in zip(assignments, again, strict=True))
    other, _ = assign_in_parts(shards, plan, num_parts, seed=6)
    assert not all(a.equals(b) for a, b in zip(assignments, other, strict=True))


def test_every_sequence_meets_every_other_equally_often():
    """6 sequences of one length in pairs, in 2 shards and 2 parts: each of the 15 pairs in each part."""
    plan = plan_packs([0, 6], 2, packer="spfhp")
    shards = [np.ones(4, np.uint16), np.ones(2, np.uint16)]
    pairs, seeds = Counter(), 0
    for seed in range(900):
        try:
            assignments, _ = assign_in_parts(shards, plan, 2, seed)
        except ValueError:  # a part without packs: one seed in four
            continue
        seeds += 1
        for part, assignment in enumerate(assignments):
            for pack in assignment.sequence_indices.reshape(-1, 2):
                pairs[part, tuple(sorted(pack.tolist()))] += 1
    expected = seeds * 3 / 30
    assert len(pairs) == 30
    chi_squared = sum((count - expected) ** 2 / expected for count in pairs.values())
    assert chi_squared < 70  # 29 degrees of freedom: 1 in 30,000 or so


def test_parts_of_other_sequences_are_refused():
    lengths = wikipedia(1000)
    plan = plan_packs(length_histogram(lengths, 512), packer="spfhp")
    parts = deal_packs(plan, 2)
    with pytest.raises(ValueError, match="made for another number of sequences of length"):
        list(deal_shares([length_histogram(lengths[1:], 512)], parts))
    with pytest.raises(ValueError, match="made for another number of sequences of length"):
        list(deal_shares([length_histogram(lengths, 512), length_histogram(lengths[:1], 512)], parts))
    (share,) = deal_shares([length_histogram(lengths, 512)], parts)
    for other in (lengths[1:], np.append(lengths, 5), np.append(lengths[1:], 513)):
        with pytest.raises(ValueError, match="shard 0 has other lengths than its histogram said"):
            deal_lengths(other, share, 0)
    with pytest.raises(ValueError, match="gets none of 1 packs; take fewer than num_parts=9"):
        deal_packs(plan_packs([0, 1], 1), 9)
    with pytest.raises(ValueError, match="num_parts=0 must be a whole number, 1 to 65,536"):
        deal_packs(plan, 0)
