"""shelf://bucket/name, a file system for tests: objects in a local folder, which many processes see. It puts an object
whole or not at all, and can neither rename nor append. A bucket is an existing folder. Imported by test_remote.py.

When told, it fails or dies, and it counts what it does:
    Shelf.at["put"] = 3, fail       the third put of this process raises; die: ends the process by SIGKILL
"""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import ClassVar

from fsspec import AbstractFileSystem


class ShelfError(Exception):
    """Not an OSError: the errors of many file systems are not."""


def fail() -> None:
    raise ShelfError("the shelf fell down")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Shelf(AbstractFileSystem):
    protocol = "shelf"
    at: ClassVar[dict[str, tuple]] = {}
    done: ClassVar[Counter] = Counter()

    def __init__(self, root: str, **options):
        super().__init__(**options)
        self.root = Path(root)

    @classmethod
    def forget(cls) -> None:
        cls.at, cls.done = {}, Counter()

    def _count(self, what: str) -> None:
        Shelf.done[what] += 1
        number, happens = Shelf.at.get(what, (0, None))
        if Shelf.done[what] == number:
            happens()

    def _real(self, path: str) -> Path:
        return self.root / self._strip_protocol(path)

    def info(self, path, **options):
        path = self._strip_protocol(path)
        real = self._real(path)
        status = real.stat()
        kind = "directory" if real.is_dir() else "file"
        return {"name": path, "type": kind, "size": status.st_size, "ETag": f"{status.st_mtime_ns}"}

    def ls(self, path, detail=True, **options):
        real = self._real(path)
        names = [real] if real.is_file() else sorted(real.iterdir())
        found = [self.info(str(name.relative_to(self.root))) for name in names]
        return found if detail else [info["name"] for info in found]

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            raise ShelfError(f"mode {mode}: an object is put whole")
        self._count("read")
        return self._real(path).open("rb")

    def put_file(self, lpath, rpath, callback=None, mode="overwrite", **options):
        path = self._strip_protocol(rpath)
        bucket = self.root / path.split("/")[0]
        if not bucket.is_dir():
            raise FileNotFoundError(f"NoSuchBucket: {bucket.name}")
        if (bucket / ".readonly").exists():
            raise PermissionError("AccessDenied")
        self._count("put")
        part = self.root / f".{os.getpid()}.part"
        shutil.copyfile(lpath, part)
        self._count("putting")  # and the object is not there
        self._real(path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, self._real(path))
        self._count("has put")

    def get_file(self, rpath, lpath, callback=None, **options):
        if self._real(rpath).is_dir():
            os.makedirs(lpath, exist_ok=True)
            return
        self._count("get")
        shutil.copyfile(self._real(rpath), lpath)

    def rm_file(self, path):
        self._count("remove")
        self._real(path).unlink()

    def mkdir(self, path, create_parents=True, **options):
        if not (self.root / self._strip_protocol(path).split("/")[0]).is_dir():
            raise ShelfError("made a bucket") if create_parents else FileNotFoundError("NoSuchBucket")

    makedirs = mv = cp_file = mkdir
