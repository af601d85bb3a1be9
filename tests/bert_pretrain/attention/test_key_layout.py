"""Keys that are not the queries: beside a dense oracle of each sequence; heads that refuse them."""

from functools import partial

import pytest
import torch
from attention_contract import HEADS, WIDTH, heads_input, layout_of, make
from hypothesis import given
from hypothesis import strategies as st

from bert_pretrain.attention import ATTENTION
from collate.isolation.other_keys import attend_other_keys, attend_side_by_side
from collate.layout import SlotLayout

TAKING = {"sdpa": None, "local": 2}
"""The heads that run here, with their window."""


@st.composite
def two_layouts(draw):
    """Layouts of the same N sequences, of other lengths; any may be empty, on either side."""
    packs, slots, width = draw(st.integers(1, 3)), 3, 16
    made = []
    for _ in range(2):
        rows = []
        for _ in range(packs):
            lengths = draw(st.lists(st.integers(1, 5), min_size=0, max_size=slots))
            row = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
            rows.append(row + [0] * (width - len(row)))
        made.append(SlotLayout(torch.tensor(rows), sequence_slots=slots))
    return made


def oracle(query, key, value, layout, key_layout, window):
    """Each sequence by itself, from the definition."""
    contexts, scale = [], query.shape[-1] ** -0.5
    q_bounds, k_bounds = layout.cu_seqlens.tolist(), key_layout.cu_seqlens.tolist()
    for i, is_real in enumerate(layout.is_real_sequence.tolist()):
        q = query[q_bounds[i] : q_bounds[i + 1]]
        k, v = (x[k_bounds[i] : k_bounds[i + 1]] for x in (key, value))
        for place, each in enumerate(q):
            own = len(k) - len(q) + place
            keys = [j for j in range(len(k)) if window is None or abs(own - j) <= window]
            if not keys or not is_real:
                contexts.append(each * 0)
                continue
            weights = (torch.einsum("hk,jhk->hj", each, k[keys]) * scale).softmax(-1)
            contexts.append(torch.einsum("hj,jhk->hk", weights, v[keys]))
    return torch.stack(contexts)


def inputs_of(layout, key_layout):
    inputs = heads_input(layout)[0], *heads_input(key_layout, 1)[1:]
    return [x.requires_grad_() for x in inputs]


def assert_same(found, expected, inputs, weights):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [
        torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True, allow_unused=True)
        for x in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        zero = torch.zeros(1, dtype=torch.float64)
        torch.testing.assert_close(
            zero if one is None else one, torch.zeros_like(one) if other is None else other, rtol=0, atol=1e-11
        )


@pytest.mark.parametrize("name", TAKING)
@given(layouts=two_layouts())
def test_queries_see_the_keys_of_their_sequence(name, layouts):
    layout, key_layout = layouts
    inputs, window = inputs_of(*layouts), TAKING[name]
    attention = make(partial(ATTENTION[name], **({} if window is None else {"window": window})))
    expected = oracle(*inputs, layout, key_layout, window)
    weights = heads_input(layout, 2)[0] * layout.is_real_token[:, None, None]
    assert_same(attention(*inputs, layout, key_layout=key_layout), expected, inputs, weights)
    padding = layout.is_real_token[:, None, None].double()
    beside = attend_side_by_side(*inputs, layout, key_layout, 0.0, window) * padding
    assert_same(beside, expected, inputs, weights)


def test_a_wide_window_and_one_of_no_neighbour():
    """Long sequences in several pieces; more queries than keys, so that the first see none."""
    layout = SlotLayout(torch.tensor([[1] * 200 + [2] * 10 + [0] * 30]), sequence_slots=2)
    key_layout = SlotLayout(torch.tensor([[1] * 150 + [2] * 230]), sequence_slots=2)
    inputs = inputs_of(layout, key_layout)
    weights = heads_input(layout, 2)[0] * layout.is_real_token[:, None, None]
    for window in (0, 7, 64, 400):
        found = attend_other_keys(*inputs, layout, key_layout, window=window)
        assert_same(found, oracle(*inputs, layout, key_layout, window), inputs, weights)
    assert not found[:0].any() and found[:10].any()
    near = attend_other_keys(*inputs, layout, key_layout, window=7)
    assert not near[: 50 - 7].any() and near[50 - 7].all()


def test_the_same_tokens_are_the_same_keys():
    layout = layout_of([[1] * 37 + [2] + [3] * 16])
    inputs = heads_input(layout)
    for name, window in TAKING.items():
        attention = make(partial(ATTENTION[name], **({} if window is None else {"window": window})))
        beside = attention(*inputs, layout, key_layout=layout)
        torch.testing.assert_close(beside, attention(*inputs, layout), rtol=0, atol=1e-12)


def test_no_keys_at_all():
    layout = SlotLayout(torch.tensor([[1, 1, 2]]), sequence_slots=2)
    none = torch.zeros(0, HEADS, WIDTH, dtype=torch.float64)
    query, empty = heads_input(layout)[0], SlotLayout(torch.tensor([[0, 0]]), sequence_slots=2)
    assert not attend_other_keys(query, none, none, layout, empty).any()
    two = torch.ones(2, HEADS, WIDTH, dtype=torch.float64)
    assert not make(ATTENTION["sdpa"])(query, two, two, layout, key_layout=empty).any()


def test_dropout_keeps_the_mean():
    layout, key_layout = (SlotLayout(torch.tensor([row]), sequence_slots=2) for row in ([1, 1, 2, 2], [1, 1, 1, 2]))
    inputs = [x.detach() / 3 for x in inputs_of(layout, key_layout)]
    attention = make(ATTENTION["sdpa"])
    torch.manual_seed(0)
    dropped = [attention(*inputs, layout, 0.2, key_layout) for _ in range(300)]
    assert (dropped[0] != dropped[1]).any()
    expected = attention(*inputs, layout, key_layout=key_layout)
    assert (torch.stack(dropped).mean(0) - expected).abs().max() < 0.25


@pytest.mark.parametrize("name", [name for name in ATTENTION if name not in ("sdpa", "varlen", "local")])
def test_the_others_refuse_them_by_name(name):
    layout = layout_of([[1, 1, 2]])
    attention = make(ATTENTION[name])
    with pytest.raises(ValueError, match=f"{type(attention).__name__} cannot take keys that are not the queries"):
        attention(*heads_input(layout), layout, key_layout=layout)


def test_layouts_of_other_sequences_are_refused():
    layout, key_layout = layout_of([[1, 1, 2]]), layout_of([[1, 1]])
    query, (_, key, value) = heads_input(layout)[0], heads_input(key_layout)
    with pytest.raises(ValueError, match=r"key_layout has 1 sequences, layout 2; .* give both as SlotLayout"):
        make(ATTENTION["sdpa"])(query, key, value, layout, key_layout=key_layout)


def test_local_attention_in_blocks_refuses_them():
    layout = layout_of([[1, 1, 2]])
    with pytest.raises(ValueError, match=r"block=4\) takes no keys that are not the queries .* give a window"):
        make(ATTENTION["local"], block=4)(*heads_input(layout), layout, key_layout=layout)
