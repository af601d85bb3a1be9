"""Documents as token ids, flat, in memory or in a folder that several processes read."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, eq=False)
class TokenDocuments:
    """Documents as token ids, flat: any sentence, and any run of sentences of one document, is one slice.

        [["a b", "c"], ["d e f"]]  ->  tokens             [a b c d e f]
                                       sentence_offsets   [0 2 3 6]      the first token of each sentence, and the end
                                       document_offsets   [0 2 3]        the first sentence of each document, the end

    tokens: (T,) int32; sentence_offsets: (sentences + 1,) int64; document_offsets: (documents + 1,) int64.
    No sentence and no document is empty. A sentence that is too long for a sequence lies here as its words.

    long_sentences: how many these are; words: what they lie here as.
    unread_characters: of words that are too long for the tokenizer, and lie here as one unknown token each.
    """

    tokens: np.ndarray
    sentence_offsets: np.ndarray
    document_offsets: np.ndarray
    long_sentences: int = 0
    words: int = 0
    unread_characters: int = 0

    @classmethod
    def from_lists(cls, documents: Iterable[Iterable[Iterable[int]]]) -> "TokenDocuments":
        """Documents of sentences of token ids; empty sentences, and documents of nothing else, are left out."""
        kept = [[np.asarray(sentence, np.int32) for sentence in document if len(sentence)] for document in documents]
        kept = [document for document in kept if document]
        sentences = [sentence for document in kept for sentence in document]
        return cls(
            tokens=np.concatenate(sentences) if sentences else np.zeros(0, np.int32),
            sentence_offsets=offsets_of([len(sentence) for sentence in sentences]),
            document_offsets=offsets_of([len(document) for document in kept]),
        )

    @classmethod
    def concatenate(cls, parts: Iterable["TokenDocuments"]) -> "TokenDocuments":
        """The documents of one part after those of the other."""
        parts = list(parts)
        lengths = [np.diff(part.sentence_offsets) for part in parts]
        depths = [np.diff(part.document_offsets) for part in parts]
        return cls(
            tokens=np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in parts)]),
            sentence_offsets=offsets_of(np.concatenate([np.zeros(0, np.int64), *lengths])),
            document_offsets=offsets_of(np.concatenate([np.zeros(0, np.int64), *depths])),
            long_sentences=sum(part.long_sentences for part in parts),
            words=sum(part.words for part in parts),
            unread_characters=sum(part.unread_characters for part in parts),
        )

    def __len__(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def num_sentences(self) -> int:
        """Long ones counted as one each."""
        return len(self.sentence_offsets) - 1 - self.words + self.long_sentences

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


class TokenFolder:
    """TokenDocuments on disk: written part by part, and read as a memory map, which processes share.

    with TokenFolder(folder) as written:
        written.add(part)
    documents = TokenFolder.open(folder)
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.sentence_lengths, self.document_lengths = [], []
        self.long_sentences, self.words, self.unread_characters = 0, 0, 0

    def __enter__(self) -> "TokenFolder":
        self.folder.mkdir(parents=True)
        self.tokens = (self.folder / "tokens").open("wb")
        return self

    def add(self, part: TokenDocuments) -> None:
        part.tokens.tofile(self.tokens)
        self.sentence_lengths.append(np.diff(part.sentence_offsets))
        self.document_lengths.append(np.diff(part.document_offsets))
        self.long_sentences += part.long_sentences
        self.words += part.words
        self.unread_characters += part.unread_characters

    def __exit__(self, *exception) -> None:
        self.tokens.close()
        for name in ("sentence", "document"):
            lengths = [np.zeros(0, np.int64), *getattr(self, f"{name}_lengths")]
            offsets_of(np.concatenate(lengths)).tofile(self.folder / f"{name}_offsets")
        np.array([self.long_sentences, self.words, self.unread_characters]).tofile(self.folder / "counts")

    @staticmethod
    def open(folder: Path) -> TokenDocuments:
        def mapped(name: str, dtype) -> np.ndarray:
            if not (folder / name).stat().st_size:  # an empty file cannot be mapped
                return np.zeros(0, dtype)
            return np.asarray(np.memmap(folder / name, dtype, mode="r"))

        return TokenDocuments(
            *(mapped("tokens", np.int32), mapped("sentence_offsets", np.int64), mapped("document_offsets", np.int64)),
            *np.fromfile(folder / "counts", np.int64).tolist(),
        )


def offsets_of(lengths: Iterable[int]) -> np.ndarray:
    """[2, 1, 3] -> [0, 2, 3, 6], int64."""
    lengths = np.asarray(lengths, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
