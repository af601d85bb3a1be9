"""inducing, linformer, nystrom, linear, performer, delta: heads that summarize a sequence and read the summary."""

from functools import partial
from itertools import pairwise

import attention_contract as contract
import pytest
import slow_attention as reference
import torch
import torch.nn.functional as F
from attention_contract import HEADS, MAX_LENGTH, WIDTH, by_sequence, heads_input, layout_of, make, run
from hypothesis import given, settings

from bert_pretrain.attention.heads import delta
from bert_pretrain.attention.heads.delta import DeltaAttention, chunks_by_number, delta_rule, unit_norm
from bert_pretrain.attention.heads.inducing import InducingAttention
from bert_pretrain.attention.heads.linear import LinearAttention, elu_plus_one, kernel_attention
from bert_pretrain.attention.heads.linformer import LinformerAttention
from bert_pretrain.attention.heads.nystrom import NystromAttention, nystrom, segment_means
from bert_pretrain.attention.heads.performer import PerformerAttention, orthogonal_features
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from bert_pretrain.attention.parts.pieces import SequencePieces
from collate.layout import PackLayout, SlotLayout

BUILDS = {
    "inducing": partial(InducingAttention, points=5),
    "linformer": partial(LinformerAttention, rank=12),
    "linformer, random": partial(LinformerAttention, initial="random"),
    "nystrom": partial(NystromAttention, landmarks=7),
    "linear": LinearAttention,
    "performer": partial(PerformerAttention, features=20),
    "performer, exponent": partial(PerformerAttention, features=20, stabiliser="exponent"),
    "delta": partial(DeltaAttention, chunk=5),
    "delta, elu": partial(DeltaAttention, chunk=16, features="elu"),
}
every_head = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


def twin_of(head):
    """The slow twin with the head's own parameters."""
    options = head.options
    match head:
        case InducingAttention():
            return reference.inducing(head.points_HMK)
        case LinformerAttention():
            return reference.linformer(head.key_projection_LR, head.value_projection_LR)
        case NystromAttention():
            return reference.nystrom(options.landmarks, options.iterations)
        case LinearAttention():
            return reference.linear
        case PerformerAttention():
            return reference.performer(head.projection_FK, options.epsilon, options.stabiliser)
        case DeltaAttention():
            return reference.delta(head.strength_weight_HK, head.strength_bias_H, options.features)


def one_sequence(length, seed=0, width=WIDTH):
    layout = layout_of([[1] * length])
    return layout, heads_input(layout, seed, width=width)


def whole(length, width=None):
    """One sequence as one piece."""
    return SequencePieces((1, width or length), None, torch.tensor([length]))


