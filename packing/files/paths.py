"""Folders and files at a URL, of any file system that fsspec knows: s3://bucket/packed, gs://…, sftp://…, memory://…

    place("packed")              -> Path("packed"), and so does file:///home/me/packed
    place("s3://bucket/packed")  -> RemotePath, which has what packing uses of a Path: one code writes and reads both

A store of objects cannot rename a file, but it puts a file whole or not at all. So a file is written here first, into
the folder for temporary files (TMPDIR says which), hashed as it grows, and then put under its name. Other stores, sftp
for one, may keep half a file of a killed run. A resumed run writes a half shard again: its record comes after it.

Credentials come from the environment, as fsspec reads them, so that every process has them; or from storage_options.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING

from packing.files.hashed import BINARY, READ_BYTES, HashedFile
from packing.files.locks import LOOK, lock

if TYPE_CHECKING:
    import fsspec
    from _typeshed import WriteableBuffer

URL = re.compile(r"([A-Za-z][\w+.-]*)((::[\w+.-]+)*)://")
LOCAL = ("file", "local")


def is_url(path: str | os.PathLike) -> bool:
    """Whether it is of another file system than that of this machine."""
    found = URL.match(path) if isinstance(path, str) else None
    return found is not None and (found[1] not in LOCAL or bool(found[2]))


def place(path: str | os.PathLike | RemotePath, storage_options: dict | None = None) -> Path | RemotePath:
    """The file or folder at a path or a URL. storage_options: of a URL's file system, beside the environment's."""
    if isinstance(path, RemotePath):
        return path
    if not is_url(path):
        if storage_options:
            raise ValueError(f"storage_options would be ignored: {str(path)!r} is of this machine; leave them out")
        return _local(path)
    url = str(path).rstrip("/")
    if url.endswith(":") or "::" in url:
        raise ValueError(f"{path!r} names no folder of one file system; give one like 's3://bucket/packed'")
    return RemotePath(url, storage_options or None)


def _local(path: str | os.PathLike) -> Path:
    if isinstance(path, str) and URL.match(path):
        from fsspec.implementations.local import LocalFileSystem

        return Path(LocalFileSystem._strip_protocol(path))
    if isinstance(path, PurePath) and (found := re.match(r"([a-z][a-z0-9+]+):/", str(path))):
        from fsspec import available_protocols

        if found[1] in available_protocols():  # Path made this of s3://bucket
            raise ValueError(f"{str(path)!r} was a URL before Path took a slash away; give the URL as a string")
    return Path(path)


def open_store(url: str, storage_options: dict | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """(file system, path in it). Raises ValueError for an unknown one, ImportError where its package is missing."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **(storage_options or {}))
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name
        cure = f"pip install {package}" if package else str(error)
        raise ImportError(f"{url!r} needs a package that is not installed: {cure}") from None
    except ValueError as error:
        protocol = url.partition(":")[0]
        if protocol in fsspec.available_protocols():
            raise
        raise ValueError(f"{url!r}: no file system is known as {protocol!r} ({error})") from None


def is_file_in(root: str, found: str) -> bool:
    """Whether what find gives is a file beneath; an empty object packed/ is how some stores keep an empty folder."""
    return found.startswith(root) and not found.endswith("/")


