"""The JSON of a tokenizer -> where a text may be cut, so that each piece has the tokens that it has in the whole text.

A rule is only made of parts that are listed here and in metaspace.py, each with the reason why its cuts hold.
`unit_rule` names the part that has none. Then the tokenizer itself reads every text.
"""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from typing import Any

import numpy as np

from packing.text.metaspace import llama, metaspace
from packing.text.units import (
    APOSTROPHE,
    BREAK,
    CODE_POINTS,
    LETTER,
    MARK,
    SHOWING,
    SPACE,
    WHITE,
    NoRule,
    UnitRule,
    cut_table,
    general_classes,
    kept_table,
    parts_of,
    types_of,
)


def unit_rule(description: str) -> UnitRule:
    """The rule of a tokenizer, from the JSON that `describe` of packing.text.tokenizer makes.

    Raises NoRule with the reason where none is known."""
    content = json.loads(description)
    _check_model(content["model"])
    added = [token for token in content["added_tokens"] if not token["special"]]
    parts = parts_of(content["pre_tokenizer"])
    for kinds, make in MAKERS:
        if tuple(part["type"] for part in parts) == kinds:
            return make(content, parts, added)
    raise NoRule(f"pre-tokenizer {types_of(parts)}")


def _check_model(model: dict[str, Any]) -> None:
    """A model that sees one piece of the pre-tokenizer at a time, and always answers the same."""
    if model["type"] not in ("WordPiece", "WordLevel", "BPE", "Unigram"):
        raise NoRule(f"model {model['type']}")
    if model.get("dropout"):
        raise NoRule(f"a model that draws (dropout {model['dropout']})")


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
    normalizers = parts_of(content["normalizer"])
    if [part["type"] for part in normalizers] != ["BertNormalizer"]:
        raise NoRule(f"normalizer {types_of(normalizers)} before BertPreTokenizer")
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
    cuts = cut_table(lambda before, this, after: before != this or this == MARK)
    lowercase = normalizer["lowercase"] and not added
    separator = "" if added else "|"
    return UnitRule(classes, cuts, kept_table(SPACE), json.dumps(content), lowercase=lowercase, separator=separator)


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
    normalizers, model, of_bytes = parts_of(content["normalizer"]), content["model"], parts[-1]
    if normalizers and [part["type"] for part in normalizers] != ["NFC"]:
        raise NoRule(f"normalizer {types_of(normalizers)} before ByteLevel")
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
        is_start = before in SHOWING and this in WHITE
        return is_start and (is_gpt2 or this == SPACE or before == LETTER)

    def is_last_white(before: int, this: int, after: int) -> bool:
        is_last = this in WHITE and after in SHOWING
        return is_last and (is_gpt2 or (before == SPACE and this == SPACE))

    def is_cut(before: int, this: int, after: int) -> bool:
        if added:
            return starts_white(before, this)
        return (
            starts_white(before, this)
            or is_last_white(before, this, after)
            or (is_gpt2 and before == BREAK and this in SHOWING)
            or (before == LETTER and this in (MARK, APOSTROPHE))
            or (is_gpt2 and before == MARK and this == LETTER)
        )

    prefixed = np.full(256, of_bytes["add_prefix_space"])
    prefixed[ord(" ")] = False
    of_bytes["add_prefix_space"] = False  # in content, too
    return UnitRule(
        _classes_of_letters(), cut_table(is_cut), kept_table(), json.dumps(content), " ", prefixed, separator="\n"
    )


LETTER_BLOCKS = ((0x3041, 0x3094), (0x30A1, 0x30FA), (0x3400, 0x4DB5), (0x4E00, 0x9FA5))
"""Japanese and Chinese letters."""
MARK_BLOCKS = ((0x2010, 0x2027), (0x2030, 0x203E), (0x3001, 0x3003), (0x3008, 0x301B), (0xFF01, 0xFF0F),
               (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF5E))  # fmt: skip
"""Their punctuation."""


@cache
def _classes_of_letters() -> np.ndarray:
    """With letters and marks of Chinese and Japanese, which each version of Unicode from 3.2 on takes for such. NFC
    leaves them, and joins none with the one before. Phrases between marks repeat where nothing parts words.
    """
    classes = general_classes().copy()
    for blocks, class_, kinds in ((LETTER_BLOCKS, LETTER, "L"), (MARK_BLOCKS, MARK, "PS")):
        for code in (code for first, last in blocks for code in range(first, last + 1)):
            before, now = (version.category(chr(code))[0] for version in (unicodedata.ucd_3_2_0, unicodedata))
            if before == now and now in kinds:
                classes[code] = class_
    return classes


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


MAKERS = (
    (("BertPreTokenizer",), _bert),
    (("ByteLevel",), _byte_level),
    (("Split", "ByteLevel"), _byte_level),
    (("Metaspace",), metaspace),
    (("WhitespaceSplit", "Metaspace"), metaspace),
    ((), llama),
)
"""The pre-tokenizers that have a rule, and who makes it."""
