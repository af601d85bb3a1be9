"""Batches that go to a device, and the two forms of a layout."""

import copy
import pickle
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pytest
import torch
from accelerate.utils import send_to_device, slice_tensors
from hypothesis import given
from hypothesis import strategies as st
from pretend_cuda import COPY_TO_HOST, DEVICE, DeviceTensor, PretendCuda
from pretraining_models import MAX_LENGTH, make_models
from slow_training import packed_rows
from stock_runs import make_collator, make_model, make_packs, make_trainer
from transformers import Trainer

from collate import DataCollatorWithPacking, isolate_sequences
from collate.device.host import copy_on_host, on_host, send
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
    """The host's own until either is written to, and nothing of parts or results."""
    here = torch.arange(3)
    assert on_host(here) is here and copy_on_host(here) is here
    with PretendCuda() as gpu:
        sent, other = send((here, torch.arange(3)), DEVICE)
        assert on_host(sent) is here and copy_on_host(sent) is here and not gpu.waits
        assert all(on_host(x) is None for x in (sent[1:], sent.clone(), sent + 0))
        other.fill_(7)
        assert on_host(other) is None and copy_on_host(other).tolist() == [7, 7, 7] and on_host(sent) is here
        assert [wait.kind for wait in gpu.waits] == [COPY_TO_HOST]
        here[0] = 5
        assert on_host(sent) is None and copy_on_host(sent).tolist() == [0, 1, 2]


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


@pytest.mark.parametrize("send", [lambda x: to_device(x, "cuda", by_slots=False), lambda x: {**x.to("cuda")}])
def test_a_batch_of_the_host_stays_the_hosts_own(send):
    """Used there, then on a device, then there again: what it needs is chosen for where it runs."""
    here = batch()
    before = PackLayout.of(here["sequence_ids"])
    before.table("of the host", lambda layout: layout.runs_on.type)
    with PretendCuda():
        there = PackLayout.of(send(here)["sequence_ids"])
        assert there.runs_on == there.host.runs_on == DEVICE
        assert there.table("of the device", lambda layout: layout.runs_on.type) == "cuda"
    assert PackLayout.of(here["sequence_ids"]) is before and before.runs_on == CPU
    assert before.tables == {"of the host": "cpu"} and "of the host" not in there.tables


def test_a_batch_comes_back():
    with PretendCuda() as gpu:
        sent = batch().to("cuda")
        again = sent.to("cuda")
        assert all(again[name] is x for name, x in sent.items()) and not gpu.waits
        back = sent.to("cpu")
        assert list(back) == list(batch()) and back["max_length_q"] == 4
        assert all(
            x.device == CPU and torch.equal(x, batch()[name]) for name, x in back.items() if name != "max_length_q"
        )


def test_more_sequences_than_slots_are_refused():
    """Else the last would pass for padding."""
    with pytest.raises(ValueError, match="a pack holds 2 sequences, more than sequence_slots=1; give more slots"):
        SlotLayout(batch()["sequence_ids"], sequence_slots=1)
    shallow = batch() | {"cls_positions": torch.tensor([[0], [0]])}
    with pytest.raises(ValueError, match="more than sequence_slots=1"):
        to_device(shallow, "cpu", by_slots=True)
    with PretendCuda():
        assert type(PackLayout.of(to_device(shallow, "cuda")["sequence_ids"])) is PackLayout


def model_of(device):
    _, model = make_models()
    return model.to(device)


def collated(tokenizer, pairs):
    collator = DataCollatorWithPacking(tokenizer, pad_to=MAX_LENGTH, max_sequences_per_pack=8)
    return collator(packed_rows(pairs, MAX_LENGTH))


