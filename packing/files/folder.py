"""Folders that are whole or not there.

packed                     the target: it appears when it is complete
.packed.partial            beside it until then; a killed run's is found by the next run of the same packing
.packed.partial.lock       held by the run that writes, until the folder has its name
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from packing.files.hashed import UNFINISHED, sync, write_file
from packing.files.locks import held, holder
from packing.files.paths import Place, place

KEY = "key"  # a file that says what an unfinished folder will hold
TRIES = 100  # a folder may go while files are put into it, if another run ends
OUTPUT_CURE = "choose another output, or make its folder writable"


def check_target(target: str | os.PathLike) -> Path:
    """The folder to write, which must not exist yet, in a place where it can be made.

    Raises FileExistsError where it exists, and OSError where the system would not have it."""
    path = place(target)
    if not isinstance(path, Path):
        raise ValueError(f"{str(path)!r} is a URL, and this is written to a folder of this machine; give its path")
    if "\0" in str(path):
        raise ValueError(f"output {str(path)!r} has a NUL in its name; choose another name")
    with writing_errors(path):
        if os.path.lexists(path):
            raise FileExistsError(f"output {str(path)!r} exists already; choose another folder or remove it first")
        _check_parent(path.absolute())
    return path


def _check_parent(target: Path) -> None:
    """That it can be written to, as far as the system says so without a try."""
    os.path.lexists(target) or _partial_of(target).is_symlink()  # raises for a name that is too long
    parent = next(parent for parent in target.parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))


@contextmanager
def writing_errors(path: Path, cure: str = OUTPUT_CURE) -> Iterator[None]:
    """An error of the system names the path and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno is None or cure in str(error.strerror):
            raise
        said = error.strerror if error.filename in (None, str(path)) else f"{error.strerror} ({str(error.filename)!r})"
        cured = OSError(error.errno, f"{said}; {cure}", str(path))
        for note in getattr(error, "__notes__", ()):
            cured.add_note(note)
        raise cured from error


@contextmanager
def partial_folder(target: str | os.PathLike) -> Iterator[Path]:
    """The folder `.target.partial` that becomes the target at the end. It outlives a run that is killed or fails.

    with partial_folder("packed") as folder:     # .packed.partial, perhaps with what an earlier run has finished
        ...                                      # at the end renamed to packed

    An error after which no shard would be kept leaves nothing; others say how to resume.
    Raises BlockingIOError while another run writes there.
    """
    target = check_target(target).absolute()
    partial = _partial_of(target)
    with no_empty_parents(target), _made_and_locked(partial, target):
        try:
            yield partial
            check_target(target)
            for folder, _, _ in os.walk(partial):
                sync(Path(folder))
            os.rename(partial, target)
            sync(target.parent)
        except NotOurs:
            raise
        except BaseException as error:
            if kept := count_shards(partial):
                note_resume(error, partial, kept)
            else:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _partial_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


@contextmanager
def _made_and_locked(partial: Path, target: Path) -> Iterator[None]:
    """Make the folder if it is not there, and hold its lock, which lies beside it.

    So the folder can get its name while the lock is held, and holds no file that must go before."""
    with writing_errors(target), ExitStack() as stack:
        _lock_beside(stack, target, partial)
        if partial.is_symlink():
            raise FileExistsError(errno.EEXIST, "it is a link, and would be followed; remove it", str(partial))
        partial.mkdir(exist_ok=True)
        lock = stack.pop_all()
    with lock:
        yield


def _lock_beside(stack: ExitStack, target: Path, written: Path) -> None:
    """Hold .target.partial.lock, whose folder is made. written: what to name if another run holds it."""
    partial = _partial_of(target)
    lock = partial.with_name(f"{partial.name}.lock")
    for left in reversed(range(TRIES)):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(lock))
            return
        except BlockingIOError:
            who = holder(lock)
            raise BlockingIOError(f"another run{who} is writing {str(written)!r}; wait for it, or stop it") from None
        except FileNotFoundError:  # another run has just ended and taken our parents along; or this is no place
            if not left:
                raise


