"""persistent: exact attention with learned keys and values, in each of its executions, beside x-transformers."""

from functools import partial

import attention_contract as contract
import pytest
import torch
from attention_contract import HEADS, WIDTH, by_sequence, heads_input, layout_of, leak, make, run
from slow_attention import NOT_INSTALLED, set_weights

from bert_pretrain.attention.heads.persistent import Before, PersistentAttention, places_before
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from collate.layout import PackLayout, SlotLayout

BUILDS = {"three": partial(PersistentAttention, vectors=3), "one": partial(PersistentAttention, vectors=1)}
THREADS = {"one by one": 1, "grouped": 64}
every_execution = pytest.mark.parametrize("execution", THREADS)


@pytest.fixture
def threads(execution, monkeypatch):
    """With more threads than heads a CPU takes sequences of like length together."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: THREADS[execution])


@every_execution
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", BUILDS)
def test_contract(name, execution):
    contract.check_contract(BUILDS[name])


def persistent_twin(head, query_nHK, key_nHK, value_nHK):
    """One sequence: for each query one softmax over all keys."""
    contexts = []
    for h in range(query_nHK.shape[1]):
        key = torch.cat([key_nHK[:, h], head.key_HMK[h]])
        value = torch.cat([value_nHK[:, h], head.value_HMK[h]])
        rows = [(key @ query / len(query) ** 0.5).softmax(0) @ value for query in query_nHK[:, h]]
        contexts.append(torch.stack(rows))
    return torch.stack(contexts, dim=1)


class Twin(torch.nn.Module):
    """The slow twin as a head, with the same parameters."""

    def __init__(self, head):
        super().__init__()
        self.key_HMK, self.value_HMK = head.key_HMK, head.value_HMK

    def forward(self, query_THK, key_THK, value_THK, layout):
        return by_sequence(partial(persistent_twin, self), layout, query_THK, key_THK, value_THK)


@every_execution
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("ids", contract.LAYOUTS.values(), ids=contract.LAYOUTS)
def test_equals_the_slow_twin(ids, execution):
    head, layout = make(BUILDS["three"]), layout_of(ids)
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    contract.assert_equal(run(head, layout, inputs, weights), run(Twin(head), layout, inputs, weights), 1e-11)


@every_execution
@pytest.mark.usefixtures("threads")
def test_dropout_keeps_the_mean(execution):
    head, layout = make(BUILDS["three"]), layout_of([[1] * 20 + [2] * 9])
    inputs = [x / 3 for x in heads_input(layout)]
    with torch.no_grad():
        torch.manual_seed(0)
        dropped = torch.stack([head(*inputs, layout, dropout=0.2) for _ in range(300)])
        assert (dropped.mean(0) - head(*inputs, layout)).abs().max() < 0.25


def test_vectors_that_nobody_looks_at_change_nothing():
    """A negative control of the twin, too: with vectors that are seen, the context is another."""
    layout = layout_of(contract.LAYOUTS["long and short"])
    inputs, head = heads_input(layout), make(BUILDS["three"])
    exact = make(SdpaAttention)(*inputs, layout)
    assert (head(*inputs, layout) - exact).abs().max() > 0.1
    inputs[0][..., 0] = 1.0
    with torch.no_grad():
        head.key_HMK.zero_()[..., 0] = -1e4
        exact = make(SdpaAttention)(*inputs, layout)
        torch.testing.assert_close(head(*inputs, layout), exact, rtol=0, atol=1e-12)


def test_places():
    layout = SlotLayout(torch.tensor([[1, 1, 1, 2, 0]]), sequence_slots=3)
    vectors, tokens, is_real = places_before(layout, 2)
    assert vectors.tolist() == [[0, 1], [5, 6], [8, 9], [10, 11]]
    assert tokens.tolist() == [2, 3, 4, 7, 12]
    assert is_real.tolist() == [True, True, False, False]


def test_gradients_that_a_kernel_left_anywhere_do_not_count():
    """Nobody asks what stands before an empty sequence or padding; a kernel need not write a gradient there."""
    layout = SlotLayout(torch.tensor([[1, 1, 1, 2, 0]]), sequence_slots=3)
    vectors = torch.zeros(HEADS, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    tokens = torch.zeros(layout.num_tokens, HEADS, WIDTH, dtype=torch.float64, requires_grad=True)
    places = places_before(layout, 2)
    gradient = torch.ones(layout.num_tokens + 8, HEADS, WIDTH, dtype=torch.float64)
    gradient[places[0][~places[2]]] = torch.nan
    Before.apply(tokens, vectors, *places).backward(gradient)
    assert (vectors.grad == 2).all() and (tokens.grad == 1).all()
    real = PackLayout(layout.sequence_ids_BL)
    exact = tokens.detach()[: real.num_tokens].requires_grad_(), vectors.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, own: Before.apply(x, own, *places_before(real, 2)), exact)


# The public implementation


def public_all_attention(head):
    """q, k, v (n, H, K) -> (n, H, K) by x-transformers; its projections pick them out of one input."""
    package = pytest.importorskip("x_transformers.x_transformers", reason=NOT_INSTALLED)
    size = HEADS * WIDTH
    module = package.Attention(3 * size, dim_head=WIDTH, heads=HEADS, num_mem_kv=head.options.vectors, flash=False)
    module = module.double().eval()
    module.attend.attn_fn = partial(torch.softmax, dim=-1)  # its own is in float32
    pick = torch.eye(3 * size).split(size)
    for layer, weight in zip((module.to_q, module.to_k, module.to_v), pick, strict=True):
        set_weights(layer, weight)
    set_weights(module.to_out, torch.eye(3 * size, size))
    with torch.no_grad():
        module.mem_k.copy_(head.key_HMK)
        module.mem_v.copy_(head.value_HMK)

    def attend(query_THK, key_THK, value_THK, *_):
        x = torch.cat([x.flatten(1) for x in (query_THK, key_THK, value_THK)], dim=1)[None]
        return module(x)[0, :, :size].unflatten(1, query_THK.shape[1:])

    return attend


def test_equals_x_transformers():
    """And keeps apart what it does not."""
    head, layout = make(BUILDS["three"]), layout_of([[1] * 40])
    public = public_all_attention(head)
    inputs = [x.requires_grad_() for x in heads_input(layout)]
    weights = heads_input(layout, 1)[0]
    found, expected = head(*inputs, layout), public(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert leak(public, 20, 20) > 0.01
    assert leak(head, 20, 20) == 0
