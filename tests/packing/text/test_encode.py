"""Texts have the ids of encode_batch, whichever way they are read."""

import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import CODE, FAMILIES, FOREIGN, bert, english, family, hostile_texts
from translations import LANGUAGES, messages

from packing.text import encode, rules, table, units
from packing.text.encode import FastEncoder, SlowEncoder, Texts, open_encoder
from packing.text.outcome import DifferentTokens
from packing.text.tokenizer import text_tokenizer

REAL = english()[:150] + FOREIGN + CODE + ["", "", " ", "\n"]


@pytest.fixture(autouse=True)
def _all_by_units(monkeypatch):
    """Hostile texts repeat little, and the tokenizer would read them all."""
    monkeypatch.setattr(encode, "MOST_NEW", 2)


def fast(name: str) -> FastEncoder:
    """An encoder that checks nothing itself, so that a test sees what it finds."""
    encoder = open_encoder(family(name), "fast")
    assert isinstance(encoder, FastEncoder)
    vars(encoder)["_check"] = lambda *arguments: None
    return encoder


def assert_same(encoder, name: str, texts: list[str]) -> None:
    """Alone, with special tokens, and in pairs: ids and type ids, compared with the tokenizer's own."""
    tokenizer = text_tokenizer(family(name))
    for special_tokens in (False, True):
        rows = encoder.encode([Texts.of_strings(texts)], special_tokens)
        for number, expected in enumerate(tokenizer.encode_batch(texts, add_special_tokens=special_tokens)):
            assert rows.row(number).tolist() == expected.ids, (name, texts[number])
    pairs = list(zip(texts, texts[::-1], strict=True))
    rows = encoder.encode([Texts.of_strings(texts), Texts.of_strings(texts[::-1])])
    for number, expected in enumerate(tokenizer.encode_batch(pairs)):
        assert rows.row(number).tolist() == expected.ids, (name, pairs[number])
        assert rows.type_ids[rows.offsets[number] : rows.offsets[number + 1]].tolist() == expected.type_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_of_the_tokenizer(name):
    encoder = fast(name)
    assert_same(encoder, name, REAL + hostile_texts(800))
    assert_same(encoder, name, REAL[::-1])  # what the table knows by now
    assert 0 < encoder.new_bytes < encoder.bytes


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_of_the_tokenizer_for_many_texts(name):
    encoder = fast(name)
    for seed in range(1, 6):
        assert_same(encoder, name, hostile_texts(20_000, seed))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_of_the_tokenizer_for_real_texts(name):
    encoder = fast(name)
    for language in LANGUAGES:
        texts = messages(language)
        assert len(texts) > 200
        assert_same(encoder, name, texts)
    code = sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
    assert_same(encoder, name, [file.read_text("utf-8") for file in code])
    assert 0 < encoder.new_bytes < encoder.bytes


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25)
@given(texts=st.lists(st.text(), max_size=8))
def test_the_ids_of_the_tokenizer_for_any_text(name, texts):
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    assert_same(fast(name), name, texts)


@pytest.mark.parametrize("name", ["GPT-2", "RoBERTa", "ModernBERT", "Llama 3", "Qwen 2"])
def test_phrases_of_chinese_and_japanese_are_units_of_byte_level_bpe(name):
    """Letters and marks beside others drawn at random: ASCII, white space, and marks that compose."""
    blocks = rules.LETTER_BLOCKS + rules.MARK_BLOCKS
    codes = [code for first, last in blocks for code in range(first, last + 1)]
    draw = random.Random(0)
    codes = draw.sample(codes, 2000)
    marks = [chr(code) for first, last in rules.MARK_BLOCKS for code in range(first, last + 1)]
    others = [*" \n\r\t'a1,s7", "\n\n", "  ", "'s", "'re", "\u3099", "\u0301", "\u0338", "\u3000", "é", "½", "Ⅷ"]
    characters = [each for code in codes for each in (chr(code), draw.choice(others), draw.choice(marks))]
    texts = ["".join(characters[start : start + 50]) for start in range(0, len(characters), 50)]
    texts += ["".join(draw.choices(characters, k=draw.randint(1, 9))) for _ in range(500)]
    assert_same(fast(name), name, texts)


