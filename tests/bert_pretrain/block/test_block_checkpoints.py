"""Checkpoints with a block: stock refuses them by their type, ours come back as they were."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from block_models import IDS, block_model
from pretraining_models import make_config
from transformers import AutoConfig, BertConfig, BertForMaskedLM, BertForPreTraining
from transformers.models.bert.modeling_bert import BertEncoder

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.block import BlockBertConfig, models, use_block
from bert_pretrain.model import BlockBertForPreTraining
from bert_pretrain.train.card import LOADING_OTHER_BLOCK

WORDS = torch.tensor([[2, 17, 23, 8, 3, 40, 3, 9, 0], [5, 4, 33, 8, 7, 40, 3, 9, 0]])
SEQUENCE_IDS = torch.tensor(IDS)
OPTIONS = {"placement": "residual", "norm": "rms"}
TASKS = [
    *("Model", "ForMaskedLM", "ForNextSentencePrediction", "ForSequenceClassification", "ForMultipleChoice"),
    *("ForTokenClassification", "ForQuestionAnswering"),
]


def stored(folder):
    return json.loads((folder / "config.json").read_text())


def test_stock_transformers_refuses_by_type(tmp_path):
    """In another process, which has not imported this package."""
    block_model(**OPTIONS).save_pretrained(tmp_path)
    code = (
        "import sys\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining\n"
        "for auto in (AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining):\n"
        "    try:\n"
        "        auto.from_pretrained(sys.argv[1])\n"
        "    except ValueError as error:\n"
        "        assert 'block_bert' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(f'{auto.__name__} loads it')\n"
        "print('refused')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ran.stdout == "refused\n", ran.stderr[-2000:]


def test_each_import_lets_auto_classes_find_a_block(tmp_path):
    """In another process, which imports nothing else; and as the documents say it."""
    block_model(**OPTIONS).save_pretrained(tmp_path)
    autos = {"bert_pretrain.block": "AutoModel", "bert_pretrain.model": "AutoModelForPreTraining"}
    code = "import sys, transformers\n" + "".join(
        f"import {module}\nprint(type(transformers.{auto}.from_pretrained(sys.argv[1])).__name__)\n"
        for module, auto in autos.items()
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ran.stdout == "BlockBertModel\nBlockBertForPreTraining\n", ran.stderr[-2000:]
    for text in (LOADING_OTHER_BLOCK, use_block.__doc__):
        assert all(auto in text and f"`{module}`" in text for module, auto in autos.items())


def test_the_config_has_one_entry_more(tmp_path):
    model = block_model(**OPTIONS)
    model.save_pretrained(tmp_path)
    found = stored(tmp_path)
    assert found["architectures"] == ["BlockBertForPreTraining"] and found["model_type"] == "block_bert"
    assert found["block"] == OPTIONS
    plain = block_model()
    plain.save_pretrained(tmp_path / "plain")
    before = stored(tmp_path / "plain")
    assert found.keys() - before.keys() == {"block"} and before["model_type"] == "bert"


@pytest.mark.parametrize(
    "load", [PackedBertForPreTraining, BlockBertForPreTraining, transformers.AutoModelForPreTraining]
)
@pytest.mark.parametrize("head", ["sdpa", "linformer"])
def test_a_model_with_a_block_comes_back(tmp_path, head, load, caplog):
    model = block_model(head, **OPTIONS, share_layers=True).eval()
    model.save_pretrained(tmp_path)
    again, found = load.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert type(again) is BlockBertForPreTraining and type(again.config) is BlockBertConfig
    assert not found["missing_keys"] and not found["unexpected_keys"] and not caplog.records
    assert again.bert.encoder.options == model.bert.encoder.options
    assert torch.equal(
        again.eval()(WORDS, SEQUENCE_IDS).prediction_logits, model(WORDS, SEQUENCE_IDS).prediction_logits
    )


@pytest.mark.parametrize("task", TASKS)
def test_stock_tasks_with_a_block_come_back_by_auto(tmp_path, task):
    torch.manual_seed(0)
    stock = getattr(transformers, f"Bert{task}")(make_config())
    model = use_block(stock, placement="pre", norm="rms").eval()
    words, ids = (x[:, None].repeat(1, 2, 1) for x in (WORDS, SEQUENCE_IDS))
    given = (WORDS, SEQUENCE_IDS) if task != "ForMultipleChoice" else (words, ids.flatten(0, 1))
    model.save_pretrained(tmp_path)
    assert stored(tmp_path)["architectures"] == [f"BlockBert{task}"]
    auto = getattr(transformers, f"AutoModel{task.removeprefix('Model')}")
    again, found = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is getattr(models, f"BlockBert{task}")
    assert not found["missing_keys"] and not found["unexpected_keys"]
    for mine, theirs in zip(
        again.eval()(given[0], sequence_ids=given[1]).to_tuple(),
        model(given[0], sequence_ids=given[1]).to_tuple(),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_what_stock_bert_computes_stays_a_stock_checkpoint(tmp_path):
    """A stream and chunks change no number, so stock may read it."""
    model = block_model(stream="checkpoint", chunk_size=8).eval()
    model.save_pretrained(tmp_path)
    assert stored(tmp_path)["model_type"] == "bert"
    assert type(AutoConfig.from_pretrained(tmp_path)) is not BlockBertConfig
    stock, found = BertForPreTraining.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    one = torch.ones_like(WORDS[:1])
    torch.testing.assert_close(
        stock.eval()(WORDS[:1]).prediction_logits, model(WORDS[:1], one).prediction_logits, rtol=0, atol=1e-12
    )
    assert PackedBertForPreTraining.from_pretrained(tmp_path).bert.encoder.options == model.bert.encoder.options


def test_a_stock_checkpoint_gets_another_block(tmp_path):
    """What it lacks, the norm at the end, starts at one."""
    BertForPreTraining(make_config()).save_pretrained(tmp_path)
    model = use_block(PackedBertForPreTraining.from_pretrained(tmp_path), **OPTIONS)
    assert torch.equal(model.bert.encoder.LayerNorm.weight, torch.ones(32))
    assert type(model.config) is BlockBertConfig


@pytest.mark.parametrize("options", [{"placement": "pre"}, {"norm": "rms"}])
def test_a_stock_class_by_its_name_loads_a_block_and_warns(tmp_path, options, caplog):
    """The one way around the type that transformers leaves open; docs/blocks.md names it."""
    use_block(BertForMaskedLM(make_config()), **options).save_pretrained(tmp_path)
    stock, found = BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(stock) is BertForMaskedLM and type(stock.bert.encoder) is BertEncoder
    assert found["missing_keys"] or found["unexpected_keys"]
    assert "a model of type `block_bert`" in caplog.text


class OwnConfig(BertConfig):
    """Its model type is stock BERT's."""


