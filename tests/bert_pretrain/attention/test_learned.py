"""lsh, routing, sinkhorn: attention whose pattern is learned or hashed, inside each sequence only."""

import copy
import math
import threading
from functools import partial
from unittest import mock

import attention_contract as contract
import pytest
import torch
import torch.distributed as dist
from attention_contract import by_sequence, heads_input, layout_of, leak, make
from hypothesis import given, settings
from process_group import process_group, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from bert_pretrain.attention import use_attention
from bert_pretrain.attention.heads import routing
from bert_pretrain.attention.heads.lsh import LSHAttention, num_buckets, sort_into_chunks
from bert_pretrain.attention.heads.routing import RoutingAttention, RoutingCallback, update_after_step
from bert_pretrain.attention.heads.sdpa import SdpaAttention
from bert_pretrain.attention.heads.sinkhorn import SinkhornAttention, sinkhorn

HEADS = {
    "lsh": LSHAttention,
    "lsh, small buckets": partial(LSHAttention, bucket_size=3, num_rounds=3),
    "lsh, one round": partial(LSHAttention, bucket_size=4, num_rounds=1),
    "lsh, duplicates count": partial(LSHAttention, bucket_size=3, num_rounds=3, duplicates="count"),
    "routing": RoutingAttention,
    "routing, 3 clusters": partial(RoutingAttention, num_clusters=3),
    "sinkhorn": SinkhornAttention,
    "sinkhorn, small blocks": partial(SinkhornAttention, block_size=5, noise=1.0),
    "sinkhorn, columns last": partial(SinkhornAttention, block_size=5, noise=1.0, normalized_last="columns"),
}
PATTERNS = ("lsh, small buckets", "routing", "routing, 3 clusters", "sinkhorn, small blocks")


def one_sequence(n):
    return layout_of([[1] * n])


def with_gradients(attend, inputs):
    """The context, and the gradients of a random functional of it."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    context = attend(*inputs)
    weights = torch.linspace(-1, 1, context.numel(), dtype=context.dtype).view_as(context).sin()
    return [context, *torch.autograd.grad((context * weights).sum(), inputs, materialize_grads=True)]


def assert_close(found, expected, tolerance=1e-12):
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


# The contract


@pytest.mark.parametrize("ids", contract.LAYOUTS.values(), ids=contract.LAYOUTS)
@pytest.mark.parametrize("name", HEADS)
def test_packed_equals_alone(name, ids):
    contract.check_isolation(HEADS[name], ids)


@pytest.mark.parametrize("name", HEADS)
def test_the_rest_of_the_contract(name):
    contract.check_broken_mate(HEADS[name])
    contract.check_place(HEADS[name])
    contract.check_empty_batch(HEADS[name])
    contract.check_state(HEADS[name])


@pytest.mark.parametrize("name", HEADS)
def test_dtypes(name):
    """In bfloat16 a token may fall into another bucket, cluster or block; with only one of them, results stay near."""
    one_pattern = name in ("lsh", "sinkhorn")
    contract.check_dtypes(HEADS[name], ((torch.float32, 1e-4), (torch.bfloat16, 0.15 if one_pattern else 10)))


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=12)
@given(contract.rows())
def test_packed_equals_alone_in_any_layout(name, ids):
    contract.check_isolation(HEADS[name], ids)


@pytest.mark.long
@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=300)
@given(contract.rows(max_length=60))
def test_packed_equals_alone_in_any_layout_long(name, ids):
    contract.check_isolation(HEADS[name], ids)


# Slow twins: the papers' equations, token by token


def lsh_twin(head, query_nHK, _, value_nHK):
    """One sequence. Lists instead of sorts, no padding; the chain of chunks closes by Python's index -1."""
    n, num_heads, width = query_nHK.shape
    size, columns = head.options.bucket_size, math.ceil(n / head.options.bucket_size / 2)
    contexts = []
    for h in range(num_heads):
        query, value = query_nHK[:, h], value_nHK[:, h]
        key = query / query.norm(dim=-1, keepdim=True)
        chain, where = [], []
        for r in range(head.options.num_rounds):
            rotated = query @ head.rotations[h, :, r, :columns]
            bucket = torch.cat([rotated, -rotated], dim=-1).argmax(-1).tolist()
            order = sorted(range(n), key=lambda i, bucket=bucket: (bucket[i], i))
            chunks = [order[i : i + size] for i in range(0, n, size)]
            where.append({i: len(chain) + c for c, chunk in enumerate(chunks) for i in chunk})
            chain += chunks
        for i in range(n):
            found, normalisers = [], []
            windows = [chain[where[r][i]] + chain[where[r][i] - 1] for r in range(head.options.num_rounds)]
            if head.options.duplicates == "union":
                windows = [sorted(set().union(*windows))]
            for seen in windows:
                scores = torch.stack([query[i] @ key[j] / width**0.5 for j in seen])
                scores = torch.where(torch.tensor(seen) == i, -5e4, scores)
                found.append(scores.softmax(0) @ value[seen])
                normalisers.append(scores.logsumexp(0))
            contexts.append(torch.stack(normalisers).softmax(0) @ torch.stack(found))
    return torch.stack(contexts).view(num_heads, n, width).transpose(0, 1)


