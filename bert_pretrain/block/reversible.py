"""`reversible`: layers that keep nothing for the backward pass (RevNet, arXiv 1707.04585; Reformer, 2001.04451).

    y1 = x1 + F(x2)         going back    x2 = y2 - G(y1)
    y2 = x2 + G(y1)                       x1 = y1 - F(x2)

Two streams begin as the embeddings, and their mean is the result. F and G are a layer's branches behind their norms.
The backward pass gets the inputs of a layer from its outputs, and runs its branches again, one at a time.

Kept, at any depth: the last pair of streams. What grows with depth is small: the random states of branches that drew
numbers (5 kB a branch on a CPU, 16 bytes on a GPU), and what heads and experts chose (`parts.choices`). Each branch
runs forward twice.

Both streams are in float64: what is added to them in fewer digits comes off again almost without loss. In float32 the
error of each layer reaches those below, times their gain; where a branch adds as much as it reads, gradients of 24
layers are wrong in bfloat16, and of 48 layers in float32, too. Branches compute in the model's own type.

Each step is a node of autograd's graph, so that its gradients are ready, and on their way to other ranks, before the
step below runs again. The nodes hand the pair of streams on beside the graph: see `_Pair`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bert_pretrain.attention.parts.choices import recording, replaying
from bert_pretrain.block.branches import added_up
from bert_pretrain.block.placements import Post, State
from collate.layout import PackLayout


def reversed_layers(layers: Any, placement: Post, hidden_TD: Tensor, layout: PackLayout) -> tuple[State, Tensor]:
    """The row `reversible` of STREAMS."""
    result_TD, sums = reversible(steps_of(layers, placement, hidden_TD.dtype), hidden_TD, layout)
    of_layers = [torch.cat(pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
    return placement.begin(result_TD.to(hidden_TD.dtype)), added_up(of_layers)


class Step(NamedTuple):
    """A branch behind its norm: F or G.

    run: (T, D), layout -> (T, D), (k,) sums of the loss. parameters: all that it reads; others would get no gradient.
    """

    run: Callable[[Tensor, PackLayout], tuple[Tensor, Tensor]]
    parameters: Sequence[nn.Parameter]


def steps_of(layers: Any, placement: Post, dtype: torch.dtype) -> list[Step]:
    """F and G of each layer behind their norms. dtype: of the model, which branches get instead of the streams'."""

    def step(branch: nn.Module, norm: nn.Module) -> Step:
        parameters = [*norm.parameters(), *branch.parameters()]
        if hasattr(parameters[0], "device_mesh"):
            raise ValueError(
                "stream='reversible' runs parts of a layer by themselves, and FSDP has split each layer among ranks; "
                "shard the model as a whole (without transformer_layer_cls_to_wrap), or take stream='checkpoint'"
            )

        def run(x_TD: Tensor, layout: PackLayout) -> tuple[Tensor, Tensor]:
            return branch(placement.enter((x_TD.to(of_norms),), norm).to(dtype), layout)

        return Step(run, parameters)

    of_norms = torch.promote_types(dtype, torch.float32)
    return [step(*each) for layer in layers for each in layer.branches]


def reversible(steps: Sequence[Step], hidden_TD: Tensor, layout: PackLayout) -> tuple[Tensor, list[Tensor]]:
    """Run F, G, F, G, … of all layers on two streams.

    Returns (T, D), in float64, and the sums of each step.
    """
    first = second = wide(hidden_TD)
    if not torch.is_grad_enabled():
        sums = []
        for step in steps:
            out, sums_of_step = step.run(second, layout)
            first, second = second, first + out
            sums.append(sums_of_step)
        return (first + second) / 2, sums

    pair, sums = _Pair(), []
    for index, step in enumerate(steps):
        trained = dict.fromkeys(p for p in step.parameters if p.requires_grad)
        again = _Again(step, layout, Autocast.of(first), is_first=index == 0)
        summed, sums_of_step = _Step.apply(again, pair, first, second, *trained)
        first, second = second, summed
        sums.append(sums_of_step)
    first, second, *sums = _Last.apply(pair, first, second, *sums)
    return (first + second) / 2, sums


def wide(x: Tensor) -> Tensor:
    """In float64; on Apple's GPUs, which have none, in float32."""
    return x.float() if x.device.type == "mps" else x.double()


class _Pair:
    """Both streams, where the backward pass stands: what the last step that ran back had read.

    The graph gives gradients from node to node, and keeps order. This goes beside it.
    """

    streams: tuple[Tensor, Tensor] | None = None


