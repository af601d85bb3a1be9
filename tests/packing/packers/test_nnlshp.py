"""Non-negative least squares: the dense solver's minimum, the number of packs, refusals."""

import time

import numpy as np
import pytest
import slow_packers
from histograms import SQUAD, WIKIPEDIA
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packing import plan_packs
from packing.packers.nnlshp import fit_histogram
from packing.packers.pricing import fill_tables, find_parts, table_parts


@pytest.mark.parametrize(
    ("histogram", "depth", "most_packs"),
    [
        (WIKIPEDIA, 3, 8_144_400),  # published: 8,155,057; no packing has fewer than 8,143,829
        (WIKIPEDIA, 4, 8_135_750),  # 8,135,727
        (WIKIPEDIA, 8, 8_135_750),
        (WIKIPEDIA, None, 8_135_750),
        (SQUAD, 3, 40_330),  # published: 40,778; no packing has fewer than 40,195
        (SQUAD, None, 40_330),
    ],
    ids=["wiki-3", "wiki-4", "wiki-8", "wiki", "squad-3", "squad"],
)
def test_nnlshp_packs_fewer_than_published(histogram, depth, most_packs):
    plan = plan_packs(histogram, max_sequences_per_pack=depth, packer="nnlshp")
    assert plan.lower_bound <= plan.num_packs <= most_packs
    assert plan.num_sequences == histogram.sum()
    assert plan.equals(plan_packs(histogram, max_sequences_per_pack=depth, packer="nnlshp"))


def test_nnlshp_draws_its_packs():
    """{5: 2, 4: 1, 2: 1, 1: 2} into 6 slots: 1 + 5 twice and 2 + 4 once."""
    histogram = np.array([0, 2, 1, 0, 1, 2, 0])
    slots, x, norm = fit_histogram(histogram, 6, None)
    fitted = {tuple(row.tolist()): round(packs, 9) for row, packs in zip(slots, x, strict=True) if packs > 1e-9}
    assert fitted == {(0, 1, 0, 0, 0, 1, 0): 2.0, (0, 0, 1, 0, 1, 0, 0): 1.0}
    assert norm < 1e-12
    plan = plan_packs(histogram, packer="nnlshp")
    assert dict(zip(plan.strategies, plan.repeats.tolist(), strict=True)) == {(1, 5): 2, (2, 4): 1}


def test_packs_that_would_not_be_full_are_not_built():
    """3 x 4 and 9 x 5 into 9 slots: least squares wants 6 packs of (4, 5), but there are only 3 fours."""
    plan = plan_packs([0, 0, 0, 0, 3, 9, 0, 0, 0, 0], max_sequences_per_pack=2, packer="nnlshp")
    assert dict(zip(plan.strategies, plan.repeats.tolist(), strict=True)) == {(4, 5): 3, (5,): 6}


# The minimum


spikes = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 50) | st.integers(1, 10**12)), min_size=1, max_size=30)


@st.composite
def histograms(draw):
    """Few or many lengths, small or great counts, equal lengths, a pack longer than any sequence."""
    pairs = draw(spikes)
    histogram = np.zeros(max(length for length, _ in pairs) + 1 + draw(st.integers(0, 3)), np.int64)
    for length, count in pairs:
        histogram[length] = count
    return histogram


def assert_norms_equal(ours, dense, histogram):
    assert ours == pytest.approx(dense, rel=1e-8, abs=1e-11 * np.linalg.norm(histogram))


@settings(max_examples=200, deadline=None)
@given(histogram=histograms(), depth=st.integers(1, 4))
@example(histogram=np.array([0, 1, 1, 3, 3, 2, 3, 3, 3, 0, 1, 3, 2, 1, 0, 0, 2, 0, 3, 0, 1, 2, 1]), depth=4)
def test_reaches_the_dense_minimum(histogram, depth):
    slots, x, norm = fit_histogram(histogram, len(histogram) - 1, depth)
    _, dense_norm = slow_packers.dense_nnls(histogram, depth)
    assert_norms_equal(norm, dense_norm, histogram)
    assert (x >= 0).all()
    assert (slots @ np.arange(len(histogram)) == len(histogram) - 1).all()
    assert (slots.sum(1) <= depth).all()


@pytest.mark.parametrize(("limit", "depth"), [(64, 2), (64, 3), (96, 3), (48, 4), (24, 8), (16, 16)])
@pytest.mark.parametrize("seed", range(3))
def test_reaches_the_dense_minimum_of_corpora(limit, depth, seed):
    histogram = corpus(limit, 20_000, seed)
    _, _, norm = fit_histogram(histogram, limit, depth)
    assert_norms_equal(norm, slow_packers.dense_nnls(histogram, depth)[1], histogram)


