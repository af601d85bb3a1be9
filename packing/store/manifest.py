"""The manifest of a packed dataset: what it was made from, how, and what its files must hold.

    manifest.json
    format, versions            of this package, datasets and pyarrow, which all shape the files' bytes
    source                      rows, and for each column its type, bytes and XXH3: see fingerprint.py
    parameters                  all of the packing that decide a byte
    plan, assignment, schema    XXH3 of each
    packs, sequences, tokens    how many; batch_packs: packs in each record batch of a shard, the last one's rest
    shards                      file, packs, sequences, tokens, bytes, xxh3 of each: empty until all are written
    files                       XXH3 of dataset_info.json and state.json (Parquet has none)
    checksum                    XXH3 of the manifest itself without this line

There are no times and no paths in it, so that the same packing makes the same manifest anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import PurePath
from typing import Any

import xxhash

from packing.files.hashed import write_file
from packing.files.metadata import build, read_json
from packing.files.names import checked_name, file_in
from packing.files.paths import Place, place
from packing.files.saved import INFO, STATE
from packing.source.fingerprint import ColumnPrint
from packing.store.contents import Packing
from packing.store.dataset_files import ARROW, PARQUET
from packing.store.shards import ShardRecord

FORMAT = "dataset-packing manifest 1"
FILE = "manifest.json"
MOST = 2**62  # the largest count of anything: sums fit into 64 bits


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """See the top of the file."""

    versions: dict[str, str]
    source_rows: int
    source_columns: tuple[ColumnPrint, ...]
    parameters: dict
    plan: str
    assignment: str
    schema: str
    packs: int
    sequences: int
    tokens: int
    batch_packs: int
    num_shards: int
    shards: tuple[ShardRecord, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, packing: Packing) -> Manifest:
        """That of a packing, before anything is written."""
        facts, plan, assignment = packing.facts, packing.plan, packing.assignment
        resolved = {"packer": facts.packer, "token_columns": list(facts.token_columns)}
        return cls(
            versions={name: metadata.version(name) for name in ("dataset-packing", "datasets", "pyarrow")},
            source_rows=packing.source.num_rows,
            source_columns=packing.source_prints,
            parameters=packing.options.parameters() | resolved,
            plan=_digest(plan.strategy_lengths, plan.strategy_offsets, plan.repeats),
            assignment=_digest(assignment.sequence_indices, assignment.pack_offsets),
            schema=_digest(packing.features.arrow_schema.serialize()),
            packs=plan.num_packs,
            sequences=plan.num_sequences,
            tokens=plan.num_tokens,
            batch_packs=packing.batch_packs,
            num_shards=len(packing.shard_files),
        )

    @property
    def is_complete(self) -> bool:
        """Whether all shards are written."""
        return len(self.shards) == self.num_shards

    def finished(self, shards: Iterable[ShardRecord], files: dict[str, str]) -> Manifest:
        """The manifest of the whole folder. files: XXH3 of each other file."""
        return replace(self, shards=tuple(shards), files=files)

    def write(self, folder: Place) -> None:
        """All at once: there is never half a manifest."""
        content = {"format": FORMAT, **asdict(self)}
        content["checksum"] = _checksum(content)
        write_file(folder / FILE, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: str | Place) -> Manifest:
    """Read folder/manifest.json. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    path = place(folder) / FILE
    content = read_json(file_in(place(folder), FILE, FILE))
    if not isinstance(content, dict) or not {"format", "checksum"} <= set(content):
        raise ValueError(f"{str(path)!r} is damaged: it is no manifest of a packed dataset")
    found, checksum = content.pop("format"), content.pop("checksum")
    if found != FORMAT:
        raise ValueError(f"{str(path)!r} has format {found!r}, this version reads {FORMAT!r}; pack the source again")
    if checksum != _checksum({"format": found, **content}):
        raise ValueError(f"{str(path)!r} is damaged: its content is not what its checksum says")
    manifest = build(Manifest, content, f"{str(path)!r} is damaged: it")
    for fault in _faults(manifest, path):
        raise ValueError(f"{str(path)!r} is damaged: {fault}")
    return manifest


def _faults(manifest: Manifest, path: Place) -> Iterator[str]:
    """Names or numbers of files that cannot be true: anybody can write a matching checksum."""
    shards = manifest.shards
    names = [checked_name(name, path) for name in (FILE, *(record.file for record in shards), *manifest.files)]
    if len({name.casefold() for name in names}) < len(names):
        yield "it names a file twice"
    if not manifest.num_shards or not manifest.batch_packs:
        yield "it says that there is no shard, or no pack in a batch"
    pad = manifest.parameters.get("pad_token_id")
    if pad is not None and type(pad) is not int:
        yield f"its pad_token_id is {pad!r}"
    if not shards:  # they are not written yet
        return
    if len(shards) != manifest.num_shards:
        yield f"it lists {len(shards)} shards, and says num_shards={manifest.num_shards}"
    for name in ("packs", "sequences", "tokens"):
        total, said = sum(getattr(record, name) for record in shards), getattr(manifest, name)
        if total != said or said > MOST:
            yield f"its shards have {total:,} {name}, and it says {said:,}"
    endings = {PurePath(record.file).suffix for record in shards}
    if endings not in ({ARROW}, {PARQUET}):
        yield f"it lists shards that end in {', '.join(sorted(endings))}"
    for name in (INFO, STATE) if endings == {ARROW} else (INFO,):
        if name not in manifest.files:
            yield f"it does not list {name}"


def is_finished(folder: Place) -> bool:
    """Whether a packing has put its last file into this folder."""
    manifest = read_manifest(folder)
    return manifest.is_complete and all((folder / name).exists() for name in manifest.files)


def differences(found: Manifest, wanted: Manifest) -> list[str]:
    """Why `wanted` cannot resume a packing that `found` started; empty: it can."""
    said = []
    for kind in ("versions", "parameters"):
        before, now = getattr(found, kind), getattr(wanted, kind)
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                said.append(f"{name} was {before.get(name)!r} and is {now.get(name)!r}")
    said += _source_differences(found, wanted)
    if not said:
        for name in ("schema", "plan", "assignment", "batch_packs", "num_shards"):
            if getattr(found, name) != getattr(wanted, name):
                said.append(f"the {name} is another")
    return said


def _source_differences(found: Manifest, wanted: Manifest) -> list[str]:
    if found.source_rows != wanted.source_rows:
        return [f"the source had {found.source_rows:,} rows and has {wanted.source_rows:,}"]
    before, now = ({c.name: c for c in manifest.source_columns} for manifest in (found, wanted))
    if list(before) != list(now):
        return [f"the source had the columns {', '.join(before)} and has {', '.join(now)}"]
    return [f"the source's column {name!r} has changed" for name in now if before[name] != now[name]]


def _checksum(content: dict) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(*parts: Any) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(memoryview(part).cast("B"))
    return digest.hexdigest()
