"""Attention over fixed patterns: the contract, the patterns as drawn in the papers, and public implementations."""

from functools import partial

import pytest
import torch
from attention_contract import LAYOUTS, by_sequence, check_contract, check_isolation, heads_input, layout_of, make, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_pretrain.attention.axial import AxialAttention
from bert_pretrain.attention.bigbird import BigBirdAttention
from bert_pretrain.attention.etc import EtcAttention
from bert_pretrain.attention.fixed import FixedAttention
from bert_pretrain.attention.local import LocalAttention
from bert_pretrain.attention.longformer import LongformerAttention
from bert_pretrain.attention.strided import StridedAttention

HEADS = {
    "local 3": partial(LocalAttention, window=3),
    "local 20": partial(LocalAttention, window=20),
    "strided split": partial(StridedAttention, stride=5),
    "strided merged": partial(StridedAttention, heads="merged"),
    "fixed split": partial(FixedAttention, stride=7, summary=2),
    "fixed merged": partial(FixedAttention, heads="merged", summary=3),
    "axial composed": AxialAttention,
    "axial mean": partial(AxialAttention, columns=5, combine="mean"),
    "longformer": partial(LongformerAttention, window=4),
    "longformer 3 global": partial(LongformerAttention, window=2, global_tokens=3),
    "etc": partial(EtcAttention, window=3, global_tokens=5),
    "bigbird": partial(BigBirdAttention, block=4, window=1, random_blocks=2),
    "bigbird 2 + 3 global": partial(
        BigBirdAttention, block=3, window=0, random_blocks=1, global_tokens=2, last_global_tokens=3
    ),
}
PATTERNS = [name for name in HEADS if not name.startswith(("axial", "etc"))]


@pytest.mark.parametrize("name", HEADS)
def test_contract(name):
    check_contract(HEADS[name])


@settings(max_examples=10)
@given(rows(40), st.sampled_from(sorted(HEADS)))
def test_isolation_of_any_layout(ids, name):
    check_isolation(HEADS[name], ids)


def dense(mask):
    """Softmax attention over a mask (H, n, n)."""

    def attend(query_nHK, key_nHK, value_nHK):
        scores = torch.einsum("ihk,jhk->hij", query_nHK, key_nHK) / query_nHK.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask(len(query_nHK)), -torch.inf).softmax(-1)
        return torch.einsum("hij,jhk->ihk", weights, value_nHK)

    return attend


@pytest.mark.parametrize("name", PATTERNS)
def test_chunks_compute_the_pattern(name):
    attention, layout = make(HEADS[name]), layout_of(LAYOUTS["long and short"])
    inputs = heads_input(layout)
    torch.testing.assert_close(
        attention(*inputs, layout), by_sequence(dense(attention.mask), layout, *inputs), rtol=0, atol=1e-12
    )
