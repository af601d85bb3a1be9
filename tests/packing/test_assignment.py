"""Assignments: every sequence once, where the plan says, at random."""

import hashlib
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import slow_assignment
from hypothesis import given, settings
from hypothesis import strategies as st

from packing import PackPlan, assign, assignment, length_histogram, plan_packs
from packing.draws import IN_CACHE, shuffle


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80),
    depth=st.none() | st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_sequence_lies_where_the_plan_says(lengths, depth, seed):
    plan = plan_packs(length_histogram(lengths, 30), 30, depth)
    assignment = assign(plan, lengths, seed)
    assert sorted(assignment.sequence_indices.tolist()) == list(range(len(lengths)))
    assert (assignment.num_packs, assignment.num_sequences) == (plan.num_packs, plan.num_sequences)

    packs = [tuple(lengths[i] for i in assignment.pack(p)) for p in range(assignment.num_packs)]
    planned = dict(zip(plan.strategies, plan.repeats.tolist(), strict=True))
    assert Counter(packs) == planned


def test_assignment_draws_its_packs():
    plan = PackPlan.from_strategies([(1, 3)], [1], 4)
    assignment = assign(plan, [3, 1])
    assert assignment.sequence_indices.tolist() == [1, 0]
    assert assignment.pack_offsets.tolist() == [0, 2]
    assert assignment.pack(0).tolist() == assignment.pack(-1).tolist() == [1, 0]


def test_the_seed_decides_and_nothing_else():
    lengths = np.random.default_rng(0).integers(1, 513, 5000)
    plan = plan_packs(length_histogram(lengths, 512))
    first = assign(plan, lengths, seed=1)
    assert first.equals(assign(plan, lengths, seed=1))
    assert first.equals(assign(plan, lengths.astype(np.int32), seed=1))
    assert first.equals(assign(plan, lengths.astype(np.uint16).tolist(), seed=1))
    assert not first.equals(assign(plan, lengths, seed=2))


def test_the_stream_is_frozen():
    """The same on every machine and in every version: a seed in a paper must stay valid."""
    plan = PackPlan.from_strategies([(1, 2), (3,)], [3, 2], 3)
    assert assign(plan, [1, 2, 3, 1, 2, 3, 1, 2], seed=7).sequence_indices.tolist() == [0, 1, 5, 3, 7, 6, 4, 2]
    plan, lengths = many_sequences()
    found = hashlib.sha256(assign(plan, lengths, seed=7).sequence_indices.astype("<i8").tobytes()).hexdigest()
    assert found == "f8acf65c6fede956988a2eede5312a6cfd1b56061d00d0b01b8ec5cb701d26cb"


def many_sequences():
    """2.5 x IN_CACHE of length 5, which is divided into buckets, and all the others; 9 and 10 stand alone."""
    lengths = np.concatenate([np.full(5 * IN_CACHE // 2, 5), np.arange(100_000) % 10 + 1]).astype(np.int32)
    lengths = lengths[np.arange(len(lengths)) * 7919 % len(lengths)]  # 7919 is a prime, and no divisor of their number
    return plan_packs(length_histogram(lengths, 10), 10, 2, "spfhp"), lengths


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_threads_change_nothing(monkeypatch, num_threads):
    plan, lengths = many_sequences()
    expected = assign(plan, lengths, 5, num_threads=1)
    monkeypatch.setattr(assignment, "SEQUENCES_PER_THREAD", 1)
    assert assign(plan, lengths, 5, num_threads=num_threads).equals(expected)
    few = PackPlan.from_strategies([(1, 2), (3,)], [1, 1], 3)  # fewer sequences than threads
    assert assign(few, [1, 2, 3], num_threads=num_threads).equals(assign(few, [1, 2, 3], num_threads=1))


def test_several_threads_may_assign_at_once():
    plan, lengths = many_sequences()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: assign(plan, lengths, seed), [1, 2, 1, 2]))
    assert found[0].equals(found[2])
    assert found[1].equals(found[3])
    assert not found[0].equals(found[1])


def test_memory():
    """20 bytes per sequence at most: nearly as many packs as sequences, and no lone length, is the worst."""
    count = 500_000
    worst = PackPlan.from_strategies([(1,), (1, 1)], [count - 2, 1], 2)
    for plan, lengths in [(worst, np.ones(count, np.int64)), many_sequences()]:
        assign(plan, lengths)  # compiled
        tracemalloc.start()
        assign(plan, lengths)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= 20 * len(lengths) + 100_000  # and small tables


def test_numbers_of_more_than_32_bits(monkeypatch):
    """2**32 sequences are too many for a test, so it forces the wide type."""
    plan, lengths = many_sequences()
    expected = assign(plan, lengths, 5)
    monkeypatch.setattr(assignment, "index_type", lambda count: np.int64)
    found = assign(plan, lengths, 5)
    assert (expected.sequence_indices.dtype, found.sequence_indices.dtype) == (np.uint32, np.int64)
    assert found.equals(expected)
    monkeypatch.undo()
    assert assignment.index_type(2**32) is np.uint32
    assert assignment.index_type(2**32 + 1) is np.int64


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12) | st.just(9), min_size=1, max_size=150),
    depth=st.none() | st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_slow_twin_assigns_the_same(lengths, depth, seed):
    plan = plan_packs(length_histogram(lengths, 12), 12, depth, "spfhp")
    found = assign(plan, lengths, seed)
    assert [found.pack(p).tolist() for p in range(found.num_packs)] == slow_assignment.assign_one_by_one(
        plan, lengths, seed
    )


