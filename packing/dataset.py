"""pack_dataset: tokenized dataset -> packed dataset. Read, plan and assign, write."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import TypedDict, TypeVar, Unpack, overload

import datasets
import pyarrow as pa

from packing.files.errors import in_split
from packing.files.paths import RemotePath, place
from packing.options import ENGINES, PackOptions
from packing.packers.table import Packer
from packing.source.sequences import losses
from packing.store.cluster import Opener
from packing.store.contents import Packing, gather_all, plan_packing
from packing.store.engines import opened_engine, read
from packing.store.writing import check_output, write_packings

logger = logging.getLogger(__name__)

Rows = TypeVar("Rows", datasets.Dataset, datasets.DatasetDict)


class _Keywords(TypedDict, total=False):
    token_columns: Sequence[str] | None
    pad_token_id: int | None
    balance: int | None
    cohort: int | None
    cohort_lanes: int
    num_proc: int
    engine: str
    format: str
    storage_options: dict | None
    progress: bool


@overload
def pack_dataset(
    dataset: Rows,
    max_sequence_length: int = 512,
    max_sequences_per_pack: int | None = None,
    packer: str | Packer = "optimal",
    overlong: str = "error",
    seed: int = 0,
    output: None = None,
    **more: Unpack[_Keywords],
) -> Rows: ...


@overload
def pack_dataset(
    dataset: Rows,
    max_sequence_length: int = 512,
    max_sequences_per_pack: int | None = None,
    packer: str | Packer = "optimal",
    overlong: str = "error",
    seed: int = 0,
    output: str | os.PathLike | None = None,
    **more: Unpack[_Keywords],
) -> Rows | None: ...


def pack_dataset(
    dataset: Rows,
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
    cohort: int | None = None,
    cohort_lanes: int = 8,
    num_proc: int = 1,
    engine: str = "processes",
    format: str = "arrow",
    storage_options: dict | None = None,
    progress: bool = False,
) -> Rows | None:
    """Put the rows of a tokenized dataset together, several to a pack; each sequence stays whole.

    input_ids    label            input_ids        label   sequence_lengths  sequence_indices
    [7 8]        a         ->     [7 8 5 6 4]      [a b]   [2 3]             [0 1]
    [5 6 4]      b                [9 9 9 9 9]      [c]     [5]               [2]
    [9 9 9 9 9]  c

    Columns as long as input_ids in every row are concatenated like it. All others become a list, one value a sequence.
    attention_mask only says where padding is (zeros at the ends of rows, trimmed) and is not stored.

    dataset: a Dataset, or a DatasetDict, each split of which is packed by itself.
    max_sequence_length: token slots in a pack.
    max_sequences_per_pack: None = no limit.
    packer: a name in PACKERS or a callable.
    overlong: what to do with longer rows: "error", "truncate", "split" (adds a column sequence_starts) or "drop".
    seed: decides which of equally long sequences lie together, and the order of packs.
    output: a folder to write, a path or a URL; it must not exist. None keeps the packed dataset in memory.
    token_columns: names of the columns with one value per token, where row lengths alone would mislead.
    pad_token_id: the token to trim at the ends of rows, for a source without attention_mask.
    balance: packs per global batch. Orders the packs so that each batch of so many has nearly equal attention cost, the
        Σ n² of its sequences; packed_info says how nearly. None: every order is equally likely.
    cohort: documents that are packed side by side, for models with memory along a document: needs overlong="split".
        Round 0 packs the first piece of each, round 1 the second of those that have one, and so on; see cohorts.py.
        Adds the columns sequence_cohorts, sequence_rounds and sequence_lanes. None: pieces lie anywhere.
    cohort_lanes: parts of a cohort that are packed apart, a document in one; as many ranks, or a divisor, may train.
    num_proc: processes that write `output`. Any number writes the same bytes.
    engine: who reads the source and writes `output`: "processes" of this machine, or a "ray" cluster.
    format: "arrow", which load_from_disk maps into memory, or "parquet", which is compressed.
    storage_options: of the file system of a URL, beside what the environment says.
    progress: show a bar on stderr.

    Returns the packed dataset; None where opening it would copy it: from a URL, or out of Parquet. load_packed opens
    any of them. The same dataset, options and seed give the same packs on any machine.

    A call that was interrupted resumes: the same call again continues after the last finished shard.

    Raises TypeError or ValueError for a dataset or an option that cannot be packed, before anything is written;
    FileExistsError where the output exists, BlockingIOError where another run writes it, OSError where the disk fails,
    ChildProcessError where a process of the engine dies.
    """
    given = locals()  # all arguments, by name
    options = PackOptions(**{option.name: given[option.name] for option in fields(PackOptions)})
    _check_use(options, output, storage_options)
    packings, splits = {}, dataset if isinstance(dataset, datasets.DatasetDict) else {"": dataset}
    if not splits:
        raise ValueError("the DatasetDict is empty: it has no splits to pack")
    with opened_engine(engine):
        for name, rows in splits.items():
            with in_split(name):
                packings[name] = prepare_packing(rows, options, to_write=output is not None, progress=progress)
        if output is None:
            packed = {name: _in_memory(packing, progress) for name, packing in packings.items()}
            return packed[""] if "" in packed else datasets.DatasetDict(packed)
        write_packings(packings, output, storage_options, progress)
    if format != "arrow" or isinstance(place(output, storage_options), RemotePath):
        return None
    return datasets.load_from_disk(str(place(output)))


def _check_use(options: PackOptions, output: str | os.PathLike | None, storage_options: dict | None) -> None:
    """Raise for an output that cannot be written, or options that would not be used, before the source is read."""
    if output is not None:
        check_output(output, storage_options, one_process=options.one_process)
    elif storage_options or options.format != "arrow":
        raise ValueError("format and storage_options are of an output; give output=, or leave them out")
    if output is None and options.engine != ENGINES[0]:
        raise ValueError(f"engine={options.engine!r} writes a folder; give output=, or leave the engine out")


def prepare_packing(
    rows: datasets.Dataset, options: PackOptions, to_write: bool = False, opener: Opener = None, progress: bool = False
) -> Packing:
    """Read the rows, plan their packs and assign them; what is lost on the way is logged.

    to_write: the packs will be written to a folder, so the source must be hashed; that starts beside the planning.
    opener: gives the same dataset on another machine; picklable. None: machines see its files under the same path.
    Raises TypeError or ValueError for whatever is wrong with the dataset.
    """
    _check_dataset(rows)
    source, hashing = read(rows, options, to_hash=to_write, opener=opener, progress=progress)
    packing = plan_packing(rows, source, options, progress, hashing=hashing, opener=opener)
    for sentence in losses(source, packing.sequences, options):
        logger.warning(sentence)
    return packing


def _check_dataset(dataset: object) -> None:
    if not isinstance(dataset, datasets.Dataset):
        kind = type(dataset).__name__
        raise TypeError(f"pack_dataset needs a datasets.Dataset, got {kind}; make one with Dataset.from_dict")
    if dataset.format["type"] == "custom":
        what = "the dataset has a transform (set_transform, with_transform), which packing does not apply"
        raise ValueError(f"{what}; apply it with dataset.map, or take it off: dataset.with_format(None)")


def _in_memory(packing: Packing, progress: bool) -> datasets.Dataset:
    text = f"{packing.dataset._fingerprint} {packing.facts.to_description()}"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    table = pa.Table.from_batches(gather_all(packing, progress), packing.features.arrow_schema)
    return datasets.Dataset(table, info=packing.info, split=packing.dataset.split, fingerprint=fingerprint)
