"""BERT's masked-language-model corruption, a function of (seed, epoch, sequence index) and of nothing else.

The same sequence gets the same masks in whatever pack, batch, worker or rank it lies, and after a resume: so packing
changes nothing, and packed and unpacked training can be compared number by number. The draws come from a counter-based
generator (`packing.draws`): draw k of a sequence is mix(key + k * STEP), its key is mixed from (seed, epoch, index).

Source: Devlin et al. 2019 (arXiv 1810.04805), section 3.1 and appendix A.1; the count per sequence is that of its
published data pipeline: min(candidates, max(1, round(probability * length))).
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from packing.draws import STEP, make_key, mix

IGNORED = -100
"""The label of a position where nothing is predicted (the value that torch's cross-entropy ignores)."""

MASKING = ("exact", "independent")

_DRAWS_PER_TOKEN = np.uint64(3)  # chosen? corrupted how? which random word?


@dataclass(frozen=True, eq=False)
class MaskingRule:
    """How the tokens to predict are chosen and corrupted.

    probability: share of a sequence's tokens that are predicted, in (0, 1).
    masking: "exact" = exactly min(candidates, max(1, round(probability * length))) tokens, BERT's rule;
        "independent" = each ordinary token by its own draw, and one of them where all draws say no.
    mask_token_id: what 80 % of them become; 10 % become a random ordinary token, 10 % stay.
    is_special_V: (V,) bool; special tokens are never predicted and never drawn as random words.
    """

    probability: float
    masking: str
    mask_token_id: int
    is_special_V: np.ndarray

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise ValueError(f"mlm_probability={self.probability} must lie between 0 and 1; None switches masking off")
        if self.masking not in MASKING:
            raise ValueError(f"unknown masking {self.masking!r}; choose from {list(MASKING)}")
        if self.is_special_V.all():
            raise ValueError("every token of the vocabulary is special: there is nothing to mask")

    def __call__(self, input_ids_T, offsets, sequence_keys):
        """Corrupt the sequences of a batch.

        input_ids_T: (T,) integers; offsets: (N + 1,) where sequence i's tokens are offsets[i]:offsets[i + 1];
        sequence_keys: (N,) uint64, see `sequence_keys`.
        Returns corrupted input_ids (T,) and labels (T,), both int64; -100 where nothing is predicted.

            [CLS] the cat sat [SEP]  ->  [CLS] the [MASK] sat [SEP]     labels  -100 -100 cat -100 -100
        """
        lengths = np.diff(offsets)
        if self.masking == "exact":
            wanted = np.maximum(1, np.rint(self.probability * lengths)).astype(np.int64)
            threshold = 0.0
        else:
            wanted = np.ones(len(lengths), np.int64)
            threshold = self.probability
        ordinary = np.flatnonzero(~self.is_special_V)
        return _mask_tokens(
            input_ids_T, offsets, sequence_keys, wanted, threshold, self.is_special_V, ordinary, self.mask_token_id
        )


def sequence_keys(seed: int, epoch: int, sequence_indices: np.ndarray, sequence_starts: np.ndarray | None = None):
    """(N,) uint64 generator keys: within a seed and epoch, different sequences have different keys.

    sequence_starts tells pieces of one split source row apart.
    """
    starts = np.zeros(len(sequence_indices), np.int64) if sequence_starts is None else sequence_starts
    return _sequence_keys(_to_uint64(seed), _to_uint64(epoch), np.asarray(sequence_indices), np.asarray(starts))


def token_keys(input_ids_T: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(N,) uint64: a hash of each sequence's tokens, for rows that carry no sequence index."""
    return _hash_tokens(input_ids_T, offsets)


def _to_uint64(value: int) -> np.uint64:
    return np.uint64(value & 0xFFFFFFFFFFFFFFFF)


@njit(cache=True)
def _sequence_keys(seed, epoch, sequence_indices, sequence_starts):
    keys = np.empty(len(sequence_indices), np.uint64)
    epoch_key = make_key(seed, epoch)
    for i in range(len(keys)):
        keys[i] = make_key(make_key(epoch_key, np.uint64(sequence_indices[i])), np.uint64(sequence_starts[i]))
    return keys


@njit(cache=True)
def _uniform(key, counter):
    """Draw number `counter` of the sequence with this key, in [0, 1): 53 bits, the same on every machine."""
    return (mix(key + np.uint64(counter) * STEP) >> np.uint64(11)) * 2.0**-53


@njit(cache=True)
def _hash_tokens(input_ids_T, offsets):
    keys = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(keys)):
        key = np.uint64(offsets[i + 1] - offsets[i])
        for t in range(offsets[i], offsets[i + 1]):
            key = make_key(key, np.uint64(input_ids_T[t]))
        keys[i] = key
    return keys


@njit(cache=True)
def _mask_tokens(input_ids_T, offsets, keys, wanted, threshold, is_special_V, ordinary, mask_token_id):
    """Choose by selection sampling (Knuth, TAOCP 2, algorithm 3.4.2 S): one pass, exactly `wanted`, uniform.

    With a threshold the draws are independent, and the pass for `wanted` (1) serves sequences that drew none.
    """
    corrupted = input_ids_T.astype(np.int64)
    labels = np.full(len(input_ids_T), IGNORED, np.int64)
    for i in range(len(keys)):
        candidates = 0
        chosen = 0
        for t in range(offsets[i], offsets[i + 1]):
            if not is_special_V[input_ids_T[t]]:
                candidates += 1
                draw = np.uint64(t - offsets[i]) * _DRAWS_PER_TOKEN
                if _uniform(keys[i], draw) < threshold:
                    labels[t] = input_ids_T[t]
                    chosen += 1
        missing = min(wanted[i], candidates) if chosen == 0 else 0
        for t in range(offsets[i], offsets[i + 1]):
            if is_special_V[input_ids_T[t]]:
                continue
            draw = np.uint64(t - offsets[i]) * _DRAWS_PER_TOKEN
            if missing > 0:
                # after a threshold the first draw of each token is spent (all were above it): rescale it to [0, 1)
                if (_uniform(keys[i], draw) - threshold) / (1.0 - threshold) * candidates < missing:
                    labels[t] = input_ids_T[t]
                    missing -= 1
                candidates -= 1
            if labels[t] != IGNORED:
                kind = _uniform(keys[i], draw + np.uint64(1))
                if kind < 0.8:
                    corrupted[t] = mask_token_id
                elif kind < 0.9:
                    word = _uniform(keys[i], draw + np.uint64(2)) * len(ordinary)
                    corrupted[t] = ordinary[np.int64(word)]
    return corrupted, labels
