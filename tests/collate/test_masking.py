"""Masks: drawings, properties, their slow twin, and their statistics (chi-square, fixed seeds, p above 1e-4)."""

import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from slow_masks import budget_of, cut_words, mask_one_by_one, sequence_key, words_of

from collate.columns import IGNORED
from collate.mask_rows import sequence_keys
from collate.masking import MASKING, MaskingRule, _span_length, word_continuations

CLS, SEP, MASK = 2, 3, 4
VOCABULARY = 60
IS_SPECIAL = np.arange(VOCABULARY) < 5
LUCK = 1e-4


def mask(rule, sequences, keys, word_ids=None):
    """The rule on a batch of lists: a list of (corrupted, labels)."""
    flat = np.array([token for sequence in sequences for token in sequence], np.int64)
    words = None if word_ids is None else np.array([word for row in word_ids for word in row], np.int64)
    offsets = np.cumsum([0] + [len(sequence) for sequence in sequences])
    corrupted, labels = rule(flat, offsets, np.array(keys, np.uint64), words)
    assert corrupted.dtype == labels.dtype == np.int64
    return [(corrupted[first:end].tolist(), labels[first:end].tolist()) for first, end in pairwise(offsets)]


def many(rule, sequence, count, seed=1, word_ids=None):
    """A sequence `count` times, each with a key of its own: corrupted, labels and which are predicted (count, n)."""
    length = len(sequence)
    words = None if word_ids is None else np.tile(word_ids, count)
    keys = sequence_keys(seed, 0, np.arange(count))
    corrupted, labels = rule(np.tile(sequence, count), np.arange(count + 1) * length, keys, words)
    return corrupted.reshape(count, length), labels.reshape(count, length), labels.reshape(count, length) != IGNORED


# Drawings. They are golden values, too: masks must not change between versions, or a resumed run would differ from
# an uninterrupted one.


@pytest.mark.parametrize(
    ("masking", "whole_words", "corrupted", "labels"),
    [
        ("exact", False, [2, 4, 11, 12, 13, 4, 15, 16, 4, 3], [0, 10, 0, 0, 0, 14, 0, 0, 17, 0]),
        ("independent", False, [2, 4, 11, 12, 13, 14, 15, 16, 4, 3], [0, 10, 0, 0, 0, 0, 0, 0, 17, 0]),
        ("span", False, [2, 10, 11, 4, 4, 4, 15, 16, 17, 3], [0, 0, 0, 12, 13, 14, 0, 0, 0, 0]),
        ("exact", True, [2, 10, 11, 4, 13, 14, 4, 16, 17, 3], [0, 0, 0, 12, 0, 0, 15, 0, 0, 0]),
        ("independent", True, [2, 4, 4, 12, 13, 14, 15, 16, 17, 3], [0, 10, 11, 0, 0, 0, 0, 0, 0, 0]),
        ("span", True, [2, 10, 11, 4, 4, 4, 15, 16, 17, 3], [0, 0, 0, 12, 13, 14, 0, 0, 0, 0]),
    ],
)
def test_the_masks_of_a_seed_are_these(masking, whole_words, corrupted, labels):
    """[CLS] 10 ##11 12 13 ##14 15 16 ##17 [SEP], a budget of round(0.3 * 10) = 3; 0 for -100."""
    rule = MaskingRule(0.3, masking, MASK, IS_SPECIAL, whole_word_mask=whole_words)
    words = [[-1, 0, 0, 1, 2, 2, 3, 4, 4, -1]] if whole_words else None
    ((found, found_labels),) = mask(rule, [[CLS, *range(10, 18), SEP]], sequence_keys(0, 0, np.array([0])), words)
    assert (found, [max(label, 0) for label in found_labels]) == (corrupted, labels)


