"""`bert-pretrain train --block`: the run, its record, its card, what it counts, and its optimizer."""

import json
from dataclasses import fields

import pytest
import torch
from block_models import block_model
from pretraining_models import make_config
from tiny_runs import history, make_folders, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForPreTraining, Trainer, TrainingArguments

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.block import BlockBertConfig
from bert_pretrain.train.config import PretrainConfig
from bert_pretrain.train.gpu import bytes_per_token
from bert_pretrain.train.metrics import ModelFlops
from bert_pretrain.train.optimizer import Lamb

NAMES = {field.name for field in fields(TrainingArguments)}
PRE = '{"placement": "pre", "norm": "rms"}'


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "pre-bert"
    assert train(folders, output, block=PRE, num_hidden_layers=2, save_strategy="steps", save_steps=2) == 0
    return output


def losses(output):
    return [entry["loss"] for entry in history(output) if "loss" in entry]


def test_a_run_with_a_block_is_saved_with_it(run):
    model = PackedBertForPreTraining.from_pretrained(run)
    assert type(model.config) is BlockBertConfig and model.config.block == json.loads(PRE)
    assert json.loads((run / "pretrain.json").read_text())["block"] == json.dumps(json.loads(PRE), sort_keys=True)
    card = (run / "README.md").read_text()
    assert "| block | placement `pre`, norm `rms` |" in card and "stock transformers refuses it" in card
    assert 'PackedBertForPreTraining.from_pretrained("pre-bert")' in card and "tensor for tensor" not in card


@pytest.mark.parametrize("options", [{}, {"optimizer": "lamb"}], ids=["AdamW", "LAMB"])
def test_an_interrupted_run_continues_as_if_it_was_not(folders, tmp_path, options):
    """The same losses, by text that spells the block otherwise; and not with another block."""
    options |= {"num_hidden_layers": 2, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    options |= {"hidden_dropout_prob": 0.0}
    assert train(folders, tmp_path / "whole", block=PRE, **options) == 0
    assert train(folders, tmp_path / "parts", block=PRE, max_steps=2, **options) == 0
    other = json.dumps({"norm": "rms", "placement": "pre"})
    assert train(folders, tmp_path / "parts", block=other, **options) == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    models = [PackedBertForPreTraining.from_pretrained(tmp_path / name) for name in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_another_block_is_another_run(folders, run, capsys):
    assert train(folders, run, block='{"placement": "residual"}', num_hidden_layers=2, save_strategy="steps") == 2
    assert "was trained with --block" in capsys.readouterr().err


def test_a_checkpoint_keeps_its_block_and_takes_changes(folders, run, tmp_path):
    assert train(folders, tmp_path / "same", model=str(run)) == 0
    assert PackedBertForPreTraining.from_pretrained(tmp_path / "same").config.block == json.loads(PRE)
    assert train(folders, tmp_path / "more", model=str(run), block='{"stream": "checkpoint"}') == 0
    found = PackedBertForPreTraining.from_pretrained(tmp_path / "more").config.block
    assert found == json.loads(PRE) | {"stream": "checkpoint"}
    assert losses(tmp_path / "same") == losses(tmp_path / "more")


def test_a_checkpoint_takes_changes_back_to_stocks_block(folders, run, tmp_path, capsys):
    """A value that is stock BERT's is a change, too; what it cannot be changed to is said."""
    assert train(folders, tmp_path / "layer", model=str(run), block='{"norm": "layer"}', max_steps=1) == 0
    model = PackedBertForPreTraining.from_pretrained(tmp_path / "layer")
    assert model.config.block == {"placement": "pre"} and model.bert.encoder.options.norm == "layer"
    assert train(folders, tmp_path / "post", model=str(run), block='{"placement": "post"}', max_steps=1) == 2
    assert "would drop the trained weight" in capsys.readouterr().err


def test_a_stock_checkpoint_gets_a_block(folders, tmp_path):
    assert train(folders, tmp_path / "stock") == 0
    assert BertForPreTraining.from_pretrained(tmp_path / "stock").config.model_type == "bert"
    assert train(folders, tmp_path / "pre", model=str(tmp_path / "stock"), block=PRE) == 0
    assert PackedBertForPreTraining.from_pretrained(tmp_path / "pre").config.block == json.loads(PRE)


def test_experts_of_a_checkpoint_begin_as_its_feed_forward(folders, tmp_path):
    """A token's two experts are copies, and their weights add up to 1: so the first step has the same loss of MLM."""
    given = {"hidden_dropout_prob": 0.0, "max_steps": 1}
    assert train(folders, tmp_path / "stock", **given) == 0
    found = []
    for name, block in (("dense", None), ("moe", '{"feed_forward": "moe", "experts": 4}')):
        assert train(folders, tmp_path / name, model=str(tmp_path / "stock"), block=block, **given) == 0
        found.append(next(entry["mlm_loss_per_sequence"] for entry in history(tmp_path / name) if "loss" in entry))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "pre"}, "--block pre is no JSON"),
        ({"block": '["pre"]'}, 'must be a JSON object, such as {"placement": "pre"}'),
        ({"block": '{"placement": "prae"}'}, "unknown placement 'prae'; did you mean 'pre'"),
        ({"block": '{"plcement": "pre"}'}, "did you mean 'placement'"),
    ],
)
def test_what_is_wrong_with_a_block_is_said(folders, tmp_path, capsys, options, message):
    assert train(folders, tmp_path / "run", **options) == 2
    assert message in capsys.readouterr().err


