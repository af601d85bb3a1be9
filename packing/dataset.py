"""pack_dataset: tokenized dataset -> packed dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from .arrow import list_array, take_rows
from .assignment import Assignment, assign, checked_seed
from .balance import balance_packs, checked_packs_per_step, step_costs
from .folder import check_target, new_folder, write_dataset
from .histogram import length_histogram
from .info import PackedInfo
from .overlong import OVERLONG, Sequences, cut_sequences
from .packers import Packer, checked_limit, find_packer, plan_packs
from .plan import PackPlan
from .source import INPUT_IDS, Source, read_source

BATCH_TOKENS = 1 << 21  # token slots gathered at a time: memory follows this and not the dataset

ANSWERS = ("start_positions", "end_positions")  # transformers' names of them


def pack_dataset(
    dataset: datasets.Dataset,
    max_sequence_length: int = 512,
    max_sequences_per_pack: int | None = None,
    packer: str | Packer = "optimal",
    overlong: str = "error",
    seed: int = 0,
    output: str | os.PathLike | None = None,
    *,
    token_columns: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    balance: int | None = None,
    progress: bool = False,
) -> datasets.Dataset:
    """Put the rows of a tokenized dataset together, several to a pack; each sequence stays whole.

    input_ids    label            input_ids        label   sequence_lengths  sequence_indices
    [7 8]        a         ->     [7 8 5 6 4]      [a b]   [2 3]             [0 1]
    [5 6 4]      b                [9 9 9 9 9]      [c]     [5]               [2]
    [9 9 9 9 9]  c

    Columns as long as input_ids in every row are concatenated like it; all others become a list, one value a sequence.
    attention_mask only says where padding is (zeros at the ends of rows, trimmed) and is not stored.

    max_sequence_length: token slots in a pack.
    max_sequences_per_pack: None = no limit.
    packer: a name in PACKERS or a callable.
    overlong: what to do with longer rows: "error", "truncate", "split" (adds a column sequence_starts) or "drop".
    seed: which of equally long sequences lie together, and the order of packs.
    output: a folder to write, for load_from_disk; must not exist. None: the packed dataset stays in memory.
    token_columns: names of the columns with one value per token, where row lengths alone would mislead.
    pad_token_id: for a source without attention_mask: trim this token at the ends of rows.
    balance: packs per global batch (or per device): order the packs so that each so many of them have nearly equal
        attention cost, Σ n² of their sequences; packed_info says how nearly. For training that reads the packs in their
        stored order. None: every order is equally likely.
    progress: show a bar on stderr.

    Every error comes before anything is written. Packing is the same for the same dataset and seed, on any machine.
    """
    if output is not None:
        check_target(output)
    packing = prepare_packing(
        dataset,
        max_sequence_length,
        max_sequences_per_pack,
        packer,
        overlong,
        seed,
        token_columns=token_columns,
        pad_token_id=pad_token_id,
        balance=balance,
        progress=progress,
    )
    if output is None:
        return packing.in_memory(progress)
    with new_folder(output) as folder:
        packing.write(folder, progress)
    return datasets.load_from_disk(str(output))


@dataclass(frozen=True, eq=False)
class Packing:
    """A dataset about to be packed: everything is checked and decided, no token is copied."""

    dataset: datasets.Dataset
    source: Source
    sequences: Sequences
    plan: PackPlan
    assignment: Assignment | None  # None: not needed to know the facts, and made when the packs are
    facts: PackedInfo

    @property
    def features(self) -> datasets.Features:
        """Columns of the packed dataset: input_ids first, then as in the source, then what packing adds."""
        source, features = self.dataset.features, {INPUT_IDS: _tokens_of(self.dataset.features[INPUT_IDS])}
        for name in self.source.table.column_names:
            if name in self.facts.token_columns:
                features[name] = _tokens_of(source[name])
            elif name in self.source.row_columns:
                features[name] = _list_of(source[name])
        features["sequence_lengths"] = _list_of(datasets.Value("int32"))
        features["sequence_indices"] = _list_of(datasets.Value("int64"))
        if self.facts.overlong == "split":
            features["sequence_starts"] = _list_of(datasets.Value("int32"))
        return datasets.Features(features)

    @property
    def info(self) -> datasets.DatasetInfo:
        """The source's info (license, citation), with the facts of the packing for a description."""
        info = self.dataset.info.copy()
        info.description, info.features = self.facts.to_description(), self.features
        for about_the_source_files in (
            "supervised_keys",
            "splits",
            "download_checksums",
            "download_size",
            "post_processing_size",
            "dataset_size",
            "size_in_bytes",
        ):
            setattr(info, about_the_source_files, None)
        return info

    @property
    def fingerprint(self) -> str:
        text = f"{self.dataset._fingerprint} {self.facts.to_description()}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def write(self, folder: Path, progress: bool = False) -> None:
        """Write the packed dataset into an existing, empty folder."""
        split = None if self.dataset.split is None else str(self.dataset.split)
        write_dataset(folder, self.batches(progress), self.info, self.fingerprint, split)

    def in_memory(self, progress: bool = False) -> datasets.Dataset:
        table = pa.Table.from_batches(self.batches(progress), self.features.arrow_schema)
        return datasets.Dataset(table, info=self.info, split=self.dataset.split, fingerprint=self.fingerprint)

    def batches(self, progress: bool = False) -> Iterator[pa.RecordBatch]:
        """The packs, gathered some thousand at a time."""
        schema = self.features.arrow_schema
        assignment = self.assignment or assign(self.plan, self.sequences.lengths, self.facts.seed)
        step = max(1, BATCH_TOKENS // self.plan.max_sequence_length)
        with tqdm(total=assignment.num_packs, desc="packing", unit="pack", disable=not progress) as bar:
            for first in range(0, assignment.num_packs, step):
                end = min(first + step, assignment.num_packs)
                yield _gather_packs(self.source, self.sequences, assignment, first, end, schema)
                bar.update(end - first)


def prepare_packing(
    dataset: datasets.Dataset,
    max_sequence_length: int = 512,
    max_sequences_per_pack: int | None = None,
    packer: str | Packer = "optimal",
    overlong: str = "error",
    seed: int = 0,
    *,
    token_columns: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    balance: int | None = None,
    progress: bool = False,
) -> Packing:
    """Check the dataset and make its plan. Raises whatever pack_dataset can raise about its input."""
    _check_dataset(dataset)
    _check_options(max_sequence_length, max_sequences_per_pack, packer, overlong, seed, balance)
    source = read_source(dataset, token_columns, pad_token_id)
    sequences = cut_sequences(source, max_sequence_length, overlong)
    _refuse_moved_answers(source, sequences, overlong)
    histogram = length_histogram(sequences.lengths, max_sequence_length)
    plan = plan_packs(histogram, max_sequence_length, max_sequences_per_pack, packer, progress=progress)
    assignment, before, after = None, None, None
    if balance is not None:
        unbalanced = assign(plan, sequences.lengths, seed)
        assignment = balance_packs(unbalanced, sequences.lengths, balance, seed)
        before, after = (step_costs(a, sequences.lengths, balance) for a in (unbalanced, assignment))
    facts = PackedInfo(
        max_sequence_length=plan.max_sequence_length,
        max_sequences_per_pack=None if max_sequences_per_pack is None else int(max_sequences_per_pack),
        max_depth=plan.max_depth,
        token_columns=tuple(column.name for column in source.token_columns),
        packer=plan.packer,
        seed=int(seed),
        source_rows=source.num_rows,
        num_sequences=plan.num_sequences,
        num_packs=plan.num_packs,
        num_tokens=plan.num_tokens,
        overlong=overlong,
        overlong_rows=tuple(sequences.overlong_rows.tolist()),
        overlong_tokens=sequences.overlong_tokens,
        trimmed_rows=int(np.count_nonzero(source.trimmed)),
        trimmed_tokens=int(source.trimmed.sum()),
        balance=None if balance is None else int(balance),
        step_costs_before=before,
        step_costs_after=after,
    )
    return Packing(dataset, source, sequences, plan, assignment, facts)


def _check_dataset(dataset) -> None:
    if isinstance(dataset, datasets.DatasetDict):
        raise TypeError(
            f"a DatasetDict with splits {', '.join(map(str, dataset))} was given; pack split by split: "
            "pack_dataset(dataset['train']) (the command pack-dataset takes all of them)"
        )
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"pack_dataset needs a datasets.Dataset, got {type(dataset).__name__}; make one with Dataset.from_dict"
        )


