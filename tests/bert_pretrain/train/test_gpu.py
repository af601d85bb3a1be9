"""What the command chooses on a simulated GPU. What was said stays, and a run that resumes keeps its own."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import history, train
from transformers import BertConfig, TrainingArguments

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.options import named
from bert_pretrain.train import gpu
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.run_record import config_record
from collate.training.progress import RunningSums

GIB = 2**30


class OnGpu(TrainingArguments):
    """Arguments whose device is a GPU, though nothing is there."""

    device = property(lambda self: torch.device("cuda"))
    world_size = property(lambda self: 1)


@pytest.fixture
def card(monkeypatch):
    """A simulated GPU: a function that sets its compute capability and memory. It returns what TF32 was set to."""
    tf32 = []

    def pretend(capability=(9, 0), memory=80 * GIB):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        properties = SimpleNamespace(total_memory=memory, name="NVIDIA H100")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(gpu, "enable_tf32", tf32.append)
        return tf32

    return pretend


def on_gpu(tmp_path, **given):
    return OnGpu(str(tmp_path), use_cpu=True, report_to="none", **given)


def on_cpu(tmp_path, **given):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **given)


def bert(layers=12, width=768, vocabulary=30_522, attention="auto", **options):
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        packed_attention=attention,
        **{"attention_probs_dropout_prob": 0.0, "max_position_embeddings": 512} | options,
    )
    with torch.device("meta"):
        return PackedBertForPreTraining(config)


# -- precision ------------------------------------------------------------------------------------------------


def test_a_new_run_on_an_ampere_card_is_in_bf16_and_tf32(tmp_path, card, caplog):
    caplog.set_level(logging.INFO)
    set_to, training = card((8, 0)), on_gpu(tmp_path)
    assert gpu.choose_precision(training, set(), None) is True
    assert training.bf16 and training.mixed_precision == "bf16" and set_to == [True]
    assert "bf16: on, the GPU has it; --bf16 False turns it off" in caplog.text and "tf32: on" in caplog.text


@pytest.mark.parametrize(
    ("capability", "given", "said", "bf16", "tf32"),
    [
        ((7, 5), {}, (), False, []),
        ((9, 0), {"bf16": False}, ("bf16",), False, [True]),
        ((9, 0), {"fp16": True}, ("fp16",), False, [True]),
        ((9, 0), {"tf32": False}, ("tf32",), True, []),  # transformers has set it
    ],
)
def test_what_is_said_stays(tmp_path, card, capability, given, said, bf16, tf32):
    set_to, training = card(capability), on_gpu(tmp_path, **given)
    assert gpu.choose_precision(training, set(said), None) is bool(tf32)
    assert training.bf16 is bf16 and training.fp16 is given.get("fp16", False) and set_to == tf32


def test_what_accelerate_launch_says_stays(tmp_path, card, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    card()
    training = on_gpu(tmp_path)
    gpu.choose_precision(training, set(), None)
    assert not training.bf16 and training.mixed_precision == "fp16"


@pytest.mark.parametrize("make", [on_cpu, on_gpu])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_keeps_the_precision_that_it_began_with(tmp_path, card, make, bf16):
    """On a CPU, too, and on a GPU what began on a CPU. Earlier versions recorded no choice of TF32: there was none."""
    set_to = card()
    training = make(tmp_path)
    record = {"training": {"bf16": bf16}} | ({"chosen": {"tf32": True}} if bf16 else {})
    assert gpu.choose_precision(training, set(), record) is bf16
    assert training.bf16 is bf16 and training.mixed_precision == ("bf16" if bf16 else "no")
    assert set_to == ([True] if bf16 and make is on_gpu else [])


def test_on_cpus_everything_stays(tmp_path, card):
    set_to, training = card(), on_cpu(tmp_path)
    before, config = training.to_dict(), PretrainConfig("", "")
    assert gpu.choose_precision(training, set(), None) is False
    assert gpu.choose_passes(config, training, set(), None, bert(1, 64, 100), 512) == config
    gpu.choose_loading(config, training, set(), 512)
    assert training.to_dict() == before and training.mixed_precision == "no" and not set_to


# -- passes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "memory", "tokens"),
    [
        ({}, 80, 65_536),
        ({}, 24, 25_600),
        ({}, 16, 15_872),
        ({"layers": 24, "width": 1024}, 80, 37_376),
        ({"layers": 24, "width": 1024}, 2, 512),  # at least one pack: there is no smaller pass
        ({"attention": "local"}, 24, 10_752),
    ],
)
def test_the_default_follows_from_the_model_and_the_memory(shape, memory, tokens):
    assert gpu.default_tokens_per_pass(bert(**shape), memory * GIB, 512) == tokens


def test_checkpointing_and_16_bits_leave_room_for_more():
    def fitting(**how):
        return gpu.default_tokens_per_pass(bert(), 12 * GIB, 512, **how)

    assert fitting(is_half=False) < fitting() < fitting(is_checkpointed=True)
    assert fitting(mlm_probability=0.5) < fitting()


@pytest.mark.parametrize("is_half", [True, False])
def test_a_token_costs_what_the_formula_says(is_half):
    """Counted: the bytes that forward keeps for backward, parameters and their casts aside. CPUs keep what GPUs do."""
    layers, width, vocabulary, packs = 4, 128, 1000, 4
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "max_position_embeddings": 512, "attention_probs_dropout_prob": 0.0}
    shape |= {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    model = PackedBertForPreTraining(BertConfig(vocab_size=vocabulary, packed_attention="auto", **shape))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shapes = {tuple(s) for weight in model.parameters() for s in (weight.shape, weight.shape[::-1])}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and tuple(x.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes(), x  # held, or the address would be used again
        return x

    ids = torch.tensor([[1] * 200 + [2] * 200 + [3] * 112] * packs)
    tokens = torch.randint(5, vocabulary, ids.shape)
    labels = torch.where(torch.rand(ids.shape) < 0.15, tokens, -100)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=is_half),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        model(input_ids=tokens, sequence_ids=ids, labels=labels)
    counted = sum(size for size, _ in kept.values()) / ids.numel()
    expected = gpu.bytes_per_token(model, 0.15, is_half, is_checkpointed=False)
    assert counted < expected < 1.8 * counted


def test_a_new_run_on_a_gpu_sizes_its_passes_and_says_so(tmp_path, card, caplog):
    caplog.set_level(logging.INFO)
    card(memory=24 * GIB)
    training = on_gpu(tmp_path, bf16=True)
    config = gpu.choose_passes(PretrainConfig("", ""), training, set(), None, bert(), 512)
    assert config.tokens_per_pass == 25_600
    said = "tokens_per_pass: 25,600, 50 packs of 512 slots: about 12.4 GiB of activations on NVIDIA H100 with 24.0 GiB"
    assert said in caplog.text
    assert "--tokens-per-pass or --per-device-train-batch-size says otherwise" in caplog.text
    gpu.choose_loading(config, training, set(), 512)
    assert training.per_device_eval_batch_size == 50


@pytest.mark.parametrize(
    ("config", "said", "record", "tokens"),
    [
        ({"tokens_per_pass": 1024}, {"tokens_per_pass"}, None, 1024),
        ({"tokens_per_pass": 1024}, {"tokens_per_pass"}, {"chosen": {"tokens_per_pass": 4096}}, 1024),
        ({}, {"per_device_train_batch_size"}, None, None),
        ({}, {"per_device_train_batch_size"}, {"chosen": {"tokens_per_pass": 4096}}, None),
        ({}, set(), {"chosen": {"tokens_per_pass": 4096}}, 4096),
        ({}, set(), {"chosen": {"tokens_per_pass": None}}, None),
        ({}, set(), {"training": {}}, None),  # of an earlier version
        ({"batch_policy": "packs"}, set(), None, None),  # a step's size must not follow from a card
    ],
)
def test_passes_are_what_was_said_or_what_the_run_began_with(tmp_path, card, config, said, record, tokens):
    card()
    for make in (on_gpu, on_cpu):
        given = PretrainConfig("", "", **config)
        chosen = gpu.choose_passes(given, make(tmp_path), said, record, bert(1, 64, 100), 512)
        assert chosen.tokens_per_pass == tokens


def test_both_sizes_of_a_pass_are_refused_where_they_disagree(tmp_path):
    """Even if the one in packs is transformers' default: here it was said."""
    said = {"tokens_per_pass", "per_device_train_batch_size"}
    how = on_cpu(tmp_path), said, None, bert(1, 64, 100), 512
    assert gpu.choose_passes(PretrainConfig("", "", tokens_per_pass=8 * 512), *how).tokens_per_pass == 8 * 512
    with pytest.raises(ValueError, match="is 4 packs of 512 token slots, but per_device_train_batch_size=8 disagrees"):
        gpu.choose_passes(PretrainConfig("", "", tokens_per_pass=4 * 512), *how)


