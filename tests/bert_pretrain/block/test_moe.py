"""The mixture of experts: the papers' formulas token by token, published implementations, and its laws on packs."""

import copy
from unittest import mock

import pytest
import torch
from attention_contract import LAYOUTS, assert_equal, layout_of, spans
from slow_experts import balance_by_hand, mixture_one_by_one, z_loss_by_hand
from transformers import BertConfig, MixtralConfig, SwitchTransformersConfig
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)
from transformers.models.switch_transformers.modeling_switch_transformers import (
    load_balancing_loss_func as switch_balance,
)

from bert_pretrain.attention.parts.choices import recording, replaying
from bert_pretrain.block import BlockOptions
from bert_pretrain.block.feed_forwards.dense import DenseFeedForward
from bert_pretrain.block.feed_forwards.moe import MixtureOfExperts
from bert_pretrain.moving import after_step
from collate.layout import SlotLayout

WIDTH, INNER = 16, 24
IDS = LAYOUTS["long and short"]


def make_config(**changes):
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "hidden_dropout_prob": 0.0, "initializer_range": 0.4}
    return BertConfig(**sizes | changes)


def make_moe(config=None, **options):
    options = {"experts": 4, "top_k": 2, "feed_forward": "moe"} | options
    torch.manual_seed(0)
    moe = MixtureOfExperts(config or make_config(), BlockOptions(**options), 0).double()
    with torch.no_grad():
        for expert in moe.experts:
            expert.dense.bias.normal_()
            expert.intermediate.dense.bias.normal_()
    return moe


def hidden_of(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layout.num_tokens, WIDTH, generator=generator, dtype=torch.float64)


def run(moe, layout, hidden_TD, weights_TD, of_sums=1.0):
    """Output, sums, and the gradients of both for the input and the parameters."""
    moe.zero_grad()
    hidden_TD = hidden_TD.clone().requires_grad_()
    out_TD, sums = moe(hidden_TD, layout)
    ((out_TD * weights_TD).sum() + of_sums * sums.sum()).backward()
    found = {"out": out_TD.detach(), "gradient": hidden_TD.grad, "parameter sums": sums.detach()}
    return found | {f"parameter {name}": p.grad.clone() for name, p in moe.named_parameters()}


def one_by_one(moe, layout, hidden_TD, weights_TD):
    results = []
    for span in spans(layout):
        own = layout_of([[1] * (span.stop - span.start)])
        results.append(run(moe, own, hidden_TD[span], weights_TD[span]))
    joined = {name: [result[name] for result in results] for name in results[0]}
    return {name: sum(x) if name.startswith("parameter") else torch.cat(x) for name, x in joined.items()}