@pytest.mark.parametrize(
    ("masking", "probability", "predicted", "digest"),
    [
        ("exact", 0.15, 151, "4da9d23a173c8668"),
        ("exact", 0.4, 399, "780f0c24cb0eebb2"),
        ("independent", 0.15, 128, "25c4008f7f9ed41a"),
        ("independent", 0.4, 358, "956230e992687324"),
        ("span", 0.15, 151, "45c78b23297ebcfb"),
    ],
)
def test_the_masks_of_long_sequences_are_these(masking, probability, predicted, digest):
    lengths = np.array([1, 2, 3, 9, 40, 128, 300, 512])
    tokens = np.arange(lengths.sum()) * 7919 % 997
    rule = MaskingRule(probability, masking, MASK, np.arange(1000) % 11 == 4)
    corrupted, labels = rule(tokens, np.r_[0, lengths.cumsum()], sequence_keys(12, 3, np.arange(8)))
    assert (labels != IGNORED).sum() == predicted
    assert hashlib.sha256(np.stack([corrupted, labels]).astype("<i8").tobytes()).hexdigest()[:16] == digest


# Properties.


@st.composite
def rules(draw, rng):
    is_special = rng.random(VOCABULARY) < draw(st.sampled_from([0, 0.1, 0.5]))
    is_special[:5], is_special[59] = True, False
    masking = draw(st.sampled_from(MASKING))
    masked = draw(st.floats(0, 1))
    options = {"mask_replace_prob": masked, "random_replace_prob": draw(st.floats(0, 1)) * (1 - masked)}
    if draw(st.booleans()):
        continues = rng.random(VOCABULARY) < draw(st.sampled_from([0.2, 0.5, 0.8]))
        options |= {"whole_word_mask": True, "continues_word_V": continues}
    if masking != "independent":
        options["max_predictions_per_sequence"] = draw(st.none() | st.integers(1, 12))
    if masking == "span":
        options |= {"geometric_p": draw(st.floats(0.05, 1)), "max_span_length": draw(st.integers(1, 12))}
    return MaskingRule(draw(st.floats(0.01, 1)), masking, MASK, is_special, **options)