# -- workers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(32, 1, 4), (3, 1, 2), (32, 8, 3), (1, 1, 0), (2, 8, 0)])
def test_workers_leave_a_core_to_training(tmp_path, monkeypatch, cores, ranks, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    training = on_gpu(tmp_path)
    gpu.choose_loading(PretrainConfig("", ""), training, set(), 512)
    assert training.dataloader_num_workers == workers
    assert training.dataloader_persistent_workers is bool(workers)
    assert training.dataloader_prefetch_factor == (4 if workers else None)


def test_workers_that_were_said_stay(tmp_path):
    given = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 7, "per_device_eval_batch_size": 3}
    training = on_gpu(tmp_path, **given)
    said = {*given, "dataloader_persistent_workers"}
    gpu.choose_loading(PretrainConfig("", "", tokens_per_pass=5120), training, said, 512)
    assert {name: getattr(training, name) for name in given} == given and not training.dataloader_persistent_workers


def test_pinned_memory_and_fused_adamw_are_transformers_defaults(tmp_path):
    """So nobody has to choose them."""
    training = OnGpu(str(tmp_path), report_to="none")
    assert training.dataloader_pin_memory and training.optim == "adamw_torch_fused"


# -- what was said, and what is kept --------------------------------------------------------------------------


def test_what_the_user_named():
    flags = ["--seed", "1", "--bf16=False", "--no-reassign", "--per_device-train_batch_size", "8", "--report_to", "a"]
    found = named(("run.yaml", {"max_steps": 3, "model": None, "tf32": False}, flags))
    assert found == {"max_steps", "tf32", "seed", "bf16", "reassign", "per_device_train_batch_size", "report_to"}


