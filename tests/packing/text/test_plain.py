"""Plain texts are read by the model alone, and have the ids of the tokenizer."""

import json

import numpy as np
import pytest
from tokenizer_families import CODE, FOREIGN, english, family, hostile_texts

from packing.text import plain
from packing.text.plain import PlainReader, part_texts, write
from packing.text.rows import SlowEncoder, Texts
from packing.text.tokenizer import text_tokenizer

TEXTS = [
    *english()[:40], *FOREIGN, *CODE, "", " ", "we", " we", "we ", "we  must", " ▁we", "我们，我们 must", "ｗｅ…",
    "ｶﾞガ゙", "Größe É e\u0301", "각 각", "fi ﬁ ½", "``we``", "«we»", "İ ẞ ς", "ガ がんばる", "あ\u3099",
]  # fmt: skip
METASPACE = ("XLM-R", "ALBERT", "T5", "mDeBERTa")


class Counted(SlowEncoder):
    """How many texts the tokenizer itself read."""

    texts = 0

    def encode(self, columns, special_tokens=True):
        self.texts += len(columns[0])
        return super().encode(columns, special_tokens)


def read(description: str, texts: list[str]) -> tuple[list[list[int]], int]:
    tokenizer = text_tokenizer(description)
    others = Counted(tokenizer)
    rows = PlainReader(description, tokenizer.normalizer).read(Texts.of_strings(texts), others)
    return [rows.row(number).tolist() for number in range(len(texts))], others.texts


def expected(description: str, texts: list[str]) -> list[list[int]]:
    return [each.ids for each in text_tokenizer(description).encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize("most", [1, 50, plain.JOINED_BYTES])
@pytest.mark.parametrize("name", METASPACE)
def test_the_ids_of_the_tokenizer(name, most, monkeypatch):
    monkeypatch.setattr(plain, "JOINED_BYTES", most)
    texts = TEXTS + hostile_texts(300, 1)
    found, others = read(family(name), texts)
    assert found == expected(family(name), texts)
    assert 0 < others < len(texts) - 40


@pytest.mark.long
@pytest.mark.parametrize("name", METASPACE)
def test_the_ids_of_the_tokenizer_for_many_texts(name):
    texts = hostile_texts(20_000, 2)
    assert read(family(name), texts)[0] == expected(family(name), texts)


@pytest.mark.parametrize("name", METASPACE)
def test_characters_beside_one_another_become_what_the_normalizer_makes_of_them(name):
    """Each plain character, between others drawn at random."""
    normalizer = text_tokenizer(family(name)).normalizer
    assert normalizer is not None
    reader = PlainReader(family(name), normalizer)
    codes = np.array([code for first, last in plain.BLOCKS for code in range(first, last + 1)])
    codes = codes[reader._entries[codes] > 0]
    assert len(codes) > 28_000  # all, but Korean where it is taken apart
    np.random.default_rng(0).shuffle(codes)
    text = "".join(map(chr, np.tile(codes, 3)))
    texts, written = Texts.of_strings([text]), np.empty(5 * len(text.encode()), np.uint8)
    joined, _, is_plain = write(
        texts.data, texts.offsets, reader._entries, reader._written, reader._mark, True, 1 << 12, written
    )
    assert is_plain.all()
    assert written[: joined[-1, 0]].tobytes().decode() == "▁" + normalizer.normalize_str(text)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_each_way_to_put_a_mark(scheme):
    content = json.loads(family("XLM-R"))
    content["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True
    }  # fmt: skip
    found, others = read(json.dumps(content), TEXTS)
    assert found == expected(json.dumps(content), TEXTS)
    assert (others == len(TEXTS) - 1) == (scheme == "never")


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama 2"])
def test_others_read_all_texts_where_no_text_is_plain(name):
    assert read(family(name), TEXTS)[1] == len(TEXTS)


def test_texts_with_other_words_than_were_written_are_not_parted():
    is_first, offsets, of_joined = np.array([False, True]), np.array([0, 3, 5]), np.array([0, 1, 2])
    ids = np.array([1, 0, 1, 1, 0], np.int32)
    of_texts, is_parted = part_texts(ids, offsets, is_first, np.array([2, 1]), of_joined)
    assert is_parted and of_texts.tolist() == [0, 3, 5]
    for words in ([1, 2], [2, 2], [1, 1], [3]):
        assert not part_texts(ids, offsets, is_first, np.array(words), of_joined[: len(words) + 1])[1]
