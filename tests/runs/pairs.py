"""A tokenizer of 60 words, and sentence pairs made of them."""

import numpy as np


def make_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(55)])}
    return BertTokenizer(
        tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")),
        **dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True)),
    )


def make_pair(rng: np.random.Generator, length: int) -> dict:
    """[CLS] A [SEP] B [SEP] of `length` tokens (at least 4) with a next_sentence_label."""
    cut = int(rng.integers(2, length - 1))
    words = rng.integers(5, 60, length)
    words[[0, cut, length - 1]] = 2, 3, 3
    return {
        "input_ids": words.tolist(),
        "token_type_ids": [0] * (cut + 1) + [1] * (length - cut - 1),
        "next_sentence_label": int(rng.integers(2)),
    }
