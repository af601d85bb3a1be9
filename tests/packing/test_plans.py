"""Histograms, plans and packers."""

import numpy as np
import pytest
import slow_packers
from histograms import SQUAD, WIKIPEDIA, histograms
from hypothesis import given, settings
from hypothesis import strategies as st

from packing import PACKERS, PackPlan, length_histogram, plan_packs

# Histogram


def test_histogram_draws_the_counts():
    assert length_histogram([2, 5, 2], 6).tolist() == [0, 0, 2, 0, 0, 1, 0]
    assert length_histogram([2, 5, 2]).tolist() == [0, 0, 2, 0, 0, 1]


def test_histograms_of_shards_add_up():
    lengths = np.random.default_rng(0).integers(1, 65, 1000, dtype=np.int32)
    shards = sum(length_histogram(shard, 64) for shard in np.split(lengths, 4))
    assert np.array_equal(shards, length_histogram(lengths, 64))
    assert np.array_equal(
        shards, length_histogram(lengths, 64) + length_histogram([], 64)
    )  # an empty shard adds nothing


@pytest.mark.parametrize(
    ("lengths", "limit", "message"),
    [
        ([], None, "no lengths to count.*at least one sequence, or say max_sequence_length="),
        ([3, 0, 2], 8, "sequence 1 has length 0.*at least 1; leave it out"),
        ([3, -4], 8, "sequence 1 has length -4"),
        ([3, 4, 9, 10], 8, "sequence 2 has 9 tokens, more than max_sequence_length=8; truncate or split"),
        ([3, 2.0], 8, r"must be integers: index 1 holds 2\.0"),
        ([3, "4"], 8, "must be integers: index 1 holds '4'"),
        ([[1, 2]], 8, r"flat, one number per sequence; got an array of shape \(1, 2\)"),
    ],
)
def test_histogram_refuses(lengths, limit, message):
    with pytest.raises(ValueError, match=message):
        length_histogram(lengths, limit)


# Published anchors: packs that the paper's own algorithm needs, and the bound that no packing goes under


@pytest.mark.parametrize(
    ("histogram", "depth", "published_packs", "bound"),
    [
        (WIKIPEDIA, 2, 10_101_683, 10_099_081),  # bound: L2; 16,279,552 sequences / 2 prove 8,139,776
        (WIKIPEDIA, 3, 9_094_695, 8_135_727),  # bound: L2; 4,164,796,173 tokens / 512 prove 8,134,368
        (WIKIPEDIA, 4, 8_658_996, 8_135_727),
        (WIKIPEDIA, 8, 8_224_673, 8_135_727),
        (WIKIPEDIA, None, 8_166_708, 8_135_727),
        (SQUAD, 3, 40_711, 39_775),  # bound: L2; 15,249,479 tokens / 384 prove 39,713
        (SQUAD, None, 40_711, 39_775),
    ],
    ids=["wiki-2", "wiki-3", "wiki-4", "wiki-8", "wiki", "squad-3", "squad"],
)
def test_spfhp_is_as_good_as_published(histogram, depth, published_packs, bound):
    assert (
        slow_packers.pack_histogram(histogram, len(histogram) - 1, depth) == published_packs
    )  # the slow twin is exact
    plan = plan_packs(histogram, max_sequences_per_pack=depth, packer="spfhp")
    assert bound == plan.lower_bound <= plan.num_packs <= published_packs
    assert plan.num_sequences == histogram.sum()
    assert plan.max_depth <= (depth or 512)


def test_the_published_histograms_are_what_they_say():
    assert (WIKIPEDIA.sum(), WIKIPEDIA @ np.arange(513)) == (16_279_552, 4_164_796_173)
    assert (SQUAD.sum(), SQUAD @ np.arange(385)) == (88_641, 15_249_479)


# Every packer


