"""use_attention on stock models: what it refuses, how it changes the model, and which layout a batch gets."""

import gc
import re
import weakref
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_contract import check_contract
from pretraining_models import make_config
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)

from bert_pretrain.attention import ATTENTION, AttentionHead, heads, load_attention, use_attention
from collate import PackLayout, task_for

TINY: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "bos_token_id": 1,
}
TINY |= {"eos_token_id": 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2Model(GPT2Config(attn_pdrop=0.0, n_positions=16, **TINY)),
        lambda: LlamaModel(LlamaConfig(intermediate_size=8, **TINY)),
        lambda: BertModel(make_config(is_decoder=True)),
    ],
)
def test_causal_models_are_refused(make):
    """Heads see both directions: a causal model would run without an error, and see the future."""
    model = make()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"is causal or a decoder.*take an encoder"):
        use_attention(model, "sdpa")
    assert model.config._attn_implementation == before


def test_a_refused_model_is_as_it_was():
    model = BertForMaskedLM(make_config(attention_probs_dropout_prob=0.1))
    with pytest.raises(ValueError, match=r"LSHAttention cannot drop.*attention_probs_dropout_prob=0\.1"):
        use_attention(model, ["local", "lsh"])
    assert not any("attention_head" in name for name, _ in model.named_modules())
    for attention in (None, 3):
        with pytest.raises(ValueError, match="must be a name, a callable, or a list of these"):
            use_attention(model, attention)


def test_dropout_is_that_of_the_layers_and_not_what_the_config_says_later():
    model = BertForMaskedLM(make_config(attention_probs_dropout_prob=0.1))
    model.config.attention_probs_dropout_prob = 0.0
    with pytest.raises(ValueError, match=r"cannot drop.*=0\.1; set it to 0 in the config that the model is made from"):
        use_attention(model, "lsh")


def write(ids, following):
    ids.copy_(following)


def write_data(ids, following):
    ids.data.copy_(following)  # does not change the tensor's version


def write_by_numpy(ids, following):
    ids.numpy()[:] = following.numpy()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", [write, write_data, write_by_numpy])
def test_ids_written_anew_make_a_layout_anew(write, context):
    """A buffer into which the next batch is copied."""
    torch.manual_seed(0)
    model = use_attention(BertModel(make_config()).double().eval(), "sdpa")
    input_ids = torch.randint(5, 60, (1, 12))
    buffer, following = torch.tensor([[1] * 8 + [2] * 4]), torch.tensor([[1] * 3 + [2] * 9])
    with context():
        ids = buffer.clone()
        before = model(input_ids, sequence_ids=ids).last_hidden_state
        write(ids, following)
        found = model(input_ids, sequence_ids=ids).last_hidden_state
        assert torch.equal(found, model(input_ids, sequence_ids=following.clone()).last_hidden_state)
        assert not torch.equal(found, before)


@pytest.fixture
def builds(monkeypatch):
    """The ids of every layout that is built."""
    built, check = [], PackLayout.__post_init__
    monkeypatch.setattr(PackLayout, "__post_init__", lambda self: (built.append(self.sequence_ids_BL), check(self))[1])
    return built


def test_the_layers_of_a_model_share_one_layout(builds):
    model = use_attention(BertModel(make_config()).eval(), "sdpa")
    ids = torch.tensor([[1] * 8 + [2] * 4])
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model(torch.randint(5, 60, ids.shape), sequence_ids=ids)
    assert len(builds) == 1


@pytest.mark.parametrize("attention", ["sdpa", "local", None])
def test_hook_layers_and_task_head_share_one_layout_a_batch(attention, builds):
    """Forward and backward of a stock model with a packed head, with attention heads or isolated alone."""
    model = BertForTokenClassification(make_config(num_labels=3))
    if attention is not None:
        use_attention(model, attention)
    task = task_for(model)
    for ids in (torch.tensor([[1] * 8 + [2] * 4]), torch.tensor([[1] * 5 + [0] * 7])):
        builds.clear()
        words = torch.randint(5, 60, ids.shape)
        batch = {"input_ids": words, "sequence_ids": ids, "labels": words % 3}
        task(model, batch).loss.backward()
        assert len(builds) == 1


def test_a_batch_is_freed_without_the_garbage_collector():
    model = use_attention(BertModel(make_config()).eval(), "sdpa")
    ids = torch.tensor([[1] * 8 + [2] * 4])
    gone = weakref.ref(ids)
    gc.disable()
    try:
        model(torch.randint(5, 60, ids.shape), sequence_ids=ids)
        del ids
        assert gone() is None
    finally:
        gc.enable()


