"""Attention heads: the contract, over the whole table, and use_attention on stock encoders."""

from itertools import pairwise

import pytest
import torch
from reference import packed_rows
from test_equivalence import MAX_LENGTH, RowWideAttention, alone, make_config, make_models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
)

from bert_pretrain.attention import ATTENTION, use_attention
from collate import DataCollatorWithPacking, PackLayout

LAYOUTS = {
    "one pack": [[1, 1, 1, 2, 2, 0]],
    "padding in the middle": [[1, 1, 0, 0, 2, 2, 2, 3], [0, 1, 1, 1, 1, 0, 2, 0]],
    "ones": [[1, 2, 3, 4]],
    "one sequence": [[1, 1, 1, 1, 1]],
    "an empty pack": [[1, 1, 2], [0, 0, 0]],
}


def heads_input(layout, seed=0):
    torch.manual_seed(seed)
    return [3 * torch.randn(layout.num_tokens, 2, 8, dtype=torch.float64) for _ in range(3)]


def run(attention, layout, inputs):
    """Context, and the gradients of a random functional of it."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    context = attention(*inputs, layout)
    torch.manual_seed(1)
    (context * torch.randn_like(context)).sum().backward()
    return [context.detach(), *(x.grad for x in inputs)]


def run_one_by_one(attention, layout, inputs):
    torch.manual_seed(1)
    weights = torch.randn(layout.num_tokens, 2, 8, dtype=torch.float64)
    results = []
    for start, end in zip(layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist(), strict=True):
        mine = [x[start:end].clone().requires_grad_() for x in inputs]
        context = attention(*mine, PackLayout(torch.ones(1, end - start, dtype=torch.int32)))
        (context * weights[start:end]).sum().backward()
        results.append([context.detach(), *(x.grad for x in mine)])
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("ids", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ATTENTION)
def test_packing_changes_nothing(name, ids):
    attention = ATTENTION[name](num_heads=2, head_width=8, max_sequence_length=64).double()
    layout = PackLayout(torch.tensor(ids))
    inputs = heads_input(layout)
    for packed, expected in zip(run(attention, layout, inputs), run_one_by_one(attention, layout, inputs), strict=True):
        torch.testing.assert_close(packed, expected, rtol=0, atol=1e-12)


def test_the_contract_fails_for_an_attention_that_leaks():
    layout = PackLayout(torch.tensor(LAYOUTS["one pack"]))
    inputs = heads_input(layout)
    leaky = RowWideAttention()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(leaky, layout, inputs)[0], run_one_by_one(leaky, layout, inputs)[0])


@pytest.mark.parametrize("name", ATTENTION)
def test_a_huge_or_broken_mate_changes_nothing_bit_for_bit(name):
    attention = ATTENTION[name](num_heads=2, head_width=8, max_sequence_length=64).double()
    layout = PackLayout(torch.tensor([[1, 1, 1, 2, 2, 2, 3, 0]]))
    inputs = heads_input(layout)
    mate = layout.sequence_of_token == 1
    before = attention(*inputs, layout)
    for value in (1e4, -1e4, float("nan")):
        after = attention(*(torch.where(mate[:, None, None], value, x) for x in inputs), layout)
        assert (after[~mate] == before[~mate]).all()


@pytest.mark.parametrize("name", ATTENTION)
def test_the_place_in_the_batch_changes_nothing_bit_for_bit(name):
    attention = ATTENTION[name](num_heads=2, head_width=8, max_sequence_length=64).double()
    rows = [[1] * 20 + [2] * 9 + [0] * 35, [1] * 7 + [2] * 40 + [3] * 17, [0] * 5 + [1] * 59]
    layout, moved = PackLayout(torch.tensor(rows)), PackLayout(torch.tensor([rows[1], rows[2]]))
    inputs = heads_input(layout)
    in_moved = layout.token_index >= 64  # the packs but the first
    assert (attention(*inputs, layout)[in_moved] == attention(*(x[in_moved] for x in inputs), moved)).all()


def test_stock_masked_lm_keeps_sequences_apart(tokenizer, pairs):
    """use_attention on a stock model: hidden in its rows of (B, L), told by sequence_ids."""
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


SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
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
    """And find their own positions; packed = the stock model on each sequence alone."""
    batch = DataCollatorWithPacking(tokenizer, mlm_probability=None, pad_to=MAX_LENGTH)(packed_rows(pairs, MAX_LENGTH))
    torch.manual_seed(0)
    stock = AutoModel.from_config(AutoConfig.for_model(name, **ENCODERS[name])).double().eval()
    cu_seqlens, flat = PackLayout(batch["sequence_ids"]).cu_seqlens, batch["input_ids"][batch["sequence_ids"] > 0]
    alone = [flat[a:b][None] for a, b in pairwise(cu_seqlens.tolist())]
    expected = torch.cat([stock(input_ids).last_hidden_state[0] for input_ids in alone])
    packed = use_attention(stock, "sdpa")(batch["input_ids"], sequence_ids=batch["sequence_ids"]).last_hidden_state
    torch.testing.assert_close(packed[batch["sequence_ids"] > 0], expected, rtol=0, atol=1e-11)


class NoDropout(nn.Module):
    supports_dropout = False

    def __init__(self, **_):
        super().__init__()


def test_refusals():
    _, packed = make_models()
    with pytest.raises(ValueError, match=r"unknown attention 'dense'; choose from .*'sdpa'.* or give a callable"):
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


def test_attention_dropout_is_applied_in_training_only():
    attention = ATTENTION["sdpa"](num_heads=2, head_width=8, max_sequence_length=64).double()
    layout = PackLayout(torch.tensor([[1, 1, 1, 2, 2, 0]]))
    inputs = heads_input(layout)
    assert not (attention(*inputs, layout, dropout=0.5) == attention(*inputs, layout)).all()
