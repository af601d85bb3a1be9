"""Where words are cut for Metaspace: white space that is squeezed, and marks that no piece goes over."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from packing.text import metaspace
from packing.text.encode import FastEncoder, Texts, open_encoder
from packing.text.rules import unit_rule
from packing.text.spaces import squeeze
from packing.text.units import LETTER, MARK

SCORES = {"▁": -3.0, **dict.fromkeys('abcdeorw,.)"', -9.0), "▁we": -4.0, "▁word": -5.0, "aa": -10.0, ",)": -12.0}
TEXTS = [
    "we, word. (we) word",
    "word,",
    ",we",
    '"word," we,) aaa, word.',
    "we  \n word,\n",
    "x, §, §§, word§,",
    "we ,\u0301 word",
]


def unigram(normalizer: normalizers.Normalizer | None = None, pieces: dict[str, float] | None = None) -> str:
    vocabulary = [("<unk>", 0.0), *(SCORES | (pieces or {})).items()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer.to_str()


def bpe(*merges: tuple[str, str]) -> str:
    letters = "▁weordabc,.)"
    pieces = [*letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: id_ for id_, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer.to_str()


def is_same(description: str) -> bool:
    encoder = open_encoder(description, "fast")
    assert isinstance(encoder, FastEncoder)
    vars(encoder)["_check"] = lambda *arguments: None
    found = [encoder.encode([Texts.of_strings(TEXTS)], special_tokens=False) for _ in range(2)]  # new, and known
    expected = Tokenizer.from_str(description).encode_batch(TEXTS, add_special_tokens=False)
    return all(rows.row(i).tolist() == each.ids for rows in found for i, each in enumerate(expected))


def marks(description: str) -> str:
    return "".join(map(chr, np.flatnonzero(unit_rule(description).classes[:0x80] == MARK)))


def test_marks_are_those_that_no_piece_goes_over():
    assert marks(unigram()) == '"),.'
    assert marks(unigram(pieces={"▁word,": -3.0})) == '").'
    assert marks(unigram(pieces={"3,": -3.0, "(": -9.0, "▁(": -4.0, "),": -4.0})) == '"(),.'
    assert marks(bpe(("w", "e"))) == "),."
    assert marks(bpe(("w", "e"), ("we", ","))) == ")."


def test_what_a_mark_is_replaced_by_must_be_one():
    assert marks(unigram(normalizers.Replace(",", "."))) == '").'
    assert marks(unigram(normalizers.Replace("))", '"'))) == '"),.'
    assert marks(unigram(normalizers.Replace("))", "a"))) == '",.'
    assert marks(unigram(normalizers.Replace("))", ""))) == '",.'
    assert marks(unigram(normalizers.Replace("e,", "a"))) == ""


@pytest.mark.parametrize(
    "description",
    [
        unigram(),
        unigram(pieces={"▁word,": -3.0, "e,": -2.0}),
        unigram(normalizers.Replace("))", '"')),
        unigram(normalizers.Strip()),
        unigram(normalizers.NFKC()),
        bpe(("w", "e"), ("o", "r"), ("▁", "we"), (",", ")")),
        bpe(("w", "e"), ("we", ",")),
    ],
)
def test_ids_with_marks(description):
    assert is_same(description)


@pytest.mark.parametrize("description", [unigram(pieces={"▁word,": -3.0}), bpe(("d", ","))])
def test_a_cut_that_a_piece_goes_over_is_wrong(description, monkeypatch):
    """So it matters that these marks are left out."""
    assert is_same(description)
    right = metaspace._with_marks

    def wrong(*arguments):
        found = right(*arguments)
        found[ord(",")] = MARK
        return found

    monkeypatch.setattr(metaspace, "_with_marks", wrong)
    assert not is_same(description)


def test_a_mark_that_is_unknown_is_none(monkeypatch):
    """It would be one token with what is unknown before it."""
    without = {piece: score for piece, score in SCORES.items() if piece != ","}
    monkeypatch.setitem(globals(), "SCORES", without)
    assert marks(unigram()) == '").' and is_same(unigram())


def test_unigram_cuts_before_the_last_character_of_a_word_only():
    """What is best behind a cut may depend on the score before it, where sums are rounded."""
    ending, inside = (unit_rule(unigram()).cuts[LETTER, MARK, after] for after in (1, LETTER))
    assert ending and not inside
    assert unit_rule(bpe()).cuts[LETTER, MARK, LETTER]


def test_squeezed_white_space():
    """As a regular expression finds it."""
    rule = unit_rule(_collapsing())
    assert rule.squeezes and not unit_rule(unigram()).squeezes
    texts = ["a  b", "  a", "a  ", "\u200b  a", "a  \u200b", "a \u0301", "", "   ", "é\n  中", "a\n"]
    data, offsets = squeeze(*Texts.of_strings(texts), rule.classes)
    whites = "".join(map(chr, np.flatnonzero(rule.classes == 1)))
    run = re.compile(f"(^|[^\u200b{whites}])[{whites}]+(?=[^\u200b\u0301{whites}])")
    assert Texts(data, offsets).strings() == [run.sub("\\1 ", text) for text in texts]
    assert is_same(_collapsing())


def _collapsing() -> str:
    from tokenizers import Regex

    return unigram(normalizers.Sequence([normalizers.Nmt(), normalizers.Replace(Regex(" {2,}"), " ")]))