def test_flex_execution_refuses_gradients_on_cpus():
    model = use_attention(BertModel(make_config()), "local", execution="flex")
    with pytest.raises(ValueError, match=r"flex has no gradient on CPUs; set execution='chunks'"):
        model(torch.ones(1, 4, dtype=torch.int64), sequence_ids=torch.tensor([[1, 1, 2, 2]]))


def test_the_head_in_the_docs_keeps_the_contract():
    page = (Path(__file__).parents[3] / "docs/attention.md").read_text(encoding="utf-8")
    source = re.search(r"from torch import Tensor.*?class MeanAttention.*?(?=\n\n\n)", page, re.DOTALL).group()
    names: dict = {}
    exec(source, names)
    check_contract(names["MeanAttention"])


@pytest.mark.parametrize("name", ["lsh", "routing", "linformer"])
def test_a_sequence_that_is_too_long_is_refused(name):
    head = ATTENTION[name](num_heads=2, head_width=8, max_sequence_length=20)
    layout = PackLayout(torch.tensor([[1] * 5 + [2] * 21]))
    with pytest.raises(ValueError, match=r"21 tokens.*max_sequence_length=20"):
        head(*[torch.randn(26, 2, 8) for _ in range(3)], layout)


def test_another_class_than_the_one_saved_gets_its_heads(tmp_path):
    """With or without a task head: the names of the encoder's weights have a prefix or none."""
    torch.manual_seed(0)
    saved = use_attention(BertForMaskedLM(make_config()), ["linformer", "sdpa"], rank=5, initial="random").eval()
    saved.save_pretrained(tmp_path / "task")
    ids, input_ids = torch.tensor([[1] * 8 + [2] * 4]), torch.randint(5, 60, (1, 12))
    expected = saved.bert(input_ids, sequence_ids=ids).last_hidden_state
    base = load_attention(BertModel.from_pretrained(tmp_path / "task"), tmp_path / "task").eval()
    assert torch.equal(base(input_ids, sequence_ids=ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = load_attention(BertForMaskedLM.from_pretrained(tmp_path / "base"), tmp_path / "base").eval()
    assert torch.equal(again.bert(input_ids, sequence_ids=ids).last_hidden_state, expected)


def test_a_folder_without_the_weights_of_the_heads_is_refused(tmp_path):
    use_attention(BertModel(make_config()), ["linformer", "sdpa"]).save_pretrained(tmp_path / "one")
    use_attention(BertModel(make_config()), ["sdpa", "linformer"]).save_pretrained(tmp_path / "other")
    said = r"not hold the weights of \['linformer', 'sdpa'\] in BertModel: it lacks \['encoder\.layer\.0\..*also has"
    with pytest.raises(ValueError, match=said + r" \['encoder\.layer\.1\..*saved from BertModel"):
        load_attention(BertModel.from_pretrained(tmp_path / "one"), tmp_path / "other")


def mean_by_sequence(value_THK, layout):
    sums = value_THK.new_zeros(layout.num_sequences, *value_THK.shape[1:])
    sums = sums.index_add(0, layout.sequence_of_token, value_THK)
    return (sums / layout.lengths[:, None, None])[layout.sequence_of_token]


class WithoutDropout(AttentionHead):
    """The shortest head of a user's own: it has no dropout."""

    def attend(self, query_THK, key_THK, value_THK, layout):
        return mean_by_sequence(value_THK, layout)


class WithDropout(AttentionHead):
    supports_dropout = True

    def attend(self, query_THK, key_THK, value_THK, layout, dropout=0.0):
        return mean_by_sequence(value_THK, layout) * (1 - dropout)


def test_a_head_of_ones_own_takes_dropout_only_if_it_supports_it():
    layout = PackLayout(torch.tensor([[1, 1, 2, 0]]))
    value_THK = torch.tensor([2.0, 4.0, 8.0]).view(3, 1, 1)
    own = [head(num_heads=1, head_width=1, max_sequence_length=4) for head in (WithoutDropout, WithDropout)]
    for head in own:
        assert head(value_THK, value_THK, value_THK, layout).flatten().tolist() == [3, 3, 8]
    with pytest.raises(ValueError, match=r"WithoutDropout cannot drop attention weights, but dropout=0\.5"):
        own[0](value_THK, value_THK, value_THK, layout, dropout=0.5)
    assert own[1](value_THK, value_THK, value_THK, layout, dropout=0.5).flatten().tolist() == [1.5, 1.5, 4]


def test_the_folder_of_heads_is_the_catalogue():
    folder = Path(heads.__file__).parent
    assert sorted(path.stem for path in folder.glob("[a-z]*.py")) == sorted(ATTENTION)
    for name, head in ATTENTION.items():  # one signature, in the base class and in all heads
        assert head.__module__ == f"bert_pretrain.attention.heads.{name}"
        own = [each for each in signature(head.attend).parameters if each != "hidden_TD"]
        assert own == list(signature(AttentionHead.attend).parameters)
