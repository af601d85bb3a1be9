"""Text that spells a special token is tokenized as text, by pack-dataset and by bert-pretrain prepare."""

import json

import datasets
import numpy as np
import pytest
from documents import tokenize_documents
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from collate import DataCollatorWithPacking
from packing import cli
from packing.text.tokenizer import describe, text_tokenizer

datasets.disable_progress_bars()

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
MARKERS = ["<e1>", "</e1>"]  # additional special tokens
TEXTS = ["we must hold the line at noon", "they paid < 5 > dollars / head", "s pad mask unk e1 cls sep"]
ALL = [*SPECIAL.values(), *MARKERS]


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=ALL, unk_token="<unk>", show_progress=False)
    return tokenizer, trainer


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=ALL, initial_alphabet=letters, show_progress=False)
    return tokenizer, trainer


def whole_words_first():
    """As in Llama 3: a word of the vocabulary is taken before merges are asked."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.BpeTrainer(vocab_size=150, special_tokens=ALL, show_progress=False)


def wordpiece(splitter):
    def make():
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = splitter
        return tokenizer, trainers.WordPieceTrainer(vocab_size=150, special_tokens=ALL, show_progress=False)

    return make


def word_level():
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.WordLevelTrainer(special_tokens=ALL, show_progress=False)


MODELS = {
    "unigram": unigram,
    "byte-level BPE": byte_level,
    "whole words first": whole_words_first,
    "wordpiece": wordpiece(pre_tokenizers.BertPreTokenizer()),
    "wordpiece of whole words": wordpiece(pre_tokenizers.WhitespaceSplit()),
    "words": word_level,
}


@pytest.fixture(scope="module", params=MODELS)
def fast(request):
    backend, trainer = MODELS[request.param]()
    backend.train_from_iterator(TEXTS * 5, trainer)
    template = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1"}
    backend.post_processor = processors.TemplateProcessing(
        **template, special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    names = {"model_input_names": ["input_ids", "token_type_ids"], "additional_special_tokens": MARKERS}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL, **names)


def test_texts_without_special_tokens_get_the_tokens_they_had(fast):
    plain = text_tokenizer(describe(fast))
    for text in TEXTS:
        assert plain.encode(text).ids == fast(text).input_ids
        found, expected = plain.encode(text, TEXTS[0]), fast(text, TEXTS[0])
        assert (found.ids, found.type_ids) == (expected.input_ids, expected.token_type_ids)


@pytest.mark.parametrize("token", ALL)
def test_a_special_token_in_a_text_is_text(fast, token):
    text = f"we {token} the{token}line {token}"
    special = {*fast.all_special_ids} - {fast.unk_token_id}
    assert fast.convert_tokens_to_ids(token) in fast(text, add_special_tokens=False).input_ids  # or nothing is shown
    _, *tokens, _ = text_tokenizer(describe(fast)).encode(text).ids
    assert tokens and special.isdisjoint(tokens)
    assert special.isdisjoint(tokenize_documents([[text]], fast).tokens.tolist())
    assert fast.convert_tokens_to_ids(token) in fast(text, add_special_tokens=False).input_ids  # as before


def test_packs_of_texts_about_special_tokens_train_and_are_verified(fast, tmp_path, capsys):
    fast.save_pretrained(tmp_path / "tokenizer")
    texts = [f"we {token} hold {token}" for token in ALL] + TEXTS
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = [str(tmp_path / "texts.jsonl")]
    options = ["--text-column", "text", "--tokenizer", str(tmp_path / "tokenizer")]
    assert cli.main([*source, str(tmp_path / "packed"), *options]) == 0
    packed = datasets.load_from_disk(str(tmp_path / "packed"))
    tokens = np.concatenate([np.array(row["input_ids"]) for row in packed])
    # <s> and </s> of the template, each once a text; no other but <unk>
    counts = [int((tokens == fast.convert_tokens_to_ids(token)).sum()) for token in ALL if token != "<unk>"]
    assert counts == [0, len(texts), len(texts), 0, 0, 0]
    assert DataCollatorWithPacking(fast)(list(packed))["input_ids"].shape[0] == len(packed)
    assert cli.main(["verify", str(tmp_path / "packed"), "--source", *source, *options]) == 0