@pytest.mark.long
@pytest.mark.parametrize("histogram", [WIKIPEDIA, SQUAD], ids=["wiki", "squad"])
def test_reaches_the_dense_minimum_of_published_histograms(histogram):
    """By a few hundred of the whole matrix's columns, 22,102 at 512 tokens; -s shows the times."""
    limit, seconds = len(histogram) - 1, []
    fit_histogram(histogram, limit, 3)  # compiles
    for _ in range(3):
        start = time.perf_counter()
        slots, _, norm = fit_histogram(histogram, limit, 3)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    dense_x, dense_norm = slow_packers.dense_nnls(histogram, 3)
    dense_seconds = time.perf_counter() - start
    print(f"\n{norm!r} in {min(seconds):.3f} s; dense: {dense_norm!r} in {dense_seconds:.1f} s")
    assert norm == pytest.approx(dense_norm, rel=1e-8)
    assert len(slots) <= limit and len(dense_x) > 20 * limit


@pytest.mark.parametrize("depth", [3, 4, 8, None])
def test_no_strategy_would_gain_anything(depth):
    """Where no dense solver reaches: at the minimum, a strategy is worth nothing, and those in use exactly nothing."""
    weights = np.where(np.arange(513) <= 8, 0.09, 1.0)
    slots, x, _ = fit_histogram(WIKIPEDIA, 512, depth)
    worth = weights**2 * (WIKIPEDIA - x @ slots)
    scale = np.linalg.norm(WIKIPEDIA)
    assert abs(slots @ worth).max() < 1e-13 * scale
    assert slow_packers.best_exact_sum(worth, depth or 512)[512] < 1e-13 * scale


def corpus(limit, count, seed):
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(np.log(limit / 3), 0.8, count).astype(int), 1, limit)
    return np.bincount(lengths, minlength=limit + 1)


@settings(max_examples=100, deadline=None)
@given(worth=st.lists(st.integers(-50, 50), min_size=1, max_size=24), depth=st.integers(1, 26))
def test_the_best_sums_are_found(worth, depth):
    worth = np.array([0, *worth])
    parts = table_parts(depth, len(worth) - 1)
    tables, lengths = np.zeros((len(parts), len(worth)), np.int64), np.zeros(len(worth), np.int64)
    tables[0] = worth
    fill_tables(tables, parts)
    assert tables[-1].tolist() == slow_packers.best_exact_sum(worth, depth).tolist()
    for total in range(len(worth)):
        found = lengths[: find_parts(tables, parts, total, lengths)]
        assert len(found) <= depth
        assert (found.sum(), worth[found].sum()) == (total, tables[-1, total])


# Plans


@settings(max_examples=150, deadline=None)
@given(histogram=histograms(), depth=st.none() | st.integers(1, 26))
def test_every_sequence_is_packed(histogram, depth):
    """plan_packs checks coverage, length and depth."""
    plan = plan_packs(histogram, max_sequences_per_pack=depth, packer="nnlshp")
    assert plan.num_packs <= plan.num_sequences
    assert plan.equals(plan_packs(histogram, max_sequences_per_pack=depth, packer="nnlshp"))


def test_efficiency_does_not_depend_on_the_counts():
    few = plan_packs(corpus(128, 100_000, 0), packer="nnlshp")
    many = plan_packs(corpus(128, 100_000, 0) * 10**9, packer="nnlshp")
    assert 0.999 < few.packing_efficiency <= many.packing_efficiency + 1e-4


def test_it_may_need_more_packs_than_lpfhp():
    """As its docstring says. 12 slots; 6 + 6, 3 + 3 + 6 once and 3 + 7 three times are 5 packs.

    But 3 + 7 is not 12, so to least squares it is no strategy; 3 + 3 + 6 is, and leaves too few 3s for the 7s."""
    histogram = np.bincount([3, 3, 3, 3, 3, 6, 6, 6, 7, 7, 7], minlength=13)
    packs = {name: plan_packs(histogram, packer=name).num_packs for name in ("lpfhp", "nnlshp")}
    assert packs == {"lpfhp": 5, "nnlshp": 6}


@pytest.mark.parametrize("limit", [2049, 8192, 131_072])
def test_long_packs_are_refused(limit):
    with pytest.raises(ValueError, match=rf"max_sequence_length={limit} is more than the 2048.*use packer='lpfhp'"):
        plan_packs([0, 3, 5], limit, packer="nnlshp")