def routing_twin(head, query_nHK, key_nHK, value_nHK):
    n, num_heads, width = query_nHK.shape
    num_clusters = min(head.options.num_clusters or round(n**0.5), n)
    window = math.ceil(n / num_clusters)
    contexts = []
    for h in range(num_heads):
        query, key, value = query_nHK[:, h], key_nHK[:, h], value_nHK[:, h]
        found = [[] for _ in range(n)]
        for centroid in head.centroids_HCK[h, :num_clusters]:
            queries, keys = (
                ((x / x.norm(dim=-1, keepdim=True)) @ centroid).argsort(descending=True)[:window] for x in (query, key)
            )
            for i in queries.tolist():
                found[i].append((key[keys] @ query[i] / width**0.5).softmax(0) @ value[keys])
        contexts.append(torch.stack([sum(f) / len(f) if f else torch.zeros_like(value[0]) for f in found]))
    return torch.stack(contexts, dim=1)


def sinkhorn_twin(head, query_nHK, key_nHK, value_nHK):
    n, num_heads, width = query_nHK.shape
    size = head.options.block_size
    blocks = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
    contexts = []
    for h in range(num_heads):
        query, key, value = query_nHK[:, h], key_nHK[:, h], value_nHK[:, h]
        sums = torch.stack([torch.cat([query[b].sum(0), key[b].sum(0)]) for b in blocks])
        logits = ((sums @ head.sort_weight[h, :, : len(blocks)]).relu() + 1e-6).log()
        if head.options.noise:
            logits = logits + head.noise[h, : len(blocks), : len(blocks)]
        matrix = (logits / head.options.temperature).exp()
        published = head.options.normalized_last == "columns"
        for _ in range(head.options.num_iterations):
            for dimension in (1, 0) if published else (0, 1):
                matrix = matrix / matrix.sum(dimension, keepdim=True)
        for u, block in enumerate(blocks):
            whole = len(blocks[int(matrix[u].argmax())])
            slots = range(min(whole, size))
            there = [[v for v, b in enumerate(blocks) if t < len(b)] for t in slots]
            shares = [1 if published else sum(matrix[u, v] for v in own) for own in there]
            mixed = [
                [sum(matrix[u, v] * x[blocks[v][t]] for v in there[t]) / shares[t] for t in slots] for x in (key, value)
            ]
            keys, values = (torch.cat([torch.stack(m), x[block]]) for m, x in zip(mixed, (key, value), strict=True))
            contexts += [(keys @ query[i] / width**0.5).softmax(0) @ values for i in block]
    return torch.stack(contexts).view(num_heads, n, width).transpose(0, 1)


TWINS = {
    "lsh": (LSHAttention, lsh_twin),
    "lsh, small buckets": (HEADS["lsh, small buckets"], lsh_twin),
    "lsh, one round": (HEADS["lsh, one round"], lsh_twin),
    "lsh, duplicates count": (HEADS["lsh, duplicates count"], lsh_twin),
    "lsh, many rounds": (partial(LSHAttention, bucket_size=2, num_rounds=6), lsh_twin),
    "routing": (RoutingAttention, routing_twin),
    "routing, 3 clusters": (HEADS["routing, 3 clusters"], routing_twin),
    "sinkhorn, small blocks": (HEADS["sinkhorn, small blocks"], sinkhorn_twin),
    "sinkhorn, columns last": (HEADS["sinkhorn, columns last"], sinkhorn_twin),
    "sinkhorn, blocks of 3": (partial(SinkhornAttention, block_size=3, num_iterations=3), sinkhorn_twin),
}


