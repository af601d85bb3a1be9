"""Names of files, as a file says them: each is of a file inside one folder, or refused before anything is opened.

"data-00000-of-00001.arrow"                              is one
"../rows.arrow"  "/etc/passwd"  "a\\b"  "."  ""  "C:x"     is none, nor is what is no text

A NamedFile is called by another name in errors than that of its path, where it is a copy of a file elsewhere.
"""

from __future__ import annotations

import gzip
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from packing.files.errors import SourceError

if TYPE_CHECKING:
    from packing.files.paths import Place

LONGEST = 255  # bytes of a name
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def checked_name(name: object, said_by: object) -> str:
    """The name of one file or folder. Raises ValueError, with the file that says it, for what would lead elsewhere."""
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise ValueError(f"{str(said_by)!r} names {name!r}, which is no file inside its folder; make it again")
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        length = None
    if length is None or length > LONGEST:
        what = f"{str(said_by)!r} names {name[:40]!r}…, which no file can be called"
        raise ValueError(f"{what}: a name has {LONGEST} bytes of UTF-8 at most; make it again")
    return name


def checked_path(name: object, said_by: object) -> str:
    """As checked_name, where folders may come before the file: "global_step8/model.pt"."""
    parts = name.split("/") if isinstance(name, str) else [name]
    return "/".join(checked_name(part, said_by) for part in parts)


def file_in(folder: Place, name: object, said_by: object) -> Place:
    """The file of this name in a folder of this machine, or at a URL.

    Raises ValueError where it lies outside, by its name or by a link, or is a folder, a pipe or a device;
    FileNotFoundError where there is none."""
    path = checked_path(name, said_by)
    if isinstance(folder, Path):
        check_file(folder / path, folder)
    return folder / path


def check_file(file: Path, folder: Path) -> None:
    """Raise ValueError unless it is a file, and lies in the folder when links are followed."""
    try:
        lies, root = file.resolve(strict=True), folder.resolve()
    except RuntimeError:
        raise ValueError(f"{str(file)!r} is a link to itself; put the file there") from None
    if not lies.is_relative_to(root):
        what = f"{str(file)!r} is a link that leads out of {str(folder)!r}"
        raise ValueError(f"{what}; copy the files themselves (cp -rL), for nothing outside a folder is read")
    check_is_file(file)


def check_is_file(file: Path) -> None:
    """Raise ValueError for a pipe, which would be waited for, and whatever else is no file."""
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "a device")
        raise ValueError(f"{str(file)!r} is {kind} and no file; put the file there")


def is_hidden(path: str) -> bool:
    """Whether a path from some folder on has a part that starts with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in path.split("/"))


@dataclass(frozen=True)
class NamedFile:
    """A file of this machine, and what errors call it: a copy has the name of the file that it was copied from."""

    path: Path
    name: str

    @classmethod
    def of(cls, path: str | os.PathLike) -> NamedFile:
        """A file that is called by its path."""
        return cls(Path(path), str(path))

    def __str__(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def is_compressed(self) -> bool:
        return self.suffix.lower() == ".gz"

    def open(self) -> BinaryIO:
        """The bytes of its content, uncompressed."""
        return cast(BinaryIO, gzip.open(self.path, "rb")) if self.is_compressed else self.path.open("rb")

    def stamp(self) -> tuple[str, *tuple[int, ...]]:
        """Where it lies, and what changes when its content does."""
        found = self.path.stat()
        return str(self.path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def unreadable(file: NamedFile, error: Exception) -> SourceError:
    """What to raise where the bytes of a file are none of its kind."""
    what = f"cannot be read, it is damaged or no {file.suffix} file: {' '.join(str(error).split())}"
    return SourceError(what, file=file, cure="make the file again")
