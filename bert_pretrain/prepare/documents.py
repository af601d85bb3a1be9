"""Sources of text -> documents -> sentences.

A document is what next-sentence prediction may not cross: a list of sentences.

    First one. Second,          documents="paragraph"      documents="file"
    wrapped over a line.        -> [["First one.",         -> [["First one.",
    (blank line)                     "Second, wrapped           "Second, wrapped over a line.",
    Third one.                        over a line."],           "Third one."]]
                                    ["Third one."]]

    documents="line"            -> [["First one.", "Second,"], ["wrapped over a line."], ["Third one."]]
"""

from collections.abc import Iterator
from typing import NamedTuple

import sentencex

from packing.files.errors import OptionError, SourceError
from packing.files.names import NamedFile
from packing.source.open import find_texts
from packing.source.text_files import TextBlock, TextRows, paragraphs, read_lines

SENTENCES = ("split", "lines")

Document = list[str]
"""The sentences of one document, in order, never empty."""

TextSources = dict[str, list[NamedFile | TextRows]]
"""{split: its text, in order}; "" is text without splits."""


class DocumentOptions(NamedTuple):
    """Which documents and sentences a text has.

    documents: "paragraph": a blank line parts documents (BERT's own input format); "line": each line that is not blank
        is one; "file": each file, or row, is one, and blank lines only part its paragraphs.
    sentences: "split": the lines of a paragraph are joined, then split into sentences; "lines": each line is one
        sentence (BERT's own input format, https://github.com/google-research/bert#pre-training-with-bert).
    language: ISO 639 code for the splitter's abbreviations ("Mr." ends no sentence in English).
    """

    documents: str
    sentences: str
    language: str


def find_sources(names: list[str], text_column: str | None = None) -> TextSources:
    """The text of all sources. They have splits only if one of them has several, and then all must have splits.

    names: files, folders, globs, names of the hub, URLs.
    text_column: of rows; None: the column `text`, or else the only one of strings.

    Raises FileNotFoundError for a source that does not exist, and ValueError for one that holds no text.
    """
    if not names:
        raise ValueError("no text was named; give files, folders, globs, names of the hub, or URLs")
    found = [(name, _texts(name, text_column)) for name in names]
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


def _texts(name: str, text_column: str | None) -> TextSources:
    """The text of one source; errors about its columns begin with its name."""
    try:
        return find_texts(name, text_column)
    except SourceError as error:
        if error.file is not None:
            raise
        raise OptionError(f"{name!r}: {error.marked()}") from None


def no_text(sources: TextSources) -> ValueError:
    """What to raise where sources hold nothing but blank lines."""
    names = [str(source) for texts in sources.values() for source in texts]
    return ValueError(f"no text in {', '.join(names[:3])}{', …' * (len(names) > 3)}: only blank lines")


def paragraphs_of(block: TextBlock, documents: str) -> Iterator[list[list[str]]]:
    """Each document of one block, as paragraphs of lines. None is empty, and none has an empty line."""
    for lines in read_lines(block):
        found = list(paragraphs(lines, documents))
        yield from filter(None, [found]) if documents == "file" else ([paragraph] for paragraph in found)


def sentences_of(document: list[list[str]], options: DocumentOptions) -> Document:
    """The sentences of what `paragraphs_of` gives: one at least."""
    if options.sentences == "lines":
        return [line for paragraph in document for line in paragraph]
    return [sentence for lines in document for sentence in split_sentences(" ".join(lines), options.language)]


def split_sentences(paragraph: str, language: str = "en") -> list[str]:
    """Sentences of one paragraph: "Mr. Smith left. He ran." -> ["Mr. Smith left.", "He ran."].

    paragraph: its only white space are single spaces.

    By Wikimedia's sentencex: about 300 languages, no character lost, 70 MB/s on one core. A quotation of several
    sentences stays one sentence.
    """
    return [found for sentence in sentencex.segment(language, paragraph) if (found := sentence.strip())]