def test_a_phrase_is_a_unit():
    data = Texts.of_strings(["我们，我们。"])
    found = table.cut(data.data, data.offsets, rules.unit_rule(family("GPT-2")))
    assert found.starts.tolist() == [0, 6, 9, 15]


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "XLM-R"])
def test_a_full_table_reads_on(name, monkeypatch):
    monkeypatch.setattr(table, "MOST_UNITS", 50)
    monkeypatch.setattr(table, "MOST_KEY_WORDS", 16)
    encoder = fast(name)
    assert_same(encoder, name, REAL)
    assert len(encoder._table) == 50


def test_a_table_grows(monkeypatch):
    monkeypatch.setattr(table, "FIRST_SLOTS", 16)
    monkeypatch.setattr(encode, "SCAN_BYTES", 300)
    encoder = fast("BERT")
    assert_same(encoder, "BERT", REAL)
    assert len(encoder._table) > 1000
    read = encoder.new_bytes
    for _ in range(2):
        encoder.encode([Texts.of_strings(REAL)])
        assert encoder.new_bytes - read < 0.2 * encoder.bytes, "units that no slot was left for are kept when it grew"
        read = encoder.new_bytes


def test_a_full_pool_reads_on(monkeypatch):
    monkeypatch.setattr(table, "MOST_POOL_IDS", 10)
    monkeypatch.setattr(encode, "SCAN_BYTES", 1000)
    encoder = fast("BERT")
    assert_same(encoder, "BERT", REAL)
    assert_same(encoder, "BERT", REAL[::-1])


def test_text_that_repeats_nothing_goes_to_the_tokenizer(monkeypatch):
    monkeypatch.setattr(encode, "SCAN_BYTES", 500)
    monkeypatch.setattr(encode, "MOST_NEW", 0.5)
    encoder = fast("BERT")
    numbers = np.random.default_rng(0).integers(10**12, 10**13, (400, 8))
    texts = [" ".join(map(str, row)) for row in numbers]
    assert_same(encoder, "BERT", texts)
    assert encoder._to_pass or encoder._passed
    assert len(encoder._table) == 0 and not encoder._table._slots.any()
    before = encoder.new_bytes
    assert_same(encoder, "BERT", texts[:20])
    assert encoder.new_bytes > before


def test_units_are_found_again_whatever_their_length():
    """Up to 7, 15 and 64 bytes, and more: lengths at which the table keeps them otherwise."""
    texts = [" ".join(letter * length for letter in "abAB") for length in range(1, 90)]
    encoder = fast("BERT cased")
    assert_same(encoder, "BERT cased", texts)
    read = encoder.new_bytes
    encoder.encode([Texts.of_strings(texts)])
    assert encoder.new_bytes - read == sum(4 * length for length in range(65, 90))


def test_capitals_are_one_unit_with_small_letters_where_the_tokenizer_lowers():
    for name, count in (("BERT", 2), ("BERT cased", 6)):
        encoder = fast(name)
        assert_same(encoder, name, ["word WORD Word", "éa ÉA éA" if name == "BERT cased" else "éa éA"])
        assert len(encoder._table) == count


def wrong_cuts(monkeypatch) -> None:
    """A rule that is wrong: the whole text is cut at each letter."""
    right = rules.cut_table
    monkeypatch.setattr(rules, "cut_table", lambda is_cut: right(lambda *classes: True))


@pytest.mark.parametrize("text", ["we must", "der größere"])
def test_a_wrong_rule_is_noticed(monkeypatch, text):
    wrong_cuts(monkeypatch)
    encoder = open_encoder(family("BERT"))
    texts = ["1 2"] * 50
    texts[25] = text
    if text.isascii():
        texts = [text]  # the first and the last one are looked at, and those that are not ASCII
    with pytest.raises(DifferentTokens, match=f"for the text '{text}'"):
        encoder.encode([Texts.of_strings(texts)])


