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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import xxhash

from .fingerprint import ColumnPrint
from .folder import write_file
from .remote import RemotePath, place
from .shards import ShardRecord

FORMAT = "dataset-packing manifest 1"
FILE = "manifest.json"


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

    @property
    def is_complete(self) -> bool:
        """Whether all shards are written."""
        return len(self.shards) == self.num_shards

    def finished(self, shards, files: dict[str, str]) -> Manifest:
        return replace(self, shards=tuple(shards), files=files)

    def write(self, folder: Path | RemotePath) -> None:
        """All at once: there is never half a manifest."""
        content = {"format": FORMAT, **asdict(self)}
        content["checksum"] = _digest(content)
        write_file(folder / FILE, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: str | Path | RemotePath) -> Manifest:
    """Read folder/manifest.json. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    path = place(folder) / FILE
    try:
        content = json.loads(path.read_bytes())
        found, checksum = content.pop("format"), content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{str(path)!r} is damaged: it is no manifest of a packed dataset") from None
    if found != FORMAT:
        raise ValueError(f"{str(path)!r} has format {found!r}, this version reads {FORMAT!r}; pack the source again")
    if checksum != _digest({"format": found, **content}):
        raise ValueError(f"{str(path)!r} is damaged: its content is not what its checksum says")
    content["source_columns"] = tuple(ColumnPrint(**column) for column in content["source_columns"])
    content["shards"] = tuple(ShardRecord(**shard) for shard in content["shards"])
    return Manifest(**content)


def is_finished(folder: Path | RemotePath) -> bool:
    """Whether a packing that was begun in this folder has put its last file."""
    manifest = read_manifest(folder)
    return manifest.is_complete and all((folder / file).exists() for file in manifest.files)


def differences(found: Manifest, wanted: Manifest) -> list[str]:
    """Why a packing begun under `found` cannot be continued under `wanted`; empty: it can."""
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


def _digest(content: dict) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
