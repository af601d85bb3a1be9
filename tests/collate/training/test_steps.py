"""Which packs meet in a step: exactly as many sequences in each, every pack once, at random, and evenly dealt."""

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collate.training.order import (
    SequencesPerStep,
    deal_packs,
    lay_out_steps,
    pack_costs,
    pack_depths,
    pack_lengths,
    plan_steps,
)
from packing import EpochPacks, assign, length_histogram, pack_dataset, plan_packs, published_histogram

datasets.disable_progress_bars()


def lengths_like(name, count=60_000):
    """(lengths, max_sequence_length) as they occur."""
    draw = np.random.default_rng(0)
    if name == "wikipedia pairs":
        histogram = published_histogram("wikipedia")
        return draw.choice(len(histogram), count, p=histogram / histogram.sum()), 512
    if name == "paragraphs":
        return np.clip(draw.lognormal(4.4, 0.7, count).astype(int), 5, 256), 256
    if name == "sentences":
        return np.clip(draw.lognormal(3.0, 0.6, 5 * count).astype(int), 4, 512), 512
    return draw.integers(1, 129, count), 128


CORPORA = ["wikipedia pairs", "paragraphs", "sentences", "uniform"]


def packs_like(name, seed=0):
    """lengths pack after pack, and where each pack begins."""
    lengths, longest = lengths_like(name)
    plan = plan_packs(length_histogram(lengths, longest), longest, packer="lpfhp")
    assignment = assign(plan, lengths, seed)
    return lengths[assignment.sequence_indices], assignment.pack_offsets.astype(np.int64)


def check_plan(depths, plan, sequences_per_step):
    """Whatever the depths: every pack once, the number of steps, none empty."""
    assert sorted(plan.depths) == sorted(depths)
    assert plan.num_steps == -(-int(sum(depths)) // sequences_per_step)
    assert plan.packs.min() > 0 and plan.packs.sum() == len(depths) and plan.sequences.sum() == sum(depths)


@pytest.mark.parametrize("sequences_per_step", [32, 256, 1000])
@pytest.mark.parametrize("name", CORPORA)
def test_every_step_but_the_last_holds_exactly_as_many_sequences(name, sequences_per_step):
    lengths, offsets = packs_like(name)
    depths = np.diff(offsets)
    if depths.max() > sequences_per_step:
        with pytest.raises(ValueError, match=f"the {depths.max()} sequences of the deepest pack"):
            plan_steps(depths, sequences_per_step)
        return
    plan = plan_steps(depths, sequences_per_step)
    check_plan(depths, plan, sequences_per_step)
    assert (plan.sequences[1:] == sequences_per_step).all()
    assert plan.sequences[0] == (len(lengths) - 1) % sequences_per_step + 1
    table = lay_out_steps(plan, depths, seed=1, epoch=2)
    sums = np.append(depths, 0)[table].sum(1)
    assert (sums[:-1] == sequences_per_step).all() and sums[-1] == plan.sequences[0]
    assert sorted(table[table < len(depths)]) == list(range(len(depths)))
    mean = sequences_per_step * len(depths) / len(lengths)
    assert plan.most_packs < 1.1 * mean + 8 * np.sqrt(mean)  # slots are not wasted


@settings(max_examples=200, deadline=None)
@given(depths=st.lists(st.integers(1, 12), min_size=1, max_size=80), more=st.integers(0, 30))
def test_whatever_the_depths_are(depths, more):
    """Few and odd packs: perhaps not exact, but nothing lost, and never far away."""
    sequences_per_step = max(depths) + more
    plan = plan_steps(np.array(depths), sequences_per_step)
    check_plan(depths, plan, sequences_per_step)
    dealt = np.cumsum(plan.sequences)
    wanted = plan.sequences.sum() - sequences_per_step * np.arange(plan.num_steps)[::-1]
    assert (abs(dealt - wanted) < max(depths)).all()
    if 1 in depths and depths.count(1) >= len(depths) // 2 and len(depths) > 40:
        assert (plan.sequences[1:-1] == sequences_per_step).all()


def test_depths_that_do_not_add_up():
    """Packs of 3 make 4 only on average: 3 3 6 of 12, and so on; the last takes what is left."""
    plan = plan_steps(np.full(40, 3), 4)
    check_plan([3] * 40, plan, 4)
    assert set(plan.sequences) == {3, 6}


@pytest.mark.parametrize(("value", "message"), [(0, "must be a whole number"), (2.5, "must be a whole number")])
def test_no_number(value, message):
    with pytest.raises(ValueError, match=message):
        plan_steps(np.ones(4), value)


@pytest.mark.parametrize("name", CORPORA[:3])
def test_the_order_is_random(name):
    """Other packs, in another order, for each seed and epoch; neither depth nor length drifts over the epoch."""
    lengths, offsets = packs_like(name)
    depths = np.diff(offsets)
    plan = plan_steps(depths, 256)
    drawn = {key: lay_out_steps(plan, depths, *key) for key in [(0, 0), (0, 1), (1, 0)]}
    assert (drawn[0, 0] == lay_out_steps(plan, depths, 0, 0)).all()
    steps = {key: {frozenset(step) for step in table.tolist()} for key, table in drawn.items()}
    assert len(steps[0, 0] | steps[0, 1] | steps[1, 0]) == 3 * plan.num_steps
    longest = np.maximum.reduceat(lengths, offsets[:-1])
    for values in (depths, longest):
        values = values.astype(float)
        z = []
        for seed in range(20):
            table = lay_out_steps(plan, depths, seed, 0)[:-1]
            tenth = len(table) // 10
            first, last = (values[part[part < len(depths)]] for part in (table[:tenth], table[-tenth:]))
            z.append((first.mean() - last.mean()) / (values.std() * np.sqrt(1 / len(first) + 1 / len(last))))
        assert abs(np.mean(z)) < 4 / np.sqrt(len(z)) and np.std(z) < 2, z


def test_each_pack_may_come_at_any_time():
    """Chi-squared: in which tenth of the epoch a pack lies, over many seeds."""
    depths = np.repeat([1, 2, 3, 5], [120, 60, 30, 10])
    plan = plan_steps(depths, 16)
    places = np.zeros((len(depths), 4))
    for seed in range(400):
        table = lay_out_steps(plan, depths, seed, 0)
        for quarter, part in enumerate(np.array_split(table[:-1], 4)):
            places[part[part < len(depths)], quarter] += 1
    expected = places.sum(1, keepdims=True) * [
        len(part) / (plan.num_steps - 1) for part in np.array_split(table[:-1], 4)
    ]
    chi2 = ((places - expected) ** 2 / expected).sum()
    degrees = 3 * len(depths)
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees)


