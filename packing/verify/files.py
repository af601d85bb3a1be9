"""The files of a packed folder against its manifest, and the packs in them, however damaged they are.

    manifest.json       has the size and XXH3 of every other file
    data-…arrow         or .parquet: read batch by batch; after a damaged file comes the next one
    dataset_info.json   the packing's facts; without them nothing can judge the packs

Arrow's reader checks a file's frame but not its offsets, and a wrong one leads out of the file's memory. So every batch
is validated in full before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa

from packing.files.hashed import checksum
from packing.files.names import file_in
from packing.files.paths import Place, RemotePath
from packing.files.saved import INFO, STATE, read_info, read_state, state_faults, state_shards
from packing.source.fingerprint import packed_fingerprint
from packing.store.info import PackedInfo, packed_info
from packing.store.manifest import FILE, Manifest, read_manifest
from packing.verify.findings import Findings

BLOCK_TOKENS = 1 << 20  # token slots in a block, which bounds memory
PARQUET_PACKS = 1 << 10  # packs read together
ROWS_AT_LEAST, ROWS_PER_BYTE = 1 << 24, 8  # more rows than these are not believed: they cost work and memory
CACHES = "cache-*.arrow"  # datasets adds them to a folder after map or shuffle; nobody reads them as packs


@dataclass(frozen=True, eq=False)
class PackedFolder:
    """A folder as it was found. shards: the files of packs in order. info: None where it is damaged.

    packs: number of packs in each shard by the manifest; empty without one. looked_at: the files, in words.
    """

    path: Place
    manifest: Manifest | None
    shards: list[str]
    packs: list[int]
    info: datasets.DatasetInfo | None
    looked_at: str


@dataclass(frozen=True, eq=False)
class Block:
    """Some packs. first: the number of the first one. file: the name of their file, or None."""

    first: int
    batch: pa.RecordBatch
    file: str | None = None


def open_folder(path: Place, findings: Findings) -> PackedFolder:
    """Check the files of a packed folder, and read those that tell how to read the packs."""
    manifest = _read_manifest(path, findings)
    records = () if manifest is None else manifest.shards
    wanted: dict[str, tuple[int | None, str]] = {record.file: (record.bytes, record.xxh3) for record in records}
    wanted |= {name: (None, xxh3) for name, xxh3 in manifest.files.items()} if manifest is not None else {}
    sizes = {name: _checked_size(path, name, *wanted[name], findings) for name in sorted(wanted)}
    as_written = {name: size for name, size in sizes.items() if size is not None}
    if manifest is not None and manifest.is_complete:
        caches = {file.name for file in path.glob(CACHES)}
        for name in sorted(_present(path) - wanted.keys() - {FILE} - caches):
            findings.add("files", "does not belong here: the manifest has no such file; remove it", file=name)
    looked_at = f"{len(as_written):,} of {len(wanted):,} files as written, {sum(as_written.values()):,} bytes"
    if manifest is None:
        looked_at = "no manifest to check them against"
    shards = [record.file for record in records] or _listed_shards(path, findings)
    info = None
    if INFO in as_written or INFO not in wanted:
        with findings.reading(INFO):
            info = read_info(path)
    if manifest is not None and STATE in as_written and info is not None:
        fingerprint = packed_fingerprint(manifest.source_columns, info.description)
        with findings.reading(STATE):  # load_from_disk follows it, and not the manifest
            for fault in state_faults(path, shards, fingerprint):
                findings.add("files", **fault, file=STATE)
    return PackedFolder(path, manifest, shards, [record.packs for record in records], info, looked_at)


def _present(path: Place) -> set[str]:
    """Names of everything in the folder except folders."""
    if isinstance(path, RemotePath):
        return {file.relative_to(path) for file in path.rglob("*")}
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_symlink() or not file.is_dir()}


def checked_facts(info: datasets.DatasetInfo, num_bytes: int, findings: Findings) -> PackedInfo | None:
    """The packing's facts, where they can be read and this many bytes can hold the rows."""
    try:
        facts = packed_info(SimpleNamespace(info=info))
        if facts.buffer_size is not None or facts.source_rows is None:
            raise ValueError("they describe a stream, whose rows nobody has counted")
        if facts.source_rows > max(ROWS_AT_LEAST, ROWS_PER_BYTE * num_bytes):
            raise ValueError(f"source_rows={facts.source_rows:,} are more than {num_bytes:,} bytes can hold")
    except ValueError as error:
        findings.add("files", f"the packing's facts cannot be read: {error}", file=INFO)
        return None
    return facts


