"""Heads that project the layer's input themselves: it reaches them in every model, and in every way to run one."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from attention_contract import (
    HEADS,
    WIDTH,
    by_sequence,
    check_broken_mate,
    check_contract,
    check_isolation,
    heads_input,
    hidden_of,
    layout_of,
    make,
    rows,
    run,
)
from count_waits import batch_of, counts, packs
from hypothesis import given, settings
from pretraining_models import MAX_LENGTH, make_config
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModel, BertForMaskedLM, BertForPreTraining, BertModel

from bert_pretrain import PackedBertForPreTraining
from bert_pretrain.attention import AttentionHead, attention_layers, load_attention, use_attention
from bert_pretrain.attention.heads.etc_stream import EtcStreamAttention
from bert_pretrain.attention.heads.longformer import LongformerAttention
from bert_pretrain.attention.parts.distances import by_distance, distance_scores
from bert_pretrain.attention.parts.projections import Projection
from collate import to_device

IDS = [[1] * 20 + [2] * 9 + [0] * 3 + [3] * 15 + [4], [1] * 7 + [2] * 38 + [0] * 3]


class OwnProjection(AttentionHead):
    """The mean over the sequence of a projection of its own; it keeps what it got."""

    needs_hidden = True

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.own = Projection(self.hidden_size, self.num_heads, self.head_width)
        self.got: list[torch.Tensor] = []

    def is_one_graph(self, layout):
        return True

    def attend(self, q_THK, k_THK, v_THK, layout, hidden_TD):
        if not torch.compiler.is_compiling():
            self.got.append(hidden_TD)
        x_THK = self.own(hidden_TD) + q_THK * 0.1 + k_THK * 0.1 + v_THK
        sums = x_THK.new_zeros(layout.num_sequences, *x_THK.shape[1:]).index_add(0, layout.sequence_of_token, x_THK)
        return (sums / layout.lengths.clamp(min=1)[:, None, None])[layout.sequence_of_token]


def project(linear, hidden, num_heads=2):
    return linear(hidden).unflatten(-1, (num_heads, -1))


def batch_for(ids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(ids)
    input_ids = torch.randint(5, 60, ids.shape, generator=generator)
    labels = torch.where((torch.arange(ids.shape[1]) % 3 == 0) & (ids > 0), input_ids, -100)
    return {"input_ids": input_ids, "sequence_ids": ids, "labels": labels}


def watch(model):
    """What the layers of a model get, in order."""
    seen = []
    for layer in attention_layers(model):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or [kwargs["hidden_states"]])[0]), with_kwargs=True
        )
    return seen


def test_our_model_hands_on_the_layers_input():
    torch.manual_seed(0)
    model = use_attention(PackedBertForPreTraining(make_config()).double(), OwnProjection)
    seen = watch(model)
    model(**batch_for(IDS)).loss.backward()
    got = [x for layer in attention_layers(model) for x in layer.attention_head.got]
    tokens = int((torch.tensor(IDS) > 0).sum())
    assert [x.shape for x in got] == [(tokens, 32)] * 2
    assert all(torch.equal(x, y.squeeze(0)) for x, y in zip(got, seen, strict=True))
    assert all(layer.attention_head.own.weight.grad.abs().max() > 0 for layer in attention_layers(model))


SMALL: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": MAX_LENGTH + 1, "initializer_range": 0.3}
SMALL |= {"pad_token_id": 0, "attention_probs_dropout_prob": 0.0}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    "roberta": SMALL,
    "roberta-prelayernorm": SMALL,
    "electra": SMALL | {"embedding_size": 12},
    "albert": SMALL | {"embedding_size": 12},  # one layer, run twice
    "distilbert": {
        "vocab_size": 60,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 32,
        "attention_dropout": 0.0,
    },
    "eurobert": SMALL | {"num_key_value_heads": 1, "head_dim": 12},  # heads are wider than the layer's input
    "modernbert": SMALL | {"layer_types": ["full_attention"] * 2, "attention_dropout": 0.0},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_stock_models_hand_on_real_tokens(name):
    torch.manual_seed(0)
    model = use_attention(AutoModel.from_config(AutoConfig.for_model(name, **ENCODERS[name])).double(), OwnProjection)
    layers, seen = attention_layers(model), watch(model)
    ids = torch.tensor(IDS)
    hidden = model(torch.randint(5, 60, ids.shape), sequence_ids=ids).last_hidden_state
    got = [x for layer in layers for x in layer.attention_head.got]
    assert len(got) == 2 and all(torch.equal(x, y[ids > 0]) for x, y in zip(got, seen, strict=True))
    hidden[ids > 0].square().sum().backward()
    assert all(layer.attention_head.own.weight.grad.abs().max() > 0 for layer in layers)


@pytest.mark.parametrize("name", ["bert", "eurobert"])
@pytest.mark.parametrize(
    "build", [OwnProjection, partial(LongformerAttention, window=3, projections="own"), EtcStreamAttention]
)
def test_a_stock_model_keeps_sequences_apart(name, build):
    torch.manual_seed(0)
    model = use_attention(AutoModel.from_config(AutoConfig.for_model(name, **ENCODERS[name])).double().eval(), build)
    ids = torch.tensor(IDS)
    input_ids = torch.randint(5, 60, ids.shape)
    packed = model(input_ids, sequence_ids=ids).last_hidden_state
    for row, number in ((0, 1), (0, 2), (1, 2)):
        mine = ids[row] == number
        alone = model(input_ids[row, mine][None], sequence_ids=torch.ones_like(ids[row, mine])[None])
        torch.testing.assert_close(packed[row, mine], alone.last_hidden_state[0], rtol=0, atol=1e-12)
    changed = model(torch.where(ids == 1, input_ids.flip(1), input_ids), sequence_ids=ids).last_hidden_state
    assert torch.equal(changed[ids == 2], packed[ids == 2]) and not torch.equal(changed[ids == 1], packed[ids == 1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    torch.manual_seed(0)
    plain = use_attention(
        PackedBertForPreTraining(make_config(hidden_dropout_prob=0.1)).double(), OwnProjection
    ).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        model(**batch_for(IDS)).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad)), name


GRAPHS = {
    "own projection": OwnProjection,
    "longformer": partial(LongformerAttention, window=3, projections="own"),
    "etc_stream": partial(EtcStreamAttention, window=3, global_tokens=2),
}


@pytest.mark.parametrize("name", ["own projection", pytest.param("etc_stream", marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
def test_one_graph(name):
    """The encoder compiles without a break, and computes the same on batches of other sizes."""
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    config = make_config(max_position_embeddings=256, num_hidden_layers=1)
    eager = use_attention(PackedBertForPreTraining(config).double(), GRAPHS[name])
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="eager")
    for number in range(3):
        torch.manual_seed(number)
        ids = packs(3 + 2 * number)[torch.randperm(18)[:4]]
        batch = to_device(batch_of(ids), "cpu", by_slots=True)
        batch["input_ids"] %= 60
        batch["labels"] = torch.where(batch["labels"] > 0, batch["labels"] % 60, -100)
        losses = []
        for model in (eager, compiled):
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
        for (key, a), b in zip(eager.named_parameters(), compiled.named_parameters(), strict=True):
            torch.testing.assert_close(b[1].grad, a.grad, rtol=0, atol=1e-11, msg=key)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 3


def test_autocast():
    torch.manual_seed(0)
    model = use_attention(PackedBertForPreTraining(make_config()), OwnProjection)
    plain = model(**batch_for(IDS)).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_for(IDS)).loss
    loss.backward()
    got = [layer.attention_head.got[-1] for layer in attention_layers(model)]
    assert {x.dtype for x in got} == {torch.bfloat16} and abs(loss.item() - plain) < 0.05 * plain
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("build", GRAPHS.values(), ids=GRAPHS)
def test_a_batch_without_tokens_has_gradients_of_0(build):
    torch.manual_seed(0)
    for model in (PackedBertForPreTraining(make_config()), BertForMaskedLM(make_config())):
        use_attention(model, build)
        batch = batch_for([[0] * 8])
        output = (
            model(**batch)
            if isinstance(model, PackedBertForPreTraining)
            else model(batch["input_ids"], sequence_ids=batch["sequence_ids"])
        )
        total = output.loss if isinstance(model, PackedBertForPreTraining) else output.logits.sum() * 0
        total.backward()
        for layer in attention_layers(model):
            for name, parameter in layer.attention_head.named_parameters():
                assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_head_that_is_exchanged_gets_nothing_more():
    model = use_attention(BertModel(make_config()).double(), OwnProjection)
    old = [layer.attention_head for layer in attention_layers(model)]
    use_attention(model, OwnProjection)
    assert all(len(layer._forward_pre_hooks) == 1 for layer in attention_layers(model))
    use_attention(model, "sdpa")
    batch = batch_for(IDS)
    found = model(batch["input_ids"], sequence_ids=batch["sequence_ids"]).last_hidden_state
    expected = copy.deepcopy(model)
    for layer in attention_layers(expected):
        layer._forward_pre_hooks.clear()
    assert torch.equal(found, expected(batch["input_ids"], sequence_ids=batch["sequence_ids"]).last_hidden_state)
    assert not any(head.got for head in old)


def test_heads_that_do_not_need_it_have_no_hook():
    model = use_attention(BertModel(make_config()), "longformer")
    assert not any(layer._forward_pre_hooks for layer in attention_layers(model))


def test_a_model_can_be_copied_and_pickled():
    torch.manual_seed(0)
    model = use_attention(BertModel(make_config()).eval(), "etc_stream", window=3)
    batch = batch_for(IDS)
    expected = model(batch["input_ids"], sequence_ids=batch["sequence_ids"]).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = other(batch["input_ids"], sequence_ids=batch["sequence_ids"]).last_hidden_state
        assert torch.equal(found, expected)


def test_a_head_called_without_it_says_so():
    layout = layout_of([[1, 1, 2]])
    head = OwnProjection(num_heads=HEADS, head_width=WIDTH, max_sequence_length=8)
    with pytest.raises(ValueError, match=r"OwnProjection projects the input of its layer.*hidden_TD \(tokens, 16\)"):
        head(*heads_input(layout), layout)


class OtherKeys(AttentionHead):
    needs_hidden = takes_key_layout = True

    def attend_others(self, q_THK, k_THK, v_THK, layout, key_layout, dropout, hidden_TD):
        return q_THK + hidden_TD.unflatten(1, (self.num_heads, -1)) + k_THK.sum() + v_THK.sum()


def test_it_reaches_heads_whose_keys_are_others_too():
    layout, keys = layout_of([[1, 1, 2]]), layout_of([[1, 2]])
    query, *_ = heads_input(layout)
    _, key, value = heads_input(keys)
    head = OtherKeys(num_heads=HEADS, head_width=WIDTH, max_sequence_length=8)
    found = head(query, key, value, layout, key_layout=keys, hidden_TD=query.flatten(1))
    torch.testing.assert_close(found, 2 * query + key.sum() + value.sum())


class Relative(AttentionHead):
    """Transformer-XL's scores, (q + u) . k + (q + v) . W r(i - j), one sequence at a time: a head to come."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.u_HK, self.v_HK = (nn.Parameter(torch.randn(self.num_heads, self.head_width)) for _ in range(2))
        self.positions = Projection(self.hidden_size, self.num_heads, self.head_width)
        self.reset_parameters()

    def reset_parameters(self):
        torch.manual_seed(3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def attend(self, q_THK, k_THK, v_THK, layout):
        contexts = []
        for q, k, v in zip(*(x.split(layout.lengths.tolist()) for x in (q_THK, k_THK, v_THK)), strict=True):
            n = len(q)
            angles = torch.arange(1 - n, n, dtype=q.dtype)[:, None] * 0.1 ** torch.arange(
                self.hidden_size, dtype=q.dtype
            )
            table = self.positions(angles.sin()).transpose(0, 1)
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            scores = (q + self.u_HK[:, None]) @ k.transpose(1, 2) + distance_scores(q + self.v_HK[:, None], table)
            contexts.append(((scores * self.head_width**-0.5).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(contexts)


def test_a_head_of_relative_positions_fits():
    check_contract(Relative)


def test_distance_scores_are_those_of_each_pair():
    generator = torch.Generator().manual_seed(0)
    for rows_, keys in ((1, 5), (3, 3), (4, 9), (6, 2)):
        query = torch.randn(2, rows_, 8, generator=generator, dtype=torch.float64)
        table = torch.randn(2, rows_ + keys - 1, 8, generator=generator, dtype=torch.float64)
        found = distance_scores(query, table)
        assert found.shape == (2, rows_, keys)
        for c in range(rows_):
            for m in range(keys):
                expected = (query[:, c] * table[:, m - c + rows_ - 1]).sum(-1)
                torch.testing.assert_close(found[:, c, m], expected, rtol=0, atol=1e-12)


def test_far_distances_share_a_vector():
    labels = torch.arange(5.0)[:, None, None]  # of -2 to 2
    for low, high in ((-4, 3), (-1, 1), (0, 0), (-2, 6), (-9, 0)):
        found = by_distance(labels, low, high).flatten().tolist()
        assert found == [min(max(d, -2), 2) + 2 for d in range(low, high + 1)]


# Longformer's global projections

OWN = {
    "window 4": partial(LongformerAttention, window=4, projections="own"),
    "3 global": partial(LongformerAttention, window=2, global_tokens=3, projections="own"),
}


def own_longformer(width=32, **options):
    """A head of a BERT with 2 heads, and a layer of transformers' Longformer with the same weights."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=width, num_attention_heads=2, attention_window=[8], attention_probs_dropout_prob=0
    )
    stock = LongformerSelfAttention(config, layer_id=0).double().eval()
    head = LongformerAttention(2, width // 2, 64, window=4, projections="own", **options).double()
    head.load_state_dict({name: x for name, x in stock.state_dict().items() if "global" in name})
    return head, stock


def by_stock(stock, hidden, number):
    """Of one sequence (n, D): padded to whole windows, its first tokens global."""
    n = len(hidden)
    slots = -(-n // 8) * 8
    place = torch.arange(slots)[None]
    mask = torch.where(place < number, 10000.0, torch.where(place < n, 0.0, -10000.0)).double()
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, slots - n))
    return stock(hidden[None], mask, place >= n, place < number, True)[0][0, :n]


def test_own_projections_are_those_of_transformers():
    """Packed, beside stock LongformerSelfAttention on each sequence alone: it takes its softmax in float32."""
    head, stock = own_longformer(global_tokens=2)
    layout = layout_of([[1] * 21 + [2] * 2 + [0] + [3] * 40, [0] * 3 + [1] * 16 + [2] * 45])
    hidden = torch.randn(layout.num_tokens, 32, dtype=torch.float64)
    projected = [project(linear, hidden, 2) for linear in (stock.query, stock.key, stock.value)]
    with torch.no_grad():
        found = head(*projected, layout, hidden_TD=hidden).flatten(1)
        expected = by_sequence(lambda x: by_stock(stock, x, min(2, len(x))), layout, hidden)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        shared = LongformerAttention(2, 16, 64, window=4, global_tokens=2).double()(*projected, layout).flatten(1)
        assert (shared - expected).abs().max() > 0.1


def test_the_gradients_are_those_of_transformers():
    head, stock = own_longformer()
    layout = layout_of([[1] * 21 + [2] * 40])
    weights = torch.randn(61, 32, dtype=torch.float64)
    gradients = []
    for attend in (
        lambda x: head(*(project(y, x, 2) for y in (stock.query, stock.key, stock.value)), layout, hidden_TD=x).flatten(
            1
        ),
        lambda x: by_sequence(lambda y: by_stock(stock, y, 1), layout, x),
    ):
        torch.manual_seed(1)
        hidden = torch.randn(61, 32, dtype=torch.float64, requires_grad=True)
        (attend(hidden) * weights).sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    for name, parameter in head.named_parameters():
        theirs = dict(stock.named_parameters())[name].grad
        torch.testing.assert_close(parameter.grad, theirs, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["query_global", "key_global", "value_global"])
def test_without_one_projection_it_would_differ(name):
    head, stock = own_longformer()
    hidden = torch.randn(24, 32, dtype=torch.float64)
    projected = [project(linear, hidden, 2) for linear in (stock.query, stock.key, stock.value)]
    layout = layout_of([[1] * 24])
    with torch.no_grad():
        getattr(head, name).weight.mul_(-1)
        found = head(*projected, layout, hidden_TD=hidden).flatten(1)
        assert (found - by_stock(stock, hidden, 1)).abs()[0].max() > 0.01


@pytest.mark.parametrize("name", ["longformer", "etc_stream"])
def test_a_stock_checkpoint_starts_as_with_shared_projections(name, tmp_path):
    """The head's projections are copies of the layer's; labels of distances are the only other thing that is new."""
    torch.manual_seed(0)
    BertForPreTraining(make_config()).save_pretrained(tmp_path / "stock")
    options = {"projections": "own"} if name == "longformer" else {}
    ours = {"packed_attention": name, "packed_attention_options": {"window": 3} | options}
    loaded = PackedBertForPreTraining.from_pretrained(tmp_path / "stock", config=make_config(**ours)).double()
    attached = use_attention(
        PackedBertForPreTraining.from_pretrained(tmp_path / "stock"), name, window=3, **options
    ).double()
    shared = use_attention(copy.deepcopy(attached), "longformer", window=3)
    expected = shared(**batch_for(IDS)).loss
    for model in (loaded, attached):
        for layer in attention_layers(model):
            for own, labels in layer.attention_head.named_parameters():
                if own.startswith("labels"):
                    labels.data.zero_()
        torch.testing.assert_close(model(**batch_for(IDS)).loss, expected, rtol=0, atol=1e-12)
    other = copy.deepcopy(loaded)
    for layer in attention_layers(other):
        max(layer.attention_head.parameters(), key=torch.numel).data.mul_(-1)
    other.save_pretrained(tmp_path / "own")
    again = PackedBertForPreTraining.from_pretrained(tmp_path / "own", dtype=torch.float64)  # and not copies again
    torch.testing.assert_close(again(**batch_for(IDS)).loss, other(**batch_for(IDS)).loss, rtol=0, atol=1e-12)
    assert abs((other(**batch_for(IDS)).loss - expected).item()) > 1e-6


@pytest.mark.parametrize("name", ["longformer", "etc_stream"])
def test_a_stock_model_comes_back_with_its_projections(name, tmp_path):
    torch.manual_seed(0)
    options = {"window": 3} | ({"projections": "own"} if name == "longformer" else {})
    model = use_attention(BertForMaskedLM(make_config()).double().eval(), name, **options)
    for layer in attention_layers(model):
        max(layer.attention_head.parameters(), key=torch.numel).data.mul_(-1)
    batch = batch_for(IDS)
    expected = model(batch["input_ids"], sequence_ids=batch["sequence_ids"]).logits
    model.save_pretrained(tmp_path)
    again = load_attention(BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64), tmp_path).eval()
    found = again(batch["input_ids"], sequence_ids=batch["sequence_ids"]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# ETC's stream

STREAMS = {
    "one global": partial(EtcStreamAttention, window=3),
    "5 global": partial(EtcStreamAttention, window=2, global_tokens=5, max_distance=3),
    "one distance": partial(EtcStreamAttention, window=20, global_tokens=2, max_distance=0),
}


def etc_twin(head):
    """The paper's equations for one sequence, pair by pair."""
    o, heads = head.options, head.num_heads
    number, far = o.global_tokens, o.max_distance

    def attend(query, key, value, hidden):
        n = len(query)
        q_g, k_gg, v_gg, k_lg, v_lg = (
            (hidden @ head.of_global.weight.T + head.of_global.bias).view(n, 5, heads, -1).unbind(1)
        )
        k_gl, v_gl = (hidden @ head.of_long.weight.T + head.of_long.bias).view(n, 2, heads, -1).unbind(1)

        def is_own(global_, long):
            return (long - number) * number // max(n - number, 1) == global_

        def pair(i, j, h):
            """(score, value) of query i and key j; None: not seen."""
            near = min(max(j - i, -far), far) + far
            if i < number and j < number:
                q, k, v, a = q_g, k_gg, v_gg, head.labels_gg[near]
            elif i < number:
                q, k, v, a = q_g, k_gl, v_gl, head.labels_gl[int(is_own(i, j))]
            elif j < number:
                q, k, v, a = query, k_lg, v_lg, head.labels_lg[int(is_own(j, i))]
            elif abs(i - j) <= o.window:
                q, k, v, a = query, key, value, head.labels_ll[near]
            else:
                return None
            return q[i, h] @ (k[j, h] + a[h]) / query.shape[2] ** 0.5, v[j, h]

        def context(i, h):
            scores, values = zip(*filter(None, (pair(i, j, h) for j in range(n))), strict=True)
            return torch.stack(scores).softmax(0) @ torch.stack(values)

        return torch.stack([torch.stack([context(i, h) for h in range(heads)]) for i in range(n)])

    return attend


@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_is_the_papers(name):
    """Values and gradients, of sequences shorter and longer than the global tokens and the window."""
    head = make(STREAMS[name])
    for labels in (head.labels_gg, head.labels_ll, head.labels_gl, head.labels_lg):
        labels.data.mul_(50)  # as large as keys
    layout = layout_of([[1] * 25 + [2] * 2 + [0] + [3] * 7, [1] * 1 + [2] * 19 + [0] * 15])
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    found = run(head, layout, inputs, weights)
    leaves = [x.clone().requires_grad_() for x in inputs]
    head.zero_grad()
    twin = by_sequence(etc_twin(head), layout, *leaves, hidden_of(*leaves))
    (twin * weights).sum().backward()
    of_twin = {"context": twin.detach(), **{f"gradient {i}": x.grad for i, x in enumerate(leaves)}}
    of_twin |= {f"parameter {name}": x.grad for name, x in head.named_parameters()}
    for key, value in found.items():
        torch.testing.assert_close(value, of_twin[key], rtol=1e-11, atol=1e-11, msg=key)


def test_without_labels_and_pieces_it_is_longformer():
    longformer, stock = own_longformer(global_tokens=3)
    stream = EtcStreamAttention(2, 16, 64, window=4, global_tokens=3).double()
    own = [longformer.query_global, longformer.key_global, longformer.value_global]
    for x in ("weight", "bias"):
        getattr(stream.of_global, x).data = torch.cat([getattr(y, x) for y in (*own, stock.key, stock.value)]).detach()
        getattr(stream.of_long, x).data = torch.cat([getattr(y, x) for y in own[1:]]).detach()
    for name, labels in stream.named_parameters():
        if name.startswith("labels"):
            labels.data.zero_()
    layout = layout_of([[1] * 33 + [2] + [3] * 30, [1] * 5 + [0] * 20 + [2] * 39])
    hidden = torch.randn(layout.num_tokens, 32, dtype=torch.float64)
    projected = [project(linear, hidden, 2) for linear in (stock.query, stock.key, stock.value)]
    found, expected = (head(*projected, layout, hidden_TD=hidden) for head in (stream, longformer))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_global_tokens_last_from_layer_to_layer():
    """After one layer a far token's change has reached [CLS], after two all tokens, with a window of 1."""
    torch.manual_seed(0)
    model = use_attention(BertModel(make_config()).double().eval(), "etc_stream", window=1)
    ids = torch.tensor([[1] * 40])
    input_ids = torch.randint(5, 60, ids.shape)
    other = input_ids.clone()
    other[0, 39] += 1
    first, second = (model(x, sequence_ids=ids, output_hidden_states=True).hidden_states for x in (input_ids, other))
    moved = [((a - b)[0].abs().amax(-1) > 1e-9).tolist() for a, b in zip(first, second, strict=True)]
    assert moved[1] == [True] + [False] * 37 + [True] * 2 and all(moved[2])


# The contract, and what a GPU would wait for

OWN_PROJECTIONS = {**OWN, **STREAMS}
MIXED = [[1] * 130 + [2] * 5 + [3] * 31, [0] * 2 + [1] + [2] * 125 + [3] * 38]  # some whole, some by chunks


@pytest.mark.parametrize("name", OWN_PROJECTIONS)
def test_contract(name):
    check_contract(OWN_PROJECTIONS[name])
    check_isolation(OWN_PROJECTIONS[name], MIXED)
    check_broken_mate(OWN_PROJECTIONS[name], MIXED)


@pytest.mark.parametrize("name", OWN_PROJECTIONS)
@settings(max_examples=15)
@given(rows(40))
def test_isolation_of_any_layout(name, ids):
    check_isolation(OWN_PROJECTIONS[name], ids)


def test_dropout_keeps_the_mean():
    for build in OWN_PROJECTIONS.values():
        head, layout = make(build), layout_of([[1] * 20 + [2] * 9])
        inputs = [x / 3 for x in heads_input(layout)]
        with torch.no_grad():
            torch.manual_seed(0)
            dropped = torch.stack([head(*inputs, layout, dropout=0.2) for _ in range(300)]).mean(0)
            assert (dropped - head(*inputs, layout)).abs().max() < 0.25


def test_own_projections_make_nobody_wait():
    found = [counts("longformer", distinct, projections="own") for distinct in (10, 32)]
    assert [each.waits + each.waits_a_layer for each in found] == [0, 0] and not found[0].mixed
    assert found[0].launches_with(12) == found[1].launches_with(12) < 2400  # the others of a window have half of that


def test_refusals():
    for build, message in [
        (
            partial(LongformerAttention, projections="copied"),
            "projections='copied' is unknown; choose from shared, own",
        ),
        (
            partial(EtcStreamAttention, global_tokens=0),
            "global_tokens=0 .*; without global tokens take local attention",
        ),
        (partial(EtcStreamAttention, max_distance=-1), "max_distance=-1 must be a whole number, at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(num_heads=2, head_width=8, max_sequence_length=64)
