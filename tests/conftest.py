"""What many tests share: a tokenizer of 60 words, and packs of sentence pairs made from it."""

import os

import numpy as np
import pytest
from hypothesis import settings

# The first call of a kernel compiles it: no example has a time limit.
settings.register_profile("compiled", deadline=None)
settings.load_profile("compiled")


@pytest.fixture(autouse=True)
def environment():
    """TrainingArguments write environment variables (ACCELERATE_USE_FSDP, …): none outlives its test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def make_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(55)])}
    return BertTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")),
        **dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True)),
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


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


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """{name: result} of what tests/two_processes.py runs: one launch, whichever of pytest's processes asks first."""
    import torch
    from filelock import FileLock
    from two_processes import launch

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    results = shared / "two_processes.pt"
    with FileLock(shared / "two_processes.lock"):
        if not results.exists():
            launch(results)
    return torch.load(results, weights_only=False)


@pytest.fixture
def pairs():
    """23 sentence pairs of 5 to 30 tokens."""
    rng = np.random.default_rng(7)
    return [make_pair(rng, int(length)) for length in rng.integers(5, 31, 23)]
