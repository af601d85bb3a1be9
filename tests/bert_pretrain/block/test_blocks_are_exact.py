"""Each placement, norm and stream against a slow twin or a library; and what must not change a bit."""

import copy
import math

import pytest
import torch
from block_models import IDS, block_model, hidden_of, layout_of, run_encoder
from pretraining_models import make_config, make_models
from torch import nn
from transformers import BertForMaskedLM, BertForPreTraining, GPT2Config, GPT2Model
from transformers.models.bert.modeling_bert import BertEncoder

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.block import BlockEncoder, BlockOptions, place_block, use_block
from bert_pretrain.block.norms import NORMS
from collate import isolate_sequences

WORDS = torch.tensor([[2, 17, 23, 8, 3, 40, 3, 9, 0], [5, 4, 33, 8, 7, 40, 3, 9, 0]])
LABELS = torch.where(torch.arange(9) % 2 == 0, WORDS, -100)
SEQUENCE_IDS = torch.tensor(IDS)
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def step(model, seed=0):
    """loss, and the gradients by name"""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(WORDS, SEQUENCE_IDS, labels=LABELS).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_bits(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


# -- nothing changes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"placement": "post", "norm": "layer", "initial": "bert"}])
def test_without_options_a_model_stays_as_it_is(options):
    for model in (make_models()[1], BertForMaskedLM(make_config())):
        before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
        encoder = model.base_model.encoder
        assert use_block(model, **options) is model
        assert model.base_model.encoder is encoder and type(encoder) is BertEncoder
        assert model.config.to_dict() == config and not model._forward_pre_hooks
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"stream": "checkpoint"}])
def test_the_default_block_computes_stock_bits(changes):
    """The default options in a BlockEncoder, which use_block would never place."""
    torch.manual_seed(0)
    stock = PackedBertForPreTraining(make_config(**DROPOUT)).train()
    ours = copy.deepcopy(stock)
    ours.bert.encoder = BlockEncoder(ours.config, ours.bert.encoder, BlockOptions(**changes))
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert_same_bits(step(ours), step(stock))


def test_chunks_change_rounding_only():
    torch.manual_seed(0)
    stock = PackedBertForPreTraining(make_config()).double()
    ours = use_block(copy.deepcopy(stock), chunk_size=4)
    expected, found = step(stock), step(ours)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-12)


def test_stocks_own_option_of_chunks_is_taken_over():
    """Stock BERT raises deep inside, for a number of tokens that is no multiple."""
    torch.manual_seed(0)
    model = PackedBertForPreTraining(make_config(chunk_size_feed_forward=4)).double()
    assert model.bert.encoder.options.chunk_size == 4 and model.config.model_type == "bert"
    torch.manual_seed(0)
    torch.testing.assert_close(step(model)[0], step(PackedBertForPreTraining(make_config()).double())[0])


# -- placements and norms -------------------------------------------------------------------------------------------


def branches_of(layer, stock_layer):
    """The branches of a layer for one sequence, by stock's modules under eager attention, and their norms."""
    attention, output = stock_layer.attention, stock_layer.output
    return (
        (lambda x: attention.output.dense(attention.self(x[None])[0])[0], layer.attention.output.LayerNorm),
        (lambda x: output.dense(stock_layer.intermediate(x)), layer.output.LayerNorm),
    )


def norm_by_hand(norm, x):
    if isinstance(norm, nn.LayerNorm):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt() * (
            norm.weight
        ) + norm.bias
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def slow(placement, branches, final, x):
    """One sequence (n, D), as the papers write it."""
    total = x
    for f, norm in branches:
        if placement == "pre":
            x = x + f(norm_by_hand(norm, x))
        else:
            out = f(x)
            x, total = norm_by_hand(norm, x + out), total + out
    return {
        "post": lambda: x,
        "pre": lambda: norm_by_hand(final, x),
        "residual": lambda: x + norm_by_hand(final, total),
    }[placement]()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", ["post", "pre", "residual"])
