"""The JSON of a tokenizer -> where a text may be cut, so that each piece has the tokens that it has in the whole text.

"we must, must we"   ->   "we" "must" "," "must" "we"          BertPreTokenizer
                          "we" " must" "," " must" " we"       ByteLevel

Such a piece is a unit. A language repeats its units, so each needs the tokenizer only once: see word_table.

A rule is a table. Each character has a class; whether a text is cut before a character follows from the classes of the
one before it, itself and the one after it. A rule is only made of parts that are listed here, each with the
reason why its cuts hold. `unit_rule` names the part that has none. Then the tokenizer itself reads every text.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np

CODE_POINTS = 0x110000
PRIVATE = 0x40000  # from here on no character that shows has been assigned
CLASSES = 8
EDGE, SPACE, BREAK, LETTER, APOSTROPHE, MARK, VISIBLE, UNSAFE = range(CLASSES)
"""EDGE: before and after the text. BREAK: white space that is no space. LETTER: a letter or digit of ASCII. MARK: other
ASCII. VISIBLE: a character that shows and joins with nothing. UNSAFE: all others; a rule does not cut beside them."""

SHOWN = (LETTER, APOSTROPHE, MARK, VISIBLE)
WHITE = (SPACE, BREAK)


@dataclass(frozen=True, eq=False)
class UnitRule:
    """Where to cut.

    classes: (CODE_POINTS,) uint8, the class of each character.
    cuts: (CLASSES, CLASSES, CLASSES) uint8, whether to cut before a character, by the classes of the one before it, its
        own, and of the one after it.
    kept: (CLASSES,) uint8, whether a unit that starts with this class has tokens.
    tokenizer: the JSON of what makes tokens of a unit: the tokenizer, but without what it puts before a text.
    prefix: what it puts before a text that does not start with it; see is_prefix_repeated.
    lowercase: whether the tokenizer takes capital letters of ASCII for small ones.
    separator: a unit that may part others which the tokenizer reads in one text; "" is none.
    """

    classes: np.ndarray
    cuts: np.ndarray
    kept: np.ndarray
    tokenizer: str
    prefix: str = ""
    is_prefix_repeated: bool = False
    lowercase: bool = False
    separator: str = ""

    @cached_property
    def cuts_and_kept(self) -> np.ndarray:
        """(CLASSES³,) uint8: 1 for a cut, and 2 more where the unit that starts there is kept."""
        return (self.cuts | self.kept[:, None] << 1).ravel()


class NoRule(ValueError):
    """Why a tokenizer has no rule: the part that is not known, or not safe to cut at."""


def unit_rule(description: str) -> UnitRule:
    """The rule of a tokenizer, from the JSON that `describe` of packing.source.text makes.

    Raises NoRule with the reason where none is known."""
    content = json.loads(description)
    _check_model(content["model"])
    added = [token for token in content["added_tokens"] if not token["special"]]
    parts = _parts(content["pre_tokenizer"])
    for kinds, make in MAKERS:
        if tuple(part["type"] for part in parts) == kinds:
            return make(content, parts, added)
    raise NoRule(f"pre-tokenizer {_named(parts)}")


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the flat list of what it is made of."""
    if component is None:
        return []
    inner = component.get("normalizers", component.get("pretokenizers"))
    return [component] if inner is None else [part for each in inner for part in _parts(each)]


def _check_model(model: dict[str, Any]) -> None:
    """A model that sees one piece of the pre-tokenizer at a time, and always answers the same."""
    if model["type"] not in ("WordPiece", "WordLevel", "BPE", "Unigram"):
        raise NoRule(f"model {model['type']}")
    if model.get("dropout"):
        raise NoRule(f"a model that draws (dropout {model['dropout']})")


def _cuts(is_cut: Callable[[int, int, int], bool]) -> np.ndarray:
    """The table of a function; no text is cut before its first character, since it starts there anyway."""
    cuts = np.zeros((CLASSES, CLASSES, CLASSES), np.uint8)
    for before, this, after in product(range(1, CLASSES), range(1, CLASSES), range(CLASSES)):
        cuts[before, this, after] = is_cut(before, this, after)
    return cuts


def _kept(*dropped: int) -> np.ndarray:
    kept = np.ones(CLASSES, np.uint8)
    kept[list(dropped)] = 0
    return kept


@cache
def _general_classes() -> np.ndarray:
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


# BERT: white space, each mark of punctuation and each Chinese character part words