def test_a_long_text_is_looked_at_in_part(monkeypatch):
    monkeypatch.setattr(encode, "SAMPLE_CHARACTERS", 20)
    encoder = open_encoder(family("BERT"))
    texts = ["we must hold the line " * 50, "é " * 300]
    rows = encoder.encode([Texts.of_strings(texts)])
    expected = text_tokenizer(family("BERT")).encode_batch(texts)
    assert [rows.row(number).tolist() for number in range(2)] == [each.ids for each in expected]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content["model"].update(type="BPE", dropout=0.1, merges=[]), "dropout 0.1"),
        (lambda content: content.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer Whitespace"),
        (lambda content: content.update(normalizer={"type": "NFKC"}), "normalizer NFKC before BertPreTokenizer"),
    ],
)
def test_what_has_no_rule(change, reason):
    content = json.loads(bert())
    change(content)
    with pytest.raises(units.NoRule, match=reason):
        rules.unit_rule(json.dumps(content))


def test_a_tokenizer_without_a_rule_reads_all_texts():
    content = json.loads(bert())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    encoder = open_encoder(json.dumps(content))
    assert isinstance(encoder, SlowEncoder) and encoder.reason == "units are not known for pre-tokenizer Whitespace"
    with pytest.raises(ValueError, match=r"tokenize='fast' needs .* this one has pre-tokenizer Whitespace; take auto"):
        open_encoder(json.dumps(content), "fast")
    assert isinstance(open_encoder(bert(), "exact"), SlowEncoder)


@pytest.mark.parametrize(
    ("name", "token", "reason"),
    [("BERT", "new york", "'new york'"), ("GPT-2", "new york", "'new york'"), ("XLM-R", "x", "'x' beside Metaspace")],
)
def test_added_tokens_that_would_be_cut(name, token, reason):
    tokenizer = text_tokenizer(family(name))
    tokenizer.add_tokens([token])
    with pytest.raises(units.NoRule, match=reason):
        rules.unit_rule(tokenizer.to_str())


def test_merges_over_a_space_have_no_rule():
    """No sample would show it: a merge that is used once in many texts."""
    content = json.loads(family("Llama 2"))
    vocabulary = content["model"]["vocab"]
    vocabulary["t▁o"] = len(vocabulary)
    with pytest.raises(units.NoRule, match="goes over the start of a word: 't▁o'"):
        rules.unit_rule(json.dumps(content))


def test_texts_of_arrow():
    import pyarrow as pa

    for kind in (pa.string(), pa.large_string()):
        column = pa.array(["ab", "", "cé", "d"], kind)
        assert Texts.of_arrow(column).strings() == ["ab", "", "cé", "d"]
        assert Texts.of_arrow(column.slice(1, 2)).strings() == ["", "cé"]
        assert Texts.of_arrow(column.slice(4)).strings() == []
        assert Texts.of_arrow(pa.array([""], kind)).strings() == [""]


@pytest.mark.parametrize("name", ["GPT-2", "XLM-R"])
def test_a_unit_of_more_ids_than_the_table_counts(name):
    """65,536 of them and more."""
    assert_same(fast(name), name, ["we must", "q7zk" * 20_000, "after that"])


def test_ids_of_units_that_are_not_kept_take_no_room(monkeypatch):
    """A full table does not grow, however much text follows."""
    monkeypatch.setattr(table, "MOST_UNITS", 50)
    encoder = fast("GPT-2")
    assert_same(encoder, "GPT-2", REAL)
    used = encoder._table._pool_used
    assert_same(encoder, "GPT-2", REAL[::-1])
    assert len(encoder._table) == 50 and encoder._table._pool_used == used


def test_how_much_the_tokenizer_read():
    encoder = open_encoder(family("RoBERTa"))
    for known in (0, 16):  # the sample, which the tokenizer reads besides, does not count; nor does a prefix
        before = encoder.amount()
        encoder.encode([Texts.of_strings(["hold", "now", "it", "we must"])])
        found = encoder.amount().since(before)
        assert found.bytes == 16 and found.bytes - found.new_bytes == known
    assert str(found) == "tokenized 0.0 MB of texts, 100.00% of it by units known before"
    exact = open_encoder(family("RoBERTa"), "exact")
    exact.encode([Texts.of_strings(["we must"])])
    assert exact.amount()[:2] == (7, 7) and str(exact.amount()).endswith("texts one by one: as --tokenize exact asks")
