"""What every attention head promises, as checks to call from tests.

    build = partial(LocalAttention, window=3)      # a head's class with its options, or any callable like it
    check_contract(build)                          # all of the following
    check_isolation(build, [[1, 1, 1, 2, 2, 0]])   # one layout, given by its sequence_ids
    by_sequence(twin, layout, *inputs)             # a slow twin (n, H, K) x 3 -> (n, H, K), one sequence at a time
    leak(attend, 9, 8)                             # how far the first sequence moves when only the second changes

A head is built with num_heads=HEADS, head_width=WIDTH, max_sequence_length=64, layer_index=0.

The promise. A mate's values change no bit of a sequence: the batch has the same shapes, so the same kernels compute it.
Other mates or another place change at most the rounding: another shape may get another kernel, and which one depends
on the processor. No head here lets values decide the shape of a product. For a head that does (such as experts that
take as many tokens as choose them), allow rounding in both: check_contract(build, mate_tolerance=ROUNDING).
"""

import io
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from collate import PackLayout

HEADS, WIDTH, MAX_LENGTH = 2, 8, 64

ROUNDING = 1e-12
"""For float64, relative to the largest number of its kind if that is above 1."""

LAYOUTS = {
    "one pack": [[1, 1, 1, 2, 2, 0]],
    "padding in the middle": [[1, 1, 0, 0, 2, 2, 2, 3], [0, 1, 1, 1, 1, 0, 2, 0]],
    "ones": [[1, 2, 3, 4]],
    "one sequence": [[1, 1, 1, 1, 1]],
    "an empty pack": [[1, 1, 2], [0, 0, 0]],
    "long and short": [[1] * 33 + [2] + [3] * 30, [1] * 5 + [0] * 20 + [2] * 39, [0] * 3 + [1] * 16 + [2] * 45],
}


@st.composite
def rows(draw, max_length: int = 20):
    """sequence_ids of 1 to 3 packs: sequences of 1 to max_length tokens, padding anywhere, at least one sequence."""
    made = []
    for pack in range(draw(st.integers(1, 3))):
        row = []
        lengths = draw(st.lists(st.integers(1, max_length), min_size=0 if pack else 1, max_size=4))
        for number, length in enumerate(lengths, start=1):
            row += [0] * draw(st.integers(0, 2)) + [number] * length
        made.append(row)
    width = max(map(len, made))
    return [row + [0] * (width - len(row)) for row in made]


def make(build: Callable[..., nn.Module], **changes) -> nn.Module:
    """The head, in float64, its parameters drawn under a fixed seed."""
    sizes = {"num_heads": HEADS, "head_width": WIDTH, "max_sequence_length": MAX_LENGTH, "layer_index": 0}
    torch.manual_seed(0)
    head = build(**{**sizes, **changes}).double()
    if getattr(head, "needs_hidden", False):
        head.register_forward_pre_hook(with_hidden, with_kwargs=True)
    return head


