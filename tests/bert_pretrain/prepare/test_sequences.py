"""Documents -> sequences. Token ids tell where a token comes from, so the output shows what happened."""

import numpy as np
import pytest
from documents import token_documents
from hypothesis import given
from hypothesis import strategies as st
from slow_sentences import nsp_one_by_one, sop_one_by_one

from bert_pretrain.objective import NO_PAIR, OBJECTIVES
from bert_pretrain.prepare.sequences import (
    IN_ORDER,
    IS_NEXT,
    IS_RANDOM,
    SWITCHED,
    document_draws,
    draw_target,
    nsp_pairs,
    sequences_of,
    sop_pairs,
)

CLS, SEP = 1, 2
IDS = {"cls_token_id": CLS, "sep_token_id": SEP}


class FixedDraws:
    """A generator whose draws the test lists; all of them must be used."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def random(self):
        return self.draws.pop(0)

    def integers(self, low, high):
        drawn = self.draws.pop(0)
        assert low <= drawn < high
        return drawn

    def binomial(self, n, p):
        drawn = self.draws.pop(0)
        assert 0 <= drawn <= n and p == 0.5
        return drawn


def numbered(sentence_lengths):
    """Documents whose tokens are all different: [[2, 1], [1]] -> [[[10, 11], [12]], [[13]]]."""
    ids = iter(range(10, 10_000_000))
    return token_documents([[[next(ids) for _ in range(n)] for n in document] for document in sentence_lengths])


def pairs(documents, target, room, *draws):
    draws = FixedDraws(*draws)
    built = list(nsp_pairs(documents, 0, target, room, CLS, SEP, draws))
    assert draws.draws == []
    return [(pair.input_ids.tolist(), pair.label) for pair in built]


# --- by hand -------------------------------------------------------------------------------------------------------

# Document 0 has the sentences [10 11] [12] [13 14] [15], document 1 has [16 17] [18], document 2 has [19].
THREE = [[2, 1, 2, 1], [2, 1], [1]]
NEXT, RANDOM = 0.9, 0.1


def test_token_documents_are_flat():
    documents = numbered([[2, 1], [3]])
    assert documents.tokens.tolist() == [10, 11, 12, 13, 14, 15]
    assert documents.sentence_offsets.tolist() == [0, 2, 3, 6]
    assert documents.document_offsets.tolist() == [0, 2, 3]
    assert token_documents([[[]], [[], [5]]]).document_offsets.tolist() == [0, 1]


def test_actual_next():
    # All six tokens make one chunk of four sentences; A ends before sentence 3.
    assert pairs(numbered(THREE), 6, 20, 3, NEXT) == [([CLS, 10, 11, 12, 13, 14, SEP, 15, SEP], IS_NEXT)]


def test_a_chunk_is_the_fewest_sentences_that_reach_the_target():
    assert pairs(numbered(THREE), 3, 20, 1, NEXT, 3, NEXT) == [
        ([CLS, 10, 11, SEP, 12, SEP], IS_NEXT),  # 2 + 1 = 3 tokens: reached
        ([CLS, 13, 14, SEP, 15, SEP], IS_NEXT),  # 2 + 1 = 3 tokens: reached
    ]


def test_random_next_puts_unused_sentences_back():
    assert pairs(numbered(THREE), 4, 20, 1, RANDOM, 0, 4, 2, NEXT) == [
        # The chunk is sentences 0, 1, 2; A is sentence 0. B is of the first other document, sentence 4, and as the
        # target leaves 4 - 2 = 2 tokens, it ends there.
        ([CLS, 10, 11, SEP, 16, 17, SEP], IS_RANDOM),
        # So sentences 1 and 2 go back, and the next chunk is 1, 2, 3: 1 + 2 + 1 = 4 tokens.
        ([CLS, 12, SEP, 13, 14, 15, SEP], IS_NEXT),
    ]


def test_one_sentence_is_always_followed_by_a_random_one():
    # No draw for A's end nor for next or random: only document 2 (the second other one) and its sentence 1.
    documents = numbered([[3], [1], [2, 2]])
    assert pairs(documents, 4, 20, 1, 3) == [([CLS, 10, 11, 12, SEP, 16, 17, SEP], IS_RANDOM)]


def test_random_next_has_a_sentence_even_if_the_target_is_reached():
    documents = numbered([[5], [2, 2]])
    assert pairs(documents, 3, 20, 0, 1) == [([CLS, 10, 11, 12, 13, 14, SEP, 15, 16, SEP], IS_RANDOM)]


def test_truncation_takes_from_the_longer_side():
    # Room for 6: A keeps 6 - 2 = 4 of its 8 tokens; 1 of the 4 lost ones came off the front.
    documents = numbered([[8, 2], [1]])
    (pair,) = nsp_pairs(documents, 0, 10, 6, CLS, SEP, FixedDraws(1, NEXT, 1))
    assert pair.input_ids.tolist() == [CLS, 11, 12, 13, 14, SEP, 18, 19, SEP]
    assert pair.token_type_ids.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert pair.tokens_dropped == 4


def test_truncation_of_a_random_next_is_no_loss():
    documents = numbered([[4], [9]])
    (pair,) = nsp_pairs(documents, 0, 8, 6, CLS, SEP, FixedDraws(0, 1, 0, 5))
    # Both are cut to 3: 1 token of A, 6 of B. B's document shows those itself.
    assert pair.input_ids.tolist() == [CLS, 10, 11, 12, SEP, 19, 20, 21, SEP]
    assert pair.tokens_dropped == 1


def ordered_pairs(documents, target, room, *draws):
    draws = FixedDraws(*draws)
    built = list(sop_pairs(documents, 0, target, room, CLS, SEP, draws))
    assert draws.draws == []
    return [(pair.input_ids.tolist(), pair.label) for pair in built]


def test_sentence_order():
    # All four sentences make one chunk, which is cut before sentence 3.
    assert ordered_pairs(numbered(THREE), 6, 20, 3, 0.9) == [([CLS, 10, 11, 12, 13, 14, SEP, 15, SEP], IN_ORDER)]
    assert ordered_pairs(numbered(THREE), 6, 20, 3, 0.1) == [([CLS, 15, SEP, 10, 11, 12, 13, 14, SEP], SWITCHED)]
    # A chunk has two sentences, even if the first alone reaches the target.
    assert ordered_pairs(numbered(THREE), 2, 20, 1, 0.9, 3, 0.1) == [
        ([CLS, 10, 11, SEP, 12, SEP], IN_ORDER),
        ([CLS, 15, SEP, 13, 14, SEP], SWITCHED),
    ]


def test_a_last_sentence_alone_is_no_pair():
    documents = numbered([[2, 1, 9]])
    assert ordered_pairs(documents, 3, 20, 1, 0.9) == [
        ([CLS, 10, 11, SEP, 12, SEP], IN_ORDER),
        ([CLS, *range(13, 22), SEP], NO_PAIR),
    ]
    # Without B it has room for one token more; here 2 of its 9 are lost, 1 of them off the front.
    *_, last = sop_pairs(documents, 0, 3, 6, CLS, SEP, FixedDraws(1, 0.9, 1))
    assert last.input_ids.tolist() == [CLS, *range(14, 21), SEP]
    assert last.tokens_dropped == 2 and not last.token_type_ids.any()


def test_the_cut_does_not_tell_the_order():
    """Two equally long segments share an odd number of slots: A keeps one token more, whichever segment it is."""
    documents = numbered([[5, 5]])
    for order in (0.1, 0.9):
        (pair,) = sop_pairs(documents, 0, 9, 7, CLS, SEP, FixedDraws(1, order, 0, 0))
        assert pair.token_type_ids.tolist() == [0] * 6 + [1] * 4 and pair.tokens_dropped == 3


def test_single_sequences():
    documents = numbered([[3, 2, 7], [1]])
    built = sequences_of("none", documents, **IDS, max_sequence_length=7, short_sequence_probability=0)
    assert [sequence.input_ids.tolist() for sequence in built] == [
        [CLS, 10, 11, 12, 13, 14, SEP],  # 3 + 2 = 5 fill the room
        [CLS, 15, 16, 17, 18, 19, SEP],  # a sentence of 7: 5
        [CLS, 20, 21, SEP],  # and 2
        [CLS, 22, SEP],  # another document
    ]


def test_single_sequences_stop_at_a_short_target():
    # With every document short and a target of 2 (the only one in a room of 2), each sentence reaches it.
    documents = numbered([[2, 1, 1, 2]])
    built = sequences_of("none", documents, **IDS, max_sequence_length=4, short_sequence_probability=1)
    assert [sequence.input_ids.tolist()[1:-1] for sequence in built] == [[10, 11], [12, 13], [14, 15]]


# --- the slow twins ------------------------------------------------------------------------------------------------


def truncate_one_by_one(a, b, room, from_front):
    """Truncation as the paper describes it: while the pair is too long, the longer side loses a token at an end."""
    a, b = list(a), list(b)
    while len(a) + len(b) > room:
        longer = a if len(a) > len(b) else b
        longer.pop(0 if next(from_front) else -1)
    return a, b


@given(a=st.integers(1, 60), b=st.integers(1, 60), room=st.integers(2, 40), seed=st.integers(0, 5))
def test_truncation_leaves_what_it_leaves_token_by_token(a, b, room, seed):
    documents = numbered([[a, b], [1]])
    (pair,) = nsp_pairs(documents, 0, a + b, room, CLS, SEP, FixedDraws(1, NEXT, *[0] * ((a + b > room) * 2)))
    slow_a, slow_b = truncate_one_by_one(range(10, 10 + a), range(10 + a, 10 + a + b), room, iter([False] * 200))
    # No loss from the front in either: the same tokens, not just as many.
    assert pair.input_ids.tolist() == [CLS, *slow_a, SEP, *slow_b, SEP]


def test_truncation_is_random_at_both_ends():
    documents = numbered([[10, 1], [1]])
    front = []
    for seed in range(2000):
        draws = document_draws(seed, 0)
        for pair in nsp_pairs(documents, 0, 11, 7, CLS, SEP, draws):
            if pair.label == IS_NEXT:
                front.append(pair.input_ids[1] - 10)
    # 4 of 10 tokens are lost, each at the front with probability 1/2: mean 2, variance 1.
    assert abs(np.mean(front) - 2) < 4 / np.sqrt(len(front))
    assert abs(np.var(front) - 1) < 0.2


class ScriptedDraws:
    """A generator whose n-th draw depends on n alone: 0.618, 0.236, 0.854, …, scaled to the range."""

    def __init__(self, start):
        self.drawn = start

    def random(self):
        self.drawn += 1
        return self.drawn * 0.6180339887498949 % 1

    def integers(self, low, high):
        return low + int(self.random() * (high - low))

    def binomial(self, n, p):
        return int(self.random() * (n + 1))


def sides(sequence):
    """What a slow twin gives for a sequence."""
    if sequence.label == NO_PAIR:
        return sequence.input_ids[1:-1].tolist(), None, NO_PAIR
    a, b = split_pair(sequence)
    return a.tolist(), b.tolist(), sequence.label


documents_of_lengths = st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=8), min_size=2, max_size=6)


@pytest.mark.parametrize("draws", [ScriptedDraws, lambda start: np.random.default_rng(start)])
@given(documents_of_lengths, st.integers(2, 40), st.integers(0, 40), st.integers(0, 1000))
def test_pairs_are_those_built_sentence_by_sentence(draws, lengths, target, more, start):
    documents, room = numbered(lengths), target + more
    ids = iter(range(10, 10_000))
    lists = [[[next(ids) for _ in range(n)] for n in document] for document in lengths]
    for number in range(len(lists)):
        options = {"target": target, "room": room, "cls": CLS, "sep": SEP}
        built = nsp_pairs(documents, number, **options, draw=draws(start))
        assert [sides(pair) for pair in built] == nsp_one_by_one(lists, number, target, room, draws(start))
        built = sop_pairs(documents, number, **options, draw=draws(start))
        assert [sides(pair) for pair in built] == sop_one_by_one(lists[number], target, room, draws(start))


def test_golden_pairs():
    """Golden values: the result of a seed must not change from one version to the next."""
    documents = numbered([[3, 4, 2, 5, 1], [2, 2], [6, 1, 1]])
    assert [sides(pair) for pair in sequences_of("nsp", documents, **IDS, max_sequence_length=12, seed=7)] == [
        ([10, 11, 12, 13, 14, 15, 16], [17, 18], IS_NEXT),
        ([19, 20, 21, 22, 23], [31, 32, 33, 34], IS_RANDOM),
        ([24], [27, 28], IS_RANDOM),
        ([25, 26], [36], IS_RANDOM),
        ([27, 28], [36], IS_RANDOM),
        ([29, 30, 31, 32, 33], [13, 14, 15, 16], IS_RANDOM),
        ([35], [36], IS_NEXT),
    ]
    assert [sides(pair) for pair in sequences_of("sop", documents, **IDS, max_sequence_length=12, seed=7)] == [
        ([10, 11, 12, 13, 14, 15, 16], [17, 18], IN_ORDER),
        ([24], [19, 20, 21, 22, 23], SWITCHED),
        ([27, 28], [25, 26], SWITCHED),
        ([29, 30, 31, 32, 33, 34], [35], IN_ORDER),
        ([36], None, NO_PAIR),
    ]


# --- properties ----------------------------------------------------------------------------------------------------

corpora = documents_of_lengths
options = st.fixed_dictionaries(
    {
        "max_sequence_length": st.integers(5, 40),
        "short_sequence_probability": st.sampled_from([0.0, 0.1, 1.0]),
        "seed": st.integers(0, 2**40),
    }
)


def split_pair(sequence):
    """The tokens of A and of B."""
    ids, types = sequence.input_ids, sequence.token_type_ids
    a, b = ids[types == 0], ids[types == 1]
    assert (np.diff(types) >= 0).all()
    assert a[0] == CLS and a[-1] == SEP and b[-1] == SEP
    return a[1:-1], b[:-1]


@given(corpora, options)
def test_every_pair_is_well_formed(lengths, options):
    documents = numbered(lengths)
    of_token = np.repeat(np.arange(len(documents)), [sum(document) for document in lengths])
    for pair in sequences_of("nsp", documents, **IDS, **options):
        a, b = split_pair(pair)
        assert pair.input_ids.dtype == np.int32 and pair.token_type_ids.dtype == np.int8
        assert len(pair.input_ids) <= options["max_sequence_length"]
        assert len(a) >= 1 and len(b) >= 1
        # Each side is a run of one document's tokens.
        assert (np.diff(a) == 1).all() and (np.diff(b) == 1).all()
        same_document = of_token[a[0] - 10] == of_token[b[0] - 10]
        assert same_document == (pair.label == IS_NEXT)
        if pair.label == IS_NEXT:
            # B follows A; tokens in between, if any, are those that truncation cut off.
            assert a[-1] < b[0] <= a[-1] + 1 + pair.tokens_dropped


@given(corpora, options)
def test_every_token_is_in_one_pair_or_counted_as_dropped(lengths, options):
    documents = numbered(lengths)
    built = list(sequences_of("nsp", documents, **IDS, **options))
    own = []
    for pair in built:
        a, b = split_pair(pair)
        own.extend(a)
        if pair.label == IS_NEXT:
            own.extend(b)
    # Sentences that a random B displaced came back, or tokens would be missing here.
    assert len(own) == len(set(own))
    assert own == sorted(own)
    assert len(own) + sum(pair.tokens_dropped for pair in built) == documents.num_tokens


@given(corpora, options)
def test_every_ordered_pair_holds_neighbours(lengths, options):
    documents = numbered(lengths)
    of_token = np.repeat(np.arange(len(documents)), [sum(document) for document in lengths])
    ends = set((documents.sentence_offsets[1:] + 9).tolist())
    own, dropped = [], 0
    for pair in sequences_of("sop", documents, **IDS, **options):
        assert len(pair.input_ids) <= options["max_sequence_length"]
        dropped += pair.tokens_dropped
        if pair.label == NO_PAIR:
            parts = [pair.input_ids[1:-1]]
            assert pair.tokens_dropped or parts[0][-1] in ends
        else:
            a, b = split_pair(pair)
            parts = [a, b] if pair.label == IN_ORDER else [b, a]
            assert len(a) and len(b) and parts[0][-1] < parts[1][0] <= parts[0][-1] + 1 + pair.tokens_dropped
        assert len(set(of_token[np.concatenate(parts) - 10])) == 1
        own.extend(np.concatenate(parts))
    # In the order of the text every token is there once, or counted as dropped.
    assert own == sorted(set(own)) and len(own) + dropped == documents.num_tokens


def test_half_of_the_ordered_pairs_are_switched():
    documents = numbered([[3, 4, 2, 5, 1, 3]] * 600)
    labels = np.array([pair.label for pair in sequences_of("sop", documents, **IDS, max_sequence_length=12)])
    labels = labels[labels != NO_PAIR]
    assert len(labels) > 1000 and abs(labels.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(labels))


@given(corpora, options)
def test_single_sequences_lose_nothing_and_cross_no_document(lengths, options):
    documents = numbered(lengths)
    of_token = np.repeat(np.arange(len(documents)), [sum(document) for document in lengths])
    seen = []
    for sequence in sequences_of("none", documents, **IDS, **options):
        ids = sequence.input_ids
        assert ids[0] == CLS and ids[-1] == SEP and 3 <= len(ids) <= options["max_sequence_length"]
        assert not sequence.token_type_ids.any() and len(sequence.token_type_ids) == len(ids)
        assert sequence.label is None
        assert len(set(of_token[ids[1:-1] - 10])) == 1
        seen.extend(ids[1:-1].tolist())
    assert seen == documents.tokens.tolist()


@given(corpora)
def test_single_sequences_cut_only_sentences_that_are_too_long(lengths):
    documents = numbered(lengths)
    ends = set((documents.sentence_offsets[1:] + 9).tolist())
    for sequence in sequences_of("none", documents, **IDS, max_sequence_length=17):
        # Sentences have at most 15 tokens, as many as there is room for.
        assert sequence.input_ids[-2] in ends


# --- randomness ----------------------------------------------------------------------------------------------------


def as_lists(sequences):
    return [(s.input_ids.tolist(), s.token_type_ids.tolist(), s.label) for s in sequences]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_seed_same_sequences(objective):
    documents = numbered([[3, 4, 2, 5, 1]] * 20)
    build = lambda **key: as_lists(sequences_of(objective, documents, **IDS, max_sequence_length=12, **key))  # noqa: E731
    assert build(seed=3) == build(seed=3)
    assert build(seed=3) != build(seed=4)
    assert build(seed=3, numbers=[5, 2]) == build(seed=3, numbers=[5]) + build(seed=3, numbers=[2])


def test_documents_may_be_built_in_any_order():
    documents = numbered([[3, 4, 2, 5, 1], [2, 2], [6, 1, 1]] * 5)
    serial = as_lists(sequences_of("nsp", documents, **IDS, max_sequence_length=12, seed=7))
    by_document = {}
    for document in reversed(range(len(documents))):
        draw = document_draws(7, document)
        target = draw_target(9, 0.1, draw)
        by_document[document] = as_lists(nsp_pairs(documents, document, target, 9, CLS, SEP, draw))
    assert [pair for document in range(len(documents)) for pair in by_document[document]] == serial


def test_the_target_is_short_for_one_document_in_ten():
    targets = np.array([draw_target(100, 0.1, document_draws(0, document)) for document in range(5000)])
    short = targets < 100
    # 10 % draw uniformly from 2..100, of which 98 in 99 are below 100.
    assert abs(short.mean() - 0.1 * 98 / 99) < 4 * np.sqrt(0.1 * 0.9 / 5000)
    assert targets.min() >= 2 and abs(targets[short].mean() - 50.5) < 4 * 28.6 / np.sqrt(short.sum())


def test_random_documents_are_uniform_and_never_the_own_one():
    documents = numbered([[1]] * 6)
    counts = np.zeros(6)
    for seed in range(1200):
        (pair,) = nsp_pairs(documents, 2, 9, 9, CLS, SEP, document_draws(seed, 2))
        counts[split_pair(pair)[1][0] - 10] += 1
    assert counts[2] == 0
    others = counts[counts > 0]
    # Chi-square with 4 degrees of freedom is above 18.5 once in a thousand.
    assert len(others) == 5 and ((others - 240) ** 2 / 240).sum() < 18.5


def test_share_of_random_pairs():
    share = lambda built: np.mean([pair.label == IS_RANDOM for pair in built])  # noqa: E731
    draw = np.random.default_rng(0)
    sentences = lambda n: draw.integers(10, 40, n).tolist()  # noqa: E731
    # Sections of an encyclopedia: each ends in a chunk that often has one sentence, so more than half are random.
    sections = numbered([sentences(draw.integers(8, 40)) for _ in range(1500)])
    assert 0.54 < share(sequences_of("nsp", sections, **IDS, max_sequence_length=256)) < 0.60
    alone = numbered([[20]] * 50)
    assert share(sequences_of("nsp", alone, **IDS, max_sequence_length=256)) == 1


# --- refusals ------------------------------------------------------------------------------------------------------


def test_one_document_has_no_random_next():
    with pytest.raises(ValueError, match=r"there are 1 documents.*objective='sop' or 'none'"):
        sequences_of("nsp", numbered([[3, 4]]), **IDS, max_sequence_length=16)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_sequence_length": 4}, "max_sequence_length=4 must be at least 5"),
        ({"max_sequence_length": 9, "short_sequence_probability": 1.5}, "short_sequence_probability=1.5"),
        ({"max_sequence_length": 9, "seed": -1}, "seed=-1"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        sequences_of("nsp", numbered([[3], [4]]), **IDS, **wrong)
