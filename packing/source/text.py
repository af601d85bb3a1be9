"""Texts -> tokens: a column of a dataset by a tokenizer, in parallel, ready to be packed.

text          label          label   input_ids      token_type_ids
"we must"     a       ->     a       [2 57 92 3]    [0 0 0 0]

Nothing is truncated or padded: `overlong` decides about what does not fit into a pack. A special token in a text is
text, see packing.text.tokenizer.

The rows are cut into tasks, which make a file each. Whoever does a task, the file is the same, and one that is finished
is not made again:

    000000.arrow, 000001.arrow, …        by an encoder of units
    different, exact-000000.arrow, …     text by text, from the text on for which that encoder has proved wrong
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from packing.files.cache import kept_rows, key_of
from packing.files.errors import Option, SourceError, suggestion
from packing.files.hashed import HashedFile, write_file
from packing.files.processes import Workers, prepared
from packing.files.progress import progress_bar
from packing.source.fingerprint import column_prints, combined_print
from packing.source.sequences import OverlongError
from packing.source.token_column import chosen_rows, null_rows, refuse_broken
from packing.text.encode import Encoder, Texts, open_encoder
from packing.text.outcome import Amount, DifferentTokens
from packing.text.tokenizer import TOKENIZE_CURE, describe

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# Types of what tokenizers give. Whatever it is not in here is no column of tokens, or is not wanted.
TYPES = {"input_ids": "int32", "token_type_ids": "int8"}

TASK_BYTES = 1 << 25  # of texts in a file
BATCH_BYTES = 1 << 22  # of texts in memory at a time
BATCH_ROWS = 1000  # of a file, as the datasets library has them; other columns are in memory for so many rows
DIFFERENT = "different"  # a file that says for which text the units have proved wrong


def tokenize(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    text_columns: Sequence[str],
    keep_text: bool = False,
    num_proc: int = 1,
    *,
    longest: int | None = None,
    cache: Path | None = None,
    mode: str = "auto",
    run: Run | None = None,
    say: Callable[[str], object] = logger.info,
) -> datasets.Dataset:
    """Replace one column of texts, or two that make pairs, by their tokens; the other columns stay.

    num_proc: processes that tokenize.
    longest: the first row with more tokens than this ends the work with OverlongError; None: none does.
    mode: one of MODES of packing.text.tokenizer; the tokens are the same.
    run: who does the tasks; None: num_proc processes.
    say: is called with a line about how much of the text the tokenizer had to read.

    Kept in `cache` (None: that of the datasets library, HF_DATASETS_CACHE), under the content of the texts and of the
    tokenizer: the same texts are not tokenized twice, and texts that have changed are. What a killed run has finished
    is used by the next one.
    """
    import datasets

    check_texts(dataset, text_columns)
    names = tuple(name for name in TYPES if name in ("input_ids", *tokenizer.model_input_names))
    kept = [name for name in dataset.column_names if keep_text or name not in text_columns]
    features = datasets.Features(
        {name: dataset.features[name] for name in kept}
        | {name: datasets.List(datasets.Value(TYPES[name])) for name in names}
    )
    work = TokenizeRows(dataset, describe(tokenizer), tuple(text_columns), features, longest, mode)
    run = run or partial(_in_processes, num_proc)
    key = _fingerprint(work, names, keep_text)
    found = kept_rows(key, lambda folder: _write_all(work, folder, run, say), cache, resumes=True)
    info = dataset.info.copy()
    info.features = features
    return datasets.Dataset(found.data, info=info, split=dataset.split, fingerprint=key)


class RowsTask(NamedTuple):
    """Rows start..end -> one file."""

    start: int
    end: int
    file: Path


@dataclass(frozen=True)
class TokenizeRows:
    """The texts of some rows -> their tokens, in a file. Any process can do it: it opens the dataset's files.

    features: of what is written. The rest is as in `tokenize`.
    """

    dataset: datasets.Dataset
    description: str
    text_columns: tuple[str, ...]
    features: datasets.Features
    longest: int | None
    mode: str

    def write(self, task: RowsTask) -> Amount:
        """Raises OverlongError for a row that is too long, and DifferentTokens."""
        import pyarrow as pa

        before, schema, rows = self._encoder.amount(), self.features.arrow_schema, self.dataset.with_format("arrow")
        texts = rows.select_columns(list(self.text_columns))[task.start : task.end]
        with HashedFile(task.file) as file:
            with pa.ipc.new_stream(file, schema) as writer:
                for start, end in _runs(_text_bytes(texts, self.text_columns), BATCH_BYTES):
                    columns = [texts[name].slice(start, end - start) for name in self.text_columns]
                    tokens = self._tokens(columns, task.start + start)
                    for first in range(start, end, BATCH_ROWS):
                        table = rows[task.start + first : task.start + min(first + BATCH_ROWS, end)]
                        for name, values in tokens.items():
                            table = table.append_column(name, values.slice(first - start, len(table)))
                        # Of chosen rows, each is a chunk, which would be a batch.
                        writer.write_table(table.select(schema.names).cast(schema).combine_chunks())
            file.publish()
        return self._encoder.amount().since(before)

    def _tokens(self, columns: list[pa.ChunkedArray], first_row: int) -> dict[str, pa.Array]:
        """{column: a list of tokens for each row}"""
        import pyarrow as pa

        rows = self._encoder.encode([Texts.of_arrow(pa.concat_arrays(column.chunks)) for column in columns])
        lengths = np.diff(rows.offsets)
        if self.longest is not None and (lengths > self.longest).any():
            row = int(np.argmax(lengths > self.longest))
            raise OverlongError(first_row + row, int(lengths[row]), self.longest)
        offsets = pa.array(rows.offsets.astype(np.int32))
        values = {"input_ids": rows.ids, "token_type_ids": rows.type_ids}
        return {
            name: pa.ListArray.from_arrays(offsets, pa.array(tokens))
            for name, tokens in values.items()
            if name in self.features
        }

    @cached_property
    def _encoder(self) -> Encoder:
        return open_encoder(self.description, self.mode)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_encoder"}


Run = Callable[[TokenizeRows, Sequence[RowsTask]], Iterator[Amount]]
"""Who does the tasks: what they give, in any order."""


def _in_processes(num_proc: int, work: TokenizeRows, tasks: Sequence[RowsTask]) -> Iterator[Amount]:
    num_proc = min(num_proc, len(tasks))
    if num_proc <= 1:
        yield from map(work.write, tasks)
        return
    with Workers(num_proc, partial(_same, work)) as workers:
        yield from workers.map(_write, tasks)  # in order: of several long rows, the first ends the work


def _same(work: TokenizeRows) -> TokenizeRows:
    return work


def _write(task: RowsTask) -> Amount:
    """In one of the processes."""
    return prepared().write(task)


def _fingerprint(work: TokenizeRows, names: Sequence[str], keep_text: bool) -> str:
    """Of all columns, what is to be done with them, and by which tokenizer. Who asks for `exact` trusts no units."""
    made_by = version("dataset-packing"), version("tokenizers"), work.description, work.mode == "exact"
    rows = combined_print(column_prints(work.dataset)), str(work.dataset.features)
    return key_of(rows, made_by, work.text_columns, tuple(names), keep_text)


def _write_all(work: TokenizeRows, folder: Path, run: Run, say: Callable[[str], object]) -> None:
    """A file for each task that has none. Where the units of texts prove wrong, all again by the tokenizer itself, and
    so will a run that resumes this one."""
    different, amount = folder / DIFFERENT, Amount()
    if not different.exists():
        try:
            files, amount = _write_missing(work, folder, run)
        except DifferentTokens as error:
            write_file(different, str(error).encode())
    if different.exists():
        why = different.read_text(encoding="utf-8")
        if work.mode == "fast":
            raise ValueError(f"{why}; {TOKENIZE_CURE}")
        say(f"all texts are tokenized one by one, since {why}")
        files, amount = _write_missing(replace(work, mode="exact"), folder, run, "exact-")
    elif amount.bytes:
        say(str(amount))
    for file in {*folder.glob("*.arrow")} - files:
        file.unlink()


def _write_missing(work: TokenizeRows, folder: Path, run: Run, prefix: str = "") -> tuple[set[Path], Amount]:
    """-> the files of all tasks, and how much text those had that were not there."""
    import datasets

    sizes, amount = _text_bytes(work.dataset.data, work.text_columns, chosen_rows(work.dataset)), Amount()
    runs = enumerate(_runs(sizes, TASK_BYTES))
    tasks = [RowsTask(start, end, folder / f"{prefix}{number:06}.arrow") for number, (start, end) in runs]
    missing = [task for task in tasks if not task.file.exists()]
    with progress_bar(
        desc="tokenizing",
        total=int(sizes.sum()),
        initial=int(sizes.sum() - sum(sizes[task.start : task.end].sum() for task in missing)),
        unit="B",
        unit_scale=True,
        disable=datasets.are_progress_bars_disabled(),
    ) as bar:
        for found in run(work, missing):
            amount = amount.plus(found)
            bar.update(found.bytes)
    return {task.file for task in tasks}, amount


def _text_bytes(table: pa.Table, columns: Sequence[str], rows: np.ndarray | None = None) -> np.ndarray:
    """(rows,) int64: how much text each row has. rows: see `chosen_rows`."""
    import pyarrow.compute as pc

    # Rows that are not chosen may be null.
    lengths = (pc.fill_null(pc.binary_length(table[name]), 0) for name in columns)
    total = sum(each.to_numpy().astype(np.int64) for each in lengths)
    return total if rows is None else total[rows]


def _runs(sizes: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Runs of rows that have so many bytes of text, or a few more."""
    ends = np.cumsum(sizes)
    marks = np.arange(most, ends[-1], most)
    return list(pairwise(np.unique([0, *(np.searchsorted(ends, marks) + 1).tolist(), len(sizes)]).tolist()))


