"""Sums over sequences in chunks, as accelerators take them: the same as over whole sequences, and as isolated."""

from functools import partial

import pytest
import torch
from attention_contract import ROUNDING, assert_equal, heads_input, make, of_tokens, run

from bert_pretrain.attention import ATTENTION
from bert_pretrain.attention.head import prefers_few_launches
from bert_pretrain.attention.parts import pieces
from bert_pretrain.attention.parts.pieces import in_chunks, whole_sequences
from bert_pretrain.attention.parts.whole_sequences import SequenceSoftmax
from collate.layout import PackLayout, SlotLayout

HEADS = {
    "linear": ATTENTION["linear"],
    "performer": partial(ATTENTION["performer"], features=20),
    "performer, exponent": partial(ATTENTION["performer"], features=20, stabiliser="exponent"),
    "inducing": partial(ATTENTION["inducing"], points=5),
    "linformer": partial(ATTENTION["linformer"], rank=12, initial="random"),
    "nystrom": partial(ATTENTION["nystrom"], landmarks=7),
    "delta": ATTENTION["delta"],
    "lsh": partial(ATTENTION["lsh"], bucket_size=16),
    "routing": ATTENTION["routing"],
    "sinkhorn": partial(ATTENTION["sinkhorn"], block_size=16, noise=1.0),
    "sinkhorn, columns last": partial(ATTENTION["sinkhorn"], block_size=40, normalized_last="columns"),
}
LENGTHS = [[1, 63, 64, 65], [190], [130, 20, 3], []]
every_head = pytest.mark.parametrize("build", HEADS.values(), ids=HEADS)


def both_layouts(lengths=LENGTHS):
    """The real tokens of packs of 200 slots, and all slots, with two slots for sequences that no pack has."""
    ids = torch.zeros(len(lengths), 200, dtype=torch.int32)
    for pack, of_pack in enumerate(lengths):
        own = torch.repeat_interleave(torch.arange(len(of_pack)), torch.tensor(of_pack, dtype=torch.int64)) + 1
        ids[pack, : len(own)] = own
    return PackLayout(ids), SlotLayout(ids, sequence_slots=max(map(len, lengths)) + 2)


def inputs_and_weights(layout, slots):
    """For both layouts: q, k, v and the weights of the context; padding holds anything, and nothing reads it."""
    inputs, weights = heads_input(layout), heads_input(layout, 1)[0]

    def in_slots(x, padding):
        return layout.pad(x).flatten(0, 1).masked_fill(~slots.is_real_token[:, None, None], padding)

    return inputs, weights, [in_slots(x, 1e3) for x in inputs], in_slots(weights, 0)


def test_padding_stays_out_of_centroids():
    """Where it is sequences of its own: what routing learns is the same with and without it."""
    layout, slots = both_layouts()
    inputs, weights, in_slots, weights_in_slots = inputs_and_weights(layout, slots)
    heads = [make(ATTENTION["routing"], max_sequence_length=190) for _ in range(3)]
    run(heads[0], layout, inputs, weights)
    run(heads[1], slots, in_slots, weights_in_slots)
    (sums, counts), (sums_of_slots, counts_of_slots) = (head.routing_statistics() for head in heads[:2])
    torch.testing.assert_close(sums_of_slots, sums, rtol=0, atol=ROUNDING * float(sums.abs().max()))
    assert (counts_of_slots == counts).all() and int(counts.sum()) == 2 * heads[0].num_heads * layout.num_tokens
    for head in heads[:2]:
        head.update_centroids()
    torch.testing.assert_close(heads[1].centroids_HCK, heads[0].centroids_HCK, rtol=0, atol=ROUNDING)
    assert (heads[1].num_updates == heads[0].num_updates).all()
    assert (heads[1].centroids_HCK != heads[2].centroids_HCK).any()


def test_cpus_take_each_length_by_itself_but_not_for_slots():
    layout, slots = both_layouts()
    assert not prefers_few_launches(layout) and prefers_few_launches(slots)


@every_head
def test_chunks_and_whole_sequences_agree(build):
    layout, slots = both_layouts()
    head = make(build, max_sequence_length=190)  # shorter than the padding of a pack, and no multiple of a chunk
    inputs, weights, in_slots, weights_in_slots = inputs_and_weights(layout, slots)
    expected = run(head, layout, inputs, weights)
    found = run(head, slots, in_slots, weights_in_slots)
    real = of_tokens(found, slots.is_real_token)
    parameters = {name: value for name, value in found.items() if name.startswith("parameter")}
    assert_equal(real | parameters, expected)