@st.composite
def batches(draw):
    """A rule, sequences, keys, and word ids or None: options and lengths from hypothesis, tokens from a seed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rule = draw(rules(rng))
    lengths = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
    sequences = [rng.integers(1, VOCABULARY, length).tolist() for length in lengths]
    keys = rng.integers(0, 2**64 - 1, len(lengths), np.uint64).tolist()
    if not rule.whole_word_mask or draw(st.booleans()):
        return rule, sequences, keys, None
    word_ids = [np.sort(rng.integers(0, 1 + length // 2, length)) for length in lengths]
    no_word = draw(st.sampled_from([0, 0.2]))
    return rule, sequences, keys, [np.where(rng.random(len(row)) < no_word, -100, row).tolist() for row in word_ids]


def check_properties(rule, sequence, masked, word_ids=None):
    """What holds for every sequence under every rule."""
    corrupted, labels = masked
    budget = budget_of(rule, len(sequence))
    words = cut_words(words_of(sequence, rule.is_special_V, rule.continues_word_V, word_ids), budget)
    ordinary = [t for t, token in enumerate(sequence) if not rule.is_special_V[token]]
    predicted = [t for t, label in enumerate(labels) if label != IGNORED]
    assert set(predicted) <= set(ordinary)
    for t, token in enumerate(sequence):
        if t in predicted:
            assert labels[t] == token
            assert corrupted[t] in (token, MASK) or not rule.is_special_V[corrupted[t]]
        else:
            assert corrupted[t] == token
    assert all(set(word) <= set(predicted) or not set(word) & set(predicted) for word in words)
    assert bool(predicted) == bool(words)
    if rule.masking == "independent":
        return
    assert len(predicted) <= budget
    if not rule.whole_word_mask:
        assert len(predicted) == min(budget, len(ordinary))
    left = [word for word in words if word[0] not in predicted]
    assert all(len(word) > budget - len(predicted) for word in left)  # no word that would still fit was left out


@settings(max_examples=300)
@given(batches())
def test_properties(batch):
    rule, sequences, keys, word_ids = batch
    for i, masked in enumerate(mask(rule, sequences, keys, word_ids)):
        check_properties(rule, sequences[i], masked, word_ids and word_ids[i])


@pytest.mark.parametrize("defect", ["special", "split word", "too few", "changed", "none"])
def test_the_properties_can_fail(defect):
    """Negative controls: each way of masking a sequence wrongly is found."""
    continues = np.arange(VOCABULARY) >= 50
    rule = MaskingRule(0.5, "exact", MASK, IS_SPECIAL, whole_word_mask=True, continues_word_V=continues)
    sequence = [CLS, 10, 50, 11, 12, SEP]  # a budget of 3: two words of 2 and 1, or of 1 and 1 and no more
    wrong = {
        "special": ([MASK, MASK, MASK, 11, 12, SEP], [CLS, 10, 50, -100, -100, -100]),
        "split word": ([CLS, MASK, 50, MASK, MASK, SEP], [-100, 10, -100, 11, 12, -100]),
        "too few": ([CLS, 10, 50, MASK, 12, SEP], [-100, -100, -100, 11, -100, -100]),
        "changed": ([CLS, MASK, MASK, MASK, 13, SEP], [-100, 10, 50, 11, -100, -100]),
        "none": (sequence, [-100] * 6),
    }
    check_properties(rule, sequence, ([CLS, MASK, MASK, MASK, 12, SEP], [-100, 10, 50, 11, -100, -100]))
    with pytest.raises(AssertionError):
        check_properties(rule, sequence, wrong[defect])


@settings(max_examples=300)
@given(batches())
def test_masks_equal_their_slow_twin(batch):
    rule, sequences, keys, word_ids = batch
    for i, masked in enumerate(mask(rule, sequences, keys, word_ids)):
        assert masked == mask_one_by_one(sequences[i], keys[i], rule, word_ids and word_ids[i])


@given(batches(), st.randoms(use_true_random=False))
def test_masks_do_not_depend_on_the_batch(batch, random):
    """Each sequence alone, and all of them in another order: the same masks."""
    rule, sequences, keys, word_ids = batch
    together = mask(rule, sequences, keys, word_ids)
    order = list(range(len(sequences)))
    random.shuffle(order)
    reordered = mask(
        rule, [sequences[i] for i in order], [keys[i] for i in order], word_ids and [word_ids[i] for i in order]
    )
    assert reordered == [together[i] for i in order]
    for i, sequence in enumerate(sequences):
        assert mask(rule, [sequence], [keys[i]], word_ids and [word_ids[i]]) == [together[i]]


@given(st.integers(0, 2**64 - 1), st.integers(-1, 10), st.integers(0, 2**40), st.integers(0, 2**40))
def test_keys_equal_their_slow_twin(seed, epoch, index, start):
    keys = sequence_keys(seed, epoch, np.array([index]), np.array([start]))
    assert keys.tolist() == [sequence_key(seed, epoch, index, start)]


@pytest.mark.parametrize("masking", MASKING)
def test_other_seeds_epochs_sequences_and_pieces_have_other_masks(masking):
    rule = MaskingRule(0.15, masking, MASK, IS_SPECIAL)
    tokens = [CLS, *range(10, 50), *range(10, 50), SEP]
    keys = [
        sequence_keys(seed, epoch, np.array([index]), np.array([start]))[0]
        for seed in (0, 1)
        for epoch in (-1, 0, 1)
        for index in (0, 1)
        for start in (0, 80)
    ]
    masks = mask(rule, [tokens] * len(keys), keys)
    assert len({tuple(labels) for _, labels in masks}) == len(keys)


def test_whole_words_may_be_given_by_vocabulary_or_by_row():
    """By ## pieces as by word ids; those of the row go first."""
    continues = np.arange(VOCABULARY) >= 50
    sequence = [CLS, 10, 50, 51, 11, SEP, 52, 12, 53, SEP]
    word_ids = [-100, 0, 0, 0, 1, -100, 0, 1, 1, -100]
    for masking in MASKING:
        by_vocabulary = MaskingRule(0.4, masking, MASK, IS_SPECIAL, whole_word_mask=True, continues_word_V=continues)
        by_row = replace(by_vocabulary, continues_word_V=None)
        keys = range(50)
        expected = mask(by_vocabulary, [sequence] * 50, keys)
        assert mask(by_row, [sequence] * 50, keys, [word_ids] * 50) == expected
        assert mask(by_vocabulary, [sequence] * 50, keys, [word_ids] * 50) == expected
        assert mask(by_vocabulary, [sequence] * 50, keys, [list(range(10))] * 50) != expected


