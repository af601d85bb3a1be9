"""Texts -> tokens: a column of a dataset by a tokenizer of transformers, in parallel, ready to be packed.

text          label          input_ids      token_type_ids   label
"we must"     a       ->     [2 57 92 3]    [0 0 0 0]        a

Nothing is truncated or padded: `overlong` decides about what does not fit into a pack.

All text is text: a text that says "[MASK]" gets the tokens of [, MASK and ], and no mask. A fast tokenizer knows a
special token in text at two places. It looks for it before the model (`encode_special_tokens` turns that off). Then the
model may find it among its own words: Unigram takes "<s>" for a piece, WordPiece after whitespace takes "[MASK]" for a
word. So both places get another name for it, which no text holds; ids stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packing.files.errors import Option, SourceError, path_suggestion, suggestion

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Types of what tokenizers give. Whatever it is not in here is no column of tokens, or is not wanted.
TYPES = {"input_ids": "int32", "token_type_ids": "int8"}
FIELDS = {"input_ids": "ids", "token_type_ids": "type_ids"}  # attributes of tokenizers.Encoding

# Noncharacters of Unicode, which are for a program's own use and stand in no text.
MARK = "\ufdd0\ufdd1\ufdd0"


def open_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers, by its folder or its name on the hub. Raises if packs could not be made with it."""
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
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
        tokenizer = AutoTokenizer.from_pretrained(name)
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


def tokenize(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    text_columns: Sequence[str],
    keep_text: bool = False,
    num_proc: int = 1,
    *,
    longest: int | None = None,
    cache: Path | None = None,
) -> datasets.Dataset:
    """Replace one column of texts, or two that make pairs, by their tokens; the other columns stay.

    num_proc: processes that tokenize. One has as many threads as there are cores; more pay where reading texts and
    writing tokens takes longer than that.
    longest: the first row with more tokens than this ends the work with OverlongError; None: none does.

    Kept in `cache` (None: that of the datasets library, HF_DATASETS_CACHE), under the content of the texts and of the
    tokenizer: the same texts are not tokenized twice, and texts that have changed are.
    """
    import datasets

    from packing.files.cache import kept_rows

    check_texts(dataset, text_columns)
    names = [name for name in TYPES if name in ("input_ids", *tokenizer.model_input_names)]
    work = _Tokenize(tokenizer, tuple(text_columns), tuple(names), longest)
    features = {name: dataset.features[name] for name in dataset.column_names if keep_text or name not in text_columns}
    features |= {name: datasets.List(datasets.Value(TYPES[name])) for name in names}
    features = datasets.Features(features)

    def make(folder: Path) -> None:
        found = dataset.map(
            work,
            batched=True,
            with_indices=True,
            remove_columns=None if keep_text else list(text_columns),
            features=features,
            num_proc=num_proc if num_proc > 1 else None,
            cache_file_name=str(folder / "tokens.arrow"),
            desc="tokenizing",
        )
        if len(found) != len(dataset):
            raise RuntimeError(f"{len(found):,} of {len(dataset):,} texts were tokenized")

    key = _fingerprint(dataset, work, keep_text)
    found = kept_rows(key, make, cache)
    info = dataset.info.copy()
    info.features = features
    return datasets.Dataset(found.data, info=info, split=dataset.split, fingerprint=key)


class _Tokenize:
    """For Dataset.map: texts of some rows -> their tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_columns: tuple[str, ...],
        names: tuple[str, ...],
        longest: int | None,
    ):
        self.description, self.longest = describe(tokenizer), longest
        self.tokenizer, self.text_columns, self.names = text_tokenizer(self.description), text_columns, names

    def __call__(self, rows: Mapping[str, list[str]], numbers: list[int]) -> dict[str, list]:
        from packing.source.sequences import OverlongError

        texts = [rows[name] for name in self.text_columns]
        found = self.tokenizer.encode_batch_fast(list(zip(*texts, strict=True)) if len(texts) > 1 else list(texts[0]))
        for number, encoding in zip(numbers, found, strict=True):
            if self.longest is not None and len(encoding) > self.longest:
                raise OverlongError(number, len(encoding), self.longest)
        return {name: [getattr(encoding, FIELDS[name]) for encoding in found] for name in self.names}


def find_text_column(dataset: datasets.Dataset, wanted: str | None, say: Callable[[str], object]) -> str:
    """The column of texts: the wanted one, or else the only one of strings, which `say` is told.

    Raises ValueError where there is none, or several, or the rows have input_ids."""
    if wanted is not None:
        _strings(dataset, wanted)
        return wanted
    from packing.source.json_rows import about_single_object

    if "input_ids" in dataset.column_names:
        named = Option("text_column", "NAME")
        raise SourceError("rows have input_ids: they are tokenized already", cure=("name the texts: ", named))
    names = [name for name in dataset.column_names if _holds_strings(dataset, name)]
    if len(names) > 1:
        listed = " and ".join(map(repr, names))
        named = Option("text_column", names[0])
        raise SourceError(f"columns {listed} hold texts", cure=("name the one that is meant: ", named))
    if not names:
        types = ", ".join(f"{name!r} ({dataset.data.column(name).type})" for name in dataset.column_names)
        cure = f"make one of strings{about_single_object(dataset)}"
        raise SourceError(f"no column holds texts, of {types}", cure=cure)
    say(f"texts are taken from column {names[0]!r}, the only one of strings")
    return names[0]


def check_texts(dataset: datasets.Dataset, text_columns: Sequence[str]) -> None:
    """Raise ValueError for what can be seen to be no texts without a tokenizer."""
    import numpy as np

    from packing.source.token_column import chosen_rows, null_rows, refuse_broken

    if not len(dataset):
        raise SourceError("the dataset is empty: it has no texts to tokenize")
    for name in text_columns:
        column = _strings(dataset, name)
        refuse_broken(name, column)
        nulls = null_rows(column, chosen_rows(dataset))
        if nulls.any():
            row = int(np.argmax(nulls))
            raise SourceError("has no text (null)", column=name, row=row, cure="fill it in or leave the row out")
    taken = [name for name in (*TYPES, "attention_mask") if name in dataset.column_names]
    if taken:
        raise SourceError("is there already, so texts were tokenized before", column=taken[0], cure="name no texts")


def _strings(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """The column, if there is one of that name, and it holds strings."""
    if name not in dataset.column_names:
        names = dataset.column_names
        raise SourceError(f"no column {name!r} among {', '.join(names)}{suggestion(name, names)}")
    column = dataset.data.column(name)
    if not _holds_strings(dataset, name):
        raise SourceError(f"holds {column.type}", column=name, cure="texts to tokenize are strings")
    return column


def _holds_strings(dataset: datasets.Dataset, name: str) -> bool:
    import pyarrow as pa

    type_ = dataset.data.column(name).type
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


def _fingerprint(dataset: datasets.Dataset, work: _Tokenize, keep_text: bool) -> str:
    """Of all columns, what is to be done with them, and by which tokenizer."""
    import tokenizers
    import xxhash

    from packing.source.fingerprint import column_prints, combined_print

    tokenizer = tokenizers.__version__, work.description
    parts = combined_print(column_prints(dataset)), str(dataset.features), tokenizer
    return xxhash.xxh3_128(repr((parts, work.text_columns, work.names, keep_text)).encode()).hexdigest()


# A tokenizer for which all text is text


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
        return MARK + token if token in special else token

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