OPTIONS = {
    "two of four": {},
    "one of four": {"top_k": 1},
    "all": {"top_k": 4},
    "gated": {"gated": True},
    "bias": {"balance": "bias"},
    "chunks": {"chunk_size": 7},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_token_by_hand(name):
    moe, layout = make_moe(**OPTIONS[name]), layout_of(IDS)
    if name == "bias":
        moe.bias_E.normal_(std=0.3)
    hidden_TD = hidden_of(layout).requires_grad_()
    out_TD, sums = moe(hidden_TD, layout)
    expected_TD, scores_TE = mixture_one_by_one(moe, hidden_TD)
    torch.testing.assert_close(out_TD, expected_TD, rtol=0, atol=1e-12)
    z_loss = layout.num_tokens * z_loss_by_hand(moe, hidden_TD)
    balance = sum(balance_by_hand(scores_TE[span], moe.options.top_k) for span in spans(layout))
    expected = torch.stack([z_loss] if name == "bias" else [balance, z_loss])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    weights_TD = hidden_of(layout, 1)
    found, by_hand = (
        torch.autograd.grad((out * weights_TD).sum() + total.sum(), [hidden_TD, *moe.parameters()])
        for out, total in ((out_TD, sums), (expected_TD, expected))
    )
    for x, y in zip(found, by_hand, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("ids", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_equals_alone(name, ids):
    moe, layout = make_moe(**OPTIONS[name]), layout_of(ids)
    hidden_TD, weights_TD = hidden_of(layout), hidden_of(layout, 1)
    assert_equal(run(moe, layout, hidden_TD, weights_TD), one_by_one(moe, layout, hidden_TD, weights_TD))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", [None, 1e4, -1e4, float("nan")])
def test_a_mate_changes_at_most_rounding(name, value):
    """Another mate, a huge or a NaN one: it decides how many rows an expert's product has, and nothing else."""
    moe, layout = make_moe(**OPTIONS[name]), layout_of([[1] * 9 + [2] * 8 + [3] * 7])
    hidden_TD, weights_TD = hidden_of(layout), hidden_of(layout, 1)
    is_mate_T1 = (layout.sequence_of_token == 1)[:, None]
    weights_TD = weights_TD.masked_fill(is_mate_T1, 0)
    others_TD = hidden_of(layout, 2) if value is None else torch.full_like(hidden_TD, value)
    before, after = (
        run(moe, layout, x, weights_TD, of_sums=0.0) for x in (hidden_TD, torch.where(is_mate_T1, others_TD, hidden_TD))
    )
    for part in ("out", "gradient"):
        kept = ~is_mate_T1.squeeze(1)
        torch.testing.assert_close(after[part][kept], before[part][kept], rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_is_the_dense_feed_forward_bit_for_bit(gated, dtype):
    """With dropout, in bfloat16 too; and in gradients."""
    config, layout = make_config(hidden_dropout_prob=0.1), layout_of(IDS)
    torch.manual_seed(0)
    intermediate, output = BertIntermediate(config).to(dtype), BertOutput(config).to(dtype)
    moe = MixtureOfExperts(config, BlockOptions(feed_forward="moe", experts=1, top_k=1, gated=gated), 0)
    dense = DenseFeedForward(config, BlockOptions(gated=gated), 0)
    moe.from_dense(intermediate, output)
    dense.from_dense(intermediate, output)
    results = []
    for module in (moe, dense):
        torch.manual_seed(1)
        hidden_TD = hidden_of(layout).to(dtype).requires_grad_()
        out_TD, _ = module(hidden_TD, layout)
        (out_TD * hidden_of(layout, 1).to(dtype)).sum().backward()
        expert = module.experts[0] if module is moe else module
        of_first = [p.grad for p in expert.intermediate.parameters()]
        of_second = [p.grad for p in (expert.dense if module is moe else module.output.dense).parameters()]
        results.append([out_TD.detach(), hidden_TD.grad, *of_first, *of_second])
    for x, y in zip(*results, strict=True):
        assert x.dtype == dtype and torch.equal(x, y)
    assert not moe.router.weight.grad.any()


@pytest.mark.parametrize("gated", [False, True])
def test_upcycling_is_the_dense_model_at_first(gated):
    config, layout = make_config(), layout_of(IDS)
    torch.manual_seed(0)
    intermediate, output = BertIntermediate(config).double(), BertOutput(config).double()
    moe = MixtureOfExperts(config, BlockOptions(feed_forward="moe", experts=4, top_k=2, gated=gated), 0)
    moe.from_dense(intermediate, output)
    hidden_TD = hidden_of(layout)
    out_TD, _ = moe(hidden_TD, layout)
    expected_TD = output.dense(intermediate(hidden_TD))
    torch.testing.assert_close(out_TD, expected_TD, rtol=0, atol=1e-13)
    weights = [expert.dense.weight for expert in moe.experts]
    assert len({weight.data_ptr() for weight in weights}) == 4 and output.dense.weight is not weights[0]
    (out_TD * hidden_of(layout, 1)).sum().backward()
    gradients = [weight.grad for weight in weights]
    assert not any(torch.equal(gradients[0], other) for other in gradients[1:])  # they part


def test_an_idle_expert_has_a_gradient_of_zeros():
    moe, layout = make_moe(), layout_of([[1, 1]])
    with torch.no_grad():
        moe.router.weight[2] = -100 * moe.router.weight[0]
    hidden_TD = torch.ones(2, WIDTH, dtype=torch.float64) * moe.router.weight[0].detach()
    found = run(moe, layout, hidden_TD, hidden_TD, of_sums=0.0)
    idle = [name for name in found if "experts.2" in name]
    assert len(idle) == 4 and all((found[name] == 0).all() for name in idle)
    assert found["parameter experts.0.dense.weight"].any()


def test_an_empty_batch_has_gradients_of_zeros():
    for options in OPTIONS.values():
        moe, layout = make_moe(**options), layout_of([[0, 0]])
        found = run(moe, layout, hidden_of(layout), hidden_of(layout))
        assert found["out"].shape == (0, WIDTH)
        assert all((x == 0).all() for name, x in found.items() if name.startswith("parameter"))


@pytest.mark.parametrize("name", OPTIONS)
def test_padding_slots_change_nothing(name):
    """No sum, no count, no gradient, whatever the padding holds."""
    moe, ids = make_moe(**OPTIONS[name]), torch.tensor([[1, 1, 1, 2, 2, 0, 0], [0] * 7, [1, 1, 1, 1, 2, 3, 0]])
    exact, slots = layout_of(ids), SlotLayout(ids.int(), sequence_slots=4)
    hidden_TD, weights_TD = hidden_of(exact), hidden_of(exact, 1)
    wide, weights = (torch.full((21, WIDTH), 7.0, dtype=torch.float64) for _ in range(2))
    wide[slots.is_real_token], weights[slots.is_real_token] = hidden_TD, weights_TD
    weights[~slots.is_real_token] = 0
    expected, found = run(moe, exact, hidden_TD, weights_TD), run(moe, slots, wide, weights)
    for part in ("out", "gradient"):
        found[part] = found[part][slots.is_real_token]
    assert_equal(found, expected)
    if name == "bias":
        (counted,) = moe._statistics
        assert counted.sum() == 2 * moe.options.top_k * exact.num_tokens


def kept_numbers(chunk_size):
    """How many numbers the graph of one pass holds, beside its parameters."""
    moe, layout, held = make_moe(chunk_size=chunk_size), layout_of([[1] * 200]), {}
    parameters = {parameter.data_ptr() for parameter in moe.parameters()}

    def hold(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = x, storage.nbytes() // 8
        return x

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        out_TD, _ = moe(hidden_of(layout).requires_grad_(), layout)
    out_TD.sum().backward()
    return sum(size for _, size in held.values())


def test_chunks_keep_nothing_of_the_inner_width():
    assert kept_numbers(None) > 2 * 2 * 200 * INNER  # before and after the activation, twice a token
    assert kept_numbers(50) < 2 * 200 * INNER


# -- published implementations ----------------------------------------------------------------------------------------


def mixtral(experts=4, top_k=2):
    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_local_experts=experts, num_experts_per_tok=top_k,
        experts_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.4)
    return block


def like_mixtral(block):
    """Ours with its weights: SwiGLU experts, biases of 0."""
    experts = block.experts.num_experts
    moe = make_moe(make_config(hidden_act="silu"), experts=experts, top_k=block.top_k, gated=True)
    with torch.no_grad():
        moe.router.weight.copy_(block.gate.weight)
        for e, expert in enumerate(moe.experts):
            activated, factor = block.experts.gate_up_proj[e].chunk(2)
            expert.intermediate.dense.weight.copy_(activated)
            expert.intermediate.up.weight.copy_(factor)
            expert.dense.weight.copy_(block.experts.down_proj[e])
            for linear in (expert.intermediate.dense, expert.intermediate.up, expert.dense):
                linear.bias.zero_()
    return moe


def all_in_float64():
    """Mixtral's router computes in float32, whatever the model; the comparison is of formulas."""
    return mock.patch.object(torch.Tensor, "float", lambda x: x.double())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixtral_with_the_same_weights(top_k):
    """Output and gradients; with one expert a token Mixtral's weight is 1, where Switch's and ours is p."""
    block = mixtral(top_k=top_k)
    moe, layout = like_mixtral(block), layout_of(IDS)
    hidden_TD, weights_TD = hidden_of(layout), hidden_of(layout, 1)
    with all_in_float64():
        inputs = hidden_TD.clone().requires_grad_()
        expected_TD = block(inputs[None])[0]
        (expected_TD * weights_TD).sum().backward()
    found = run(moe, layout, hidden_TD, weights_TD, of_sums=0.0)
    if top_k == 1:
        largest_T1 = (hidden_TD @ block.gate.weight.T).softmax(-1).amax(-1, keepdim=True)
        torch.testing.assert_close(found["out"], largest_T1 * expected_TD, rtol=0, atol=1e-11)
        return
    torch.testing.assert_close(found["out"], expected_TD.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(found["gradient"], inputs.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(found["parameter router.weight"], block.gate.weight.grad, rtol=0, atol=1e-10)
    gates = torch.stack([found[f"parameter experts.{e}.intermediate.dense.weight"] for e in range(4)])
    torch.testing.assert_close(gates, block.experts.gate_up_proj.grad.chunk(2, 1)[0], rtol=0, atol=1e-10)


def test_mixtrals_loss_on_each_sequence():
    """And not on the batch: a product of two means does not add up over its parts."""
    block = mixtral()
    moe, layout = like_mixtral(block), layout_of(IDS)
    hidden_TD = hidden_of(layout)

    def published(logits_TE):
        return load_balancing_loss_func((logits_TE,), num_experts=4, top_k=2)

    logits_TE = hidden_TD @ block.gate.weight.T
    with all_in_float64():
        alone = torch.stack([published(logits_TE[span]) for span in spans(layout)])
        together = published(logits_TE)
    _, sums = moe(hidden_TD, layout)
    assert moe.loss_rows[0].total == "expert_balance"
    torch.testing.assert_close(sums[0], alone.sum(), rtol=1e-6, atol=0)  # Mixtral counts in float32
    assert abs(float((together - alone.mean()).detach())) > 0.05


def switch(capacity):
    config = SwitchTransformersConfig(
        d_model=WIDTH, d_ff=INNER, num_experts=4, expert_capacity=capacity, dropout_rate=0.0, router_jitter_noise=0.0
    )
    torch.manual_seed(0)
    block = SwitchTransformersSparseMLP(config).double()
    block.router.dtype = torch.float64
    return block


def like_switch(block):
    moe = make_moe(make_config(hidden_act="relu"), top_k=1)
    with torch.no_grad():
        moe.router.weight.copy_(block.router.classifier.weight)
        for e, expert in enumerate(moe.experts):
            theirs = block.experts[f"expert_{e}"]
            expert.intermediate.dense.weight.copy_(theirs.wi.weight)
            expert.dense.weight.copy_(theirs.wo.weight)
            for linear in (expert.intermediate.dense, expert.dense):
                linear.bias.zero_()
    return moe


def test_switch_with_room_for_all_and_without():
    """The negative control: where an expert's places run out, a mate's tokens push out those of a sequence."""
    layout = layout_of([[1] * 12 + [2] * 12])
    hidden_TD = hidden_of(layout)
    moe = like_switch(switch(64))
    with torch.no_grad():
        out_TD, _ = moe(hidden_TD, layout)
        for capacity, least, most in ((64, 0.0, 1e-12), (3, 1e-2, 1e9)):
            block = switch(capacity)
            packed_TD, alone_TD = block(hidden_TD[None])[0], block(hidden_TD[None, 12:])[0]
            assert least <= float((packed_TD[12:] - alone_TD).abs().max()) <= most
        torch.testing.assert_close(out_TD, switch(64)(hidden_TD[None])[0], rtol=0, atol=1e-12)
        own_TD, _ = moe(hidden_TD[12:], layout_of([[1] * 12]))
        torch.testing.assert_close(out_TD[12:], own_TD, rtol=0, atol=1e-12)


def test_switch_counts_padding_in_its_balance():
    """The negative control: the same tokens and padding behind them have another loss there, and the same here."""
    moe, exact = like_switch(switch(64)), layout_of([[1] * 6 + [2] * 5])
    with torch.no_grad():
        moe.router.weight.mul_(10)
    ids = torch.tensor([[1] * 6 + [2] * 5 + [0] * 5])
    slots, wide = SlotLayout(ids.int(), sequence_slots=2), torch.ones(16, WIDTH, dtype=torch.float64)
    wide[:11] = hidden_of(exact)
    published = []
    for hidden_TD in (wide[:11], wide):
        probabilities = (hidden_TD @ moe.router.weight.T).softmax(-1)[None]
        published.append(float(switch_balance(probabilities, probabilities.argmax(-1)).detach()))
    assert abs(published[0] - published[1]) > 0.02
    found = [moe(hidden_TD, layout)[1].detach() for hidden_TD, layout in ((wide[:11], exact), (wide, slots))]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


# -- the bias ----------------------------------------------------------------------------------------------------------


def test_the_bias_moves_towards_even_use():
    """By the sign of what each expert lacks, once a step, whatever the micro-batches; evaluation moves nothing."""
    layout, biases = layout_of([[1] * 30, [1] * 30]), []
    for parts in (1, 2):
        moe = make_moe(balance="bias", bias_speed=0.01)
        for ids, hidden_TD in zip(torch.ones(2, 30).int().chunk(parts), hidden_of(layout).chunk(parts), strict=True):
            moe(hidden_TD.requires_grad_(), layout_of(ids))[0].sum().backward()
        (counts_E,) = moe._statistics
        assert counts_E.sum() == 120
        moe.eval()(hidden_of(layout, 3).requires_grad_(), layout)[0].sum().backward()
        assert torch.equal(moe._statistics[0], counts_E)
        after_step(moe)
        assert torch.equal(moe.bias_E, 0.01 * (30.0 - counts_E.double()).sign()) and moe.bias_E.any()
        biases.append(moe.bias_E.clone())
        after_step(moe)
        assert torch.equal(moe.bias_E, biases[-1])
    assert torch.equal(*biases)


def test_the_bias_evens_out_the_use_of_experts():
    moe, layout = make_moe(balance="bias", bias_speed=0.01, z_loss=0.0), layout_of([[1] * 64])
    assert moe.loss_rows == () and moe(hidden_of(layout), layout)[1].shape == (0,)
    uneven = []
    for step in range(120):
        hidden_TD = hidden_of(layout, step) + 1  # what all tokens have in common has its favourites
        moe(hidden_TD.requires_grad_(), layout)[0].sum().backward()
        counts = moe._statistics[0].double()
        uneven.append(float((counts.max() - counts.min()) / counts.mean()))
        after_step(moe)
    assert sum(uneven[-20:]) < 0.5 * sum(uneven[:20])


def test_the_bias_changes_the_choice_and_not_the_weights():
    moe, layout = make_moe(balance="bias"), layout_of([[1] * 5])
    hidden_TD = hidden_of(layout)
    with torch.no_grad():
        moe.bias_E[3] = 10
        choice_Tk, weight_Tk = moe._choose((hidden_TD @ moe.router.weight.T).softmax(-1))
    assert (choice_Tk == 3).any(1).all()
    scores_Tk = (hidden_TD @ moe.router.weight.T).softmax(-1).gather(1, choice_Tk)
    torch.testing.assert_close(weight_Tk, scores_Tk / scores_Tk.sum(1, keepdim=True))


def test_a_bias_that_nobody_moves_is_an_error(monkeypatch):
    monkeypatch.setattr("bert_pretrain.block.feed_forwards.moe.MOST_MICRO_BATCHES", 2)
    moe, layout = make_moe(balance="bias"), layout_of([[1, 1]])
    with pytest.raises(RuntimeError, match=r"not moved in 2 micro-batches; add AfterStepCallback\(\) to the Trainer"):
        for _ in range(3):
            moe(hidden_of(layout).requires_grad_(), layout)[0].sum().backward()


def test_state():
    moe = make_moe(balance="bias")
    moe.bias_E.normal_()
    other = make_moe(balance="bias")
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other.bias_E, moe.bias_E) and other.bias_E.dtype == torch.float64
    assert copy.deepcopy(moe).bfloat16().bias_E.dtype == torch.float32
    assert "bias_E" not in make_moe().state_dict()
    other.reset_parameters()
    assert not other.bias_E.any()


# -- choices, and the grouped product ---------------------------------------------------------------------------------


def test_recorded_choices_are_played_back():
    moe, layout = make_moe(), layout_of([[1] * 9])
    hidden_TD = hidden_of(layout)
    with recording() as choices:
        expected_TD, _ = moe(hidden_TD, layout)
    with replaying(choices):
        other_TD, _ = moe(hidden_TD + 1e-9, layout)
    assert [x.shape for x in choices] == [(9, 2)]
    torch.testing.assert_close(other_TD, expected_TD, rtol=0, atol=1e-6)
    moved_TD, _ = moe(hidden_TD.flip(0), layout)
    with replaying(choices):
        kept_TD, _ = moe(hidden_TD.flip(0), layout)
    assert float((moved_TD - kept_TD).abs().max().detach()) > 1e-3


@pytest.mark.parametrize("gated", [False, True])
def test_the_grouped_product_is_the_loop(gated):
    """With its gradients, in the one place where they differ; an expert without tokens among them."""
    moe, layout = make_moe(experts=8, gated=gated).bfloat16(), layout_of([[1] * 7])
    hidden_TD, results = hidden_of(layout).bfloat16(), []
    for grouped in (False, True):
        moe.zero_grad()
        inputs = hidden_TD.clone().requires_grad_()
        with mock.patch("bert_pretrain.block.feed_forwards.moe.is_grouped", lambda *_, grouped=grouped: grouped):
            out_TD, _ = moe(inputs, layout)
        (out_TD.float() * hidden_of(layout, 1)).sum().backward()
        results.append([out_TD.detach(), inputs.grad, *(p.grad for p in moe.parameters())])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)
    idle = [e for e in range(8) if not results[1][2 + 4 * e].any()]
    assert idle or not gated


def test_what_a_token_meets():
    moe = make_moe()
    assert moe.weights_a_token() == 4 * WIDTH + 2 * 2 * WIDTH * INNER
    assert make_moe(gated=True).weights_a_token() == 4 * WIDTH + 2 * 3 * WIDTH * INNER
    assert len(moe.output_weights()) == 4
