"""Longest-pack-first: the published counts, and the same packs as best fit over single sequences."""

import numpy as np
import pytest
import slow_packers
from histograms import SQUAD, WIKIPEDIA, histograms
from hypothesis import given, settings
from hypothesis import strategies as st

from packing import length_histogram, plan_packs


@pytest.mark.parametrize(
    ("histogram", "depth", "published_packs"),
    [
        (WIKIPEDIA, 2, 10_099_081),
        (WIKIPEDIA, 3, 9_090_154),
        (WIKIPEDIA, 4, 8_657_119),
        (WIKIPEDIA, 8, 8_207_569),
        (WIKIPEDIA, None, 8_138_483),
        (SQUAD, 3, 40_631),
        (SQUAD, None, 40_631),
    ],
    ids=["wiki-2", "wiki-3", "wiki-4", "wiki-8", "wiki", "squad-3", "squad"],
)
def test_lpfhp_is_as_good_as_published(histogram, depth, published_packs):
    plan = plan_packs(histogram, max_sequences_per_pack=depth, packer="lpfhp")
    assert plan.lower_bound <= plan.num_packs <= published_packs
    assert plan.num_sequences == histogram.sum()
    assert plan.max_depth <= (depth or 512)


def test_lpfhp_draws_its_packs():
    """{4: 1, 3: 1, 2: 2, 1: 1} into 6 slots: 4 | 3, both 2s go where they fill best, and the 1 to what is left."""
    plan = plan_packs([0, 1, 2, 1, 1, 0, 0], packer="lpfhp")
    assert dict(zip(plan.strategies, plan.repeats.tolist(), strict=True)) == {(2, 4): 1, (1, 2, 3): 1}


def fills(packs):
    return sorted(sum(pack) for pack in packs)


def packs_of(plan):
    return [pack for pack, repeats in zip(plan.strategies, plan.repeats, strict=True) for _ in range(repeats)]


@settings(max_examples=300, deadline=None)
@given(histogram=histograms)
def test_fills_its_packs_as_the_textbook_does(histogram):
    """Best fit does not distinguish packs that are equally full, so any of them is right."""
    limit = len(histogram) - 1
    plan = plan_packs(histogram, packer="lpfhp")
    lengths = np.repeat(np.arange(limit + 1), histogram).tolist()
    assert fills(packs_of(plan)) == fills(slow_packers.best_fit_decreasing(lengths, limit))


@settings(max_examples=300, deadline=None)
@given(histogram=histograms, depth=st.integers(1, 9))
def test_packs_as_few_as_the_textbook_at_any_depth(histogram, depth):
    """Among packs that are equally full the textbook ignores depth, so it may need one pack more or less."""
    limit = len(histogram) - 1
    plan = plan_packs(histogram, max_sequences_per_pack=depth, packer="lpfhp")
    lengths = np.repeat(np.arange(limit + 1), histogram).tolist()
    assert abs(plan.num_packs - len(slow_packers.best_fit_decreasing(lengths, limit, depth))) <= 1


@pytest.mark.parametrize("limit", [512, 8192])
@pytest.mark.parametrize("seed", range(3))
def test_fills_as_the_textbook_does_at_length(limit, seed):
    """More spaces than a word of the bitmap has bits, and more than two of its levels hold."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(np.log(limit / 8), 1, 400).astype(int), 1, limit)
    plan = plan_packs(length_histogram(lengths, limit), packer="lpfhp")
    assert fills(packs_of(plan)) == fills(slow_packers.best_fit_decreasing(lengths.tolist(), limit))


def test_work_does_not_grow_with_the_counts():
    """1e11 times as many sequences: hardly more strategies, and the work is the strategies."""
    shape = SQUAD * 10**11
    few = plan_packs(SQUAD, packer="lpfhp")
    many = plan_packs(shape, packer="lpfhp")
    assert many.num_sequences == 88_641 * 10**11
    assert len(many.repeats) < 2 * len(few.repeats)
