"""Proof that a packed dataset holds what was packed: each sequence once, in packs within their limits, unchanged."""

from __future__ import annotations

import os

import datasets

from packing.files.errors import path_suggestion
from packing.files.paths import Place, RemotePath, place
from packing.files.saved import DICT
from packing.store.info import PackedInfo
from packing.store.manifest import Manifest
from packing.verify.files import checked_facts, dataset_blocks, folder_blocks, num_bytes_of, open_folder
from packing.verify.findings import CHECKS, Findings, Verification
from packing.verify.packs import PackCheck
from packing.verify.source import source_check


def verify_packed(
    packed: str | os.PathLike | RemotePath | datasets.Dataset,
    source: datasets.Dataset | None = None,
    *,
    pad_token_id: int | None = None,
    limit: int = 20,
    storage_options: dict | None = None,
) -> Verification:
    """Look for everything that is wrong with a packed dataset. print() of the result lists it; .ok means nothing is.

    packed    sequence_indices [0 1]    input_ids [7 8 5 6 9]    source    row 0 [7 8]    row 1 [5 6 4]
    ->        pack 0, sequence 1, position 4, source row 1, column input_ids: … 9 found, 4 expected

    packed: a folder of pack_dataset, Arrow or Parquet, a path or a URL: files are compared with their checksums, and
        the others are still read where one is damaged. Or an open dataset, whose files are not looked at.
    source: the dataset that was packed, to compare every value. None: check that limits hold, that lengths add up in
        every column, and that every source row is there once (for the last piece of a split row, source is needed).
    pad_token_id: as given to pack_dataset; a folder's manifest has its own.
    limit: problems listed of each check; all are counted.
    storage_options: for the file system of a URL.

    Memory: a bit for each source row and 40 bytes for each piece of a row that was split; with `source`, 4 bytes a row
    for its length and 4 each where there is padding or rows are cut.

    Raises FileNotFoundError, TypeError or ValueError only for arguments that are no packed dataset.
    """
    findings = Findings(limit)
    looked_at = dict.fromkeys(CHECKS, "nothing")
    looked_at["source"] = "not given" if source is None else "nothing"
    if isinstance(packed, datasets.Dataset):
        looked_at["files"] = "not looked at: give the folder"
        # nbytes would follow offsets that nobody has checked yet
        facts = checked_facts(packed.info, packed.data.table.get_total_buffer_size(), findings)
        if facts is None:
            raise ValueError(f"{findings.problems[0].what}; give a dataset of pack_dataset")
        features, blocks = packed.features, dataset_blocks(packed, facts, findings)
    else:
        folder = open_folder(_checked_folder(packed, storage_options), findings)
        info, looked_at["files"] = folder.info, folder.looked_at
        facts = None if info is None else checked_facts(info, num_bytes_of(folder), findings)
        if info is None or facts is None:
            return Verification(looked_at, findings.counts, tuple(findings.problems))
        features, blocks = info.features, folder_blocks(folder, facts, findings)
        if folder.manifest is not None:
            pad_token_id = folder.manifest.parameters.get("pad_token_id")
            _check_manifest(folder.manifest, facts, findings)

    packs = PackCheck(facts, features, findings)
    looked_at["columns"] = f"{len(features)} columns"
    if packs.can_be_read:
        against = None if source is None else source_check(source, facts, features, pad_token_id, findings)
        if against is not None:
            looked_at["source"] = against.looked_at
        elif source is not None:
            looked_at["source"] = "nothing: it cannot be read as the packs' source"
        for block in blocks:
            sequences = packs.check(block)
            if sequences is not None and against is not None:
                against.check(sequences)
        packs.finish(against.source if against is not None and against.has_all_rows else None)
        looked_at["packs"] = f"{packs.packs:,} packs, {packs.tokens:,} tokens"
        looked_at["sequences"] = f"{packs.sequences:,} sequences of {facts.source_rows:,} source rows"
    return Verification(looked_at, findings.counts, tuple(findings.problems))


def _checked_folder(packed: object, storage_options: dict | None) -> Place:
    if not isinstance(packed, str | os.PathLike | RemotePath):
        raise TypeError(f"packed must be a folder or a datasets.Dataset, not {type(packed).__name__}")
    path = place(packed, storage_options)
    if not path.is_dir():
        near = path_suggestion(path, only_folders=True)
        raise FileNotFoundError(f"{str(path)!r} is not a folder; give one that pack_dataset wrote{near}")
    if (path / DICT).exists():
        raise ValueError(
            f"{str(path)!r} holds several splits; verify one of their folders, or all by pack-dataset verify"
        )
    if not any((path / name).exists() for name in ("manifest.json", "dataset_info.json", "state.json")):
        raise FileNotFoundError(f"{str(path)!r} holds no dataset; give a folder that pack_dataset wrote")
    return path


def _check_manifest(manifest: Manifest, facts: PackedInfo, findings: Findings) -> None:
    """Check that the packing's facts agree with the manifest."""
    wanted = {f"num_{name}": getattr(manifest, name) for name in ("packs", "sequences", "tokens")}
    wanted["source_rows"] = manifest.source_rows
    wanted |= {name: value for name, value in manifest.parameters.items() if hasattr(facts, name)}
    for name, expected in wanted.items():
        found = getattr(facts, name)
        if (list(found) if isinstance(found, tuple) else found) != expected:
            what = f"{name} in dataset_info.json, and in the manifest"
            findings.add("files", what, file="dataset_info.json", found=found, expected=expected)
