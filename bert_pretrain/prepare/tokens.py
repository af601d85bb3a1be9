"""Documents as token ids, flat, in memory or in a folder that several processes read."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from packing.files.hashed import write_file
from packing.histogram import offsets_of


@dataclass(frozen=True, eq=False)
class TokenDocuments:
    """Documents as token ids, flat: any sentence, and any run of sentences of one document, is one slice.

        [["a b", "c"], ["d e f"]]  ->  tokens             [a b c d e f]
                                       sentence_offsets   [0 2 3 6]      the first token of each sentence, and the end
                                       document_offsets   [0 2 3]        the first sentence of each document, the end

    tokens: (T,) int32; sentence_offsets: (sentences + 1,) int64; document_offsets: (documents + 1,) int64.
    No sentence and no document is empty. A sentence that is too long for a sequence is stored as its words.

    long_sentences: how many are too long; words: in how many words they are stored.
    unread_characters: characters of words that are too long for the tokenizer, and became one unknown token each.
    """

    tokens: np.ndarray
    sentence_offsets: np.ndarray
    document_offsets: np.ndarray
    long_sentences: int = 0
    words: int = 0
    unread_characters: int = 0

    def __len__(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def num_sentences(self) -> int:
        """Long ones counted as one each."""
        return len(self.sentence_offsets) - 1 - self.words + self.long_sentences

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def save_part(file: Path, part: TokenDocuments) -> None:
    """Write some documents to a file that appears when it is whole."""
    buffer = io.BytesIO()
    for field in fields(part):
        np.save(buffer, getattr(part, field.name))
    write_file(file, buffer.getvalue())


def load_part(file: Path) -> TokenDocuments:
    """What `save_part` wrote."""
    with file.open("rb") as stream:
        tokens, sentences, documents, *counts = (np.load(stream) for _ in fields(TokenDocuments))
    return TokenDocuments(tokens, sentences, documents, *map(int, counts))


def write_tokens(folder: Path, parts: Iterable[TokenDocuments]) -> None:
    """Write the documents of all parts to a folder; their tokens do not stay in memory."""
    folder.mkdir(exist_ok=True)
    sentences, documents = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    counts = np.zeros(3, np.int64)
    with (folder / "tokens").open("wb") as file:
        for part in parts:
            part.tokens.tofile(file)
            sentences.append(np.diff(part.sentence_offsets))
            documents.append(np.diff(part.document_offsets))
            counts += (part.long_sentences, part.words, part.unread_characters)
    offsets_of(np.concatenate(sentences)).tofile(folder / "sentence_offsets")
    offsets_of(np.concatenate(documents)).tofile(folder / "document_offsets")
    counts.tofile(folder / "counts")


def open_tokens(folder: Path) -> TokenDocuments:
    """What `write_tokens` wrote, as a memory map that processes share."""

    def mapped(name: str, dtype: type[np.generic]) -> np.ndarray:
        if not (folder / name).stat().st_size:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        return np.asarray(np.memmap(folder / name, dtype, mode="r"))

    return TokenDocuments(
        *(mapped("tokens", np.int32), mapped("sentence_offsets", np.int64), mapped("document_offsets", np.int64)),
        *np.fromfile(folder / "counts", np.int64).tolist(),
    )
