"""pack_dataset: tokenized dataset -> packed dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import overload

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from tqdm.auto import tqdm

from packing.assignment import Assignment, assign
from packing.balance import balance_packs, step_costs
from packing.files.folder import refuse_others
from packing.files.hashed import write_file
from packing.files.paths import RemotePath, place
from packing.files.saved import INFO, STATE
from packing.histogram import length_histogram
from packing.options import ENGINES, PackOptions
from packing.packers.table import Packer, plan_packs
from packing.plan import PackPlan
from packing.source.fingerprint import ColumnPrint, column_prints, in_background, packed_fingerprint
from packing.source.ranges import Reading, join_ranges, row_ranges
from packing.source.rows import INPUT_IDS, Source, check_source, read_source, refuse_foreign_ids
from packing.source.sequences import Sequences, cut_sequences
from packing.source.source_files import SourceChangedError, SourceFiles
from packing.store.cluster import SharedSource, read_on_ray, write_on_ray
from packing.store.dataset_files import ENDINGS, shard_names, state_files
from packing.store.engines import check_engine, opened_engine, write_here, write_in_pool
from packing.store.info import PackedInfo, packed_facts
from packing.store.manifest import FILE, Manifest, differences, read_manifest
from packing.store.shards import (
    PackSlice,
    ShardRecord,
    ShardTask,
    check_parquet,
    gather_packs,
    read_record,
    record_path,
    write_record,
)
from packing.store.writing import check_output, check_room, output_folder, refuse_other_splits

BATCH_TOKENS = 1 << 19  # token slots gathered at a time: memory follows this and not the dataset
BATCH_BYTES = 1 << 27  # or so many bytes, where other columns are wide (images)
ROW_GROUPS = 8  # times as many: a row group of Parquet is read as a whole, and wants to be larger
SHARD_BYTES = 500_000_000  # of a file, more or less; before Parquet makes it smaller
FACTS_BYTES = 1 << 24  # in a Parquet file's head

ABOUT = (INFO, STATE, "LICENSE")  # what state_files makes
ANSWERS = ("start_positions", "end_positions")  # transformers' names of them


@overload
def pack_dataset(
    dataset: datasets.Dataset,
    max_sequence_length: int = 512,
    max_sequences_per_pack: int | None = None,
    packer: str | Packer = "optimal",
    overlong: str = "error",
    seed: int = 0,
    output: None = None,
    *,
    token_columns: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    balance: int | None = None,
    num_proc: int = 1,
    engine: str = "processes",
    format: str = "arrow",
    storage_options: dict | None = None,
    progress: bool = False,
) -> datasets.Dataset: ...
@overload
def pack_dataset(
    dataset: datasets.Dataset,
    max_sequence_length: int = 512,
    max_sequences_per_pack: int | None = None,
    packer: str | Packer = "optimal",
    overlong: str = "error",
    seed: int = 0,
    output: str | os.PathLike = ...,
    *,
    token_columns: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    balance: int | None = None,
    num_proc: int = 1,
    engine: str = "processes",
    format: str = "arrow",
    storage_options: dict | None = None,
    progress: bool = False,
) -> datasets.Dataset | None: ...
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
    num_proc: int = 1,
    engine: str = "processes",
    format: str = "arrow",
    storage_options: dict | None = None,
    progress: bool = False,
) -> datasets.Dataset | None:
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
    output: a folder to write, for load_from_disk; must not exist. A path, or a URL of any file system that fsspec
        knows: "s3://bucket/packed". None: the packed dataset stays in memory.
    token_columns: names of the columns with one value per token, where row lengths alone would mislead.
    pad_token_id: for a source without attention_mask: trim this token at the ends of rows.
    balance: packs per global batch (or per device): order the packs so that each so many of them have nearly equal
        attention cost, Σ n² of their sequences; packed_info says how nearly. For training that reads the packs in their
        stored order. None: every order is equally likely.
    num_proc: processes that write `output`, with the same bytes for any number. Each opens the source's files for
        itself; a source in memory is copied to each.
    engine: who reads the source and writes `output`, with the same bytes: "processes" of this machine, or "ray", the
        CPUs of a cluster, all machines of which see the source's files under the same path, and the output, too, or at
        a URL; see cluster.py.
    format: of the files in `output`. "arrow" is for load_from_disk, which maps them into memory where they lie;
        "parquet" is compressed, for load_dataset("parquet", data_files=…), which converts it, and for other programs.
    storage_options: of the file system of a URL, as datasets' own functions take them. What is in the environment
        (AWS_…, FSSPEC_…, ~/.config/fsspec) need not be said, and is there on every machine of a cluster, too.
    progress: show a bar on stderr.

    Returns the packed dataset; None where opening it would mean to copy it: from a URL, or out of Parquet. load_packed
    opens any of them.

    Every error of the source or the options comes before anything is written. Packing is the same for the same dataset
    and seed, on any machine.

    Written out of core: memory is 12 bytes a sequence, 4 a pack and some buffers (a hundred megabytes of Parquet),
    however many tokens there are; 4 bytes a sequence more for each of: padding trimmed, rows left out or split, rows
    truncated before their last token. Twice that from 2**32 sequences on. (The page cache holds files, too, and gives
    way where memory is wanted.)

    Written so that it can be killed: files come to be in `.OUTPUT.partial` beside the output, shard by shard, and the
    folder gets its name when it is whole. The same call again goes on after the last finished shard, and ends with the
    same bytes; one with other options, or from a source that has changed, is refused. manifest.json says what the
    folder was made from and what its files hold.

    A URL has no names to change at the end: the files come to be in `output` itself, each put whole. The last one is
    state.json, without which load_from_disk refuses (of Parquet: dataset_info.json, without which load_packed and
    verify_packed do, but not load_dataset, which takes what shards there are), and the manifest is complete before it.
    A killed run is gone on with likewise. There is no lock, so start one run at a time: two of one packing put the same
    bytes, but the one that ends later misses its records, and says so; one with other options is refused once the
    manifest of the first is there, and if both began in the same moment, one at least finds the other's shards before
    its end; what the other has finished by then, verify_packed judges.
    """
    options = PackOptions(
        max_sequence_length=max_sequence_length,
        max_sequences_per_pack=max_sequences_per_pack,
        packer=packer,
        overlong=overlong,
        seed=seed,
        token_columns=token_columns,
        pad_token_id=pad_token_id,
        balance=balance,
        num_proc=num_proc,
        engine=engine,
        format=format,
    )
    if output is not None:
        check_output(output, storage_options, one_process=options.one_process)
    elif storage_options or format != "arrow":
        raise ValueError("format and storage_options are of an output; give output=, or leave them out")
    check_engine(engine)
    if engine != ENGINES[0] and output is None:
        raise ValueError(f"engine={engine!r} writes a folder; give output=, or leave the engine out")
    if engine != ENGINES[0] and num_proc != 1:
        raise ValueError(f"num_proc={num_proc} would be ignored: engine={engine!r} takes all CPUs it has; leave it out")
    with opened_engine(engine):
        packing = prepare_packing(dataset, options, to_write=output is not None, progress=progress)
        if output is None:
            return packing.in_memory(progress)
        with output_folder(output, storage_options) as folder:
            refuse_other_splits(folder, [""])
            packing.begin(folder)
            check_room(folder, packing.bytes_missing(folder))
            packing.write(folder, progress)
    if isinstance(folder, RemotePath) or format != "arrow":
        return None
    return datasets.load_from_disk(str(place(output)))