@pytest.mark.parametrize("name", PACKERS)
@settings(max_examples=300, deadline=None)
@given(histogram=histograms, depth=st.none() | st.integers(1, 9))
def test_plan_covers_the_histogram(name, histogram, depth):
    limit = len(histogram) - 1
    plan = plan_packs(histogram, max_sequences_per_pack=depth, packer=name)
    packs = [strategy for strategy, r in zip(plan.strategies, plan.repeats, strict=True) for _ in range(r)]
    assert sorted(x for pack in packs for x in pack) == np.repeat(np.arange(limit + 1), histogram).tolist()
    assert all(sum(pack) <= limit and len(pack) <= (depth or limit) and sorted(pack) == list(pack) for pack in packs)

    assert np.array_equal(plan.histogram(), histogram)
    assert (plan.num_packs, plan.num_sequences) == (len(packs), histogram.sum())
    assert plan.num_tokens == sum(map(sum, packs))
    assert plan.max_depth == max(map(len, packs))
    assert plan.packing_factor == plan.num_sequences / len(packs)
    assert 0 < plan.packing_efficiency == plan.num_tokens / (len(packs) * limit) <= 1
    assert plan.lower_bound <= plan.num_packs
    assert plan.equals(plan_packs(histogram, max_sequences_per_pack=depth, packer=name))