@pytest.mark.parametrize("name", TWINS)
def test_equals_the_slow_twin(name):
    build, twin = TWINS[name]
    layout = layout_of([[1] * 7 + [0] * 2 + [2] * 17 + [3] * 4, [0] * 3 + [1] + [2] * 24 + [3] * 2])
    head, inputs = make(build), heads_input(layout)
    expected = with_gradients(lambda *x: by_sequence(partial(twin, head), layout, *x), inputs)
    assert_close(with_gradients(lambda *x: head(*x, layout), inputs), expected)


# Limits in which they are exact attention


@pytest.mark.parametrize(
    "build", [partial(RoutingAttention, num_clusters=1), partial(SinkhornAttention, block_size=20)]
)
def test_one_cluster_or_block_is_exact_attention(build):
    layout = layout_of([[1] * 20 + [2] * 5 + [0] + [3] * 14])
    inputs = heads_input(layout)
    expected = with_gradients(lambda *x: make(SdpaAttention)(*x, layout), inputs)
    assert_close(with_gradients(lambda *x: make(build)(*x, layout), inputs), expected)


def exact_shared(query, value):
    """Full attention of one sequence: keys are unit queries; a token sees itself only where it sees nothing else."""
    scores = torch.einsum("ihk,jhk->hij", query, torch.nn.functional.normalize(query, dim=-1)) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.eye(len(query)).bool(), -5e4)
    return torch.einsum("hij,jhk->ihk", scores.softmax(-1), value)


@pytest.mark.parametrize("num_rounds", [1, 2, 3, 8, 70])
@pytest.mark.parametrize("bucket_size", [1, 4, 10, 20])
def test_lsh_of_one_or_two_chunks_is_exact_shared_attention(bucket_size, num_rounds):
    """The union of the rounds is all tokens of up to two chunks; 70 rounds need more than one byte to count."""
    lengths = sorted({1, 2, bucket_size, bucket_size + 1, max(1, 2 * bucket_size - 1), 2 * bucket_size})
    layout = layout_of([[number for number, n in enumerate(lengths, start=1) for _ in range(n)]])
    query, key, value = heads_input(layout)
    head = make(LSHAttention, bucket_size=bucket_size, num_rounds=num_rounds)
    assert_close(
        with_gradients(lambda q, v: head(q, key, v, layout), [query, value]),
        with_gradients(lambda q, v: by_sequence(exact_shared, layout, q, v), [query, value]),
    )


def test_lsh_that_counts_duplicates_is_not_exact():
    """With one chunk all are seen equally often. With two, tokens that both rounds show count twice."""
    query, key, value = heads_input(one_sequence(20))
    for bucket_size, least, most in ((20, 0, 1e-12), (10, 0.1, 10)):
        head = make(LSHAttention, bucket_size=bucket_size, num_rounds=2, duplicates="count")
        error = head(query, key, value, one_sequence(20)) - exact_shared(query, value)
        assert least <= float(error.norm() / exact_shared(query, value).norm()) <= most


# The public implementations


def reference_lsh(head):
    module = pytest.importorskip("reformer_pytorch", reason="pip install reformer-pytorch==1.4.4 to compare with it")
    options = head.options
    reference = module.LSHAttention(
        bucket_size=options.bucket_size, n_hashes=options.num_rounds, random_rotations_per_head=True
    ).eval()

    def attend(query, key, value):
        columns = len(query) // options.bucket_size // 2
        with mock.patch.object(torch, "randn", lambda *_, **__: head.rotations[..., :columns]):
            return reference(query.transpose(0, 1), value.transpose(0, 1))[0].transpose(0, 1)

    return attend


