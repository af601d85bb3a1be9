"""verify_packed names packs that are out of the order of their cohorts: each change does one thing to sound packs."""

import datasets
import pytest
import slow_rows
from slow_cohorts import disorders

from packing import pack_dataset, verify_packed

datasets.disable_progress_bars()
COHORTS, ROUNDS, LANES = "sequence_cohorts", "sequence_rounds", "sequence_lanes"


@pytest.fixture(scope="module", params=[False, True], ids=["", "padded"])
def source(request):
    return datasets.Dataset.from_list(slow_rows.random_rows(4, 60, 70, padded=request.param))


@pytest.fixture(scope="module")
def packed(source):
    names = ["input_ids", "token_type_ids", "weights", "words"]
    options = {"overlong": "split", "packer": "lpfhp", "cohort": 20, "cohort_lanes": 2, "token_columns": names}
    return pack_dataset(source, 24, **options)


def place(pack):
    return pack[COHORTS][0], pack[ROUNDS][0], pack[LANES][0]


def put(pack, name, value):
    pack[name] = [value] * len(pack[name])


def exchange_two_rounds(packs):
    """A pack of a later round comes before one of an earlier round."""
    later = next(i for i, pack in enumerate(packs) if pack[ROUNDS][0] == 1)
    packs[later - 1], packs[later] = packs[later], packs[later - 1]
    return "lies before a pack of an earlier cohort, round or lane"


def mix_a_pack(packs):
    pack = next(pack for pack in packs if len(pack[ROUNDS]) > 1)
    pack[ROUNDS][1] += 1
    return "lies in another cohort, round or lane than its pack"


def move_to_another_lane(packs):
    """All pieces of a round's lane: their documents change lanes."""
    for pack in packs:
        if place(pack) == (0, 1, 0):
            put(pack, LANES, 1)
    return "another cohort or lane than that of the piece before"


def move_to_a_later_round(packs):
    """The last cohort skips a round."""
    last = max(pack[COHORTS][0] for pack in packs)
    for pack in packs:
        if pack[COHORTS][0] == last and pack[ROUNDS][0] >= 1:
            put(pack, ROUNDS, pack[ROUNDS][0] + 1)
    return "another round than the piece's number"


def begin_late(packs):
    """A row of one piece lies in a later round."""
    rows = [row for pack in packs for row in pack["sequence_indices"]]
    for pack in packs:
        if any(rows.count(row) == 1 for row in pack["sequence_indices"]):
            put(pack, ROUNDS, 1)
            return "a row that was not split lies in a later round"
    raise AssertionError


def join_two_cohorts(packs):
    for pack in packs:
        put(pack, COHORTS, max(pack[COHORTS][0] - 1, 0))
    packs.sort(key=place)
    return "documents begin in cohort 0, more than cohort=20"


def name_a_lane_that_is_not_there(packs):
    put(packs[-1], LANES, 2)
    return "a number that no cohort, round or lane has"


CHANGES = [
    *(exchange_two_rounds, mix_a_pack, move_to_another_lane, move_to_a_later_round),
    *(begin_late, join_two_cohorts, name_a_lane_that_is_not_there),
]


def changed(packed, packs):
    dataset = datasets.Dataset.from_list(packs, features=packed.features)
    dataset.info.description = packed.info.description
    return dataset


def test_sound_packs_are_verified(source, packed):
    for against in (None, source):
        verification = verify_packed(packed, against)
        assert verification.ok, str(verification)


@pytest.mark.parametrize("change", CHANGES)
def test_packs_out_of_order_are_named(source, packed, change):
    packs = packed.to_list()
    said = change(packs)
    assert disorders(packs, 20, 2)
    for against in (None, source):
        verification = verify_packed(changed(packed, packs), against)
        assert any(said in problem.what for problem in verification.problems), str(verification)


def test_a_missing_column_is_named(packed):
    verification = verify_packed(packed.remove_columns(ROUNDS))
    assert [(p.what, p.column) for p in verification.problems] == [("is missing", ROUNDS)]