def chi_square(counts, expected):
    counts = np.asarray(counts, float)
    return ((counts - expected) ** 2 / expected).sum()


def test_equal_lengths_and_pack_order_are_uniform():
    """3 packs (1, 2): 3! pairings x 3! orders of the packs = 36 outcomes, each as likely."""
    plan, draws = PackPlan.from_strategies([(1, 2)], [3], 3), 7200
    outcomes = Counter(tuple(assign(plan, [1, 1, 1, 2, 2, 2], seed).sequence_indices.tolist()) for seed in range(draws))
    assert len(outcomes) == 36
    assert chi_square(list(outcomes.values()), draws / 36) < 66.6  # 99.9 % of chi-square with 35 degrees of freedom


def test_lone_lengths_are_uniform():
    """Length 3 only stands alone and is not shuffled by itself; 1 stands alone once, and once with 2.

    3 packs (3,), 1 pack (1,) and 1 pack (1, 2): 3! orders of the lengths 3 x 2! of the lengths 1 x 5 x 4 places for the
    two other packs = 240 outcomes, each as likely.
    """
    plan, draws = PackPlan.from_strategies([(3,), (1,), (1, 2)], [3, 1, 1], 3), 12_000
    outcomes = Counter()
    for seed in range(draws):
        found = assign(plan, [3, 1, 3, 2, 1, 3], seed)
        outcomes[tuple(found.sequence_indices.tolist()), tuple(found.pack_offsets.tolist())] += 1
    assert len(outcomes) == 240
    assert chi_square(list(outcomes.values()), draws / 240) < 312  # 99.9 % of chi-square with 239 degrees of freedom


def test_strategies_are_mixed_uniformly():
    """2 packs (4,) and 2 packs (1, 3): 4! / (2! 2!) = 6 orders of strategies."""
    plan, draws = PackPlan.from_strategies([(4,), (1, 3)], [2, 2], 4), 3000
    orders = Counter()
    for seed in range(draws):
        orders[tuple(np.diff(assign(plan, [4, 4, 1, 1, 3, 3], seed).pack_offsets).tolist())] += 1
    assert len(orders) == 6
    assert chi_square(list(orders.values()), draws / 6) < 20.5  # 99.9 %, 5 degrees of freedom


def test_a_long_shuffle_is_uniform():
    """Divided into buckets and then shuffled: the place of a value does not depend on where it started."""
    count, parts = 2 * IN_CACHE, 8
    table = np.zeros((parts, parts))
    for key in range(4):
        values = np.arange(count, dtype=np.uint32)
        shuffle(values, np.empty_like(values), np.uint64(key))
        assert np.array_equal(np.sort(values), np.arange(count))
        np.add.at(table, (np.arange(count) * parts // count, values.astype(np.int64) * parts // count), 1)
    assert chi_square(table, 4 * count / parts**2) < 85.4  # 99.9 %, 49 degrees of freedom


def test_a_seed_does_not_shuffle_two_lengths_alike():
    plan = PackPlan.from_strategies([(1, 2)], [50], 3)
    pairs = assign(plan, [1] * 50 + [2] * 50).sequence_indices.reshape(50, 2).astype(int)
    assert (pairs[:, 1] - pairs[:, 0] == 50).sum() < 10  # about 1 by chance; all 50 if they were


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2, 2], "places 1 sequences of length 2, here there are 2"),
        ([1], "places 1 sequences of length 2, here there are 0"),
        ([1, 9], "sequence 1 has 9 tokens, more than max_sequence_length=3"),
        ([1, 0], "sequence 1 has length 0"),
        ([1.0, 2.0], "must be integers"),
    ],
)
def test_lengths_of_another_plan_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        assign(PackPlan.from_strategies([(1, 2)], [1], 3), lengths)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(ValueError, match=r"seed=.* must be a whole number, 0 to"):
        assign(PackPlan.from_strategies([(1,)], [1], 3), [1], seed)


@pytest.mark.parametrize("num_threads", [0, -1, 1.5, True])
def test_bad_numbers_of_threads_are_refused(num_threads):
    with pytest.raises(ValueError, match=r"num_threads=.* must be a whole number, at least 1"):
        assign(PackPlan.from_strategies([(1,)], [1], 3), [1], num_threads=num_threads)


def test_lengths_in_the_other_byte_order():
    """Big-endian integers, as in some files."""
    lengths = np.array([1, 3, 1, 2])
    plan = plan_packs(length_histogram(lengths), packer="spfhp")
    assert assign(plan, lengths.astype(">i4")).equals(assign(plan, lengths))
