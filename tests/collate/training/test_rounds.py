"""Packs with cohorts in training: rounds in order, no step in two of them, a document on one rank, ranks or passes
change nothing."""

import re
from functools import cache

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining_models import MAX_LENGTH
from training_runs import COHORTS, make_cohorts, make_packs, make_trainer, train_cohorts

from collate.training.order import pack_depths
from collate.training.rounds import RoundSteps, order_of_rounds, plan_rounds, steps_by_packs
from packing import EpochPacks, pack_dataset

datasets.disable_progress_bars()


@cache
def small_packs(lanes=4, cohort=12, count=60, seed=3):
    draw = np.random.default_rng(seed)
    rows = [{"input_ids": [7 + i % 40] * int(n)} for i, n in enumerate(draw.integers(2, 90, count))]
    options = {"overlong": "split", "packer": "lpfhp", "cohort": cohort, "cohort_lanes": lanes}
    return pack_dataset(datasets.Dataset.from_list(rows), 16, **options)


def sampler(packed, sequences_per_step=None, packs_per_pass=4, passes=2, ranks=1, seed=0, **more):
    return RoundSteps(packed, sequences_per_step, packs_per_pass, passes, ranks, seed, width=8, **more)


def steps_of(order, packs):
    """[[[packs of a rank] for each rank] for each step], without empty packs."""
    table = np.array(list(order)).reshape(-1, order.passes, order.ranks, order.packs_per_pass)
    steps = table.transpose(0, 2, 1, 3).reshape(len(table), order.ranks, -1)
    return [[[i for i in rank if i < packs] for rank in step] for step in steps.tolist()]


def faults(steps, packs):
    """What a model with memory could not train on, as a set of words. packs: dicts."""
    said, pieces, homes, rounds = set(), {}, {}, []
    if sorted(i for step in steps for rank in step for i in rank) != list(range(len(packs))):
        said.add("not every pack once")
    for step in steps:
        documents = [row for rank in step for i in rank for row in packs[i]["sequence_indices"]]
        if len(documents) > len(set(documents)):
            said.add("two pieces of a document in a step")
        found = {(packs[i]["sequence_cohorts"][0], packs[i]["sequence_rounds"][0]) for rank in step for i in rank}
        if len(found) > 1:
            said.add("a step in two rounds")
        if not found:
            said.add("an empty step")
        rounds += [each for each in found if each not in rounds[-1:]]
        for number, rank in enumerate(step):
            for i in rank:
                for row, start in zip(packs[i]["sequence_indices"], packs[i]["sequence_starts"], strict=True):
                    if homes.setdefault(row, number) != number:
                        said.add("a document on two ranks")
                    if start != 16 * pieces.get(row, 0):
                        said.add("pieces out of order")
                    pieces[row] = pieces.get(row, 0) + 1
    if len(rounds) > len(set(rounds)):
        said.add("a round comes twice")
    return said


