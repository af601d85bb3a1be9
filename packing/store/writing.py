"""Packings -> a folder of this machine, or one at a URL: what is there already is resumed, and nothing else is changed.

here        .packed.partial, locked, which becomes packed when it is whole: see folder.py
at a URL    s3://bucket/packed itself, without a lock; finished when the file that its manifest names last is there
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import xxhash

from packing.files.folder import check_space, check_target, count_shards, note_resume, partial_folder, refuse_others
from packing.files.hashed import UNFINISHED, write_file
from packing.files.paths import Place, place
from packing.files.progress import progress_bar
from packing.files.saved import DICT, INFO, STATE
from packing.source.fingerprint import packed_fingerprint
from packing.source.source_files import SourceChangedError
from packing.store import engines
from packing.store.contents import Packing
from packing.store.dataset_files import state_files
from packing.store.manifest import FILE, Manifest, differences, is_finished, read_manifest
from packing.store.shards import ShardRecord, ShardTask, read_record, record_path, write_record


def check_output(output: str | os.PathLike, storage_options: dict | None = None, *, one_process: bool = True) -> Place:
    """The folder to write. It must not exist yet; at a URL it may hold what an interrupted run has left.

    one_process: whether nobody but this process will write.
    """
    folder = place(output, storage_options)
    if isinstance(folder, Path):
        return check_target(folder)
    if folder.is_of_this_process and not one_process:
        raise ValueError(f"{str(folder)!r} is in the memory of this process: let it write alone, without others")
    files = folder.rglob("*")
    started = {file.parent for file in files if file.name == FILE}
    with suppress(ValueError):  # a damaged one is no end, and is refused when it is to be resumed
        if (folder / DICT).exists() or (folder in started and is_finished(folder)):
            raise FileExistsError(f"output {str(folder)!r} exists already; choose another folder or remove it first")
    if others := [file.relative_to(folder) for file in files if file.parent not in started]:
        raise FileExistsError(f"output {str(folder)!r} holds other files, {others[0]!r} for one; choose another folder")
    return folder


def _refuse_other_splits(folder: Place, splits: list[str]) -> None:
    """A folder that was started with other splits would end with theirs in it, too; "" is a dataset without splits."""
    found = [path.parent.name if path.parent != folder else "" for path in folder.rglob(FILE)]
    if other := sorted(set(found) - set(splits)):
        cure = f"give the source that it was started with, or remove {str(folder)!r} to start over"
        what = f"it had {_splits(other)}, and now there is {_splits(splits)}"
        raise ValueError(f"cannot resume the packing in {str(folder)!r}: {what}; {cure}")
    if isinstance(folder, Path) and splits != [""]:
        refuse_others(folder, [*splits, DICT])


def _splits(names: list[str]) -> str:
    return ", ".join(f"split {name!r}" if name else "a dataset without splits" for name in names)


@contextmanager
def output_folder(output: str | os.PathLike, storage_options: dict | None = None) -> Iterator[Place]:
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
                note_resume(error, folder, kept)
            elif folder.rglob(FILE):  # not removed: without a lock, it may be another run's
                error.add_note(f"started in {str(folder)!r}: run the same again, or remove that folder")
        raise


def write_packings(
    packings: dict[str, Packing], output: str | os.PathLike, storage_options: dict | None = None, progress: bool = False
) -> None:
    """Write all splits into a folder each, or resume; "" is a dataset without splits, written into the output itself.

    Raises ValueError where the folder was started by another packing, OSError where the disk is full or fails.
    """
    with output_folder(output, storage_options) as folder:
        _refuse_other_splits(folder, list(packings))
        manifests = {name: start(packing, folder / name) for name, packing in packings.items()}
        if isinstance(folder, Path):  # a store does not say how much room it has
            check_space(folder, sum(_bytes_missing(packing, folder / name) for name, packing in packings.items()))
        for name, packing in packings.items():
            write_packs(packing, manifests[name], folder / name, progress)
        if "" not in packings:
            write_file(folder / DICT, json.dumps({"splits": list(packings)}).encode())


def start(packing: Packing, folder: Place) -> Manifest:
    """Make the folder ready to be written to, or to be resumed. Changes no shard that is finished.

    Returns the manifest of the packing, before anything is written.
    Raises ValueError where the folder was started by a packing that would end with other bytes.
    """
    if isinstance(folder, Path) and os.path.lexists(folder):
        refuse_others(folder)
    folder.mkdir(exist_ok=True)
    manifest = Manifest.of(packing)
    found = _resumed(manifest, folder) if (folder / FILE).exists() else None
    if isinstance(folder, Path):
        records = [record_path(Path(file)).name for file in packing.shard_files]
        refuse_others(folder, [*packing.shard_files, *records, FILE, INFO, STATE, "LICENSE"])
    _remove_unfinished(folder)
    if found is None:
        manifest.write(folder)
    for record in found.shards if found is not None else ():  # the run was killed between its manifest and its name
        write_record(folder / record.file, record)
    return manifest


def _resumed(manifest: Manifest, folder: Place) -> Manifest:
    """The manifest of a folder that a packing with this manifest may resume."""
    cure = f"give the options and the source that it was started with, or remove {str(folder)!r} to start over"
    try:
        found = read_manifest(folder)
    except ValueError as error:
        raise ValueError(f"{error}; {cure}") from None
    if other := differences(found, manifest):
        raise ValueError(f"cannot resume the packing in {str(folder)!r}: {'; '.join(other)}; {cure}")
    return found


def _bytes_missing(packing: Packing, folder: Place) -> int:
    """About how many bytes `write_packs` will add to the folder."""
    shards = len(packing.shard_files)
    done = sum(read_record(folder / file) is not None for file in packing.shard_files)
    return packing.num_bytes * (shards - done) // shards


def shard_tasks(packing: Packing, folder: Place) -> Iterator[ShardTask]:
    """All shards to write into the folder, made one by one, for any engine."""
    schema, options = packing.features.arrow_schema, getattr(folder, "storage_options", None)
    for i, file in enumerate(packing.shard_files):
        packs = packing.packs(packing.shard_bounds[i], packing.shard_bounds[i + 1])
        yield ShardTask(str(folder), file, packs, schema, packing.batch_packs, options)


def write_packs(packing: Packing, manifest: Manifest, folder: Place, progress: bool = False) -> None:
    """Write the packed dataset into a folder that `start` has made ready."""
    records: dict[str, ShardRecord] = {}
    with progress_bar(total=packing.plan.num_packs, desc="packing", unit="pack", disable=not progress) as bar:
        try:
            with closing(engines.write_shards(packing, shard_tasks(packing, folder), bar.update)) as written:
                for record in written:
                    records[record.file] = record
        except (SourceChangedError, ChildProcessError):  # or a process that read behind a file's end
            _refuse_changed_source(packing, folder)  # it also deletes the folder, which cannot be resumed
            raise
    finish(packing, manifest, folder, [records[file] for file in packing.shard_files])


def finish(packing: Packing, manifest: Manifest, folder: Place, records: list[ShardRecord]) -> None:
    """All shards are written: now the folder becomes a dataset. records: in the order of the shards.

    At a URL the folder has its name already, so the file without which it is no dataset comes last."""
    _refuse_changed_source(packing, folder)
    _remove_unfinished(folder)  # workers that died left them; others did their tasks
    for record in records:
        _check_record(record, folder)
    split = None if packing.dataset.split is None else str(packing.dataset.split)
    fingerprint = packed_fingerprint(packing.source_prints, packing.facts.to_description())
    files = state_files(packing.shard_files, packing.info, fingerprint, split)
    if packing.options.format == "parquet":
        del files[STATE]  # load_from_disk would take the shards for Arrow
    *first, last = files
    for file in first:
        write_file(folder / file, files[file])
    checksums = {file: xxhash.xxh3_128_hexdigest(data) for file, data in files.items()}
    manifest.finished(records, checksums).write(folder)
    for file in packing.shard_files:
        record_path(folder / file).unlink()
    write_file(folder / last, files[last])


def _check_record(record: ShardRecord, folder: Place) -> None:
    if (found := read_record(folder / record.file)) != record:
        what = "is not there" if found is None else "is another one's"
        cure = "all processes that write must see one folder there, and no other run may write to it"
        raise OSError(f"{record.file} was written, and {what} in {str(folder)!r}: {cure}")


def _refuse_changed_source(packing: Packing, folder: Place) -> None:
    """Shards would hold some values from before, and some from after."""
    packing.source.columns.files.refuse_changed(f"remove {str(folder)!r}, and pack it again once nobody writes to it")


def _remove_unfinished(folder: Place) -> None:
    for file in folder.glob(f".*{UNFINISHED}"):
        file.unlink()