@pytest.mark.parametrize(("n", "num_rounds"), [(64, 1), (64, 2), (48, 4), (16, 8)])
def test_lsh_equals_reformer_pytorch(n, num_rounds):
    head = make(LSHAttention, bucket_size=8, num_rounds=num_rounds, duplicates="count")
    inputs = heads_input(one_sequence(n))
    found = with_gradients(lambda *x: head(*x, one_sequence(n)), inputs)
    assert_close(found, with_gradients(reference_lsh(head), inputs))


def test_lsh_does_not_leak_where_reformer_pytorch_does():
    head = make(LSHAttention, bucket_size=4, num_rounds=2, duplicates="count")
    reference = reference_lsh(head)
    assert leak(lambda *x: reference(*x[:3]), 8, 8) > 0.1
    assert leak(head, 8, 8) == 0


def reference_routing(head, n):
    module = pytest.importorskip("routing_transformer", reason="pip install routing-transformer==1.6.1 to compare")
    num_clusters, decay = head.options.num_clusters, head.options.decay
    reference = module.KmeansAttention(
        num_clusters, n // num_clusters, contract.HEADS, contract.WIDTH, ema_decay=decay
    ).double()
    reference.kmeans.means.copy_(head.centroids_HCK)
    reference.kmeans.initted.fill_(True)
    return reference


def attend_by(reference):
    """q, k, v (n, H, K) -> (n, H, K) by a module of (1, H, n, K)."""

    def attend(*qkv, **masks):
        result = reference(*(x.transpose(0, 1)[None] for x in qkv), **masks)
        return (result[0] if isinstance(result, tuple) else result)[0].transpose(0, 1)

    return attend


def test_routing_equals_routing_transformer():
    """Equal up to its epsilon: it divides sums over m clusters by m + 1e-5, also in the step of the centroids."""
    n = 48
    head = make(RoutingAttention, num_clusters=4, decay=0.1)
    reference = reference_routing(head, n)
    inputs = [x.requires_grad_() for x in heads_input(one_sequence(n))]
    found, expected = head(*inputs, one_sequence(n)), attend_by(reference)(*inputs)
    ratio = (found / expected)[found != 0]  # 1 + 1e-5 / m
    assert ((ratio > 1) & (ratio < 1 + 1.01e-5)).all() and (found == 0).eq(expected == 0).all()
    (found.sum() + expected.sum()).backward()
    head.update_centroids()
    reference.kmeans.update()
    torch.testing.assert_close(head.centroids_HCK, reference.kmeans.means, rtol=0, atol=1e-12)


def test_routing_does_not_leak_where_routing_transformer_does():
    head = make(RoutingAttention, num_clusters=4)
    reference = attend_by(reference_routing(head, 16).eval())
    assert leak(lambda *x: reference(*x[:3]), 8, 8) > 0.1
    assert leak(head, 8, 8) == 0


def reference_sinkhorn(head):
    """Its non-causal form uses the sorted *keys* as values, so the test compares with values that are the keys."""
    module = pytest.importorskip(
        "sinkhorn_transformer.sinkhorn_transformer", reason="pip install sinkhorn-transformer==0.11.4 to compare"
    )
    options = head.options
    reference = module.SinkhornAttention(
        options.block_size,
        contract.HEADS * contract.WIDTH,
        contract.WIDTH,
        contract.HEADS,
        head.max_sequence_length,
        temperature=options.temperature,
        non_permutative=False,
        sinkhorn_iter=options.num_iterations,
        use_simple_sort_net=True,
    ).double()
    reference.sort_net.linear.data.copy_(head.sort_weight[None])

    def attend(*qkv, **masks):
        with mock.patch.object(module, "sample_gumbel", lambda *_: head.noise):
            return attend_by(reference)(*qkv, **masks)

    return attend


@pytest.mark.parametrize("n", [64, 59])
def test_sinkhorn_equals_sinkhorn_transformer(n):
    """It needs all 64 slots, so shorter sequences are padded with 0 and masked."""
    head = make(SinkhornAttention, block_size=8, noise=1.0, normalized_last="columns")
    reference = reference_sinkhorn(head)
    query, key, _ = heads_input(one_sequence(n))

    def padded(query, key):
        query, key = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 64 - n)) for x in (query, key))
        return reference(query, key, key, q_mask=torch.arange(64)[None] < n)[:n]

    found = with_gradients(lambda q, k: head(q, k, k, one_sequence(n)), [query, key])
    assert_close(found, with_gradients(padded, [query, key]), 1e-11)


