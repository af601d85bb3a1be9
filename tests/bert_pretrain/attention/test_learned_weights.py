"""adaptive_span, entmax: heads that learn how far, and at how many tokens, they look."""

import sys
from functools import partial

import attention_contract as contract
import pytest
import slow_attention as reference
import torch
from attention_contract import HEADS, WIDTH, by_sequence, heads_input, layout_of, make, run
from hypothesis import given, settings
from pretraining_models import make_config
from transformers import Trainer

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention.heads.adaptive_span import AdaptiveSpanAttention
from bert_pretrain.attention.heads.entmax import EntmaxAttention, EntmaxOptions
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from collate.layout import PackLayout, SlotLayout

LONG = [[1] * 100 + [2] * 9 + [3] * 37, [0] * 3 + [1] * 143, [1] + [2] * 2 + [0] * 143]
"""With sequences that the option `span` cuts into chunks, and others that it leaves whole."""
LAYOUTS = contract.LAYOUTS | {"chunks": LONG}


def learned(build, **options):
    """A builder of heads whose parameters have left their start, and differ between heads."""

    def built(**sizes):
        head = build(**{**sizes, "max_sequence_length": 160, **options})
        for parameter in head.parameters():
            parameter.data.copy_(torch.tensor([0.137, 0.213]))
        return head

    return built


BUILDS = {
    "adaptive_span": learned(AdaptiveSpanAttention, ramp=5),
    "adaptive_span, chunks": learned(AdaptiveSpanAttention, span=19, ramp=4),
    "entmax": learned(EntmaxAttention),
    "entmax, top_k": learned(EntmaxAttention, top_k=3),
}
every_head = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


