"""The reversible stream: what it keeps, and that its gradients are those of a stream that keeps everything."""

import contextlib
import importlib
from functools import partial
from typing import Any

import pytest
import torch
from attention_contract import assert_equal, layout_of
from process_group import run_ranks
from slow_streams import small_layers, small_steps, two_streams
from small_heads import HERE, SMALL_OPTIONS
from torch import Tensor, nn

from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.parts.choices import recording
from bert_pretrain.block import reversible as stream
from bert_pretrain.block.reversible import Step, reversible
from collate import PackLayout

IDS = [[1] * 20 + [2] * 9 + [0] * 4 + [3] * 15, [1] * 7 + [2] * 5 + [3] * 33 + [4] * 3]
CHOOSE = ("lsh", "routing", "sinkhorn", "clustered")
"""Heads whose choices are handed on."""


def build(name: str) -> Any:
    return partial(ATTENTION[name], **SMALL_OPTIONS.get(name, {}))


def hidden_of(layout: PackLayout, seed: int = 1, width: int = 16) -> Tensor:
    return torch.randn(layout.num_tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(streams, branches: nn.ModuleList, layout: PackLayout, hidden_TD: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """The result, the sums, and all gradients of one loss; random numbers are drawn from a seed."""
    branches.zero_grad()
    hidden_TD = hidden_TD.clone().requires_grad_()
    torch.manual_seed(seed)
    result, sums = streams(small_steps(branches), hidden_TD, layout)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ((result * weights).sum() + torch.cat(sums).sum()).backward()
    assert hidden_TD.grad is not None
    found = {"result": result.detach(), "sums": torch.cat(sums).detach(), "gradient": hidden_TD.grad}
    for name, parameter in branches.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected| over all gradients of parameters together."""
    names = [name for name in found if name not in ("result", "sums", "gradient")]
    difference, norm = (
        torch.stack([x.double().norm() for x in tensors]).norm()
        for tensors in ([found[n].double() - expected[n].double() for n in names], [expected[n] for n in names])
    )
    return float(difference / norm)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_those_of_a_stream_that_keeps_everything(name, dropout):
    branches, layout = small_layers(build(name), 3, dropout), layout_of(IDS)
    expected = run(two_streams, branches, layout, hidden_of(layout))
    assert_equal(run(reversible, branches, layout, hidden_of(layout)), expected)


def test_random_numbers_go_on_as_with_a_stream_that_keeps_everything():
    branches, layout = small_layers(build("sdpa"), 2, 0.1), layout_of(IDS)
    after = []
    for streams in (two_streams, reversible):
        torch.manual_seed(3)
        result, _ = streams(small_steps(branches), hidden_of(layout), layout)
        after.append(torch.get_rng_state())
        result.sum().backward()
        after.append(torch.get_rng_state())
    assert all(torch.equal(state, after[0]) for state in after)


def test_other_random_numbers_in_the_second_run_would_be_seen(monkeypatch):
    branches, layout = small_layers(build("sdpa"), 2, 0.1), layout_of(IDS)
    expected = run(two_streams, branches, layout, hidden_of(layout))
    monkeypatch.setattr(stream, "drawing_from", lambda *_: contextlib.nullcontext())
    assert error(run(reversible, branches, layout, hidden_of(layout)), expected) > 0.01


# What is kept


def saved_bytes(streams, branches: nn.ModuleList, layout: PackLayout) -> int:
    """Bytes that autograd keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in branches.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = streams(small_steps(branches), hidden_of(layout).requires_grad_(), layout)
    del result
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("name", HERE)
def test_as_much_is_kept_at_2_layers_as_at_24(name):
    """The last pair of streams. A head that chooses adds its choices, a byte or two each, and nothing else."""
    layout = layout_of(IDS)
    pair = 2 * hidden_of(layout).nbytes
    for num_layers in (2, 24):
        branches = small_layers(build(name), num_layers)
        with recording() as choices:
            two_streams(small_steps(branches), hidden_of(layout), layout)
        chosen = sum(x.nbytes for x in choices)
        assert (chosen > 0) == (name in CHOOSE)
        assert chosen <= 4 * num_layers * branches[0].num_heads * layout.num_tokens
        assert saved_bytes(reversible, branches, layout) == pair + chosen


def test_a_stream_that_keeps_everything_keeps_more_with_every_layer():
    at_2, at_24 = (saved_bytes(two_streams, small_layers(build("sdpa"), n), layout_of(IDS)) for n in (2, 24))
    assert at_24 > 10 * at_2


def test_random_states_are_kept_where_numbers_were_drawn():
    for dropout, expected in ((0.0, 0), (0.1, 12)):
        steps, layout = small_steps(small_layers(build("sdpa"), 6, dropout)), layout_of(IDS)
        result, _ = reversible(steps, hidden_of(layout).requires_grad_(), layout)
        assert sum(states is not None for states in states_of_steps(result)) == expected


def states_of_steps(result: Tensor) -> list[Any]:
    """The random states that the graph keeps, of each step."""
    waiting, seen = [result.grad_fn], set()
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [other for other, _ in node.next_functions]
    return [node.random for node in seen if type(node).__name__ == "_StepBackward"]


# 16 bits


@pytest.mark.parametrize("name", HERE)
def test_under_autocast_gradients_are_as_exact_as_of_a_stream_that_keeps_everything(name):
    """Against the gradients in float32, over all parameters: at most 1.5 times the error, and nearly the same."""
    branches, layout = small_layers(build(name), 6).float(), layout_of(IDS)
    hidden = hidden_of(layout).float()
    exact = run(two_streams, branches, layout, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = (run(streams, branches, layout, hidden) for streams in (two_streams, reversible))
    assert error(found, exact) <= 1.5 * error(plain, exact)
    assert error(found, plain) <= 0.5 * error(plain, exact)


def test_streams_of_16_bits_would_give_other_gradients(monkeypatch):
    branches, layout = small_layers(build("lsh"), 6).float(), layout_of(IDS)
    hidden = hidden_of(layout).float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(two_streams, branches, layout, hidden)
        assert error(run(reversible, branches, layout, hidden), plain) < 1e-3
        monkeypatch.setattr(stream, "wide", lambda x: x.bfloat16())
        assert error(run(reversible, branches, layout, hidden), plain) > 0.01


@pytest.mark.parametrize("name", ["lsh", "routing"])
def test_choices_made_again_would_give_the_gradients_of_another_function(name, monkeypatch):
    """Inputs of second runs are off by 1e-3 here, so that it does not depend on how a processor rounds."""
    branches, layout = small_layers(build(name), 6), layout_of([[1] * 64] * 8)

    def rounded(branch: nn.Module) -> Any:
        runs = []

        def forward(x_TD, layout):
            runs.append(x_TD)
            noise = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(7), dtype=x_TD.dtype)
            return branch(x_TD + 1e-3 * noise if len(runs) == 2 else x_TD, layout)

        return Step(forward, list(branch.parameters()))

    def rounding(steps, hidden_TD, layout):
        return reversible([rounded(branch) for branch in branches], hidden_TD, layout)

    plain = run(two_streams, branches, layout, hidden_of(layout))
    handed_on = error(run(rounding, branches, layout, hidden_of(layout)), plain)
    monkeypatch.setattr(importlib.import_module(ATTENTION[name].__module__), "chosen", lambda make, below: make())
    made_again = error(run(rounding, branches, layout, hidden_of(layout)), plain)
    assert made_again > 5 * handed_on


def test_48_layers_in_float32_drift_by_rounding():
    """Gradients against float64: as far off as those of a stream that keeps everything; branches add much."""
    branches, layout = small_layers(build("sdpa"), 48), layout_of(IDS)
    with torch.no_grad():
        for weight in branches.parameters():
            if weight.dim() == 2:
                weight *= 1.1 / (weight.shape[1] ** 0.5 * weight.std())
    exact = run(two_streams, branches, layout, hidden_of(layout))
    branches.float()
    plain, found = (run(s, branches, layout, hidden_of(layout).float()) for s in (two_streams, reversible))
    assert error(found, exact) <= 1.5 * error(plain, exact)


def test_casts_of_weights_under_autocast_serve_no_other_pass():
    """A cast made without a graph, kept by autocast, would leave the weight's other use without a gradient."""
    branches, layout = small_layers(build("sdpa"), 1).float(), layout_of(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = reversible(small_steps(branches), hidden_of(layout).float(), layout)
        again = branches[1](result.float(), layout)[0]
        again.float().sum().backward()  # within autocast, too
        assert branches[1].up.weight.grad is not None
        first = branches[1].up.weight.grad.clone()
        branches.zero_grad()
        result, _ = two_streams(small_steps(branches), hidden_of(layout).float(), layout)
        branches[1](result.float(), layout)[0].float().sum().backward()
    torch.testing.assert_close(first, branches[1].up.weight.grad, rtol=0.05, atol=0.05 * float(first.abs().max()))


# Training


def test_routing_counts_once():
    counted = []
    for streams in (two_streams, reversible):
        branches, layout = small_layers(partial(ATTENTION["routing"], decay=0.9), 2), layout_of(IDS)
        for _ in range(2):
            run(streams, branches, layout, hidden_of(layout))
        counted.append([branch.attention_head.routing_statistics() for branch in branches[::2]])
        assert [branch.attention_head._micro_batches for branch in branches[::2]] == [2, 2]
    for (sums, counts), (expected_sums, expected_counts) in zip(*counted, strict=True):
        torch.testing.assert_close(sums, expected_sums, rtol=0, atol=1e-12 * float(expected_sums.abs().max()))
        assert torch.equal(counts, expected_counts)


def test_what_is_frozen_gets_no_gradient_and_what_is_shared_gets_the_sum():
    branches, layout = small_layers(build("sdpa"), 2), layout_of(IDS)
    branches[1].requires_grad_(False)
    shared = nn.ModuleList([branches[0], branches[1], branches[0], branches[3]])
    grads = []
    for streams in (two_streams, reversible):
        shared.zero_grad()
        result, sums = streams(small_steps(shared), hidden_of(layout), layout)  # hidden needs no gradient, either
        (result.square().sum() + torch.cat(sums).sum()).backward()
        grads.append({name: p.grad for name, p in shared.named_parameters()})
    for name, grad in grads[0].items():
        if name.startswith("1."):
            assert grad is None and grads[1][name] is None
        else:
            torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-12 * max(1, float(grad.abs().max())))


def test_without_gradients_it_computes_the_same():
    branches, layout = small_layers(build("lsh"), 2), layout_of(IDS)
    result, sums = reversible(small_steps(branches), hidden_of(layout), layout)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            again, sums_again = reversible(small_steps(branches), hidden_of(layout), layout)
        assert torch.equal(again, result) and not again.requires_grad
        assert all(map(torch.equal, sums, sums_again))


def test_a_second_derivative_is_refused():
    branches, layout = small_layers(build("sdpa"), 1), layout_of(IDS)
    hidden = hidden_of(layout).requires_grad_()
    result, _ = reversible(small_steps(branches), hidden, layout)
    with pytest.raises(RuntimeError, match="stream='plain'"):
        torch.autograd.grad(result.sum(), hidden, create_graph=True)


def test_weights_that_changed_before_the_second_run_are_refused():
    branches, layout = small_layers(build("sdpa"), 1), layout_of(IDS)
    result, _ = reversible(small_steps(branches), hidden_of(layout), layout)
    with torch.no_grad():
        branches[0].query.weight.mul_(2)
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        result.sum().backward()


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    branches, layout = small_layers(build("lsh"), 2, 0.1), layout_of(IDS)
    hidden = hidden_of(layout).requires_grad_()
    result, _ = reversible(small_steps(branches), hidden, layout)
    first, second = (torch.autograd.grad(result.square().sum(), hidden, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)


PACKS = [[1] * 20 + [2] * 9 + [0] * 4 + [3] * 15, [1] * 48, [1] * 7 + [2] * 5 + [3] * 36, [1] * 30 + [2] * 18]


def passes(branches: nn.Module, packs: list[int]) -> None:
    """Forward and backward of each pack, a micro-batch each."""
    for pack in packs:
        layout = layout_of([PACKS[pack]])
        result, sums = branches(hidden_of(layout, pack), layout)
        (result.square().sum() + torch.cat(sums).sum()).backward()


class Stack(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.branches = small_layers(build(name), 2)

    def forward(self, hidden_TD, layout):
        return reversible(small_steps(self.branches), hidden_TD, layout)


def one_rank(rank, folder):
    """Two micro-batches a rank; the gradients, averaged over ranks, are half of those of all four."""
    torch.set_num_threads(1)
    for name in ("sdpa", "lsh"):
        stack = Stack(name)
        model = nn.parallel.DistributedDataParallel(stack)
        with model.no_sync():
            passes(model, [rank])
        passes(model, [rank + 2])
        alone = Stack(name)
        passes(alone, [0, 1, 2, 3])
        for found, expected in zip(stack.parameters(), alone.parameters(), strict=True):
            largest = float(expected.grad.abs().max())
            torch.testing.assert_close(2 * found.grad, expected.grad, rtol=0, atol=1e-12 * max(1, largest))


def test_ranks_and_accumulation_change_nothing(tmp_path):
    run_ranks(one_rank, tmp_path)


# The public implementation


def test_it_equals_reformer_pytorch():
    module = pytest.importorskip("reformer_pytorch.reversible", reason="pip install reformer-pytorch==1.4.4 to compare")
    branches, layout = small_layers(build("sdpa"), 4), layout_of(IDS)

    class OneResult(nn.Module):
        def __init__(self, branch):
            super().__init__()
            self.branch = branch

        def forward(self, x, layout):
            return self.branch(x[0], layout)[0][None]

    theirs = [nn.ModuleList(map(OneResult, pair)) for pair in zip(branches[::2], branches[1::2], strict=True)]
    sequence = module.ReversibleSequence(nn.ModuleList(theirs)).train()

    def streams(steps, hidden, layout):
        both = sequence(torch.cat([hidden, hidden], -1)[None], arg_route=(True, True), layout=layout)
        return both[0].unflatten(-1, (2, -1)).mean(1), [hidden.new_zeros(1)]

    def without_sums(steps, hidden, layout):
        return reversible(steps, hidden, layout)[0], [hidden.new_zeros(1)]

    expected = run(streams, branches, layout, hidden_of(layout))
    assert_equal(run(without_sums, branches, layout, hidden_of(layout)), expected)