def test_tokens_that_are_in_no_word_are_not_predicted():
    rule = MaskingRule(1.0, "exact", MASK, IS_SPECIAL, whole_word_mask=True)
    ((_, labels),) = mask(rule, [[CLS, 10, 11, 12, SEP]], [3], [[-1, 0, -100, 1, -1]])
    assert labels == [-100, 10, -100, 12, -100]


@pytest.mark.parametrize("masking", MASKING)
def test_a_word_longer_than_the_budget_is_cut(masking):
    """round(0.15 * 20) = 3: a word of 12 tokens is masked token by token, one of 3 as a whole."""
    rule = MaskingRule(0.15, masking, MASK, IS_SPECIAL, whole_word_mask=True)
    words = [-1, *[0] * 12, *[1] * 3, *[2] * 3, -1]
    sequence = [CLS, *range(10, 28), SEP]
    _, _, predicted = many(rule, sequence, 2000, word_ids=words)
    assert predicted.any(1).all()
    for first in (13, 16):
        assert (predicted[:, [first, first + 1]] == predicted[:, [first + 1, first + 2]]).all()
    assert len({tuple(row) for row in predicted[:, 1:13]}) > 100
    assert stats.chisquare(predicted[:, 1:13].sum(0)).pvalue > LUCK or masking == "span"  # which begin before they end
    if masking != "independent":
        assert (predicted.sum(1) == 3).all()
    counts = rule.count_words(sequence, [0, 20], words)
    assert counts == {"words": 3, "cut_words": 1, "tokens": 18, "cut_tokens": 12}


@pytest.mark.parametrize("masking", ["exact", "span"])
def test_predictions_have_a_limit(masking):
    sequence = [CLS, *[10 + i % 50 for i in range(510)], SEP]
    rule = MaskingRule(0.15, masking, MASK, IS_SPECIAL)
    for limit, predicted in ((None, 77), (76, 76), (20, 20), (100, 77)):  # round(0.15 * 512) = 77
        ((_, labels),) = mask(replace(rule, max_predictions_per_sequence=limit), [sequence], [1])
        assert sum(label != IGNORED for label in labels) == predicted


# Statistics.


def shares_of(corrupted, labels, predicted):
    """How many became [MASK], another word, or stayed."""
    masked = (corrupted[predicted] == MASK).sum()
    kept = (corrupted[predicted] == labels[predicted]).sum()
    return np.array([masked, predicted.sum() - masked - kept, kept])


@pytest.mark.parametrize("masking", MASKING)
@pytest.mark.parametrize("shares", [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.5, 0.4), (0.0, 0.0)])
def test_shares_of_masked_random_and_kept(masking, shares):
    words = 1000
    options = {"max_span_length": 1} if masking == "span" else {}  # then each decision is of one token
    is_special = np.arange(words) < 5
    rule = MaskingRule(0.15, masking, MASK, is_special, mask_replace_prob=shares[0], random_replace_prob=shares[1])
    found = shares_of(*many(replace(rule, **options), np.r_[CLS, np.arange(20) + 500, SEP], 4000))
    by_chance = shares[1] / (words - 5)  # a random word is the word itself once in 995
    expected = np.array([shares[0], shares[1] - by_chance, 1 - sum(shares) + by_chance])
    assert (found[expected < 1e-12] == 0).all()
    possible = expected > 1e-12
    if possible.sum() > 1:
        assert stats.chisquare(found[possible], expected[possible] * found.sum()).pvalue > LUCK
        other = expected[possible] + np.r_[0.03, [0] * (possible.sum() - 2), -0.03] * (expected[possible][0] < 1)
        if (other > 0).all():
            assert stats.chisquare(found[possible], other * found.sum()).pvalue < LUCK  # 3 % more would be seen


def test_random_words_are_uniform_over_the_ordinary_vocabulary():
    is_special = np.arange(200) % 7 == 3
    rule = MaskingRule(0.5, "exact", 3, is_special, mask_replace_prob=0, random_replace_prob=1)
    corrupted, _, predicted = many(rule, np.arange(28) * 7, 2000)
    counts = np.bincount(corrupted[predicted], minlength=200)
    assert counts[is_special].sum() == 0
    assert stats.chisquare(counts[~is_special]).pvalue > LUCK