def _refuse_moved_answers(source: Source, sequences: Sequences, overlong: str) -> None:
    """Answers of question answering are token numbers of their row: they would point elsewhere once it is cut."""
    answers = [name for name in ANSWERS if name in source.row_columns]
    if not answers:
        return
    if source.skipped.any():
        row = int(np.argmax(source.skipped > 0))
        raise ValueError(
            f"column {answers[0]!r} counts tokens of its row, but row {row} begins with {source.skipped[row]} tokens "
            "of padding, which packing trims; tokenize without padding, or with padding_side='right'"
        )
    if len(sequences.overlong_rows) and overlong in ("truncate", "split"):
        raise ValueError(
            f"column {answers[0]!r} counts tokens of its row, but row {sequences.overlong_rows[0]} would be cut by "
            f"overlong={overlong!r}; let the tokenizer cut it (truncation, stride), or say overlong='drop'"
        )


def _check_options(max_sequence_length, max_sequences_per_pack, packer, overlong, seed, balance) -> None:
    """Before the source is read, which can take a while."""
    find_packer(packer)
    checked_limit("max_sequence_length", max_sequence_length)
    checked_limit("max_sequences_per_pack", max_sequences_per_pack)
    checked_seed(seed)
    if balance is not None:
        checked_packs_per_step(balance)
    if overlong not in OVERLONG:
        raise ValueError(f"unknown overlong={overlong!r}; choose from {', '.join(OVERLONG)}")


