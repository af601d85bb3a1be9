"""load_packed: what pack_dataset has written, here or at a URL, in Arrow or in Parquet -> packed dataset."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import datasets
import pyarrow as pa
import xxhash

from packing.files.errors import path_suggestion
from packing.files.hashed import checksum
from packing.files.local_copy import local_copy
from packing.files.names import file_in
from packing.files.paths import Place, place
from packing.files.saved import (
    DICT,
    INFO,
    STATE,
    check_split,
    read_info,
    schema_features,
    split_names,
    state_faults,
    stream_schema,
)
from packing.source.fingerprint import packed_fingerprint
from packing.source.token_column import refuse_broken
from packing.store.dataset_files import ARROW
from packing.store.info import packed_info
from packing.store.manifest import FILE, Manifest, is_finished, read_manifest


def load_packed(
    folder: str | os.PathLike, storage_options: dict | None = None
) -> datasets.Dataset | datasets.DatasetDict:
    """Open a folder of pack_dataset or pack-dataset.

    Arrow here      mapped into memory, as load_from_disk does it
    Parquet         converted once by load_dataset, into its cache (HF_DATASETS_CACHE says where)
    at a URL        copied once into that cache before

    A folder with several splits gives a DatasetDict. storage_options: of a URL's file system.

    What is opened is what the manifest lists, and lies in the folder. Names, sizes and offsets are checked, and that
    all packs are there. verify_packed reads every byte.

    Raises FileNotFoundError where there is no packed folder, ValueError where it is not finished or damaged.
    """
    root = place(folder, storage_options)
    if not (root / DICT).exists():
        return _open(root)
    names = split_names(root / DICT)
    for name in names:
        check_split(root, name)
    return datasets.DatasetDict({name: _open(root / name) for name in names})


def _open(folder: Place) -> datasets.Dataset:
    _refuse_unfinished(folder)
    path = folder if isinstance(folder, Path) else local_copy(folder.url, folder.storage_options)
    manifest = read_manifest(path)
    files = [_checked_file(path, record.file, record.bytes) for record in manifest.shards]
    for name, xxh3 in manifest.files.items():
        if checksum(_checked_file(path, name)) != xxh3:
            raise ValueError(f"{str(path / name)!r} is damaged: it is not what packing wrote; pack the source again")
    info = read_info(path)
    is_arrow = files[0].suffix == ARROW
    dataset = _load_arrow(path, manifest, files, info) if is_arrow else _load_parquet(manifest, files, info)
    if len(dataset) != (packs := manifest.packs):
        raise ValueError(f"{str(path)!r} holds {len(dataset):,} packs, and {packs:,} were made; pack the source again")
    packed_info(dataset)  # raises where the facts cannot be true
    for name in dataset.column_names:
        refuse_broken(name, dataset.data.column(name))
    return dataset


def _refuse_unfinished(folder: Place) -> None:
    try:
        finished = is_finished(folder)
    except FileNotFoundError:
        cure = f"give a folder that pack_dataset wrote{path_suggestion(folder, only_folders=True)}"
        raise FileNotFoundError(f"{str(folder)!r} holds no manifest.json; {cure}") from None
    if not finished:
        raise ValueError(f"the packing in {str(folder)!r} has not finished; run it again to its end")


def _checked_file(folder: Path, name: str, size: int | None = None) -> Path:
    """A file that the manifest lists, in the folder and of the size that it says."""
    try:
        file_in(folder, name, folder / FILE)
    except FileNotFoundError:
        raise ValueError(f"{str(folder / name)!r} is missing; pack the source again") from None
    file = folder / name
    if size is not None and (found := file.stat().st_size) != size:
        raise ValueError(f"{str(file)!r} has {found:,} bytes, and {size:,} were written; pack the source again")
    return file


def _load_arrow(path: Path, manifest: Manifest, files: list[Path], info: datasets.DatasetInfo) -> datasets.Dataset:
    """load_from_disk, which reads state.json and not the manifest: both must say the same."""
    shards = [record.file for record in manifest.shards]
    fingerprint = packed_fingerprint(manifest.source_columns, info.description)
    for fault in state_faults(path, shards, fingerprint):
        values = f": {fault['found']!r} found, {fault.get('expected')!r} expected" if "found" in fault else ""
        raise ValueError(f"{str(path / STATE)!r} {fault['what']}{values}; pack the source again")
    for file in files:
        if schema_features(stream_schema(file)) != info.features:
            raise ValueError(f"{str(file)!r} has other columns than {INFO} says; pack the source again")
    try:
        return datasets.load_from_disk(str(path))
    except pa.ArrowException as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}; pack the source again") from None


def _load_parquet(manifest: Manifest, files: list[Path], info: datasets.DatasetInfo) -> datasets.Dataset:
    content = " ".join(record.xxh3 for record in manifest.shards).encode()
    loaded = datasets.load_dataset(
        "parquet",
        # the library would take a file for unchanged that has another content and the same time of modification
        name=f"packed-{xxhash.xxh3_64_hexdigest(content)}",
        data_files={"train": [glob.escape(str(file)) for file in files]},
        split="train",
    )
    return datasets.Dataset(loaded.data, info=info, fingerprint=loaded._fingerprint)
