"""Texts -> ids, by a tokenizer: each distinct unit of a text once, and then out of a table; or by encode_batch.

    encoder = open_encoder(description)
    rows = encoder.encode([texts])            # the ids of encode_batch

The result is the tokenizer's own. A rule says where texts may be cut, and why (rules.py). Besides, the tokenizer reads
a sample of the texts of each call itself. Where an id differs, DifferentTokens names the text, and the caller starts
again with the tokenizer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from packing.histogram import offsets_of
from packing.text.outcome import Amount, DifferentTokens
from packing.text.plain import PlainReader
from packing.text.reader import UnitReader
from packing.text.rows import Rows, SlowEncoder, Texts, joined_rows
from packing.text.rules import unit_rule
from packing.text.spaces import squeeze
from packing.text.table import MOST_IDS, WordTable, count_foreign, cut, frame
from packing.text.tokenizer import TOKENIZE_CURE, text_tokenizer
from packing.text.units import NoRule, UnitRule

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SCAN_BYTES = 1 << 18  # of texts at a time: what is known of their units stays in the processor's cache
SAMPLE_TEXTS, SAMPLE_CHARACTERS = 8, 2048
"""How many texts of a call the tokenizer reads itself, and how much of each."""
MOST_NEW = 0.95  # of the bytes of a block; with more in new units, the tokenizer reads the block as it is
MOST_PASSED = 64  # blocks that go to the tokenizer before the table is tried again
LONGEST = MOST_IDS >> 5  # bytes of a unit, whose ids can be counted: a character has 11 times its bytes at most


class FastEncoder:
    """Units out of a table. The tokenizer reads units that are new, and a sample of the texts.

    bytes: how much text there was. new_bytes: how much of it the tokenizer read.
    """

    def __init__(self, tokenizer: Tokenizer, rule: UnitRule):
        self.tokenizer, self.rule, self._slow = tokenizer, rule, SlowEncoder(tokenizer)
        self._plain = PlainReader(rule.tokenizer, tokenizer.normalizer)
        self._table, self._reader = WordTable(), UnitReader(rule, self._plain)
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
        return joined_rows([self._encode_block(texts.slice(start, end)) for start, end in pairwise(bounds)])

    def _encode_block(self, texts: Texts) -> Rows:
        """A language that does not repeat its units goes to the tokenizer, twice as long each time that it is tried."""
        self.bytes += len(texts.data)
        if self._to_pass:
            self._to_pass -= 1
            return self._encode_slowly(texts)
        data, offsets = self._prepared(texts)
        padded = _padded(data)
        units = cut(padded[: len(data)], offsets, self.rule)
        if (units.ends - units.starts).max(initial=0) > LONGEST:
            return self._encode_slowly(texts)
        found, new = self._table.look_up(padded, units, self.rule.lowercase)
        new_bytes = int(new[:, 1].sum())
        if new_bytes > MOST_NEW * len(data) and self.bytes > SCAN_BYTES // 2:
            self._passed = self._to_pass = min(2 * self._passed + 1, MOST_PASSED)
            self._table.forget(new)
            return self._encode_slowly(texts)
        self._passed = 0
        self.new_bytes += min(new_bytes, len(texts.data))  # a prefix is no text
        added = self._learn(padded, new) if len(new) else NO_UNITS
        return Rows(*self._table.gather(found, units.of_texts, added))

    def _learn(self, data: np.ndarray, new: np.ndarray) -> np.ndarray:
        """What `WordTable.gather` needs of new units, which the tokenizer reads."""
        rows = self._reader.read(data, new)
        return self._table.add(new, rows.ids, rows.offsets)

    def _encode_slowly(self, texts: Texts) -> Rows:
        self.new_bytes += len(texts.data)
        return self._plain.read(texts, self._slow)

    def _prepared(self, texts: Texts) -> Texts:
        """The texts as they are cut: the prefix of the rule before those that take it, white space squeezed."""
        if self.rule.squeezes:
            texts = Texts(*squeeze(texts.data, texts.offsets, self.rule.classes))
        prefix = np.frombuffer(self.rule.prefix.encode(), np.uint8)
        starts, lengths = texts.offsets[:-1], np.diff(texts.offsets)
        takes = lengths > 0
        takes[takes] = self.rule.prefixed[texts.data[starts[takes]]]
        if not takes.any():
            return texts
        data = np.insert(texts.data, np.repeat(starts[takes], len(prefix)), np.tile(prefix, takes.sum()))
        return Texts(data, texts.offsets + len(prefix) * offsets_of(takes))

    def _check(self, columns: Sequence[Texts], rows: Rows, special_tokens: bool) -> None:
        """Compare with the tokenizer: the first and last rows, and those with the most bytes beyond ASCII."""
        numbers, counted = _sample(columns), self.amount()
        sample = [Texts.of_strings([texts.text(i)[:SAMPLE_CHARACTERS] for i in numbers]) for texts in columns]
        expected = self._slow.encode(sample, special_tokens)
        whole = [all(len(texts.text(number)) <= SAMPLE_CHARACTERS for texts in columns) for number in numbers]
        short = rows if all(whole) else self._encode(sample, special_tokens)
        for place, number in enumerate(numbers):
            found = rows.row(number) if whole[place] else short.row(place)
            if not np.array_equal(found, expected.row(place)):
                raise DifferentTokens(" + ".join(texts.text(place) for texts in sample))
        self.bytes, self.new_bytes, _ = counted


Encoder = FastEncoder | SlowEncoder


def open_encoder(description: str, mode: str = "auto") -> Encoder:
    """The encoder of a tokenizer, from the JSON that `describe` makes. mode: see MODES.

    Raises ValueError for mode="fast" where no rule is known."""
    tokenizer = text_tokenizer(description)
    if mode == "exact":
        return SlowEncoder(tokenizer, "as --tokenize exact asks")
    try:
        rule = unit_rule(description)
        return FastEncoder(tokenizer, rule)
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


NO_UNITS, NOTHING = np.empty(0, np.int64), np.empty(0, np.int32)
NO_BYTES = np.frombuffer(b"", np.uint8)  # as what it stands for: no kernel is compiled twice
BARE = Frame(NOTHING, NOTHING, NOTHING, np.zeros(5, np.int8))


def _padded(data: np.ndarray) -> np.ndarray:
    """With 16 bytes more, as `WordTable.look_up` needs them."""
    padded = np.empty(len(data) + 16, np.uint8)
    padded[: len(data)], padded[len(data) :] = data, 0
    return padded


def _sample(columns: Sequence[Texts]) -> list[int]:
    """The numbers of rows to look at."""
    counts = sum(count_foreign(texts.data, texts.offsets) for texts in columns)
    rows, few = len(columns[0]), SAMPLE_TEXTS // 4
    most = np.argpartition(counts, -2 * few)[-2 * few :] if rows > 2 * few else np.arange(rows)
    return sorted({*range(min(few, rows)), *range(max(rows - few, 0), rows), *most.tolist()})
