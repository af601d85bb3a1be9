"""The files of a packed folder against its manifest, and what is in them, however damaged they are.

    manifest.json       says bytes and XXH3 of every other file
    data-…arrow         or .parquet: read batch by batch; one that breaks off is named, and the next one is read then
    dataset_info.json   the packing's facts: where these are not what was written, the packs cannot be judged

Arrow's reader checks a file's frame but not what offsets point to: every batch is validated in full before it is used,
since a wrong offset would lead out of the file's memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa

from .findings import Findings
from .folder import checksum
from .info import PackedInfo, packed_info
from .manifest import FILE, Manifest, read_manifest
from .remote import RemotePath

BLOCK_TOKENS = 1 << 20  # token slots looked at together: memory follows this and not the dataset
PARQUET_PACKS = 1 << 10  # read together
CACHES = "cache-*.arrow"  # what datasets puts into a folder after map or shuffle; nobody reads it as packs


@dataclass(frozen=True, eq=False)
class PackedFolder:
    """A folder as it was found. shards: the files of packs in order. info: None where it is damaged.

    packs: of each shard by the manifest; empty without one."""

    path: Path | RemotePath
    manifest: Manifest | None
    shards: list[str]
    packs: list[int]
    info: datasets.DatasetInfo | None
    looked_at: str


@dataclass(frozen=True, eq=False)
class Block:
    """Some packs. first: the number of the first one. file: where they lie, or None."""

    first: int
    batch: pa.RecordBatch
    file: str | None = None


def open_folder(path: Path | RemotePath, findings: Findings) -> PackedFolder:
    """Check the files of a packed folder, and read what says how to read the rest."""
    manifest = _read_manifest(path, findings)
    records = () if manifest is None else manifest.shards
    wanted = {record.file: record.xxh3 for record in records}
    wanted |= {} if manifest is None else manifest.files
    sizes = {record.file: record.bytes for record in records}
    present = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
    changed, num_bytes = set(), 0
    for name in sorted(wanted):
        if name not in present:
            findings.add("files", "is missing; pack the source again", file=name)
            changed.add(name)
        elif fault := _fault(path / name, sizes.get(name), wanted[name]):
            findings.add("files", **fault, file=name)
            changed.add(name)
        else:
            num_bytes += (path / name).stat().st_size
    if manifest is not None and manifest.is_complete:
        caches = {file.name for file in path.glob(CACHES)}
        for name in sorted(present - set(wanted) - {FILE} - caches):
            findings.add("files", "does not belong here: the manifest has no such file; remove it", file=name)
    looked_at = f"{len(wanted) - len(changed):,} of {len(wanted):,} files as written, {num_bytes:,} bytes"
    if manifest is None:
        looked_at = "no manifest to check them against"
    shards = [record.file for record in records] or _listed_shards(path, findings)
    info = None if "dataset_info.json" in changed else _read_info(path, findings)
    return PackedFolder(path, manifest, shards, [record.packs for record in records], info, looked_at)


def read_facts(info: datasets.DatasetInfo, findings: Findings) -> PackedInfo | None:
    """The packing's facts, where they can be read and can be true."""
    try:
        facts = packed_info(SimpleNamespace(info=info))
        if facts.buffer_size is not None:
            raise ValueError("they are a stream's, whose rows nobody has counted")
        for name in ("max_sequence_length", "max_depth", "source_rows", "num_sequences", "num_packs", "num_tokens"):
            if type(value := getattr(facts, name)) is not int or value < 0:
                raise ValueError(f"{name}={value!r} is no number of anything")
    except (ValueError, TypeError, KeyError) as error:
        findings.add("files", f"the packing's facts cannot be read: {error}", file="dataset_info.json")
        return None
    return facts


def folder_blocks(folder: PackedFolder, facts: PackedInfo, findings: Findings) -> Iterator[Block]:
    """All packs that can be read. Packs after a damaged file keep their numbers, where the manifest knows them."""
    first = 0
    for number, name in enumerate(folder.shards):
        read = 0
        if (folder.path / name).exists():  # else it has been named already
            for batch in _readable_batches(folder.path / name, findings):
                yield from _pieces(batch, first + read, name, facts)
                read += batch.num_rows
        expected = folder.packs[number] if folder.packs else read
        if read != expected:
            findings.add("files", "packs in it", file=name, found=read, expected=expected)
        first += expected


