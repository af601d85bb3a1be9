"""Texts -> ids, by a tokenizer: each distinct unit of a text once, and then out of a table; or by encode_batch.

    encoder = open_encoder(description)
    rows = encoder.encode([texts])            # the ids of encode_batch

The result is the tokenizer's own. A rule says where texts may be cut, and why (rules.py). Besides, the tokenizer reads
a sample of the texts of each call itself. Where an id differs, DifferentTokens names the text, and the caller starts
again with the tokenizer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from packing.histogram import offsets_of
from packing.text.outcome import Amount, DifferentTokens
from packing.text.rules import NoRule, UnitRule, unit_rule
from packing.text.table import MOST_IDS, WordTable, count_foreign, cut, frame, join, part
from packing.text.tokenizer import TOKENIZE_CURE, text_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

SCAN_BYTES = 1 << 18  # of texts at a time: what is known of their units stays in the processor's cache
JOINED = (128, 16)
"""How many new units the tokenizer reads in one text: at first, and of those that could not be read so."""
SAMPLE_TEXTS, SAMPLE_CHARACTERS = 8, 2048
"""How many texts of a call the tokenizer reads itself, and how much of each."""
MOST_NEW = 0.5  # of the bytes of a block; with more in new units, the tokenizer reads the block as it is
MOST_PASSED = 64  # blocks that go to the tokenizer before the table is tried again
LONGEST = MOST_IDS >> 5  # bytes of a unit, whose ids can be counted: a character has 11 times its bytes at most


class Texts(NamedTuple):
    """Texts in one piece.

    data: UTF-8 as uint8. offsets: (texts + 1,) int64, bytes.
    """

    data: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of_arrow(cls, column: pa.Array) -> Texts:
        """A column of strings, as it lies in memory."""
        if not len(column):
            return cls(np.empty(0, np.uint8), np.zeros(1, np.int64))
        _, offsets, data = column.buffers()
        kind = np.int64 if str(column.type) == "large_string" else np.int32
        found = np.frombuffer(offsets, kind)[column.offset : column.offset + len(column) + 1].astype(np.int64)
        content = np.empty(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        return cls(content[found[0] : found[-1]], found - found[0])

    @classmethod
    def of_strings(cls, texts: Sequence[str]) -> Texts:
        encoded = [text.encode() for text in texts]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets_of([len(text) for text in encoded]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def text(self, number: int) -> str:
        return self.data[self.offsets[number] : self.offsets[number + 1]].tobytes().decode()

    def strings(self) -> list[str]:
        return [self.text(number) for number in range(len(self))]

    def slice(self, start: int, end: int) -> Texts:
        first, last = self.offsets[start], self.offsets[end]
        return Texts(self.data[first:last], self.offsets[start : end + 1] - first)


class Rows(NamedTuple):
    """ids, (tokens,) int32, and offsets, (rows + 1,) int64; type_ids, (tokens,) int8, which say the text of a pair."""

    ids: np.ndarray
    offsets: np.ndarray
    type_ids: np.ndarray | None = None

    def row(self, number: int) -> np.ndarray:
        return self.ids[self.offsets[number] : self.offsets[number + 1]]


class SlowEncoder:
    """encode_batch: the tokenizer reads all texts. reason: why not a FastEncoder."""

    def __init__(self, tokenizer: Tokenizer, reason: str = ""):
        self.tokenizer, self.reason = tokenizer, reason
        self._bytes = 0

    def amount(self) -> Amount:
        return Amount(self._bytes, self._bytes, self.reason)

    def encode(self, columns: Sequence[Texts], special_tokens: bool = True) -> Rows:
        """The rows of one column of texts, or of two that make pairs."""
        self._bytes += sum(len(texts.data) for texts in columns)
        texts = [column.strings() for column in columns]
        if len(texts) == 1:
            encodings = self.tokenizer.encode_batch_fast(texts[0], add_special_tokens=special_tokens)
        else:  # encode_batch_fast of tokenizers 0.23 forgets the type ids where there is no post-processor
            encodings = self.tokenizer.encode_batch(list(zip(*texts, strict=True)), add_special_tokens=special_tokens)
        lists = [encoding.ids for encoding in encodings]
        offsets = offsets_of([len(ids) for ids in lists])
        ids = np.fromiter(chain.from_iterable(lists), np.int32, int(offsets[-1]))
        if not special_tokens:
            return Rows(ids, offsets)
        types = chain.from_iterable(encoding.type_ids for encoding in encodings)
        return Rows(ids, offsets, np.fromiter(types, np.int8, int(offsets[-1])))


class FastEncoder:
    """Units out of a table. The tokenizer reads units that are new, and a sample of the texts.

    bytes: how much text there was. new_bytes: how much of it the tokenizer read.
    """

    def __init__(self, tokenizer: Tokenizer, rule: UnitRule):
        self.tokenizer, self.rule, self._slow = tokenizer, rule, SlowEncoder(tokenizer)
        self._units = SlowEncoder(text_tokenizer(rule.tokenizer))
        self._table = WordTable()
        self._separator = self._find_separator()
        self._frames = {1: Frame.of(tokenizer, 1), 2: Frame.of(tokenizer, 2)}
        self.bytes = self.new_bytes = 0
        self._passed = self._to_pass = 0
        if tokenizer.encode("", add_special_tokens=False).ids:
            raise NoRule("tokens of an empty text")

    def amount(self) -> Amount:
        return Amount(self.bytes, self.new_bytes)

    def encode(self, columns: Sequence[Texts], special_tokens: bool = True) -> Rows:
        """The rows of one column of texts, or of two that make pairs. Raises DifferentTokens."""
        rows = self._encode(columns, special_tokens)
        self._check(columns, rows, special_tokens)
        return rows

    def _encode(self, columns: Sequence[Texts], special_tokens: bool) -> Rows:
        found = [self._encode_blocks(texts) for texts in columns]
        if not special_tokens and len(found) == 1:
            return found[0]
        used = self._frames[len(found)] if special_tokens else BARE
        first, second = (
            found[0],
            found[-1] if len(found) == 2 else Rows(found[0].ids[:0], np.zeros_like(found[0].offsets)),
        )
        return Rows(*frame(first.ids, first.offsets, second.ids, second.offsets, *used))

    def _encode_blocks(self, texts: Texts) -> Rows:
        marks = np.arange(SCAN_BYTES, texts.offsets[-1], SCAN_BYTES)
        bounds = np.unique([0, *np.searchsorted(texts.offsets, marks).tolist(), len(texts)]).tolist()
        return _joined_rows([self._encode_block(texts.slice(start, end)) for start, end in pairwise(bounds)])

    def _encode_block(self, texts: Texts) -> Rows:
        """A language that does not repeat its units goes to the tokenizer, twice as long each time that it is tried."""
        self.bytes += len(texts.data)
        if self._to_pass:
            self._to_pass -= 1
            return self._encode_slowly(texts)
        data, offsets = self._with_prefix(texts)
        padded = np.empty(len(data) // 8 * 8 + 24, np.uint8)
        padded[: len(data)], padded[len(data) :] = data, 0
        units = cut(padded[: len(data)], offsets, self.rule)
        if (units.ends - units.starts).max(initial=0) > LONGEST:
            return self._encode_slowly(texts)
        found, new = self._table.look_up(padded, units, self.rule.lowercase)
        new_bytes = int(new[:, 1].sum())
        if new_bytes > MOST_NEW * len(data) and self.bytes > SCAN_BYTES // 2:
            self._passed = self._to_pass = min(2 * self._passed + 1, MOST_PASSED)
            self.new_bytes += len(texts.data)
            self._table.forget(new)
            return self._slow.encode([texts], special_tokens=False)
        self._passed = 0
        self.new_bytes += min(new_bytes, len(texts.data))  # a prefix is no text
        added = self._table.add(new, *self._read(padded, new)[:2])
        return Rows(*self._table.gather(found, units.of_texts, added))

    def _encode_slowly(self, texts: Texts) -> Rows:
        self.new_bytes += len(texts.data)
        return self._slow.encode([texts], special_tokens=False)

    def _read(self, data: np.ndarray, new: np.ndarray) -> Rows:
        """The ids of new units, by the tokenizer. Several go into one text, which costs it half as much, with something
        between that has one id. Where the text is not cut right there, or that id is there more often, each unit goes
        alone."""
        if not len(new):
            return Rows(NOTHING, np.zeros(1, np.int64))
        places, parts, numbers = [], [], np.arange(len(new))
        is_left = np.ones(len(new), np.bool_)
        for most in JOINED:
            tried = numbers[is_left & self._can_be_joined(data, new)]
            if len(tried) > 1:
                is_read, rows = self._read_joined(data, new[tried], most)
                places.append(tried[is_read])
                parts.append(rows)
                is_left[tried[is_read]] = False
        left = numbers[is_left]
        if len(left):
            taken = [data[start : start + length] for start, length in new[left, :2].tolist()]
            places.append(left)
            parts.append(self._units.encode([Texts(np.concatenate(taken), offsets_of(new[left, 1]))], False))
        return _in_order(_joined_rows(parts), np.concatenate([left[:0], *places]))

    def _can_be_joined(self, data: np.ndarray, new: np.ndarray) -> np.ndarray:
        """(new,) bool. Where a word takes the space before it, what has none is the first word of a text, and would be
        one with the separator."""
        if self._separator is None:
            return np.zeros(len(new), np.bool_)
        return (data[new[:, 0]] == ord(" ")) | (self._separator[0][0] != ord(" "))

    def _read_joined(self, data: np.ndarray, new: np.ndarray, most: int) -> tuple[np.ndarray, Rows]:
        """-> (new,) bool, which could be read so, and the ids of these."""
        assert self._separator is not None
        text, separator = self._separator
        joined, offsets, starts, of_joined = join(data, new, text, most)
        found = cut(joined, offsets, self.rule)
        read = self._units.encode([Texts(joined, offsets)], special_tokens=False)
        is_read, ids, of_units = part(
            read.ids, read.offsets, separator, found.starts, found.of_texts, starts, of_joined
        )
        return is_read, Rows(ids, of_units)

    def _find_separator(self) -> tuple[np.ndarray, int] | None:
        text = self.rule.separator
        ids = self._units.tokenizer.encode(text, add_special_tokens=False).ids
        return (np.frombuffer(text.encode(), np.uint8), ids[0]) if len(ids) == 1 else None

    def _with_prefix(self, texts: Texts) -> Texts:
        """The texts as they are, or each with the prefix of the rule, unless it is empty or starts with it."""
        prefix = np.frombuffer(self.rule.prefix.encode(), np.uint8)
        if not len(prefix):
            return texts
        starts, lengths = texts.offsets[:-1], np.diff(texts.offsets)
        takes = lengths > 0
        if not self.rule.is_prefix_repeated:
            takes[takes] &= texts.data[starts[takes]] != prefix[0]
        data = np.insert(texts.data, np.repeat(starts[takes], len(prefix)), np.tile(prefix, takes.sum()))
        return Texts(data, texts.offsets + len(prefix) * offsets_of(takes))

    def _check(self, columns: Sequence[Texts], rows: Rows, special_tokens: bool) -> None:
        """Compare with the tokenizer: the first and last rows, and those with the most bytes beyond ASCII."""
        numbers, counted = _sample(columns), self.amount()
        sample = [Texts.of_strings([texts.text(i)[:SAMPLE_CHARACTERS] for i in numbers]) for texts in columns]
        expected = self._slow.encode(sample, special_tokens)
        for place, number in enumerate(numbers):
            is_whole = all(len(texts.text(number)) <= SAMPLE_CHARACTERS for texts in columns)
            short = [texts.slice(place, place + 1) for texts in sample]
            found = rows.row(number) if is_whole else self._encode(short, special_tokens).ids
            if not np.array_equal(found, expected.row(place)):
                raise DifferentTokens(" + ".join(texts.text(0) for texts in short))
        self.bytes, self.new_bytes, _ = counted


Encoder = FastEncoder | SlowEncoder


def open_encoder(description: str, mode: str = "auto") -> Encoder:
    """The encoder of a tokenizer, from the JSON that `describe` makes. mode: see MODES.

    Raises ValueError for mode="fast" where no rule is known."""
    tokenizer = text_tokenizer(description)
    if mode == "exact":
        return SlowEncoder(tokenizer, "as --tokenize exact asks")
    try:
        return FastEncoder(tokenizer, unit_rule(description))
    except NoRule as error:
        if mode == "fast":
            raise ValueError(
                f"tokenize='fast' needs a tokenizer whose units are known, and this one has {error}; {TOKENIZE_CURE}"
            ) from None
        return SlowEncoder(tokenizer, f"units are not known for {error}")


class Frame(NamedTuple):
    """What stands around the texts of a row: (n,) int32 ids before, between and behind them; and the type ids of what
    is before, of the first text, between, of the second text, and behind, (5,) int8."""

    before: np.ndarray
    between: np.ndarray
    behind: np.ndarray
    types: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, columns: int) -> Frame:
        """As the tokenizer shows it with a row of letters. Raises NoRule where they cannot be told from the rest."""
        encoding = tokenizer.encode("a") if columns == 1 else tokenizer.encode("a", "a")
        texts, ids, types = (
            encoding.sequence_ids,
            np.array(encoding.ids, np.int32),
            np.array(encoding.type_ids, np.int8),
        )
        inside = [[place for place, text in enumerate(texts) if text == column] for column in range(columns)]
        if not all(inside):
            raise NoRule("no token of the letter a")
        first = inside[0][0], inside[0][-1] + 1
        second = (inside[1][0], inside[1][-1] + 1) if columns == 2 else (first[1], first[1])
        parts = [slice(*each) for each in pairwise((0, *first, *second, len(ids)))]
        if any(len(set(types[each].tolist())) > 1 for each in parts):
            raise NoRule("special tokens of several types in a row")
        before, _, between, _, behind = (ids[each] for each in parts)
        of_parts = np.array([max(types[each].tolist(), default=0) for each in parts], np.int8)
        return cls(before, between, behind, of_parts)


NOTHING = np.empty(0, np.int32)
BARE = Frame(NOTHING, NOTHING, NOTHING, np.zeros(5, np.int8))


def _sample(columns: Sequence[Texts]) -> list[int]:
    """The numbers of rows to look at."""
    counts = sum(count_foreign(texts.data, texts.offsets) for texts in columns)
    rows, few = len(columns[0]), SAMPLE_TEXTS // 4
    most = np.argpartition(counts, -2 * few)[-2 * few :] if rows > 2 * few else np.arange(rows)
    return sorted({*range(min(few, rows)), *range(max(rows - few, 0), rows), *most.tolist()})


def _joined_rows(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    ids = np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)])
    return Rows(ids, offsets_of(np.concatenate([np.empty(0, np.int64), *(np.diff(part.offsets) for part in parts)])))


def _in_order(rows: Rows, places: np.ndarray) -> Rows:
    """Row i moves to places[i]."""
    if np.array_equal(places, np.arange(len(places))):
        return rows
    source = np.argsort(places)
    lengths = np.diff(rows.offsets)[source]
    offsets = offsets_of(lengths)
    return Rows(rows.ids[np.repeat(rows.offsets[source] - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets)
