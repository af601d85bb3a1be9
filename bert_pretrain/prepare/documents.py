"""Sources of text -> documents -> sentences.

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

from packing.files.names import NamedFile
from packing.source.open import find_texts
from packing.source.text_files import TextBlock, TextRows, check_documents, find_blocks, paragraphs, read_lines

SENTENCES = ("split", "lines")

Document = list[str]
"""The sentences of one document, in order, never empty."""

TextSources = dict[str, list[NamedFile | TextRows]]
"""{split: its text, in order}; "" is text without splits."""


def read_documents(
    text: str | Path | Iterable[str | Path],
    documents: str = "paragraph",
    sentences: str = "split",
    language: str = "en",
    text_column: str | None = None,
) -> Iterator[Document]:
    """The documents of the given sources, one after the other; nothing is kept in memory.

    text: sources as `packing.source.open` reads them: files, folders (subfolders too, in sorted order), globs, names of
        the hub, URLs. A row of a column of texts counts as a file.
    documents: "paragraph": a blank line parts documents (BERT's own input format); "line": each line that is not blank
        is one; "file": each file is one, and blank lines only part its paragraphs.
    sentences: "split": the lines of a paragraph are joined, then split into sentences; "lines": each line is one
        sentence already (BERT's own input format, https://github.com/google-research/bert#pre-training-with-bert).
    language: ISO 639 code for the splitter's abbreviations ("Mr." ends no sentence in English).
    text_column: of rows; None: the column `text`, or else the only one of strings.

    Raises FileNotFoundError for a source that does not exist, and ValueError for one that holds no text.
    """
    check_documents(documents)
    if sentences not in SENTENCES:
        raise ValueError(f"sentences={sentences!r} is unknown; choose from {list(SENTENCES)}")
    return _read(find_sources(text, text_column), documents, sentences, language)


def _read(sources: TextSources, documents: str, sentences: str, language: str) -> Iterator[Document]:
    found = False
    for texts in sources.values():
        for block in find_blocks(texts, documents):
            for document in documents_of(block, documents, sentences, language):
                found = True
                yield document
    if not found:
        raise no_text(sources)


def find_sources(text: str | Path | Iterable[str | Path], text_column: str | None = None) -> TextSources:
    """The text of all sources. They have splits only if one of them has several, and then all must have splits."""
    names = [str(text)] if isinstance(text, str | Path) else [str(path) for path in text]
    if not names:
        raise ValueError("no text was named; give files, folders, globs, names of the hub, or URLs")
    found = [(name, find_texts(name, text_column)) for name in names]
    if all(len(splits) == 1 for _, splits in found):
        return {"": [source for _, splits in found for texts in splits.values() for source in texts]}
    joined: TextSources = {}
    for name, splits in found:
        if "" in splits:
            other, has = next((other, splits) for other, splits in found if len(splits) > 1)
            raise ValueError(
                f"{other!r} has the splits {', '.join(has)}, and {name!r} has none; give sources with the same splits, "
                "or name the files of one split"
            )
        for split, texts in splits.items():
            joined.setdefault(split, []).extend(texts)
    return joined


def no_text(sources: TextSources) -> ValueError:
    """What to raise where nothing but blank lines was found."""
    names = [str(source) for texts in sources.values() for source in texts]
    return ValueError(f"no text in {', '.join(names[:3])}{', …' * (len(names) > 3)}: only blank lines")


def documents_of(block: TextBlock, documents: str, sentences: str, language: str) -> Iterator[Document]:
    """The documents of one block; options as in `read_documents`."""
    for lines in read_lines(block):
        parts = (_sentences(part, sentences, language) for part in paragraphs(lines, documents))
        if documents == "file":
            parts = iter([[sentence for part in parts for sentence in part]])
        yield from filter(None, parts)


def split_sentences(paragraph: str, language: str = "en") -> list[str]:
    """Sentences of one paragraph: "Mr. Smith left. He ran." -> ["Mr. Smith left.", "He ran."].

    By Wikimedia's sentencex: about 300 languages, no character lost, 70 MB/s on one core. A quotation of several
    sentences stays one sentence.
    """
    found = (" ".join(sentence.split()) for sentence in sentencex.segment(language, paragraph))
    return [sentence for sentence in found if sentence]


def _sentences(paragraph: list[str], sentences: str, language: str) -> Document:
    return paragraph if sentences == "lines" else split_sentences(" ".join(paragraph), language)
