"""`auto`: which exact attention it chooses for a device; a run names it; exact attention one by one and in groups."""

import json
import logging

import pytest
import torch
from attention_contract import check_contract, heads_input, layout_of
from flag_runs import train
from pretraining_models import make_config

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import choice
from bert_pretrain.attention.choice import AutoAttention, choose_attention
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from collate.isolation.exact_attention import attend_grouped
from collate.isolation.pieces import Pieces
from collate.isolation.varlen import has_varlen_kernel

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU: a function that sets its compute capability and what is installed."""

    def pretend(capability=(9, 0), varlen=True, triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr("collate.isolation.varlen.has_varlen_kernel", lambda: varlen)
        monkeypatch.setattr(choice, "find_spec", lambda name: triton if name == "triton" else None)

    return pretend


@pytest.mark.parametrize(
    ("machine", "arguments", "name", "reason"),
    [
        ({}, (CUDA, BF16, 64), "varlen", "compute capability 9.0"),
        ({}, (CUDA, torch.float16, 64), "varlen", "float16"),
        ({}, (CUDA, FP32, 64), "flex", "varlen wants bfloat16 or float16, not torch.float32"),
        ({"capability": (7, 5)}, (CUDA, BF16, 64), "flex", "wants an Ampere GPU or newer"),
        ({"varlen": False}, (CUDA, BF16, 64), "flex", "missing in this torch"),
        ({}, (CUDA, BF16, 20), "flex", "a multiple of 8, at most 256, not 20"),
        ({}, (CUDA, BF16, 12), "sdpa", "heads of 16 or wider"),
        ({"triton": False}, (CUDA, FP32, 64), "sdpa", "wants Triton"),
        ({}, (CUDA, BF16, 64, 0.1), "sdpa", "attention_probs_dropout_prob=0.1"),
        ({}, (CPU, FP32, 64), "sdpa", "one sequence at a time"),
        ({}, (torch.device("mps"), FP32, 64), "sdpa", "mps has neither"),
    ],
)
def test_what_is_chosen_where(gpu, machine, arguments, name, reason):
    gpu(**machine)
    chosen, why = choose_attention(*arguments)
    assert chosen == name and reason in why


def test_a_cpu_only_torch_has_no_varlen_kernel():
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for GPUs")
    assert not has_varlen_kernel()


def test_a_run_says_what_auto_chose_and_its_checkpoint_keeps_auto(folders, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="bert_pretrain.train.new_model"):
        assert train(folders, tmp_path / "bert") == 0
    assert "attention: sdpa, chosen by auto: on CPUs one sequence at a time" in caplog.text
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    assert config["packed_attention"] == "auto" and config["attention_probs_dropout_prob"] == 0.0
    record = json.loads((tmp_path / "bert" / "pretrain.json").read_text())
    assert record["attention"] == "auto"


def test_attention_dropout_that_is_asked_for_stays(folders, tmp_path):
    one_layer_each = ["--attention", "auto,local", "--num_hidden_layers", "2", "--attention_probs_dropout_prob", "0.2"]
    assert train(folders, tmp_path / "bert", *one_layer_each) == 0
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    assert config["packed_attention"] == ["auto", "local"] and config["attention_probs_dropout_prob"] == 0.2


def test_auto_keeps_the_contract():
    check_contract(AutoAttention)
    assert AutoAttention(2, 8, 64).is_full and AutoAttention(2, 8, 64).supports_dropout


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["sdpa", "varlen", "flex"])
def test_auto_is_the_head_that_it_chooses(monkeypatch, name, dropout):
    """Each call asks for the head by its own inputs; the head gets them all."""
    asked, got = [], []
    chosen = lambda *facts: asked.append(facts) or (name, "")  # noqa: E731
    monkeypatch.setattr(choice, "choose_attention", chosen)
    head, layout = AutoAttention(2, 8, 64), layout_of([[1, 1, 2]])
    head.full[name].attend = lambda q, k, v, *rest: got.append((q, k, v, *rest)) or v
    inputs = [x.bfloat16() for x in heads_input(layout)]
    head(*inputs, layout, dropout=dropout)
    assert asked == [(CPU, BF16, 8, dropout)]
    assert all(a is b for a, b in zip(got[0], [*inputs, layout, dropout], strict=True))
    assert not head.state_dict() and not list(head.children())


@pytest.mark.parametrize(("autocast", "name"), [(True, "varlen"), (False, "flex")])
def test_auto_prepares_what_it_will_choose(monkeypatch, autocast, name):
    """By autocast's type, before any query is there."""
    monkeypatch.setattr(
        choice, "choose_attention", lambda device, dtype, *_: ("varlen" if dtype == BF16 else "flex", "")
    )
    head, layout, prepared = AutoAttention(2, 8, 64), layout_of([[1, 1, 2]]), []
    for each in head.full:
        monkeypatch.setattr(head.full[each], "prepare", lambda layout, each=each: prepared.append(each))
    with torch.autocast("cpu", BF16, enabled=autocast):
        head.prepare(layout)
    assert prepared == [name]