class NotOurs(FileExistsError):
    """Something in a partial folder that no packing has put there. It is left where it is."""


def refuse_others(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raise NotOurs for what lies in a folder to resume and is a link, or none of these files or folders.

    It would be in the packed dataset at the end, or be written through. names: None = any."""
    is_folder = folder.is_dir() and not folder.is_symlink()
    wanted = None if names is None else set(names)
    for path in sorted(folder.iterdir()) if is_folder else [folder]:
        is_unfinished = path.name.startswith(".") and path.name.endswith(UNFINISHED)
        is_ours = is_folder and (wanted is None or path.name in wanted or is_unfinished)
        if path.is_symlink() or not is_ours or not (path.is_dir() or path.is_file()):
            what = f"{str(path)!r} was not put there by this packing, and would be part of the output"
            raise NotOurs(f"{what}; move it away, or remove {str(folder)!r} to start over")


def count_shards(folder: Place) -> int:
    """Those that are finished, or nearly."""
    return sum(not file.name.endswith(".record") for file in folder.rglob("data-*"))


def note_resume(error: BaseException, partial: Place, kept: int) -> None:
    """Add to the error that finished shards are kept, and what to do with them."""
    shards = f"{kept} finished {'shard is' if kept == 1 else 'shards are'} kept in {str(partial)!r}"
    error.add_note(f"{shards}: run the same again to continue from there, or remove that folder")


@contextmanager
def no_empty_parents(target: Path) -> Iterator[None]:
    """An error removes the parents that were made for the target, unless there is something in them."""
    made = [parent for parent in target.parents if not parent.exists()]  # nearest first
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError if the disk has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        what = f"{num_bytes:,} bytes are to be written, and {free:,} are free; make space, or choose another output"
        raise OSError(errno.ENOSPC, what, str(folder))


@contextmanager
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder beside the target that becomes the target at the end; an error leaves neither.

    with new_folder("packed") as folder:     # .packed.writing-a1b2c3
        ...                                  # at the end renamed to packed

    Raises BlockingIOError while another run writes there.
    """
    target = check_target(target).absolute()
    with no_empty_parents(target), ExitStack() as stack:
        with writing_errors(target):
            _lock_beside(stack, target, target)
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)  # a folder that was renamed is not there
        os.umask(umask := os.umask(0))
        folder.chmod(0o777 & ~umask)  # mkdtemp keeps others out
        yield folder
        check_target(target)
        os.rename(folder, target)


@contextmanager
def resumed_folder(target: str | os.PathLike, key: str) -> Iterator[Path]:
    """As new_folder, but a run that is killed, is interrupted or meets an error of the system (a full disk, a process
    that died) leaves the folder to the next one with the same key.

    with resumed_folder("prepared", "9f2c…") as folder:     # .prepared.unfinished, with what an earlier run finished
        ...
    """
    target = check_target(target).absolute()
    with no_empty_parents(target), ExitStack() as stack:
        folder = target.with_name(f".{target.name}.unfinished")
        with writing_errors(target):
            _lock_beside(stack, target, target)
            if folder.is_symlink():
                raise FileExistsError(errno.EEXIST, "it is a link, and would be followed; remove it", str(folder))
            if not (folder / KEY).is_file() or (folder / KEY).read_text(encoding="utf-8") != key:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                write_file(folder / KEY, key.encode())
        try:
            yield folder
        except BaseException as error:
            is_started = any(path.is_file() and path.name != KEY for path in folder.rglob("*"))
            if not is_started or (isinstance(error, Exception) and not isinstance(error, OSError)):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                kept = f"what is finished is kept in {str(folder)!r}"
                error.add_note(f"{kept}: run the same again to continue from there, or remove that folder")
            raise
        check_target(target)
        (folder / KEY).unlink()
        os.rename(folder, target)
