"""Where a text may be cut, so that each piece has the tokens that it has in the whole text.

"we must, must we"   ->   "we" "must" "," "must" "we"          BertPreTokenizer
                          "we" " must" "," " must" " we"       ByteLevel

Such a piece is a unit. A language repeats its units, so each needs the tokenizer only once: see table.

A rule is a table. Each character has a class; whether a text is cut before a character follows from the classes of the
one before it, itself and the one after it. rules.py makes it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np

CODE_POINTS = 0x110000
PRIVATE = 0x40000  # from here on no character that shows has been assigned
CLASSES = 8
EDGE, SPACE, BREAK, LETTER, APOSTROPHE, MARK, VISIBLE, UNSAFE = range(CLASSES)
"""EDGE: before and after the text. BREAK: white space that is no space. LETTER: a letter or digit of ASCII. MARK: other
ASCII. A rule may take more characters for these two. VISIBLE: a character that shows and joins with nothing. UNSAFE:
all others; a rule does not cut beside them."""

SHOWING = (LETTER, APOSTROPHE, MARK, VISIBLE)
WHITE = (SPACE, BREAK)


@dataclass(frozen=True, eq=False)
class UnitRule:
    """Where to cut.

    classes: (CODE_POINTS,) uint8, the class of each character.
    cuts: (CLASSES, CLASSES, CLASSES) uint8, whether to cut before a character, by the classes of the one before it, its
        own, and of the one after it.
    kept: (CLASSES,) uint8, whether a unit that starts with this class has tokens.
    tokenizer: the JSON of what makes tokens of a unit: the tokenizer, but without what it puts before a text.
    prefix: what to put before a text that starts with one of these bytes: (256,) bool, prefixed.
    lowercase: whether the tokenizer takes capital letters of ASCII for small ones.
    separator: a unit that may part others which the tokenizer reads in one text; "" is none.
    word_mark: what the first token of a word starts with, and no other, if words are known by that; see words.
    squeezes: whether the tokenizer makes one space of a run of white space, see spaces.
    """

    classes: np.ndarray
    cuts: np.ndarray
    kept: np.ndarray
    tokenizer: str
    prefix: str = ""
    prefixed: np.ndarray = field(default_factory=lambda: np.zeros(256, np.bool_))
    lowercase: bool = False
    separator: str = ""
    word_mark: str = ""
    squeezes: bool = False

    @cached_property
    def cuts_and_kept(self) -> np.ndarray:
        """(CLASSES³,) uint8: 1 for a cut, and 2 more where the unit that starts there is kept."""
        return (self.cuts | self.kept[:, None] << 1).ravel()


class NoRule(ValueError):
    """Why a tokenizer has no rule: the part that is not known, or not safe to cut at."""


def parts_of(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the flat list of what it is made of."""
    if component is None:
        return []
    inner = component.get("normalizers", component.get("pretokenizers"))
    return [component] if inner is None else [part for each in inner for part in parts_of(each)]


def types_of(parts: list[dict]) -> str:
    return " + ".join(part["type"] for part in parts) or "none"


def cut_table(is_cut: Callable[[int, int, int], bool]) -> np.ndarray:
    """The table of a function; no text is cut before its first character, since it starts there anyway."""
    cuts = np.zeros((CLASSES, CLASSES, CLASSES), np.uint8)
    for before, this, after in product(range(1, CLASSES), range(1, CLASSES), range(CLASSES)):
        cuts[before, this, after] = is_cut(before, this, after)
    return cuts


def kept_table(*dropped: int) -> np.ndarray:
    kept = np.ones(CLASSES, np.uint8)
    kept[list(dropped)] = 0
    return kept


@cache
def general_classes() -> np.ndarray:
    """The class of each character by Unicode's categories, before a rule changes any."""
    classes = np.full(CODE_POINTS, UNSAFE, np.uint8)
    for code in range(0x80, PRIVATE):
        if unicodedata.category(chr(code))[0] in "LNPS":
            classes[code] = VISIBLE
    for code in range(0x21, 0x7F):
        classes[code] = LETTER if chr(code).isalnum() else MARK
    classes[ord("'")] = APOSTROPHE
    classes[ord(" ")] = SPACE
    classes[[ord(character) for character in "\t\n\v\f\r"]] = BREAK
    return classes