@pytest.mark.parametrize("sequence", [range(5, 45), [CLS, *range(5, 25), SEP, *range(5, 25), SEP], [CLS, 7, 8, SEP]])
def test_exact_choice_is_uniform(sequence):
    """Each place equally often, and each pair of places."""
    rule = MaskingRule(0.15, "exact", MASK, IS_SPECIAL)
    _, _, predicted = many(rule, np.array(sequence), 4000)
    places = predicted[:, ~IS_SPECIAL[np.array(sequence)]]
    each = places.sum(1)[0]
    assert (places.sum(1) == each).all() and each == max(1, round(0.15 * len(sequence)))
    # without replacement the counts vary less than independent ones: by (n - k) / (n - 1)
    n = places.shape[1]
    expected = len(places) * each / n
    statistic = ((places.sum(0) - expected) ** 2 / expected).sum() * (n - 1) / (n - each)
    assert LUCK < stats.chi2.sf(statistic, n - 1) < 1 - LUCK
    if each == 6:
        pairs = (places.T.astype(int) @ places)[np.triu_indices(n, 1)]
        assert stats.chisquare(pairs).pvalue > LUCK


def test_whole_words_are_chosen_uniformly():
    """20 words of 2 tokens, budget round(0.15 * 40) = 6: three of them, each as often."""
    word_ids = np.repeat(np.arange(20), 2)
    for masking, each in (("exact", 3), ("independent", None)):
        rule = MaskingRule(0.15, masking, MASK, IS_SPECIAL, whole_word_mask=True)
        _, _, predicted = many(rule, np.arange(40) + 10, 4000, word_ids=word_ids)
        words = predicted[:, ::2]
        assert (words == predicted[:, 1::2]).all()
        assert each is None or (words.sum(1) == each).all()
        assert stats.chisquare(words.sum(0)).pvalue > LUCK


@pytest.mark.parametrize("probability", [0.05, 0.15, 0.8, 1.0])
@pytest.mark.parametrize("whole_words", [False, True])
def test_independent_draws_have_their_rate(probability, whole_words):
    """The number of predictions in a sequence is binomial, with 0 moved to 1."""
    words = 60
    rule = MaskingRule(probability, "independent", MASK, np.arange(100) < 5, whole_word_mask=whole_words)
    word_ids = np.repeat(np.arange(words), 2) if whole_words else None
    tokens = np.arange(words * (1 + whole_words)) % 90 + 5
    _, _, predicted = many(rule, tokens, 3000, seed=3, word_ids=word_ids)
    counts = predicted[:, :: 1 + whole_words].sum(1)
    expected = stats.binom.pmf(np.arange(words + 1), words, probability)
    expected[:2] = 0, expected[:2].sum()
    found = np.bincount(counts, minlength=words + 1)
    often = expected * 3000 > 5
    found = [*found[often], found[~often].sum()]
    expected = [*expected[often], expected[~often].sum()]
    if expected[-1] * 3000 < 1e-6:
        assert found.pop() == 0
        expected.pop()
    assert len(found) == 1 or stats.chisquare(found, np.array(expected) * 3000).pvalue > LUCK


def test_the_one_that_independent_draws_must_choose_is_uniform():
    rule = MaskingRule(0.001, "independent", MASK, IS_SPECIAL)
    _, _, predicted = many(rule, [CLS, 10, 11, 12, 13, SEP], 4000)
    assert predicted.any(1).all()
    assert stats.chisquare(predicted[:, 1:5].sum(0)).pvalue > LUCK


def truncated_geometric(p, longest):
    shares = p * (1 - p) ** np.arange(longest)
    return shares / shares.sum()