def _gather_packs(
    source: Source, sequences: Sequences, assignment: Assignment, first: int, end: int, schema: pa.Schema
) -> pa.RecordBatch:
    """Packs first..end of the assignment as one record batch."""
    bounds = assignment.pack_offsets[first : end + 1]
    chosen = assignment.sequence_indices[bounds[0] : bounds[-1]]
    rows, lengths = sequences.rows[chosen], sequences.lengths[chosen]
    begins, lasts = sequences.begins[chosen], sequences.lasts[chosen]
    per_pack = bounds - bounds[0]
    token_offsets = np.concatenate([[0], np.cumsum(lengths)])[per_pack]

    packed = {
        "sequence_lengths": (per_pack, pa.array(lengths.astype(np.int32))),
        "sequence_indices": (per_pack, pa.array(rows)),
        "sequence_starts": (per_pack, pa.array(begins.astype(np.int32))),
    }
    for column in source.token_columns:
        starts = column.starts[rows]
        packed[column.name] = token_offsets, column.gather(starts + begins, lengths, starts + lasts)
    table_rows = rows if source.rows is None else source.rows[rows]
    for name in source.row_columns:
        packed[name] = per_pack, take_rows(source.table.column(name), table_rows)
    return pa.record_batch([list_array(*packed[field.name], field.type) for field in schema], schema)


def _tokens_of(feature):
    """A token-level column keeps the type of its values; rows of any length."""
    return _list_of(feature[0] if isinstance(feature, list) else feature.feature)


def _list_of(feature):
    # datasets before 4.0 has no List, and takes a Python list for one.
    return datasets.List(feature) if hasattr(datasets, "List") else [feature]