@settings(max_examples=20, deadline=None)
@given(
    lanes=st.sampled_from([1, 2, 4, 6]),
    share=st.integers(0, 3),
    packs_per_pass=st.integers(1, 5),
    passes=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    sequences=st.booleans(),
    reassigned=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_a_model_with_memory_can_train_on_it(lanes, share, packs_per_pass, passes, seed, sequences, reassigned, epoch):
    ranks = [number for number in (1, 2, 3, 6) if lanes % number == 0][share % 2 if lanes > 1 else 0]
    packed = small_packs(lanes, seed=seed % 5)
    if reassigned:
        packed = EpochPacks(packed, seed)
    per_step = lanes * int(pack_depths(packed).max()) * (1 + share) if sequences else None
    if sequences:
        packs_per_pass = plan_rounds(packed, per_step, ranks).most_packs
    order = sampler(packed, per_step, packs_per_pass, passes, ranks, seed)
    length = len(order)
    order.set_epoch(epoch)
    assert len(list(order)) == length == len(order)
    packs = list(packed)
    steps = steps_of(order, len(packs))
    assert faults(steps, packs) == set()
    held = [sum(len(packs[i]["sequence_lengths"]) if sequences else 1 for rank in step for i in rank) for step in steps]
    full = per_step or packs_per_pass * passes * ranks
    assert order.num_steps == len(steps)
    if not sequences or epoch == 0:  # which shares of lanes meet is drawn, too
        assert order.num_short_steps == sum(n < full for n in held)
    assert sequences or max(held) <= full


def test_other_orders_have_faults():
    """A negative control of `faults`: packs in any order, and in their order without a look at rounds."""
    packed = small_packs()
    packs, draw = list(packed), np.random.default_rng(0)
    shuffled = [[[int(i)] for i in pair] for pair in draw.permutation(len(packs) // 2 * 2).reshape(-1, 2)]
    assert {"pieces out of order", "a step in two rounds", "a document on two ranks"} <= faults(shuffled, packs)
    in_order = [[list(range(first, min(first + 8, len(packs))))] for first in range(0, len(packs), 8)]
    found = faults(in_order, packs)
    assert found == {"a step in two rounds", "two pieces of a document in a step", "a round comes twice"}


def test_steps_draw_their_packs():
    """5 packs of lane 0 and 3 of lane 1 in a round, then one in the next: two groups of two slots, and one of four."""
    places = np.array([[0, 0, lane] for lane in (0, 0, 0, 0, 0, 1, 1, 1)] + [[0, 1, 1]])
    assert steps_by_packs(places, groups=2, slots_per_group=2).tolist() == [0, 0, 1, 1, 2, 0, 1, 2, 3]
    assert steps_by_packs(places, groups=1, slots_per_group=4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_an_epoch_draws_cohorts_and_packs_and_leaves_rounds_in_order():
    places = np.array([[c, r, lane] for c in (4, 7, 9) for r in range(3) for lane in (0, 1, 1)])
    orders = [order_of_rounds(places, 5, epoch, shuffle=True) for epoch in range(12)]
    assert (orders[3] == order_of_rounds(places, 5, 3, shuffle=True)).all()
    assert len({tuple(places[order, 0]) for order in orders}) > 3
    assert len({tuple(order) for order in orders}) == 12
    for order in orders:
        assert (places[order, 1].reshape(3, 9) == np.repeat(range(3), 3)).all()
    assert order_of_rounds(places, 5, 1, shuffle=False).tolist() == list(range(27))
    assert order_of_rounds(places[::-1], 5, 1, shuffle=False)[:3].tolist() == [24, 25, 26]


@pytest.mark.parametrize("sequences_per_step", [None, 64])
def test_a_step_does_not_depend_on_ranks_and_passes(sequences_per_step):
    packed = small_packs(lanes=4, count=150, cohort=64)
    steps = []
    for packs_per_pass, passes, ranks in ((16, 1, 1), (4, 4, 1), (8, 1, 2), (1, 8, 2), (4, 1, 4)):
        if sequences_per_step is not None:
            packs_per_pass *= 4
        order = sampler(packed, sequences_per_step, packs_per_pass, passes, ranks)
        order.set_epoch(1)
        steps.append([sorted(i for rank in step for i in rank) for step in steps_of(order, len(packed))])
    assert steps[0] == steps[1] == steps[2] == steps[3] == steps[4]


def test_short_steps_are_counted_and_said(caplog):
    order = sampler(small_packs())
    said = caplog.messages[-1]
    packs = len(order.dataset)
    assert said == (
        f"the packs have cohorts, and a step never spans two rounds: of {order.num_steps} steps in an epoch, "
        f"{order.num_short_steps} have fewer than 8 packs; on average {packs / order.num_steps:.1f}"
    )
    assert 0 < order.num_short_steps <= order.num_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ranks": 3},
            "3 ranks do not divide the 4 lanes of the cohorts, and a lane stays on one rank; train on 1, 2, 4",
        ),
        (
            {"sequences_per_step": 30},
            "sequences_per_step=30 cannot be shared out to the 4 lanes of the cohorts; set it",
        ),
        ({"sequences_per_step": 4}, "sequences_per_step=4 is 1 for each of 4 lanes, and a pack has"),
        (
            {"sequences_per_step": 64, "packs_per_pass": 2},
            "a step has 4 slots: per_device_train_batch_size=2, 2 passes",
        ),
    ],
)
def test_what_lanes_cannot_share_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sampler(small_packs(), **options)


@pytest.mark.parametrize("select", [lambda p: p.select(range(30, len(p))), lambda p: p.select(range(0, len(p), 2))])
def test_packs_whose_pieces_before_are_missing_are_refused(select):
    with pytest.raises(ValueError, match=r"source row \d+ has no piece \d in the training dataset, or one twice"):
        sampler(select(small_packs()))


def test_a_beginning_and_shuffled_packs_are_trained_on_in_order():
    """Each pack says where it belongs."""
    for chosen in (small_packs().select(range(50)), small_packs().shuffle(seed=1)):
        packs = list(chosen)
        assert faults(steps_of(sampler(chosen), len(packs)), packs) == set()


# PackedTrainer


@pytest.mark.parametrize("strategy", ["random", "sequential"])
@pytest.mark.parametrize("make", [lambda packs: packs.packed, lambda packs: packs], ids=["dataset", "EpochPacks"])
def test_the_trainer_keeps_rounds_in_order(make, strategy):
    dataset = make(make_cohorts())
    with make_trainer(
        train_dataset=dataset, per_device_train_batch_size=8, train_sampling_strategy=strategy
    ) as trainer:
        loader = trainer.get_train_dataloader()
        order = trainer._train_order
        assert isinstance(order, RoundSteps) and order.shuffle == (strategy == "random")
        assert len(loader) == order.num_steps and len(list(loader)) == order.num_steps
        order.set_epoch(1)
        packs = list(dataset)
        found = faults_of_trainer(steps_of(order, len(packs)), packs)
        assert found == set()


def faults_of_trainer(steps, packs):
    """As faults, for packs of MAX_LENGTH tokens."""
    scaled = [
        one | {"sequence_starts": [16 * start // MAX_LENGTH for start in one["sequence_starts"]]} for one in packs
    ]
    return faults(steps, scaled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True would tear the rounds of the packs'"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True would tear the rounds of the packs' cohorts"),
        ({"train_dataset": "iterable", "max_steps": 2}, "has cohorts and is iterable: its steps would span rounds"),
    ],
)
def test_what_would_tear_rounds_is_refused(options, message):
    dataset = make_cohorts().packed
    if options.get("train_dataset") == "iterable":
        options = options | {"train_dataset": dataset.to_iterable_dataset()}
    with make_trainer(**{"train_dataset": dataset} | options) as trainer, pytest.raises(ValueError, match=message):
        trainer.get_train_dataloader()


@pytest.fixture(scope="module")
def one_rank():
    return {name: train_cohorts(*run) for name, run in COHORTS.items()}


def test_passes_and_ranks_change_nothing(one_rank, two_processes):
    """The same steps of the same packs: the same parameters, in one pass or four, on one rank or two."""
    expected = one_rank["1 x 8"]
    assert len(expected["steps"]) > 8
    for name, got in (*one_rank.items(), ("2 ranks, cohorts", two_processes["2 ranks, cohorts"])):
        assert [step["sequences_seen"] for step in got["steps"]] == [s["sequences_seen"] for s in expected["steps"]], (
            name
        )
        worst = max(float((a - b).abs().max()) for a, b in zip(got["parameters"], expected["parameters"], strict=True))
        assert worst < 1e-12, name
    assert two_processes["2 ranks, cohorts"]["processes"] == 2


def test_a_run_that_resumes_sees_the_same_steps(tmp_path, one_rank):
    def run(folder, steps, resume=None):
        how = {"folder": folder, "max_steps": steps, "save_strategy": "steps", "save_steps": steps}
        with make_trainer(train_dataset=make_cohorts(), per_device_train_batch_size=8, **COHORT_RUN, **how) as trainer:
            trainer.train(resume_from_checkpoint=resume)
            return [parameter.detach().clone() for parameter in trainer.model.parameters()]

    per_epoch = len(one_rank["1 x 8"]["steps"]) // 2
    whole = run(tmp_path / "whole", per_epoch + 4)
    run(tmp_path / "parts", per_epoch + 2)
    assert all(map(torch.equal, whole, run(tmp_path / "parts", per_epoch + 4, resume=True)))


COHORT_RUN = {"train_sampling_strategy": "random", "num_train_epochs": 2}


def test_packs_without_cohorts_are_shuffled_as_before():
    with make_trainer(train_dataset=make_packs(4), train_sampling_strategy="random") as trainer:
        trainer.get_train_dataloader()
        assert not isinstance(trainer._train_order, RoundSteps)
