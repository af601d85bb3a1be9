"""What many tests share: a tokenizer of 60 words, and packs of sentence pairs made from it."""

import os

import numpy as np
import pytest
from hypothesis import settings
from pairs import make_pair, make_tokenizer

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


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """{name: result} of tests/runs/two_processes.py: one launch, by the first of pytest's processes that asks."""
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Text of 60 paragraphs, prepared and packed at 64."""
    from flag_runs import make_folders

    return make_folders(tmp_path_factory.mktemp("pretrain"))