def with_hidden(head: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
    """A pre-hook for heads that need the layer's input: it is made of queries, keys and values, as these are of it."""
    if "hidden_TD" not in keywords:
        query, key, value, *_ = inputs
        keywords = keywords | {"hidden_TD": hidden_of(query, key, value)}
    return inputs, keywords


def hidden_of(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(T, H, K) each -> (T, H * K)"""
    return (query - key + value).flatten(1) / 2


def layout_of(ids) -> PackLayout:
    return PackLayout(torch.as_tensor(ids, dtype=torch.int32))


def heads_input(layout: PackLayout, seed: int = 0, heads: int = HEADS, width: int = WIDTH) -> list[Tensor]:
    """Queries, keys, values (T, H, K) in float64, so large that the softmax is far from flat."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.num_tokens, heads, width)
    return [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def run(attention: nn.Module, layout: PackLayout, inputs: list[Tensor], weights: Tensor) -> dict[str, Tensor]:
    """The context, and the gradients of sum(context * weights) for the inputs and the head's parameters.

    inputs: queries, keys, values (T, H, K), and for a head that needs it the layer's input (T, D), else see `make`.
    """
    inputs = [x.clone().requires_grad_() for x in inputs]
    attention.zero_grad()
    hidden = {"hidden_TD": inputs[3]} if len(inputs) > 3 else {}
    context = attention(*inputs[:3], layout, **hidden)
    (context * weights).sum().backward()
    # a head need not read all inputs: what it leaves alone has a gradient of 0
    gradients = (torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)
    results = {"context": context.detach(), **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)}}
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        results[f"parameter {name}"] = parameter.grad.clone()
    return results


def of_tokens(results: dict[str, Tensor], tokens) -> dict[str, Tensor]:
    """The part that belongs to these tokens: context and gradients of inputs, but not those of parameters."""
    return {name: value[tokens] for name, value in results.items() if not name.startswith("parameter")}


def spans(layout: PackLayout) -> list[slice]:
    """Where each sequence lies among the tokens."""
    bounds = layout.cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def run_one_by_one(attention, layout, inputs, weights) -> dict[str, Tensor]:
    """As `run`, with every sequence in a batch of its own: tokens joined again, parameter gradients added up."""
    results = []
    for span in spans(layout):
        own = layout_of([[1] * (span.stop - span.start)])
        results.append(run(attention, own, [x[span] for x in inputs], weights[span]))
    joined = {name: [result[name] for result in results] for name in results[0]}
    return {name: torch.stack(x).sum(0) if name.startswith("parameter") else torch.cat(x) for name, x in joined.items()}


def by_sequence(twin: Callable[..., Tensor], layout: PackLayout, *inputs: Tensor) -> Tensor:
    """A function of one sequence, applied to each."""
    return torch.cat([twin(*(x[span] for x in inputs)) for span in spans(layout)])


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = ROUNDING) -> None:
    """Every result within the tolerance, relative to the largest number of its kind if that is above 1."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        allowed = tolerance * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(value, expected[name], rtol=0, atol=allowed, msg=partial("{}: {}".format, name))


def leak(attend: Callable[..., Tensor], first: int, second: int, heads: int = HEADS, width: int = WIDTH) -> float:
    """How far the first sequence's context moves when only the second sequence of its pack changes.

    attend: (T, H, K) x 3, layout -> (T, H, K); a head, or a public reference wrapped to look like one.
    """
    layout = layout_of([[1] * first + [2] * second])
    inputs = heads_input(layout, heads=heads, width=width)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[first:] *= -2
    with torch.no_grad():
        return float((attend(*inputs, layout) - attend(*changed, layout))[:first].abs().max())


# The checks


def check_isolation(build, ids, seed: int = 0, tolerance: float = ROUNDING) -> None:
    """Packed equals alone: the context, the gradients of the inputs and those of the parameters."""
    attention, layout = make(build), layout_of(ids)
    inputs, weights = heads_input(layout, seed), heads_input(layout, seed + 1)[0]
    packed = run(attention, layout, inputs, weights)
    assert_equal(packed, run_one_by_one(attention, layout, inputs, weights), tolerance)


def check_broken_mate(
    build, ids=None, values=(1e4, -1e4, float("nan")), tolerance: float = 0.0, dtype: torch.dtype = torch.float64
) -> None:
    """Another mate, a huge or a NaN one changes no bit of the others' context, nor of their gradients.

    tolerance: ROUNDING for a head whose products take their shape from values.
    """
    attention = make(build).to(dtype)
    layout = layout_of(ids or [[1] * 3 + [2] * 3 + [3], [1] * 3 + [0] * 4, [0] * 7])
    inputs, others, (weights, *_) = ([x.to(dtype) for x in heads_input(layout, seed)] for seed in (0, 2, 1))
    mate = layout.sequence_of_token == 1
    weights = torch.where(mate[:, None, None], 0, weights)
    before = of_tokens(run(attention, layout, inputs, weights), ~mate)
    for value in (None, *values):
        mates = others if value is None else [torch.full_like(x, value) for x in inputs]
        changed = [torch.where(mate[:, None, None], other, x) for other, x in zip(mates, inputs, strict=True)]
        after = of_tokens(run(attention, layout, changed, weights), ~mate)
        try:
            assert_equal(after, before, tolerance)
        except AssertionError as error:
            raise AssertionError(f"with {'another mate' if value is None else f'a mate of {value}'}: {error}") from None


def check_place(build, tolerance: float = ROUNDING) -> None:
    """The other packs of the batch and the place in the row change at most rounding of context and gradients.

    tolerance: 0 for a head that computes each sequence by itself: the same products of the same shapes.
    """
    attention = make(build)
    moves = [
        ([[1] * 20 + [2] * 9 + [0] * 35, [1] * 7 + [2] * 40 + [3] * 17, [0] * 5 + [1] * 59], slice(29, None)),
        ([[0] * 2 + [1] * 3 + [2] * 33 + [0] * 26], slice(3, None)),
    ]
    alone = [[[1] * 7 + [2] * 40 + [3] * 17, [0] * 5 + [1] * 59], [[1] * 33]]
    for (ids, kept), there in zip(moves, alone, strict=True):
        layout = layout_of(ids)
        inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
        before = run(attention, layout, inputs, weights)
        after = run(attention, layout_of(there), [x[kept] for x in inputs], weights[kept])
        assert_equal(of_tokens(after, slice(None)), of_tokens(before, kept), tolerance)


def check_empty_batch(build) -> None:
    """A batch without tokens has a context of none, and a gradient of 0 for every parameter."""
    attention, layout = make(build), layout_of([[0, 0, 0]])
    results = run(attention, layout, heads_input(layout), heads_input(layout)[0])
    assert results["context"].shape == (0, HEADS, WIDTH)
    assert all((value == 0).all() for name, value in results.items() if name.startswith("parameter"))


def check_dtypes(build, tolerances=((torch.float32, 1e-4), (torch.bfloat16, 0.15))) -> None:
    """float32 and bfloat16 run, forward and backward, and stay near float64."""
    layout = layout_of(LAYOUTS["long and short"])
    inputs, weights = [x / 3 for x in heads_input(layout)], heads_input(layout, 1)[0] / 3
    exact = run(make(build), layout, inputs, weights)
    for dtype, tolerance in tolerances:
        rounded = run(make(build).to(dtype), layout, [x.to(dtype) for x in inputs], weights.to(dtype))
        assert all(value.dtype == dtype for value in rounded.values())
        assert_equal({name: value.double() for name, value in rounded.items()}, exact, tolerance)


def check_state(build) -> None:
    """Saved and loaded into an emptied head, it computes the same; so it does when built on meta and reset."""
    attention, layout = make(build), layout_of(LAYOUTS["long and short"])
    inputs = heads_input(layout)
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    file.seek(0)
    loaded = make(build)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data.zero_()
    loaded.load_state_dict(torch.load(file))
    assert (loaded(*inputs, layout) == attention(*inputs, layout)).all()
    assert set(dict(attention.named_buffers())) <= set(attention.state_dict()), "a buffer is not persistent"
    if not attention.state_dict():
        return
    with torch.device("meta"):
        empty: Any = make(build)
    empty = empty.to_empty(device="cpu").float()  # as the other was drawn: in float32, before it was widened
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.zero_()
    torch.manual_seed(0)
    empty.reset_parameters()
    assert empty.state_dict().keys() == attention.state_dict().keys()
    for name, value in attention.state_dict().items():
        torch.testing.assert_close(empty.state_dict()[name].float(), value.float(), msg=f"{name} differs when reset")
    assert all(p.requires_grad for p in empty.parameters())


def check_inference_first(build) -> None:
    """A layout that was first used under inference mode, with ids of either kind, serves training like any other."""
    attention, ids = make(build), torch.tensor(LAYOUTS["long and short"])
    inputs, weights = heads_input(layout_of(ids)), heads_input(layout_of(ids), 1)[0]
    expected = run(attention, layout_of(ids), inputs, weights)
    with torch.inference_mode():
        ids_of_inference = ids.clone()
    for seen_ids in (ids, ids_of_inference):
        layout = PackLayout(seen_ids)
        with torch.inference_mode():
            attention(*inputs, layout)
        found = run(attention, layout, inputs, weights)
        assert all((found[name] == expected[name]).all() for name in expected)


def check_mixed_types(build) -> None:
    """Inputs of several types are computed in the widest, under autocast in its own; the context has value's type."""
    layout = layout_of(LAYOUTS["long and short"])
    inputs, weights = [x / 3 for x in heads_input(layout)], heads_input(layout, 1)[0]
    needs_hidden = getattr(make(build), "needs_hidden", False)
    inputs += [hidden_of(*inputs)] if needs_hidden else []
    f64, f32, bf16 = torch.float64, torch.float32, torch.bfloat16
    cases = [
        ((f32, f32, bf16), f32, False),
        ((bf16, f32, f32), f32, False),
        ((f64, f32, bf16), f64, False),
        ((f32, f32, bf16), bf16, True),
        ((f32, f32, f32), bf16, True),
        ((f32, f64, bf16), f64, True),
    ]
    for given, common, autocast in cases:
        types = given + given[:needs_hidden]  # the layer's input has that of queries
        attention = make(build).to(f64 if f64 in types else f32)
        mixed = [x.to(bf16).to(dtype) for x, dtype in zip(inputs, types, strict=True)]
        with torch.autocast("cpu", bf16, enabled=autocast):
            found = run(attention, layout, mixed, weights.to(types[2]))
            expected = run(attention, layout, [x.to(common) for x in mixed], weights.to(types[2]).to(common))
        result_types = {"context": types[2], **{f"gradient {i}": dtype for i, dtype in enumerate(types)}}
        for name, value in found.items():
            assert value.dtype == result_types.get(name, value.dtype), f"{name} is {value.dtype} for {types}"
            assert (value == expected[name].to(value.dtype)).all(), f"{name} for {types}, autocast {autocast}"


