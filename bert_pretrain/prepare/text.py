"""The passes over the text, each by several processes: count documents, learn a vocabulary, tokenize.

Tasks are about a megabyte each, for any number of processes: the result is the same. A document's number is its place
in the whole text.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from bert_pretrain.prepare.documents import (
    Document,
    DocumentOptions,
    find_sources,
    no_text,
    paragraphs_of,
    sentences_of,
)
from bert_pretrain.prepare.tokenizer import tokenize_sentences
from bert_pretrain.prepare.tokens import TokenDocuments, load_part, open_tokens, save_part, write_tokens
from packing.files.names import NamedFile
from packing.files.processes import Workers
from packing.files.progress import progress_bar
from packing.source.text_files import BLOCK_BYTES, TextBlock, TextRows, find_blocks
from packing.text.outcome import Amount, DifferentTokens
from packing.text.tokenizer import TOKENIZE_CURE

if TYPE_CHECKING:
    from tqdm.std import tqdm

    from packing.text.encode import Encoder

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class TextTask(NamedTuple):
    """Some blocks, and which of their documents are meant."""

    blocks: list[TextBlock]
    options: DocumentOptions
    members: np.ndarray | None = None
    """bool, one per document; None: all."""

    def chosen(self) -> list[Document]:
        found = self._all()
        if self.members is not None:
            if len(found) != len(self.members):
                raise ValueError(
                    f"{self.blocks[0].source} changed while it was read: {len(self.members)} documents became "
                    f"{len(found)}; prepare it again"
                )
            found = [document for document, member in zip(found, self.members, strict=True) if member]
        return [sentences_of(document, self.options) for document in found]

    def num_documents(self) -> int:
        return len(self._all())

    def _all(self) -> list[list[list[str]]]:
        """All documents, as paragraphs of lines: to find their sentences takes longer than to read them."""
        return [found for block in self.blocks for found in paragraphs_of(block, self.options.documents)]


class Text:
    """The documents of some sources, read again in each pass.

    text, text_column: see `find_sources`. progress: show bars on stderr.
    """

    def __init__(
        self, text: list[str], text_column: str | None, options: DocumentOptions, workers: Workers, progress: bool
    ):
        self.sources = find_sources(text, text_column)
        self.options, self.workers, self.progress = options, workers, progress

    def stamps(self) -> list:
        """What changes when a source does."""
        return [
            (split, source.stamp() if isinstance(source, NamedFile) else _stamp_of_rows(source))
            for split, sources in self.sources.items()
            for source in sources
        ]

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
        tasks = [TextTask(blocks, self.options) for blocks in self.tasks]
        return np.array(list(self._progress("reading", TextTask.num_documents, tasks)))

    def sentences(self, members: np.ndarray) -> Iterator[str]:
        """The sentences of the documents of which `members` is True."""
        for documents in self._progress("training the tokenizer", TextTask.chosen, self._tasks(members)):
            for document in documents:
                yield from document

    def characters(self, members: np.ndarray) -> Counter:
        """How often each character occurs in those documents."""
        total: Counter[str] = Counter()
        for counts in self._progress("counting characters", _count_characters, self._tasks(members)):
            total.update(counts)
        return total

    def tokenize(
        self, members: np.ndarray, tokenizer: Path, mode: str, folder: Path, name: str, longest: int
    ) -> tuple[TokenDocuments, Amount]:
        """Those documents as token ids, written to a folder, and how much of their text the tokenizer read.

        The parts that the folder has already are not made again.

        tokenizer: a file that `describe` made, of a name of its own. mode: see `open_encoder`. longest: sentence, see
        `tokenize_sentences`.
        """
        folder.mkdir(exist_ok=True)
        exact = folder / "exact"  # it is there once units have proved wrong: parts that are made without them
        if not exact.exists():
            try:
                parts, amount = self._tokenize(members, partial(_tokenize, tokenizer, mode, longest), folder, name)
            except DifferentTokens as error:
                if mode == "fast":
                    raise ValueError(f"{name} split: {error}; {TOKENIZE_CURE}") from None
                logger.warning("%s split: all sentences are tokenized one by one, since %s", name, error)
                exact.mkdir()
        if exact.exists():
            parts, amount = self._tokenize(members, partial(_tokenize, tokenizer, "exact", longest), exact, name)
        write_tokens(folder / "all", map(load_part, parts))
        return open_tokens(folder / "all"), amount

    def _tokenize(
        self, members: np.ndarray, tokenize: Callable[["TokenizeTask"], Amount], folder: Path, name: str
    ) -> tuple[list[Path], Amount]:
        """The parts, and how much text those had that were missing."""
        tasks = [TokenizeTask(task, folder / f"{i:06}.npy") for i, task in enumerate(self._tasks(members))]
        missing, amount = [task for task in tasks if not task.file.exists()], Amount()
        done = _bytes(task.text for task in tasks) - _bytes(task.text for task in missing)
        with self._bar(f"tokenizing {name}", [task.text for task in tasks], done) as bar:
            for task, found in zip(missing, self.workers.map(tokenize, missing), strict=True):
                bar.update(_bytes([task.text]))
                amount = amount.plus(found)
        if amount.bytes:
            logger.info("%s split: %s", name, amount)
        return [task.file for task in tasks], amount

    def _tasks(self, members: np.ndarray) -> list[TextTask]:
        """The tasks with any such document."""
        parts = np.split(members, np.cumsum(self._documents_per_task)[:-1])
        tasks = zip(self.tasks, parts, strict=True)
        return [TextTask(blocks, self.options, part) for blocks, part in tasks if part.any()]

    def _progress(self, what: str, function: Callable[[TextTask], Result], tasks: list[TextTask]) -> Iterator[Result]:
        """The results of the tasks."""
        with self._bar(what, tasks) as bar:
            for task, result in zip(tasks, self.workers.map(function, tasks), strict=True):
                bar.update(_bytes([task]))
                yield result

    def _bar(self, what: str, tasks: list[TextTask], done: int = 0) -> "tqdm":
        """A bar that counts bytes of text."""
        size = {"unit": "B", "unit_scale": True, "total": _bytes(tasks), "initial": done}
        return progress_bar(desc=what, disable=not self.progress, **size)


def _stamp_of_rows(source: TextRows) -> tuple:
    files = [NamedFile.of(file["filename"]).stamp() for file in source.dataset.cache_files]
    return source.name, source.column, source.dataset._fingerprint, files


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


def _count_characters(task: TextTask) -> Counter[str]:
    return Counter(chain.from_iterable(sentence for document in task.chosen() for sentence in document))


class TokenizeTask(NamedTuple):
    """The documents of a task -> a file."""

    text: TextTask
    file: Path


def _bytes(tasks: Iterable[TextTask]) -> int:
    return sum(block.num_bytes for task in tasks for block in task.blocks)


def _tokenize(tokenizer: Path, mode: str, longest: int, task: TokenizeTask) -> Amount:
    encoder = _encoder(tokenizer, mode)
    before = encoder.amount()
    save_part(task.file, tokenize_sentences(task.text.chosen(), encoder, longest))
    return encoder.amount().since(before)


@lru_cache(maxsize=1)
def _encoder(file: Path, mode: str) -> "Encoder":
    """One for all tasks of this process: its table holds what it has read."""
    from packing.text.encode import open_encoder  # compiled code, which help must not wait for

    return open_encoder(file.read_text(encoding="utf-8"), mode)
