"""BERT's masked-language-model corruption, a function of (seed, epoch, sequence index) and of nothing else.

A sequence gets the same masks in any pack, batch, worker or rank, and after a resume. So packed and unpacked training
can be compared number by number. The draws come from a counter-based generator (`packing.draws`): draw k of a sequence
is mix(key + k * STEP), its key is mixed from (seed, epoch, index).

1. Words: each token starts a word, continues one, or is in none; see `collate.words`. Unless whole words are asked for,
   each is a word.
2. Choose words: an exact count (BERT), independent draws (transformers), or spans of words (SpanBERT).
3. Corrupt what was chosen: 80 % [MASK], 10 % a random ordinary token, 10 % as they were.

Sources: Devlin et al. 2019 (arXiv 1810.04805), section 3.1 and appendix A.1, and its published data pipeline
(create_masked_lm_predictions) for the count and whole words; Joshi et al. 2020 (arXiv 1907.10529), section 3.1.
"""

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from collate.columns import IGNORED
from collate.words import (
    BEGINS,
    CONTINUES,
    NO_WORD,
    Boundaries,
    cut_long_words,
    find_words,
    parts_by_vocabulary,
    parts_by_word_ids,
    word_end,
)
from collate.words import word_continuations as word_continuations
from packing.draws import STEP, make_key, mix
from packing.files.errors import check_known, whole_number
from packing.numba_tools import njit

MASKING = ("exact", "independent", "span")

NOT_CHOSEN = -1

_DRAWS_PER_TOKEN = np.uint64(3)  # chosen? corrupted how? which random word?
_KIND, _RANDOM_WORD = np.uint64(1), np.uint64(2)
_ORDER, _SPAN_LENGTH = np.uint64(1), np.uint64(2)  # streams of draws that belong to no token