def test_placements_are_those_of_the_papers(placement, norm):
    model = block_model(placement=placement, norm=norm, stream="checkpoint")  # so that post has a BlockEncoder, too
    stock = BertForPreTraining(make_config(attn_implementation="eager")).double()
    stock.load_state_dict(model.state_dict(), strict=False)
    layout, encoder = layout_of(IDS), model.bert.encoder
    hidden_TD = hidden_of(layout)
    out_TD, _, _ = run_encoder(model, hidden_TD, layout)
    branches = [
        each
        for layer, theirs in zip(encoder.layer, stock.bert.encoder.layer, strict=True)
        for each in branches_of(layer, theirs)
    ]
    expected = [
        slow(placement, branches, getattr(encoder, "LayerNorm", None), x)
        for x in hidden_TD.split(layout.lengths.tolist())
    ]
    torch.testing.assert_close(out_TD, torch.cat(expected), rtol=0, atol=1e-12)


def test_rms_is_that_of_torch():
    mine, theirs = NORMS["rms"](8, 1e-5), nn.RMSNorm(8, 1e-5)
    theirs.weight.data = mine.weight.data = torch.randn(8)
    x = 100 * torch.randn(5, 8)
    assert torch.equal(mine(x), theirs(x))
    mine.double(), theirs.double()
    assert torch.equal(mine(x.double()), theirs(x.double()))


def test_rms_is_in_float32():
    norm = NORMS["rms"](4, 1e-12).half()
    x = torch.full((1, 4), 3e4, dtype=torch.float16)
    assert x.square().isinf().all() and torch.equal(norm(x), torch.ones_like(x))


def test_the_sum_of_residuals_stays_in_float32():
    """In bfloat16 the small outputs of many branches would be lost beside a large sum."""
    model = block_model(placement="residual").bfloat16().eval()
    layout = layout_of([[1] * 4])
    seen = []
    model.bert.encoder.LayerNorm.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    out = model.bert.encoder(hidden_of(layout)[None].bfloat16(), layout=layout).last_hidden_state
    assert seen == [torch.float32] and out.dtype == torch.bfloat16


# -- streams, initial weights, shared layers -----------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["post", "pre", "residual"])
@pytest.mark.parametrize("norm", NORMS)
def test_checkpoint_is_plain_bit_for_bit(placement, norm):
    models = [
        block_model(placement=placement, norm=norm, stream=stream, config=DROPOUT) for stream in ("plain", "checkpoint")
    ]
    assert_same_bits(step(models[1]), step(models[0]))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in transformers 5.23
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_that_stream(reentrant):
    model = block_model(placement="residual", config=DROPOUT)
    expected, kept = step(model), saved_bytes(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # a graph of each layer: gradients add up in another order
        for name, gradient in step(model)[1].items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=1e-12, atol=1e-12)
    else:
        assert_same_bits(step(model), expected)
        assert saved_bytes(model) < kept / 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in transformers 5.23
@pytest.mark.parametrize("make", [block_model, lambda **block: use_block(BertForMaskedLM(make_config()), **block)])
def test_a_reversible_stream_takes_no_gradient_checkpointing(make):
    model = make(placement="pre", stream="reversible")
    with pytest.raises(ValueError, match="stream='reversible' keeps nothing of them; leave either out"):
        model.gradient_checkpointing_enable()
    assert not model.bert.encoder.gradient_checkpointing  # no layer has it
    model.gradient_checkpointing_disable()
    use_block(model, stream="plain").gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and model.bert.encoder.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in transformers 5.23
def test_gradient_checkpointing_stays_on_in_another_block():
    model = BertForMaskedLM(make_config())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = model.bert.encoder.layer[0]._gradient_checkpointing_func
    use_block(model, placement="pre")
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)
    assert all(layer._gradient_checkpointing_func is before for layer in model.bert.encoder.layer)
    norms = [layer.output.LayerNorm for layer in model.bert.encoder.layer]
    with pytest.raises(ValueError, match="leave either out"):
        use_block(model, stream="reversible")
    assert model.bert.encoder.options.stream == "plain"  # as it was
    assert norms == [layer.output.LayerNorm for layer in model.bert.encoder.layer]


