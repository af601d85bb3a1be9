"""Lines of text -> documents -> sentences.

A document is what next-sentence prediction may not cross: a list of sentences.

    First one. Second,          documents="paragraph"      documents="file"
    wrapped over a line.        -> [["First one.",         -> [["First one.",
    (blank line)                     "Second, wrapped           "Second, wrapped over a line.",
    Third one.                        over a line."],           "Third one."]]
                                    ["Third one."]]

    documents="line"            -> [["First one.", "Second,"], ["wrapped over a line."], ["Third one."]]
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencex

from bert_pretrain.prepare.sources import TextBlock, find_blocks, find_sources, read_block

DOCUMENTS = ("paragraph", "line", "file")
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
    documents: "paragraph": a blank line parts documents (BERT's own input format); "line": each line is one, blank
        ones are none; "file": each file is one, and blank lines only part its paragraphs.
    sentences: "split": the lines of a paragraph are joined, then split into sentences; "lines": each line is one
        sentence already (BERT's own input format, https://github.com/google-research/bert#pre-training-with-bert).
    language: ISO 639 code for the splitter's abbreviations ("Mr." ends no sentence in English).

    Raises FileNotFoundError for a source that is not there and ValueError for one that can't be read as text.
    """
    if documents not in DOCUMENTS:
        raise ValueError(f"documents={documents!r} is unknown; choose from {list(DOCUMENTS)}")
    if sentences not in SENTENCES:
        raise ValueError(f"sentences={sentences!r} is unknown; choose from {list(SENTENCES)}")
    return _read(find_sources(text), documents, sentences, language)


def _read(sources: list[Path], documents: str, sentences: str, language: str) -> Iterator[Document]:
    found = False
    for block in find_blocks(sources, whole_files=documents == "file", lines=documents == "line"):
        for document in documents_of(block, documents, sentences, language):
            found = True
            yield document
    if not found:
        raise no_text(sources)


def no_text(sources: list[Path]) -> ValueError:
    """What to raise where nothing but blank lines was found."""
    return ValueError(f"no text in {', '.join(map(str, sources[:3]))}{', …' * (len(sources) > 3)}: only blank lines")


def documents_of(block: TextBlock, documents: str, sentences: str, language: str) -> Iterator[Document]:
    """The documents of one block; options as in `read_documents`."""
    for lines in read_block(block):
        parts = ([line] for line in lines if line) if documents == "line" else _paragraphs(lines)
        paragraphs = (_sentences(part, sentences, language) for part in parts)
        if documents == "file":
            paragraphs = iter([[sentence for paragraph in paragraphs for sentence in paragraph]])
        yield from filter(None, paragraphs)


def split_sentences(paragraph: str, language: str = "en") -> list[str]:
    """Sentences of one paragraph: "Mr. Smith left. He ran." -> ["Mr. Smith left.", "He ran."].

    By Wikimedia's sentencex: about 300 languages, no character lost, 70 MB/s on one core. A quotation of several
    sentences stays one sentence.
    """
    found = (" ".join(sentence.split()) for sentence in sentencex.segment(language, paragraph))
    return [sentence for sentence in found if sentence]


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