@contextmanager
def named_errors(url: str) -> Iterator[None]:
    """What a file system raises, perhaps an error of its own kind, becomes an OSError that names the URL."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ImportError | ValueError) and type(error).__module__ == "builtins":
            raise
        raise _named(error, url) from error


def _named(error: Exception, url: str) -> OSError:
    said = " ".join(str(getattr(error, "strerror", None) or error).split())
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    if isinstance(error, PermissionError):
        cure = "the credentials in the environment (or in storage_options) do not allow it"
        return PermissionError(errno.EACCES, f"{said or 'Permission denied'}; {cure}", url)
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, said, url)
    return OSError(errno.EIO, f"{type(error).__name__}: {said}", url)


@dataclass(frozen=True)
class RemotePath:
    """A file or a folder at a URL. It has the methods of pathlib.Path that packing uses. Picklable."""

    url: str
    storage_options: dict | None = field(default=None, compare=False, repr=False)  # a password may be among them

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return replace(self, url=f"{self.url}/{name}".rstrip("/"))

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    def with_suffix(self, suffix: str) -> RemotePath:
        return replace(self, url=self.url.removesuffix(self.suffix) + suffix)

    @property
    def parent(self) -> RemotePath:
        return replace(self, url=self.url.rpartition("/")[0])

    def relative_to(self, folder: RemotePath) -> str:
        return self.url.removeprefix(f"{folder.url}/")

    @property
    def is_of_this_process(self) -> bool:
        """Whether no other process would see it."""
        return self.url.startswith("memory://")

    @contextmanager
    def _store(self) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
        """(file system, path in it). It forgets what it knew of its files: others write there as well."""
        with named_errors(self.url):
            fs, path = open_store(self.url, self.storage_options)
            fs.invalidate_cache()
            yield fs, path

    # Looking

    def exists(self) -> bool:
        """Not fs.exists, which takes a store that does not answer for one without the file: it would be overwritten."""
        try:
            with self._store() as (fs, path):
                return bool(fs.info(path))
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        with self._store() as (fs, path):
            return fs.isdir(path)

    def stat(self) -> SimpleNamespace:
        with self._store() as (fs, path):
            return SimpleNamespace(st_size=int(fs.info(path)["size"]))

    def rglob(self, pattern: str) -> list[RemotePath]:
        """All files beneath the folder whose names match; none where there is no such folder."""
        try:
            with self._store() as (fs, path):
                root = path.rstrip("/") + "/"
                names = [found.removeprefix(root) for found in fs.find(path) if is_file_in(root, found)]
                if not names:
                    fs.info(path)  # is there nothing, or was an error passed over?
        except FileNotFoundError:
            return []
        return [self / name for name in sorted(names) if fnmatchcase(PurePosixPath(name).name, pattern)]

    def glob(self, pattern: str) -> list[RemotePath]:
        return [file for file in self.rglob(pattern) if file.parent == self]

    # Reading

    def read_bytes(self) -> bytes:
        with self._store() as (fs, path):
            return fs.cat_file(path)

    def open(self, mode: str = "rb", buffering: int = -1) -> io.BufferedReader:
        with self._store() as (fs, path):
            return io.BufferedReader(_Reader(fs.open(path, "rb"), self.url), READ_BYTES)

    # Writing

    def mkdir(self, exist_ok: bool = True) -> None:
        """Nothing: a folder is there once a file is in it."""

    def hashed_file(self) -> RemoteFile:
        return RemoteFile(self)

    def unlink(self) -> None:
        with self._store() as (fs, path):
            fs.rm_file(path)

    def put(self, local: Path) -> None:
        """Copy a file to here; one that is here is replaced."""
        try:
            self._put(local)
        except FileNotFoundError:
            try:
                self._make_parents()
                self._put(local)
            except FileNotFoundError as error:
                cure = "no such bucket or folder; make it first, or choose another output"
                raise FileNotFoundError(errno.ENOENT, cure, self.url) from error
        size = local.stat().st_size
        if (found := self.stat().st_size) != size:
            raise OSError(errno.EIO, f"{found:,} of {size:,} bytes are there after the file was put", self.url)

    def _put(self, local: Path) -> None:
        with self._store() as (fs, path):
            fs.put_file(str(local), path)

    def _make_parents(self) -> None:
        """For file systems with real folders. A bucket is never made: it has an owner and costs money."""
        with self._store() as (fs, path):
            missing, folder = [], fs._parent(path)
            while "/" in folder.strip("/") and not fs.isdir(folder):
                missing.append(folder)
                folder = fs._parent(folder)
            if path.startswith("/") and folder.strip("/") and not fs.isdir(folder):
                missing.append(folder)  # no bucket, but a folder in the root
            for folder in reversed(missing):
                fs.mkdir(folder, create_parents=False)


Place = Path | RemotePath  # what place() returns


class _Reader(io.RawIOBase):
    """A file that is open for reading, with errors that name it."""

    def __init__(self, file: IO[bytes], url: str):
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        room = memoryview(buffer)
        with named_errors(self._url):
            data = self._file.read(len(room))
        room[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with named_errors(self._url):
            return self._file.seek(offset, whence)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class RemoteFile(HashedFile):
    """A HashedFile whose bytes lie in a temporary file of this machine until they are put."""

    PREFIX, ENDING = "pack-dataset-", ".writing"

    def __init__(self, remote: RemotePath):
        super().__init__(Path(tempfile.gettempdir()))
        self.remote = remote
        self.says = f"{self._unfinished} for {remote}; TMPDIR says where temporary files are"

    def _new_file(self) -> tuple[Path, int]:
        """It is locked while it is in use. So what a killed process left is known, and removed."""
        for left_off in self.path.glob(f"{self.PREFIX}*{self.ENDING}"):
            with suppress(OSError):  # it is another user's, or in use, or gone
                descriptor = os.open(left_off, os.O_WRONLY | LOOK)
                try:
                    lock(descriptor)
                    left_off.unlink()
                finally:
                    os.close(descriptor)
        while True:
            path = self.path / f"{self.PREFIX}{secrets.token_hex(8)}{self.ENDING}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o600)
            try:
                lock(descriptor)
                if path.exists():  # and nobody has taken it for left off before it was locked
                    return path, descriptor
            except BlockingIOError:  # somebody is about to
                pass
            except OSError as error:
                os.close(descriptor)
                path.unlink()
                cure = "temporary files want a disk that knows locks; TMPDIR says where they are"
                raise OSError(error.errno, f"{error.strerror}; {cure}", str(path)) from error
            os.close(descriptor)

    def publish(self) -> None:
        self.remote.put(self._unfinished)
