"""Balanced orders of packs: the same packs, batches that cost alike, and still random."""

import datasets
import numpy as np
import pytest
import slow_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from packing import (
    PackPlan,
    assign,
    attention_cost,
    balance_packs,
    cli,
    length_histogram,
    pack_dataset,
    packed_info,
    plan_packs,
    published_histogram,
    step_costs,
)

datasets.disable_progress_bars()


def packs_of(assignment):
    return [tuple(assignment.pack(p).tolist()) for p in range(assignment.num_packs)]


def random_assignment(lengths, max_sequence_length, seed=0):
    plan = plan_packs(length_histogram(lengths, max_sequence_length), packer="spfhp")
    return assign(plan, lengths, seed)


def test_attention_cost_draws_its_numbers():
    plan = PackPlan.from_strategies([(1, 3)], [1], 4)
    assert attention_cost(assign(plan, [3, 1]), [3, 1]).tolist() == [10]  # 3 x 3 + 1 x 1


def test_balance_draws_its_batches():
    """Costs 16, 16 (one sequence of 4) and 8, 8 (two of 2): each batch of 2 packs has one of each, 24 in all."""
    lengths = [4, 4, 2, 2, 2, 2]
    assignment = assign(PackPlan.from_strategies([(4,), (2, 2)], [2, 2], 4), lengths)
    for seed in range(20):
        balanced = balance_packs(assignment, lengths, 2, seed)
        assert attention_cost(balanced, lengths).reshape(2, 2).sum(1).tolist() == [24, 24]
        found = step_costs(balanced, lengths, 2)
        assert (found.num_steps, found.mean, found.max_over_mean, found.std_over_mean) == (2, 24.0, 1.0, 0.0)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_only_the_order_changes(lengths, share, seed):
    assignment = random_assignment(lengths, 30)
    packs_per_step = max(1, round(share * assignment.num_packs))
    balanced = balance_packs(assignment, lengths, packs_per_step, seed)
    assert sorted(packs_of(balanced)) == sorted(packs_of(assignment))
    assert balanced.sequence_indices.dtype == assignment.sequence_indices.dtype
    assert balanced.pack_offsets.dtype == assignment.pack_offsets.dtype
    assert attention_cost(balanced, lengths).tolist() == [
        sum(lengths[i] ** 2 for i in pack) for pack in packs_of(balanced)
    ]
    assert balanced.equals(balance_packs(assignment, np.array(lengths, np.uint16), packs_per_step, seed))


@pytest.mark.parametrize("name", ["wikipedia", "squad"])
@pytest.mark.parametrize(("packs_per_step", "factor", "costliest"), [(4, 4, 1.12), (8, 8, 1.03), (32, 100, 1.001)])
def test_batches_cost_alike(name, packs_per_step, factor, costliest):
    """The standard deviation over batches shrinks by the factor, the costliest batch comes near to the mean."""
    histogram = published_histogram(name)
    histogram = histogram // max(1, histogram.sum() // 100_000)
    lengths = np.repeat(np.arange(len(histogram)), histogram)
    assignment = random_assignment(lengths, len(histogram) - 1)
    before = step_costs(assignment, lengths, packs_per_step)
    after = step_costs(balance_packs(assignment, lengths, packs_per_step), lengths, packs_per_step)
    assert before.num_steps == after.num_steps == assignment.num_packs // packs_per_step
    assert after.std_over_mean < before.std_over_mean / factor
    assert after.max_over_mean < costliest < before.max_over_mean


def test_the_seed_decides():
    lengths = np.random.default_rng(0).integers(1, 65, 1000)
    assignment = random_assignment(lengths, 64)
    first = balance_packs(assignment, lengths, 8, seed=1)
    assert first.equals(balance_packs(assignment, lengths, 8, seed=1))
    assert not first.equals(balance_packs(assignment, lengths, 8, seed=2))


def test_the_order_stays_random():
    """Each of 10 packs is equally likely at each of the 10 places: 2 batches of 4 and an incomplete one of 2."""
    lengths = [10, 9, 9, 8, 6, 5, 4, 3, 2, 2]
    assignment = assign(PackPlan.from_strategies([(n,) for n in lengths], [1] * 10, 10), lengths)
    draws, table = 4000, np.zeros((10, 10))
    for seed in range(draws):
        table[balance_packs(assignment, lengths, 4, seed).sequence_indices, np.arange(10)] += 1
    chi_square = ((table - draws / 10) ** 2 / (draws / 10)).sum()
    assert chi_square < 125.0  # 99.9 % of chi-square with 81 degrees of freedom


@pytest.mark.parametrize(
    ("packs_per_step", "message"),
    [
        (0, "packs_per_step=0 must be a whole number, at least 1"),
        (True, "packs_per_step=True must be"),
        (2.0, "packs_per_step=2.0 must be"),
        (4, "packs_per_step=4 is more than the 3 packs"),
    ],
)
def test_bad_batches_are_refused(packs_per_step, message):
    assignment = assign(PackPlan.from_strategies([(3,)], [3], 3), [3, 3, 3])
    with pytest.raises(ValueError, match=message):
        balance_packs(assignment, [3, 3, 3], packs_per_step)
    with pytest.raises(ValueError, match=message):
        step_costs(assignment, [3, 3, 3], packs_per_step)


def test_other_lengths_are_refused():
    assignment = assign(PackPlan.from_strategies([(3,)], [3], 3), [3, 3, 3])
    with pytest.raises(ValueError, match="the assignment has 3 sequences, but there are 2 lengths"):
        balance_packs(assignment, [3, 3], 1)


@pytest.fixture
def rows():
    return datasets.Dataset.from_list(slow_rows.random_rows(0, 200, 40))


def test_a_balanced_dataset(rows):
    any_order, balanced = pack_dataset(rows, 40), pack_dataset(rows, 40, balance=5)
    assert sorted(balanced["sequence_indices"]) == sorted(any_order["sequence_indices"])
    assert balanced._fingerprint != any_order._fingerprint

    costs = np.array([sum(n * n for n in lengths) for lengths in balanced["sequence_lengths"]])
    per_step = costs[: len(costs) // 5 * 5].reshape(-1, 5).sum(1)
    info = packed_info(balanced)
    assert info.balance == 5
    assert info.step_costs_after.num_steps == len(per_step)
    assert info.step_costs_after.max_over_mean == pytest.approx(per_step.max() / per_step.mean())
    assert info.step_costs_after.std_over_mean == pytest.approx(per_step.std() / per_step.mean())
    assert info.step_costs_after.std_over_mean < info.step_costs_before.std_over_mean / 4
    assert packed_info(any_order).balance is packed_info(any_order).step_costs_after is None


def test_the_command_says_the_spread(tmp_path, rows, capsys):
    rows.save_to_disk(tmp_path / "source")
    arguments = [str(tmp_path / "source"), str(tmp_path / "packed"), "--max-sequence-length", "40", "--balance"]
    assert cli.main([*arguments, "5"]) == 0
    info = packed_info(datasets.load_from_disk(tmp_path / "packed"))
    said = capsys.readouterr().out
    assert f"attention cost of {info.num_packs // 5} batches of 5 packs" in said
    assert f"before   {info.step_costs_before}" in said
    assert f"after    {info.step_costs_after}" in said
    assert cli.main([*arguments[:1], str(tmp_path / "other"), *arguments[2:], "0"]) == 2
    assert "--balance 0 must be" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
