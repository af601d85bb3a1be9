"""What exact and pattern heads execute on a GPU, on tensors that say they are there: as on a CPU, and no waits.

float64     masks of packs, chunks, tables of packs: the executions without flex and varlen
float32     flex, by a stand-in that reads its blocks as the kernel does
bfloat16    varlen, with windows and other keys, by a stand-in that asserts what the kernel wants
"""

from functools import partial

import pytest
import torch
from attention_contract import assert_equal, heads_input, make, run
from pretend_cuda import COPY_TO_HOST, PretendCuda
from small_heads import HERE, SMALL_OPTIONS

from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.head import prepare_heads
from collate import to_device
from collate.layout import PackLayout, SlotLayout

LONG = {"max_sequence_length": 160}
BUILDS = {
    "sdpa": ATTENTION["sdpa"],
    "flex": ATTENTION["flex"],
    "persistent": partial(ATTENTION["persistent"], vectors=3),
    "local": partial(ATTENTION["local"], window=5),
    "local blocks": partial(ATTENTION["local"], block=7),
    "strided split": partial(ATTENTION["strided"], stride=5),
    "strided merged": partial(ATTENTION["strided"], stride=4, heads="merged"),
    "fixed split": partial(ATTENTION["fixed"], stride=7, summary=2),
    "fixed merged": partial(ATTENTION["fixed"], stride=5, heads="merged", summary=3),
    "axial composed": partial(ATTENTION["axial"], columns=6),
    "axial mean": partial(ATTENTION["axial"], columns=5, combine="mean"),
    "longformer": partial(ATTENTION["longformer"], window=4, global_tokens=3),
    "longformer, own": partial(ATTENTION["longformer"], window=4, global_tokens=3, projections="own"),
    "etc": partial(ATTENTION["etc"], window=3, global_tokens=5),
    "etc_stream": partial(ATTENTION["etc_stream"], window=3, global_tokens=5, max_distance=4),
    "bigbird": partial(ATTENTION["bigbird"], block=4, window=1, random_blocks=2, last_global_tokens=2),
    "adaptive_span": partial(ATTENTION["adaptive_span"], ramp=5, initial=0.13),
    "adaptive_span chunks": lambda **sizes: ATTENTION["adaptive_span"](**sizes | LONG, span=9, ramp=4, initial=0.6),
    "entmax": ATTENTION["entmax"],
    "entmax top_k": partial(ATTENTION["entmax"], top_k=7),
}
AT_THE_END = [[1] * 90 + [2] * 5 + [3] * 61 + [0] * 4, [1] * 3 + [2] * 125 + [3] * 2 + [0] * 30, [0] * 160]
ANYWHERE = [[0] * 4 + [1] * 20 + [0] * 9 + [2] * 50, [1] + [0] * 60 + [2] * 22]
BATCHES = {"slots": (AT_THE_END, True), "tokens": (AT_THE_END, False), "padding anywhere": (ANYWHERE, False)}
WIDTH = 16


def both(build, ids, by_slots, dtype):
    """(found, expected, waits, operations): on the device, and on the CPU; of real tokens."""
    batch = {"sequence_ids": torch.tensor(ids, dtype=torch.int32)}
    exact = PackLayout(batch["sequence_ids"])
    inputs, weights = heads_input(exact, width=WIDTH), heads_input(exact, 1, width=WIDTH)[0]
    twin = make(ATTENTION["sdpa"] if build is ATTENTION["flex"] else build, head_width=WIDTH)
    expected = run(twin, exact, [x / 3 for x in inputs], weights)
    with PretendCuda() as gpu:
        sent = to_device(batch, "cuda", by_slots=by_slots)
        layout = PackLayout.of(sent["sequence_ids"])
        assert isinstance(layout, SlotLayout) == by_slots
        attention = make(build, head_width=WIDTH).to("cuda", dtype)
        there = [layout.unpad(exact.pad(x / 3).to("cuda", dtype)) for x in inputs]
        weights = layout.unpad(exact.pad(weights).to("cuda", dtype))
        gpu.waits.clear()
        prepare_heads([attention], layout)
        found = run(attention, layout, there, weights)
        waits = list(gpu.waits)
        parameters = {name: x.cpu().double() for name, x in found.items() if name.startswith("parameter")}
        rows = {name: layout.pad(x).cpu().double() for name, x in found.items() if name not in parameters}
    assert not gpu.mixed
    return {name: exact.unpad(x) for name, x in rows.items()} | parameters, expected, waits, gpu.operations


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", BUILDS)
def test_a_device_computes_what_a_cpu_does(name, batch):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        if name != "flex" or dtype == torch.float32:
            found, expected, waits, _ = both(BUILDS[name], *BATCHES[batch], dtype)
            assert_equal(found, expected, tolerance)
            assert waits == []


