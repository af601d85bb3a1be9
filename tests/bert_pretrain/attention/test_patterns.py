"""Attention over fixed patterns: the contract, the patterns as drawn in the papers, and public implementations."""

import math
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from attention_contract import (
    LAYOUTS,
    by_sequence,
    check_broken_mate,
    check_contract,
    check_empty_batch,
    check_isolation,
    check_place,
    heads_input,
    hidden_of,
    layout_of,
    leak,
    make,
    of_tokens,
    rows,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_pretrain.attention.heads import bigbird
from bert_pretrain.attention.heads.axial import AxialAttention
from bert_pretrain.attention.heads.bigbird import BigBirdAttention
from bert_pretrain.attention.heads.etc import EtcAttention
from bert_pretrain.attention.heads.fixed import FixedAttention
from bert_pretrain.attention.heads.local import LocalAttention
from bert_pretrain.attention.heads.longformer import LongformerAttention
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from bert_pretrain.attention.heads.strided import StridedAttention

HEADS: dict[str, Callable] = {
    "local 3": partial(LocalAttention, window=3),
    "local 20": partial(LocalAttention, window=20),
    "local blocks": partial(LocalAttention, block=6),
    "strided split": partial(StridedAttention, stride=5),
    "strided merged": partial(StridedAttention, heads="merged"),
    "fixed split": partial(FixedAttention, stride=7, summary=2),
    "fixed merged": partial(FixedAttention, heads="merged", summary=3),
    "axial composed": AxialAttention,
    "axial mean": partial(AxialAttention, columns=5, combine="mean"),
    "longformer": partial(LongformerAttention, window=4),
    "longformer 3 global": partial(LongformerAttention, window=2, global_tokens=3),
    "longformer own": partial(LongformerAttention, window=2, global_tokens=3, projections="own"),
    "etc": partial(EtcAttention, window=3, global_tokens=5),
    "bigbird": partial(BigBirdAttention, block=4, window=1, random_blocks=2),
    "bigbird 2 + 3 global": partial(
        BigBirdAttention, block=3, window=0, random_blocks=1, global_tokens=2, last_global_tokens=3
    ),
}
PATTERNS = [
    name for name in HEADS if not name.startswith(("axial", "etc", "longformer own"))
]  # attention over tokens, in one softmax
EXECUTIONS = [name for name in HEADS if not name.startswith("axial")]
HEADS |= {name: partial(HEADS[name], execution="chunks") for name in EXECUTIONS}
MIXED = [[1] * 130 + [2] * 5 + [3] * 31, [0] * 2 + [1] + [2] * 125 + [3] * 38]  # some whole, some by chunks


@pytest.mark.parametrize("name", HEADS)
def test_contract(name):
    check_contract(HEADS[name])
    check_broken_mate(HEADS[name], MIXED)


@pytest.mark.parametrize("name", EXECUTIONS)
def test_contract_with_short_and_long_sequences(name):
    build = partial(HEADS[name], execution="auto")
    assert 5 <= make(build).longest_whole() < 125
    check_isolation(build, MIXED)
    check_isolation(build, LAYOUTS["padding in the middle"])
    check_broken_mate(build, MIXED)
    check_broken_mate(build)
    check_place(build)
    check_empty_batch(build)


@settings(max_examples=20)
@given(rows(40), st.sampled_from(sorted(HEADS)), st.sampled_from(["chunks", "whole", "auto"]))
def test_isolation_of_any_layout(ids, name, execution):
    check_isolation(partial(HEADS[name], execution=execution) if name in EXECUTIONS else HEADS[name], ids)


# The slow twins: which keys each query sees, in the papers' words


def local_keys(window):
    return lambda head, i, n: [j for j in range(n) if i - window <= j <= i + window]


def strided_keys(stride, split):
    def keys(head, i, n):
        near = {j for j in range(n) if i - stride <= j <= i + stride}
        far = {*range(i, n, stride), *range(i, -1, -stride)}
        return sorted((near, far)[head] if split else near | far)

    return keys


def fixed_keys(stride, summary, split):
    def keys(head, i, n):
        blocks = [range(start, min(start + stride, n)) for start in range(0, n, stride)]
        near = set(blocks[i // stride])
        far = {j for block in blocks for j in block[-summary:]}
        return sorted((near, far)[head] if split else near | far)

    return keys


def longformer_keys(window, number):
    return lambda head, i, n: [j for j in range(n) if abs(i - j) <= window or i < number or j < number]


def own_longformer_twin(window, number):
    """Global tokens by projections of their own, those of a head that `make` builds."""
    local = twin_of(longformer_keys(window, number))
    head = make(HEADS["longformer own"])

    def attend(query, key, value):
        hidden = hidden_of(query, key, value)
        own = (
            (hidden @ x.weight.T + x.bias).view_as(query)
            for x in (head.query_global, head.key_global, head.value_global)
        )
        return torch.cat([twin_of(lambda h, i, n: list(range(n)))(*own)[:number], local(query, key, value)[number:]])

    return attend


def bigbird_keys(size, window, number, first, last):
    seed = BigBirdAttention(2, 8, 64).layer_seed(torch.device("cpu"))

    @cache
    def draw(*where):
        return [
            int(x) for x in bigbird.random_blocks(seed, *map(torch.tensor, where), size, window, number, first, last)
        ]

    def keys(head, i, n):
        drawn = draw(head, i // size, n)
        global_ = {*range(n)[:first], *range(n)[max(0, n - last) :]}
        if i in global_:
            return list(range(n))
        return [j for j in range(n) if abs(i // size - j // size) <= window or j // size in drawn or j in global_]

    return keys


def softmax_over(query, keys, values):
    """(K,), (M, K) x 2 -> (K,)"""
    weights = torch.stack([query @ key for key in keys]) / math.sqrt(len(query))
    weights = (weights - weights.max()).exp()
    return sum(w * v for w, v in zip(weights, values, strict=True)) / weights.sum()


def twin_of(keys):
    def attend(query, key, value):
        n, heads, _ = query.shape
        seen = [[(i, h, keys(h, i, n)) for h in range(heads)] for i in range(n)]
        return torch.stack(
            [torch.stack([softmax_over(query[i, h], key[j, h], value[j, h]) for i, h, j in row]) for row in seen]
        )

    return attend


def axial_twin(columns, combine):
    def attend(query, key, value):
        along_rows = twin_of(lambda h, i, n: [j for j in range(n) if j // columns == i // columns])
        along_columns = twin_of(lambda h, i, n: list(range(i % columns, n, columns)))
        rows = along_rows(query, key, value)
        if combine == "composed":
            return along_columns(query, key, rows)
        return (rows + along_columns(query, key, value)) / 2

    return attend


def etc_twin(window, number):
    def attend(query, key, value):
        n = len(query)
        count = min(number, n)
        blocks = [[j for j in range(n) if j * count // n == block] for block in range(count)]
        keys, values = (torch.cat([x, torch.stack([x[block].mean(0) for block in blocks])]) for x in (key, value))
        seen = [[*local_keys(window)(0, i, n), *range(n, n + count)] for i in range(n)]
        return torch.stack(
            [
                torch.stack([softmax_over(query[i, h], keys[j, h], values[j, h]) for h in range(query.shape[1])])
                for i, j in enumerate(seen)
            ]
        )

    return attend


TWINS = {
    "local 3": twin_of(local_keys(3)),
    "local 20": twin_of(local_keys(20)),
    "local blocks": twin_of(lambda head, i, n: [j for j in range(n) if j // 6 == i // 6]),
    "strided split": twin_of(strided_keys(5, split=True)),
    "strided merged": twin_of(strided_keys(8, split=False)),  # 8: the root of max_sequence_length
    "fixed split": twin_of(fixed_keys(7, 2, split=True)),
    "fixed merged": twin_of(fixed_keys(8, 3, split=False)),
    "axial composed": axial_twin(8, "composed"),
    "axial mean": axial_twin(5, "mean"),
    "longformer": twin_of(longformer_keys(4, 1)),
    "longformer 3 global": twin_of(longformer_keys(2, 3)),
    "longformer own": own_longformer_twin(2, 3),
    "etc": etc_twin(3, 5),
    "bigbird": twin_of(bigbird_keys(4, 1, 2, 1, 0)),
    "bigbird 2 + 3 global": twin_of(bigbird_keys(3, 0, 1, 2, 3)),
}


@pytest.mark.parametrize("name", HEADS)
def test_slow_twin(name):
    """Values and gradients of every execution, on sequences shorter and longer than windows, strides and blocks."""
    layout = layout_of([[1] * 52 + [2] * 2 + [0] + [3] * 14, [1] * 1 + [2] * 21 + [0] * 47])
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    leaves = [x.clone().requires_grad_() for x in inputs]
    twin = by_sequence(TWINS[name], layout, *leaves)
    expected = (twin, *torch.autograd.grad((twin * weights).sum(), leaves))
    executions = ("chunks", "whole", "auto") if name in EXECUTIONS else (None,)
    for execution in executions:
        attention = make(HEADS[name], **({"execution": execution} if execution else {}))
        found = of_tokens(run(attention, layout, inputs, weights), slice(None))
        for value, of_twin in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(value, of_twin, rtol=0, atol=1e-11)


def mask_of(attention, length):
    """(H, n, n) bool: the pattern of one sequence in full, True = attend."""
    head = torch.arange(attention.num_heads)[:, None, None]
    position = torch.arange(length)
    sees = attention.sees(torch.device("cpu"))
    return sees(head, position[:, None], position, torch.tensor(length)).expand(attention.num_heads, length, length)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_predicate_is_the_pattern(name):
    """The mask that flex gets, and that the chunks are tested against."""
    attention = make(HEADS[name])
    for n in (1, 2, 8, 37, 64):
        mask = mask_of(attention, n)
        assert mask.shape == (2, n, n)
        twin = TWINS[name].__closure__[0].cell_contents
        assert mask.tolist() == [[[j in twin(h, i, n) for j in range(n)] for i in range(n)] for h in range(2)]


def test_the_patterns_as_drawn():
    """One row per query of a sequence of 6 tokens; x is seen."""

    def drawn(attention, head=0):
        return ["".join(".x"[seen] for seen in row) for row in mask_of(attention, 6)[head].tolist()]

    assert drawn(LocalAttention(2, 8, 64, window=1)) == ["xx....", "xxx...", ".xxx..", "..xxx.", "...xxx", "....xx"]
    assert drawn(LocalAttention(2, 8, 64, block=4)) == ["xxxx.."] * 4 + ["....xx"] * 2
    strided = StridedAttention(2, 8, 64, stride=2)
    assert drawn(strided) == ["xxx...", "xxxx..", "xxxxx.", ".xxxxx", "..xxxx", "...xxx"]
    assert drawn(strided, 1) == ["x.x.x.", ".x.x.x"] * 3
    fixed = FixedAttention(2, 8, 64, stride=4, summary=1)
    assert drawn(fixed) == ["xxxx.."] * 4 + ["....xx"] * 2
    assert drawn(fixed, 1) == ["...x.x"] * 6  # the last block is not full: its last token stands for it
    longformer = LongformerAttention(2, 8, 64, window=1)
    assert drawn(longformer) == ["xxxxxx", "xxx...", "xxxx..", "x.xxx.", "x..xxx", "x...xx"]


# Exact limits

LIMITS = {
    "local": partial(LocalAttention, window=63),
    "local, a window beyond 512 keys": partial(LocalAttention, window=600),
    "local, one block": partial(LocalAttention, block=64),
    "strided": partial(StridedAttention, stride=1, heads="merged"),
    "strided, one row": partial(StridedAttention, stride=64, heads="merged"),
    "fixed": partial(FixedAttention, stride=64, heads="merged"),
    "fixed, all tokens are summaries": partial(FixedAttention, stride=4, summary=4, heads="merged"),
    "axial, one row": partial(AxialAttention, columns=64),
    "axial, one column": partial(AxialAttention, columns=1),
    "longformer": partial(LongformerAttention, window=63),
    "longformer, all global": partial(LongformerAttention, window=0, global_tokens=64),
    "etc": partial(EtcAttention, window=63, global_tokens=64),  # every token twice
    "bigbird, one block": partial(BigBirdAttention, block=64),
    "bigbird, window": partial(BigBirdAttention, block=4, window=16),
    "bigbird, all blocks drawn": partial(BigBirdAttention, block=4, window=0, random_blocks=16),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit_is_full_attention(name):
    layout = layout_of(LAYOUTS["long and short"])
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    for found, expected in zip(
        run(make(LIMITS[name]), layout, inputs, weights).values(),
        run(make(SdpaAttention), layout, inputs, weights).values(),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


# Public implementations. Each computes one sequence; on a pack each of them leaks, so they are negative controls.


def qkv_of(hidden, *projections):
    """(n, D) -> three times (n, H, K)."""
    return [projection(hidden).unflatten(-1, (HEADS_OF_REFERENCES, -1)) for projection in projections]


HEADS_OF_REFERENCES, LENGTH = 2, 48


def check_reference(attention, reference, projections, tolerance=1e-12):
    """The head equals the reference on one sequence; on a pack the reference moves a sequence with its mate."""
    layout = layout_of([[1] * LENGTH])
    hidden = torch.randn(LENGTH, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = attention(*qkv_of(hidden, *projections), layout)
        torch.testing.assert_close(found, reference(hidden), rtol=0, atol=tolerance)
        assert leak(lambda query, key, value, layout: reference(query.flatten(1)), 20, LENGTH - 20) > 0.01
        print(f"{type(attention).__name__} - reference: {(found - reference(hidden)).abs().max():.1e}")


@pytest.fixture(scope="module")
def projections():
    torch.manual_seed(5)
    return [torch.nn.Linear(16, 16, bias=False, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"window": 6}, {"look_backward": 1, "look_forward": 1, "exact_windowsize": True}),
        ({"block": 6}, {"look_backward": 0, "look_forward": 0}),
    ],
    ids=["window", "blocks"],
)
def test_local_attention_package(projections, options, theirs):
    reference = pytest.importorskip("local_attention", reason="pip install local-attention==1.11.2").LocalAttention(
        window_size=6, causal=False, use_rotary_pos_emb=False, **theirs
    )

    def attend(hidden):
        query, key, value = (x.transpose(0, 1)[None] for x in qkv_of(hidden, *projections))
        return reference(query, key, value)[0].transpose(0, 1)

    check_reference(make(LocalAttention, **options), attend, projections)


def test_axial_attention_package(projections):
    axial_attention = pytest.importorskip("axial_attention", reason="pip install axial-attention==0.6.1")
    reference = axial_attention.AxialAttention(16, num_dimensions=2, heads=2, dim_index=-1).double()
    for axis in reference.axial_attentions:
        axis.fn.to_q.weight.data = projections[0].weight.data
        axis.fn.to_kv.weight.data = torch.cat([projections[1].weight.data, projections[2].weight.data])
        axis.fn.to_out = torch.nn.Identity()

    def attend(hidden):  # the sum of the two directions, ours their mean
        return reference(hidden.view(1, LENGTH // 6, 6, 16)).view(LENGTH, 2, 8) / 2

    check_reference(make(AxialAttention, columns=6, combine="mean"), attend, projections)


def test_longformer_of_transformers(projections):
    """Queries, keys and values have no projections of global tokens; so the reference's are copies of the others."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=16, num_attention_heads=2, attention_window=[8], attention_probs_dropout_prob=0
    )
    reference = LongformerSelfAttention(config, layer_id=0).double().eval()
    for name, projection in zip(("query", "key", "value"), projections, strict=True):
        for module in (getattr(reference, name), getattr(reference, f"{name}_global")):
            module.weight.data = projection.weight.data
            module.bias.data.zero_()

    def attend(hidden):
        is_global = torch.arange(LENGTH)[None] < 2
        mask = torch.where(is_global, 10000.0, 0.0).double()
        found = reference(hidden[None], mask, torch.zeros_like(is_global), is_global, True)[0]
        return found.view(LENGTH, 2, 8)

    check_reference(make(LongformerAttention, window=4, global_tokens=2), attend, projections, tolerance=1e-6)


def test_transient_global_attention_of_longt5(projections):
    """The reference with a mean in place of its norm of block sums, biases of 0, and unscaled scores as in T5."""
    from transformers import LongT5Config
    from transformers.models.longt5.modeling_longt5 import LongT5TransientGlobalAttention

    config = LongT5Config(d_model=16, d_kv=8, num_heads=2, local_radius=5, global_block_size=8, dropout_rate=0)
    reference = LongT5TransientGlobalAttention(config, has_relative_attention_bias=True).double().eval()
    reference.relative_attention_bias.weight.data.zero_()
    reference.global_relative_attention_bias.weight.data.zero_()
    query, key, value = (projection.weight.data for projection in projections)
    reference.q.weight.data, reference.k.weight.data, reference.v.weight.data = query / 8**0.5, key, value
    reference.o = torch.nn.Identity()

    class Mean(torch.nn.Module):
        def forward(self, block_sums):
            return block_sums / 8

    reference.global_input_layer_norm = Mean()

    def attend(hidden):
        return reference(hidden[None], mask=torch.ones(1, LENGTH))[0].view(LENGTH, 2, 8)

    check_reference(make(EtcAttention, window=5, global_tokens=LENGTH // 8), attend, projections, tolerance=1e-6)


def test_block_sparse_attention_of_bigbird(projections, monkeypatch):
    """The first and last block are global; ours gets the random blocks of the reference."""
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    size, num_blocks = 4, LENGTH // 4
    config = BigBirdConfig(
        hidden_size=16, num_attention_heads=2, block_size=size, num_random_blocks=2, max_position_embeddings=64
    )
    reference = BigBirdBlockSparseAttention(config, seed=0).double().train()  # it draws blocks in training only
    for name, projection in zip(("query", "key", "value"), projections, strict=True):
        getattr(reference, name).weight.data = projection.weight.data
        getattr(reference, name).bias.data.zero_()
    drawn = []
    draw = reference._bigbird_block_rand_mask_with_head

    def remember(**arguments):
        drawn.append(draw(**arguments))
        return drawn[-1]

    monkeypatch.setattr(reference, "_bigbird_block_rand_mask_with_head", remember)
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, LENGTH), size)

    def attend(hidden):
        found = reference(
            hidden[None],
            band_mask=band.double(),
            from_mask=from_mask.double(),
            to_mask=to_mask.double(),
            from_blocked_mask=blocked.double(),
            to_blocked_mask=blocked.double(),
        )
        return found[0].view(LENGTH, 2, 8)

    attend(torch.zeros(LENGTH, 16, dtype=torch.float64))
    table = torch.stack([torch.as_tensor(x) for x in drawn[0]]).long()  # (H, blocks - 2, r)
    table = torch.nn.functional.pad(table, (0, 0, 1, 1))

    def given(seed, head, block, length, size, window, number, first, last):
        head, block = torch.broadcast_tensors(head, block.clamp(max=num_blocks - 1))
        return list(table[head, block].unbind(-1))

    theirs = make(BigBirdAttention, block=size, random_blocks=2, global_tokens=size, last_global_tokens=size)
    with monkeypatch.context() as patch:
        patch.setattr(bigbird, "random_blocks", given)
        check_reference(theirs, attend, projections, tolerance=1e-6)


# What is random


def test_random_blocks_are_any_blocks_outside_the_window():
    head, size, window, number = torch.arange(500), 4, 1, 3
    seed = BigBirdAttention(2, 8, 64).layer_seed(torch.device("cpu"))
    for n in (1, 12, 13, 21, 40):
        num_blocks = -(-n // size)
        for block in range(num_blocks):
            drawn = torch.stack(
                bigbird.random_blocks(seed, head, torch.tensor(block), torch.tensor(n), size, window, number, 0, 0), 1
            )
            outside = [b for b in range(num_blocks) if abs(b - block) > window]
            counts = Counter(drawn.flatten().tolist())
            missing = counts.pop(-1, 0)
            assert missing == 500 * max(0, number - len(outside))
            assert set(counts) <= set(outside)
            assert all(len({b for b in row if b >= 0}) == min(number, len(outside)) for row in drawn.tolist())
            if len(outside) > number:  # each equally often: 4 standard deviations of 500 draws
                share = number / len(outside)
                assert all(abs(counts[b] - 500 * share) < 4 * math.sqrt(500 * share * (1 - share)) for b in outside)


@pytest.mark.parametrize(("first", "last"), [(4, 0), (4, 4), (6, 9), (1, 1), (30, 0), (0, 40)])
def test_random_blocks_are_drawn_outside_global_ones(first, last):
    """Heads draw only blocks with a token that is neither global nor in the window; over many heads, all of these."""
    head, size, number = torch.arange(500), 4, 2
    seed = BigBirdAttention(2, 8, 64).layer_seed(torch.device("cpu"))
    for n, window in ((1, 0), (9, 0), (21, 1), (40, 1), (40, 2)):
        useful = {i // size for i in range(n) if first <= i < n - last}
        for block in range(-(-n // size)):
            where = (torch.tensor(block), torch.tensor(n), size, window, number, first, last)
            drawn = torch.stack(bigbird.random_blocks(seed, head, *where), 1)
            outside = {b for b in useful if abs(b - block) > window}
            assert set(drawn.flatten().tolist()) - {-1} == outside
            assert all(len({b for b in row if b >= 0}) == min(number, len(outside)) for row in drawn.tolist())


def test_random_blocks_differ_by_head_layer_block_length_and_seed_and_by_nothing_else():
    def mask(layer_index=0, n=200, **options):
        return mask_of(BigBirdAttention(2, 8, 256, layer_index=layer_index, block=4, global_tokens=0, **options), n)

    assert (mask() == mask()).all()
    assert (mask()[0] != mask()[1]).any()
    for other in (mask(layer_index=1), mask(seed=1), mask(n=204)[:, :200, :200]):
        assert (mask() != other).any(2).any(1).all()


def test_no_head_of_any_layer_draws_the_blocks_of_another():
    """Heads draw different patterns. (Once 144 heads had 16: head 1 of layer 0 drew like head 2 of layer 1.)"""
    layers = [mask_of(BigBirdAttention(12, 8, 256, layer_index=layer, block=4), 256) for layer in range(12)]
    assert len({mask.numpy().tobytes() for masks in layers for mask in masks}) == 144


# FlexAttention: the same predicate. Compiled, it takes half a minute; interpreted, it computes every score.


@pytest.fixture
def interpreted_flex(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    from bert_pretrain.attention.parts import blocks

    monkeypatch.setattr(blocks, "flex_attention", lambda: flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", EXECUTIONS)
def test_flex_computes_the_same(name, interpreted_flex):
    check_flex(HEADS[name], torch.float64, 1e-12)


def check_flex(build, dtype, tolerance):
    layout = layout_of(LAYOUTS["long and short"])
    inputs = [x.to(dtype) / 3 for x in heads_input(layout)]
    chunks, flex = (make(build, execution=execution).to(dtype) for execution in ("chunks", "flex"))
    torch.testing.assert_close(flex(*inputs, layout), chunks(*inputs, layout), rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match="flex cannot drop attention weights"):
        flex(*inputs, layout, dropout=0.1)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["local 3", "fixed split", "etc"])
def test_compiled_flex_computes_the_same(name):
    check_flex(HEADS[name], torch.float32, 1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("name", "expected"), [("local 3", 1), ("bigbird", 2)]
)  # bigbird's layers draw blocks of their own
def test_one_block_mask_serves_all_layers(name, expected, interpreted_flex):
    layout = layout_of([[1] * 9 + [2] * 20])
    for layer_index in range(2):
        make(HEADS[name], layer_index=layer_index, execution="flex")(*heads_input(layout), layout)
    assert len([key for key in layout._derived if key[-1] == "flex"]) == expected


# Attention dropout


@pytest.mark.parametrize("name", HEADS)
def test_dropout_keeps_the_mean(name):
    attention, layout = make(HEADS[name]), layout_of([[1] * 20 + [2] * 9])
    inputs = [x / 3 for x in heads_input(layout)]
    with torch.no_grad():
        torch.manual_seed(0)
        dropped = [attention(*inputs, layout, dropout=0.2) for _ in range(300)]
        expected = attention(*inputs, layout)
    assert (dropped[0] != dropped[1]).any()
    assert (torch.stack(dropped).mean(0) - expected).abs().max() < 0.25


# Refusals


def test_refusals():
    for build, message in [
        (partial(LocalAttention, window=-1), "window=-1 must be a whole number, at least 0; 0 lets a token see itself"),
        (partial(LocalAttention, window=2.5), r"window=2\.5 must be a whole number"),
        (partial(LocalAttention, window=4, block=8), "window=4 has no effect beside block=8, .*; give one of the two"),
        (partial(LocalAttention, width=3), "LocalAttention has no option width=3; its options are execution, window"),
        (
            partial(LocalAttention, execution="fast"),
            "execution='fast' is unknown; choose from auto, flex, chunks, whole",
        ),
        (
            partial(StridedAttention, stride=0),
            "stride=0 must be a whole number, at least 1; None takes the rounded root",
        ),
        (partial(StridedAttention, heads="both"), "heads='both' is unknown; choose from split, merged"),
        (partial(StridedAttention, num_heads=1), "heads='split' needs 2 heads, got 1; set heads='merged'"),
        (partial(FixedAttention, stride=3), "summary=4 is more than a block of stride=3; lower it"),
        (partial(AxialAttention, combine="sum"), "combine='sum' is unknown; choose from composed, mean"),
        (
            partial(LongformerAttention, global_tokens=0),
            "global_tokens=0 .*; without global tokens take local attention",
        ),
        (partial(BigBirdAttention, block=0), "block=0 must be a whole number, at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(**{"num_heads": 2, "head_width": 8, "max_sequence_length": 64, **build.keywords})
