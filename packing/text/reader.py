"""The ids of units that nobody has met before, by the tokenizer: many units in one text, which costs it half as much.

    must, we, Zoë    ->    "must | we"  "Zoë"    ->    57  92  8 41

A plain word is one of ASCII letters, perhaps with the space before it. Most new units are plain words, and the
tokenizer's model alone reads them: its normalizer and pre-tokenizer would change nothing, and take half the time. Other
units are joined with the separator of the rule. Where such a text would not be cut right there, each unit of it
is a text of its own. Where a rule knows words by their first token, words.py reads all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from packing.histogram import offsets_of
from packing.numba_tools import njit
from packing.text.plain import PlainReader
from packing.text.rows import Rows, SlowEncoder, Texts, joined_rows, picked_rows
from packing.text.table import cut
from packing.text.tokenizer import text_tokenizer
from packing.text.units import UnitRule
from packing.text.words import WordReader

JOINED = (128, 16)
"""How many units are in one text: at first, and of those that could not be read so."""
BLANK, CAPITALS, SMALL = ord(" "), (ord("A"), ord("Z")), (ord("a"), ord("z"))


class UnitReader:
    def __init__(self, rule: UnitRule, texts: PlainReader):
        self.rule = rule
        self._units = SlowEncoder(text_tokenizer(rule.tokenizer))
        self._separator = _Separator.of(self._units, rule.separator)
        self._plain = PlainWords.of(rule.tokenizer)
        self._words = WordReader(rule, self._units, texts) if rule.word_mark else None

    def read(self, data: np.ndarray, new: np.ndarray) -> Rows:
        """new: (new, 3) int64 of `WordTable.look_up`: first byte, and bytes. -> the ids of each."""
        numbers, places, parts = np.arange(len(new)), [], []
        is_left = np.ones(len(new), np.bool_)

        def take(tried: np.ndarray, is_read: np.ndarray, rows: Rows) -> None:
            places.append(tried[is_read])
            parts.append(rows)
            is_left[tried[is_read]] = False

        if self._words is not None:
            for read, rows in self._words.read(data, new):
                take(read, np.ones(len(read), np.bool_), rows)
        if self._plain is not None:
            tried = numbers[are_plain(data, new, bool(len(self._plain.space)))]
            take(tried, *self._plain.read(data, new[tried]))
        for most in JOINED:
            tried = numbers[is_left & self._can_be_joined(data, new)]
            if len(tried) > 1:
                take(tried, *self._read_joined(data, new[tried], most))
        left = numbers[is_left]
        if len(left):
            taken = [data[start : start + length] for start, length in new[left, :2].tolist()]
            rows = self._units.encode([Texts(np.concatenate(taken), offsets_of(new[left, 1]))], False)
            take(left, np.ones(len(left), np.bool_), rows)
        return _in_order(joined_rows(parts), np.concatenate([numbers[:0], *places]))

    def _can_be_joined(self, data: np.ndarray, new: np.ndarray) -> np.ndarray:
        """(new,) bool. Where a word takes the space before it, what has none is the first word of a text, and would be
        one with the separator."""
        if self._separator is None:
            return np.zeros(len(new), np.bool_)
        return (data[new[:, 0]] == BLANK) | (self._separator.text[0] != BLANK)

    def _read_joined(self, data: np.ndarray, new: np.ndarray, most: int) -> tuple[np.ndarray, Rows]:
        """-> (new,) bool, which could be read so, and the ids of these."""
        assert self._separator is not None
        joined, offsets, starts, of_joined = join(data, new, self._separator.text, most)
        found = cut(joined, offsets, self.rule)
        are_cut = cut_there(found.starts, found.of_texts, starts, of_joined)
        read = self._units.encode([Texts(joined, offsets)], special_tokens=False)
        return _parted(read, self._separator, are_cut, len(new), most)


@dataclass(frozen=True, eq=False)
class PlainWords:
    """How the model alone reads words of ASCII letters.

    space: UTF-8 as uint8, what the model gets for the space before a word; empty: units have none.
    lowercase: whether it gets small letters for capital ones.
    """

    model: SlowEncoder
    separator: _Separator
    space: np.ndarray
    lowercase: bool

    @classmethod
    def of(cls, description: str) -> PlainWords | None:
        """From the JSON of a tokenizer that has a rule; None where it may do more with a plain word.

        BertNormalizer makes capital letters small, and no more. NFC changes no ASCII. BertPreTokenizer and the
        expressions before ByteLevel leave a plain word in one piece, and ByteLevel makes Ġ of its space.
        """
        content = json.loads(description)
        normalizer, pre_tokenizer = content["normalizer"] or {}, content["pre_tokenizer"] or {}
        parts = [part["type"] for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if part]
        if any(not token["special"] for token in content["added_tokens"]):
            return None
        if normalizer.get("type") == "BertNormalizer" and parts == ["BertPreTokenizer"]:
            space, lowercase = "", normalizer["lowercase"]
        elif normalizer.get("type") in (None, "NFC") and parts in (["ByteLevel"], ["Split", "ByteLevel"]):
            space, lowercase = "Ġ", False
        else:
            return None
        content |= {"normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}}
        model = SlowEncoder(text_tokenizer(json.dumps(content)))
        separator = _Separator.of(model, " | ")
        return None if separator is None else cls(model, separator, _bytes(space), lowercase)

    def read(self, data: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, Rows]:
        """-> (new,) bool, which could be read so, and the ids of these."""
        most = JOINED[0]
        joined, offsets = join_plain(data, new, self.separator.text, self.space, self.lowercase, most)
        read = self.model.encode([Texts(joined, offsets)], special_tokens=False)
        return _parted(read, self.separator, np.ones(len(read.offsets) - 1, np.bool_), len(new), most)


@dataclass(frozen=True, eq=False)
class _Separator:
    """What stands between two units, UTF-8 as uint8, and its id."""

    text: np.ndarray
    id: int

    @classmethod
    def of(cls, encoder: SlowEncoder, text: str) -> _Separator | None:
        """None where it has no id of its own."""
        ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids
        return cls(_bytes(text), ids[0]) if len(ids) == 1 else None


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _parted(read: Rows, separator: _Separator, are_good: np.ndarray, units: int, most: int) -> tuple[np.ndarray, Rows]:
    is_read, ids, offsets = part(read.ids, read.offsets, separator.id, are_good, units, most)
    return is_read, Rows(ids, offsets)


def _in_order(rows: Rows, places: np.ndarray) -> Rows:
    """Row i moves to places[i]."""
    if np.array_equal(places, np.arange(len(places))):
        return rows
    return picked_rows(rows, np.argsort(places))


# Compiled


@njit(nogil=True, cache=True)
def are_plain(data, new, takes_space):
    """(new,) bool: which units are ASCII letters, with a space before them or without."""
    found = np.empty(len(new), np.bool_)
    for unit in range(len(new)):
        start, end = new[unit, 0], new[unit, 0] + new[unit, 1]
        start += takes_space and data[start] == BLANK
        is_plain = start < end
        for byte in data[start:end]:
            is_plain &= CAPITALS[0] <= byte <= CAPITALS[1] or SMALL[0] <= byte <= SMALL[1]
        found[unit] = is_plain
    return found


@njit(nogil=True, cache=True)
def join_plain(data, new, separator, space, lowercase, most):
    """Plain words -> texts of at most so many, with a separator between. -> data, offsets of the texts"""
    count = len(new)
    joined = np.empty(new[:, 1].sum() + count * (len(separator) + len(space)), np.uint8)
    offsets = np.zeros((count + most - 1) // most + 1, np.int64)
    at = 0
    for unit in range(count):
        if unit % most:
            at = _put(separator, joined, at)
        for byte in data[new[unit, 0] : new[unit, 0] + new[unit, 1]]:
            if byte == BLANK:
                at = _put(space, joined, at)
            else:
                joined[at] = byte | 0x20 if lowercase else byte
                at += 1
        offsets[unit // most + 1] = at
    return joined[:at], offsets


@njit(nogil=True, cache=True)
def join(data, new, separator, most):
    """Units -> texts of at most so many, with a separator between.

    -> data, offsets of the texts, starts of units and separators, (texts + 1,) int64, the first of these of each text.
    """
    count = len(new)
    texts = (count + most - 1) // most
    joined = np.empty(new[:, 1].sum() + count * len(separator), np.uint8)
    offsets, of_texts = np.zeros(texts + 1, np.int64), np.zeros(texts + 1, np.int64)
    starts = np.empty(2 * count, np.int64)
    at, place = 0, 0
    for unit in range(count):
        if unit % most:
            starts[place] = at
            place += 1
            at = _put(separator, joined, at)
        starts[place] = at
        place += 1
        at = _put(data[new[unit, 0] : new[unit, 0] + new[unit, 1]], joined, at)
        offsets[unit // most + 1], of_texts[unit // most + 1] = at, place
    return joined[:at], offsets, starts[:place], of_texts


@njit(inline="always")
def _put(source, joined, at):
    for byte in source:
        joined[at] = byte
        at += 1
    return at


@njit(nogil=True, cache=True)
def cut_there(found, of_found, starts, of_texts):
    """(texts,) bool: which texts are cut where they were joined, and nowhere else.

    found, of_found: where the texts are cut. starts, of_texts: where they were joined."""
    are_cut = np.empty(len(of_texts) - 1, np.bool_)
    for text in range(len(are_cut)):
        expected = of_texts[text + 1] - of_texts[text]
        is_cut = of_found[text + 1] - of_found[text] == expected
        if is_cut:
            for k in range(expected):
                is_cut &= found[of_found[text] + k] == starts[of_texts[text] + k]
        are_cut[text] = is_cut
    return are_cut


@njit(nogil=True, cache=True)
def part(ids, offsets, separator, are_good, units, most):
    """The ids of joined units, parted again.

    -> (units,) bool, whether the unit is in a good text that has the id of each separator, and has it no more often;
       and of these units, ids and offsets.
    """
    is_read = np.zeros(units, np.bool_)
    kept, of_units = np.empty(len(ids), np.int32), np.zeros(units + 1, np.int64)
    count, at = 0, 0
    for text in range(len(are_good)):
        unit = text * most
        size = min(most, units - unit)
        separators = 0
        for id_ in ids[offsets[text] : offsets[text + 1]]:
            separators += id_ == separator
        if are_good[text] and separators == size - 1:
            is_read[unit : unit + size] = True
            for id_ in ids[offsets[text] : offsets[text + 1]]:
                if id_ == separator:
                    count += 1
                    of_units[count] = at
                else:
                    kept[at] = id_
                    at += 1
            count += 1
            of_units[count] = at
    return is_read, kept[:at], of_units[: count + 1]
