"""Words of real tokenizers, trained here: equal to their own word_ids(), masked at the same rate in any script."""

import inspect
import logging
import random
from functools import cache

import numpy as np
import pytest
from slow_masks import budget_of, cut_words, words_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

import packing.dataset
import packing.packers.table
from collate import DataCollatorWithPacking
from collate.columns import IGNORED
from collate.masking import MASKING
from collate.words import (
    BEGINS,
    CONTINUES,
    NO_WORD,
    parts_by_vocabulary,
    parts_by_word_ids,
    word_boundaries,
    word_continuations,
)

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
CHINESE = [chr(0x4E00 + 7 * i) for i in range(150)]
ALPHABETS = {
    "chinese": CHINESE,
    "japanese": [chr(0x3041 + i) for i in range(80)] + CHINESE[:50],
    "thai": [chr(0x0E01 + i) for i in range(46)] + ["\u0e34", "\u0e48"],
    "emoji": [chr(0x1F600 + i) for i in range(60)],
    "german": list("abcdefghijklmnopqrstuvwxyzäöüß"),
}


def sentences(script, between="", words=30, count=80):
    """A text of made-up words, with few or no blanks between them."""
    draw = random.Random(script)
    longest = 14 if script == "german" else 3
    known = ["".join(draw.choices(ALPHABETS[script], k=draw.randint(1, longest))) for _ in range(150)]
    return [
        "".join(draw.choice(known) + draw.choice(between or [""]) for _ in range(draw.randint(words // 2, words)))
        for _ in range(count)
    ]


TEXTS = {
    "chinese": sentences("chinese"),
    "japanese": sentences("japanese"),
    "emoji": sentences("emoji"),
    "thai phrases": sentences("thai", ["", "", "", " "], 60),
    "chinese phrases": sentences("chinese", ["", "", "", "", "，", " "], 60),
    "german": sentences("german", " "),
    "code": [inspect.getsource(packing.dataset), inspect.getsource(packing.packers.table)],
}
TEXTS["code"] = [part for source in TEXTS["code"] for part in source.split("\n\n\n")]


@cache
def trained(kind, script):
    return train(kind, TEXTS[script])


def train(kind, texts, size=500):
    special = list(SPECIAL.values())
    options = {"vocab_size": size, "special_tokens": special, "show_progress": False}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="[UNK]", **options)
    elif kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(handle_chinese_chars=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    tokenizer.train_from_iterator(texts, trainer)
    make = BertTokenizer if kind == "word piece" else PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, **SPECIAL)


def encoded_rows(tokenizer, texts, most=100):
    """Tokens, and their word ids, at most so many a row."""
    rows = []
    for encoding in (tokenizer(text, add_special_tokens=False) for text in texts):
        words = [-1 if word is None else word for word in encoding.word_ids()]
        for first in range(0, len(words), most):
            part = slice(first, first + most)
            rows.append({"input_ids": encoding["input_ids"][part], "word_ids": words[part]})
    return rows


def parts_of(tokenizer, row, boundaries=None):
    """By the vocabulary, and by word ids."""
    tokens, offsets = np.array(row["input_ids"]), np.array([0, len(row["input_ids"])])
    is_special = np.isin(tokens, tokenizer.all_special_ids)
    boundaries = boundaries or word_boundaries(tokenizer)
    marks = word_continuations(tokenizer), boundaries.kinds_V2, boundaries.parted_KK
    return (
        parts_by_vocabulary(tokens, is_special, offsets, *marks),
        parts_by_word_ids(is_special, offsets, np.array(row["word_ids"])),
    )


@pytest.mark.parametrize(
    ("kind", "script", "agreement"),
    [
        *(("word piece", script, 1) for script in ("chinese", "german", "code")),
        *(("unigram", script, 1) for script in TEXTS if script != "code"),
        *(("byte-level", script, 0.995) for script in TEXTS),  # white space that several tokens share is not seen
    ],
)
def test_words_of_the_vocabulary_are_those_of_the_tokenizer(kind, script, agreement):
    tokenizer = trained(kind, script)
    found, expected = zip(*(parts_of(tokenizer, row) for row in encoded_rows(tokenizer, TEXTS[script])), strict=True)
    same = np.concatenate(found) == np.concatenate(expected)
    assert same.mean() >= agreement
    # negative control: other words would be seen
    assert (np.concatenate(expected) == BEGINS).mean() < 1 or script == "chinese"


def test_lines_of_code_are_not_one_word():
    """foo ( x ) ; Ċ bar ĉ = Ġ1, and a character in two tokens: marks alone would make two words of it."""
    text = "foo(x);\nbar\t= 1"
    tokenizer = train("byte-level", [text, "foo bar"] * 3, 300)
    row = encoded_rows(tokenizer, [text + "é"])[0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    parts, expected = parts_of(tokenizer, row)
    assert parts.tolist() == expected.tolist()
    starts = [token for token, part in zip(tokens, parts, strict=True) if part == BEGINS]
    assert {"Ċ", "ĉ", "(", ");" if ");" in starts else ")"} <= set(starts) and "©" not in starts


def test_each_chinese_character_of_bert_is_a_word():
    tokenizer = trained("word piece", "chinese")
    row = encoded_rows(tokenizer, ["中国abc人"], 9)[0]
    assert parts_of(tokenizer, row)[0].tolist() == parts_of(tokenizer, row)[1].tolist()
    row = encoded_rows(tokenizer, TEXTS["chinese"][:1])[0]
    assert (parts_of(tokenizer, row)[0] == BEGINS).all()


@pytest.mark.parametrize("with_word_ids", [False, True])
@pytest.mark.parametrize("kind", ["unigram", "byte-level"])
@pytest.mark.parametrize("script", list(TEXTS))
def test_whole_words_are_masked_at_one_rate_in_every_script(script, kind, with_word_ids):
    """15 %, in all modes. (It was 91 % for a Chinese sentence, which has one ▁.)"""
    tokenizer = trained(kind, script)
    rows = encoded_rows(tokenizer, TEXTS[script])
    if not with_word_ids:
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    for masking in MASKING:
        collate = DataCollatorWithPacking(tokenizer, masking=masking, whole_word_mask=True, unpacked_rows="keep")
        rates = []
        for epoch in range(10):
            collate.set_epoch(epoch)
            batch = collate(rows, return_tensors="np")
            predicted, lengths = batch["labels"] != IGNORED, (batch["sequence_ids"] > 0).sum(1)
            rates.append(predicted.sum() / lengths.sum())
            assert predicted.any(1).all()
            if masking != "independent":
                budgets = [budget_of(collate.masking_rule, int(length)) for length in lengths]
                assert (predicted.sum(1) <= budgets).all()
        assert 0.13 < np.mean(rates) < 0.17, (masking, rates)


def test_words_within_the_budget_stay_whole():
    tokenizer = trained("unigram", "german")
    rows = encoded_rows(tokenizer, TEXTS["german"])
    collate = DataCollatorWithPacking(tokenizer, whole_word_mask=True, unpacked_rows="keep")
    labels, is_special = collate(rows)["labels"], np.zeros(len(tokenizer), bool)
    is_special[tokenizer.all_special_ids] = True
    whole = 0
    for row, labels_L in zip(rows, labels.tolist(), strict=True):
        words = words_of(row["input_ids"], is_special, None, row["word_ids"])
        budget = budget_of(collate.masking_rule, len(row["input_ids"]))
        for word in cut_words(words, budget):
            assert len({labels_L[t] == IGNORED for t in word}) == 1
            whole += len(word) > 1
    assert whole > 100


def test_words_that_are_cut_are_counted_and_said(caplog):
    tokenizer = trained("unigram", "chinese")
    rows = encoded_rows(tokenizer, TEXTS["chinese"][:20])
    collate = DataCollatorWithPacking(tokenizer, whole_word_mask=True, unpacked_rows="keep")
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert collate.count_words(rows) == {"words": 20, "cut_words": 20, "tokens": tokens, "cut_tokens": tokens}
    with caplog.at_level(logging.WARNING, "collate.collator"):
        for _ in range(3):
            collate.for_evaluation()(rows)
    assert [record.getMessage().startswith(f"whole_word_mask: {tokens} of {tokens}") for record in caplog.records] == [
        True
    ]
    german = trained("unigram", "german")
    rows = encoded_rows(german, [" ".join(TEXTS["german"][:9])])
    collate = DataCollatorWithPacking(german, whole_word_mask=True, unpacked_rows="keep")
    counts = collate.count_words(rows)
    assert counts["cut_tokens"] <= 0.05 * counts["tokens"] and counts["words"] > 100
    caplog.clear()
    collate(rows)
    assert not caplog.records
    with pytest.raises(ValueError, match="count_words is for whole_word_mask=True"):
        DataCollatorWithPacking(german).count_words(rows)


def test_a_batch_before_does_not_decide_where_a_word_begins():
    """A sequence that begins inside a character, after any other."""
    tokenizer = train("byte-level", ["日本語"], 261)
    ids = tokenizer("日本", add_special_tokens=False)["input_ids"]
    boundaries = word_boundaries(tokenizer)
    tokens, is_special = np.array([*ids, *ids[1:]]), np.zeros(2 * len(ids) - 1, bool)
    marks = word_continuations(tokenizer), boundaries.kinds_V2, boundaries.parted_KK
    parts = parts_by_vocabulary(tokens, is_special, np.array([0, len(ids), len(tokens)]), *marks)
    assert parts.tolist() == [BEGINS] + [CONTINUES] * (len(ids) - 1) + [BEGINS] + [CONTINUES] * (len(ids) - 2)
    is_special[len(ids)] = True
    parts = parts_by_vocabulary(tokens, is_special, np.array([0, len(tokens)]), *marks)
    assert parts[len(ids)] == NO_WORD and parts[len(ids) + 1] == BEGINS