class _Again(NamedTuple):
    """What a step needs to run again, but for its input."""

    step: Step
    layout: PackLayout
    autocast: "Autocast"
    is_first: bool

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor] | None, list[Tensor]]:
        """Output and sums, the random states that it drew from (None: it drew nothing), and what it chose.

        It runs with a graph, as the second time, and drops what the graph would keep. Without a graph torch may take
        another kernel, as for attention with learned biases, and in 16 bits that is another result.
        """
        random = random_states(x.device)
        with torch.enable_grad(), saved_tensors_hooks(_drop, _drop), self.autocast.again(), recording() as choices:
            out, sums = self.step.run(x.detach().requires_grad_(), self.layout)
        drew = any(not torch.equal(a, b) for a, b in zip(random, random_states(x.device), strict=True))
        return out.detach(), sums.detach(), random if drew else None, choices

    def again(self, x: Tensor, random: list[Tensor] | None, choices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The same output and sums, now with a graph."""
        with torch.enable_grad(), self.autocast.again(), replaying(choices), drawing_from(random, x.device):
            return self.step.run(x, self.layout)


class _Step(torch.autograd.Function):
    """again, pair, streams a and b, the step's parameters -> a + step(b), sums. It keeps no stream."""

    @staticmethod
    def forward(ctx: Any, again: _Again, pair: _Pair, a: Tensor, b: Tensor, *parameters: Tensor) -> Any:
        out, sums, ctx.random, choices = again.forward(b)
        ctx.again, ctx.pair, ctx.parameters = again, pair, parameters
        ctx.versions = [x._version for x in parameters]
        ctx.save_for_backward(*choices)
        return a + out, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_sums: Tensor) -> Any:
        if ctx.versions != [x._version for x in ctx.parameters]:
            raise RuntimeError(
                "parameters changed between the forward and the backward pass, so stream='reversible' cannot run "
                "layers again; call backward() before the optimizer's step"
            )
        b, summed = ctx.pair.streams
        x = b.detach().requires_grad_()
        out, sums = ctx.again.again(x, ctx.random, ctx.saved_tensors)
        found = gradients([out, sums], [x, *ctx.parameters], [grad, grad_sums])
        ctx.pair.streams = None if ctx.again.is_first else (summed - out.detach(), b)
        return None, None, grad, *found


class _Last(torch.autograd.Function):
    """pair, both streams, all sums -> the same. It keeps the streams, and runs back before all steps."""

    @staticmethod
    def forward(ctx: Any, pair: _Pair, first: Tensor, second: Tensor, *sums: Tensor) -> Any:
        ctx.pair = pair
        ctx.save_for_backward(first, second)
        return first.view_as(first), second.view_as(second), *(x.view_as(x) for x in sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for second derivatives, and stream='reversible' has none: its backward pass "
                "runs layers again outside of the graph; take stream='plain'"
            )
        ctx.pair.streams = ctx.saved_tensors
        return None, *grads


def _drop(_: Tensor) -> Any:
    """What autograd keeps of a run whose graph nobody follows."""


def gradients(results: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> Sequence[Tensor | None]:
    """Of the results, weighed by grads, for inputs; None for an input that they do not read."""
    weighed = [(result, grad.to(result.dtype)) for result, grad in zip(results, grads, strict=True)]
    weighed = [pair for pair in weighed if pair[0].requires_grad]
    if not weighed:
        return [None] * len(inputs)
    of, by = zip(*weighed, strict=True)
    return torch.autograd.grad(of, inputs, by, allow_unused=True)


class Autocast(NamedTuple):
    """How autocast is set, to set it so again.

    Casts of weights are not kept: one made without a graph would serve a later pass, and its weight get no gradient.
    """

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def of(cls, x: Tensor) -> "Autocast":
        device = x.device.type
        if not torch.amp.is_autocast_available(device):
            return cls("cpu", torch.bfloat16, False)
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def again(self) -> torch.autocast:
        return torch.autocast(self.device_type, self.dtype, self.enabled, cache_enabled=False)


def random_states(device: torch.device) -> list[Tensor]:
    """Of torch's generators of the host and of this device; both tensors are on the host."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextmanager
def drawing_from(states: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Draw from these states; afterwards go on from where the generators were. None: leave them."""
    if states is None:
        yield
        return
    before = random_states(device)
    _set(states, device)
    try:
        yield
    finally:
        _set(before, device)


def _set(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)
