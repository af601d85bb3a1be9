"""Where text comes from: files and `datasets` folders -> documents -> sentences; and a document once it is token ids.

A document is what next-sentence prediction may not cross: a list of sentences.

    First one. Second,          documents="paragraph"      documents="file"
    wrapped over a line.        -> [["First one.",         -> [["First one.",
    (blank line)                     "Second, wrapped           "Second, wrapped over a line.",
    Third one.                        over a line."],           "Third one."]]
                                    ["Third one."]]
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencex

DOCUMENTS = ("paragraph", "file")
SENTENCES = ("split", "lines")

Document = list[str]
"""The sentences of one document, in order, never empty."""


def read_documents(
    text: str | Path | Iterable[str | Path],
    documents: str = "paragraph",
    sentences: str = "split",
    language: str = "en",
) -> Iterator[Document]:
    """The documents of the given sources, one after the other; nothing is kept in memory.

    text: `.txt` files, folders of them (searched recursively, in sorted order), or folders written by
        `datasets.Dataset.save_to_disk` with a `text` column, whose every row counts as a file.
    documents: "paragraph": a blank line parts documents (BERT's own input format); "file": each file is one document
        and blank lines only part its paragraphs.
    sentences: "split": the lines of a paragraph are joined, then split into sentences; "lines": each line is one
        sentence already (BERT's own input format, https://github.com/google-research/bert#pre-training-with-bert).
    language: ISO 639 code for the splitter's abbreviations ("Mr." ends no sentence in English).

    Raises FileNotFoundError for a source that is not there and ValueError for one that can't be read as text.
    """
    if documents not in DOCUMENTS:
        raise ValueError(f"documents={documents!r} is unknown; choose from {list(DOCUMENTS)}")
    if sentences not in SENTENCES:
        raise ValueError(f"sentences={sentences!r} is unknown; choose from {list(SENTENCES)}")
    sources = find_sources(text)
    return _read(sources, documents, sentences, language)


def split_sentences(paragraph: str, language: str = "en") -> list[str]:
    """Sentences of one paragraph: "Mr. Smith left. He ran." -> ["Mr. Smith left.", "He ran."].

    By Wikimedia's sentencex: about 300 languages, no character lost, 70 MB/s on one core. A quotation of several
    sentences stays one sentence.
    """
    found = (" ".join(sentence.split()) for sentence in sentencex.segment(language, paragraph))
    return [sentence for sentence in found if sentence]


def find_sources(text: str | Path | Iterable[str | Path]) -> list[Path]:
    """The `.txt` files and `datasets` folders that `text` names, folders searched recursively, each in sorted order."""
    paths = [Path(text)] if isinstance(text, str | Path) else [Path(path) for path in text]
    if not paths:
        raise ValueError("no text was named; give .txt files, folders of them, or a folder written by save_to_disk")
    return [source for path in paths for source in _sources_under(path)]


def _sources_under(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"no text at {path}: there is no such file or folder")
    if (path / "dataset_dict.json").exists():
        splits = sorted(split.parent.name for split in path.glob("*/state.json"))
        raise ValueError(f"{path} holds several splits; name the one that is meant, out of {splits}: {path}/SPLIT")
    if path.is_file() or _is_dataset(path):
        return [path]
    files = sorted(file for file in path.rglob("*.txt") if file.is_file())
    if not files:
        raise FileNotFoundError(
            f"no .txt file in {path} or its subfolders; name files one by one if they end otherwise"
        )
    return files


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").exists() and (path / "dataset_info.json").exists()


def _read(sources: list[Path], documents: str, sentences: str, language: str) -> Iterator[Document]:
    found = False
    for source in sources:
        files = _rows(source) if source.is_dir() else [_lines(source)]
        for lines in files:
            paragraphs = (_sentences(paragraph, sentences, language) for paragraph in _paragraphs(lines))
            if documents == "file":
                paragraphs = iter([[sentence for paragraph in paragraphs for sentence in paragraph]])
            for document in paragraphs:
                if document:
                    found = True
                    yield document
    if not found:
        raise ValueError(f"no text in {', '.join(map(str, sources[:3]))}{', …' * (len(sources) > 3)}: only blank lines")


def _sentences(paragraph: list[str], sentences: str, language: str) -> Document:
    return paragraph if sentences == "lines" else split_sentences(" ".join(paragraph), language)


def _paragraphs(lines: Iterable[str]) -> Iterator[list[str]]:
    """["a", "b", "", "", "c"] -> ["a", "b"], ["c"]: the non-blank lines between blank ones."""
    paragraph = []
    for line in lines:
        if line:
            paragraph.append(line)
        elif paragraph:
            yield paragraph
            paragraph = []
    if paragraph:
        yield paragraph


def _lines(file: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with each run of white space made one space; "" is a blank line."""
    offset = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                # Only the first line may begin with a byte-order mark.
                decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                # error.start counts from error.object, which lacks the byte-order mark.
                byte = offset + len(line) - len(error.object) + error.start
                raise ValueError(
                    f"{file} is not UTF-8: byte {byte} (line {number}) is 0x{error.object[error.start]:02x}; "
                    f"convert it, say with iconv -f LATIN1 -t UTF-8"
                ) from None
            yield " ".join(decoded.split())
            offset += len(line)


def _rows(folder: Path) -> Iterator[Iterator[str]]:
    """The lines of each row of a `datasets` folder."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder))
    if "text" not in dataset.column_names:
        raise ValueError(
            f"{folder} has no column 'text' but {dataset.column_names}; rename_column() the one that is text"
        )
    for row in dataset.select_columns("text"):
        yield (" ".join(line.split()) for line in (row["text"] or "").splitlines())


@dataclass(frozen=True, eq=False)
class TokenDocuments:
    """Documents as token ids, flat: any sentence, and any run of sentences of one document, is one slice.

        [["a b", "c"], ["d e f"]]  ->  tokens             [a b c d e f]
                                       sentence_offsets   [0 2 3 6]      the first token of each sentence, and the end
                                       document_offsets   [0 2 3]        the first sentence of each document, the end

    tokens: (T,) int32; sentence_offsets: (sentences + 1,) int64; document_offsets: (documents + 1,) int64.
    No sentence and no document is empty.
    """

    tokens: np.ndarray
    sentence_offsets: np.ndarray
    document_offsets: np.ndarray

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

    def __len__(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def num_sentences(self) -> int:
        return len(self.sentence_offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


def offsets_of(lengths: Iterable[int]) -> np.ndarray:
    """[2, 1, 3] -> [0, 2, 3, 6], int64."""
    lengths = np.asarray(lengths, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