def test_sinkhorn_does_not_leak_where_sinkhorn_transformer_does():
    head = make(SinkhornAttention, block_size=8, noise=1.0, normalized_last="columns")
    reference = reference_sinkhorn(head)
    assert leak(lambda *x: reference(*x[:3]), 32, 32) > 0.1
    assert leak(head, 32, 32) == 0


# lsh


def test_the_number_of_buckets_is_even_and_follows_from_the_own_length():
    assert [num_buckets(n, 4) for n in (1, 4, 8, 9, 16, 17)] == [2, 2, 2, 4, 4, 6]
    head = make(LSHAttention, bucket_size=4, num_rounds=2)
    layout = layout_of([[1] * 3 + [2] * 60])
    buckets = head.hash(heads_input(layout)[0], layout)
    assert set(buckets[:, :, :3].flatten().tolist()) <= {0, 1}
    assert 12 < buckets[:, :, 3:].unique().numel() <= 16


def test_sorting_and_the_chain_of_chunks():
    """Lengths 3 and 2, chunks of 2, two rounds, one head."""
    layout = layout_of([[1, 1, 1, 2, 2]])
    buckets = torch.tensor([[[1, 0, 1, 0, 0]], [[0, 0, 0, 1, 0]]])
    places = sort_into_chunks(buckets, layout.sequence_of_token, layout.chunks(2))
    assert places.token.squeeze(2).tolist() == [[[1, 0], [2, 2], [3, 4]], [[0, 1], [2, 2], [4, 3]]]
    assert places.previous.tolist() == [4, 0, 5, 1, 3, 2]
    assert places.next.tolist() == [1, 3, 5, 4, 0, 2]
    assert places.row[places.slot].view(2, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_lsh_reads_queries_only_and_says_so():
    head, layout = make(LSHAttention), layout_of([[1] * 5 + [2] * 9])
    query, key, value = heads_input(layout)
    context, *gradients = with_gradients(lambda *x: head(*x, layout), [query, key, value])
    assert (head(query, value, value, layout) == context).all()
    assert (gradients[1] == 0).all() and gradients[0].abs().sum() > 0


class IgnoresKeys(LSHAttention):
    """lsh as it would be if the key that it ignores had no gradient, instead of a gradient of 0."""

    def attend(self, query_THK, key_THK, value_THK, layout):
        return super().attend(query_THK, query_THK.detach(), value_THK, layout)


def test_ddp_finds_a_gradient_for_the_key_projection_of_lsh(tmp_path):
    """DDP with its defaults refuses the step after one that left a parameter out."""

    def two_steps(attention):
        model = small_bert(attention)
        parallel = DistributedDataParallel(model)
        for row in rows_of_ids(2):
            parallel(**{name: value[None] for name, value in row.items()}).loss.backward()
        return [p.grad for name, p in model.named_parameters() if "self.key" in name]

    with process_group(tmp_path):
        gradients = two_steps(LSHAttention)
        assert len(gradients) == 4 and all((gradient == 0).all() for gradient in gradients)
        with pytest.raises(RuntimeError, match=r"did not receive grad|were not used in producing loss"):
            two_steps(IgnoresKeys)


# routing: how centroids move


def move(head, batches, attend=None):
    """Forward and backward over micro-batches, then one update."""
    for layout, inputs in batches:
        inputs = [x.clone().requires_grad_() for x in inputs]
        (attend or head)(*inputs, layout).sum().backward()
    head.update_centroids()
    return head.centroids_HCK.clone()


def batches_of(*rows):
    layouts = [layout_of([row]) for row in rows]
    return [(layout, heads_input(layout, seed)) for seed, layout in enumerate(layouts)]


ROWS = [1] * 9 + [2] * 25, [1] * 16 + [0] * 4 + [2] * 3, [1] * 40


def test_centroids_do_not_depend_on_accumulation_packing_or_recompute():
    batches = batches_of(*ROWS)
    expected = move(make(RoutingAttention), batches)
    assert (expected != make(RoutingAttention).centroids_HCK).any()
    width = max(map(len, ROWS))
    together = layout_of([[*row, *[0] * (width - len(row))] for row in ROWS])
    inputs = [torch.cat(parts) for parts in zip(*(inputs for _, inputs in batches), strict=True)]
    torch.testing.assert_close(move(make(RoutingAttention), [(together, inputs)]), expected, rtol=0, atol=1e-12)
    for reentrant in (True, False):
        head = make(RoutingAttention)
        again = move(head, batches, partial(checkpoint, head, use_reentrant=reentrant))
        assert (again == expected).all()


def test_centroids_are_the_mean_of_the_directions_nearest_to_them():
    head = make(RoutingAttention, num_clusters=3, decay=0.5)
    before = head.centroids_HCK.clone()
    ((layout, (query, key, value)),) = batches_of([1] * 30)
    moved = move(head, [(layout, (query, key, value))])
    for h in range(contract.HEADS):
        unit = torch.nn.functional.normalize(torch.cat([query[:, h], key[:, h]]), dim=-1)
        nearest = (unit @ before[h].T).argmax(1)
        for c in range(3):
            mean = unit[nearest == c].sum(0)
            # the first step keeps (1 + 0) / (10 + 0), less than decay
            torch.testing.assert_close(moved[h, c], 0.1 * before[h, c] + 0.9 * mean / mean.norm())
    assert (head.num_updates == 1).all()
    for _ in range(20):
        move(head, [(layout, (query, key, value))])
    before = head.centroids_HCK.clone()
    moved = move(head, [(layout, (query, key, value))])
    assert (moved - before).norm() < 0.01  # the same batch again and again: the centroids no longer move


def test_a_centroid_that_is_first_seen_late_forgets_its_random_start_too():
    """4 tokens use two centroids; by the head's count of steps the others would keep half of their start."""
    short, long = batches_of([1] * 4, [1] * 40)
    head = make(RoutingAttention, decay=0.9)
    before = head.centroids_HCK.clone()
    for _ in range(9):
        move(head, [short])
    late = head.num_updates == 0
    assert late[:, 2:].all() and not late[:, :2].any()
    assert torch.equal(head.centroids_HCK[late], before[late])
    moved = move(head, [long])
    seen = late & (head.num_updates == 1)
    assert seen.any()
    # 0.1 of the start, and 0.9 of a direction
    directions = (moved[seen] - 0.1 * before[seen]) / 0.9
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones_like(directions[:, 0]))