class Twin(torch.nn.Module):
    """The slow twin as a head, with the same parameters."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, query_THK, key_THK, value_THK, layout):
        head, options = self.head, self.head.options
        if isinstance(head, EntmaxAttention):
            alpha_H = 1.01 + 0.99 / (1 + (-head.alpha_bias_H).exp())
            twin = reference.entmax(alpha_H, options.top_k)
        else:
            twin = reference.adaptive_span(head.longest_span * head.span_bias_H, options.ramp)
        return by_sequence(twin, layout, query_THK, key_THK, value_THK)


def one_sequence(length, seed=0):
    layout = layout_of([[1] * length])
    return layout, heads_input(layout, seed)


def assert_near(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# The contract


@every_head
def test_packing_changes_nothing(build):
    for ids in LAYOUTS.values():
        contract.check_isolation(build, ids)
    for ids in (None, LONG):
        contract.check_broken_mate(build, ids)
    contract.check_place(build)
    chooses = make(build).options == EntmaxOptions(top_k=3)  # rounding may change which keys are the largest
    contract.check_dtypes(build, ((torch.float32, 1e-4), (torch.bfloat16, 10 if chooses else 0.15)))
    contract.check_inference_first(build)


@every_head
@settings(max_examples=12)
@given(rows=contract.rows(max_length=100))
def test_any_layout(build, rows):
    contract.check_isolation(build, rows)


@every_head
@pytest.mark.parametrize("ids", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_its_slow_twin(build, ids):
    """The context, and the gradients of inputs and parameters."""
    head, layout = make(build), layout_of(ids)
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    by_twin = run(Twin(head), layout, inputs, weights)
    contract.assert_equal(
        run(head, layout, inputs, weights), {name.replace("head.", ""): value for name, value in by_twin.items()}, 1e-10
    )


@every_head
def test_slots_compute_what_tokens_do(build):
    """All packs under a mask, or all sequences in chunks, as on an accelerator."""
    ids = torch.tensor([[1] * 100 + [2] * 9 + [3] * 37, [1] * 143 + [0] * 3, [0] * 146])
    layout, slots = PackLayout(ids), SlotLayout(ids, sequence_slots=4)
    real, inputs, weights = slots.is_real_token, heads_input(slots), heads_input(slots, 1)[0]
    weights = weights * real[:, None, None]
    expected = run(make(build), layout, [x[real] for x in inputs], weights[real])
    found = run(make(build), slots, inputs, weights)
    contract.assert_equal(
        {name: value if name.startswith("parameter") else value[real] for name, value in found.items()}, expected
    )


@every_head
def test_every_head_of_a_layer_has_a_gradient(build):
    layout, inputs = one_sequence(150)
    results = run(make(build), layout, inputs, heads_input(layout, 1)[0])
    (gradient,) = (value for name, value in results.items() if name.startswith("parameter"))
    assert gradient.shape == (HEADS,) and (gradient != 0).all()


# Adaptive span


def test_a_span_over_all_is_softmax():
    layout, inputs = one_sequence(60)
    head = make(AdaptiveSpanAttention, initial=1.0)
    assert head.spans_H.tolist() == [64, 64]
    assert_near(head(*inputs, layout), SdpaAttention(HEADS, WIDTH, 64)(*inputs, layout))


def test_without_a_span_a_ramp_of_one_sees_itself():
    layout, inputs = one_sequence(30)
    assert_near(make(AdaptiveSpanAttention, initial=0.0, ramp=1)(*inputs, layout), inputs[2])


def test_a_window_is_that_of_the_paper():
    """R = 4, z = 2.5: 1 within the span, then a fall of 1/4 a token."""
    head = make(AdaptiveSpanAttention, ramp=4, span=10)
    head.span_bias_H.data.fill_(0.25)
    window = head.log_window(1, 9, torch.float64).exp()[0, 0]
    assert_near(window, torch.tensor([0.625, 0.875, 1, 1, 1, 1, 1, 0.875, 0.625], dtype=torch.float64))
    assert head.log_window(1, 21, torch.float64).exp()[0, 0].tolist()[:4] == [0, 0, 0, 0]  # |i - j| = 10, 9, 8, 7


def test_large_scores_outside_of_the_window_do_not_matter():
    """The largest score is hidden: weights are taken from what is seen."""
    layout, (query, key, value) = one_sequence(40)
    head = make(AdaptiveSpanAttention, ramp=3)
    expected = head(query, key, value, layout)
    key = key.clone()
    key[39] *= 1e4
    assert torch.equal(head(query, key, value, layout)[:37], expected[:37])


def test_the_gradient_of_a_span_is_its_difference():
    layout, inputs = one_sequence(40)
    weights = heads_input(layout, 1)[0]
    head = make(BUILDS["adaptive_span"])
    gradient = run(head, layout, inputs, weights)["parameter span_bias_H"]
    for h in range(HEADS):
        found = []
        for step in (1e-6, -1e-6):
            moved = make(BUILDS["adaptive_span"])
            moved.span_bias_H.data[h] += step
            found.append(float((moved(*inputs, layout) * weights).sum().detach()))
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(float(gradient[h]), rel=1e-5)


@pytest.mark.parametrize(("share", "span"), [(-0.2, 0), (1.3, 64)])
def test_a_span_that_has_left_its_limits_comes_back(share, span):
    """What is computed is that of the limit; the gradient is not lost; after a step the parameter is at the limit."""
    layout, inputs = one_sequence(64)
    head, at_limit = make(AdaptiveSpanAttention), make(AdaptiveSpanAttention)
    head.span_bias_H.data.fill_(share)
    at_limit.span_bias_H.data.fill_(span / 64)
    assert head.spans_H.tolist() == [span] * HEADS
    found, expected = (run(each, layout, inputs, heads_input(layout, 1)[0]) for each in (head, at_limit))
    contract.assert_equal(found, expected)
    head.after_step()
    assert head.span_bias_H.tolist() == [span / 64] * HEADS


def test_the_penalty_pulls_on_spans_only_down_to_zero():
    head = make(AdaptiveSpanAttention)
    for share, expected in ((-0.1, 0), (0.5, 32), (1.2, 64 * 1.2)):
        head.zero_grad()
        head.span_bias_H.data.fill_(share)
        (penalty,) = head.penalties().values()
        penalty.backward()
        assert float(penalty.detach()) == pytest.approx(expected)
        assert head.span_bias_H.grad.tolist() == [32.0 if expected else 0.0] * HEADS  # S / H


def spans_after_training(distance):
    """Trained until contexts are values so many tokens away, where queries match the keys; under a penalty."""
    head = make(AdaptiveSpanAttention, ramp=20, initial=0.1)
    layout = layout_of([[1] * 40])
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(40, HEADS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        context = head(2 * key.roll(distance, 0), key, value, layout)
        error = (context - value.roll(distance, 0))[distance:].square().mean()
        (error + 0.01 * sum(head.penalties().values())).backward()
        optimizer.step()
        head.after_step()
    return head.spans_H.detach()


def test_a_head_learns_to_see_as_far_as_it_must():
    assert (spans_after_training(2) < 1).all() and (spans_after_training(16) > 4).all()


def test_sequences_are_cut_where_span_makes_that_cheaper():
    """Which are, only the options decide."""
    head = make(AdaptiveSpanAttention, span=9, ramp=4, max_sequence_length=160)
    assert head.window == 12 and head.longest_whole == 72
    split = head.by_length(layout_of(LONG))
    assert split.short.lengths.tolist() == [9, 37, 1, 2] and split.long.lengths.tolist() == [100, 143]
    assert make(AdaptiveSpanAttention, ramp=4, max_sequence_length=160).longest_whole > 160


# Entmax


@pytest.mark.parametrize(("alpha", "exact"), [(1.5, "entmax15"), (1.9999999999, "sparsemax")])
def test_entmax_is_the_exact_algorithm_of_the_package(alpha, exact):
    """It sorts, where our head's halves an interval."""
    package = pytest.importorskip("entmax")
    layout, inputs = one_sequence(50)
    query, key, value = map(reference.to_heads, inputs)
    weights = getattr(package, exact)(query @ key.transpose(2, 3) / WIDTH**0.5, dim=-1)
    head = make(EntmaxAttention, alpha=alpha)
    head.reset_parameters()  # now in float64
    found = head(*inputs, layout)
    assert_near(found, reference.from_heads(weights @ value), 1e-8 if exact == "sparsemax" else 1e-12)