def check_default_type(build) -> None:
    """torch.set_default_dtype changes neither what is drawn into buffers nor what is computed."""
    layout = layout_of(LAYOUTS["long and short"])
    inputs = [x.float() / 3 for x in heads_input(layout)]
    weights = heads_input(layout, 1)[0].float()
    attention = make(build).float()
    expected = run(attention, layout, inputs, weights)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            built = make(build).float()
            for name, drawn in built.named_buffers():
                assert (drawn == dict(attention.named_buffers())[name]).all(), f"{name}, built under {dtype}"
            built.load_state_dict(attention.state_dict())
            found = run(built, layout_of(LAYOUTS["long and short"]), inputs, weights)
        finally:
            torch.set_default_dtype(torch.float32)
        for name, value in found.items():
            assert value.dtype == torch.float32 and (value == expected[name]).all(), f"{name} under {dtype}"


def check_buffers_stay_wide(build) -> None:
    """A model in 16 bits keeps what its heads drew or averaged in float32, to the bit."""
    attention = make(build).float()
    drawn = {name: x.clone() for name, x in attention.named_buffers() if x.is_floating_point()}
    for narrow in (nn.Module.half, nn.Module.bfloat16, lambda head: head.to(torch.bfloat16)):
        narrow(attention)
        for name, x in drawn.items():
            kept = dict(attention.named_buffers())[name]
            assert kept.dtype == torch.float32 and (kept == x).all(), name
        assert all(p.itemsize == 2 for p in attention.parameters())