def test_evaluation_and_batches_without_tokens_move_nothing():
    head = make(RoutingAttention)
    before = head.centroids_HCK.clone()
    layout, inputs = batches_of([1] * 30)[0]
    with torch.no_grad():
        head(*inputs, layout)
    inputs = [x.requires_grad_() for x in inputs]
    head(*inputs, layout)  # no backward: this batch was thrown away
    head.eval()(*inputs, layout).sum().backward()
    empty = layout_of([[0, 0]])
    head.train()(*(x.requires_grad_() for x in heads_input(empty)), empty).sum().backward()
    head.update_centroids()
    assert (head.centroids_HCK == before).all() and not head.num_updates.any()


def test_a_broken_batch_does_not_stay_in_the_centroids():
    head = make(RoutingAttention, num_clusters=2)
    (layout, inputs), *_ = batches_of([1] * 30)
    moved = move(head, [(layout, [torch.full_like(x, float("nan")) for x in inputs])])
    assert moved.isfinite().all()


def test_ranks_add_up():
    """all_reduce over sums and counts adds the tokens of other ranks."""
    batches = batches_of(*ROWS)
    expected = move(make(RoutingAttention), batches)
    head, other = make(RoutingAttention), make(RoutingAttention)
    for layout, inputs in batches[1:]:
        other(*(x.requires_grad_() for x in inputs), layout).sum().backward()

    def all_reduce(both):
        sums, counts = other.routing_statistics()
        both += torch.cat([sums, counts[..., None]], dim=-1)

    with mock.patch.object(dist, "is_initialized", lambda: True), mock.patch.object(dist, "all_reduce", all_reduce):
        torch.testing.assert_close(move(head, batches[:1]), expected, rtol=0, atol=1e-12)


