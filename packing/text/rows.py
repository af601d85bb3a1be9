"""Texts, and the rows of ids that come of them; and the plain way from one to the other, by encode_batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from packing.histogram import offsets_of
from packing.text.outcome import Amount

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer


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
        data = self.data.tobytes()
        return [data[start:end].decode() for start, end in pairwise(self.offsets.tolist())]

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


def joined_rows(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    ids = np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)])
    return Rows(ids, offsets_of(np.concatenate([np.empty(0, np.int64), *(np.diff(part.offsets) for part in parts)])))


def picked_rows(rows: Rows, numbers: np.ndarray) -> Rows:
    """The rows of these numbers, in their order."""
    lengths = np.diff(rows.offsets)[numbers]
    offsets = offsets_of(lengths)
    return Rows(rows.ids[np.repeat(rows.offsets[numbers] - offsets[:-1], lengths) + np.arange(offsets[-1])], offsets)


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