def test_what_is_edited_on_the_device_is_not_taken_from_the_host(tokenizer, pairs):
    """Labels, ids, and where sequences begin."""
    edited = collated(tokenizer, pairs)
    with PretendCuda() as gpu:
        sent = collated(tokenizer, pairs).to("cuda")
        model = model_of("cuda")
        before = model(**sent).loss.cpu()
        for name, value in (
            ("labels", -100),
            ("sequence_ids", 0),
            ("cls_positions", -1),
            ("next_sentence_label", -100),
        ):
            for x in (edited[name], sent[name]):
                x[1:] = value  # packs of padding
        found = model(**sent)
        assert [wait.kind for wait in gpu.waits].count(COPY_TO_HOST) == 1 + 4 and not gpu.mixed
        loss, sums = found.loss.cpu(), found.sums.cpu()
    expected = model_of("cpu")(**edited)
    torch.testing.assert_close(sums, expected.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-12, atol=1e-12)
    assert abs(before - loss) > 1e-4


@pytest.mark.parametrize("by_slots", [True, False])
def test_parts_of_a_batch_have_layouts_of_their_own(tokenizer, pairs, by_slots):
    """As accelerate makes them, which sends a batch of all ranks and deals it out on the device."""
    whole = collated(tokenizer, pairs)
    expected = [model_of("cpu")(**part).sums for part in parts_of(whole)]
    with PretendCuda() as gpu:
        model = model_of("cuda")
        parts = parts_of(to_device(whole, "cuda", by_slots))
        assert all(type(part) is CollatedBatch for part in parts)
        found = [model(**part).sums.cpu() for part in parts]
        assert not gpu.mixed
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-12, atol=1e-12)


def parts_of(batch):
    half = len(batch["sequence_ids"]) // 2
    return [slice_tensors(batch, slice(half)), slice_tensors(batch, slice(half, None))]


def test_memory_that_holds_nothing_yet_can_be_sent():
    """Where accelerate deals out batches, all ranks but one send such, and then receive into it."""
    nonsense = batch() | {"sequence_ids": torch.tensor([[7, -1, 2, 0], [1 << 40, 3, 3, 9]])}
    with PretendCuda():
        sent = CollatedBatch(nonsense).to("cuda")
        with pytest.raises(ValueError, match="sequence_ids of pack 0 must count 1, 2, 3"):
            PackLayout.of(sent["sequence_ids"])
        sent["sequence_ids"].copy_(batch()["sequence_ids"].to("cuda"))
        assert PackLayout.of(sent["sequence_ids"][:1]).lengths.cpu().tolist() == [2, 1]


def test_a_batch_survives_what_dataloaders_and_accelerate_do_with_it():
    given_ = batch()
    for same in (pickle.loads(pickle.dumps(given_)), copy.copy(given_), type(given_)(dict(given_))):
        assert type(same) is CollatedBatch and same.keys() == given_.keys()
    assert type(send_to_device(given_, "cpu", non_blocking=True)) is CollatedBatch


class Noting(Trainer):
    """It notes the form of each layout, and how often that had to wait."""

    noted: ClassVar[list] = []

    def training_step(self, model, inputs, *args, **kwargs):
        gpu = DeviceTensor.active
        before = len(gpu.waits)
        assert all(on_host(x) is not None for x in inputs.values())
        layout = PackLayout.of(inputs["sequence_ids"])
        assert {layout.cu_seqlens.device, layout.chunks(4).index.device} == {DEVICE}
        self.noted.append((type(layout), len(gpu.waits) - before))
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("workers", [0, 1])
def test_plain_trainer_sends_the_layout(workers):
    """From a worker and through pinned memory: accelerate calls the batch's own `to`."""
    packs, collator = make_packs("mlm", 12), make_collator("mlm").for_dataset(make_packs("mlm"))
    options = {"train_dataset": packs, "data_collator": collator, "callbacks": [collator.callback()]}
    options |= {"per_device_train_batch_size": 4, "remove_unused_columns": False, "use_cpu": False}
    options |= {"dataloader_num_workers": workers, "dataloader_pin_memory": True, "include_num_input_tokens_seen": "no"}
    model = isolate_sequences(make_model("mlm").float())
    Noting.noted.clear()
    with PretendCuda() as gpu, make_trainer(model, Noting, **options) as trainer:
        trainer.train()
    assert Noting.noted == [(SlotLayout, 0)] * 3 and not gpu.mixed
