"""Where packs are written to: a folder of this machine, or one at a URL.

here        .packed.partial, locked, which becomes packed when it is whole: see folder.py
at a URL    s3://bucket/packed itself, without a lock; finished when the file that its manifest names last is there
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from packing.files.folder import (
    check_space,
    check_target,
    count_shards,
    partial_folder,
    refuse_others,
    say_how_to_resume,
)
from packing.files.paths import RemotePath, place
from packing.files.saved import DICT  # written last of all, where there are several splits
from packing.store.manifest import FILE, is_finished


def check_output(
    output: str | os.PathLike, storage_options: dict | None = None, *, one_process: bool = True
) -> Path | RemotePath:
    """The folder to write. It must not exist yet; at a URL it may hold what an earlier run has begun.

    one_process: whether nobody but this process will write.
    """
    folder = place(output, storage_options)
    if isinstance(folder, Path):
        return check_target(folder)
    if folder.is_of_this_process and not one_process:
        raise ValueError(f"{str(folder)!r} is in the memory of this process: let it write alone, without others")
    files = folder.rglob("*")
    begun = {file.parent for file in files if file.name == FILE}
    with suppress(ValueError):  # one that is damaged is no end, and is said when it is to be gone on with
        if (folder / DICT).exists() or (folder in begun and is_finished(folder)):
            raise FileExistsError(f"output {str(folder)!r} exists already; choose another folder or remove it first")
    if others := [file.relative_to(folder) for file in files if file.parent not in begun]:
        raise FileExistsError(f"output {str(folder)!r} holds other files, {others[0]!r} for one; choose another folder")
    return folder


def refuse_other_splits(folder: Path | RemotePath, splits: list[str]) -> None:
    """A folder that was begun with other splits would end with theirs in it, too; "" is a dataset without splits."""
    begun = [path.parent.name if path.parent != folder else "" for path in folder.rglob(FILE)]
    if other := sorted(set(begun) - set(splits)):
        raise ValueError(
            f"a packing that was begun cannot be gone on with: it had {_splits(other)}, and now there is "
            f"{_splits(splits)}; give the source that it was begun with, or remove {str(folder)!r} to begin anew"
        )

    if isinstance(folder, Path) and splits != [""]:
        refuse_others(folder, [*splits, DICT])


def _splits(names: list[str]) -> str:
    return ", ".join(f"split {name!r}" if name else "a dataset without splits" for name in names)


@contextmanager
def output_folder(output: str | os.PathLike, storage_options: dict | None = None) -> Iterator[Path | RemotePath]:
    """The folder to write to; it is `output`, or becomes it, at the end. It outlives a run that is killed or fails."""
    folder = check_output(output, storage_options)
    if isinstance(folder, Path):
        with partial_folder(folder) as partial:
            yield partial
        return
    try:
        yield folder
    except BaseException as error:
        with suppress(OSError):
            if kept := count_shards(folder):
                say_how_to_resume(error, folder, kept)
            elif folder.rglob(FILE):  # not removed: without a lock, it may be another run's
                error.add_note(f"begun in {str(folder)!r}: run the same again, or remove that folder")
        raise


def check_room(folder: Path | RemotePath, num_bytes: int) -> None:
    """Raise OSError if the disk has not so many bytes left; a store does not say."""
    if isinstance(folder, Path):
        check_space(folder, num_bytes)