@every_head
@pytest.mark.parametrize("value", [None, 1e4, float("nan")])
def test_a_broken_mate_changes_no_bit_of_the_others_chunks(build, value):
    layout, slots = both_layouts()
    head = make(build, max_sequence_length=200)
    _, _, inputs, weights = inputs_and_weights(layout, slots)
    mate = slots.sequence_of_token == 2
    weights = torch.where(mate[:, None, None], 0, weights)
    before = of_tokens(run(head, slots, inputs, weights), ~mate)
    others = [x.flip(0) if value is None else torch.full_like(x, value) for x in inputs]
    changed = [torch.where(mate[:, None, None], other, x) for other, x in zip(others, inputs, strict=True)]
    assert_equal(of_tokens(run(head, slots, changed, weights), ~mate), before, tolerance=0)


def test_a_sum_that_forgets_a_chunk_would_be_caught(monkeypatch):
    monkeypatch.setattr(pieces, "totals", lambda x, *_: x)
    with pytest.raises(AssertionError):
        test_chunks_and_whole_sequences_agree(HEADS["linear"])


@pytest.mark.parametrize("apart", [False, True])
def test_sums_over_the_chunks_of_each_sequence(apart):
    _, slots = both_layouts()
    cut = in_chunks(slots, 64, apart)
    tokens = torch.randn(slots.num_tokens, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_parts = map(cut.gather, (tokens, slots.positions_T[:, None], slots.sequence_of_token[:, None]))
    for part, x, positions, numbers in zip(cut.parts, *of_parts, strict=True):
        number = numbers[:, 0, 0]
        assert ((part.positions == positions[:, 0]) | part.is_padding[:, 0, 0]).all()
        assert (part.length == slots.lengths[number]).all()
        x = part.hide_padding(x).sum(2)
        expected = torch.stack([tokens[slots.sequence_of_token == own].sum(0) for own in number])
        torch.testing.assert_close(part.total(x), expected, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(part.spread(part.add_up(x)), expected, rtol=0, atol=ROUNDING)
        assert (part.largest(x) == torch.stack([x[number == own].amax(0) for own in number])).all()
    assert (cut.scatter(cut.gather(tokens)) == tokens).all()
    assert [part.runs is None for part in cut.parts] == ([True, False] if apart else [False])


def test_sums_are_the_same_in_one_pass_and_in_two():
    """On CUDA one kernel adds up in order; a CPU adds an index. Gradients, too."""
    _, slots = both_layouts()
    (part,) = in_chunks(slots, 64).parts
    x = torch.randn(part.shape[0], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, sequence, bounds = part.runs
    in_order = torch.segment_reduce(x, "sum", offsets=bounds, axis=0, unsafe=True)
    torch.testing.assert_close(pieces.over_sequences(x, sequence, bounds, "sum"), in_order, rtol=0, atol=ROUNDING)
    for name in ("add_up", "total"):
        assert torch.autograd.gradcheck(getattr(part, name), x.clone().requires_grad_())
    sums = part.add_up(x)
    assert torch.autograd.gradcheck(part.spread, sums.requires_grad_())


def test_softmax_over_the_chunks_of_a_sequence_and_its_gradient():
    _, slots = both_layouts()
    (part,) = in_chunks(slots, 64).parts
    scores = torch.randn(part.shape[0], 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    weights = SequenceSoftmax.apply(scores, *part.runs[1:])
    for own in part.runs.sequence.unique():
        of_sequence = scores[part.runs.sequence == own].permute(1, 2, 0, 3)
        expected = of_sequence.flatten(2).softmax(2).view(of_sequence.shape).permute(2, 0, 1, 3)
        torch.testing.assert_close(weights[part.runs.sequence == own], expected, rtol=0, atol=ROUNDING)
    assert torch.autograd.gradcheck(lambda x: SequenceSoftmax.apply(x, *part.runs[1:]), scores.requires_grad_())


def test_a_batch_of_short_or_of_long_sequences_has_one_part():
    for lengths, is_short in (([[5, 9], [64]], True), ([[100, 100], [200]], False)):
        slots = both_layouts(lengths)[1]
        real = PackLayout(slots.sequence_ids_BL)
        cut = in_chunks(real, 64, apart=True)
        assert [part.runs is None for part in cut.parts] == [is_short]
        assert len(whole_sequences(real).parts) == len({-(-n // 16) for of_pack in lengths for n in of_pack})