@pytest.mark.parametrize(("p", "longest"), [(0.2, 10), (0.5, 3), (1.0, 4), (0.2, 1)])
def test_span_lengths_are_geometric(p, longest):
    rule = MaskingRule(0.15, "span", MASK, IS_SPECIAL, geometric_p=p, max_span_length=longest)
    lengths = [_span_length(np.uint64(77), i, rule._cumulative_span_lengths) for i in range(20_000)]
    found = np.bincount(lengths, minlength=longest + 1)[1:]
    expected = truncated_geometric(p, longest)
    possible = expected > 0
    assert found[~possible].sum() == 0
    assert possible.sum() == 1 or stats.chisquare(found[possible], expected[possible] * 20_000).pvalue > LUCK
    if (p, longest) == (0.2, 10):
        assert expected @ np.arange(1, 11) == pytest.approx(3.8, abs=0.01)  # the paper's mean


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("budget", range(2, 10))
def test_spans_as_they_lie(budget, width):
    """The budget, in words, lies in one piece as often as the first span is that long. A later span begins beside an
    earlier one in 1 of 2000 cases, and 1 in 2000 starts finds the sequence's end."""
    words = 2000
    limit = budget * width
    rule = MaskingRule(0.15, "span", MASK, IS_SPECIAL, whole_word_mask=True, max_predictions_per_sequence=limit)
    tokens = np.arange(words * width) % 50 + 5
    _, _, predicted = many(rule, tokens, 600, seed=budget, word_ids=np.repeat(np.arange(words), width))
    assert (predicted.sum(1) == limit).all()
    one_piece = (np.diff(predicted.astype(np.int8), axis=1, prepend=0) == 1).sum(1) == 1
    as_long = truncated_geometric(0.2, 10)[budget - 1 :].sum()
    assert stats.binomtest(int(one_piece.sum()), 600, as_long).pvalue > LUCK
    starts = predicted[one_piece].argmax(1) // width  # long spans begin where short ones do: anywhere
    assert stats.chisquare(np.histogram(starts, bins=8, range=(0, words))[0]).pvalue > LUCK


def test_span_starts_are_uniform():
    rule = MaskingRule(0.15, "span", MASK, IS_SPECIAL, max_predictions_per_sequence=1)
    _, _, predicted = many(rule, [CLS, *range(10, 50), SEP], 4000)
    assert stats.chisquare(predicted[:, 1:-1].sum(0)).pvalue > LUCK


def test_a_span_is_corrupted_as_a_whole():
    """Budgets of 5 that lie in one piece, nearly always one span: all masked, all random or all kept, 50 : 30 : 20.
    Random words are drawn one by one. With masking by token one piece in 20 would look so."""
    is_special = np.arange(1000) < 5
    rule = MaskingRule(0.1, "span", MASK, is_special, mask_replace_prob=0.5, random_replace_prob=0.3)
    rule = replace(rule, max_predictions_per_sequence=5)
    corrupted, labels, predicted = many(rule, np.arange(2000) % 900 + 10, 2000)
    one_piece = (np.diff(predicted.astype(np.int8), axis=1, prepend=0) == 1).sum(1) == 1
    corrupted, labels = (values[one_piece][predicted[one_piece]].reshape(-1, 5) for values in (corrupted, labels))
    masked, kept = corrupted == MASK, corrupted == labels
    drawn = ~masked & ~kept
    counts = [whole.all(1).sum() for whole in (masked, drawn, kept)]
    assert len(corrupted) > 500 and sum(counts) > 0.98 * len(corrupted)
    assert stats.chisquare(counts, np.array([0.5, 0.3, 0.2]) * sum(counts)).pvalue > LUCK
    drawn = corrupted[drawn.all(1)]
    assert (drawn[:, 1:] == drawn[:, :-1]).mean() < 0.01  # 1 in 995


def test_spans_stop_at_special_tokens():
    rule = MaskingRule(0.15, "span", MASK, IS_SPECIAL, geometric_p=0.01, max_span_length=40)
    rule = replace(rule, max_predictions_per_sequence=4)
    _, _, predicted = many(rule, [CLS, 10, 11, 12, SEP, 13, 14, 15, SEP], 2000)
    assert not predicted[:, [0, 4, 8]].any()


# transformers.