def dataset_blocks(dataset: datasets.Dataset, facts: PackedInfo, findings: Findings) -> Iterator[Block]:
    """The packs of a dataset that is open, in its order."""
    rows = dataset.with_format("arrow")
    step = max(1, BLOCK_TOKENS // max(1, facts.max_sequence_length))
    for first in range(0, len(dataset), step):
        table = rows[first : min(first + step, len(dataset))]
        try:
            table.validate(full=True)
        except pa.ArrowException as error:
            findings.add("packs", f"this pack and the next {len(table) - 1} cannot be read: {error}", pack=first)
            continue
        for batch in table.combine_chunks().to_batches():
            yield Block(first, batch)


def _read_manifest(path: Path | RemotePath, findings: Findings) -> Manifest | None:
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        what = "is missing, so that no file can be held against its checksum; pack the source again"
        findings.add("files", what, file=FILE)
        return None
    except (ValueError, TypeError) as error:
        findings.add("files", str(error), file=FILE)
        return None
    if not manifest.is_complete:
        findings.add("files", "the packing has not finished; run it again to its end", file=FILE)
    return manifest


def _fault(file: Path | RemotePath, size: int | None, xxh3: str) -> dict | None:
    try:
        if size is not None and file.stat().st_size != size:
            found = f"{file.stat().st_size:,} bytes"
            return {"what": "is not what was written", "found": found, "expected": f"{size:,} bytes"}
        if (found := checksum(file)) != xxh3:
            return {"what": "is not what was written: its XXH3", "found": found, "expected": xxh3}
    except OSError as error:
        return {"what": f"cannot be read: {error}"}
    return None


def _listed_shards(path: Path | RemotePath, findings: Findings) -> list[str]:
    """The files that state.json names, where there is no manifest; Parquet has no state.json."""
    if parquet := sorted(file.name for file in path.glob("data-*.parquet")):
        return parquet
    try:
        state = json.loads((path / "state.json").read_bytes())
        shards = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        findings.add("files", f"cannot be read: {error!r}", file="state.json")
        return sorted(file.name for file in path.glob("data-*.arrow"))
    for name in shards:
        if not (path / name).exists():
            findings.add("files", "is missing; pack the source again", file=name)
    return shards


def _read_info(path: Path | RemotePath, findings: Findings) -> datasets.DatasetInfo | None:
    try:
        info = datasets.DatasetInfo.from_directory(str(path), storage_options=getattr(path, "storage_options", None))
        if not isinstance(info.features, datasets.Features):
            raise ValueError("it names no columns")
    except Exception as error:  # whatever a damaged file leads its reader to
        findings.add("files", f"cannot be read: {error!r}", file="dataset_info.json")
        return None
    return info


def _readable_batches(file: Path | RemotePath, findings: Findings) -> Iterator[pa.RecordBatch]:
    """Up to the first one that is damaged."""
    try:
        with _batches(file) as batches:
            for batch in batches:
                batch.validate(full=True)
                yield batch
    except (pa.ArrowException, OSError, ValueError, MemoryError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        findings.add("files", f"cannot be read further: {reason[:200]}", file=file.name)


@contextmanager
def _batches(file: Path | RemotePath) -> Iterator[Iterator[pa.RecordBatch]]:
    with pa.memory_map(str(file)) if isinstance(file, Path) else pa.PythonFile(file.open(), "r") as opened:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(opened) as parquet:
                yield parquet.iter_batches(PARQUET_PACKS)
        else:
            with pa.ipc.open_stream(opened) as reader:
                yield iter(reader)


def _pieces(batch: pa.RecordBatch, first: int, name: str, facts: PackedInfo) -> Iterator[Block]:
    step = max(1, BLOCK_TOKENS // max(1, facts.max_sequence_length))
    for begin in range(0, batch.num_rows, step):
        yield Block(first + begin, batch.slice(begin, step), name)
