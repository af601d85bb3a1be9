"""Batches that go to a device, and the two forms of a layout."""

import copy
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st

from collate.device.host import on_host, send
from collate.device.transfer import CollatedBatch, to_device
from collate.layout import PackLayout, SlotLayout

CPU = torch.device("cpu")


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


@dataclass(frozen=True)
class Table:
    index: torch.Tensor
    parts: list


def test_a_tree_is_sent_in_one_piece():
    tree = {
        "a": Table(torch.arange(3), [torch.tensor([True, False]), None, 4]),
        "b": Pair(torch.tensor(2.5, dtype=torch.float64), 7),
        "c": torch.empty(0, 3, dtype=torch.int32),
    }
    sent = send(tree, CPU)
    assert sent["a"].index.tolist() == [0, 1, 2] and sent["a"].parts[0].tolist() == [True, False]
    assert sent["a"].parts[1:] == [None, 4] and sent["b"] == (2.5, 7) and sent["b"].first.dtype == torch.float64
    assert sent["c"].shape == (0, 3) and sent["c"].dtype == torch.int32
    found = [sent["a"].index, sent["a"].parts[0], sent["b"].first]
    assert len({x.untyped_storage().data_ptr() for x in found}) == 1
    versions = [x._version for x in found]
    found[0].zero_()  # a write to one is no write to the others
    assert [x._version for x in found] == [versions[0] + 1, *versions[1:]]
    assert tree["a"].index.tolist() == [0, 1, 2]


def test_what_the_host_has_of_a_tensor():
    here = torch.arange(3)
    assert on_host(here) is here


@st.composite
def padded_packs(draw):
    """(B, L) sequence_ids with padding at the end of packs, and S."""
    width, rows = draw(st.integers(1, 20)), []
    for _ in range(draw(st.integers(1, 4))):
        row: list[int] = []
        for number in range(1, draw(st.integers(0, 4)) + 1):
            row += [number] * min(draw(st.integers(1, 8)), width - len(row))
        rows.append(row + [0] * (width - len(row)))
    return torch.tensor(rows), 4 + draw(st.integers(0, 2))


@given(padded_packs())
def test_a_layout_by_slots_says_the_same_of_real_tokens(drawn):
    ids, depth = drawn
    exact, slots = PackLayout(ids), SlotLayout(ids, sequence_slots=depth)
    packs, width = ids.shape
    assert (slots.num_tokens, slots.num_sequences) == (packs * width, packs * (depth + 1))
    assert int(slots.lengths.sum()) == packs * width and (slots.lengths >= 0).all()
    real, sequences = slots.is_real_token, slots.is_real_sequence
    assert exact.is_real_token.all() and exact.is_real_sequence.all()
    assert slots.token_index[real].tolist() == exact.token_index.tolist()
    assert slots.lengths[sequences].tolist() == exact.lengths.tolist()
    assert slots.positions.tolist() == exact.positions.tolist()
    numbers = sequences.cumsum(0) - 1
    assert numbers[slots.sequence_of_token[real]].tolist() == exact.sequence_of_token.tolist()
    lengths = slots.lengths.tolist()
    walked = [(number, place) for number, length in enumerate(lengths) for place in range(length)]
    assert list(zip(slots.sequence_of_token.tolist(), slots.positions_T.tolist(), strict=True)) == walked
    values = torch.rand(packs, width, 2)
    assert torch.equal(slots.pad(slots.unpad(values)), exact.pad(exact.unpad(values)))
    for layout in (exact, slots) if exact.num_sequences else ():
        groups, chunks = layout.length_groups, layout.chunks(3)
        assert sorted(torch.cat([torch.empty(0, dtype=torch.int64), *groups.members]).tolist()) == (
            layout.lengths.nonzero().squeeze(1).tolist()
        )
        x_T = torch.arange(layout.num_tokens)
        assert torch.equal(groups.source[groups.slot_of_token], x_T)
        assert torch.equal(chunks.index.flatten()[chunks.slot_of_token], x_T)


def batch():
    ids = torch.tensor([[1, 1, 2, 0], [1, 1, 1, 1]])
    return CollatedBatch(sequence_ids=ids, cls_positions=torch.tensor([[0, 2, -1], [0, -1, -1]]), max_length_q=4)


def test_a_batch_goes_by_slots_where_it_is_asked_for():
    given_ = batch()
    here = to_device(given_, "cpu")
    assert here == given_ and type(PackLayout.of(here["sequence_ids"])) is PackLayout
    by_slots = to_device(batch(), "cpu", by_slots=True)
    layout = PackLayout.of(by_slots["sequence_ids"])
    assert isinstance(layout, SlotLayout) and layout.sequence_slots == 3
    by_slots["sequence_ids"][0, 3] = 2  # other ids get another layout
    assert type(PackLayout.of(by_slots["sequence_ids"])) is PackLayout
    with pytest.raises(ValueError, match="needs packs with padding at their end only"):
        to_device({"sequence_ids": torch.tensor([[0, 1]])}, "cpu", by_slots=True)


def test_a_batch_survives_what_dataloaders_and_accelerate_do_with_it():
    given_ = batch()
    for same in (pickle.loads(pickle.dumps(given_)), copy.copy(given_), type(given_)(dict(given_))):
        assert type(same) is CollatedBatch and same.keys() == given_.keys()
    assert type(send_to_device(given_, "cpu", non_blocking=True)) is CollatedBatch