class HeadAndScale(nn.Module):
    """DDP needs a parameter."""

    def __init__(self):
        super().__init__()
        self.head, self.scale = make(RoutingAttention), nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, *inputs):
        return self.head(*inputs) * self.scale


def _one_of_two_ranks(rank, folder):
    """Rank 0 has two micro-batches, rank 1 one and one without tokens; under DDP, which copies buffers from rank 0."""
    layer = HeadAndScale()
    parallel = DistributedDataParallel(layer)
    nothing = layout_of([[0]]), heads_input(layout_of([[0]]))
    for layout, inputs in (batches_of(*ROWS)[:2], [*batches_of(*ROWS)[2:], nothing])[rank]:
        parallel(*(x.requires_grad_() for x in inputs), layout).sum().backward()
    layer.head.update_centroids()
    torch.save(layer.head.centroids_HCK, f"{folder}/centroids{rank}")


@pytest.mark.long
def test_two_ranks_learn_what_one_learns(tmp_path):
    run_ranks(_one_of_two_ranks, tmp_path)
    expected = move(make(RoutingAttention), batches_of(*ROWS))
    for rank in range(2):
        found = torch.load(tmp_path / f"centroids{rank}")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def _rank_1_hangs(rank, folder):
    if rank:
        threading.Event().wait()


@pytest.mark.long
def test_a_rank_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("process_group.PATIENCE", 20)
    with pytest.raises(TimeoutError, match="still run after 20 seconds"):
        run_ranks(_rank_1_hangs, tmp_path)


def test_an_update_that_never_comes_is_an_error():
    head = make(RoutingAttention, num_clusters=2)
    layout, inputs = batches_of([1, 1, 2])[0]
    with mock.patch.object(routing, "PATIENCE", 3), pytest.raises(RuntimeError, match=r"add RoutingCallback\(\)"):
        for _ in range(4):
            head(*(x.requires_grad_() for x in inputs), layout).sum().backward()
    fixed = make(RoutingAttention, decay=1.0)
    before = fixed.centroids_HCK.clone()
    assert (move(fixed, [(layout, inputs)]) == before).all() and fixed._micro_batches == 0


def small_bert(attention=RoutingAttention):
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return use_attention(BertForMaskedLM(config), attention)


def rows_of_ids(num_rows):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40, (num_rows, 20), generator=generator)
    sequence_ids = torch.tensor([1] * 12 + [2] * 7 + [0])
    return [{"input_ids": row, "labels": row, "sequence_ids": sequence_ids} for row in ids]


def routing_heads(model):
    return [module for module in model.modules() if isinstance(module, RoutingAttention)]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # renamed in transformers 5.23
@pytest.mark.parametrize("recompute", [False, True])
def test_the_trainers_steps_move_the_centroids(tmp_path, recompute):
    """Micro-batches of 1 x 4 and 4 x 1 rows, with and without gradient checkpointing: the same centroids."""
    found = []
    for rows_at_once in (4, 1):
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=rows_at_once, gradient_accumulation_steps=4 // rows_at_once,
            max_steps=1, report_to="none", save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
            remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        model = small_bert()
        if recompute:
            model.gradient_checkpointing_enable()
        Trainer(model, arguments, train_dataset=rows_of_ids(4), callbacks=[RoutingCallback()]).train()
        assert [int(head.num_updates.max()) for head in routing_heads(model)] == [1, 1]
        found.append([head.centroids_HCK for head in routing_heads(model)])
    torch.testing.assert_close(*found)
    assert (found[0][0] != small_bert().bert.encoder.layer[0].attention.self.attention_head.centroids_HCK).any()


def test_an_optimizers_steps_move_the_centroids():
    model = small_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = update_after_step(optimizer, model)
    for _ in range(2):
        for row in rows_of_ids(3):
            model(**{name: value[None] for name, value in row.items()}).loss.backward()
        optimizer.step()
    assert [int(head.num_updates.max()) for head in routing_heads(model)] == [2, 2]
    handle.remove()
    optimizer.step()
    assert [int(head.num_updates.max()) for head in routing_heads(model)] == [2, 2]