@pytest.mark.parametrize("given", [{}, {"bf16": True}, {"fp16": True}])
def test_a_record_says_the_precision(tmp_path, given):
    """Given back on a GPU, a run in float32 stays in float32."""
    record = config_record(PretrainConfig("", ""), on_cpu(tmp_path, **given))
    assert record.get("bf16") == (None if "fp16" in given else "bf16" in given)


def test_a_run_resumes_as_it_began_whatever_the_default_is(folders, tmp_path, caplog):
    """A run in bf16 and passes of 2 packs, as a GPU would begin it, resumed by a command that names neither."""
    data = {"dataset": folders["packed"], "tokenizer": folders["tokenizer"]}
    how = {"save_strategy": "steps", "save_steps": 2, "hidden_dropout_prob": 0}
    began = {"bf16": True, "tokens_per_pass": 128}
    assert train(data, tmp_path / "whole", **how, **began) == 0
    assert train(data, tmp_path / "run", **how, **began) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    for name in ("model.safetensors", "run.json"):
        (tmp_path / "run" / name).unlink()
    caplog.set_level(logging.INFO)
    assert train(data, tmp_path / "run", **how) == 0
    assert "bf16: on, as this run began" in caplog.text and "tokens_per_pass: 128, as this run began" in caplog.text
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "run")]
    assert records[0] == records[1] and records[0]["chosen"] == {"tokens_per_pass": 128, "tf32": False}
    assert [entry["step"] for entry in history(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_another_size_of_passes_may_be_said_when_a_run_resumes(folders, tmp_path):
    data = {"dataset": folders["packed"], "tokenizer": folders["tokenizer"]}
    assert train(data, tmp_path / "run", save_strategy="steps", save_steps=2, tokens_per_pass=128, max_steps=2) == 0
    assert train(data, tmp_path / "run", save_strategy="steps", save_steps=2, per_device_train_batch_size=4) == 0
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]
    assert chosen["tokens_per_pass"] is None


# -- torch.compile --------------------------------------------------------------------------------------------


def test_the_mode_of_torch_compile_reaches_it(folders, tmp_path, monkeypatch):
    """ "reduce-overhead" and "max-autotune" replay CUDA graphs. What a run adds up over passes is its own copy."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append(options) or model)
    data = {"dataset": folders["packed"], "tokenizer": folders["tokenizer"]}
    assert train(data, tmp_path / "run", torch_compile_mode="reduce-overhead", max_steps=1) == 0
    assert asked and all(options["mode"] == "reduce-overhead" for options in asked)


def test_sums_are_no_buffer_of_a_graph():
    """A CUDA graph writes each pass into the same memory."""
    of_graph, sums = torch.tensor([1.0, 2.0]), RunningSums()
    for step in range(3):
        of_graph.copy_(torch.tensor([1.0, 2.0]) * (step + 1))
        sums.add(of_graph)
    assert sums.take().tolist() == [6.0, 12.0]
