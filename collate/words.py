"""Words: which tokens belong together when whole words are masked.

Each token starts a word, continues one, or is in none. Rows may say it by `word_ids`, a tokenizer's
`encoding.word_ids()`. Otherwise the vocabulary says it: by the mark that the tokenizer sets at pieces of words, and by
the characters on both sides of a boundary, where the tokenizer's own pre-tokenizer separates them.

    WordPiece      em ##bed ##ding       what begins with ## continues
    SentencePiece  ▁em bed ding          what does not begin with ▁ continues
    byte-level     Ġem bed ding ( x ) Ċ  what does not begin with white space continues, where the kinds agree

A script without spaces has one mark a sentence, and so one "word" for all of it. Masking that as a whole would leave
nothing to predict it from: see `cut_long_words`.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from collate.vocabulary import added_ids, vocabulary_size
from packing.numba_tools import njit

NO_WORD, CONTINUES, BEGINS = np.int8(-1), np.int8(0), np.int8(1)  # a token's part in a word

LETTER, NUMBER, MARK, HAN, OTHER, BLANK, BREAK = range(7)
INSIDE = -1
"""A token that begins, or ends, inside a character of several bytes."""
EXAMPLES = ("a", "1", "\u0301", "中", ".", " ", "\n")
"""A character of each kind, to ask a pre-tokenizer with."""
IDEOGRAPHS = ("CJK ", "HIRAGANA", "KATAKANA")
"""Starts of the Unicode names of characters that tokenizers part like Chinese ones, if they part them."""


@dataclass(frozen=True, eq=False)
class Boundaries:
    """Where a word ends by its characters: "x" and ")" of the tokens `x ) ;` are of two kinds.

    kinds_V2: (V, 2) int8, of each token's first and last character; INSIDE where that is not whole.
    parted_KK: (kinds, kinds) bool: a character of the first kind, then one of the second, are two words.
    """

    kinds_V2: np.ndarray
    parted_KK: np.ndarray

    @classmethod
    def none(cls, vocabulary: int) -> "Boundaries":
        """No character parts words; marks alone do."""
        return cls(np.zeros((vocabulary, 2), np.int8), np.zeros((1, 1), bool))


def word_continuations(tokenizer: Any) -> np.ndarray:
    """(V,) bool: tokens that continue the word before them, by the mark that the tokenizer sets at word pieces.

    V is the highest id + 1. Special tokens, added tokens and white space are words of their own. Raises ValueError
    where tokens do not tell: marks at the end of words (</w>, @@), single bytes or characters.
    """
    vocabulary = tokenizer.get_vocab()
    mark = _word_mark(tokenizer, vocabulary)
    continues_V = np.zeros(vocabulary_size(tokenizer), bool)
    for token, token_id in vocabulary.items():
        is_piece = token.startswith(mark)
        continues_V[token_id] = not _bytes_of(token, mark)[:1].isspace() if mark in ("▁", "Ġ") else is_piece
    continues_V[added_ids(tokenizer)] = False
    return continues_V


def word_boundaries(tokenizer: Any) -> Boundaries:
    """Where the pre-tokenizer splits tokens that have no mark. It always splits after white space and added tokens.

    A WordPiece needs none: all of its pieces have a mark. Raises ValueError like `word_continuations`.
    """
    vocabulary = tokenizer.get_vocab()
    mark, size = _word_mark(tokenizer, vocabulary), vocabulary_size(tokenizer)
    if mark not in ("▁", "Ġ"):
        return Boundaries.none(size)
    kinds_V2 = np.zeros((size, 2), np.int8)
    for token, token_id in vocabulary.items():
        kinds_V2[token_id] = _kinds_of(_bytes_of(token, mark))
    kinds_V2[added_ids(tokenizer)] = BREAK
    return Boundaries(kinds_V2, _parted_kinds(tokenizer))


def _word_mark(tokenizer: Any, vocabulary: dict[str, int]) -> str:
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    prefix = getattr(model, "continuing_subword_prefix", None)  # a WordPiece may have no pieces
    return prefix or _commonest_mark(tokenizer, vocabulary)


def _commonest_mark(tokenizer: Any, vocabulary: dict[str, int]) -> str:
    """The mark of most tokens: a RoBERTa vocabulary has "##" and "@@" too, but half of its tokens begin with Ġ."""
    counts = {mark: sum(token.startswith(mark) for token in vocabulary) for mark in ("##", "▁", "Ġ")}
    counts |= {mark: sum(token.endswith(mark) for token in vocabulary) for mark in ("</w>", "@@")}
    mark = max(counts, key=lambda mark: counts[mark])
    if mark in ("</w>", "@@") or counts[mark] == 0:
        name = f"{type(tokenizer).__name__} {getattr(tokenizer, 'name_or_path', '') or ''}".strip()
        raise ValueError(
            f"the tokens of {name} do not tell where words begin: of {len(vocabulary)}, {counts['##']} begin with ##, "
            f"{counts['▁']} with ▁, {counts['Ġ']} with Ġ; for whole words give a token-level column of word ids "
            "named word_ids (encoding.word_ids())"
        )
    return mark


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_alphabet()


def _bytes_of(token: str, mark: str) -> bytes:
    """The text of a token, a mark as a space: ▁em -> b" em"   Ġem -> b" em"   Ċ -> b"\\n"   <0xE4> -> b"\\xe4" """
    if mark == "Ġ" and BYTES.keys() >= set(token):
        return bytes(BYTES[character] for character in token)
    if token.startswith("<0x") and (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)):
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode(errors="replace")


def _kinds_of(text: bytes) -> tuple[int, int]:
    """The kinds of the first and of the last character."""
    last = next((i for i in range(len(text) - 1, -1, -1) if _begins_character(text[i])), None)
    if last is None:
        return INSIDE, INSIDE
    end = next((i for i in range(1, len(text)) if _begins_character(text[i])), len(text))
    return _kind(text[:end]) if _begins_character(text[0]) else INSIDE, _kind(text[last:])


def _begins_character(byte: int) -> bool:
    return byte & 0xC0 != 0x80


TAILS = (b"\xad\xad\xad", b"\x9f\x98\x80")
"""What completes a character that lacks bytes: E3 81 + AD is a Japanese letter, F0 + 9F 98 80 an emoji."""


@lru_cache(1 << 16)
def _kind(character: bytes) -> int:
    """The kind of a character. One that lacks bytes at its end counts as a character that begins so."""
    size = 1 + (character[0] >= 0xC0) + (character[0] >= 0xE0) + (character[0] >= 0xF0)
    missing = size - len(character)
    texts = [(character + tail[3 - missing :]).decode(errors="replace") for tail in TAILS]
    text = next((text[0] for text in texts if unicodedata.category(text[0]) != "Cn" and text[0] != "\ufffd"), "a")
    if text.isspace():
        return BLANK if text == " " else BREAK
    if unicodedata.name(text, "").startswith(IDEOGRAPHS):
        return HAN
    return {"L": LETTER, "N": NUMBER, "M": MARK}.get(unicodedata.category(text)[0], OTHER)


def _parted_kinds(tokenizer: Any) -> np.ndarray:
    """(kinds, kinds) bool, asked of the pre-tokenizer: "a." -> "a" "." -> True, but " a" -> "Ġa" -> False"""
    pre_tokenizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    parted_KK = np.zeros((len(EXAMPLES), len(EXAMPLES)), bool)
    if pre_tokenizer is not None:
        for i, one in enumerate(EXAMPLES):
            for k, other in enumerate(EXAMPLES):
                parted_KK[i, k] = any(begin == 1 for _, (begin, _) in pre_tokenizer.pre_tokenize_str(one + other))
    parted_KK[BREAK] = True
    return parted_KK


@njit(cache=True, nogil=True)
def parts_by_vocabulary(input_ids_T, is_special_T, offsets, continues_word_V, kinds_V2, parted_KK):
    """(T,) int8. A token after a special one, and the first of a sequence, start a word in any case."""
    parts_T = np.empty(len(input_ids_T), np.int8)
    for i in range(len(offsets) - 1):
        last = NO_WORD  # the kind of the last character; NO_WORD where no word is open
        for t in range(offsets[i], offsets[i + 1]):
            token = input_ids_T[t]
            first = kinds_V2[token, 0]
            if is_special_T[t]:
                parts_T[t], last = NO_WORD, NO_WORD
                continue
            if last == NO_WORD:
                parts_T[t] = BEGINS
            elif first == INSIDE or (continues_word_V[token] and not parted_KK[last, first]):
                parts_T[t] = CONTINUES
            else:
                parts_T[t] = BEGINS
            if kinds_V2[token, 1] != INSIDE:
                last = kinds_V2[token, 1]
            elif last == NO_WORD:
                last = np.int8(LETTER)
    return parts_T


@njit(cache=True, nogil=True)
def parts_by_word_ids(is_special_T, offsets, word_ids_T):
    """(T,) int8: neighbours with one word id are one word; tokens with a negative one are in no word."""
    parts_T = np.empty(len(word_ids_T), np.int8)
    for i in range(len(offsets) - 1):
        inside = False
        for t in range(offsets[i], offsets[i + 1]):
            if is_special_T[t] or word_ids_T[t] < 0:
                parts_T[t] = NO_WORD
            else:
                parts_T[t] = CONTINUES if inside and word_ids_T[t] == word_ids_T[t - 1] else BEGINS
            inside = parts_T[t] != NO_WORD
    return parts_T


@njit(cache=True, nogil=True)
def word_end(parts_T, start, end):
    """One past the last token of the word that begins at `start`."""
    t = start + 1
    while t < end and parts_T[t] == CONTINUES:
        t += 1
    return t


@njit(cache=True, nogil=True)
def find_words(parts_T, first, end, words):
    """Write where the words of a sequence begin into `words`, and return how many there are."""
    count = 0
    for t in range(first, end):
        if parts_T[t] == BEGINS:
            words[count] = t
            count += 1
    return count


@njit(cache=True, nogil=True)
def cut_long_words(parts_T, offsets, longest):
    """Make every token of a word with more than longest[i] tokens a word of its own, in place.

        longest 2   [BEGINS CONTINUES CONTINUES BEGINS CONTINUES] -> [BEGINS BEGINS BEGINS BEGINS CONTINUES]

    Returns (4,) int64: words before, words that were cut, tokens in all words, tokens in those that were cut.
    """
    counts = np.zeros(4, np.int64)
    for i in range(len(offsets) - 1):
        t = offsets[i]
        while t < offsets[i + 1]:
            if parts_T[t] == NO_WORD:
                t += 1
                continue
            stop = word_end(parts_T, t, offsets[i + 1])
            counts[0] += 1
            counts[2] += stop - t
            if stop - t > longest[i]:
                parts_T[t:stop] = BEGINS
                counts[1] += 1
                counts[3] += stop - t
            t = stop
    return counts
