"""clustered: attention of clusters of queries, beside a slow twin and pytorch-fast-transformers."""

from functools import partial
from unittest import mock

import attention_contract as contract
import pytest
import torch
from attention_contract import by_sequence, heads_input, layout_of, leak, make, run
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_attention import NOT_INSTALLED

from bert_pretrain.attention.heads import clustered
from bert_pretrain.attention.heads.clustered import ClusteredAttention, query_blocks
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from bert_pretrain.attention.parts.choices import recording, replaying
from collate.layout import PackLayout, SlotLayout

BUILDS = {
    "default": ClusteredAttention,
    "few keys": partial(ClusteredAttention, num_clusters=3, top_keys=4, bits=16),
    "one key": partial(ClusteredAttention, top_keys=1, iterations=3),
    "plain": partial(ClusteredAttention, top_keys=0),
    "plain, 3 clusters": partial(ClusteredAttention, num_clusters=3, top_keys=0, bits=16),
    "one bit": partial(ClusteredAttention, num_clusters=4, top_keys=2, bits=1),  # equal distances everywhere
    "first centroids": partial(ClusteredAttention, num_clusters=4, top_keys=3, iterations=0),
}
every_head = pytest.mark.parametrize("name", BUILDS)
every_execution = pytest.mark.parametrize("widest_mask", [256, 0], ids=["mask", "blocks"])


def executing(widest_mask):
    """Queries of short sequences attend to top keys under a mask, those of long ones in blocks."""
    return mock.patch.object(clustered, "WIDEST_MASK", widest_mask)


def one_sequence(n):
    return layout_of([[1] * n])


# The contract


@every_execution
@every_head
def test_contract(name, widest_mask):
    """In bfloat16 a query may fall into another cluster."""
    with executing(widest_mask):
        contract.check_contract(BUILDS[name], bfloat16=10)


@every_execution
@every_head
@settings(max_examples=12)
@given(contract.rows(max_length=40))
def test_packed_equals_alone_in_any_layout(name, widest_mask, ids):
    with executing(widest_mask):
        contract.check_isolation(BUILDS[name], ids)


@pytest.mark.long
@every_execution
@every_head
@settings(max_examples=300)
@given(contract.rows(max_length=60))
def test_packed_equals_alone_in_any_layout_long(name, widest_mask, ids):
    with executing(widest_mask):
        contract.check_isolation(BUILDS[name], ids)


@every_head
def test_slots_of_padding_change_nothing_in_blocks(name):
    """Groups are wider there, and padding is a cluster more."""
    ids = torch.tensor([[1] * 60 + [2] * 9 + [0] * 19, [1] * 40 + [2] * 41 + [0] * 7])
    exact, slots = PackLayout(ids), SlotLayout(ids, sequence_slots=4)
    inputs, weights = heads_input(exact), heads_input(exact, 1)[0]
    by_slots = [exact.pad(x).flatten(0, 1) for x in (*inputs, weights)]
    head = make(BUILDS[name])
    with executing(0):
        expected = run(head, exact, inputs, weights)
        found = run(head, slots, by_slots[:3], by_slots[3])
    contract.assert_equal(contract.of_tokens(found, slots.is_real_token), expected)


# The slow twin: the paper's equations for one sequence, query by query