def deal_slowly(packs, costs, num_parts):
    """One step by plain Python: rounds of the costliest packs, each round's costliest to the cheapest part."""
    parts, so_far = [[] for _ in range(num_parts)], [0] * num_parts
    queue = sorted(packs, key=lambda pack: (-costs[pack], packs.index(pack)))
    while queue:
        cheapest_first = sorted(range(num_parts), key=lambda part: so_far[part])
        for part in cheapest_first:
            if queue:
                parts[part].append(queue.pop(0))
                so_far[part] += costs[parts[part][-1]]
    return parts


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
def test_packs_are_dealt_evenly(num_parts):
    lengths, offsets = packs_like("wikipedia pairs")
    depths, costs = np.diff(offsets), pack_costs(lengths, offsets, width=64)
    steps = lay_out_steps(plan_steps(depths, 256), depths, 0, 0)
    slots = -(-steps.shape[1] // num_parts) + 3
    dealt = deal_packs(steps, costs, num_parts, slots)
    assert dealt.shape == (len(steps), num_parts, slots)
    for step, parts in list(zip(steps, dealt, strict=True))[:30]:
        packs = step[step < len(depths)].tolist()
        assert [part[part < len(depths)].tolist() for part in parts] == deal_slowly(packs, costs.tolist(), num_parts)
    counts = (dealt < len(depths)).sum(2)
    assert (counts.max(1) - counts.min(1) <= 1).all()
    of_part = np.append(costs, 0)[dealt].sum(2)[:-1]
    equal = of_part[counts[:-1].min(1) == counts[:-1].max(1)]  # where numbers are equal, costs are nearly equal
    assert len(equal) and (equal.max(1) / equal.mean(1)).mean() < 1.02
    with pytest.raises(ValueError, match="do not fit into"):
        deal_packs(steps, costs, num_parts, slots - 4)


def test_costs():
    lengths, offsets = np.array([3, 1, 2], np.int32), np.array([0, 2, 3])
    assert pack_costs(lengths, offsets, width=1).tolist() == [10 + 6 * 4, 4 + 6 * 2]


def small_packs(**options):
    draw = np.random.default_rng(3)
    rows = [{"input_ids": [7 + i % 40] * int(n)} for i, n in enumerate(draw.integers(2, 30, 500))]
    return pack_dataset(datasets.Dataset.from_list(rows), 32, **options)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("make", [lambda packed: packed, EpochPacks], ids=["dataset", "EpochPacks"])
def test_the_sampler_keeps_steps_together(make, ranks):
    """In every epoch, re-assigned or not: N sequences to a step, each pack once, as many steps."""
    packed = make(small_packs())
    num_packs, passes = len(packed), 3
    sampler = SequencesPerStep(packed, 24, packs_per_pass=12, passes=passes, ranks=ranks, seed=0, width=8)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == -(-500 // 24) * passes * ranks * 12
        assert sorted(i for i in order if i < num_packs) == list(range(num_packs))
        depths = np.append(pack_depths(packed), 0)
        sums = depths[np.array(order).reshape(-1, passes * ranks * 12)].sum(1)
        assert (sums[:-1] == 24).all() and sums[-1] == 500 % 24
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    sampler.set_epoch(1)
    assert list(sampler) == orders[1]
    assert (getattr(packed, "epoch", 1), len(pack_lengths(packed)[0])) == (1, 500)


def test_a_step_does_not_depend_on_ranks_and_passes():
    packed = small_packs()
    steps = []
    for passes, ranks, packs_per_pass in ((1, 1, 40), (4, 2, 6), (2, 1, 17)):
        sampler = SequencesPerStep(packed, 24, packs_per_pass, passes, ranks, seed=5, width=8)
        order = np.array(list(sampler)).reshape(sampler.plan.num_steps, -1)
        steps.append([sorted(step[step < len(packed)].tolist()) for step in order])
    assert steps[0] == steps[1] == steps[2]


def test_too_few_slots_are_refused():
    with pytest.raises(ValueError, match=r"24 sequences take up to \d+ packs, a step has 8 slots.*steps=2"):
        SequencesPerStep(small_packs(), 24, packs_per_pass=8, passes=1, ranks=1, seed=0, width=8)