def check_constant_value(build, tolerance: float = 1e-12) -> None:
    """A context is a mean of values: of one value it is that value. Not so for every head; so not in check_contract."""
    for ids in LAYOUTS.values():
        layout = layout_of(ids)
        query, key, value = heads_input(layout)
        with torch.no_grad():
            context = make(build)(query, key, torch.full_like(value, 2.5), layout)
        assert float((context - 2.5).abs().max()) <= tolerance * 2.5


def check_float16(build, scale: float = 30.0) -> None:
    """In float16 at inputs x 30 everything is finite that float16 can hold: context and gradients."""
    layout, width = layout_of(LAYOUTS["long and short"]), 64
    inputs = [(x / 3 * scale).half() for x in heads_input(layout, width=width)]
    weights = heads_input(layout, 1, width=width)[0].half() / 3
    results = []
    for dtype in (torch.float64, torch.float16):
        attention = make(build, head_width=width).to(dtype)
        results.append(run(attention, layout, [x.to(dtype) for x in inputs], weights.to(dtype)))
    exact, found = results
    for name, value in found.items():
        holds = exact[name].abs().max() < torch.finfo(torch.float16).max / 4
        assert value.isfinite().all() or not holds, f"{name}: float64 has at most {float(exact[name].abs().max())}"


