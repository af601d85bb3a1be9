"""Which ids a tokenizer's tokens have: not always range(len(tokenizer))."""

from typing import Any

import numpy as np


def token_ids(tokenizer: Any) -> np.ndarray:
    """(tokens,) int64, ascending: the ids that have a token.

    Not range(len(tokenizer)): a vocabulary file may name a token twice, and added tokens may have ids far above.
    """
    return np.array(sorted({*tokenizer.get_vocab().values(), *added_ids(tokenizer)}), np.int64)


def added_ids(tokenizer: Any) -> list[int]:
    """The ids of special and added tokens."""
    return [*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})]


def vocabulary_size(tokenizer: Any) -> int:
    """The highest id + 1: as many rows as a table, or a model's embeddings, must have at least."""
    return int(token_ids(tokenizer)[-1]) + 1
