"""Folders of checkpoints, each complete or not there: written aside, listed with hashes, renamed when all is on disk.

    output/_unfinished/checkpoint-8/…                  all ranks write here
    output/_unfinished/checkpoint-8/manifest.json      last: {"files": {"optimizer.pt": {"bytes": …, "xxh3_128": …}, …},
                                                              "xxh3_128": …}     the last of these is that of "files"
    output/checkpoint-8/…                              one rename

A process that dies leaves at most an _unfinished folder, which nobody takes for a checkpoint. Before training resumes,
the manifest finds what a disk or a copy has damaged since.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers.trainer import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from packing.files.hashed import checksum, sync
from packing.files.metadata import read_json
from packing.files.names import checked_path, file_in

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RUN_FILE = "run.json"
"""The configuration of a run, in each of its checkpoints."""
UNFINISHED_CHECKPOINTS = "_unfinished"
"""Where ranks write checkpoints and delete old ones. Uploads to the hub leave out what begins with an underscore."""


class DamagedCheckpoint(ValueError):
    """A checkpoint that differs from what was written: which file, and what differs."""


def check_checkpoint(folder: str | os.PathLike) -> None:
    """Raise DamagedCheckpoint unless every file is there as it was written."""
    folder = Path(folder)
    expected = _read_manifest(folder)
    for name, (num_bytes, digest) in expected.items():
        try:
            path = file_in(folder, name, folder / MANIFEST)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} is missing") from None
        except ValueError as error:  # a pipe, or a link that leads out
            raise DamagedCheckpoint(f"{folder} is damaged: {error}") from None
        size = path.stat().st_size
        if size != num_bytes:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} has {size} bytes, {num_bytes} were written")
        if checksum(path) != digest:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} has other contents than were written")
    for name in expected:
        if name.endswith(".index.json"):
            _check_index(folder, name, set(expected))


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """{name: (bytes, hash)}"""
    file = folder / MANIFEST
    try:
        manifest: Any = read_json(file)
        files = manifest["files"]
        expected = {checked_path(name, file): (entry["bytes"], entry["xxh3_128"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder} has no {MANIFEST}: it is incomplete, or another program wrote it") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {MANIFEST} cannot be read ({error})") from None
    if manifest != {"files": files} and manifest != with_own_hash(files):  # the first: written before there was one
        raise DamagedCheckpoint(
            f"{folder} is damaged: {MANIFEST} itself has other contents than were written; the files may be whole"
        )
    return expected


def _check_index(folder: Path, name: str, written: set[str]) -> None:
    """transformers opens whatever file an index of weights names: each must be in the manifest."""
    content = read_json(folder / name)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise DamagedCheckpoint(f"{folder} is damaged: {name} is no index of weights")
    if other := sorted({(Path(name).parent / part).as_posix() for part in parts.values()} - written):
        raise DamagedCheckpoint(f"{folder} is damaged: {name} names {other[0]!r}, which is not among its files")


def last_checkpoint(run_folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint of a run, or None; raises DamagedCheckpoint, with the cure, where that one is damaged."""
    found = newest_first(run_folder)
    if not found:
        return None
    try:
        check_checkpoint(found[0])
    except DamagedCheckpoint as damage:
        complete = next((folder.name for folder in found[1:] if _is_complete(folder)), None)
        instead = "start again" if complete is None else f"resume from {complete}"
        raise DamagedCheckpoint(f"{damage}; delete the folder to {instead}") from None
    return found[0]


def newest_first(run_folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, complete or not, from the highest step to the lowest."""
    folder = Path(run_folder)
    paths = folder.iterdir() if folder.is_dir() else ()
    numbered = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in paths]
    steps = [(int(match[1]), path) for match, path in numbered if match and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def what_is_saved(run_folder: str | os.PathLike | None) -> str:
    """ "the last checkpoint is run/checkpoint-8", for the error of a run that ends."""
    saved = newest_first(run_folder or ".")
    return f"the last checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"


def _is_complete(folder: Path) -> bool:
    try:
        check_checkpoint(folder)
    except DamagedCheckpoint:
        return False
    return True


def remove_unfinished(run_folder: str | os.PathLike) -> None:
    """Delete what a killed run left half written, or half deleted."""
    leftover = Path(run_folder) / UNFINISHED_CHECKPOINTS
    if leftover.exists():
        names = sorted(path.name for path in leftover.iterdir())
        shutil.rmtree(leftover)
        logger.info("removed %s with %s: a run that was killed while it saved left it", leftover, names)


def publish(folder: Path, target: Path) -> None:
    """Make a folder that all ranks have written the checkpoint, in one step; then it survives a power cut."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            sync(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
    write_json(folder / MANIFEST, with_own_hash(files))
    sync(folder / MANIFEST)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(path)
    if target.exists():  # an earlier run wrote this step, then training resumed before it
        _delete(target)
    os.rename(folder, target)
    sync(target.parent)
    _remove_if_empty(folder.parent)


def delete_old(run_folder: Path, limit: int | None, best: str | None, newest: Path | None = None) -> None:
    """Keep `limit` checkpoints, the newest and the best among them, as Trainer does; but each stays whole or goes.

    The lowest steps go first. By the files' times, as in Trainer, the newest would go after a clock was set back.

    newest: the one just written; None: that of the highest step.
    """
    checkpoints = newest_first(run_folder)
    if limit is None or limit <= 0 or not checkpoints:
        return
    kept = {path.resolve() for path in (newest or checkpoints[0], best and Path(best)) if path}
    others = [checkpoint for checkpoint in reversed(checkpoints) if checkpoint.resolve() not in kept]
    for checkpoint in others[: max(0, len(checkpoints) - max(limit, len(kept)))]:
        _delete(checkpoint)


def _delete(checkpoint: Path) -> None:
    if checkpoint.is_symlink():  # somebody moved it to another disk, where it may stay
        checkpoint.unlink()
        return
    aside = checkpoint.parent / UNFINISHED_CHECKPOINTS / f"deleted-{checkpoint.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside)
    _remove_if_empty(aside.parent)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def write_json(file: Path, content: Any) -> None:
    """Write a record for people and programs: one value a line."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def with_own_hash(files: dict[str, dict]) -> dict:
    """The manifest of {name: {"bytes": …, "xxh3_128": …}}; its own hash lets it be checked like these files."""
    text = json.dumps(files, sort_keys=True)
    return {"files": files, "xxh3_128": xxhash.xxh3_128(text.encode()).hexdigest()}


@contextmanager
def names_damaged(checkpoint: str | None, names: Sequence[str]) -> Iterator[None]:
    """DamagedCheckpoint for the first of these files that torch cannot load; torch's own error names none."""
    try:
        yield
    except (UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, OSError, SafetensorError) as error:
        bad = next((name for name in names if not _loads(Path(checkpoint or "") / name)), None)
        if bad is None:
            raise
        raise DamagedCheckpoint(
            f"{checkpoint} is damaged: {bad} holds more than tensors and numbers, or is cut off, so nothing loads or "
            "executes it; delete the folder, and resume from another checkpoint"
        ) from error


def _loads(file: Path) -> bool:
    if not file.is_file():
        return True
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        else:
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can make its reader raise anything
        return False
    return True