@dataclass(frozen=True, eq=False)
class MaskingRule:
    """How the tokens to predict are chosen and corrupted.

        "exact"        [CLS] the cat [MASK] on the mat [SEP]     round(0.15 * 8) = 1 token
        "independent"  [CLS] the [MASK] sat on [MASK] mat [SEP]  each with probability 0.15, so 0.9 on average
        "span"         [CLS] the [MASK] [MASK] on the mat [SEP]  of 2 to predict: neighbours

    mlm_probability: share of a sequence's tokens to predict, in (0, 1].
    masking: "exact" = a budget of max(1, round(mlm_probability * length)) tokens, special ones counted in the length,
        and all of it spent where there are as many ordinary ones;
        "independent" = each ordinary token by its own draw, and one of them where all draws say no;
        "span" = the budget of "exact", spent on spans that start at random words: 1 to max_span_length words of one
        run without special tokens, their number geometric; a span ends early where another lies or the budget ends.
    mask_token_id: the token of a masked position.
    is_special_V: (V,) bool, V the highest id + 1; special tokens are never predicted and never drawn as random words.
    has_token_V: (V,) bool, ids that a token has; None: all. Others are refused in sequences, and never drawn.
    mask_replace_prob, random_replace_prob: shares of the predicted tokens that become mask_token_id, and a random
        ordinary token; the others stay. Decided per token, but per span with "span", as in SpanBERT.
    whole_word_mask: choose words, all tokens of each. "independent": a draw per word. "exact": words in random order,
        those left out that exceed the rest of the budget, so sometimes a rest of it stays. A word with more tokens
        than the budget is cut: each of its tokens counts as a word. `count_words` tells how many are cut.
    continues_word_V: (V,) bool, tokens that continue the word before them; see `collate.words`. Whole words need it, or
        word_ids_T in every call.
    boundaries: where words end by their characters, beside continues_word_V; None: nowhere.
    max_predictions_per_sequence: an upper limit of the budget (BERT: 20 at 128 tokens, 76 at 512).
    geometric_p, max_span_length: P(span has n words) is proportional to (1 - geometric_p)^n for n = 1 to
        max_span_length. SpanBERT's mean of 3.8 words is this distribution's; a clipped one would have 4.5.

    transformers' DataCollatorForLanguageModeling has options of the same names. It draws random words from the whole
    vocabulary, special tokens included, and may leave a sequence without any prediction.
    """

    mlm_probability: float
    masking: str
    mask_token_id: int
    is_special_V: np.ndarray
    _: KW_ONLY
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    whole_word_mask: bool = False
    continues_word_V: np.ndarray | None = None
    max_predictions_per_sequence: int | None = None
    has_token_V: np.ndarray | None = None
    boundaries: Boundaries | None = None
    geometric_p: float = 0.2
    max_span_length: int = 10

    def __post_init__(self) -> None:
        check_known("masking", self.masking, MASKING)
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability={self.mlm_probability} must lie in (0, 1]; None switches masking off")
        for name in ("mask_replace_prob", "random_replace_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            raise ValueError(
                f"mask_replace_prob={self.mask_replace_prob} and random_replace_prob={self.random_replace_prob} "
                "exceed 1 together; they are shares of the predicted tokens"
            )
        if not 0 < self.geometric_p <= 1:
            raise ValueError(f"geometric_p={self.geometric_p} must lie in (0, 1]")
        whole_number("max_span_length", self.max_span_length)
        if (limit := self.max_predictions_per_sequence) is not None:
            whole_number("max_predictions_per_sequence", limit, cure=", or None")
            if self.masking == "independent":
                raise ValueError(
                    f"max_predictions_per_sequence={limit} limits a budget, and masking 'independent' has none; "
                    "choose masking 'exact' or 'span'"
                )
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        if self.is_special_V.dtype != bool or self.is_special_V.ndim != 1:
            raise ValueError(f"is_special_V must be (V,) bool, not {self.is_special_V.shape} {self.is_special_V.dtype}")
        vocabulary = len(self.is_special_V)
        self._check_table("has_token_V", self.has_token_V, (vocabulary,))
        if not len(self._ordinary):
            raise ValueError(
                f"all {vocabulary} tokens of the vocabulary are special: there is no ordinary one to predict, "
                f"nor to draw as a random word (random_replace_prob={self.random_replace_prob})"
            )
        if not 0 <= self.mask_token_id < vocabulary:
            raise ValueError(f"mask_token_id={self.mask_token_id} is not in the vocabulary of {vocabulary}")
        if self.continues_word_V is not None and not self.whole_word_mask:
            raise ValueError("continues_word_V is for whole words; set whole_word_mask=True or leave it out")
        self._check_table("continues_word_V", self.continues_word_V, (vocabulary,))
        if self.boundaries is not None and self.boundaries.kinds_V2.shape != (vocabulary, 2):
            raise ValueError(f"boundaries must be of {vocabulary} tokens, not of {len(self.boundaries.kinds_V2)}")

    def _check_table(self, name: str, table: np.ndarray | None, shape: tuple[int, ...]) -> None:
        if table is not None and (table.dtype != bool or table.shape != shape):
            raise ValueError(f"{name} must be {shape!s} bool, not {table.shape} {table.dtype}")

    def __call__(
        self,
        input_ids_T: ArrayLike,
        offsets: ArrayLike,
        keys: ArrayLike,
        word_ids_T: ArrayLike | None = None,
        special_tokens_mask_T: ArrayLike | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Corrupt the sequences of a batch.

            [CLS] the cat sat [SEP]  ->  [CLS] the [MASK] sat [SEP]     labels  -100 -100 cat -100 -100

        input_ids_T: (T,) integers. offsets: (N + 1,); sequence i has the tokens offsets[i]:offsets[i + 1].
        keys: (N,) uint64, see `sequence_keys`.
        word_ids_T: (T,) integers, for whole_word_mask, in place of continues_word_V: equal neighbours are one word;
            tokens with a negative one are in no word, and never predicted.
        special_tokens_mask_T: (T,) 1 where a token is not predicted either, beside the special ones.
        Returns corrupted input_ids (T,) and labels (T,), both int64; -100 where nothing is predicted.
        Raises ValueError for ids outside the vocabulary, arrays that do not belong together, and unknown whole words.
        """
        input_ids_T, offsets, keys = np.asarray(input_ids_T), np.asarray(offsets), np.asarray(keys, np.uint64)
        parts_T = self._parts(input_ids_T, offsets, word_ids_T, special_tokens_mask_T)
        if len(keys) != len(offsets) - 1:
            raise ValueError(f"{len(keys)} keys for {len(offsets) - 1} sequences; give one to each")
        if self.whole_word_mask:
            cut_long_words(parts_T, offsets, self._budget(offsets))
        if self.masking == "independent":
            decider_T = _choose_independent(parts_T, offsets, keys, float(self.mlm_probability))
        elif self.masking == "span":
            decider_T = _choose_spans(parts_T, offsets, keys, self._budget(offsets), self._cumulative_span_lengths)
        elif self.whole_word_mask:
            decider_T = _choose_words(parts_T, offsets, keys, self._budget(offsets))
        else:
            decider_T = _choose_tokens(parts_T, offsets, keys, self._budget(offsets))
        shares = float(self.mask_replace_prob), float(self.mask_replace_prob + self.random_replace_prob)
        return _corrupt(input_ids_T, offsets, keys, decider_T, shares, self._ordinary, self.mask_token_id)

    def count_words(
        self,
        input_ids_T: ArrayLike,
        offsets: ArrayLike,
        word_ids_T: ArrayLike | None = None,
        special_tokens_mask_T: ArrayLike | None = None,
    ) -> dict[str, int]:
        """What a call with these arguments sees: words, cut_words, tokens (of all words) and cut_tokens."""
        input_ids_T, offsets = np.asarray(input_ids_T), np.asarray(offsets)
        parts_T = self._parts(input_ids_T, offsets, word_ids_T, special_tokens_mask_T)
        counts = cut_long_words(parts_T, offsets, self._budget(offsets)).tolist()
        return dict(zip(("words", "cut_words", "tokens", "cut_tokens"), counts, strict=True))

    def _check_batch(self, input_ids_T: np.ndarray, offsets: np.ndarray) -> None:
        vocabulary = len(self.is_special_V)
        if len(input_ids_T) and not 0 <= input_ids_T.min() <= input_ids_T.max() < vocabulary:
            raise ValueError(
                f"token ids {input_ids_T.min()}..{input_ids_T.max()} exceed the tokenizer's vocabulary of "
                f"{vocabulary}; use the tokenizer that the sequences were made with"
            )
        if self.has_token_V is not None and not self.has_token_V[input_ids_T].all():
            foreign = input_ids_T[~self.has_token_V[input_ids_T]][0]
            raise ValueError(
                f"token id {foreign} is below the vocabulary's highest, {vocabulary - 1}, but no token has it; use the "
                "tokenizer that the sequences were made with"
            )
        if offsets[0] != 0 or offsets[-1] != len(input_ids_T) or (offsets[1:] < offsets[:-1]).any():
            raise ValueError(f"offsets must ascend from 0 to the {len(input_ids_T)} tokens of input_ids_T")

    def _parts(
        self, input_ids_T: np.ndarray, offsets: np.ndarray, word_ids_T: ArrayLike | None, special_T: ArrayLike | None
    ) -> np.ndarray:
        """(T,) int8: BEGINS, CONTINUES or NO_WORD."""
        self._check_batch(input_ids_T, offsets)
        is_special_T = self.is_special_V[input_ids_T]
        if special_T is not None:
            is_special_T |= _checked("special_tokens_mask_T", special_T, input_ids_T) != 0
        if word_ids_T is None:
            if self.whole_word_mask and self.continues_word_V is None:
                raise ValueError(
                    "whole_word_mask=True needs to know what a word is; give word_ids_T (a token-level column of word "
                    "ids) or continues_word_V=word_continuations(tokenizer)"
                )
            return parts_by_vocabulary(input_ids_T, is_special_T, offsets, *self._marks)
        if not self.whole_word_mask:
            raise ValueError("word_ids_T is for whole words; set whole_word_mask=True or leave it out")
        word_ids_T = _checked("word_ids_T", word_ids_T, input_ids_T).astype(np.int64, copy=False)
        return parts_by_word_ids(is_special_T, offsets, word_ids_T)

    def _budget(self, offsets: np.ndarray) -> np.ndarray:
        """(N,) tokens to predict, if there are as many: BERT's max(1, round(probability * length))."""
        budget = np.maximum(1, np.rint(self.mlm_probability * np.diff(offsets))).astype(np.int64)
        return np.minimum(budget, self.max_predictions_per_sequence or budget)

    @cached_property
    def _ordinary(self) -> np.ndarray:
        """Ids that are drawn as random words."""
        is_ordinary_V = ~self.is_special_V
        return np.flatnonzero(is_ordinary_V if self.has_token_V is None else is_ordinary_V & self.has_token_V)

    @cached_property
    def _marks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the vocabulary says about words; without whole words each token is one."""
        vocabulary = len(self.is_special_V)
        continues_V = np.zeros(vocabulary, bool) if self.continues_word_V is None else self.continues_word_V
        boundaries = Boundaries.none(vocabulary) if self.boundaries is None else self.boundaries
        return continues_V, boundaries.kinds_V2, boundaries.parted_KK

    @cached_property
    def _cumulative_span_lengths(self) -> np.ndarray:
        """P(length <= n) for n = 1, 2 … max_span_length; products and sums only, the same on every machine."""
        shares = [1.0]
        while len(shares) < self.max_span_length:
            shares.append(shares[-1] * (1.0 - self.geometric_p))
        cumulative = np.cumsum(shares)
        return cumulative / cumulative[-1]


def _checked(name: str, values_T: ArrayLike, input_ids_T: np.ndarray) -> np.ndarray:
    """An integer or bool for each token."""
    values_T = np.asarray(values_T)
    if values_T.shape != input_ids_T.shape or values_T.dtype.kind not in "iub":
        raise ValueError(
            f"{name} must hold {len(input_ids_T)} integers, one a token, not {values_T.shape} {values_T.dtype}"
        )
    return values_T


@njit(cache=True, nogil=True)
def _uniform(key, counter):
    """Draw number `counter` of the sequence with this key, in [0, 1): 53 bits, the same on every machine."""
    return (mix(key + np.uint64(counter) * STEP) >> np.uint64(11)) * 2.0**-53


@njit(cache=True, nogil=True)
def _draw_word(words, drawn, count, order_key):
    """Where the next word in random order begins: one step of Fisher and Yates, in place, behind the `drawn` first."""
    other = drawn + np.int64(_uniform(order_key, drawn) * (count - drawn))
    start = words[other]
    words[other] = words[drawn]
    words[drawn] = start
    return start


# 2. Choose words. Each returns decider_T (T,): the token, counted from its sequence's start, whose draw decides how
# this one is corrupted (itself, but in spans the first one), or NOT_CHOSEN.


@njit(cache=True, nogil=True)
def _choose_tokens(parts_T, offsets, keys, budget):
    """Selection sampling (Knuth, TAOCP 2, algorithm 3.4.2 S): one pass, exactly the budget, uniform."""
    decider_T = np.full(len(parts_T), NOT_CHOSEN, np.int64)
    for i in range(len(keys)):
        first, end = offsets[i], offsets[i + 1]
        candidates = 0
        for t in range(first, end):
            candidates += parts_T[t] != NO_WORD
        missing = min(budget[i], candidates)
        for t in range(first, end):
            if parts_T[t] != NO_WORD:
                if _uniform(keys[i], np.uint64(t - first) * _DRAWS_PER_TOKEN) * candidates < missing:
                    decider_T[t] = t - first
                    missing -= 1
                candidates -= 1
    return decider_T


@njit(cache=True, nogil=True)
def _choose_independent(parts_T, offsets, keys, probability):
    """A draw per word, that of its first token."""
    decider_T = np.full(len(parts_T), NOT_CHOSEN, np.int64)
    for i in range(len(keys)):
        first, end = offsets[i], offsets[i + 1]
        words = chosen = 0
        for t in range(first, end):
            if parts_T[t] == BEGINS:
                words += 1
                if _uniform(keys[i], np.uint64(t - first) * _DRAWS_PER_TOKEN) < probability:
                    chosen += 1
                    decider_T[t] = t - first
            elif parts_T[t] == CONTINUES and decider_T[t - 1] != NOT_CHOSEN:
                decider_T[t] = t - first
        if chosen > 0:
            continue
        for t in range(first, end):
            if parts_T[t] == BEGINS:
                # all draws were above the probability: rescaled to [0, 1) they serve to select one word
                draw = _uniform(keys[i], np.uint64(t - first) * _DRAWS_PER_TOKEN)
                if (draw - probability) / (1.0 - probability) * words < 1.0:
                    _choose_word(decider_T, first, t, word_end(parts_T, t, end))
                    break
                words -= 1
    return decider_T


@njit(cache=True, nogil=True)
def _choose_word(decider_T, first, start, stop):
    for t in range(start, stop):
        decider_T[t] = t - first


@njit(cache=True, nogil=True)
def _choose_words(parts_T, offsets, keys, budget):
    """Words in random order, each that fits into what is left of the budget. None is longer than all of it."""
    decider_T = np.full(len(parts_T), NOT_CHOSEN, np.int64)
    words = np.empty(len(parts_T), np.int64)
    for i in range(len(keys)):
        first, end = offsets[i], offsets[i + 1]
        count = find_words(parts_T, first, end, words)
        order_key = make_key(keys[i], _ORDER)
        left = budget[i]
        for drawn in range(count):
            start = _draw_word(words, drawn, count, order_key)
            stop = word_end(parts_T, start, end)
            if stop - start <= left:
                _choose_word(decider_T, first, start, stop)
                left -= stop - start
                if left == 0:
                    break
    return decider_T


@njit(cache=True, nogil=True)
def _choose_spans(parts_T, offsets, keys, budget, cumulative):
    """Spans from words in random order, those left out that lie in a span already. So each start is uniform among the
    words that are left, as if it were drawn until it hit one. Each word of a span has to fit into the budget."""
    decider_T = np.full(len(parts_T), NOT_CHOSEN, np.int64)
    words = np.empty(len(parts_T), np.int64)
    for i in range(len(keys)):
        first, end = offsets[i], offsets[i + 1]
        count = find_words(parts_T, first, end, words)
        order_key, length_key = make_key(keys[i], _ORDER), make_key(keys[i], _SPAN_LENGTH)
        left = budget[i]
        for drawn in range(count):
            t = start = _draw_word(words, drawn, count, order_key)
            for _ in range(_span_length(length_key, drawn, cumulative)):
                if t == end or parts_T[t] == NO_WORD or decider_T[t] != NOT_CHOSEN:
                    break
                stop = word_end(parts_T, t, end)
                if stop - t > left:
                    break
                decider_T[t:stop] = start - first
                left -= stop - t
                t = stop
            if left == 0:
                break
    return decider_T


@njit(cache=True, nogil=True)
def _span_length(key, counter, cumulative):
    draw = _uniform(key, counter)
    length = 1
    while draw >= cumulative[length - 1]:
        length += 1
    return length


# 3. Corrupt what was chosen.


@njit(cache=True, nogil=True)
def _corrupt(input_ids_T, offsets, keys, decider_T, shares, ordinary, mask_token_id):
    """shares: draws below the first give [MASK], below the second a random word."""
    corrupted = input_ids_T.astype(np.int64)
    labels = np.full(len(input_ids_T), IGNORED, np.int64)
    for i in range(len(keys)):
        for t in range(offsets[i], offsets[i + 1]):
            if decider_T[t] == NOT_CHOSEN:
                continue
            labels[t] = input_ids_T[t]
            kind = _uniform(keys[i], np.uint64(decider_T[t]) * _DRAWS_PER_TOKEN + _KIND)
            if kind < shares[0]:
                corrupted[t] = mask_token_id
            elif kind < shares[1]:
                word = _uniform(keys[i], np.uint64(t - offsets[i]) * _DRAWS_PER_TOKEN + _RANDOM_WORD) * len(ordinary)
                corrupted[t] = ordinary[np.int64(word)]
    return corrupted, labels
