"""torch.compile of the model: one graph of the encoder, one of the losses, and the values and gradients of eager."""

import copy

import pytest
import torch
from count_waits import batch_of, packs
from kernels_in_graph import flex_in_graph, varlen_in_graph
from torch._dynamo.utils import counters
from transformers import BertConfig

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.heads import longformer
from bert_pretrain.attention.parts import global_tokens
from bert_pretrain.attention.parts.pieces import in_chunks
from collate import to_device

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
ONE_GRAPH = ("sdpa", "auto", "lsh")
"""Heads whose graph holds for all batches."""
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # while torch traces


def make_model(head, **options):
    torch.manual_seed(0)
    none = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    ours = {"packed_attention": head, "packed_attention_options": options}
    config = BertConfig(vocab_size=100, max_position_embeddings=256, **SIZES, **ours, **none)
    model = PackedBertForPreTraining(config).double().train()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # large enough for attention to matter
    return model


def batches(number, by_slots):
    """Other sequences, other numbers of them, and other numbers of tokens and of predicted tokens."""
    generator = torch.Generator().manual_seed(1)
    for i in range(number):
        ids = packs(3 + 2 * i)[torch.randperm(18, generator=generator)[:4]]
        ids[:, 250 - 7 * i :] = 0
        batch = batch_of(ids)
        for name, fill in (("cls_positions", -1), ("next_sentence_label", -100)):  # as many slots in each batch
            batch[name] = torch.nn.functional.pad(batch[name], (0, 32 - batch[name].shape[1]), value=fill)
        yield to_device(batch, "cpu", by_slots=by_slots or None)


def assert_equal_and_count(head, backend, by_slots=False, number=8, twin=None, **options):
    """-> the graphs that were compiled. twin: the model to compare with; None: the same."""
    torch.compiler.reset()
    counters.clear()
    compiled = make_model(head, **options)
    eager = copy.deepcopy(compiled) if twin is None else twin
    compiled.compile(backend=backend)
    for own in zip(
        batches(number, by_slots), batches(number, by_slots), strict=True
    ):  # each model's layouts are its own
        losses = []
        for model, batch in zip((eager, compiled), own, strict=True):
            model.zero_grad()
            output = model(**batch)
            output.loss.backward()
            losses.append(output.loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
        scale = max(float(parameter.grad.abs().max()) for parameter in eager.parameters())
        for (name, mine), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
            assert float((mine.grad - theirs.grad).abs().max()) <= 1e-12 * scale, name
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("by_slots", [False, True])
@pytest.mark.parametrize("head", ONE_GRAPH)
def test_few_graphs_hold_for_all_batches(head, by_slots):
    assert assert_equal_and_count(head, "aot_eager", by_slots) == 2


def test_the_losses_are_one_graph_however_many_tokens_are_predicted(monkeypatch):
    """Without a compiler they widen some rows at a time: here 8, so each batch has another number of parts."""
    monkeypatch.setattr("collate.losses.WIDENED", (8 * 100 * 4, 8 * 100 * 4))
    assert assert_equal_and_count("sdpa", "aot_eager") == 2


@pytest.mark.long
def test_inductor_computes_the_same():
    assert assert_equal_and_count("sdpa", "inductor") == 2


@pytest.mark.long
@pytest.mark.parametrize("head", [name for name in ATTENTION if name not in ("varlen", "flex", *ONE_GRAPH)])
def test_other_heads_have_one_graph_of_slots_or_none(head, caplog):
    with caplog.at_level("INFO"):
        assert assert_equal_and_count(head, "aot_eager") == 1 and "the encoder runs uncompiled" in caplog.text
    assert assert_equal_and_count(head, "aot_eager", by_slots=True) <= 2


@pytest.mark.parametrize("by_slots", [False, True])
@pytest.mark.parametrize("head", ["varlen", "auto"])
def test_the_kernel_of_varlen_is_in_the_graph(head, by_slots):
    """Full attention, so that the model without it computes the same."""
    pytest.importorskip("torch.nn.attention.varlen")
    with varlen_in_graph():
        assert assert_equal_and_count(head, "aot_eager", by_slots, twin=make_model("sdpa")) == 2


def test_the_kernel_of_varlen_is_in_the_graph_of_a_window():
    pytest.importorskip("torch.nn.attention.varlen")
    with varlen_in_graph():
        twin = make_model("local", window=9, execution="chunks")
        assert assert_equal_and_count("local", "aot_eager", True, twin=twin, window=9) == 2


def test_flex_is_in_the_graph():
    with flex_in_graph():
        assert assert_equal_and_count("flex", "aot_eager", True, twin=make_model("sdpa")) == 2


PATTERNS = ("local", "strided", "fixed", "longformer", "etc", "bigbird")


@pytest.mark.long
@pytest.mark.parametrize("head", PATTERNS)
def test_patterns_by_flex_are_in_the_graph(head):
    """Their twin takes chunks, as a CPU can."""
    with flex_in_graph():
        twin = make_model(head, execution="chunks")
        assert assert_equal_and_count(head, "aot_eager", True, twin=twin, execution="flex") == 2


@pytest.mark.long
def test_own_global_projections_are_in_the_graph(monkeypatch):
    """Global tokens attend in chunks, as on a GPU."""
    monkeypatch.setattr(global_tokens, "attend_in_groups", global_tokens.attend_by_chunks)
    monkeypatch.setattr(longformer, "prepare_global", prepare_chunks)
    with flex_in_graph():
        twin = make_model("longformer", execution="chunks", projections="own")
        own = {"execution": "flex", "projections": "own"}
        assert assert_equal_and_count("longformer", "aot_eager", True, twin=twin, **own) == 2


def prepare_chunks(layout, first, last=0):
    global_tokens.written(layout, first, last)
    in_chunks(layout, global_tokens.CHUNK)


@pytest.mark.parametrize(
    ("given", "draws_as_eager"),
    [({}, True), ({"mode": "default", "options": None}, True), ({"mode": "max-autotune"}, False)],
)
def test_dropout_on_a_cpu_draws_as_eager_unless_a_mode_is_named(monkeypatch, given, draws_as_eager):
    model, seen = make_model("sdpa"), []
    monkeypatch.setattr(torch, "compile", lambda run, **options: seen.append(options))
    monkeypatch.setattr(model.bert.encoder, "compile", lambda **options: seen.append(options))
    model.compile(**given)
    assert [options.get("options") == {"fallback_random": True} for options in seen] == [draws_as_eager] * 2
    assert all(options["mode"] is None for options in seen if draws_as_eager)


def test_a_copy_is_not_compiled():
    model = make_model("sdpa")
    model.compile(backend="eager")
    assert "_sums" in model.__dict__ and "_sums" not in copy.deepcopy(model).__dict__
    assert copy.deepcopy(model).bert.encoder._compiled_call_impl is None
