"""Texts as units, and the ids of all units that were met: a text needs the tokenizer only for what it has not seen.

bytes   -> cut ->   units            -> look up ->   entries    -> gather ->   ids
"we must, we"       we must , we                     0 1 2 0                   57 92 11 57

A unit of at most 15 bytes is its own key, in two words of 64 bits with its length in the last byte. A longer one has a
hash there, and its bytes lie in a pool. Units of more than LONGEST_UNIT bytes are not kept.

The table grows with the units, since memory costs time when it is first written. It takes up to 34 MB, and some 70 MB
with pools. It keeps at most MOST_UNITS; the tokenizer then reads each further unit as often as it comes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import uint64

from packing.numba_tools import load_word, njit, prefetch
from packing.text.units import CLASSES, UnitRule

FIRST_SLOTS, SLOTS = 1 << 16, 1 << 20
MOST_UNITS = SLOTS // 2
LONGEST_UNIT = 64
GROWTH = 4
MOST_KEY_WORDS = 1 << 20  # 8 bytes each
MOST_POOL_IDS = 1 << 22
AHEAD = 32
SHORT = 15  # bytes of a unit that is its own key

# What a slot says about ids: how many there are, then one or two of them, or where they start in the pool.
COUNT_BITS, ID_BITS = 16, 24
MOST_IDS = (1 << COUNT_BITS) - 1


def _masks() -> np.ndarray:
    """(2, SHORT + 1) uint64: which bits of two words a unit of so many bytes fills."""
    first = [(1 << 8 * min(length, 8)) - 1 for length in range(SHORT + 1)]
    second = [(1 << 8 * max(length - 8, 0)) - 1 for length in range(SHORT + 1)]
    return np.array([first, second], np.uint64)


MASKS = _masks()
NEAR = uint64(CLASSES**3 - 1)  # the bits of three classes


class Units(NamedTuple):
    """Where the units of some texts lie.

    starts, ends: (units,) int32, bytes. of_texts: (texts + 1,) int64, the first unit of each text, and their number.
    """

    starts: np.ndarray
    ends: np.ndarray
    of_texts: np.ndarray


class WordTable:
    """The units met so far, and their ids."""

    def __init__(self) -> None:
        self._slots = np.zeros((FIRST_SLOTS, 4), np.uint64)
        """the two words of a key, what there is to say about its ids, and nothing: half a line of the cache"""
        self._long_keys = np.zeros(MOST_KEY_WORDS, np.uint64)
        self._pool = np.zeros(1 << 16, np.int32)
        self._pool_used = 0
        self._most = MOST_UNITS
        self._used = np.array([0, 0, 0])
        """units, words of long keys, most units until the slots grow"""
        self._before = (0, 0)  # of these, the first two before the last look-up

    def __len__(self) -> int:
        return int(self._used[0])

    @property
    def is_full(self) -> bool:
        return bool(self._used[0] >= self._most)

    def look_up(self, data: np.ndarray, units: Units, lowercase: bool) -> tuple[np.ndarray, np.ndarray]:
        """What there is of each unit, and the units that are new, which must be added before anything is gathered,
        or else forgotten.

        data: the text as uint8, with 16 bytes of anything behind it.
        -> found, (units,) int64, for `gather`; new, (new, 3) int64: first byte, bytes, and the slot, -1 without one
        """
        if self._pool_used > MOST_POOL_IDS:
            self._most = self._used[0]
        if len(self._slots) < SLOTS and self._used[0] > len(self._slots) // 4:
            self._slots = _grown(self._slots, GROWTH)
        self._used[2] = min(self._most, len(self._slots) // 4 * 3)
        self._before = self._used[0], self._used[1]
        found = np.empty(len(units.starts), np.int64)
        new = np.empty((len(units.starts), 3), np.int64)
        count = _look_up(
            data, units.starts, units.ends, lowercase, MASKS, self._slots, self._long_keys, self._used, found, new
        )
        return found, new[:count]

    def add(self, new: np.ndarray, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Keep the ids of new units that have a slot; -> (new,) int64, what the next `gather` needs of all."""
        needed = self._pool_used + len(ids)
        if needed > len(self._pool):
            self._pool = np.concatenate([self._pool, np.zeros(max(needed, len(self._pool)), np.int32)])
        added = np.empty(len(new), np.int64)
        self._pool_used = _add(new[:, 2], ids, offsets, self._pool, self._pool_used, self._slots, added)
        return added

    def forget(self, new: np.ndarray) -> None:
        """Take the new units of the last look-up out again. Their slots were free, so no other unit lies behind one."""
        self._slots[new[new[:, 2] >= 0, 2]] = 0
        self._used[:2] = self._before

    def gather(self, found: np.ndarray, of_texts: np.ndarray, added: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> ids, int32, and (texts + 1,) int64, the first of each text."""
        offsets = np.zeros(len(of_texts), np.int64)
        _measure(found, of_texts, added, offsets)
        ids = np.empty(int(offsets[-1]) + 2, np.int32)  # two are written at a time
        _gather(found, added, self._pool, ids)
        return ids[:-2], offsets


def cut(data: np.ndarray, offsets: np.ndarray, rule: UnitRule) -> Units:
    """The units of some texts.

    data: UTF-8 as uint8, less than 2 GB. offsets: (texts + 1,) int64."""
    starts, ends = np.empty(len(data) + 1, np.int32), np.empty(len(data) + 1, np.int32)
    marks, of_texts = np.empty(len(data) + 2, np.int64), np.zeros(len(offsets), np.int64)
    count = _cut(data, offsets, rule.classes, rule.cuts_and_kept, marks, starts, ends, of_texts)
    return Units(starts[:count], ends[:count], of_texts)


@njit(nogil=True, cache=True)
def count_foreign(data, offsets):
    """(texts,) int64: the bytes of each text that are not ASCII."""
    counts = np.zeros(len(offsets) - 1, np.int64)
    for text in range(len(counts)):
        count = 0
        for byte in data[offsets[text] : offsets[text + 1]]:
            count += byte >> 7
        counts[text] = count
    return counts


@njit(nogil=True, cache=True)
def _cut(data, offsets, classes, cuts, marks, starts, ends, of_texts):
    """cuts: by three classes, 1 for a cut, and 2 more where the unit that starts there has tokens.

    Numbers are unsigned, since an index that may be negative costs a comparison."""
    count, one, three = 0, uint64(1), uint64(3)
    for text in range(len(offsets) - 1):
        at, end = uint64(offsets[text]), uint64(offsets[text + 1])
        if at < end:
            first, length = class_at(data, np.int64(at), classes)
            near, size = uint64(first), uint64(length)
            marks[0] = np.int64(at << one | uint64(cuts[near << three]) >> one)
            found = one
            while at < end:
                # without a branch, since a word ends where nobody can foresee it: written always, counted if so
                while size == one and at + one < end and data[at + one] < 0x80:
                    near = (near << three | uint64(classes[data[at + one]])) & NEAR
                    kind = uint64(cuts[near])
                    marks[found] = np.int64(at << one | kind >> one)
                    found += kind & one
                    at += one
                after, length = 0, 1
                if at + size < end:
                    after, length = class_at(data, np.int64(at + size), classes)
                near = (near << three | uint64(after)) & NEAR
                kind = uint64(cuts[near])
                marks[found] = np.int64(at << one | kind >> one)
                found += kind & one
                at += size
                size = uint64(length)
            marks[found] = np.int64(end << one)
            for i in range(np.int64(found)):
                starts[count], ends[count] = marks[i] >> 1, marks[i + 1] >> 1
                count += marks[i] & 1
        of_texts[text + 1] = count
    return count


@njit(inline="always")
def class_at(data, at, classes):
    """The class of a character, and its bytes."""
    byte = np.int64(data[at])
    if byte < 0x80:
        return np.int64(classes[byte]), 1
    if byte < 0xE0:
        return np.int64(classes[(byte & 0x1F) << 6 | _low_bits(data, at + 1)]), 2
    if byte < 0xF0:
        return np.int64(classes[(byte & 0x0F) << 12 | _low_bits(data, at + 1) << 6 | _low_bits(data, at + 2)]), 3
    code = (byte & 7) << 18 | _low_bits(data, at + 1) << 12 | _low_bits(data, at + 2) << 6 | _low_bits(data, at + 3)
    return np.int64(classes[code]), 4


@njit(inline="always")
def _low_bits(data, at):
    return np.int64(data[at]) & 0x3F


@njit(nogil=True, cache=True)
def _look_up(data, starts, ends, lowercase, masks, table, long_keys, used, found, new):
    mask, count = uint64(len(table) - 1), 0
    lows, highs, places = np.empty(AHEAD, np.uint64), np.empty(AHEAD, np.uint64), np.empty(AHEAD, np.uint64)
    for first in range(0, len(starts), AHEAD):
        units = min(AHEAD, len(starts) - first)
        for i in range(units):  # the table is far larger than the cache: memory is asked for several units at once
            start = np.int64(starts[first + i])
            length = min(np.int64(ends[first + i]) - start, SHORT)
            low = load_word(data, start) & masks[0, length]
            high = load_word(data, start + 8) & masks[1, length]
            if lowercase:
                low, high = _lowered(low), _lowered(high)
            high |= uint64(length) << uint64(56)
            lows[i], highs[i], places[i] = low, high, _mixed(low, high) & mask
            prefetch(table, np.int64(places[i] << uint64(2)))
        for i in range(units):
            unit = first + i
            start, length = np.int64(starts[unit]), np.int64(ends[unit]) - np.int64(starts[unit])
            slot, is_new = np.int64(-1), True
            if length <= SHORT:
                low, high, place = lows[i], highs[i], places[i]
                while True:
                    if table[place, 0] == low and table[place, 1] == high:
                        slot, is_new = np.int64(place), False
                        break
                    if table[place, 1] == 0:
                        if used[0] < used[2]:
                            table[place, 0], table[place, 1] = low, high
                            used[0] += 1
                            slot = np.int64(place)
                        break
                    place = (place + uint64(1)) & mask
            elif length <= LONGEST_UNIT:
                slot, is_new = _look_up_long(data, start, length, lowercase, table, long_keys, used)
            if is_new:
                if slot >= 0:
                    table[slot, 2] = uint64(~count)
                new[count, 0], new[count, 1], new[count, 2] = start, length, slot
                found[unit] = ~count
                count += 1
            else:
                found[unit] = np.int64(table[slot, 2])
    return count


@njit(nogil=True, cache=True)
def _look_up_long(data, start, length, lowercase, table, long_keys, used):
    """The slot, or -1, and whether the unit is new. The second word of a key has the place of its bytes in the pool."""
    mask, size = uint64(len(table) - 1), (length + 7) >> 3
    low = uint64(length)
    for i in range(size):
        low = _mixed(low, _long_word(data, start, length, i, lowercase))
    place = low & mask
    while True:
        high = table[place, 1]
        if high == 0:
            break
        if table[place, 0] == low and high >> uint64(56) == uint64(length):
            at = np.int64(high & uint64(0xFFFFFFFF))
            is_same = True
            for i in range(size):
                is_same &= long_keys[at + i] == _long_word(data, start, length, i, lowercase)
            if is_same:
                return np.int64(place), False
        place = (place + uint64(1)) & mask
    if used[0] >= used[2] or used[1] + size > len(long_keys):
        return np.int64(-1), True
    for i in range(size):
        long_keys[used[1] + i] = _long_word(data, start, length, i, lowercase)
    table[place, 0] = low
    table[place, 1] = uint64(length) << uint64(56) | uint64(used[1])
    used[0] += 1
    used[1] += size
    return np.int64(place), True


@njit(inline="always")
def _long_word(data, start, length, i, lowercase):
    word = load_word(data, start + 8 * i)
    left = length - 8 * i
    if left < 8:
        word &= (uint64(1) << uint64(8 * left)) - uint64(1)
    return _lowered(word) if lowercase else word


@njit(inline="always")
def _lowered(word):
    """8 bytes with the capital letters of ASCII as small ones: they get the bit 0x20."""
    low_bits = word & uint64(0x7F7F7F7F7F7F7F7F)
    from_a = low_bits + uint64(0x3F3F3F3F3F3F3F3F)  # the high bit says: at least A
    above_z = low_bits + uint64(0x2525252525252525)  # above Z
    is_ascii = ~word & uint64(0x8080808080808080)
    return word | ((from_a ^ above_z) & is_ascii) >> uint64(2)


@njit(inline="always")
def _mixed(low, high):
    found = low ^ high * uint64(0x9E3779B97F4A7C15)
    found ^= found >> uint64(32)
    found *= uint64(0xD6E8FEB86659FD93)
    return found ^ found >> uint64(29)


@njit(nogil=True, cache=True)
def _grown(slots, times):
    """The same units in so many times as many slots."""
    grown = np.zeros((times * len(slots), 4), np.uint64)
    mask = uint64(len(grown) - 1)
    for slot in range(len(slots)):
        low, high = slots[slot, 0], slots[slot, 1]
        if high:
            place = (_mixed(low, high) if high >> uint64(56) <= uint64(SHORT) else low) & mask
            while grown[place, 1]:
                place = (place + uint64(1)) & mask
            for k in range(3):
                grown[place, k] = slots[slot, k]
    return grown


@njit(nogil=True, cache=True)
def _add(slots, ids, offsets, pool, pool_used, table, added):
    kept = pool_used
    for has_slot in (True, False):  # ids of units without one are needed once: their place is free again after that
        for i in range(len(slots)):
            if (slots[i] >= 0) != has_slot:
                continue
            start, count = offsets[i], offsets[i + 1] - offsets[i]
            found = count
            if count <= 2:
                for k in range(count):
                    found |= np.int64(ids[start + k]) << (COUNT_BITS + ID_BITS * k)
            else:
                found |= pool_used << COUNT_BITS
                for k in range(count):
                    pool[pool_used + k] = ids[start + k]
                pool_used += count
            added[i] = found
            if has_slot:
                table[slots[i], 2] = found
        if has_slot:
            kept = pool_used
    return kept


@njit(nogil=True, cache=True)
def _measure(found, of_texts, added, offsets):
    total = 0
    for text in range(len(of_texts) - 1):
        for unit in range(of_texts[text], of_texts[text + 1]):
            value = found[unit]
            total += (value if value >= 0 else added[~value]) & MOST_IDS
        offsets[text + 1] = total


@njit(nogil=True, cache=True)
def _gather(found, added, pool, ids):
    at = 0
    for value in found:
        known = value if value >= 0 else added[~value]
        count, place = known & MOST_IDS, known >> COUNT_BITS
        ids[at] = place & ((1 << ID_BITS) - 1)  # without a branch, since most units have one or two
        ids[at + 1] = place >> ID_BITS
        if count > 2:
            for k in range(count):
                ids[at + k] = pool[place + k]
        at += count


# Rows of one text, or of two


@njit(nogil=True, cache=True)
def frame(first, first_offsets, second, second_offsets, before, between, behind, types):
    """The ids of two texts a row, the second of which may be empty, with others before, between and behind them.

    types: of what is before, the first text, between, the second text, behind. -> ids, offsets, type ids
    """
    rows = len(first_offsets) - 1
    total = len(first) + len(second) + rows * (len(before) + len(between) + len(behind))
    ids, of_type, offsets = np.empty(total, np.int32), np.empty(total, np.int8), np.zeros(rows + 1, np.int64)
    at = 0
    for row in range(rows):
        at = _put(before, 0, len(before), types[0], ids, of_type, at)
        at = _put(first, first_offsets[row], first_offsets[row + 1], types[1], ids, of_type, at)
        at = _put(between, 0, len(between), types[2], ids, of_type, at)
        at = _put(second, second_offsets[row], second_offsets[row + 1], types[3], ids, of_type, at)
        at = _put(behind, 0, len(behind), types[4], ids, of_type, at)
        offsets[row + 1] = at
    return ids, offsets, of_type


@njit(inline="always")
def _put(source, start, end, type_, ids, of_type, at):
    for place in range(start, end):
        ids[at], of_type[at] = source[place], type_
        at += 1
    return at
