"""Masks of a batch: flat rows -> input ids with masks, and labels. `masking` says how to mask; this knows rows."""

import contextlib
from dataclasses import fields
from typing import Any

import numpy as np

from collate.masking import MASKING, MaskingRule
from collate.rows import FlatRows
from collate.vocabulary import token_ids
from collate.words import word_boundaries, word_continuations
from packing.draws import make_key
from packing.numba_tools import njit


def masking_rule(tokenizer: Any, mlm_probability: float | None, **options: Any) -> MaskingRule | None:
    """The rule of a tokenizer; None where mlm_probability=None switches masking off.

    options: of MaskingRule. Raises ValueError for those that would do nothing, and for a tokenizer without a mask.
    """
    if mlm_probability is None:
        defaults = {field.name: field.default for field in fields(MaskingRule)} | {"masking": MASKING[0]}
        for given in (f"{name}={value!r}" for name, value in options.items() if value != defaults[name]):
            raise ValueError(f"{given} is for masking, but mlm_probability=None switches it off; leave it out")
        return None
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token; set tokenizer.mask_token or mlm_probability=None")
    ids = token_ids(tokenizer)
    is_special_V, has_token_V = np.zeros((2, ids[-1] + 1), dtype=bool)
    is_special_V[tokenizer.all_special_ids] = has_token_V[ids] = True
    if options["whole_word_mask"]:
        with contextlib.suppress(ValueError):  # then the rows must have word_ids, and masking refuses them without
            options |= {"continues_word_V": word_continuations(tokenizer), "boundaries": word_boundaries(tokenizer)}
    tables = {"is_special_V": is_special_V, "has_token_V": has_token_V}
    return MaskingRule(mlm_probability, mask_token_id=tokenizer.mask_token_id, **tables, **options)


def mask_rows(rule: MaskingRule, flat: FlatRows, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(T,) input ids and (T,) labels, a function of (seed, epoch, sequence) alone.

    Rows without sequence_indices get masks by a hash of each sequence's tokens.
    Raises ValueError for rows that have labels; see also MaskingRule.
    """
    input_ids = flat.token_columns["input_ids"].astype(np.int64)
    if "labels" in flat.token_columns or "labels" in flat.sequence_columns:
        raise ValueError("the rows have labels, which masking would replace; set mlm_probability=None to keep them")
    indices = flat.sequence_columns.get("sequence_indices")
    if indices is not None:
        keys = sequence_keys(seed, epoch, indices.astype(np.int64), flat.sequence_columns.get("sequence_starts"))
    else:
        keys = sequence_keys(seed, epoch, _hash_tokens(input_ids, flat.offsets))
    return rule(input_ids, flat.offsets, keys, **_marks(rule, flat))


def count_words(rule: MaskingRule, flat: FlatRows) -> dict[str, int]:
    """MaskingRule.count_words of rows."""
    return rule.count_words(flat.token_columns["input_ids"].astype(np.int64), flat.offsets, **_marks(rule, flat))


def _marks(rule: MaskingRule, flat: FlatRows) -> dict[str, np.ndarray | None]:
    """What the rows themselves say about words, and about tokens that are not to be predicted."""
    names = ["special_tokens_mask"] + ["word_ids"] * rule.whole_word_mask
    return {f"{name}_T": flat.token_columns.get(name) for name in names}


def sequence_keys(seed: int, epoch: int, indices: np.ndarray, starts: np.ndarray | None = None) -> np.ndarray:
    """(N,) uint64 generator keys: within a seed and epoch, different sequences have different keys.

    indices, starts: the rows' sequence_indices and sequence_starts; these tell pieces of one split source row apart.
    """
    starts = np.zeros(len(indices), np.int64) if starts is None else starts
    seed, epoch = (value & 0xFFFFFFFFFFFFFFFF for value in (seed, epoch))
    return _sequence_keys(np.uint64(seed), np.uint64(epoch), np.asarray(indices), np.asarray(starts))


@njit(cache=True, nogil=True)
def _sequence_keys(seed, epoch, sequence_indices, sequence_starts):
    keys = np.empty(len(sequence_indices), np.uint64)
    epoch_key = make_key(seed, epoch)
    for i in range(len(keys)):
        keys[i] = make_key(make_key(epoch_key, np.uint64(sequence_indices[i])), np.uint64(sequence_starts[i]))
    return keys


@njit(cache=True, nogil=True)
def _hash_tokens(input_ids_T, offsets):
    """(N,) uint64, for rows that carry no sequence index."""
    keys = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(keys)):
        key = np.uint64(offsets[i + 1] - offsets[i])
        for t in range(offsets[i], offsets[i + 1]):
            key = make_key(key, np.uint64(input_ids_T[t]))
        keys[i] = key
    return keys
