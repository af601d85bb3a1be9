"""Documents of token ids -> a `datasets` folder of sequences, built by several processes."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from bert_pretrain.objective import NO_PAIR, OBJECTIVES
from bert_pretrain.prepare.sequences import BuiltSequence, sequences_of
from bert_pretrain.prepare.tokens import TokenDocuments, open_tokens
from packing.files.errors import Option, OptionError
from packing.files.processes import Workers
from packing.files.progress import progress_bar
from packing.histogram import offsets_of
from packing.store.dataset_files import write_batches, write_dataset

COUNTS = b"counts"
TOKENS_PER_TASK = 1 << 18
"""A task is documents of so many tokens, for any number of processes."""


class BuildOptions(NamedTuple):
    """What sequences are built with; see `sequences_of`."""

    objective: str
    cls_token_id: int
    sep_token_id: int
    max_sequence_length: int
    short_sequence_probability: float
    seed: int

    def sequences(self, documents: TokenDocuments, numbers: range) -> Iterator[BuiltSequence]:
        return sequences_of(documents=documents, numbers=numbers, **self._asdict())


class Counts(NamedTuple):
    """What is counted while sequences are built; see `SplitSummary`."""

    sequences: int = 0
    tokens: int = 0
    tokens_dropped: int = 0
    pairs: int = 0
    ones: int = 0


def build_sequences(
    tokens: Path,
    options: BuildOptions,
    vocabulary: str,
    parts: Path,
    output: Path,
    split: str,
    workers: Workers,
    progress: bool,
) -> Counts:
    """Write the sequences of `write_tokens`' documents to a folder that `load_from_disk` reads.

    parts: a folder for what the tasks give; what it has already is not made again.
    vocabulary: the tokenizer's fingerprint, kept in the dataset's info; training compares it.
    progress: show a bar on stderr.
    Raises ValueError for options that do not fit the documents, and where they give no pair.
    """
    from datasets import DatasetInfo, Features

    documents = open_tokens(tokens)
    options.sequences(documents, range(0))  # refuses wrong options before a folder is made
    counts, digest = Counts(), hashlib.blake2b(digest_size=8)

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal counts
        tasks = [BuildTask(numbers, parts / f"{i:06}.arrow") for i, numbers in enumerate(_runs(documents))]
        are_made = [task.file.exists() for task in tasks]
        with progress_bar(
            desc=f"building {split}", unit=" documents", total=len(documents), disable=not progress
        ) as bar:
            missing = [task for task, is_made in zip(tasks, are_made, strict=True) if not is_made]
            made = workers.map(partial(_build, tokens, options), missing)
            for task, is_made in zip(tasks, are_made, strict=True):
                if not is_made:
                    next(made)
                batch, of_batch = _load(task.file)
                counts = Counts(*map(sum, zip(counts, of_batch, strict=True)))
                for array in batch.columns:
                    for buffer in filter(None, array.buffers()):
                        digest.update(buffer)
                bar.update(len(task.numbers))
                yield batch

    parts.mkdir(exist_ok=True)
    shutil.rmtree(output, ignore_errors=True)  # a killed run was writing it
    output.mkdir()
    info = DatasetInfo(features=Features.from_arrow_schema(_schema(options.objective)), config_name=vocabulary)
    # The fingerprint comes from the content: datasets keeps the results of map() under it.
    write_dataset(output, batches(), info, digest.hexdigest, split)
    if OBJECTIVES[options.objective].column is not None and not counts.pairs:
        raise OptionError(
            f"{Option('objective', options.objective)} needs documents of two sentences or more, and all "
            f"{len(documents)} have one; take whole files for documents ({Option('documents', 'file')}), or choose "
            f"{Option('objective', 'none')}"
        )
    return counts


class BuildTask(NamedTuple):
    """The sequences of these documents -> a file."""

    numbers: range
    file: Path


def _runs(documents: TokenDocuments) -> list[range]:
    """Runs of documents of TOKENS_PER_TASK tokens, or a few more."""
    ends = documents.sentence_offsets[documents.document_offsets[1:]]
    marks = np.arange(TOKENS_PER_TASK, documents.num_tokens, TOKENS_PER_TASK)
    bounds = np.unique([0, *(np.searchsorted(ends, marks) + 1).tolist(), len(documents)]).tolist()
    return [range(start, end) for start, end in pairwise(bounds)]


def _build(tokens: Path, options: BuildOptions, task: BuildTask) -> None:
    built = list(options.sequences(open_tokens(tokens), task.numbers))
    labels = [sequence.label for sequence in built if sequence.label not in (None, NO_PAIR)]
    counts = Counts(
        sequences=len(built),
        tokens=sum(len(sequence.input_ids) for sequence in built),
        tokens_dropped=sum(sequence.tokens_dropped for sequence in built),
        pairs=len(labels),
        ones=sum(labels),
    )
    batch = _record_batch(built, options.objective)
    write_batches(task.file, batch.schema.with_metadata({COUNTS: json.dumps(counts)}), [batch])


def _load(file: Path) -> tuple[pa.RecordBatch, Counts]:
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as reader:
        return reader.read_next_batch(), Counts(*json.loads(reader.schema.metadata[COUNTS]))


def _schema(objective: str) -> pa.Schema:
    columns = {"input_ids": pa.list_(pa.int32()), "token_type_ids": pa.list_(pa.int8())}
    if (column := OBJECTIVES[objective].column) is not None:
        columns[column] = pa.int64()
    return pa.schema(columns)


def _record_batch(sequences: list[BuiltSequence], objective: str) -> pa.RecordBatch:
    """One list array per token column, of whole buffers: no Python object per token."""
    offsets = pa.array(offsets_of([len(sequence.input_ids) for sequence in sequences]).astype(np.int32))

    def lists(column: Callable[[BuiltSequence], np.ndarray]) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([column(sequence) for sequence in sequences])))

    columns = [lists(lambda sequence: sequence.input_ids), lists(lambda sequence: sequence.token_type_ids)]
    if OBJECTIVES[objective].column is not None:
        columns.append(pa.array([sequence.label for sequence in sequences], pa.int64()))
    return pa.RecordBatch.from_arrays(columns, schema=_schema(objective))