def saved_bytes(model):
    """What the graph of one pass keeps, without parameters."""
    kept = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(x):
        if x.data_ptr() not in own:
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layout = layout_of([[1] * 30])
        out = model.bert.encoder(hidden_of(layout).requires_grad_()[None], layout=layout).last_hidden_state
    assert out.requires_grad
    return sum(kept.values())


def test_checkpoint_keeps_less():
    plain, less = (saved_bytes(block_model(placement="pre", stream=stream)) for stream in ("plain", "checkpoint"))
    assert less < plain / 4


def test_deep_shrinks_what_writes_to_the_sum_as_gpt2_does():
    config = make_config(num_hidden_layers=8, initializer_range=0.02)
    models = []
    for initial in ("bert", "deep"):
        torch.manual_seed(0)
        models.append(PackedBertForPreTraining(make_config(**config.to_diff_dict(), block={"initial": initial})))
    plain, deep = (model.state_dict() for model in models)
    gpt2 = GPT2Model(GPT2Config(n_layer=8, n_embd=64, n_head=2, bos_token_id=1, eos_token_id=1, vocab_size=8))
    drawn = torch.cat([p.detach().flatten() for name, p in gpt2.named_parameters() if name.endswith("c_proj.weight")])
    for name, value in plain.items():
        is_output = "encoder.layer" in name and name.endswith("output.dense.weight")
        assert torch.equal(deep[name], value / math.sqrt(16) if is_output else value), name
        if is_output:
            assert float(deep[name].std()) == pytest.approx(float(drawn.std()), rel=0.1)


def test_deep_leaves_loaded_weights_alone(tmp_path):
    model = PackedBertForPreTraining(make_config(block={"initial": "deep", "placement": "pre"}))
    model.save_pretrained(tmp_path)
    again = PackedBertForPreTraining.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_shared_layer_is_the_same_layer_each_time():
    shared = block_model(layers=3, share_layers=True, placement="pre")
    apart = block_model(layers=3, placement="pre")
    weights = shared.state_dict()
    assert len(shared.bert.encoder.layer) == 1 and len(apart.bert.encoder.layer) == 3
    copies = {
        name: weights[".".join([*name.split(".")[:3], "0", *name.split(".")[4:]]) if ".layer." in name else name]
        for name in apart.state_dict()
    }
    apart.load_state_dict(copies)
    layout = layout_of(IDS)
    found, expected = (run_encoder(model, hidden_of(layout), layout) for model in (shared, apart))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for name, gradient in found[2].items():
        if name.startswith("layer.0."):
            parts = [expected[2][name.replace("layer.0.", f"layer.{i}.")] for i in range(3)]
            torch.testing.assert_close(gradient, sum(parts), rtol=1e-12, atol=1e-12)


# -- models and refusals ---------------------------------------------------------------------------------------------


def test_a_stock_model_is_unpadded_once():
    """BertForMaskedLM with a block gives what our model gives."""
    options = {"placement": "pre", "norm": "rms"}
    packed = block_model(**options).eval()
    stock = use_block(BertForMaskedLM(make_config()).double(), **options).eval()
    stock.load_state_dict(packed.state_dict(), strict=False)
    expected = packed(WORDS, SEQUENCE_IDS).prediction_logits
    found = stock(WORDS, sequence_ids=SEQUENCE_IDS).logits
    is_real = SEQUENCE_IDS > 0
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=1e-12)
    empty = stock(WORDS, sequence_ids=torch.zeros_like(SEQUENCE_IDS)).logits
    empty.sum().backward()
    assert torch.isfinite(empty).all() and all(
        parameter.grad is not None and torch.isfinite(parameter.grad).all()
        for name, parameter in stock.named_parameters()
        if "embeddings" not in name
    )


def test_options_that_are_left_out_stay():
    model = block_model(placement="pre")
    use_block(model, stream="checkpoint")
    assert model.bert.encoder.options == BlockOptions(placement="pre", stream="checkpoint")
    encoder = model.bert.encoder
    assert use_block(model).bert.encoder is encoder
    assert model.config.block == {"placement": "pre", "stream": "checkpoint"}


