"""Sources -> documents -> token ids, in one go: what `prepare` does by several processes, block by block."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from bert_pretrain.prepare.documents import (
    Document,
    DocumentOptions,
    TextSources,
    find_sources,
    no_text,
    paragraphs_of,
    sentences_of,
)
from bert_pretrain.prepare.tokenizer import tokenize_sentences
from bert_pretrain.prepare.tokens import TokenDocuments
from packing.histogram import offsets_of
from packing.source.text_files import check_documents, find_blocks
from packing.text.encode import SlowEncoder
from packing.text.tokenizer import describe, text_tokenizer


def sources_of(*paths: str | Path, text_column: str | None = None) -> TextSources:
    return find_sources([str(path) for path in paths], text_column)


def read_documents(
    path: str | Path, documents: str = "paragraph", sentences: str = "split", text_column: str | None = None
) -> Iterator[Document]:
    """The documents of a source, one after the other; a source that holds no text is refused at once."""
    options = DocumentOptions(check_documents(documents), sentences, "en")
    sources = sources_of(path, text_column=text_column)

    def documents_found() -> Iterator[Document]:
        found = False
        for texts in sources.values():
            for block in find_blocks(texts, documents):
                for document in paragraphs_of(block, options.documents):
                    found = True
                    yield sentences_of(document, options)
        if not found:
            raise no_text(sources)

    return documents_found()


def tokenize_documents(documents: Iterable[Document], tokenizer) -> TokenDocuments:
    """Token ids of every sentence, without special tokens; the tokenizer stays as it is."""
    return tokenize_sentences(list(documents), SlowEncoder(text_tokenizer(describe(tokenizer))))


def token_documents(documents: Iterable[Iterable[list[int]]]) -> TokenDocuments:
    """Documents of sentences of token ids; empty sentences, and documents of nothing else, are left out."""
    kept = [[sentence for sentence in document if sentence] for document in documents]
    kept = [document for document in kept if document]
    sentences = [sentence for document in kept for sentence in document]
    return TokenDocuments(
        tokens=np.array([token for sentence in sentences for token in sentence], np.int32),
        sentence_offsets=offsets_of([len(sentence) for sentence in sentences]),
        document_offsets=offsets_of([len(document) for document in kept]),
    )
