"""New units that are words, several in one text, and their ids parted again.

" must" " we" ","   ->   " must we a,"   ->   ▁mu st ▁we ▁a ,   ->   ▁mu st | ▁we | ,

Each word starts with a mark, and so does its first token, and no other. A unit that starts inside a word follows a
letter, whose token goes again.
"""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_letters

import numpy as np

from packing.histogram import offsets_of
from packing.numba_tools import njit
from packing.text.plain import PlainReader, first_ids
from packing.text.rows import Rows, SlowEncoder, Texts
from packing.text.table import class_at, cut
from packing.text.units import LETTER, MARK, SPACE, UNSAFE, UnitRule

WORDS_JOINED = (128, 16)
"""How many new units the tokenizer reads in one text: at first, and of those that could not be read so."""
WORD, SPACED, OTHER = range(3)
"""WORD: a space, then characters that show; or these alone, inside a word. SPACED: several spaces, then such
characters. OTHER: not to be joined."""


class WordReader:
    """Reads new units, where the rule knows words by their first token."""

    def __init__(self, rule: UnitRule, encoder: SlowEncoder, texts: PlainReader):
        self._rule, self._encoder, self._texts = rule, encoder, texts
        self._is_first = first_ids(encoder.tokenizer, rule.word_mark)
        self._lead, self._lead_ids = np.empty(0, np.uint8), 0
        for letter in ascii_letters[::-1]:
            if rule.classes[ord(letter)] == LETTER:
                text = f" {letter}"
                ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids
                if not self._lead_ids or len(ids) == 1:
                    self._lead, self._lead_ids = np.frombuffer(text.encode(), np.uint8), len(ids)

    def read(self, data: np.ndarray, new: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
        """Numbers of units, and their ids, until all are read.

        new: (units, …) int64, first byte and bytes of each."""
        kinds, is_inner = kinds_of(data, new, self._rule.classes)
        is_inner &= len(self._lead) > 0
        is_left = np.ones(len(new), np.bool_)
        for most, kind in zip(WORDS_JOINED, (WORD, SPACED), strict=True):
            can_be_joined = (kinds <= kind) & (~is_inner | (self._lead_ids == 1))
            tried = np.flatnonzero(is_left & can_be_joined)
            if len(tried) > 1:
                is_read, rows = self._read_joined(data, new[tried], is_inner[tried], most)
                is_left[tried[is_read]] = False
                yield tried[is_read], rows
        left = np.flatnonzero(is_left)
        if len(left):
            yield left, self._read_alone(data, new[left], is_inner[left])

    def _read_joined(
        self, data: np.ndarray, new: np.ndarray, is_inner: np.ndarray, most: int
    ) -> tuple[np.ndarray, Rows]:
        """-> (new,) bool, which could be read so, and their ids."""
        joined, offsets, starts, of_joined = join_words(data, new, is_inner, self._lead, most)
        found = cut(joined, offsets, self._rule)
        is_cut_there = np.array_equal(found.starts, starts) and np.array_equal(found.of_texts, of_joined)
        if not is_cut_there:
            return np.zeros(len(new), np.bool_), Rows(np.empty(0, np.int32), np.zeros(1, np.int64))
        read = self._texts.read(Texts(joined, offsets), self._encoder)
        is_read, ids, of_units = part_words(read.ids, read.offsets, self._is_first, is_inner, most)
        return is_read, Rows(ids, of_units)

    def _read_alone(self, data: np.ndarray, new: np.ndarray, is_inner: np.ndarray) -> Rows:
        joined, offsets, *_ = join_words(data, new, is_inner, self._lead, 1)
        ids, of_units, _ = self._texts.read(Texts(joined, offsets), self._encoder)
        is_kept = np.ones(len(ids), np.bool_)
        for place in range(self._lead_ids):
            is_kept[of_units[:-1][is_inner] + place] = False
        return Rows(ids[is_kept], of_units - offsets_of(is_inner * self._lead_ids))


@njit(nogil=True, cache=True)
def kinds_of(data, units, classes):
    """(units,) uint8, and bool: whether a unit starts with a mark inside a word.

    units: (units, …), first byte and bytes of each."""
    kinds, is_inner = np.full(len(units), OTHER, np.uint8), np.zeros(len(units), np.bool_)
    for unit in range(len(units)):
        start = units[unit, 0]
        at, end = start, start + units[unit, 1]
        white, is_plain = 0, True
        while at < end:
            kind, size = class_at(data, at, classes)
            is_plain &= kind != UNSAFE and (kind != SPACE or at == start + white)
            white += kind == SPACE
            at += size
        first, size = class_at(data, start, classes)
        if first == MARK:  # what joins with its mark starts a text
            is_inner[unit] = start + size == end or class_at(data, start + size, classes)[0] != UNSAFE
        if is_plain and white < units[unit, 1] and (white > 0 or is_inner[unit]):
            kinds[unit] = WORD if white <= 1 else SPACED
    return kinds, is_inner


@njit(nogil=True, cache=True)
def join_words(data, units, is_inner, lead, most):
    """Units -> texts of at most so many; an inner one follows the lead.

    -> data, offsets of the texts, and where they are cut, with (texts + 1,) int64, the first of these of each text.
    """
    count = len(units)
    texts = (count + most - 1) // most
    joined = np.empty(units[:, 1].sum() + is_inner.sum() * len(lead), np.uint8)
    offsets, of_texts = np.zeros(texts + 1, np.int64), np.zeros(texts + 1, np.int64)
    starts = np.empty(2 * count, np.int64)
    at, place = 0, 0
    for unit in range(count):
        if is_inner[unit]:
            starts[place] = at
            place += 1
            for byte in lead:
                joined[at] = byte
                at += 1
        starts[place] = at
        place += 1
        for k in range(units[unit, 1]):
            joined[at] = data[units[unit, 0] + k]
            at += 1
        offsets[unit // most + 1], of_texts[unit // most + 1] = at, place
    return joined[:at], offsets, starts[:place], of_texts


@njit(nogil=True, cache=True)
def part_words(ids, offsets, is_first, is_inner, most):
    """The ids of joined units, parted again.

    is_first: whether an id is the first of a word.
    -> (units,) bool, whether the unit is in a text with as many words as units; and of these units, ids and offsets.
    """
    units = len(is_inner)
    is_read = np.zeros(units, np.bool_)
    kept, of_units = np.empty(len(ids), np.int32), np.zeros(units + 1, np.int64)
    count, at = 0, 0
    for text in range(len(offsets) - 1):
        unit, end = text * most, min((text + 1) * most, units)
        words = 0
        for k in range(offsets[text], offsets[text + 1]):
            words += is_first[ids[k]]
        if words != end - unit:
            continue
        is_read[unit:end] = True
        for k in range(offsets[text], offsets[text + 1]):
            if is_first[ids[k]]:
                unit += 1
                count += 1
                of_units[count - 1] = at
            if not (is_first[ids[k]] and is_inner[unit - 1]):
                kept[at] = ids[k]
                at += 1
    of_units[count] = at
    return is_read, kept[:at], of_units[: count + 1]