def num_bytes_of(folder: PackedFolder) -> int:
    """Bytes of the shards that are there."""
    return sum((folder.path / name).stat().st_size for name in folder.shards if _is_readable(folder.path, name))


def _is_readable(path: Place, name: str) -> bool:
    """Whether the file is there, and in the folder; open_folder has added a problem where it is not."""
    try:
        return file_in(path, name, FILE).exists()
    except (ValueError, OSError):
        return False


def folder_blocks(folder: PackedFolder, facts: PackedInfo, findings: Findings) -> Iterator[Block]:
    """All packs that can be read. The manifest's counts keep the numbers of packs after a damaged file right."""
    first = 0
    for number, name in enumerate(folder.shards):
        read = 0
        if _is_readable(folder.path, name):
            for batch in _readable_batches(folder.path / name, findings):
                yield from _pieces(batch, first + read, name, facts)
                read += batch.num_rows
        expected = folder.packs[number] if folder.packs else read
        if read != expected:
            findings.add("files", "packs in it", file=name, found=read, expected=expected)
        first += expected


def dataset_blocks(dataset: datasets.Dataset, facts: PackedInfo, findings: Findings) -> Iterator[Block]:
    """The packs of an open dataset, in its order."""
    is_chosen = dataset._indices is not None
    if is_chosen and not _is_sound(dataset.data.table, 0, findings):  # Arrow would follow any offset to pick rows
        return
    rows = dataset.with_format("arrow")
    step = max(1, BLOCK_TOKENS // max(1, facts.max_sequence_length))
    for first in range(0, len(dataset), step):
        count = min(step, len(dataset) - first)
        table = rows[first : first + count] if is_chosen else dataset.data.table.slice(first, count)
        if is_chosen or _is_sound(table, first, findings):
            for batch in table.combine_chunks().to_batches():
                yield Block(first, batch)


def _is_sound(table: pa.Table, first: int, findings: Findings) -> bool:
    try:
        table.validate(full=True)
    except pa.ArrowException as error:
        what = f"this pack and the next {len(table) - 1} cannot be read: {error}"
        findings.add("packs", what, pack=first)
        return False
    return True


def _read_manifest(path: Place, findings: Findings) -> Manifest | None:
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        what = "is missing, so no file can be compared with its checksum; pack the source again"
        findings.add("files", what, file=FILE)
        return None
    except (ValueError, OSError) as error:
        findings.add("files", str(error), file=FILE)
        return None
    if not manifest.is_complete:
        findings.add("files", "the packing has not finished; run it again to its end", file=FILE)
    return manifest


def _checked_size(folder: Place, name: str, size: int | None, xxh3: str, findings: Findings) -> int | None:
    """The bytes of a file, or None and a finding where it is not what was written. size: None is any size."""
    what = "is not what was written"
    with findings.reading(name):
        file = file_in(folder, name, FILE)
        found = file.stat().st_size
        if size is not None and found != size:
            findings.add("files", what, file=name, found=f"{found:,} bytes", expected=f"{size:,} bytes")
        elif (digest := checksum(file)) != xxh3:
            findings.add("files", f"{what}: its XXH3", file=name, found=digest, expected=xxh3)
        else:
            return found
    return None


def _listed_shards(path: Place, findings: Findings) -> list[str]:
    """Without a manifest: the Parquet files, or the files that state.json names."""
    if parquet := sorted(file.name for file in path.glob("data-*.parquet")):
        return parquet
    shards = None
    with findings.reading(STATE):
        shards = state_shards(read_state(path), path / STATE)
    if shards is None:
        return sorted(file.name for file in path.glob("data-*.arrow"))
    for name in shards:
        with findings.reading(name):
            if not file_in(path, name, STATE).exists():  # a URL has none
                raise FileNotFoundError
    return shards


def _readable_batches(file: Place, findings: Findings) -> Iterator[pa.RecordBatch]:
    """The batches before the first damaged one."""
    try:
        with _batches(file) as batches:
            for batch in batches:
                _ = batch.schema.names  # raises where a name is no text
                batch.validate(full=True)
                yield batch
    except Exception as error:  # a damaged file can make its reader raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        findings.add("files", f"cannot be read further: {reason[:200]}", file=file.name)


@contextmanager
def _batches(file: Place) -> Iterator[Iterator[pa.RecordBatch]]:
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