@pytest.mark.parametrize("chosen", ["sdpa", "flex"])
def test_auto_takes_other_keys(monkeypatch, chosen):
    """flex does not, sdpa does it in its place."""
    monkeypatch.setattr(choice, "choose_attention", lambda *facts: (chosen, ""))
    layout, key_layout = layout_of([[1, 1, 2, 0]]), layout_of([[1, 2, 2, 2]])
    query, (_, key, value) = heads_input(layout)[0], heads_input(key_layout)
    found = AutoAttention(2, 8, 64)(query, key, value, layout, key_layout=key_layout)
    assert torch.equal(found, SdpaAttention(2, 8, 64)(query, key, value, layout, key_layout=key_layout))


def test_auto_breaks_no_graph():
    """The choice is a constant of the graph, made again for other types."""
    torch.compiler.reset()
    head, layout = AutoAttention(2, 8, 64), layout_of([[1, 1, 2]])
    head.full["sdpa"].attend = lambda q, k, v, layout, dropout: q + k * v
    assert layout.num_sequences == 2  # a compiler cannot make views of a layout
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (x.to(dtype) for x in heads_input(layout))
        assert torch.equal(compiled(query, key, value, layout), query + key * value)


@pytest.mark.parametrize("attention", ["auto", ["auto", "local"]])
def test_a_checkpoint_of_auto_loads_anywhere(tmp_path, gpu, attention):
    """Its config names no kernel, though the machine that wrote it would take one of a GPU."""
    gpu()
    torch.manual_seed(0)
    config = make_config(packed_attention=attention, attention_probs_dropout_prob=0.0)
    PackedBertForPreTraining(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["packed_attention"] == attention
    ids = torch.tensor([[1] * 20 + [2] * 9 + [0] * 3])
    batch = {"input_ids": torch.randint(5, 60, ids.shape), "sequence_ids": ids}
    logits = []
    for as_saved in ({}, {"packed_attention": ["sdpa", "local"] if isinstance(attention, list) else "sdpa"}):
        model = PackedBertForPreTraining.from_pretrained(tmp_path, **as_saved).eval()
        logits.append(model(**batch).prediction_logits)
    assert torch.equal(*logits)


def test_a_checkpoint_that_names_a_kernel_of_gpus_says_how_to_load_it(tmp_path):
    """Earlier versions wrote what auto had chosen."""
    config = make_config(packed_attention="varlen", attention_probs_dropout_prob=0.0)
    PackedBertForPreTraining(config).save_pretrained(tmp_path)
    ids = torch.tensor([[1] * 20 + [2] * 9 + [0] * 3])
    batch = {"input_ids": torch.randint(5, 60, ids.shape), "sequence_ids": ids}
    with pytest.raises(ValueError, match=r"from_pretrained\(…, packed_attention='auto'\), or --attention auto"):
        PackedBertForPreTraining.from_pretrained(tmp_path)(**batch)
    model = PackedBertForPreTraining.from_pretrained(tmp_path, packed_attention="auto")
    assert model(**batch).prediction_logits.isfinite().all() and model.config.packed_attention == "auto"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_by_one_computes_what_groups_compute(dtype):
    layout = layout_of([[1] * 37 + [2] + [3] * 16 + [0] * 10, [0] * 3 + [1] * 61, [0] * 64])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    results = []
    for attend in (SdpaAttention(2, 8, 64), attend_grouped):
        inputs = [(x / 3).to(dtype).requires_grad_() for x in heads_input(layout)]
        context = attend(*inputs, layout)
        (context * torch.linspace(-1, 1, context.numel()).view_as(context).to(dtype)).sum().backward()
        results.append([context.detach(), *(x.grad for x in inputs)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_more_threads_than_heads_take_groups(monkeypatch):
    layout, calls = layout_of([[1, 1, 2]]), []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    attend = "collate.isolation.exact_attention.attend_grouped"
    monkeypatch.setattr(attend, lambda *inputs: calls.append(inputs) or inputs[2])
    SdpaAttention(2, 8, 64)(*heads_input(layout), layout)
    assert [len(inputs) for inputs in calls] == [5]


def test_one_by_one_takes_gradients_as_they_come(monkeypatch):
    """No copy of the gradient: the copy that indexing makes took as long as attention over short sequences."""
    seen, split = [], Pieces.queries
    monkeypatch.setattr(Pieces, "queries", lambda self, x: seen.append(x.data_ptr()) or split(self, x))
    layout = layout_of([[1] * 5 + [2] * 3])
    inputs = [x.requires_grad_() for x in heads_input(layout)]
    grad = torch.ones(8, 2, 8, dtype=torch.float64)
    SdpaAttention(2, 8, 64)(*inputs, layout).backward(grad)
    assert {x.data_ptr() for x in (*inputs, grad)} <= set(seen)
