"""Plain texts, as the model of a tokenizer sees them: then neither normalizer nor pre-tokenizer has anything to do.

"我们，we must"   ->   "▁我们,we ▁must"

The tokenizer spends up to half of its time on these two. A text is plain if each character is, and each space stands
alone. Metaspace parts it at the spaces, and WhitespaceSplit parts what is written here at the same places.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from packing.numba_tools import njit
from packing.text.rows import Rows, SlowEncoder, Texts, joined_rows, picked_rows
from packing.text.table import class_at
from packing.text.tokenizer import text_tokenizer
from packing.text.units import CODE_POINTS, parts_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

BLOCKS = (
    (0x21, 0x7E),  # ASCII
    (0xC0, 0x24F),  # Latin
    (0x400, 0x481),  # Cyrillic
    (0x621, 0x64A),  # Arabic
    (0x2010, 0x2016),  # punctuation, without what NFKC makes a space of
    (0x2018, 0x2027),
    (0x2030, 0x203D),
    (0x203F, 0x205E),
    (0x3001, 0x3029),  # Chinese punctuation
    (0x3041, 0x3096),  # Japanese
    (0x30A1, 0x30FF),
    (0x3400, 0x4DBF),  # Chinese
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),  # Korean
    (0xFF01, 0xFF5E),  # ASCII as wide as Chinese
)
"""Characters that no normalizer joins with one another: each starts a grapheme, and composes with marks alone."""
JOINED_BYTES = 1 << 12
MOST_GROWTH = 4  # bytes written for one of a text: a space becomes " ▁"
SIZE_BITS = 4
SPACE_ENTRY = -1


class PlainReader:
    """The ids of texts: the model alone reads plain ones, many at a time, and the tokenizer all others.

    Each word starts with a mark, and so does its first token, and no other. So counting words parts the texts again.
    """

    def __init__(self, description: str, normalizer: Normalizer | None):
        """From the JSON of a tokenizer that has a rule, and its normalizer."""
        content = json.loads(description)
        self._model: SlowEncoder | None = None
        if not _parts_at_spaces(content):
            return
        (*_, metaspace) = parts_of(content["pre_tokenizer"])
        bare = content | {"normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}}
        tokenizer, mark = text_tokenizer(json.dumps(bare)), metaspace["replacement"]
        if tokenizer.token_to_id(mark) is None:
            return
        self._entries, self._written = _written(parts_of(content["normalizer"]), normalizer, mark)
        self._mark = np.frombuffer(mark.encode(), np.uint8)
        self._puts_mark = metaspace["prepend_scheme"] != "never"
        self._is_first, self._model = first_ids(tokenizer, mark), SlowEncoder(tokenizer)

    def read(self, texts: Texts, others: SlowEncoder) -> Rows:
        """others: the tokenizer itself."""
        if self._model is None:
            return others.encode([texts], special_tokens=False)
        written = np.empty(MOST_GROWTH * (len(texts.data) + len(texts)), np.uint8)
        joined, words, is_plain = write(
            texts.data, texts.offsets, self._entries, self._written, self._mark, self._puts_mark, JOINED_BYTES, written
        )
        ids, offsets, _ = self._model.encode([Texts(written[: joined[-1, 0]], joined[:, 0])], special_tokens=False)
        of_texts, is_parted = part_texts(ids, offsets, self._is_first, words, joined[:, 1])
        if not is_parted:
            return others.encode([texts], special_tokens=False)
        if is_plain.all():
            return Rows(ids, of_texts)
        left = np.flatnonzero(~is_plain)
        rest = others.encode([Texts.of_strings([texts.text(number) for number in left.tolist()])], False)
        order = np.concatenate([np.flatnonzero(is_plain), left])
        return picked_rows(joined_rows([Rows(ids, of_texts), rest]), np.argsort(order))


def first_ids(tokenizer: Tokenizer, mark: str) -> np.ndarray:
    """Whether an id is the first of a word: (ids,) bool."""
    vocabulary = tokenizer.get_vocab()
    is_first = np.zeros(max(vocabulary.values()) + 1, np.bool_)
    is_first[[id_ for piece, id_ in vocabulary.items() if piece.startswith(mark)]] = True
    return is_first


def _parts_at_spaces(content: dict[str, Any]) -> bool:
    parts = parts_of(content["pre_tokenizer"])
    is_metaspace = [part["type"] for part in parts] in (["Metaspace"], ["WhitespaceSplit", "Metaspace"])
    return is_metaspace and parts[-1].get("split", True) and "prepend_scheme" in parts[-1]


def _written(parts: list[dict], normalizer: Normalizer | None, mark: str) -> tuple[np.ndarray, np.ndarray]:
    """What the normalizer makes of each plain character.

    -> (CODE_POINTS,) int32, where in bytes it starts, and how many it has, 0 for characters that are not plain; and
       the bytes."""
    replaced = {*mark}.union(*(part["pattern"].get("String", "") for part in parts if part["type"] == "Replace"))
    plain = [chr(code) for first, last in BLOCKS for code in range(first, last + 1)]
    plain = [each for each in plain if unicodedata.category(each)[0] in "LNPS" and each not in replaced]
    made = plain if normalizer is None else _normalized(normalizer.normalize_str, plain)
    allowed, entries, found, size = set(plain), np.zeros(CODE_POINTS, np.int32), [], 0
    for each, becomes in zip(plain, made, strict=True):
        written = becomes.encode()
        if becomes and allowed.issuperset(becomes) and len(written) <= MOST_GROWTH * len(each.encode()):
            entries[ord(each)] = size << SIZE_BITS | len(written)
            found.append(written)
            size += len(written)
    entries[ord(" ")] = SPACE_ENTRY
    return entries, np.frombuffer(b"".join(found), np.uint8)


def _normalized(normalize: Callable[[str], str], characters: list[str]) -> list[str]:
    """What becomes of each between two letters; "" where that cannot be told."""
    found = normalize(" ".join(f"a{each}a" for each in characters)).split(" ")
    if len(found) != len(characters):
        found = [normalize(f"a{each}a") for each in characters]
    return [each[1:-1] if each[:1] == each[-1:] == "a" else "" for each in found]


@njit(nogil=True, cache=True)
def write(data, offsets, entries, bytes_, mark, puts_mark, most, written):
    """Plain texts as the model sees them, joined until there are so many bytes.

    -> (joined + 1, 2) int64, where each starts in written, and its first text; (plain,) int64, words of each text that
       is plain; (texts,) bool, whether it is
    """
    joined = np.zeros((len(offsets), 2), np.int64)
    words, is_plain = np.empty(len(offsets) - 1, np.int64), np.empty(len(offsets) - 1, np.bool_)
    size, plain, count = 0, 0, 0
    for text in range(len(offsets) - 1):
        at, end, start, marks = offsets[text], offsets[text + 1], size, 0
        is_good = at < end and data[end - 1] != 0x20 and (puts_mark or data[at] == 0x20)
        if is_good and data[at] != 0x20:
            size, marks = _put_mark(mark, written, size, size > joined[count, 0]), 1
        while at < end and is_good:
            entry, length = class_at(data, at, entries)
            if entry == SPACE_ENTRY:
                is_good = data[at + 1] != 0x20  # another byte follows, since none ends in a space
                size = _put_mark(mark, written, size, size > joined[count, 0])
                marks += 1
            else:
                is_good = entry > 0
                place = entry >> SIZE_BITS
                for k in range(entry & ((1 << SIZE_BITS) - 1)):
                    written[size] = bytes_[place + k]
                    size += 1
            at += length
        is_plain[text] = is_good
        if not is_good:
            size = start
            continue
        words[plain] = marks
        plain += 1
        if size - joined[count, 0] >= most:
            count += 1
            joined[count, 0], joined[count, 1] = size, plain
    if size > joined[count, 0]:
        count += 1
        joined[count, 0], joined[count, 1] = size, plain
    return joined[: count + 1], words[:plain], is_plain


@njit(inline="always")
def _put_mark(mark, written, size, is_behind):
    if is_behind:
        written[size] = 0x20
        size += 1
    for byte in mark:
        written[size] = byte
        size += 1
    return size


@njit(nogil=True, cache=True)
def part_texts(ids, offsets, is_first, words, of_joined):
    """The ids of joined texts, parted again.

    words: of each text. of_joined: the first text of each joined one, and the number of texts.
    -> (texts + 1,) int64, the first id of each text; and whether there are as many words as there must be
    """
    of_texts = np.full(len(words) + 1, len(ids))
    text, left = 0, 0
    for k in range(len(ids)):
        if is_first[ids[k]]:
            if left == 0:
                if text == len(words):
                    return of_texts, False
                of_texts[text], left = k, words[text]
                text += 1
            left -= 1
    is_parted = text == len(words) and left == 0
    for k in range(len(of_joined)):
        is_parted &= of_texts[of_joined[k]] == offsets[k]
    return of_texts, is_parted