def clusters_of(codes, number, iterations):
    """Lists of signs -> the cluster of each: k-means by counting bits."""
    n = len(codes)
    centroids = [codes[j * n // number] for j in range(number)]

    def nearest(code):
        return max(range(number), key=lambda j: (sum(a == b for a, b in zip(code, centroids[j], strict=True)), -j))

    for _ in range(iterations):
        clusters = [nearest(code) for code in codes]
        for j in range(number):
            own = [code for code, cluster in zip(codes, clusters, strict=True) if cluster == j]
            votes = [sum(bits) for bits in zip(*own, strict=True)]
            for b, vote in enumerate(votes):
                if vote:
                    centroids[j] = [*centroids[j][:b], 1 if vote > 0 else -1, *centroids[j][b + 1 :]]
    return [nearest(code) for code in codes]


def clustered_twin(head, query_nHK, key_nHK, value_nHK, constant_share=False):
    """constant_share: the share of the top keys has no gradient."""
    options, (n, heads, width) = head.options, query_nHK.shape
    number = min(options.num_clusters or round(n**0.5), n)
    contexts = []
    for h in range(heads):
        query, key, value = query_nHK[:, h], key_nHK[:, h], value_nHK[:, h]
        codes = [[1 if x >= 0 else -1 for x in row] for row in (query @ head.rotation).tolist()]
        clusters = clusters_of(codes, number, options.iterations)
        rows = []
        for i, cluster in enumerate(clusters):
            mean = query[[j for j in range(n) if clusters[j] == cluster]].mean(0)
            weights = (key @ mean / width**0.5).softmax(0)
            best = (key @ mean).argsort(descending=True)[: options.top_keys].tolist()
            rest = [j for j in range(n) if j not in best]
            context = weights[rest] @ value[rest]
            if best:
                share = weights[best].sum()
                share = share.detach() if constant_share else share
                context = context + share * (key[best] @ query[i] / width**0.5).softmax(0) @ value[best]
            rows.append(context)
        contexts.append(torch.stack(rows))
    return torch.stack(contexts, dim=1)


@every_execution
@every_head
def test_equals_the_slow_twin(name, widest_mask):
    layout = layout_of([[1] * 7 + [0] * 2 + [2] * 47 + [3] * 4, [0] * 3 + [1] + [2] * 54 + [3] * 2])
    head, inputs, weights = make(BUILDS[name]), heads_input(layout), heads_input(layout, 1)[0]
    leaves = [x.clone().requires_grad_() for x in inputs]
    twin = by_sequence(partial(clustered_twin, head), layout, *leaves)
    gradients = torch.autograd.grad((twin * weights).sum(), leaves)
    expected = {"context": twin.detach()} | {f"gradient {i}": x for i, x in enumerate(gradients)}
    with executing(widest_mask):
        contract.assert_equal(run(head, layout, inputs, weights), expected, 1e-11)


# Limits


def test_with_as_many_top_keys_as_tokens_it_is_exact():
    layout = layout_of([[1] * 32 + [2] * 5 + [0] + [3] * 14])
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    expected = run(make(SdpaAttention), layout, inputs, weights)
    contract.assert_equal(run(make(ClusteredAttention, top_keys=32), layout, inputs, weights), expected)
    with pytest.raises(AssertionError):
        contract.assert_equal(run(make(ClusteredAttention, top_keys=8), layout, inputs, weights), expected)


def test_with_a_cluster_for_each_code_plain_attention_is_exact():
    layout = one_sequence(40)
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    head = make(ClusteredAttention, num_clusters=64, top_keys=0, bits=200)
    codes = (inputs[0] @ head.rotation >= 0).transpose(0, 1)
    assert all(len(own.unique(dim=0)) == 40 for own in codes)
    contract.assert_equal(run(head, layout, inputs, weights), run(make(SdpaAttention), layout, inputs, weights), 1e-12)


def test_queries_of_a_cluster_share_their_attention():
    layout = one_sequence(40)
    query, key, value = heads_input(layout)
    head = make(ClusteredAttention, num_clusters=1, top_keys=0)
    mean = query.mean(0, keepdim=True).expand_as(query)
    torch.testing.assert_close(
        head(query, key, value, layout), make(SdpaAttention)(mean, key, value, layout), rtol=0, atol=1e-12
    )


def test_more_top_keys_come_nearer_to_exact_attention():
    layout = one_sequence(64)
    inputs = [x / 2 for x in heads_input(layout)]
    exact = make(SdpaAttention)(*inputs, layout)
    errors = [float((make(ClusteredAttention, top_keys=k)(*inputs, layout) - exact).norm()) for k in (0, 4, 16, 48)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2 * errors[0]


def test_blocks_hold_queries_of_one_cluster():
    cluster = torch.tensor([[[0, 1, 0, 1, 1, 2, 2, 3]]])  # 3 is padding
    slot, query, own = query_blocks(cluster, 3)
    held = [[0, 2, None], [1, 3, 4], [5, 6, None], [7, None, None]]
    assert own.flatten().tolist()[:4] == [0, 1, 2, 2] and query.shape[3] == 3
    for block, queries in enumerate(held):
        for place, i in enumerate(queries):
            if i is not None:
                assert query[0, 0, block, place] == i and slot[0, 0, i] == 3 * block + place


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_every_query_has_a_slot_of_its_own(clusters):
    """Whatever the clusters are, and however unequal, the blocks suffice."""
    slot, query, own = query_blocks(torch.tensor([[clusters]]), 5)
    slots = slot.flatten().tolist()
    assert len(set(slots)) == len(clusters) and max(slots) < query.numel()
    assert query.flatten()[slot.flatten()].tolist() == list(range(len(clusters)))
    size = query.shape[3]
    assert [int(own.flatten()[s // size]) for s in slots] == [min(c, 4) for c in clusters]


# K-means


def cost(head, layout, query):
    """How many bits all codes differ in from the majority of their cluster."""
    (group,) = head.groups(layout).groups
    codes = (query @ head.rotation >= 0).double().transpose(0, 1)
    clusters = head.cluster(query.transpose(0, 1)[None], group)[0]
    total = 0.0
    for own, cluster in zip(codes, clusters, strict=True):
        for j in cluster.unique():
            share = own[cluster == j].mean(0)
            total += float((torch.minimum(share, 1 - share) * (cluster == j).sum()).sum())
    return total


def test_no_step_makes_the_clusters_worse():
    layout = one_sequence(64)
    for seed in range(5):
        query = heads_input(layout, seed)[0]
        costs = [cost(make(ClusteredAttention, iterations=steps), layout, query) for steps in range(6)]
        assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def test_it_finds_clusters_that_are_there():
    """Four directions, and noise: no cluster holds queries of two."""
    layout, generator = one_sequence(64), torch.Generator().manual_seed(0)
    centers = torch.randn(4, contract.WIDTH, generator=generator, dtype=torch.float64)
    which = torch.arange(64) // 16
    noise = torch.randn(64, 2, contract.WIDTH, generator=generator, dtype=torch.float64)
    query = centers[which][:, None] + 0.05 * noise
    head = make(ClusteredAttention, num_clusters=4, bits=64)
    (group,) = head.groups(layout).groups
    for cluster in head.cluster(query.transpose(0, 1)[None], group)[0]:
        assert [len(which[cluster == j].unique()) for j in range(4)] == [1] * 4


def test_the_number_of_clusters_follows_from_a_sequences_own_length():
    head, limited = make(ClusteredAttention), make(ClusteredAttention, num_clusters=5)
    assert [head.num_clusters(n) for n in (1, 2, 16, 100, 512)] == [1, 1, 4, 10, 23]
    assert [limited.num_clusters(n) for n in (1, 3, 5, 512)] == [1, 3, 5, 5]
    layout = layout_of([[1] * 16 + [2] * 9, [1] * 12 + [0] * 13])
    (group,) = head.groups(layout).groups
    used = group.preferred.isfinite().sum(-1).flatten().tolist()
    assert dict(zip(group.length.flatten().tolist(), used, strict=True)) == {16: 4, 9: 3, 12: 3}


def test_a_layer_draws_its_own_rotation():
    drawn = [make(ClusteredAttention, layer_index=i, seed=s).rotation for i, s in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert (drawn[0] == drawn[3]).all() and all((drawn[0] != other).any() for other in drawn[1:3])


# Choices


@every_head
def test_recorded_choices_serve_inputs_that_differ_in_the_last_bits(name):
    """What is computed again from nearly the same inputs has the same clusters and top keys."""
    head, layout = make(BUILDS[name]), layout_of(contract.LAYOUTS["long and short"])
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]
    others = heads_input(layout, 5)
    with recording() as choices:
        expected = run(head, layout, inputs, weights)
    with recording() as of_others:
        run(head, layout, others, weights)
    assert any((x != y).any() for x, y in zip(choices, of_others, strict=True))
    with replaying(choices):
        contract.assert_equal(run(head, layout, [x * (1 + 1e-13) for x in inputs], weights), expected, 1e-10)
    with replaying(of_others), pytest.raises(AssertionError):
        contract.assert_equal(run(head, layout, inputs, weights), expected, 1e-10)


# The public implementation. It groups queries by random draws, so it gets the clusters of the head.


def public_clustered(head):
    """q, k, v (n, H, K) -> (n, H, K) of one sequence, in float32."""
    package = pytest.importorskip("fast_transformers.attention", reason=NOT_INSTALLED)
    masking = pytest.importorskip("fast_transformers.masking", reason=NOT_INSTALLED)
    options = head.options
    kind = package.ImprovedClusteredAttention if options.top_keys else package.ClusteredAttention
    more = {"topk": options.top_keys} if options.top_keys else {}

    def attend(query_THK, key_THK, value_THK, *_):
        n = len(query_THK)
        layout = one_sequence(n)
        (group,) = head.groups(layout).groups
        cluster = head.cluster(query_THK.double().transpose(0, 1)[None], group)[:, :, :n].int()
        number = head.num_clusters(n)
        counts = torch.stack([(cluster == j).sum(-1) for j in range(number)], -1).int()
        module = kind(number, attention_dropout=0.0, **more).eval()
        lengths = masking.LengthMask(torch.tensor([n]))
        with mock.patch(f"{kind.__module__}.cluster", lambda *_, **__: (cluster, counts)):
            inputs = (x.float()[None] for x in (query_THK, key_THK, value_THK))
            return module(*inputs, masking.FullMask(n), lengths, lengths)[0].double()

    return attend


@pytest.mark.long
@pytest.mark.parametrize("name", ["few keys", "default", "plain", "plain, 3 clusters"])
def test_equals_fast_transformers(name):
    """It computes in float32, and leaks where packs are not cut apart.

    In its gradients the share of the top keys is a constant, which ours is not. So those of queries and keys are
    compared with a twin that does the same.
    """
    head, layout = make(BUILDS[name]), one_sequence(48)
    public, twin = public_clustered(head), partial(clustered_twin, head, constant_share=True)
    inputs = [(x / 3).requires_grad_() for x in heads_input(layout)]
    weights = heads_input(layout, 1)[0]

    def values_and_gradients(attend):
        context = attend(*inputs)
        return [context, *torch.autograd.grad((context * weights).sum(), inputs)]

    own, expected = (values_and_gradients(x) for x in (lambda *x: head(*x, layout), public))
    compared = values_and_gradients(twin) if head.options.top_keys else own
    compared[0], compared[-1] = own[0], own[-1]
    for found, theirs in zip(compared, expected, strict=True):
        torch.testing.assert_close(found, theirs, rtol=0, atol=2e-5 * float(theirs.detach().abs().max()))
    assert leak(public, 24, 24) > 0.01
    assert leak(head, 24, 24) == 0