def word_piece_tokenizer(**options):
    """Words aa to zz, and as many ## pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [first + second for first in letters for second in letters]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate(special + pairs + ["##" + pair for pair in pairs])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"]
    return BertTokenizer(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)), **options)


@pytest.mark.parametrize("whole_words", [False, True])
def test_rates_are_those_of_transformers(whole_words):
    """Chosen or not, and what became of it: the same shares as DataCollatorForLanguageModeling's. Sequences of 80
    words, where the one that must be chosen is rarer than 3 in a million; whole words as given by its own offsets."""
    from transformers import DataCollatorForLanguageModeling

    tokenizer = word_piece_tokenizer()
    rng = np.random.default_rng(5)
    letters = rng.integers(97, 123, (400, 80, 4)).astype(np.uint8)  # each word two pieces
    texts = [" ".join(bytes(word).decode() for word in text) for text in letters]
    encoded = tokenizer(
        texts, add_special_tokens=False, return_special_tokens_mask=True, return_offsets_mapping=whole_words
    )
    examples = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    shares = {"mask_replace_prob": 1.0, "random_replace_prob": 0.0} if whole_words else {}
    theirs = DataCollatorForLanguageModeling(tokenizer, whole_word_mask=whole_words, seed=1, **shares)(examples)
    tokens = np.array(encoded["input_ids"])
    is_special = np.zeros(len(tokenizer), bool)
    is_special[tokenizer.all_special_ids] = True
    if whole_words:
        shares |= {"whole_word_mask": True, "continues_word_V": word_continuations(tokenizer)}
    rule = MaskingRule(0.15, "independent", tokenizer.mask_token_id, is_special, **shares)
    ours = rule(tokens.ravel(), np.arange(401) * 160, sequence_keys(0, 0, np.arange(400)))
    table = []
    for corrupted, labels in ((theirs["input_ids"].numpy(), theirs["labels"].numpy()), ours):
        corrupted, labels = (values.reshape(400, 160)[:, :: 1 + whole_words] for values in (corrupted, labels))
        predicted = labels != IGNORED
        table.append([*shares_of(corrupted, labels, predicted), (~predicted).sum()])
    table = np.array(table)
    assert (table.sum(1) == 400 * 160 // (1 + whole_words)).all()
    assert stats.chi2_contingency(table[:, table.any(0)]).pvalue > LUCK
    if whole_words:
        first, second = theirs["labels"].numpy().reshape(-1, 2).T
        assert ((first == IGNORED) == (second == IGNORED)).all()


# What continues a word.


def tokenizer_of(model, pre_tokenizer=None, **options):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(model)
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def test_word_continuations_by_mark():
    from tokenizers import models, pre_tokenizers

    pieces = tokenizer_of(models.WordPiece({"[UNK]": 0, "em": 1, "##bed": 2, "bed": 3}, unk_token="[UNK]"))
    assert word_continuations(pieces).tolist() == [False, False, True, False]
    unigram = models.Unigram([("<unk>", 0.0), ("▁em", -1.0), ("bed", -2.0), ("▁", -3.0), ("##", -9.0)], 0, False)
    sentence_piece = tokenizer_of(unigram, pre_tokenizers.Metaspace(), unk_token="<unk>")
    assert word_continuations(sentence_piece).tolist() == [False, False, True, False, True]
    tokens = {token: i for i, token in enumerate(["<s>", "Ġem", "bed", "e", "m", "Ġ", "Ġb"])}
    byte_level = tokenizer_of(models.BPE(tokens, []), pre_tokenizers.ByteLevel(), bos_token="<s>")
    byte_level.add_tokens(["covid"])  # an added token is a word
    assert word_continuations(byte_level).tolist() == [False, False, True, True, True, False, False, False]


def test_words_of_a_real_word_piece_are_the_tokenizers_words():
    tokenizer = word_piece_tokenizer()
    encoded = tokenizer("abcdef gh ijkl mn ijklopqr st", add_special_tokens=False)
    continues = word_continuations(tokenizer)
    word_ids = [-1 if word is None else word for word in encoded.word_ids()]
    is_special = np.arange(len(tokenizer)) < 5
    words = words_of(encoded["input_ids"], is_special, continues)
    assert words == words_of(encoded["input_ids"], is_special, None, word_ids)
    assert [len(word) for word in words] == [3, 1, 2, 1, 4, 1]


def test_a_word_piece_without_pieces_has_whole_words_only(tokenizer):
    assert not word_continuations(tokenizer).any()


def test_a_tokenizer_that_does_not_tell_is_refused():
    from tokenizers import models

    end_of_word = models.BPE({"em": 0, "bed</w>": 1, "it</w>": 2}, [], end_of_word_suffix="</w>")
    letters = models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    for model in (end_of_word, letters):
        with pytest.raises(ValueError, match=r"the tokens of [A-Z]\w+ some/model do not tell .* column of word ids"):
            word_continuations(tokenizer_of(model, name_or_path="some/model"))


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking": "some"}, "unknown masking 'some'; choose from exact, independent, span"),
        ({"mlm_probability": 0.0}, "mlm_probability=0.0 must lie in \\(0, 1\\]"),
        ({"mlm_probability": 1.01}, "mlm_probability=1.01"),
        ({"mlm_probability": float("nan")}, "mlm_probability=nan"),
        ({"mask_replace_prob": 1.2}, "mask_replace_prob=1.2 must lie in \\[0, 1\\]"),
        ({"random_replace_prob": -0.1}, "random_replace_prob=-0.1"),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "exceed 1 together"),
        ({"geometric_p": 0.0}, "geometric_p=0.0"),
        ({"max_span_length": 0}, "max_span_length=0 must be a whole number, at least 1"),
        (
            {"max_predictions_per_sequence": 0},
            "=0 must be a whole number, at least 1, or None",
        ),
        ({"max_predictions_per_sequence": 20, "masking": "independent"}, "=20 limits a budget, .* has none"),
        ({"mask_token_id": 60}, "mask_token_id=60 is not in the vocabulary of 60"),
        ({"is_special_V": np.ones(9, bool)}, "all 9 tokens of the vocabulary are special: .*random_replace_prob=0.1"),
        ({"is_special_V": np.ones(9)}, "is_special_V must be \\(V,\\) bool, not \\(9,\\) float64"),
        ({"continues_word_V": IS_SPECIAL}, "set whole_word_mask=True"),
        ({"continues_word_V": IS_SPECIAL[:9], "whole_word_mask": True}, "must be \\(60,\\) bool, not \\(9,\\)"),
    ],
)
def test_bad_options_are_refused(options, message):
    good = {"mlm_probability": 0.15, "masking": "exact", "mask_token_id": MASK, "is_special_V": IS_SPECIAL}
    MaskingRule(**good)
    with pytest.raises(ValueError, match=message):
        MaskingRule(**good | options)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"input_ids_T": [2, 60, 3]}, {}, "token ids 2..60 exceed the tokenizer's vocabulary of 60"),
        ({"input_ids_T": [2, -1, 3]}, {}, "token ids -1..3"),
        ({"offsets": [0, 2]}, {}, "offsets must ascend from 0 to the 3 tokens"),
        ({"offsets": [0, 4, 3]}, {}, "offsets must ascend"),
        ({"keys": [1, 2]}, {}, "2 keys for 1 sequences"),
        ({"word_ids_T": [0, 0, 0]}, {}, "word_ids_T is for whole words; set whole_word_mask=True"),
        ({"word_ids_T": [0, 0]}, {"whole_word_mask": True}, "word_ids_T must hold 3 integers"),
        ({"word_ids_T": [0.0, 0.5, 1.0]}, {"whole_word_mask": True}, "must hold 3 integers, .* float64"),
        ({}, {"whole_word_mask": True}, "needs to know what a word is; give word_ids_T"),
    ],
)
def test_bad_batches_are_refused(batch, options, message):
    good = {"input_ids_T": [2, 10, 3], "offsets": [0, 3], "keys": [1]}
    MaskingRule(0.15, "exact", MASK, IS_SPECIAL)(**good)
    with pytest.raises(ValueError, match=message):
        MaskingRule(0.15, "exact", MASK, IS_SPECIAL, **options)(**good | batch)


def test_nothing_to_mask():
    """No sequences, empty ones, and sequences of special tokens only: nothing is predicted, nothing changes."""
    for masking in MASKING:
        rule = MaskingRule(0.15, masking, MASK, IS_SPECIAL)
        assert mask(rule, [], []) == []
        assert mask(rule, [[], [CLS, SEP]], [1, 2]) == [([], []), ([CLS, SEP], [-100, -100])]