def assert_near(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# The contract


@every_head
def test_packing_changes_nothing(build):
    contract.check_contract(build)


@every_head
@settings(max_examples=12)
@given(rows=contract.rows(max_length=40))
def test_any_layout(build, rows):
    contract.check_isolation(build, rows)


@every_head
def test_every_parameter_has_a_gradient_that_is_not_zero(build):
    layout = layout_of([[1, 1, 1, 2, 2, 0]])
    results = run(make(build), layout, heads_input(layout), heads_input(layout, 1)[0])
    used = {name: value[: layout.num_tokens] for name, value in results.items() if name.startswith("parameter")}
    assert len(used) == len(list(make(build).parameters()))
    assert all(value.abs().max() > 0 for value in used.values())


@every_head
def test_under_autocast_as_in_float32(build):
    layout = layout_of(contract.LAYOUTS["long and short"])
    inputs = [x.float() / 3 for x in heads_input(layout)]
    head = make(build).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = head(*(x.bfloat16() for x in inputs), layout)
    assert rounded.dtype == torch.bfloat16
    assert_near(rounded.float(), head(*inputs, layout), 0.1)


def test_random_features_are_the_layers_own_and_do_not_depend_on_the_global_seed():
    features = [make(PerformerAttention, layer_index=i, seed=s).projection_FK for i, s in ((0, 0), (1, 0), (0, 1))]
    torch.manual_seed(123)
    assert (PerformerAttention(HEADS, WIDTH, MAX_LENGTH).projection_FK == features[0].float()).all()
    assert all((features[0] - other).abs().max() > 1 for other in features[1:])


# The slow twins


@every_head
@pytest.mark.parametrize("ids", contract.LAYOUTS.values(), ids=contract.LAYOUTS)
def test_equals_its_slow_twin(build, ids):
    head, layout = make(build), layout_of(ids)
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    found = run(head, layout, inputs, weights)
    by_twin = run(Twin(head), layout, inputs, weights)
    contract.assert_equal(found, {name.replace("head.", ""): value for name, value in by_twin.items()}, 1e-10)


class Twin(torch.nn.Module):
    """The slow twin as a head, with the same parameters."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, query_THK, key_THK, value_THK, layout):
        return by_sequence(twin_of(self.head), layout, query_THK, key_THK, value_THK)


# Exact limits


def test_inducing_with_a_point_for_each_key_is_softmax():
    layout, (query, key, value) = one_sequence(11)
    key = F.normalize(key, dim=2)
    head = make(InducingAttention, points=11)
    head.points_HMK.data = 1e6 * key.transpose(0, 1)  # so sharp that each summary is one token
    assert_near(head(query, key, value, layout), SdpaAttention(HEADS, WIDTH, MAX_LENGTH)(query, key, value, layout))


def test_linformer_of_full_rank_with_identity_is_softmax():
    layout, inputs = one_sequence(MAX_LENGTH)
    head = make(LinformerAttention, rank=MAX_LENGTH)
    assert (head.key_projection_LR == torch.eye(MAX_LENGTH)).all()  # means of one token each
    assert_near(head(*inputs, layout), SdpaAttention(HEADS, WIDTH, MAX_LENGTH)(*inputs, layout))


def test_linformer_begins_with_means_of_neighbours():
    head = LinformerAttention(HEADS, WIDTH, max_sequence_length=5, rank=2)
    third = pytest.approx(1 / 3)
    assert head.value_projection_LR.T.tolist() == [[third, third, third, 0, 0], [0, 0, 0, 0.5, 0.5]]


@pytest.mark.parametrize("length", [7, 16])
def test_nystrom_with_a_landmark_for_each_token_is_softmax(length):
    layout, inputs = one_sequence(length)
    exact = SdpaAttention(HEADS, WIDTH, MAX_LENGTH)(*inputs, layout)
    by_formula = nystrom(*map(reference.to_heads, inputs), whole(length), landmarks=length, iterations=40)
    assert_near(reference.from_heads(by_formula), exact, 1e-9)
    assert_near(make(NystromAttention, landmarks=length)(*inputs, layout), exact)


def test_nystrom_segments():
    half, third = 1 / 2, pytest.approx(1 / 3)
    found = segment_means(whole(5, width=6), 2, torch.float64)[0, 0].tolist()
    assert found == [[half, half, 0, 0, 0, 0], [0, 0, third, third, third, 0]]


def test_performer_error_falls_with_the_square_root_of_the_features():
    """Sixteen times the features give a quarter of the error, where the error is small."""
    layout, inputs = one_sequence(40)
    query, key, value = (x / 8 for x in inputs)
    exact = SdpaAttention(HEADS, WIDTH, MAX_LENGTH)(query, key, value, layout)

    def error(features):
        heads = [make(PerformerAttention, features=features, epsilon=0.0, seed=seed) for seed in range(12)]
        return torch.stack([(head(query, key, value, layout) - exact).square().mean() for head in heads]).mean() ** 0.5

    errors = [float(error(features)) for features in (64, 1024)]
    assert 3.2 < errors[0] / errors[1] < 4.8, errors
    assert errors[1] < 0.002


def test_performer_features_are_orthogonal_and_as_long_as_gaussian_ones():
    features = orthogonal_features(20, 8, seed=3)
    for block in features.split(8):
        products = block @ block.T
        assert_near(products, products.diagonal().diag())
    lengths = orthogonal_features(8000, 8, seed=3).square().sum(1)
    assert float(lengths.mean()) == pytest.approx(8, abs=0.2)  # the mean of chi^2 with 8 degrees, +- 4 / sqrt(8000)


def test_linear_is_its_closed_form():
    """All weights at once: phi(Q) phi(K)^T, each row divided by its sum."""
    layout, (query, key, value) = one_sequence(33)
    weights = torch.einsum("ihk,jhk->hij", F.elu(query) + 1, F.elu(key) + 1)
    expected = torch.einsum("hij,jhk->ihk", weights / weights.sum(2, keepdim=True), value)
    assert_near(make(LinearAttention)(query, key, value, layout), expected)


def test_linear_has_weights_where_float32_would_round_them_to_zero():
    layout, (query, key, value) = one_sequence(5)
    key = key.abs() * -20
    assert (F.elu(key.float()) + 1 == 0).any()
    context = make(LinearAttention).float()(query.float(), key.float(), value.float(), layout)
    assert_near(context.double(), make(LinearAttention)(query, key, value, layout), 1e-4)


def test_delta_rule_overwrites_what_it_knew_of_a_key():
    """Orthogonal keys, beta = 1: a key's latest value comes back exactly; a sum of both would not."""
    layout = layout_of([[1, 1, 1, 1]])
    first, second = torch.eye(WIDTH, dtype=torch.float64)[:2]
    keys, value = torch.stack([first, second, first, second]), heads_input(layout)[2]
    keys_THK = keys[:, None].expand(-1, HEADS, -1)
    beta = torch.ones(4, HEADS, 1, dtype=torch.float64)
    beta[3] = 0  # writes nothing, reads the second key
    read = delta_rule(keys_THK, keys_THK, value, beta, *chunks_by_number(layout, 3))
    assert_near(read, torch.stack([value[0], value[1], value[2], value[1]]))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_the_chunks_of_delta_change_nothing(chunk):
    layout = layout_of(contract.LAYOUTS["long and short"])
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    results = [run(make(DeltaAttention, chunk=size), layout, inputs, weights) for size in (chunk, 16)]
    contract.assert_equal(*results, 1e-11)


def test_delta_stays_exact_over_thousands_of_tokens():
    layout, (query, key, value) = one_sequence(3000)
    beta = torch.rand(3000, HEADS, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query, key = unit_norm(query), unit_norm(key)
    expected = torch.stack(
        [reference.delta_one_way(*(x[:, h] for x in (query, key, value)), beta[:, h, 0]) for h in range(HEADS)], dim=1
    )
    assert_near(delta_rule(query, key, value, beta, *chunks_by_number(layout, 64)), expected, 1e-11)


class FlaStandIn:
    """chunk_delta_rule of flash-linear-attention, by Python loops; it checks what the kernels want."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, k, v, beta, scale, cu_seqlens, cu_seqlens_cpu):
        self.calls += 1
        (tokens, heads), bounds = q.shape[1:3], cu_seqlens.tolist()
        assert all(x.shape[:3] == (1, tokens, heads) for x in (q, k, v, beta)) and beta.dim() == 3
        assert len({x.dtype for x in (q, k, v, beta)}) == 1 and cu_seqlens.dtype == torch.int64
        assert bounds[0] == 0 and bounds[-1] == tokens and bounds == sorted(bounds)
        assert cu_seqlens_cpu is None or cu_seqlens_cpu.tolist() == bounds
        contexts = [q[0, :0]]
        for start, end in pairwise(bounds):
            own = [x[0, start:end] for x in (q * scale, k, v, beta)]
            if start < end:
                heads_of = [reference.delta_one_way(*(x[:, h] for x in own)) for h in range(heads)]
                contexts.append(torch.stack(heads_of, dim=1))
        return torch.cat(contexts)[None], None


@pytest.mark.parametrize("slots", [False, True])
def test_delta_by_the_kernels_of_fla_is_the_same(slots, monkeypatch):
    """With a stand-in for them: sequences of any length, empty ones among the slots."""
    ids = torch.tensor([[1] * 9 + [2] * 12 + [0] * 3, [1] * 24], dtype=torch.int32)
    layout = SlotLayout(ids, sequence_slots=4) if slots else PackLayout(ids)
    head, inputs, weights = make(BUILDS["delta"]), heads_input(layout), heads_input(layout, 1)[0]
    expected = run(head, layout, inputs, weights)
    stand_in = FlaStandIn()
    monkeypatch.setattr(delta, "takes_fla", lambda _: True)
    monkeypatch.setattr(delta, "fla_kernel", lambda: stand_in)
    contract.assert_equal(run(head, layout, inputs, weights), expected, 1e-11)
    assert stand_in.calls == 1
    assert delta.boundaries_of(layout) is delta.boundaries_of(layout)  # by which fla knows that it has seen them


def test_fla_takes_16_bits_on_cuda_only(monkeypatch):
    monkeypatch.setattr(delta, "has_fla", lambda: True)
    for x in (torch.zeros(3, 2, 8), torch.zeros(3, 2, 8, dtype=torch.bfloat16)):
        assert not delta.takes_fla(x)


# Public implementations


def test_inducing_equals_isab_pytorch():
    width, generator = 64, torch.Generator().manual_seed(0)  # its head width is always 64
    points, x, *weights = (
        torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (5, 30, width, width, width)
    )
    weights = [weight / width**0.5 for weight in weights]
    head = make(InducingAttention, num_heads=1, head_width=width, points=5)
    head.points_HMK.data = points[None]
    query, key, value = ((x @ weight.T)[:, None] for weight in weights)
    expected = reference.public_set_transformer(points, *weights)(x)
    assert_near(head(query, key, value, layout_of([[1] * 30]))[:, 0], expected)


@pytest.mark.parametrize("length", [20, MAX_LENGTH])
def test_linformer_equals_the_public_one(length):
    layout, inputs = one_sequence(length)
    head = make(LinformerAttention, rank=12, initial="random")
    public = reference.public_linformer(HEADS, WIDTH, MAX_LENGTH, 12, head.key_projection_LR, head.value_projection_LR)
    assert_near(head(*inputs, layout), public(*inputs))


@pytest.mark.parametrize("length, iterations", [(35, 6), (56, 2)])
def test_nystrom_equals_the_public_one_where_segments_are_equal(length, iterations):
    layout, inputs = one_sequence(length)
    inputs = [x / 3 for x in inputs]
    head = NystromAttention(1, WIDTH, MAX_LENGTH, landmarks=7, iterations=iterations)
    for h in range(HEADS):  # one head at a time: the public norm is that of all heads together
        single = [x[:, h : h + 1] for x in inputs]
        public = reference.public_nystrom(1, WIDTH, landmarks=7, iterations=iterations)
        assert_near(head(*single, layout), public(*single), 1e-11)


def test_performer_equals_the_public_one():
    layout, inputs = one_sequence(50)
    head = make(PerformerAttention, features=40)
    assert_near(head(*inputs, layout), reference.public_performer(head.projection_FK)(*inputs))


def test_linear_equals_public_sums_of_the_same_features():
    layout, (query, key, value) = one_sequence(50)
    public = reference.public_kernel_attention()
    assert_near(make(LinearAttention)(query, key, value, layout), public(*map(elu_plus_one, (query, key)), value))


def test_the_sums_of_linear_equal_linear_attention_transformer_with_its_features():
    """softmax over the width for queries, over the tokens for keys: weights that add up to 1 by themselves."""
    _, inputs = one_sequence(50)
    query, key, value = map(reference.to_heads, inputs)
    found = kernel_attention(query.softmax(3), key.softmax(2), value, whole(50)) / WIDTH**0.5  # it scales its output
    assert_near(reference.from_heads(found), reference.public_efficient_attention()(*inputs))


def test_delta_rule_equals_the_public_one():
    """It computes in float32, so it agrees to float32."""
    layout, (query, key, value) = one_sequence(50)
    public = reference.public_delta_rule()
    head = make(DeltaAttention)
    beta = ((key * head.strength_weight_HK).sum(2) + head.strength_bias_H).sigmoid()
    inputs = unit_norm(query), unit_norm(key), value, beta
    there, back = public(*inputs), public(*(x.flip(0) for x in inputs)).flip(0)
    assert_near(head(query, key, value, layout), (there + back) * WIDTH**0.5 / 2, 2e-5)


# Negative controls


PUBLIC = {
    "linformer": lambda: reference.public_linformer(HEADS, WIDTH, MAX_LENGTH, 12),
    "nystrom": lambda: reference.public_nystrom(HEADS, WIDTH, 7, 6),
    "performer": lambda: reference.public_performer(make(PerformerAttention).projection_FK),
    "linear": reference.public_efficient_attention,
}


@pytest.mark.parametrize("public", PUBLIC.values(), ids=PUBLIC)
def test_public_implementations_mix_packed_sequences(public):
    assert contract.leak(public(), 21, 20) > 0.1


@every_head
def test_ours_do_not(build):
    assert contract.leak(make(build), 21, 20) == 0


def test_the_public_pseudo_inverse_mixes_even_the_rows_of_a_batch():
    """Its starting norm is the largest of the batch, so the other sequence changes the first; ours is per sequence."""
    package = pytest.importorskip("nystrom_attention", reason=reference.NOT_INSTALLED)
    module = package.NystromAttention(WIDTH, WIDTH, 1, num_landmarks=7, residual=False).double()
    x = 3 * torch.randn(2, 42, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = torch.stack([x[0], x[1] * 3])
    assert (module(x)[0] - module(changed)[0]).abs().max() > 1e-6


def test_a_stabiliser_over_the_batch_would_be_caught(monkeypatch):
    """It enters through epsilon only: the leak is small, and still found."""

    monkeypatch.setattr(SequencePieces, "largest", lambda _, x: x.detach().amax().expand_as(x))
    with pytest.raises(AssertionError):
        contract.check_isolation(BUILDS["performer"], [[1] * 9 + [2] * 12])


def test_a_memory_that_is_not_emptied_would_be_caught():
    layout = layout_of([[1] * 9 + [2] * 12])
    one_row = layout_of([[1] * 21])
    head, inputs = make(BUILDS["delta"]), heads_input(layout)
    assert (head(*inputs, layout) - head(*inputs, one_row)).abs().max() > 0.1


# Refusals


@pytest.mark.parametrize(
    "build, options, message",
    [
        (InducingAttention, {"points": 0}, "points=0 must be a whole number, at least 1; give the number of summaries"),
        (LinformerAttention, {"rank": 0}, "rank=0 must be a whole number, at least 1"),
        (LinformerAttention, {"rank": 2.5}, r"rank=2\.5 must be a whole number.*; give the number of rows"),
        (LinformerAttention, {"initial": "zeros"}, "initial='zeros' is unknown; choose from means, random"),
        (NystromAttention, {"landmarks": 0}, "landmarks=0 must be a whole number, at least 1"),
        (NystromAttention, {"iterations": 0}, "iterations=0 must be a whole number, at least 1"),
        (PerformerAttention, {"features": -1}, "features=-1 must be a whole number, at least 1"),
        (PerformerAttention, {"epsilon": 1.0}, r"epsilon=1\.0 must be a number from 0 to below 1"),
        (PerformerAttention, {"stabiliser": "none"}, "stabiliser='none' is unknown; choose from product, exponent"),
        (DeltaAttention, {"chunk": 0}, "chunk=0 must be a whole number, at least 1"),
        (DeltaAttention, {"features": "dpfp"}, "features='dpfp' is unknown; choose from norm, elu"),
        (LinearAttention, {"rank": 3}, "LinearAttention has no option rank=3; it has none"),
    ],
)
def test_refusals(build, options, message):
    with pytest.raises(ValueError, match=message):
        make(build, **options)


def test_linformer_refuses_longer_sequences_than_it_has_rows_for():
    layout = layout_of([[1] * (MAX_LENGTH + 1)])
    with pytest.raises(
        ValueError, match=r"a sequence of 65 tokens is longer than the max_sequence_length=64 that Linf"
    ):
        make(LinformerAttention)(*heads_input(layout), layout)
    odd = layout_of([[1] * 50])  # 50 is no multiple of 16: its rows end inside a group's width
    assert make(LinformerAttention, max_sequence_length=50)(*heads_input(odd), odd).isfinite().all()


@every_head
def test_dropout_is_honoured_or_refused(build):
    head, layout = make(build), layout_of([[1] * 20])
    inputs = heads_input(layout)
    if head.supports_dropout:
        assert (head(*inputs, layout, dropout=0.5) - head(*inputs, layout)).abs().max() > 0.01
    else:
        with pytest.raises(ValueError, match="cannot drop attention weights"):
            head(*inputs, layout, dropout=0.5)


def test_chunks_by_number():
    ordered, active = chunks_by_number(layout_of([[1] * 2 + [2] * 6 + [3] * 4]), 2)
    assert ordered.index.tolist() == [[2, 3], [8, 9], [0, 1], [4, 5], [10, 11], [6, 7]]
    assert active == [3, 2, 1]
    tokens = torch.arange(12)
    assert (ordered.scatter(ordered.gather(tokens)) == tokens).all()