@pytest.mark.parametrize("norm", NORMS)
def test_a_second_call_keeps_all_weights(norm):
    model = block_model(placement="residual", norm=norm)
    before, expected = copy.deepcopy(model.state_dict()), step(model)
    use_block(model, stream="checkpoint")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_same_bits(step(model), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"placement": "prenorm"},
            "unknown placement 'prenorm'.*did you mean.*'pre'|unknown placement 'prenorm'.*post",
        ),
        ({"norms": "rms"}, "a block has no option norms='rms'.*did you mean 'norm'"),
        ({"norm": 1}, "norm"),
        ({"share_layers": "yes"}, "share_layers='yes' must be true or false"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"chunk_size": "64"}, "chunk_size='64'"),
    ],
)
def test_options_nobody_knows_are_refused(options, message):
    model = make_models()[1]
    with pytest.raises(ValueError, match=message):
        use_block(model, **options)
    assert type(model.bert.encoder) is BertEncoder


def test_models_of_another_kind_are_refused_by_name():
    from transformers import DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for model, name in (
        (RobertaModel(RobertaConfig(**sizes, intermediate_size=16)), r"RobertaModel \(roberta\)"),
        (DistilBertModel(DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2)), "DistilBertModel"),
    ):
        with pytest.raises(ValueError, match=name):
            use_block(model, placement="pre")
    with pytest.raises(ValueError, match=r"got a Sequential around a BertForMaskedLM.*before it is wrapped"):
        use_block(nn.Sequential(BertForMaskedLM(make_config())), placement="pre")
    with pytest.raises(ValueError, match="share_layers=False cannot part"):
        place_block(block_model(share_layers=True), BlockOptions())


@pytest.mark.parametrize("placement", ["pre", "residual"])
@pytest.mark.parametrize(("norm", "trained"), [("layer", "weight"), ("layer", "bias"), ("rms", "weight")])
def test_a_trained_norm_at_the_end_is_not_dropped(placement, norm, trained):
    model = use_block(make_models()[1], placement=placement, norm=norm)
    use_block(use_block(model, placement="post"), placement=placement)  # untrained, it starts anew
    encoder, other = model.bert.encoder, {"pre": "residual", "residual": "pre"}[placement]
    with torch.no_grad():
        getattr(encoder.LayerNorm, trained)[3] = 0.5
    message = f"placement='post' has no norm at the end.*the trained {trained} of that of placement='{placement}'"
    with pytest.raises(ValueError, match=message):
        use_block(model, placement="post")
    assert model.bert.encoder is encoder and model.config.block["placement"] == placement
    assert getattr(use_block(model, placement=other).bert.encoder.LayerNorm, trained)[3] == 0.5


def test_what_has_no_place_is_dropped_as_documented():
    model = block_model(layers=3)
    norm, first = model.bert.encoder.layer[0].output.LayerNorm, model.bert.encoder.layer[0]
    weight = norm.weight.detach().clone()
    assert norm.bias.any()
    use_block(use_block(model, norm="rms"), norm="layer")
    norm = model.bert.encoder.layer[0].output.LayerNorm
    assert torch.equal(norm.weight, weight) and not norm.bias.any()
    use_block(model, share_layers=True)
    assert len(model.bert.encoder.layer) == 1
    assert model.bert.encoder.layer[0].intermediate.dense.weight is first.intermediate.dense.weight


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs to know which tokens belong together"),
        ({"attention_mask": torch.ones_like(WORDS)}, "needs to know which tokens"),
        ({"sequence_ids": SEQUENCE_IDS, "output_hidden_states": True}, "output_hidden_states=True"),
    ],
)
def test_a_stock_model_says_what_it_needs(given, message):
    model = use_block(BertForMaskedLM(make_config()), placement="pre")
    assert isolate_sequences(model) is model
    with pytest.raises(ValueError, match=message):
        model(WORDS, **given)
