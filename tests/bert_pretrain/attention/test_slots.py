"""The law of slots: with and without slots of padding, every head computes the same for real tokens.

The context, the gradients of inputs and parameters, and buffers, within 1e-12; sequences of no token change nothing.
"""

from functools import partial

import pytest
import torch
from attention_contract import ROUNDING, assert_equal, heads_input, make, of_tokens, run
from hypothesis import given, settings
from hypothesis import strategies as st
from small_heads import HERE, SMALL_OPTIONS

from bert_pretrain.attention import ATTENTION
from collate.device.host import tensors_in
from collate.layout import PackLayout, SlotLayout

IDS = {
    "padding": [[1] * 20 + [2] * 9 + [0] * 19, [1] * 48, [1] + [2] * 40 + [0] * 7],
    "an empty pack": [[1, 1, 2, 0, 0], [0] * 5, [1, 0, 0, 0, 0]],
    "full": [[1, 2, 2, 2, 3, 3, 3, 3], [1] * 8],
    "long and short": [[1] * 130 + [2] * 5 + [3] * 31 + [0] * 2, [1] * 3 + [2] * 125 + [0] * 40],
}
"""The last: heads that split by length take some sequences whole and others by chunks."""


@st.composite
def packs(draw):
    width, rows = draw(st.integers(1, 24)), []
    for pack in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 12), min_size=not pack, max_size=4))
        row = [number for number, length in enumerate(lengths, start=1) for _ in range(length)][:width]
        rows.append(row + [0] * (width - len(row)))
    return rows


def both(build, ids, slots):
    """What the head computes for real tokens: of a layout of real tokens, and of one by slots."""
    exact, by_slots = PackLayout(torch.tensor(ids)), SlotLayout(torch.tensor(ids), sequence_slots=slots)
    real = by_slots.is_real_token
    inputs, weights = heads_input(by_slots), heads_input(by_slots, 1)[0] * real[:, None, None]
    results = []
    for layout, keep in ((exact, real), (by_slots, slice(None))):
        attention = make(build, max_sequence_length=168)
        found = run(attention, layout, [x[keep] for x in inputs], weights[keep])
        if hasattr(attention, "update_centroids"):
            attention.update_centroids()
        tokens = slice(None) if layout is exact else real
        results.append(
            of_tokens(found, tokens)
            | {name: x for name, x in found.items() if name.startswith("parameter")}
            | {f"buffer {name}": x for name, x in attention.named_buffers() if x.is_floating_point()}
        )
    return results


def builds(name):
    return [ATTENTION[name], partial(ATTENTION[name], **SMALL_OPTIONS.get(name, {}))]


@pytest.mark.parametrize("name", HERE)
def test_slots_of_padding_change_nothing(name):
    for build in builds(name):
        for ids in IDS.values():
            assert_equal(*both(build, ids, slots=5), ROUNDING)


@pytest.mark.parametrize("name", ATTENTION)
def test_what_the_host_sends_is_small(name):
    """Of 32 packs of 512 slots, with sequences of 40 to 474 tokens, at most 400 KB."""
    ids = torch.zeros(32, 512, dtype=torch.int32)
    for pack in range(32):
        ends = torch.arange(40 + 14 * pack, 512, 40 + 14 * pack)
        ids[pack, : ends[-1]] = torch.bucketize(torch.arange(ends[-1]), ends, right=True).int() + 1
    host = SlotLayout(ids, sequence_slots=int(ids.max()))
    host.__dict__["runs_on"] = torch.device("cuda")  # as the host's layout of a batch that was sent there
    make(ATTENTION[name], num_heads=12, head_width=64, max_sequence_length=512).prepare(host)
    assert sum(x.numel() * x.itemsize for x in tensors_in(host.tables)) <= 400_000


@pytest.mark.parametrize("name", HERE)
@settings(max_examples=15)
@given(ids=packs(), more=st.integers(0, 2))
def test_slots_change_nothing_in_any_layout(name, ids, more):
    assert_equal(*both(builds(name)[1], ids, slots=max(map(max, ids)) + more), ROUNDING)
