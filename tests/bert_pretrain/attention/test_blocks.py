"""FlexAttention's masks by blocks: none that holds a seen pair is missing, none takes a pair for seen, few are idle."""

from functools import partial

import pytest
import torch
from attention_contract import heads_input, make
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.parts import blocks
from collate.layout import PackLayout, SlotLayout

HEADS = {
    "flex": ATTENTION["flex"],
    "local": partial(ATTENTION["local"], window=3),
    "strided": partial(ATTENTION["strided"], stride=3),
    "fixed": partial(ATTENTION["fixed"], stride=3, summary=1),
    "longformer": partial(ATTENTION["longformer"], window=1, global_tokens=2),
    "etc": partial(ATTENTION["etc"], window=1, global_tokens=3),
    "bigbird": partial(ATTENTION["bigbird"], block=3, window=1, random_blocks=2, last_global_tokens=1),
    "bigbird, large blocks": partial(ATTENTION["bigbird"], block=7, window=0, random_blocks=1),
}
SMALL = 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in ("parts.blocks", "heads.etc", "heads.bigbird"):
        monkeypatch.setattr(f"bert_pretrain.attention.{module}.BLOCK_SLOTS", SMALL)


@st.composite
def packs(draw):
    """A layout of real tokens, with padding anywhere, or one by slots."""
    width, by_slots, rows = draw(st.integers(5, 30)), draw(st.booleans()), []
    for pack in range(draw(st.integers(1, 2))):
        row: list[int] = []
        for number, length in enumerate(draw(st.lists(st.integers(1, 14), min_size=not pack, max_size=4)), start=1):
            row += [0] * (0 if by_slots else draw(st.integers(0, 3))) + [number] * length
        row = (row + [0] * width)[:width]
        rows.append(row if any(row) else [1, *row[1:]])
    ids = torch.tensor(rows)
    return SlotLayout(ids, sequence_slots=5) if by_slots else PackLayout(ids)


def dense(mask, layout):
    """(B, H, Q, K): what mask_mod says of every pair; and (B, H, R, R): the blocks looked at, and those taken whole."""
    batch, heads = mask.kv_num_blocks.shape[0], max(mask.kv_num_blocks.shape[1], 2)
    sizes = (batch, heads, *mask.seq_lengths)
    grid = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    seen = mask.mask_mod(*grid)
    return seen, of_table(mask.kv_num_blocks, mask.kv_indices), of_table(mask.full_kv_num_blocks, mask.full_kv_indices)


def of_table(counts, indices):
    if counts is None:
        return None
    found = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        found[(*place, indices[*place, : int(counts[*place])])] = True
    return found


def in_blocks(pairs, at_all):
    """(B, H, Q, K) -> (B, H, R, R): whether any pair of a block is seen, or all."""
    fill = torch.nn.functional.pad(pairs, (0, -pairs.shape[3] % SMALL, 0, -pairs.shape[2] % SMALL))
    tiles = fill.unflatten(3, (-1, SMALL)).unflatten(2, (-1, SMALL))
    return tiles.any(-1).any(3) if at_all else tiles.all(-1).all(3)


@pytest.mark.parametrize("name", HEADS)
@settings(max_examples=40)
@given(layout=packs())
def test_blocks_hold_what_is_seen(name, layout):
    attention = make(HEADS[name])
    mask = attention.block_mask(layout)
    seen, partial_, full = dense(mask, layout)
    looked_at = partial_ if full is None else partial_ | full
    assert not (in_blocks(seen, at_all=True) & ~looked_at).any()
    assert torch.equal(of_table(mask.q_num_blocks, mask.q_indices), partial_.mT)
    if full is not None:
        assert torch.equal(full, in_blocks(seen, at_all=False)[:, :1]) and not (partial_ & full).any()
        assert torch.equal(of_table(mask.full_q_num_blocks, mask.full_q_indices), full.mT)
        assert torch.equal(in_blocks(seen, at_all=True)[:, :1], looked_at)
    ids = layout.sequence_ids_BL
    pairs = seen[..., : ids.shape[1]]
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] > 0)
    assert not (pairs & ~same[:, None]).any()
    assert (pairs.diagonal(dim1=2, dim2=3).any(1) == (ids > 0)).all()  # a token sees itself, padding sees nothing


def test_a_narrow_pattern_looks_at_few_blocks():
    layout = PackLayout(torch.ones(1, 40 * SMALL, dtype=torch.int64))
    most = {"local": 3 * 40, "longformer": 5 * 40, "etc": (3 + 2) * 40, "bigbird": 16 * 40}
    for name, number in most.items():
        mask = make(HEADS[name], max_sequence_length=200).block_mask(layout)
        assert 40 < int(mask.kv_num_blocks[:, 0].sum()) <= number, name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_compiled_for_no_batch_after_the_third(monkeypatch):
    """Batches by slots have the same shapes, whatever sequences they hold."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    for name in ("flex", "longformer", "etc", "bigbird"):
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(flex_attention, backend=counter)
        monkeypatch.setattr(blocks, "flex_attention", lambda compiled=compiled: compiled)
        attentions = [
            make(HEADS[name], layer_index=i, **({} if name == "flex" else {"execution": "flex"})) for i in (0, 1)
        ]
        graphs = []
        for cut in (3, 20, 11, 27, 5, 16):
            ids = torch.tensor([[1] * cut + [2] * (30 - cut), [1] * 12 + [2] * (cut // 4) + [0] * (18 - cut // 4)])
            layout = SlotLayout(ids, sequence_slots=4)
            with torch.no_grad():
                for attention in attentions:
                    attention(*heads_input(layout), layout)
            graphs.append(counter.frame_count)
        assert graphs[-1] <= 3 and graphs[2:] == graphs[2:3] * 4, (name, graphs)
    torch.compiler.reset()