BLOCKS = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""Chinese characters, as BertNormalizer has them."""


def _bert(content: dict[str, Any], parts: list[dict], added: list[dict]) -> UnitRule:
    """BertNormalizer works on each character alone. Accents move over none of the characters that are cut at: these are
    starters, which no mark before them passes. It deletes control characters, and so joins what they part; only a
    space, \\t, \\n and \\r surely part words. Pre-tokenizer and model see one word.

    With a token added that is looked for in the text, words are cut at white space alone, and letters stay as they are.
    """
    normalizers = _parts(content["normalizer"])
    if [part["type"] for part in normalizers] != ["BertNormalizer"]:
        raise NoRule(f"normalizer {_named(normalizers)} before BertPreTokenizer")
    (normalizer,) = normalizers
    for token in added:
        if not all("!" <= character <= "~" for character in token["content"]):
            raise NoRule(f"added token {token['content']!r}, which is more than ASCII without spaces")
    classes = np.full(CODE_POINTS, LETTER, np.uint8)
    classes[[ord(character) for character in " \t\n\r"]] = SPACE
    if not added:
        classes[[code for code in range(0x21, 0x7F) if not chr(code).isalnum()]] = MARK
    if normalizer["handle_chinese_chars"]:
        for first, last in BLOCKS:
            classes[first : last + 1] = MARK
    cuts = _cuts(lambda before, this, after: before != this or this == MARK)
    lowercase = normalizer["lowercase"] and not added
    separator = "" if added else "|"
    return UnitRule(classes, cuts, _kept(SPACE), json.dumps(content), lowercase=lowercase, separator=separator)


# Byte-level BPE: a regular expression parts a text, and looks at one character ahead at most

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace("{1,3}", "")
EXPRESSIONS = {GPT2: "GPT-2", CL100K: "Llama 3", QWEN2: "Qwen 2"}


def _byte_level(content: dict[str, Any], parts: list[dict], added: list[dict]) -> UnitRule:
    """Each expression starts a new piece where these cuts are, whatever stands farther off:

    GPT-2       at the first white space of several, and at the last one, if something follows; behind that, unless it
                is a space; between a letter and a mark
    the others  at a space that follows something else; at any white space that follows a letter; at the last of
                several spaces, if something follows; between a letter and a mark

    NFC composes nothing with a character of ASCII behind it. A token added that is looked for in the text ends a run of
    white space before it, and may hold letters and marks: with one, only the first white space of several is cut at.
    """
    normalizers, model, of_bytes = _parts(content["normalizer"]), content["model"], parts[-1]
    if normalizers and [part["type"] for part in normalizers] != ["NFC"]:
        raise NoRule(f"normalizer {_named(normalizers)} before ByteLevel")
    if model["type"] != "BPE":
        raise NoRule(f"model {model['type']} behind ByteLevel")
    for token in added:
        is_spaces = len(token["content"]) > 1 and not token["content"].strip(" ")
        if token["rstrip"] or not (is_spaces or all("!" <= character <= "~" for character in token["content"])):
            raise NoRule(f"added token {token['content']!r}, which holds or takes spaces")
    if added and of_bytes["add_prefix_space"]:
        raise NoRule(f"added token {added[0]['content']!r}, behind which a space is added")
    is_gpt2 = _expression(parts) == GPT2

    def starts_white(before: int, this: int) -> bool:
        is_start = before in SHOWN and this in WHITE
        return is_start and (is_gpt2 or this == SPACE or before == LETTER)

    def is_last_white(before: int, this: int, after: int) -> bool:
        is_last = this in WHITE and after in SHOWN
        return is_last and (is_gpt2 or (before == SPACE and this == SPACE))

    def is_cut(before: int, this: int, after: int) -> bool:
        if added:
            return starts_white(before, this)
        return (
            starts_white(before, this)
            or is_last_white(before, this, after)
            or (is_gpt2 and before == BREAK and this in SHOWN)
            or (before == LETTER and this in (MARK, APOSTROPHE))
            or (is_gpt2 and before == MARK and this == LETTER)
        )

    prefix = " " if of_bytes["add_prefix_space"] else ""
    of_bytes["add_prefix_space"] = False  # in content, too
    return UnitRule(_general_classes(), _cuts(is_cut), _kept(), json.dumps(content), prefix=prefix, separator="\n")


def _expression(parts: list[dict]) -> str:
    """The regular expression that parts a text into what the model sees."""
    *splits, of_bytes = parts
    if not splits:
        if not of_bytes.get("use_regex", True):
            raise NoRule("ByteLevel without its expression")
        return GPT2
    (split,) = splits
    expression = split["pattern"].get("Regex")
    if expression not in EXPRESSIONS or split["behavior"] != "Isolated" or split["invert"]:
        raise NoRule(f"a text split at {split['pattern']}")
    if of_bytes.get("use_regex", True):
        raise NoRule("ByteLevel with its expression after Split")
    return expression


# Metaspace: spaces become ▁, and part words

NORMALIZERS = (
    "Precompiled", "Replace", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase", "Nmt", "Strip", "Prepend"
)  # fmt: skip


def _metaspace(content: dict[str, Any], parts: list[dict], added: list[dict]) -> UnitRule:
    """A text is cut before a white space that has something visible on both sides, where the normalizer leaves both as
    visible, and makes one space of what is between. The unit " must" becomes ▁must, as in the text.

    A normalizer that strips takes the space of a unit, and a pre-tokenizer that puts ▁ before each text puts it back.
    """
    metaspace = parts[-1]
    if added:
        raise NoRule(f"added token {added[0]['content']!r} beside Metaspace")
    scheme = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never")
    if len(parts) == 2 and scheme != "always":
        raise NoRule(f"WhitespaceSplit before Metaspace that prepends {scheme}")
    mark = metaspace.get("replacement", "▁")
    if not metaspace.get("split", True):
        _check_merges(content["model"], mark)
    normalizers = _parts(content["normalizer"])
    _check_normalizers(normalizers)
    if scheme == "never" and any(part["type"] == "Strip" for part in normalizers):
        raise NoRule("normalizer Strip before Metaspace that prepends nothing")
    classes = _classes_behind(json.dumps(content), mark)
    return UnitRule(classes, _cuts(_is_word_start), _kept(), json.dumps(content), separator=" |")


def _llama(content: dict[str, Any], parts: list[dict], added: list[dict]) -> UnitRule:
    """No pre-tokenizer: the normalizer puts ▁ before the text and for each space. No merge goes over a word's end."""
    normalizers = _parts(content["normalizer"])
    if [part["type"] for part in normalizers] != ["Prepend", "Replace"] or added:
        raise NoRule(f"normalizer {_named(normalizers)} without a pre-tokenizer")
    prepend, replace = normalizers
    mark = prepend["prepend"]
    if replace["pattern"] != {"String": " "} or replace["content"] != mark:
        raise NoRule(f"a normalizer that replaces {replace['pattern']}")
    _check_merges(content["model"], mark)
    content["normalizer"] = replace
    classes = _general_classes().copy()
    classes[classes == BREAK] = UNSAFE
    classes[ord(mark)] = UNSAFE
    return UnitRule(classes, _cuts(_is_word_start), _kept(), json.dumps(content), prefix=mark, is_prefix_repeated=True)