@st.composite
def shaped_histograms(draw):
    """Few or many lengths, spikes, one length, all above half; counts up to 10**12; depth 1 to beyond the deepest."""
    limit = draw(st.sampled_from([1, 2, 3, 16, 64, 130]))
    shortest = draw(st.sampled_from([1, limit // 2 + 1, limit]))
    lengths = draw(st.lists(st.integers(shortest, limit), min_size=1, max_size=80, unique=True))
    count = draw(st.sampled_from([st.just(1), st.integers(1, 9), st.integers(1, 10**12), st.sampled_from([1, 10**12])]))
    histogram = np.zeros(limit + 1, np.int64)
    histogram[lengths] = draw(st.lists(count, min_size=len(lengths), max_size=len(lengths)))
    return histogram, draw(st.none() | st.integers(1, limit + 1))


@settings(max_examples=150, deadline=None)
@given(shaped_histograms())
def test_every_packer_on_every_shape(case):
    histogram, depth = case
    plans = {name: plan_packs(histogram, max_sequences_per_pack=depth, packer=name) for name in PACKERS}
    for plan in plans.values():
        placed = [0] * len(histogram)
        for strategy, repeats in zip(plan.strategies, plan.repeats.tolist(), strict=True):
            assert sum(strategy) < len(histogram) and len(strategy) <= (depth or len(histogram)) and repeats > 0
            for length in strategy:
                placed[length] += repeats
        assert placed == histogram.tolist()
        assert max(plan.lower_bound for plan in plans.values()) <= plan.num_packs
    assert plans["optimal"].num_packs == min(plan.num_packs for plan in plans.values())


@pytest.mark.parametrize("name", [name for name in PACKERS if name != "nnlshp"])  # least squares promise nothing here
@pytest.mark.parametrize("depth", [None, 2, 3, 8])
def test_packs_as_few_as_the_textbook(name, depth):
    """Worst or best fit over single sequences, on many shapes: at most one pack more on any, and no more in total.

    Best fit deepens the packs that it fills: under a tight depth limit it needs a few more than worst fit."""
    draw, ours, textbook = np.random.default_rng(1), 0, 0
    one_by_one = slow_packers.best_fit_decreasing if name == "lpfhp" else slow_packers.worst_fit_decreasing
    for _ in range(60):
        limit, count = int(draw.choice([12, 64, 256])), int(draw.choice([5, 60]))
        shapes = [
            draw.integers(1, limit + 1, count),
            np.clip(draw.lognormal(np.log(limit / 6), 0.8, count).astype(int), 1, limit),
            draw.choice(draw.integers(1, limit + 1, 3), count),
        ]
        for lengths in shapes:
            packs = plan_packs(length_histogram(lengths, limit), limit, depth, name).num_packs
            slow = len(one_by_one(lengths.tolist(), limit, depth))
            assert packs <= slow + 1
            ours, textbook = ours + packs, textbook + slow
    assert ours <= textbook


@pytest.mark.parametrize("name", PACKERS)
def test_equal_short_lengths_share_packs(name):
    """100 sequences of 100 tokens at 512: 5 a pack, 20 packs. The published listing packs none of them."""
    plan = plan_packs(length_histogram([100] * 100, 512), packer=name)
    assert (plan.num_packs, plan.max_depth, plan.packing_factor) == (20, 5, 5.0)


@pytest.mark.parametrize("name", [name for name in PACKERS if name != "nnlshp"])  # refuses, and says so
@pytest.mark.parametrize("limit", [8192, 131_072])
def test_packs_of_any_length(name, limit):
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(600), 1, 50_000).astype(int), 1, limit)
    plan = plan_packs(length_histogram(lengths, limit), packer=name)
    assert plan.packing_efficiency > 0.99


@pytest.mark.parametrize("name", PACKERS)
def test_counts_of_1e12_are_exact(name):
    histogram = np.zeros(513, np.int64)
    histogram[[1, 200, 311, 512]] = [10**12 + 1, 10**12, 10**12 + 7, 10**15]
    plan = plan_packs(histogram, packer=name)
    assert plan.num_sequences == 10**15 + 3 * 10**12 + 8
    assert plan.num_tokens == 512 * 10**15 + (10**12 + 1) + 200 * 10**12 + 311 * (10**12 + 7)
    # 512 and 311 need a pack each; the tokens alone prove 7 packs less
    assert plan.lower_bound == 10**15 + 10**12 + 7 > -(-plan.num_tokens // 512)
    assert np.array_equal(plan.histogram(), histogram)


def test_spfhp_draws_its_packs():
    """{5: 1, 3: 2, 1: 1} into 6 slots: 5 | 3 3, and the 1 goes where there is space."""
    plan = plan_packs([0, 1, 0, 2, 0, 1, 0], packer="spfhp")
    assert dict(zip(plan.strategies, plan.repeats.tolist(), strict=True)) == {(1, 5): 1, (3, 3): 1}


# plan_packs: what it is given, and what a packer returns


def one_a_pack(histogram, max_sequence_length, max_sequences_per_pack):
    lengths = np.flatnonzero(histogram)
    return PackPlan.from_strategies([(x,) for x in lengths], histogram[lengths], max_sequence_length)


def test_a_callable_is_a_packer():
    plan = plan_packs([0, 0, 3, 1], packer=one_a_pack)
    assert list(plan.strategies) == [(2,), (3,)]
    assert plan.packing_factor == 1.0


def loses_one(histogram, *limits):
    histogram[3] -= 1
    return one_a_pack(histogram, *limits)


def doubles_one(histogram, max_sequence_length, max_sequences_per_pack):
    return PackPlan.from_strategies([(2, 2)], [2], max_sequence_length)


def too_deep(histogram, max_sequence_length, max_sequences_per_pack):
    return PackPlan.from_strategies([(2, 2, 2)], [1], max_sequence_length)


def too_long(histogram, max_sequence_length, max_sequences_per_pack):
    return PackPlan.from_strategies([(2, 2, 2, 2)], [1], max_sequence_length)


@pytest.mark.parametrize(
    ("packer", "histogram", "error", "message"),
    [
        ("nope", [0, 1], ValueError, "unknown packer 'nope'; choose from .*spfhp"),
        (loses_one, [0, 0, 1, 5, 0, 0, 0], ValueError, "'?loses_one'? placed 4 sequences of length 3.*counts 5"),
        (doubles_one, [0, 0, 3, 0, 0, 0, 0], ValueError, "placed 4 sequences of length 2.*counts 3"),
        (too_deep, [0, 0, 3, 0, 0, 0, 0], ValueError, "put 3 sequences into a pack.*max_sequences_per_pack=2"),
        (too_long, [0, 0, 4, 0, 0, 0, 0], ValueError, "strategy 0.*has 8 tokens, more than max_sequence_length=6"),
        (lambda *_: [(1,)], [0, 1], TypeError, "returned list; a packer returns a PackPlan"),
    ],
)
def test_packers_are_checked(packer, histogram, error, message):
    with pytest.raises(error, match=message):
        plan_packs(histogram, max_sequences_per_pack=2, packer=packer)


@pytest.mark.parametrize(
    ("histogram", "limit", "message"),
    [
        ([], None, "one flat array of counts"),
        ([0, 0, 0], None, "empty: it counts no sequence"),
        ([0, 3, -1], None, "counts -1 sequences of length 2"),
        ([2, 3], None, r"counts 2 sequences of length 0 \(index 0\)"),
        ([[0, 1]], None, r"got shape \(1, 2\)"),
        ([0.0, 1.0], None, "integer counts; got float64"),
        ([0, 1, 0, 0, 2, 0], 3, "counts 2 sequences of length 4, more than max_sequence_length=3"),
        ([0, 1], 0, "max_sequence_length=0 must be a whole number, at least 1"),
        ([0, 2**62, 2**62], None, "tokens, more than 2"),
    ],
)
def test_histograms_are_checked(histogram, limit, message):
    with pytest.raises(ValueError, match=message):
        plan_packs(histogram, limit)


def test_a_histogram_may_be_shorter_or_longer_than_a_pack():
    assert plan_packs([0, 0, 4], 8).max_sequence_length == 8
    assert plan_packs([0, 0, 4, 0, 0, 0], 3).max_sequence_length == 3


def test_depth_limit_is_checked():
    with pytest.raises(ValueError, match="max_sequences_per_pack=0 must be a whole number, at least 1"):
        plan_packs([0, 1], max_sequences_per_pack=0)
    with pytest.raises(ValueError, match=r"more than 2\*\*63 - 1; leave it out for no limit"):
        plan_packs([0, 1], max_sequences_per_pack=10**30)
    assert plan_packs([0, 3], 2, 2**63 - 1).num_packs == 2


def test_a_packer_without_a_signature_is_called():
    """Compiled extensions have no signature."""
    with pytest.raises(TypeError, match="dict expected at most 1 argument"):
        plan_packs([0, 1], packer=dict, progress=True)


# The plan


def test_plan_draws_its_numbers():
    plan = PackPlan.from_strategies([(3, 1, 2), (5,)], [2, 1], 6)
    assert list(plan.strategies) == [(1, 2, 3), (5,)]
    assert plan.strategies[-1] == (5,)
    assert plan.histogram().tolist() == [0, 2, 2, 2, 0, 1, 0]
    assert (plan.num_packs, plan.num_sequences, plan.num_tokens, plan.max_depth) == (3, 7, 17, 3)
    assert plan.packing_efficiency == 17 / 18  # 3 packs x 6 slots
    assert plan.lower_bound == 3  # ceil(17 / 6)
    assert str(plan).splitlines()[5] == "packs                          3  from 2 strategies"


def test_plan_saves_and_loads(tmp_path):
    plan = plan_packs(SQUAD, max_sequences_per_pack=3)
    plan.save(tmp_path / "plan.json")
    assert plan.equals(PackPlan.load(tmp_path / "plan.json"))
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"other\.json is not a saved plan"):
        PackPlan.load(tmp_path / "other.json")
    (tmp_path / "part.json").write_text('{"format": "dataset-packing plan 1", "packer": "spfhp"}')
    with pytest.raises(ValueError, match=r"part\.json is not a whole plan: .* missing"):
        PackPlan.load(tmp_path / "part.json")


def test_plan_cannot_be_changed():
    plan = PackPlan.from_strategies([(1,)], [1], 2)
    with pytest.raises(ValueError, match="read-only"):
        plan.repeats[0] = 5


@pytest.mark.parametrize(
    ("strategies", "repeats", "message"),
    [
        ([], [], "at least one strategy"),
        ([(1,), ()], [1, 1], "strategy 1 is empty"),
        ([(1,), (2,)], [1, 0], "strategy 1 repeats 0 times"),
        ([(1,), (2,)], [1], "strategy_offsets must be 2 numbers"),
        ([(0, 1)], [1], "strategy 0 holds length 0"),
        ([(1,), (2**32 + 2,)], [1, 1], r"strategy_lengths\[1\] is 4294967298, more than int32 can hold"),
        ([(1,), (2, 3)], [1, 1], "strategy 1 .* has 5 tokens, more than max_sequence_length=4"),
    ],
)
def test_impossible_plans_are_refused(strategies, repeats, message):
    with pytest.raises(ValueError, match=message):
        PackPlan.from_strategies(strategies, repeats, 4)
