"""Folders that save_to_disk, or packing, has written: looked at before datasets.load_from_disk follows what they say.

    dataset_dict.json   names of splits, each a folder
    state.json          names of Arrow files, in order          all of them lie in the folder
    dataset_info.json   columns and their types; the packing facts

load_from_disk opens whatever these files name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from packing.files.metadata import parse_json, read_json
from packing.files.names import check_file, checked_name, file_in

if TYPE_CHECKING:
    import datasets

    from packing.files.paths import Place

DICT, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"
NO_VIEW: dict = {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
SPLIT = re.compile(r"\w+(\.\w+)*")  # the pattern of datasets
MOST_CLASSES = 1 << 20  # datasets makes up names for a ClassLabel that has none


def load_saved(folder: str | os.PathLike) -> datasets.Dataset | datasets.DatasetDict:
    """datasets.load_from_disk of a folder of this machine, which opens nothing outside of it.

    Raises ValueError where a name or a link leads out, or a file is damaged."""
    import datasets

    check_saved(Path(folder))
    return datasets.load_from_disk(str(folder))


def check_saved(folder: Path) -> None:
    """Raise ValueError where load_from_disk would follow a name out of the folder, or never finish."""
    if (folder / STATE).exists() and (folder / INFO).exists():  # then load_from_disk looks at no dataset_dict.json
        for name in state_shards(read_state(folder), folder / STATE):
            file_in(folder, name, folder / STATE)
        refuse_many_classes(read_json(file_in(folder, INFO, folder)))
    elif (folder / DICT).exists():
        for name in split_names(folder / DICT):
            check_split(folder, name)
            check_saved(folder / name)


def check_split(folder: Place, name: str) -> None:
    """Raise ValueError where the folder of a split is a link that leads out of the folder of all."""
    if isinstance(folder, Path) and not (split := folder / name).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{str(split)!r} is a link that leads out of {str(folder)!r}; copy the files themselves")


def split_names(path: Place) -> list[str]:
    """Those that a dataset_dict.json lists, in its order."""
    if isinstance(path, Path):
        check_file(path, path.parent)
    content = read_json(path)
    names = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names:
        raise ValueError(f"{str(path)!r} is damaged: it names no splits; take their folders one by one")
    names = [checked_name(name, path) for name in names]
    if len(set(names)) < len(names):
        raise ValueError(f"{str(path)!r} is damaged: it names a split twice")
    return names


def read_state(folder: Place) -> dict:
    """The content of state.json, which may hold anything."""
    state = read_json(file_in(folder, STATE, folder))
    if not isinstance(state, dict):
        raise ValueError(f"{str(folder / STATE)!r} is damaged: it is no object")
    return state


def state_shards(state: dict, path: Place) -> list[str]:
    """The names of the files that it lists. Raises ValueError where these are no names of files in the folder."""
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{str(path)!r} is damaged: it lists no files")
    return [checked_name(entry.get("filename"), path) for entry in entries]


def state_faults(folder: Place, shards: list[str], fingerprint: str) -> list[dict]:
    """How the state of a packed folder differs from what packing wrote: its shards in order, and no view of columns."""
    state, wanted = read_state(folder), {**NO_VIEW, "_fingerprint": fingerprint}
    faults = [
        {"what": f"is not what packing wrote: {name}", "found": state.get(name), "expected": value}
        for name, value in wanted.items()
        if name not in state or state[name] != value or type(state[name]) is not type(value)
    ]
    if unknown := sorted({*state} - {*wanted} - {"_data_files", "_split"}):
        faults.append({"what": f"is not what packing wrote: it has {unknown[0]!r}, which packing does not write"})
    split = state.get("_split")
    if split is not None and not (isinstance(split, str) and SPLIT.fullmatch(split)):
        faults.append({"what": "is not what packing wrote: _split", "found": split})
    try:
        listed = state_shards(state, folder / STATE)
    except ValueError as error:
        return [*faults, {"what": str(error)}]
    if listed != shards:
        wrong = next((a for a, b in zip(listed, shards, strict=False) if a != b), f"{len(listed)} files")
        what = "lists other files than the manifest, or in another order: load_from_disk would read these"
        faults.append({"what": what, "found": wrong, "expected": f"{len(shards)} shards in order"})
    return faults


def read_info(folder: Place) -> datasets.DatasetInfo:
    """What dataset_info.json says. Raises ValueError where datasets could not read it, or not in a moment."""
    import datasets

    path = folder / INFO
    content = read_json(file_in(folder, INFO, folder))
    try:
        refuse_many_classes(content)
        info = datasets.DatasetInfo.from_dict(content)
        if not isinstance(info.features, datasets.Features) or not info.features:
            raise ValueError("it names no columns")
        if not isinstance(info.description, str):
            raise ValueError("its description is no text")
        info.features.arrow_schema  # noqa: B018 raises where a type is none
    except Exception as error:  # a damaged file can make its reader raise anything
        raise ValueError(f"{str(path)!r} is damaged: {_reason(error)}") from None
    return info


def stream_schema(file: Path) -> pa.Schema:
    """Of an Arrow stream in a file. Raises ValueError, which names the file."""
    try:
        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as reader:
            return reader.schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {_reason(error)}; make it again") from None


def schema_features(schema: pa.Schema) -> datasets.Features:
    """The columns that a shard says it has, by datasets' own notes in its head. Raises ValueError for damaged ones."""
    import datasets

    try:
        notes = (schema.metadata or {}).get(b"huggingface")
        if notes is not None:
            refuse_many_classes(parse_json(notes, "what datasets notes in its head"))
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # the same here
        raise ValueError(f"its columns cannot be read: {_reason(error)}") from None


def refuse_many_classes(content: object) -> None:
    """datasets makes a name for each class that has none: a billion would take minutes and all memory."""
    inside = [content]
    while inside:
        value = inside.pop()
        if isinstance(value, dict):
            count = value.get("num_classes")
            if isinstance(count, int | float) and not 0 <= count <= MOST_CLASSES:
                raise ValueError(f"num_classes={count} is no number of classes, at most {MOST_CLASSES:,}")
        if isinstance(value, dict | list):
            inside += value.values() if isinstance(value, dict) else value


def _reason(error: Exception) -> str:
    return " ".join(f"{error}".split())[:200] or type(error).__name__
