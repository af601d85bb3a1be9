"""Lower bounds: exact, and never above the true optimum."""

import numpy as np
import pytest
import slow_packers
from histograms import SQUAD, WIKIPEDIA
from hypothesis import given, settings
from hypothesis import strategies as st

from packing import PackPlan, length_histogram
from packing.bounds import counting_bound, depth_bound, l2_bound, lower_bound
from packing.packers.pricing import Slots, value_strategies, whole_prices


def histogram_of(counts, max_sequence_length):
    histogram = np.zeros(max_sequence_length + 1, np.int64)
    for length, count in counts.items():
        histogram[length] = count
    return histogram


def dual_bound(histogram, prices, max_sequence_length, depth):
    """The bound that prices per length prove."""
    slots = Slots.of(histogram, max_sequence_length, depth)
    valuation = value_strategies(slots, whole_prices(slots, prices[slots.lengths]))
    return valuation.bound(histogram[slots.lengths])


@pytest.mark.parametrize(
    ("counts", "limit", "depth", "counting", "sequences", "l2"),
    [
        ({4: 3, 2: 1}, 6, None, 3, 0, 3),  # 14 tokens; no two of 4 fit together
        ({4: 3}, 6, None, 2, 0, 3),
        ({5: 2, 3: 2, 2: 1}, 6, None, 3, 0, 4),  # two 5s alone (k = 2), and 3 + 3 + 2 = 8 tokens in two packs
        ({6: 1, 1: 6}, 6, 2, 2, 4, 4),  # a 6 alone, and six of 1 in pairs; counting sequences alone: ceil(7 / 2)
        ({1: 9}, 6, 1, 2, 9, 9),
        ({1: 2}, 1, None, 2, 0, 2),
        ({3: 6}, 8, None, 3, 0, 3),
        ({4: 5}, 11, None, 2, 0, 3),  # no more than two in a pack
        ({11: 1, 4: 5}, 11, 1, 3, 6, 6),
    ],
)
def test_bounds_draw_their_numbers(counts, limit, depth, counting, sequences, l2):
    histogram = histogram_of(counts, limit)
    assert counting_bound(histogram, limit) == counting
    assert depth_bound(histogram, depth) == sequences
    assert l2_bound(histogram, limit, depth) == l2
    assert lower_bound(histogram, limit, depth) == max(counting, sequences, l2)


@pytest.mark.parametrize(
    ("histogram", "depth", "bound"),
    [(WIKIPEDIA, 2, 10_099_081), (WIKIPEDIA, None, 8_135_727), (SQUAD, 2, 45_335), (SQUAD, None, 39_775)],
)
def test_the_cheap_bound_of_the_published_histograms(histogram, depth, bound):
    """On Wikipedia it is what the linear program proves, except at depth 3."""
    assert lower_bound(histogram, len(histogram) - 1, depth) == bound


few_sequences = st.integers(2, 24).flatmap(
    lambda limit: st.tuples(
        st.just(limit),
        st.lists(st.integers(1, limit), min_size=1, max_size=9),
        st.none() | st.integers(1, 9),
        st.lists(st.floats(0, 1e6), min_size=limit + 1, max_size=limit + 1),
    )
)


def by_depth(lengths, limit):
    """Count lengths of at least k: those above limit - k are alone in a pack; of the rest, limit // k share one."""
    best = 0
    for k in range(1, limit // 2 + 1):
        alone = sum(x > limit - k for x in lengths)
        best = max(best, alone - (alone - sum(x >= k for x in lengths)) // (limit // k))
    return best


@given(few_sequences)
@settings(max_examples=150, deadline=None)
def test_no_bound_exceeds_the_optimum(case):
    limit, lengths, depth, prices = case
    histogram, optimum = length_histogram(lengths, limit), slow_packers.fewest_packs(lengths, limit, depth)
    assert l2_bound(histogram, limit) == max(slow_packers.martello_toth(lengths, limit), by_depth(lengths, limit))
    assert lower_bound(histogram, limit, depth) <= optimum
    assert dual_bound(histogram, np.array(prices), limit, depth) <= optimum


def test_good_prices_prove_the_optimum():
    """Nothing goes with a 7 in rows of 11 but a 4, and no three of 4: half a pack each proves 3, tokens only 2."""
    histogram = histogram_of({4: 5}, 11)
    assert counting_bound(histogram, 11) == 2
    assert dual_bound(histogram, np.full(12, 0.5), 11, None) == 3
    assert dual_bound(histogram, np.zeros(12), 11, None) == 0


def test_bounds_do_not_overflow():
    """Sums beyond 2**63 are counted in Python integers."""
    histogram = histogram_of({300: 2**60, 511: 2**60, 2: 7}, 512)
    assert lower_bound(histogram, 512, None) == lower_bound(histogram, 512, 4) == 2**61
    assert counting_bound(histogram, 512) == -(-(811 * 2**60 + 14) // 512)
    assert dual_bound(histogram, np.arange(513.0), 512, None) >= 2**60
    many = PackPlan.from_strategies([(300,)], [2**60], 512)
    assert many.lower_bound == 2**60


def test_every_plan_knows_how_far_it_is_from_the_bound():
    plan = PackPlan.from_strategies([(4,), (2,)], [3, 1], 6)
    assert (plan.num_packs, plan.lower_bound) == (4, 3)
    assert "1 pack above it" in str(plan)