@pytest.mark.parametrize("name", ["sdpa", "varlen", "local"])
def test_in_16_bits_they_take_varlen(name):
    build = BUILDS.get(name, ATTENTION[name])
    ids = torch.tensor(AT_THE_END, dtype=torch.int32)
    exact, by_slots = PackLayout(ids), SlotLayout(ids, sequence_slots=4)
    keys = SlotLayout(torch.tensor([[1] * 30 + [2] * 12, [1] * 42, [0] * 42], dtype=torch.int32), sequence_slots=4)
    inputs, weights = heads_input(exact, width=WIDTH), heads_input(exact, 1, width=WIDTH)[0]
    others = heads_input(keys, 2, width=WIDTH)[:2]
    twin = make(ATTENTION["sdpa"] if name == "varlen" else build, head_width=WIDTH)
    expected = twin(*(x / 3 for x in inputs), exact)
    padded = by_slots.unpad(exact.pad(inputs[0])) / 3
    expected_of_others = twin(padded, *(x / 3 for x in others), by_slots, key_layout=keys)
    with PretendCuda() as gpu:
        layout, key_layout = (
            SlotLayout(each.sequence_ids_BL.to("cuda"), each, each.sequence_slots) for each in (by_slots, keys)
        )
        there = [layout.unpad((exact.pad(x) / 3).to("cuda", torch.bfloat16)).requires_grad_() for x in inputs]
        attention = make(build, head_width=WIDTH).to("cuda", torch.bfloat16)
        gpu.waits.clear()
        context = attention(*there, layout)
        (context * layout.unpad(exact.pad(weights).to("cuda", torch.bfloat16))).sum().backward()
        other_keys = [(x / 3).to("cuda", torch.bfloat16) for x in others]
        of_others = attention(there[0].detach(), *other_keys, layout, key_layout=key_layout)
        assert gpu.operations["varlen"] == 2 and gpu.operations["varlen backward"] == 1
        found, found_of_others = (layout.pad(x).cpu().double() for x in (context.detach(), of_others))
    for one, other in (
        (exact.unpad(found), expected),
        (exact.unpad(found_of_others), exact.unpad(by_slots.pad(expected_of_others))),
    ):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=0.05)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["persistent", "local blocks"])
def test_in_16_bits_they_give_varlen_sequences_of_their_own(name, batch):
    """Keys that begin with learned ones; blocks instead of sequences. The CPU computes in float64."""
    found, expected, waits, operations = both(BUILDS[name], *BATCHES[batch], torch.bfloat16)
    assert operations["varlen"] == operations["varlen backward"] == 1 and waits == []
    assert_equal(found, expected, 0.05)


def test_dropout_takes_other_executions_there():
    """With dropout flex and varlen cannot run; each context stays near the one without."""
    layout_ids = torch.tensor(AT_THE_END, dtype=torch.int32)
    for name in BUILDS:
        if name == "flex":
            continue
        with PretendCuda() as gpu:
            layout = PackLayout.of(to_device({"sequence_ids": layout_ids}, "cuda", by_slots=True)["sequence_ids"])
            inputs = [
                x.to("cuda").float() / 3 for x in heads_input(SlotLayout(layout_ids, sequence_slots=8), width=WIDTH)
            ]
            attention = make(BUILDS[name], head_width=WIDTH).to("cuda", torch.float32)
            gpu.waits.clear()
            context = attention(*inputs, layout, dropout=0.1)
            assert not gpu.waits and not gpu.operations["flex"] and bool(context.isfinite().all()), name


@pytest.mark.parametrize("name", HERE)
def test_a_batch_that_was_made_there_waits_once(name):
    """Ids that the host never had, such as those of a batch that accelerate dealt out, are copied to it."""
    build = partial(ATTENTION[name], **SMALL_OPTIONS.get(name, {}))
    ids = torch.tensor(ANYWHERE, dtype=torch.int32)
    exact = PackLayout(ids)
    inputs, weights = heads_input(exact, width=WIDTH), heads_input(exact, 1, width=WIDTH)[0]
    expected = run(make(build, head_width=WIDTH, max_sequence_length=96), exact, inputs, weights)
    with PretendCuda() as gpu:
        there = ids.to("cuda")
        attention = make(build, head_width=WIDTH, max_sequence_length=96).to("cuda")
        there_inputs, there_weights = [x.to("cuda") for x in inputs], weights.to("cuda")
        gpu.waits.clear()
        found = run(attention, PackLayout.of(there), there_inputs, there_weights)
        waits = [wait.kind for wait in gpu.waits]
        assert not gpu.mixed
        found = {name: x.cpu() for name, x in found.items()}
    assert waits == [COPY_TO_HOST]
    assert_equal(found, expected, 1e-12)