def check_dropout(build, dropout: float = 0.3) -> None:
    """What is dropped in a sequence does not follow from its mates' values; and it is something."""
    attention, layout = make(build), layout_of([[1] * 9 + [2] * 30 + [3] * 5, [1] * 20 + [0] * 24])
    if not getattr(attention, "supports_dropout", False):
        return
    inputs, others, weights = heads_input(layout), heads_input(layout, 2), heads_input(layout, 1)[0]
    mate = layout.sequence_of_token == 1
    changed = [torch.where(mate[:, None, None], y, x) for x, y in zip(inputs, others, strict=True)]
    weights = torch.where(mate[:, None, None], 0, weights)
    kept = run(attention, layout, inputs, weights)["context"]
    attend, attention.forward = attention.forward, partial(attention.forward, dropout=dropout)
    results = []
    for each in (inputs, changed):
        torch.manual_seed(7)
        results.append(of_tokens(run(attention, layout, each, weights), ~mate))
    attention.forward = attend
    before, after = results
    assert_equal(after, before, tolerance=0)
    assert (before["context"] != kept[~mate]).any()


def check_one_gradient(build) -> None:
    """An input has the same gradient where no other input and no parameter asks for one, as in a half-frozen model."""
    attention, layout = make(build), layout_of(LAYOUTS["long and short"])
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    expected = run(attention, layout, inputs, weights)
    attention.requires_grad_(False)
    for i in range(3):
        alone = [x.clone().requires_grad_(j == i) for j, x in enumerate(inputs)]
        context = attention(*alone, layout)
        gradient = None
        if context.requires_grad:  # a head need not read all inputs
            (gradient,) = torch.autograd.grad((context * weights).sum(), alone[i], allow_unused=True)
        gradient = torch.zeros_like(alone[i]) if gradient is None else gradient
        assert_equal({f"gradient {i}": gradient}, {f"gradient {i}": expected[f"gradient {i}"]})
    attention.requires_grad_(True)


def check_other_sizes(build, heads: int = 3, width: int = 5) -> None:
    """Packed equals alone for other numbers of heads, and widths that no kernel likes."""
    attention, layout = make(build, num_heads=heads, head_width=width), layout_of(LAYOUTS["long and short"])
    inputs, weights = heads_input(layout, 0, heads, width), heads_input(layout, 1, heads, width)[0]
    packed = run(attention, layout, inputs, weights)
    assert packed["context"].shape == weights.shape
    assert_equal(packed, run_one_by_one(attention, layout, inputs, weights))


def check_contract(build, survives_nan: bool = True, bfloat16: float = 0.15, mate_tolerance: float = 0.0) -> None:
    """All checks; isolation over every layout of LAYOUTS. bfloat16: how far it may be off in that type."""
    for ids in LAYOUTS.values():
        check_isolation(build, ids)
    values = (1e4, -1e4, float("nan"), float("inf")) if survives_nan else (1e4, -1e4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_broken_mate(build, None, values, mate_tolerance, dtype)
    check_broken_mate(build, LAYOUTS["long and short"], values, mate_tolerance)
    check_place(build)
    check_empty_batch(build)
    check_dtypes(build, ((torch.float32, 1e-4), (torch.bfloat16, bfloat16)))
    check_state(build)
    check_inference_first(build)
    check_mixed_types(build)
    check_default_type(build)
    check_buffers_stay_wide(build)
    check_dropout(build)
    check_one_gradient(build)
    check_other_sizes(build)