def test_initial_weights_are_for_a_new_model(folders, run, tmp_path, capsys):
    assert train(folders, tmp_path / "run", model=str(run), block='{"initial": "deep"}') == 2
    assert "draws the weights of a new model" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in transformers 5.23
def test_gradient_checkpointing_by_flag(folders, run, tmp_path):
    given = {"num_hidden_layers": 2, "gradient_checkpointing": True}
    assert train(folders, tmp_path / "run", block=PRE, **given) == 0
    assert losses(tmp_path / "run") == losses(run)


def test_a_reversible_stream_trains_and_takes_no_checkpointing(folders, tmp_path, capsys):
    block = '{"placement": "pre", "stream": "reversible"}'
    assert train(folders, tmp_path / "run", block=block, num_hidden_layers=2) == 0
    assert "stream `reversible`" in (tmp_path / "run" / "README.md").read_text()
    name = "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"
    assert train(folders, tmp_path / "more", block=block, **{name: True}) == 2
    assert "the stream 'reversible', which keeps nothing" in capsys.readouterr().err


# -- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_are_out_of_weight_decay(tmp_path, norm):
    model = block_model(placement="residual", norm=norm)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    decayed = set(Trainer(model, arguments).get_decay_parameter_names(model))
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert decayed - {"cls.predictions.decoder.weight"} == matrices  # which is the embeddings'
    assert "bert.encoder.LayerNorm.weight" in dict(model.named_parameters()).keys() - decayed


def test_lamb_adapts_no_norm():
    model = block_model(placement="pre", norm="rms")
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = Lamb([{"params": vectors}, {"params": [p for p in model.parameters() if p.dim() == 2]}])
    assert [group["adam"] for group in optimizer.param_groups] == [True, False]


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"placement": "pre", "norm": "rms"},
        {"placement": "residual"},
        {"share_layers": True},
        {"gated": True},
        {"feed_forward": "moe", "gated": True, "top_k": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_flops_are_those_that_torch_counts(monkeypatch, options):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)  # groups: torch does not count its CPU kernel's products
    model = block_model(layers=3, **options)
    ids = torch.tensor([[1] * 16 + [2] * 32])
    batch = {"input_ids": torch.ones_like(ids), "sequence_ids": ids, "labels": torch.full_like(ids, -100)}
    batch["labels"][0, :5] = 7
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).loss.backward()
    pooler_and_pairs = counter.get_total_flops() - ModelFlops(model)(48, 16**2 + 32**2, 5)
    assert pooler_and_pairs in (6 * 2 * (32 * 32 + 32 * 2), 2 * 2 * (32 * 32 + 32 * 2), 6 * 2 * 32 * 32 + 12 * 2 * 32)


def test_memory_follows_the_stream():
    def bytes_with(layers, **block):
        model = PackedBertForPreTraining(make_config(num_hidden_layers=layers, block=block or None))
        return bytes_per_token(model, 0.15, True, False)

    stock = bytes_with(8)
    assert bytes_with(8, placement="pre") == stock > bytes_with(8, chunk_size=4) > bytes_with(8, stream="checkpoint")
    checkpointed = PackedBertForPreTraining(make_config(num_hidden_layers=8))
    assert bytes_with(8, stream="checkpoint") == bytes_per_token(checkpointed, 0.15, True, True)


def test_the_config_takes_any_spelling():
    given = [PretrainConfig("packed", "tokenizer", block=text).block for text in (PRE, PRE.replace(" ", ""))]
    assert given[0] == given[1] and PretrainConfig("packed", "tokenizer").block is None
