"""Files that have reached the disk before they have their name, hashed as they are written."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from packing.files.paths import Place

READ_BYTES = 1 << 22
UNFINISHED = ".writing"  # how names end that files have before their own
BINARY = getattr(os, "O_BINARY", 0)  # Windows would change line ends


def write_bytes(descriptor: int, data: ReadableBuffer) -> None:
    """Write all of it. Everything goes to the disk here."""
    data = memoryview(data).cast("B")
    while len(data):
        data = data[os.write(descriptor, data) :]


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk. Windows opens no folder, and has no such wait."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class HashedFile:
    """A new file, written under another name, hashed as it is written.

    with HashedFile(path) as file:
        file.write(data)
        file.publish()            # now it is on the disk, and named; without this nothing is left

    size, xxh3: of what was written; the hash has 128 bits, in hexadecimal.
    """

    def __init__(self, path: Path):
        self.path, self.size, self._hash = path, 0, xxhash.xxh3_128()
        self.says = str(path)  # an error of writing
        self._unfinished, self._descriptor = self._new_file()
        self.closed = False

    def _new_file(self) -> tuple[Path, int]:
        path = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}{UNFINISHED}")  # its own on any machine
        return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)

    @property
    def xxh3(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: ReadableBuffer) -> int:
        self._hash.update(data)
        try:
            write_bytes(self._descriptor, data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.says) from error
        size = memoryview(data).nbytes
        self.size += size
        return size

    def publish(self) -> None:
        os.fsync(self._descriptor)
        self.close()  # Windows renames no file that is open, and only os.replace goes over another
        (os.replace if os.name == "nt" else os.rename)(self._unfinished, self.path)
        sync(self.path.parent)

    def tell(self) -> int:  # Arrow asks for it
        return self.size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._descriptor)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        with suppress(FileNotFoundError):
            self._unfinished.unlink()


def hashed_file(path: Place) -> HashedFile:
    """A new file here, or at a URL: see paths.py."""
    return HashedFile(path) if isinstance(path, Path) else path.hashed_file()


def write_file(path: Place, data: bytes) -> str:
    """Write a small file, all at once; an older one is replaced. Returns its XXH3."""
    with hashed_file(path) as file:
        file.write(data)
        file.publish()
    return file.xxh3


def checksum(path: Place) -> str:
    """128 bits of XXH3 over a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        room = memoryview(bytearray(READ_BYTES))
        while count := file.readinto(room):
            digest.update(room[:count])
    return digest.hexdigest()
