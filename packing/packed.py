"""load_packed: what pack_dataset has written, here or at a URL, in Arrow or in Parquet -> packed dataset."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

import datasets
import xxhash

from .local_copy import local_copy
from .manifest import is_finished, read_manifest
from .output import DICT
from .remote import RemotePath, place


def load_packed(
    folder: str | os.PathLike, storage_options: dict | None = None
) -> datasets.Dataset | datasets.DatasetDict:
    """Open a folder of pack_dataset or pack-dataset.

    Arrow here      mapped into memory, as load_from_disk does it
    Parquet         converted once by load_dataset, into its cache (HF_DATASETS_CACHE says where)
    at a URL        copied once into that cache before

    A folder with several splits gives a DatasetDict. storage_options: of a URL's file system.

    Raises FileNotFoundError where there is no packed folder, ValueError where it is not finished.
    """
    folder = place(folder, storage_options)
    if not (folder / DICT).exists():
        return _open(folder)
    return datasets.DatasetDict({name: _open(folder / name) for name in split_names(folder / DICT)})


def split_names(path: Path | RemotePath) -> list[str]:
    """Those that a dataset_dict.json lists, in its order."""
    try:
        return [str(name) for name in json.loads(path.read_bytes())["splits"]]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{str(path)!r} is damaged: it names no splits; take their folders one by one") from None


def _open(folder: Path | RemotePath) -> datasets.Dataset:
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        cure = "give a folder that pack_dataset wrote"
        raise FileNotFoundError(f"{str(folder)!r} holds no manifest.json; {cure}") from None
    if not is_finished(folder):
        raise ValueError(f"the packing in {str(folder)!r} has not finished; run it again to its end")
    path = folder if isinstance(folder, Path) else local_copy(folder.url, folder.storage_options)
    files = [str(path / record.file) for record in manifest.shards]
    content = " ".join(record.xxh3 for record in manifest.shards).encode()
    if not files[0].endswith(".parquet"):
        return datasets.load_from_disk(str(path))
    loaded = datasets.load_dataset(
        "parquet",
        # the library would take a file for unchanged that has another content and the same time of modification
        name=f"packed-{xxhash.xxh3_64_hexdigest(content)}",
        data_files={"train": [glob.escape(file) for file in files]},
        split="train",
    )
    info = datasets.DatasetInfo.from_directory(str(path))
    return datasets.Dataset(loaded.data, info=info, fingerprint=loaded._fingerprint)
