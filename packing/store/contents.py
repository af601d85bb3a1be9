"""What a packed dataset will hold: all of it is checked and decided here, and no token is copied.

dataset + Source -> plan_packing -> Packing        sequences, plan, assignment, columns, shards
                    Packing      -> gather_all     the packs themselves, batch by batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from packing.assignment import Assignment, assign
from packing.balance import balance_packs, step_costs
from packing.cohorts import CohortPlan, cut_cohorts, plan_cohorts
from packing.files.errors import Option, OptionError
from packing.files.progress import progress_bar
from packing.histogram import length_histogram
from packing.options import PackOptions
from packing.packers.table import plan_packs
from packing.plan import PackPlan, table
from packing.source.fingerprint import ColumnPrint, column_prints
from packing.source.rows import INPUT_IDS, Source
from packing.source.sequences import PackSlice, Sequences, cut_sequences, refuse_moved_answers
from packing.store.cluster import Opener
from packing.store.dataset_files import ENDINGS, SHARD_BYTES, shard_names
from packing.store.info import CELL, PackedInfo, packed_facts
from packing.store.shards import check_parquet, gather_packs

BATCH_TOKENS = 1 << 19  # token slots gathered at a time: memory follows this and not the dataset
BATCH_BYTES = 1 << 27  # or so many bytes, where other columns are wide (images)
ROW_GROUPS = 8  # times as many: a row group of Parquet is read as a whole, so it is larger
FACTS_BYTES = 1 << 24  # the most in a Parquet file's head
# DatasetInfo says these about the files of the source
SIZES = "download_size", "post_processing_size", "dataset_size", "size_in_bytes"
OF_SOURCE_FILES = "supervised_keys", "splits", "download_checksums", *SIZES


@dataclass(frozen=True, eq=False)
class Packing:
    """One packing, decided.

    balanced: the assignment, where the order of packs is balanced; else it is made when it is asked for.
    cohorts: the plan of their cells, all of which `plan` holds; None: there are no cohorts.
    hashing: waits for the fingerprint of the source; None: nobody has started to make it.
    opener: opens the dataset on another machine; None: its pickle does, where files are seen.
    """

    dataset: datasets.Dataset
    source: Source
    sequences: Sequences
    plan: PackPlan
    balanced: Assignment | None
    facts: PackedInfo
    options: PackOptions
    cohorts: CohortPlan | None = None
    hashing: Callable[[], tuple[ColumnPrint, ...]] | None = None
    opener: Opener = None

    @property
    def assignment(self) -> Assignment:
        """Which sequences lie in which pack."""
        return self._assigned[0]

    @cached_property
    def _assigned(self) -> tuple[Assignment, np.ndarray | None]:
        """The assignment; (packs, 3) cohort, round and lane of each pack, or None."""
        lengths, seed = self.sequences.lengths, self.facts.seed
        if self.cohorts is not None:
            return self.cohorts.assign(lengths, seed)
        return self.balanced or assign(self.plan, lengths, seed), None

    def packs(self, first: int, end: int) -> PackSlice:
        """Packs first..end of the assignment."""
        assignment, places = self._assigned
        bounds = assignment.pack_offsets[first : end + 1]
        chosen = assignment.sequence_indices[bounds[0] : bounds[-1]]
        return self.sequences.take(chosen, bounds - bounds[0], None if places is None else places[first:end])

    @property
    def table(self) -> str:
        """The plan as people read it."""
        return table([*self.plan.rows(), *(() if self.cohorts is None else self.cohorts.rows())])

    @property
    def features(self) -> datasets.Features:
        """Columns of the packed dataset: input_ids first, then as in the source, then what packing adds."""
        source, features = self.dataset.features, {INPUT_IDS: _tokens_of(self.dataset.features[INPUT_IDS])}
        columns = self.source.columns
        for name in columns.table.column_names:
            if name in self.facts.token_columns:
                features[name] = _tokens_of(source[name])
            elif name in columns.row_columns:
                features[name] = datasets.List(source[name])
        # load_dataset passes on nothing else of what a Parquet file says about itself: see info.py
        description = self.facts.to_description() if self.options.format == "parquet" else None
        features["sequence_lengths"] = datasets.List(datasets.Value("int32", id=description))
        features["sequence_indices"] = datasets.List(datasets.Value("int64"))
        if self.facts.overlong == "split":
            features["sequence_starts"] = datasets.List(datasets.Value("int32"))
        if self.cohorts is not None:
            features |= {name: datasets.List(datasets.Value("int32")) for name in CELL}
        return datasets.Features(features)

    @property
    def info(self) -> datasets.DatasetInfo:
        """The source's info (license, citation), with the facts of the packing for a description."""
        info = self.dataset.info.copy()
        info.description, info.features = self.facts.to_description(), self.features
        for name in OF_SOURCE_FILES:
            setattr(info, name, None)
        return info

    @cached_property
    def source_prints(self) -> tuple[ColumnPrint, ...]:
        """The fingerprint of the source, for which all its values are read once."""
        return column_prints(self.dataset) if self.hashing is None else self.hashing()

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the packed dataset, but for metadata. Strings or lists for tokens count as if nothing were cut."""
        numbers = [column for column in self.source.columns.token_columns if column.is_numbers]
        names = {column.name for column in numbers}
        others = [p for p in self.source_prints if p.name in self.features and p.name not in names]
        num_bytes = sum(column.value_type.bit_width // 8 for column in numbers) * self.plan.num_tokens
        num_bytes += sum(column.bytes for column in others)
        numbers_of_4_bytes = 1 + (self.facts.overlong == "split") + (self.cohorts is not None) * len(CELL)
        num_bytes += self.plan.num_sequences * (8 + 4 * numbers_of_4_bytes)
        return num_bytes + 4 * self.plan.num_packs * len(self.features)

    @cached_property
    def batch_packs(self) -> int:
        """Packs in a record batch, or a row group. Where they are written, it follows from the source's content."""
        batch_tokens = BATCH_TOKENS * (ROW_GROUPS if self.options.format == "parquet" else 1)
        num_bytes = self.dataset.data.nbytes if self.hashing is None else self.num_bytes
        by_bytes = BATCH_BYTES * self.plan.num_packs // max(1, num_bytes)
        return max(1, min(batch_tokens // self.plan.max_sequence_length, by_bytes))

    @cached_property
    def shard_bounds(self) -> list[int]:
        """Pack shard_bounds[i] is the first of shard i; follows from the source's content and the options alone."""
        shards = min(self.plan.num_packs, -(-self.num_bytes // SHARD_BYTES))
        return [self.plan.num_packs * i // shards for i in range(shards + 1)]

    @property
    def shard_files(self) -> list[str]:
        """The names of the shards, in order."""
        return shard_names(len(self.shard_bounds) - 1, ENDINGS[self.options.format])


def plan_packing(
    dataset: datasets.Dataset, source: Source, options: PackOptions, progress: bool = False, **more: Any
) -> Packing:
    """Cut the source's rows, plan their packs, and assign them where options.balance asks for an order.

    more: fields of Packing. Raises ValueError for rows that are too long, answers that would move, and what a plan or a
    format cannot hold.
    """
    longest, deepest = options.max_sequence_length, options.max_sequences_per_pack
    sequences = cut_sequences(source, longest, options.overlong)
    refuse_moved_answers(source, sequences, options.overlong)
    balanced, cohorts = None, None
    costs: dict[str, Any] = {}
    if options.cohort is not None:
        cut = cut_cohorts(sequences.pieces, options.cohort, options.cohort_lanes, options.seed)
        cohorts = plan_cohorts(cut, sequences.lengths, longest, deepest, options.packer, progress)
        plan = cohorts.plan
        costs |= {"cohort_lanes": options.cohort_lanes, "plain_packs": cohorts.plain.num_packs}
    else:
        histogram = length_histogram(sequences.lengths, longest)
        plan = plan_packs(histogram, longest, deepest, options.packer, progress=progress)
    if options.balance is not None:
        unbalanced = assign(plan, sequences.lengths, options.seed)
        balanced = balance_packs(unbalanced, sequences.lengths, options.balance, options.seed)
        costs["step_costs_before"] = step_costs(unbalanced, sequences.lengths, options.balance)
        costs["step_costs_after"] = step_costs(balanced, sequences.lengths, options.balance)
    facts = packed_facts(
        options,
        packer=plan.packer,
        token_columns=tuple(column.name for column in source.columns.token_columns),
        max_depth=plan.max_depth,
        source_rows=source.num_rows,
        num_sequences=plan.num_sequences,
        num_packs=plan.num_packs,
        num_tokens=plan.num_tokens,
        overlong_rows=tuple(sequences.overlong_rows.tolist()),
        overlong_tokens=sequences.overlong_tokens,
        trimmed_rows=source.trimmed_rows,
        trimmed_tokens=source.trimmed_tokens,
        **costs,
    )
    packing = Packing(dataset, source, sequences, plan, balanced, facts, options, cohorts, **more)
    if options.format == "parquet":
        _check_parquet(packing)
    return packing


def _check_parquet(packing: Packing) -> None:
    check_parquet(packing.features.arrow_schema)
    if len(packing.facts.to_description()) > FACTS_BYTES:
        what = f"{Option('format', 'parquet')} keeps the numbers of rows that were too long in each file"
        cure = f"take {Option('format', 'arrow')}, or a larger {Option('max_sequence_length')}"
        raise OptionError(f"{what}, and {len(packing.facts.overlong_rows):,} are too many; {cure}")


def gather_all(packing: Packing, progress: bool = False) -> Iterator[pa.RecordBatch]:
    """The packs, gathered some thousand at a time, each into memory of its own."""
    schema, num_packs = packing.features.arrow_schema, packing.plan.num_packs
    with progress_bar(total=num_packs, desc="packing", unit="pack", disable=not progress) as bar:
        for first in range(0, num_packs, packing.batch_packs):
            end = min(first + packing.batch_packs, num_packs)
            yield gather_packs(packing.source.columns, packing.packs(first, end), schema)
            bar.update(end - first)


def _tokens_of(feature: Any) -> datasets.List:
    """A token-level column keeps the type of its values; rows of any length."""
    return datasets.List(feature[0] if isinstance(feature, list) else feature.feature)
