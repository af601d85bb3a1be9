"""A tokenizer for which all text is text: a text that says "[MASK]" gets the tokens of [, MASK and ], and no mask.

A fast tokenizer knows a special token in text at two places. It looks for it before the model
(`encode_special_tokens` turns that off). Then the model may find it among its own words: Unigram takes "<s>" for a
piece, WordPiece after whitespace takes "[MASK]" for a word. So both places get another name for it, which no text
holds; ids stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from packing.files.errors import path_suggestion
from packing.text.pretrained import load_pretrained

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

MODES = ("auto", "fast", "exact")
"""auto: out of the table, where the tokenizer has rules and the sample agrees, or else by the tokenizer alone. fast:
refuse instead. exact: by the tokenizer alone."""

TOKENIZE_CURE = "take auto or exact"

# Noncharacters of Unicode, which are for a program's own use and stand in no text: the first of these, and 16 digits.
NAME_START, FIRST_DIGIT = "\ufdd0\ufdd1\ufdd0", 0xFDD2


def open_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers, by its folder or its name on the hub. Raises if packs could not be made with it."""
    try:
        from transformers import PreTrainedTokenizerFast
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tokenizing needs transformers ({error}): pip install 'dataset-packing[train]'"
        ) from None
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(
            f"there is no folder {name!r} with a tokenizer; give one that save_pretrained wrote"
            f"{path_suggestion(name, only_folders=True)}"
        )
    try:
        tokenizer = load_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"no tokenizer in {name!r}: {' '.join(str(error).split())}{path_suggestion(name, only_folders=True)}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer {name!r} ({type(tokenizer).__name__}) has no fast version; tokenize in Python with "
            "Dataset.map, and pack the column input_ids"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer {name!r} has no pad token, which training fills packs up with; set tokenizer.pad_token, "
            "save it with save_pretrained, and give that folder"
        )
    return tokenizer


def text_tokenizer(description: str) -> Tokenizer:
    """From the JSON that `describe` makes: a tokenizer that neither cuts nor pads."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(description)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def describe(tokenizer: PreTrainedTokenizerFast) -> str:
    """The JSON of a tokenizer of transformers, in which special tokens have names that no text holds."""
    return _rename(tokenizer.backend_tokenizer.to_str(), tokenizer.all_special_tokens)


def _rename(description: str, special_tokens: Iterable[str]) -> str:
    content = json.loads(description)
    model, added = content["model"], content["added_tokens"]
    special = {*special_tokens, *(token["content"] for token in added if token["special"])}

    def name(token: str) -> str:
        return NAME_START + _digits(token) if token in special else token

    for token in added:
        token["content"] = name(token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name(token): id_ for token, id_ in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[name(token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = name(model["unk_token"])
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if special.isdisjoint((*pair, "".join(pair)))]
    return json.dumps(content)


def _digits(token: str) -> str:
    """Two noncharacters a byte, so that no other character stands in the name of a special token."""
    return "".join(chr(FIRST_DIGIT + digit) for byte in token.encode() for digit in divmod(byte, 16))
