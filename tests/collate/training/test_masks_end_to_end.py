"""Masks through a real Trainer, its sampler, dataloader and workers: a function of seed, epoch and sequence alone.

A trainer notes the tokens and labels that each sequence had in each of three epochs. The order of sequences, their pack
mates and the process that makes a batch differ from run to run; these tokens and labels do not.
"""

import pytest
from slow_masks import mask_one_by_one, sequence_key
from stock_runs import MASKED, RecordingTrainer, make_collator, make_source, record_masks

EPOCHS = 3
OTHER_PACKING = {"packer": "spfhp", "max_sequences_per_pack": 2, "seed": 9}
WORKERS = {"dataloader_num_workers": 2}
PERSISTENT = WORKERS | {"dataloader_persistent_workers": True}
RUNS = {
    "other packs": {"packing": OTHER_PACKING, "per_device_train_batch_size": 8},
    "longer packs": {"packing": {"max_sequence_length": 70, "packer": "lpfhp", "seed": 1}},
    "stored order": {"train_sampling_strategy": "sequential"},
    "another order": {"data_seed": 77},
    "batches of 3, accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    "two workers": WORKERS,
    "two persistent workers": PERSISTENT,
    "plain Trainer": {"kind": RecordingTrainer},
    "plain Trainer, two persistent workers": PERSISTENT | {"kind": RecordingTrainer},
}
RESUMED = {
    "two persistent workers": PERSISTENT,
    "plain Trainer": {"kind": RecordingTrainer},
}


@pytest.fixture(scope="module")
def expected():
    return record_masks()


def once(record):
    """{(epoch, index): tokens and labels}: each sequence once per epoch."""
    assert all(len(fed) == 1 for fed in record.values())
    return {key: fed[0] for key, fed in record.items()}


def test_each_sequence_is_masked_as_the_slow_twin_masks_it(expected):
    rule = make_collator("mlm").masking_rule
    source = make_source("mlm", MASKED)["input_ids"]
    trained = once(expected["trained"])
    assert trained.keys() == {(epoch, index) for epoch in range(EPOCHS) for index in range(len(source))}
    for (epoch, index), fed in trained.items():
        masked = mask_one_by_one(source[index], sequence_key(5, epoch, index), rule)
        assert fed == tuple(map(tuple, masked))


def test_every_epoch_has_other_masks(expected):
    trained = once(expected["trained"])
    for epoch in range(1, EPOCHS):
        same = sum(trained[epoch, index] == trained[0, index] for index in range(MASKED))
        assert same < MASKED / 2  # the shortest sequences have one token that can be masked


@pytest.mark.parametrize("name", RUNS)
def test_masks_do_not_depend_on(name, expected):
    got = record_masks(**RUNS[name])
    assert once(got["trained"]) == once(expected["trained"])
    if "plain" not in name:
        assert fixed(got["evaluated"]) == fixed(expected["evaluated"])


def fixed(record):
    """{index: tokens and labels}: the same at every evaluation."""
    masks = {}
    for (_, index), fed in record.items():
        masks.setdefault(index, set()).update(fed)
    assert all(len(kinds) == 1 for kinds in masks.values())
    return {index: kinds.pop() for index, kinds in masks.items()}


def test_evaluation_masks_never_change(expected):
    evaluated = fixed(expected["evaluated"])
    assert len(evaluated) == MASKED and sum(len(fed) for fed in expected["evaluated"].values()) == EPOCHS * MASKED
    trained = once(expected["trained"])
    for epoch in range(EPOCHS):
        assert sum(trained[epoch, index] == evaluated[index] for index in evaluated) < MASKED / 2


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(name, expected, tmp_path):
    """Left after 6 of 12 steps, in the middle of the second epoch."""
    check_resumed(record_masks(tmp_path, stop=6, **RESUMED[name]), expected)


def check_resumed(got, expected):
    """The rest of the second epoch, and the third: no sequence twice, none missing, masks as in one run."""
    trained, before = once(got["trained"]), once(got["before"])
    assert {epoch for epoch, _ in before} == {0, 1} and {epoch for epoch, _ in trained} == {1, 2}
    assert not trained.keys() & before.keys()
    assert before | trained == once(expected["trained"])


def test_two_processes_see_the_same_masks(expected, two_processes):
    got = two_processes["masks"]
    assert once(got["trained"]) == once(expected["trained"])
    assert fixed(got["evaluated"]) == fixed(expected["evaluated"])


def test_two_processes_resume(expected, two_processes):
    check_resumed(two_processes["masks resumed"], expected)


def test_control_a_trainer_that_does_not_tell_its_collator_of_epochs(expected):
    """Plain Trainer without the callback."""
    trained = once(record_masks(kind=RecordingTrainer, callbacks=[])["trained"])
    assert trained != once(expected["trained"])
    assert all(trained[0, index] == trained[2, index] for index in range(MASKED))