def test_entmax_is_sparse_and_near_one_it_is_nearly_softmax():
    layout, inputs = one_sequence(50)
    scores = torch.einsum("ihk,jhk->hij", *inputs[:2])[None] / WIDTH**0.5
    shares = [float((make(EntmaxAttention, alpha=a).weigh(scores, None) > 0).double().mean()) for a in (1.02, 1.5, 1.9)]
    assert 1 > shares[0] > shares[1] > shares[2] > 1 / 50
    inputs = [x / 3 for x in inputs]
    softmax = SdpaAttention(HEADS, WIDTH, 64)(*inputs, layout)
    heads = [make(EntmaxAttention, alpha=alpha) for alpha in (1.0100001, 1.5)]
    near, far = (float((head(*inputs, layout) - softmax).detach().abs().max()) for head in heads)
    assert near < 0.1 < far


def test_top_k_changes_nothing_where_fewer_keys_have_weight():
    layout, inputs = one_sequence(50)
    weights = heads_input(layout, 1)[0]
    results = [run(make(EntmaxAttention, alpha=1.9, top_k=k), layout, inputs, weights) for k in (None, 20, 2)]
    contract.assert_equal(results[1], results[0])
    assert (results[2]["context"] - results[0]["context"]).abs().max() > 0.1


def test_the_gradient_of_alpha_is_its_difference():
    layout, inputs = one_sequence(30)
    weights = heads_input(layout, 1)[0]
    gradient = run(make(BUILDS["entmax"]), layout, inputs, weights)["parameter alpha_bias_H"]
    for h in range(HEADS):
        found = []
        for step in (1e-5, -1e-5):
            moved = make(BUILDS["entmax"])
            moved.alpha_bias_H.data[h] += step
            found.append(float((moved(*inputs, layout) * weights).sum().detach()))
        assert (found[0] - found[1]) / 2e-5 == pytest.approx(float(gradient[h]), rel=1e-4)


@pytest.mark.parametrize("alpha", [1.011, 1.25, 1.5, 1.99])
def test_heads_start_with_the_alpha_they_are_given(alpha):
    assert make(EntmaxAttention, alpha=alpha).alpha_H.tolist() == pytest.approx([alpha] * HEADS, abs=1e-6)


def test_without_the_package_only_entmax_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "entmax.root_finding", None)
    with pytest.raises(ImportError, match=r"needs the package entmax .*pip install .dataset-packing\[entmax"):
        make(EntmaxAttention)
    make(AdaptiveSpanAttention)


# Training


@pytest.mark.parametrize(("name", "parameter"), [("adaptive_span", "span_bias_H"), ("entmax", "alpha_bias_H")])
def test_what_heads_learn_here_has_no_weight_decay(name, parameter):
    """In any Trainer: it spares what is called bias."""
    model = PackedBertForPreTraining(make_config(packed_attention=name))
    decayed = Trainer.get_decay_parameter_names(None, model)
    assert sum(each.endswith(parameter) for each, _ in model.named_parameters()) == 2
    assert decayed and not any(parameter in each for each in decayed)


# Negative controls


def test_a_window_by_places_in_the_row_would_be_caught():
    def by_rows(query_THK, key_THK, value_THK, layout):
        one = layout_of([[1] * layout.num_tokens])
        return make(BUILDS["adaptive_span"])(query_THK, key_THK, value_THK, one)

    assert contract.leak(by_rows, 21, 20) > 0.01
    for build in BUILDS.values():
        assert contract.leak(make(build), 21, 20) == 0


def test_the_packages_function_over_a_row_mixes_packed_sequences():
    def over_rows(query_THK, key_THK, value_THK, layout):
        return reference.entmax(torch.tensor([1.5, 1.5]).double())(query_THK, key_THK, value_THK)

    assert contract.leak(over_rows, 21, 20) > 0.1


# Refusals


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (AdaptiveSpanAttention, {"span": 0}, "span=0 must be a whole number, at least 1; give the most tokens"),
        (AdaptiveSpanAttention, {"ramp": 0}, "ramp=0 must be a whole number, at least 1"),
        (AdaptiveSpanAttention, {"initial": 1.5}, r"initial=1\.5 must be a number from 0 to 1; 0 starts with the ramp"),
        (AdaptiveSpanAttention, {"penalty": -1.0}, r"penalty=-1\.0 must be a number of at least 0; 0 adds nothing"),
        (EntmaxAttention, {"alpha": 1.0}, r"alpha=1\.0 must be a number between 1\.01 and 2; near 1 all"),
        (EntmaxAttention, {"alpha": 2.0}, r"alpha=2\.0 must be a number between 1\.01 and 2"),
        (EntmaxAttention, {"top_k": 0}, "top_k=0 must be a whole number, at least 1"),
    ],
)
def test_refusals(build, options, message):
    with pytest.raises(ValueError, match=message):
        make(partial(build, **options))