# sinkhorn


def test_sinkhorn_makes_rows_and_columns_sum_to_one():
    matrix = sinkhorn(torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0)), 30)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(3, 5))
    torch.testing.assert_close(matrix.sum(-2), torch.ones(3, 5))


@pytest.mark.parametrize("n", [20, 17, 23])
def test_a_constant_value_stays_constant(n):
    """With a last block that is full, and padded. The published form changes a constant value."""
    query, key, value = heads_input(one_sequence(n))
    value = torch.ones_like(value)
    for last, least, most in (("rows", 0, 1e-12), ("columns", 1e-3, 1)):
        head = make(SinkhornAttention, block_size=5, noise=1.0, normalized_last=last)
        error = (head(3 * query, 3 * key, value, one_sequence(n)) - 1).abs().max()
        assert least <= float(error.detach()) <= most


def test_a_permutation_shows_each_block_one_other():
    """If two blocks are sorted to each other, they see everything; sorted to themselves, they see only themselves."""
    layout = one_sequence(8)
    inputs = heads_input(layout)
    for order, seen in (([1, 0], layout), ([0, 1], layout_of([[1] * 4 + [2] * 4]))):
        matrix = torch.eye(2, dtype=torch.float64)[order].expand(1, contract.HEADS, 2, 2)
        with mock.patch.object(SinkhornAttention, "sorting_matrix", lambda *_, matrix=matrix: matrix):
            context = make(SinkhornAttention, block_size=4)(*inputs, layout)
        assert_close([context], [make(SdpaAttention)(*inputs, seen)])


# Options


@pytest.mark.parametrize("build", [LSHAttention, RoutingAttention, partial(SinkhornAttention, noise=1.0)])
def test_layers_draw_different_things_and_always_the_same(build):
    states = [
        make(build, layer_index=layer, seed=seed).state_dict() for layer, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    drawn = [name for name, value in states[0].items() if value.is_floating_point()]
    for name in drawn:
        first, same, layer, seed = (state[name] for state in states)
        assert (first == same).all()
        assert (first != layer).all() and (first != seed).all() and (layer != seed).all()


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (
            LSHAttention,
            {"num_rounds": 0},
            "num_rounds=0 must be a whole number, at least 1; give the number",
        ),
        (LSHAttention, {"bucket_size": 0}, "bucket_size=0 must be a whole number, at least 1"),
        (LSHAttention, {"bucket_size": "64"}, "bucket_size='64' must be a whole number.*; give the number of tokens"),
        (LSHAttention, {"duplicates": "ignore"}, "duplicates='ignore' is unknown; choose from union, count"),
        (RoutingAttention, {"num_clusters": 2.5}, r"num_clusters=2\.5 must be a whole number"),
        (SinkhornAttention, {"block_size": 1.5}, r"block_size=1\.5 must be a whole number"),
        (
            RoutingAttention,
            {"num_clusters": 0},
            "num_clusters=0 must be a whole number, at least 1; .*or None for about",
        ),
        (RoutingAttention, {"decay": 1.5}, r"decay=1\.5 must be a number from 0 to 1; 1 keeps the centroids"),
        (SinkhornAttention, {"block_size": 0}, "block_size=0 must be a whole number, at least 1"),
        (
            SinkhornAttention,
            {"normalized_last": "both"},
            "normalized_last='both' is unknown; choose from rows, columns",
        ),
        (SinkhornAttention, {"temperature": 0}, "temperature=0 must be a number above 0"),
        (SinkhornAttention, {"noise": -1.0}, r"noise=-1\.0 must be a number of at least 0; 0 is none"),
    ],
)
def test_refusals(build, options, message):
    with pytest.raises(ValueError, match=message):
        make(build, **options)


def test_a_sequence_longer_than_the_sorting_network_is_refused():
    layout = one_sequence(70)
    with pytest.raises(ValueError, match="18 blocks of 4 tokens, but max_sequence_length=64 has 16; build the head"):
        make(SinkhornAttention, block_size=4)(*heads_input(layout), layout)


def test_heads_can_be_copied():
    for build in HEADS.values():
        assert copy.deepcopy(make(build)).state_dict().keys() == make(build).state_dict().keys()