# Which texts


def find_text_column(dataset: datasets.Dataset, wanted: str | None, say: Callable[[str], object]) -> str:
    """The column of texts: the wanted one, or else the only one of strings, which `say` is told.

    Raises ValueError where there is none, or several, or the rows have input_ids."""
    if wanted is not None:
        _strings(dataset, wanted)
        return wanted
    from packing.source.json_rows import about_single_object

    if "input_ids" in dataset.column_names:
        named = Option("text_column", "NAME")
        raise SourceError("rows have input_ids: they are tokenized already", cure=f"name the texts: {named}")
    names = [name for name in dataset.column_names if _holds_strings(dataset, name)]
    if len(names) > 1:
        listed = " and ".join(map(repr, names))
        named = Option("text_column", names[0])
        raise SourceError(f"columns {listed} hold texts", cure=f"name the one that is meant: {named}")
    if not names:
        types = ", ".join(f"{name!r} ({dataset.data.column(name).type})" for name in dataset.column_names)
        cure = f"make one of strings{about_single_object(dataset)}"
        raise SourceError(f"no column holds texts, of {types}", cure=cure)
    say(f"texts are taken from column {names[0]!r}, the only one of strings")
    return names[0]


def check_texts(dataset: datasets.Dataset, text_columns: Sequence[str]) -> None:
    """Raise ValueError for what can be seen to be no texts without a tokenizer."""
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