def _is_word_start(before: int, this: int, after: int) -> bool:
    return before in SHOWN and this == SPACE and after in SHOWN


def _check_merges(model: dict[str, Any], mark: str) -> None:
    """No piece holds a mark behind something else, so none goes over the start of a word."""
    if model["type"] != "BPE" or model.get("ignore_merges") or mark not in model["vocab"]:
        raise NoRule(f"model {model['type']} that sees the whole text")
    crossing = next((piece for piece in model["vocab"] if mark in piece.lstrip(mark)), None)
    if crossing is not None:
        raise NoRule(f"a piece that goes over the start of a word: {crossing!r}")


def _check_normalizers(normalizers: list[dict]) -> None:
    for part in normalizers:
        if part["type"] not in NORMALIZERS[:-1]:
            raise NoRule(f"normalizer {part['type']} before Metaspace")
        if part["type"] != "Replace":
            continue
        text, expression = part["pattern"].get("String"), part["pattern"].get("Regex")
        if expression != " {2,}" and (text is None or not text or any(map(str.isspace, text))):
            raise NoRule(f"a normalizer that replaces {part['pattern']}")


def _classes_behind(tokenizer: str, mark: str) -> np.ndarray:
    """The classes of characters, as the normalizer makes them: asked for each one between two letters.

    "a b a c a" with b to look at: normalized, it must be five pieces with a at both ends, and b left visible.
    """
    from tokenizers import Tokenizer

    classes = _general_classes().copy()
    normalizer = Tokenizer.from_str(tokenizer).normalizer
    classes[ord(mark)] = UNSAFE
    if normalizer is None:
        classes[classes == BREAK] = UNSAFE
        return classes
    for white in np.flatnonzero((classes == BREAK) | (classes == SPACE)).tolist():
        is_space = normalizer.normalize_str(f"a{chr(white)}a") in ("a a", f"a{mark}a")
        classes[white] = SPACE if is_space else UNSAFE
    shown = np.flatnonzero(np.isin(classes, SHOWN))
    for codes in _halves(shown.tolist(), lambda codes: _are_visible(normalizer.normalize_str, codes, mark)):
        classes[codes] = UNSAFE
    return classes


def _are_visible(normalize: Callable[[str], str], codes: list[int], mark: str) -> bool:
    found = normalize("a " + "".join(f"{chr(code)} a " for code in codes) + "a").replace(mark, " ").split(" ")
    between = found[1:-1:2]
    return len(found) == 2 * len(codes) + 2 and all(between) and set(found[::2][: len(codes) + 1]) == {"a"}


def _halves(codes: list[int], is_good: Callable[[list[int]], bool]) -> Iterator[list[int]]:
    """The codes that are not good, found by halving a list until what is left is."""
    if is_good(codes):
        return
    if len(codes) == 1:
        yield codes
        return
    middle = len(codes) // 2
    yield from _halves(codes[:middle], is_good)
    yield from _halves(codes[middle:], is_good)


def _named(parts: list[dict]) -> str:
    return " + ".join(part["type"] for part in parts) or "none"


MAKERS = (
    (("BertPreTokenizer",), _bert),
    (("ByteLevel",), _byte_level),
    (("Split", "ByteLevel"), _byte_level),
    (("Metaspace",), _metaspace),
    (("WhitespaceSplit", "Metaspace"), _metaspace),
    ((), _llama),
)
"""The pre-tokenizers that have a rule, and who makes it."""