class OwnBlockConfig(BlockBertConfig):
    """Its model type is ours."""


def test_a_config_that_stock_would_load_is_refused():
    model = BertForMaskedLM(OwnConfig(**make_config().to_dict()))
    with pytest.raises(ValueError, match=r"a OwnConfig \(model type bert\).*'placement': 'pre'.*of a BertConfig"):
        use_block(model, placement="pre")
    assert type(model.bert.encoder) is BertEncoder and not hasattr(model.config, "block")
    with pytest.raises(ValueError, match="OwnConfig"):
        PackedBertForPreTraining(OwnConfig(**make_config(block=OPTIONS).to_dict()))


def test_a_config_of_ones_own_may_have_what_stock_reads_too(tmp_path):
    """What computes as stock does, and what inherits our model type."""
    kept = use_block(BertForMaskedLM(OwnConfig(**make_config().to_dict())), stream="checkpoint")
    assert type(kept.config) is OwnConfig and kept.config.block == {"stream": "checkpoint"}
    config = OwnBlockConfig(**make_config().to_dict() | {"model_type": "block_bert"})
    use_block(BertForMaskedLM(config), placement="pre").save_pretrained(tmp_path)
    assert stored(tmp_path)["model_type"] == "block_bert"


def test_unknown_options_in_a_config_are_refused():
    for block, message in (({"placment": "pre"}, "did you mean 'placement'"), ("pre", "must be options")):
        with pytest.raises(ValueError, match=message):
            PackedBertForPreTraining(make_config(block=block))
