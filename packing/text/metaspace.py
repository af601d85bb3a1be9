"""Where texts may be cut for Metaspace: spaces become ▁, and part words. Models are Unigram and BPE.

"we must, we"   ->   "we" " must" "," " we"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from string import digits, punctuation
from typing import TYPE_CHECKING, Any

import numpy as np

from packing.text.units import (
    APOSTROPHE,
    BREAK,
    EDGE,
    LETTER,
    MARK,
    PRIVATE,
    SHOWING,
    SPACE,
    UNSAFE,
    VISIBLE,
    NoRule,
    UnitRule,
    cut_table,
    general_classes,
    kept_table,
    parts_of,
    types_of,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer

NORMALIZERS = (
    "Precompiled", "Replace", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase", "Nmt", "Strip"
)  # fmt: skip
RUNS = (" {2,}", r"\s{2,}|[\n\r\t]")
"""Expressions that make one space of a run of white space."""

ANY_END = (EDGE, SPACE, *SHOWING)


def metaspace(content: dict[str, Any], parts: list[dict], added: list[dict]) -> UnitRule:
    """A text is cut at the start of white space that something visible stands before, if the normalizer leaves that
    visible, and makes spaces of the white space. What it makes of a run of them shows from the run alone: the unit
    "  must" becomes ▁▁must, as in the text. Where it becomes ▁must, the run is squeezed first.

    Strip would take a run at the start of a unit, which the text may keep: then only one space is cut at, with
    something visible on both sides. Metaspace, which puts ▁ before each text, puts it back.

    A word is cut before a mark as well, where `_with_marks` finds that this changes nothing.
    """
    metaspace = parts[-1]
    if added:
        raise NoRule(f"added token {added[0]['content']!r} beside Metaspace")
    scheme = metaspace.get("prepend_scheme", "always" if metaspace.get("add_prefix_space", True) else "never")
    splits_white = len(parts) == 2
    if splits_white and scheme != "always":
        raise NoRule(f"WhitespaceSplit before Metaspace that prepends {scheme}")
    mark = metaspace.get("replacement", "▁")
    if not metaspace.get("split", True):
        _check_merges(content["model"], mark)
    normalizers = parts_of(content["normalizer"])
    _check_normalizers(normalizers)
    strips = [part for part in normalizers if part["type"] == "Strip"]
    if scheme == "never" and strips:
        raise NoRule("normalizer Strip before Metaspace that prepends nothing")
    tokenizer = _tokenizer(content)
    is_rigid = not strips and all(part["type"] != "Precompiled" for part in normalizers)
    classes = _classes_behind(tokenizer.normalizer, mark, splits_white, is_rigid)
    squeezes = splits_white or _makes_one_space(tokenizer.normalizer, classes, mark)
    classes = _with_marks(tokenizer, classes, normalizers, mark)
    keeps_runs = splits_white or not any(part.get("strip_left", True) for part in strips)
    prefixed = np.zeros(256, np.bool_)
    if scheme != "never":  # the unit "," is one inside a word
        prefixed[:0x80] = classes[:0x80] == MARK
    return _rule(content, classes, " ", prefixed, mark, ANY_END if keeps_runs else SHOWING, squeezes)


def llama(content: dict[str, Any], parts: list[dict], added: list[dict]) -> UnitRule:
    """No pre-tokenizer: the normalizer puts ▁ before the text and for each space, and leaves the rest as it is. No
    merge goes over the start of a word, see `_check_merges`."""
    normalizers = parts_of(content["normalizer"])
    if [part["type"] for part in normalizers] != ["Prepend", "Replace"] or added:
        raise NoRule(f"normalizer {types_of(normalizers)} without a pre-tokenizer")
    prepend, replace = normalizers
    mark = prepend["prepend"]
    if replace["pattern"] != {"String": " "} or replace["content"] != mark:
        raise NoRule(f"a normalizer that replaces {replace['pattern']}")
    _check_merges(content["model"], mark)
    content["normalizer"] = replace
    classes = _with_marks(_tokenizer(content | {"normalizer": None}), _unchanged(mark), [], mark)
    return _rule(content, classes, mark, np.ones(256, np.bool_), mark, ANY_END)


def _rule(
    content: dict[str, Any],
    classes: np.ndarray,
    prefix: str,
    prefixed: np.ndarray,
    mark: str,
    ends_of_space: tuple[int, ...],
    squeezes: bool = False,
) -> UnitRule:
    """ends_of_space: what may stand behind the first white space of a run."""
    ends_of_mark = ANY_END if content["model"]["type"] == "BPE" else (EDGE, SPACE)

    def is_cut(before: int, this: int, after: int) -> bool:
        starts_white = before in SHOWING and this == SPACE and after in ends_of_space
        return starts_white or (before == LETTER and this == MARK and after in ends_of_mark)

    known = content["model"]["vocab"]
    pieces = known if isinstance(known, dict) else {piece for piece, _ in known}
    return UnitRule(
        classes,
        cut_table(is_cut),
        kept_table(),
        json.dumps(content),
        prefix,
        prefixed,
        word_mark=mark if mark in pieces else "",
        squeezes=squeezes,
    )


def _tokenizer(content: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(content))


def _check_merges(model: dict[str, Any], mark: str) -> None:
    """No piece holds a mark behind something else, so none goes over the start of a word."""
    if model["type"] != "BPE" or _sees_whole_words(model) or mark not in model["vocab"]:
        raise NoRule(f"model {model['type']} that sees the whole text")
    crossing = next((piece for piece in model["vocab"] if mark in piece.lstrip(mark)), None)
    if crossing is not None:
        raise NoRule(f"a piece that goes over the start of a word: {crossing!r}")


def _sees_whole_words(model: dict[str, Any]) -> bool:
    return any(model.get(name) for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"))


def _check_normalizers(normalizers: list[dict]) -> None:
    for part in normalizers:
        if part["type"] not in NORMALIZERS:
            raise NoRule(f"normalizer {part['type']} before Metaspace")
        if part["type"] != "Replace":
            continue
        text, expression = part["pattern"].get("String"), part["pattern"].get("Regex")
        if expression not in RUNS and (text is None or not text or any(map(str.isspace, text))):
            raise NoRule(f"a normalizer that replaces {part['pattern']}")


# Classes


def _unchanged(mark: str) -> np.ndarray:
    """The classes of characters where no normalizer changes any: all show, and none joins with another."""
    classes = general_classes().copy()
    classes[(classes == UNSAFE) | (classes == BREAK)] = VISIBLE
    classes[ord(mark)] = UNSAFE
    return classes


def _classes_behind(normalizer: Normalizer | None, mark: str, splits_white: bool, is_rigid: bool) -> np.ndarray:
    """The classes of characters, as the normalizer makes them: asked for each one between two letters.

    "a b a c a" with b to look at: normalized, it must be five pieces with a at both ends, and b left visible.

    splits_white: what Metaspace sees holds no white space.
    is_rigid: white space that stays between letters does so everywhere.
    """
    classes = _unchanged(mark) if normalizer is None else general_classes().copy()
    classes[ord(mark)] = UNSAFE
    normalize = str if normalizer is None else normalizer.normalize_str
    for white in " \t\n\v\f\r":
        found = normalize(f"a{white}a")
        stays = found == f"a{white}a"
        if found in ("a a", f"a{mark}a") or (stays and splits_white):
            classes[ord(white)] = SPACE
        else:
            classes[ord(white)] = VISIBLE if stays and is_rigid else UNSAFE
    shown = np.flatnonzero(np.isin(classes, SHOWING))
    for codes in _halves(shown.tolist() if normalizer else [], lambda codes: _are_visible(normalize, codes, mark)):
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


# Marks inside a word


def _with_marks(tokenizer: Tokenizer, classes: np.ndarray, normalizers: list[dict], space: str) -> np.ndarray:
    """The classes with LETTER and MARK for what a word is cut between: "word," -> "word" ",".

    MARK is a mark of ASCII. LETTER is what shows, and does not end in a mark or digit of ASCII when normalized. Then

    1. the normalizer leaves the mark, whatever is before it;
    2. no piece has the mark behind anything else than such a mark or digit, or ▁, so no token goes over the cut;
    3. the mark is a piece, so it is not unknown, and makes no token with something unknown before it;
    4. what the model makes of each side is the same alone. BPE: no merge looks at both sides. Unigram: the best path
       goes over the cut. But what is best behind it may depend on the score before it, where sums are rounded: of two
       paths with one score, aa + a and a + aa, now this one wins, now that. So the mark must be the word's last
       character, which leaves it no choice.
    """
    found = np.where(np.isin(classes, (LETTER, APOSTROPHE, MARK)), VISIBLE, classes).astype(np.uint8)
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] not in ("BPE", "Unigram") or _sees_whole_words(model):
        return found
    pieces = model["vocab"] if model["type"] == "BPE" else [piece for piece, _ in model["vocab"]]
    ascii_ends = {*punctuation, *digits}
    marks = set(punctuation) & set(pieces)
    for piece in pieces:
        marks -= {this for before, this in pairwise(piece) if before not in {*ascii_ends, space}}
    codes = np.flatnonzero(np.isin(found, SHOWING))
    ends = [chr(code) for code in codes]
    if tokenizer.normalizer is not None:
        normalize = tokenizer.normalizer.normalize_str
        if any(part["type"] == "Precompiled" for part in normalizers) and not _stand_alone(normalize):
            return found
        marks = {mark for mark in marks if normalize(mark) == mark}
        ends = normalize(" ".join(ends)).split(" ")
    replaced = [part for part in normalizers if part["type"] == "Replace" and "String" in part["pattern"]]
    if len(ends) != len(codes) or any(not set(part["pattern"]["String"]) <= set(punctuation) for part in replaced):
        return found
    for part in replaced * len(replaced):  # what one makes, the next may replace
        if not part["content"] or not set(part["content"]) <= marks:
            marks -= set(part["pattern"]["String"])
    found[codes[[bool(end) and end[-1] not in ascii_ends for end in ends]]] = LETTER
    found[[ord(mark) for mark in marks]] = MARK
    return found


def _stand_alone(normalize: Callable[[str], str]) -> bool:
    """Whether a character of ASCII stays, whatever is before it. Precompiled looks at graphemes, and some characters
    make one with what follows."""
    codes = [code for code in range(0x80, PRIVATE) if not 0xD800 <= code < 0xE000]
    return normalize(" ".join(f"{chr(code)}qjq" for code in codes)).count("qjq") == len(codes)


def _makes_one_space(normalizer: Normalizer | None, classes: np.ndarray, mark: str) -> bool:
    """Whether the normalizer makes one space of any run of white space: see RUNS."""
    whites = [chr(code) for code in np.flatnonzero(classes == SPACE)]
    runs = ["".join(run) for length in (2, 3) for run in product(whites, repeat=length)]
    return normalizer is not None and all(normalizer.normalize_str(f"a{run}a") in ("a a", f"a{mark}a") for run in runs)