@dataclass(frozen=True, eq=False)
class Packing:
    """A dataset about to be packed: everything is checked and decided, no token is copied."""

    dataset: datasets.Dataset
    source: Source
    sequences: Sequences
    plan: PackPlan
    balanced: Assignment | None  # where the order of packs is balanced
    facts: PackedInfo
    options: PackOptions
    hashing: Future | None  # of source_prints, begun before the plan was made
    files: SourceFiles  # as they were before they were read
    opener: Callable | None = None  # of the dataset, on another machine; None: by its pickle, where files are seen

    @cached_property
    def assignment(self) -> Assignment:
        """Which sequences in which pack: made when the packs are, as the facts do not need it."""
        return self.balanced or assign(self.plan, self.sequences.lengths, self.facts.seed)

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
        # all that load_dataset hands on of what a Parquet file says about itself: see info.py
        said = self.facts.to_description() if self.options.format == "parquet" else None
        features["sequence_lengths"] = datasets.List(datasets.Value("int32", id=said))
        features["sequence_indices"] = datasets.List(datasets.Value("int64"))
        if self.facts.overlong == "split":
            features["sequence_starts"] = datasets.List(datasets.Value("int32"))
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

    @cached_property
    def source_prints(self) -> tuple[ColumnPrint, ...]:
        """The fingerprint of the source; all its values are read once."""
        return column_prints(self.dataset) if self.hashing is None else self.hashing.result()

    @cached_property
    def batch_packs(self) -> int:
        """Packs in a record batch, or a row group. Where they are written, it follows from the source's content."""
        by_tokens = (
            BATCH_TOKENS * (ROW_GROUPS if self.options.format == "parquet" else 1) // self.plan.max_sequence_length
        )
        num_bytes = self.dataset.data.nbytes if self.hashing is None else self.num_bytes
        by_bytes = BATCH_BYTES * self.facts.num_packs // max(1, num_bytes)
        return max(1, min(by_tokens, by_bytes))

    @cached_property
    def num_bytes(self) -> int:
        """Of the packed dataset, but for metadata. Token columns of strings or lists count as if nothing were cut."""
        numbers = [column for column in self.source.columns.token_columns if column.is_numbers]
        names = {column.name for column in numbers}
        others = [p for p in self.source_prints if p.name in self.features and p.name not in names]
        num_bytes = sum(column.value_type.bit_width // 8 for column in numbers) * self.facts.num_tokens
        num_bytes += sum(column.bytes for column in others)
        num_bytes += self.facts.num_sequences * (4 + 8 + 4 * (self.facts.overlong == "split"))
        return num_bytes + 4 * self.facts.num_packs * len(self.features)

    @cached_property
    def shard_bounds(self) -> list[int]:
        """Pack shard_bounds[i] is the first of shard i; follows from the source's content and the parameters alone."""
        shards = min(self.facts.num_packs, -(-self.num_bytes // SHARD_BYTES))
        return [self.facts.num_packs * i // shards for i in range(shards + 1)]

    @property
    def shard_files(self) -> list[str]:
        return shard_names(len(self.shard_bounds) - 1, ENDINGS[self.options.format])

    @cached_property
    def manifest(self) -> Manifest:
        """Before anything is written."""
        facts = self.facts
        return Manifest(
            versions={name: metadata.version(name) for name in ("dataset-packing", "datasets", "pyarrow")},
            source_rows=facts.source_rows,
            source_columns=self.source_prints,
            parameters=self.options.parameters() | {"packer": facts.packer, "token_columns": list(facts.token_columns)},
            plan=_digest(self.plan.strategy_lengths, self.plan.strategy_offsets, self.plan.repeats),
            assignment=_digest(self.assignment.sequence_indices, self.assignment.pack_offsets),
            schema=_digest(self.features.arrow_schema.serialize()),
            packs=facts.num_packs,
            sequences=facts.num_sequences,
            tokens=facts.num_tokens,
            batch_packs=self.batch_packs,
            num_shards=len(self.shard_files),
        )

    def packs(self, first: int, end: int) -> PackSlice:
        """Packs first..end of the assignment."""
        bounds = self.assignment.pack_offsets[first : end + 1]
        chosen = self.assignment.sequence_indices[bounds[0] : bounds[-1]]
        return self.sequences.take(chosen, bounds - bounds[0])

    def tasks(self, folder: Path | RemotePath) -> Iterator[ShardTask]:
        """All shards to write into the folder, made one by one, for any engine."""
        schema, options = self.features.arrow_schema, getattr(folder, "storage_options", None)
        for i, file in enumerate(self.shard_files):
            packs = self.packs(self.shard_bounds[i], self.shard_bounds[i + 1])
            yield ShardTask(str(folder), file, packs, schema, self.batch_packs, options)

    def begin(self, folder: Path | RemotePath) -> None:
        """Make the folder ready to be written to, or to go on with. Changes no shard that is finished.

        Raises ValueError where the folder was begun by a packing that would end with other bytes.
        """
        if isinstance(folder, Path) and os.path.lexists(folder):
            refuse_others(folder)
        folder.mkdir(exist_ok=True)
        found = self._begun(folder) if (folder / FILE).exists() else None
        if isinstance(folder, Path):
            refuse_others(folder, self._own_files)
        _remove_left_off(folder)
        if found is None:
            self.manifest.write(folder)
            return
        for record in found.shards:  # it was killed between its manifest and its name
            write_record(folder / record.file, record)

    @property
    def _own_files(self) -> list[str]:
        """All that lies in the folder, until it is finished and then."""
        records = [record_path(Path(file)).name for file in self.shard_files]
        return [*self.shard_files, *records, FILE, *ABOUT]

    def _begun(self, folder: Path | RemotePath) -> Manifest:
        """The manifest of a folder that this packing may go on with."""
        cure = f"give the options and the source that it was begun with, or remove {str(folder)!r} to begin anew"
        try:
            found = read_manifest(folder)
        except ValueError as error:
            raise ValueError(f"{error}; {cure}") from None
        if other := differences(found, self.manifest):
            raise ValueError(f"a packing that was begun cannot be gone on with: {'; '.join(other)}; {cure}")
        return found

    def bytes_missing(self, folder: Path | RemotePath) -> int:
        """About how many bytes `write` will add to the folder."""
        shards = len(self.shard_files)
        done = sum(read_record(folder / file) is not None for file in self.shard_files)
        return self.num_bytes * (shards - done) // shards

    def write(self, folder: Path | RemotePath, progress: bool = False) -> None:
        """Write the packed dataset into a folder that `begin` has made ready."""
        records: dict[str, ShardRecord] = {}
        with tqdm(total=self.facts.num_packs, desc="packing", unit="pack", disable=not progress) as bar:
            source = self.dataset, self.facts.token_columns
            if self.options.engine == "ray":
                shared = SharedSource.of(self.dataset, self.opener)
                written = write_on_ray(shared, self.facts.token_columns, self.tasks(folder), bar.update)
            elif self.options.num_proc == 1 or len(self.shard_files) == 1:
                written = write_here(self.source.columns, self.tasks(folder), bar.update)
            else:
                workers = min(self.options.num_proc, len(self.shard_files))
                written = write_in_pool(*source, self.tasks(folder), workers, bar.update)
            try:
                with closing(written):
                    for record in written:
                        records[record.file] = record
            except (SourceChangedError, ChildProcessError):  # or of a process that read behind a file's end
                self._refuse_changed_files(folder)  # with the folder that can no longer be resumed
                raise
        self.finish(folder, [records[file] for file in self.shard_files])

    def finish(self, folder: Path | RemotePath, records: list[ShardRecord]) -> None:
        """All shards are written: now the folder becomes a dataset. records: in the order of the shards.

        At a URL the folder has its name already, so that the file without which it is no dataset comes last."""
        self._refuse_changed_files(folder)
        _remove_left_off(folder)  # by workers that died, and whose task another one did
        for record in records:
            if (found := read_record(folder / record.file)) != record:
                what = "is not there" if found is None else "is another one's"
                raise OSError(
                    f"{record.file} was written, and {what} in {str(folder)!r}: all processes that write must see one "
                    "folder there, and no other run may write to it"
                )
        split = None if self.dataset.split is None else str(self.dataset.split)
        fingerprint = packed_fingerprint(self.source_prints, self.facts.to_description())
        files = state_files(self.shard_files, self.info, fingerprint, split)
        if self.options.format == "parquet":
            del files["state.json"]  # load_from_disk would take the shards for Arrow
        *first, last = files
        for file in first:
            write_file(folder / file, files[file])
        checksums = {file: xxhash.xxh3_128_hexdigest(data) for file, data in files.items()}
        self.manifest.finished(records, checksums).write(folder)
        for file in self.shard_files:
            record_path(folder / file).unlink()
        write_file(folder / last, files[last])

    def _refuse_changed_files(self, folder: Path | RemotePath) -> None:
        """Shards would hold some values from before, and some from after."""
        changed = self.files.changed()
        if changed is not None:
            raise ValueError(
                f"{changed!r} of the source was changed while it was packed; remove {str(folder)!r}, and pack it "
                "again once nobody writes to it"
            )

    def in_memory(self, progress: bool = False) -> datasets.Dataset:
        """The packed dataset, in memory as a whole."""
        text = f"{self.dataset._fingerprint} {self.facts.to_description()}"
        fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        table = pa.Table.from_batches(self.batches(progress), self.features.arrow_schema)
        return datasets.Dataset(table, info=self.info, split=self.dataset.split, fingerprint=fingerprint)

    def batches(self, progress: bool = False) -> Iterator[pa.RecordBatch]:
        """The packs, gathered some thousand at a time, each into memory of its own."""
        schema, num_packs = self.features.arrow_schema, self.facts.num_packs
        with tqdm(total=num_packs, desc="packing", unit="pack", disable=not progress) as bar:
            for first in range(0, num_packs, self.batch_packs):
                end = min(first + self.batch_packs, num_packs)
                yield gather_packs(self.source.columns, self.packs(first, end), schema)
                bar.update(end - first)


def prepare_packing(
    dataset: datasets.Dataset,
    options: PackOptions,
    *,
    to_write: bool = False,
    opener: Callable[[], datasets.Dataset] | None = None,
    progress: bool = False,
) -> Packing:
    """Check the dataset and make its plan. Raises whatever pack_dataset can raise about its input.

    to_write: the packs will be written to a folder, so that the source must be hashed; that begins beside the planning.
    opener: gives the same dataset on another machine; picklable. None: machines see its files under the same path.
    """
    _check_dataset(dataset)
    reading, files = Reading(options.token_columns, options.pad_token_id, to_write), SourceFiles.of(dataset)
    if options.engine == "ray":
        source, hashing = _read_on_ray(dataset, opener, reading, progress)
    else:
        source, hashing = _read_here(dataset, reading)
    longest, deepest, balance = options.max_sequence_length, options.max_sequences_per_pack, options.balance
    sequences = cut_sequences(source, longest, options.overlong)
    _refuse_moved_answers(source, sequences, options.overlong)
    plan = plan_packs(length_histogram(sequences.lengths, longest), longest, deepest, options.packer, progress=progress)
    balanced, before, after = None, None, None
    if balance is not None:
        unbalanced = assign(plan, sequences.lengths, options.seed)
        balanced = balance_packs(unbalanced, sequences.lengths, balance, options.seed)
        before, after = (step_costs(a, sequences.lengths, balance) for a in (unbalanced, balanced))
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
        step_costs_before=before,
        step_costs_after=after,
    )
    packing = Packing(dataset, source, sequences, plan, balanced, facts, options, hashing, files, opener)
    if options.format == "parquet":
        check_parquet(packing.features.arrow_schema)
        if len(facts.to_description()) > FACTS_BYTES:
            raise ValueError(
                f"format='parquet' keeps the numbers of rows that were too long in each file, and "
                f"{len(facts.overlong_rows):,} are too many; take format='arrow', or a larger max_sequence_length"
            )
    return packing


def _read_here(dataset, reading: Reading) -> tuple[Source, Future | None]:
    source = read_source(dataset, reading.token_columns, reading.pad_token_id)
    refuse_foreign_ids(source)
    return source, in_background(column_prints, dataset) if reading.to_hash else None


def _read_on_ray(dataset, opener, reading: Reading, progress: bool) -> tuple[Source, Future | None]:
    check_source(dataset)
    with (
        tqdm(total=len(dataset), desc="reading", unit="row", disable=not progress) as bar,
        closing(read_on_ray(SharedSource.of(dataset, opener), reading, row_ranges(dataset), bar.update)) as read,
    ):
        source, prints = join_ranges(dataset, reading, read)
    hashing = None if prints is None else Future()
    if hashing is not None:
        hashing.set_result(prints)
    return source, hashing


def _remove_left_off(folder: Path | RemotePath) -> None:
    for left_off in folder.glob(".*.writing"):
        left_off.unlink()


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
    if dataset.format["type"] == "custom":
        raise ValueError(
            "the dataset has a transform (set_transform, with_transform), which packing would not go through; apply it "
            "with dataset.map, or take it off: dataset.with_format(None)"
        )


def _refuse_moved_answers(source: Source, sequences: Sequences, overlong: str) -> None:
    """Answers of question answering are token numbers of their row: they would point elsewhere once it is cut."""
    answers = [name for name in ANSWERS if name in source.columns.row_columns]
    if not answers:
        return
    if source.skipped is not None:
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


def _digest(*parts) -> str:
    """XXH3 of arrays or bytes."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(memoryview(part).cast("B"))
    return digest.hexdigest()


def _tokens_of(feature):
    """A token-level column keeps the type of its values; rows of any length."""
    return datasets.List(feature[0] if isinstance(feature, list) else feature.feature)
