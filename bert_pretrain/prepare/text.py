"""The passes over the text, each by several processes: count documents, learn a vocabulary, tokenize.

Tasks are about a megabyte each, for any number of processes: the result is the same. A document's number is its place
in the whole text.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from bert_pretrain.prepare.documents import Document, DocumentOptions, documents_of, find_sources, no_text
from bert_pretrain.prepare.tokenizer import tokenize_sentences
from bert_pretrain.prepare.tokens import TokenDocuments, open_tokens, write_tokens
from packing.files.processes import Workers
from packing.files.progress import progress_bar
from packing.source.text import text_tokenizer
from packing.source.text_files import BLOCK_BYTES, TextBlock, find_blocks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Result = TypeVar("Result")


class TextTask(NamedTuple):
    """Some blocks, and which of their documents are meant."""

    blocks: list[TextBlock]
    options: DocumentOptions
    members: np.ndarray | None = None
    """bool, one per document; None: all."""

    def chosen(self) -> list[Document]:
        found = [document for block in self.blocks for document in documents_of(block, self.options)]
        if self.members is None:
            return found
        if len(found) != len(self.members):
            raise ValueError(
                f"{self.blocks[0].source} changed while it was read: {len(self.members)} documents became "
                f"{len(found)}; prepare it again"
            )
        return [document for document, member in zip(found, self.members, strict=True) if member]


class Text:
    """The documents of some sources, read again in each pass.

    text, text_column: see `find_sources`. progress: show bars on stderr.
    """

    def __init__(
        self, text: list[str], text_column: str | None, options: DocumentOptions, workers: Workers, progress: bool
    ):
        self.sources = find_sources(text, text_column)
        self.options, self.workers, self.progress = options, workers, progress

    @cached_property
    def tasks(self) -> list[list[TextBlock]]:
        """Blocks of one split, about BLOCK_BYTES together: small files share a task."""
        return [task for tasks in self._tasks_of_splits.values() for task in tasks]

    @cached_property
    def _tasks_of_splits(self) -> dict[str, list[list[TextBlock]]]:
        return {split: _tasks_of(find_blocks(texts, self.options.documents)) for split, texts in self.sources.items()}

    @cached_property
    def own_splits(self) -> dict[str, np.ndarray]:
        """{split: (num_documents,) bool}, where the sources have splits; {} where they have none."""
        if "" in self.sources:
            return {}
        splits = [split for split, tasks in self._tasks_of_splits.items() for _ in tasks]
        of_documents = np.repeat(splits, self._documents_per_task)
        return {split: of_documents == split for split in self.sources}

    @cached_property
    def num_documents(self) -> int:
        """Raises ValueError if there are none."""
        if not self._documents_per_task.sum():
            raise no_text(self.sources)
        return int(self._documents_per_task.sum())

    @cached_property
    def _documents_per_task(self) -> np.ndarray:
        # A line that is not blank makes a sentence either way: counting documents needs no search for sentences.
        options = self.options._replace(sentences="lines")
        tasks = [TextTask(blocks, options) for blocks in self.tasks]
        return np.array(list(self._progress("reading", _count_documents, tasks)))

    def sentences(self, members: np.ndarray) -> Iterator[str]:
        """The sentences of the documents of which `members` is True."""
        for documents in self._progress("training the tokenizer", TextTask.chosen, self._tasks(members), members):
            for document in documents:
                yield from document

    def characters(self, members: np.ndarray) -> Counter:
        """How often each character occurs in those documents."""
        total: Counter[str] = Counter()
        for counts in self._progress("counting characters", _count_characters, self._tasks(members), members):
            total.update(counts)
        return total

    def tokenize(self, members: np.ndarray, tokenizer: Path, folder: Path, name: str, longest: int) -> TokenDocuments:
        """Those documents as token ids, written to a folder.

        tokenizer: a file that `describe` made. longest: sentence, see `tokenize_sentences`.
        """
        tokenize = partial(_tokenize, tokenizer, longest)
        write_tokens(folder, self._progress(f"tokenizing {name}", tokenize, self._tasks(members), members))
        return open_tokens(folder)

    def _tasks(self, members: np.ndarray) -> list[TextTask]:
        """The tasks with any such document."""
        parts = np.split(members, np.cumsum(self._documents_per_task)[:-1])
        tasks = zip(self.tasks, parts, strict=True)
        return [TextTask(blocks, self.options, part) for blocks, part in tasks if part.any()]

    def _progress(
        self,
        what: str,
        function: Callable[[TextTask], Result],
        tasks: list[TextTask],
        members: np.ndarray | None = None,
    ) -> Iterator[Result]:
        """The results of the tasks, with a bar that counts documents."""
        total = None if members is None else int(members.sum())
        with progress_bar(desc=what, unit=" documents", total=total, disable=not self.progress) as bar:
            for task, result in zip(tasks, self.workers.map(function, tasks), strict=True):
                bar.update(result if task.members is None else int(task.members.sum()))
                yield result


def _tasks_of(blocks: Iterable[TextBlock]) -> list[list[TextBlock]]:
    tasks: list[list[TextBlock]] = [[]]
    size = 0
    for block in blocks:
        if tasks[-1] and size + block.num_bytes > 2 * BLOCK_BYTES:
            tasks.append([])
            size = 0
        tasks[-1].append(block)
        size += block.num_bytes
    return tasks


def _count_documents(task: TextTask) -> int:
    return len(task.chosen())


def _count_characters(task: TextTask) -> Counter[str]:
    return Counter(chain.from_iterable(sentence for document in task.chosen() for sentence in document))


def _tokenize(tokenizer: Path, longest: int, task: TextTask) -> TokenDocuments:
    return tokenize_sentences(task.chosen(), _loaded(tokenizer), longest)


@lru_cache(maxsize=1)
def _loaded(file: Path) -> "Tokenizer":
    return text_tokenizer(file.read_text(encoding="utf-8"))
