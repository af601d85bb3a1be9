"""Checkpoints that are complete or not there: written aside, listed with their hashes, renamed when all is on disk.

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
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from collate.training.agreement import agreed, one_run
from collate.training.hooks import overrides_trainer
from collate.training.workers import names_killed_workers
from packing.files.hashed import sync
from packing.files.metadata import read_json
from packing.files.names import checked_path, file_in

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
RUN_FILE = "run.json"
"""The configuration of a run, in each of its checkpoints."""
UNFINISHED = "_unfinished"
"""Where ranks write checkpoints and delete old ones. Uploads to the hub leave out what begins with an underscore."""

_BLOCK = 1 << 22


class DamagedCheckpoint(ValueError):
    """A checkpoint that differs from what was written: which file, and what differs."""


def check_checkpoint(folder: str | os.PathLike) -> None:
    """Raises DamagedCheckpoint unless every file is there as it was written."""
    folder = Path(folder)
    try:
        manifest: Any = read_json(folder / MANIFEST)
        files = manifest["files"]
        checked = {checked_path(name, folder / MANIFEST): entry for name, entry in files.items()}
        expected = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in checked.items()}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder} has no {MANIFEST}: it is incomplete, or another program wrote it") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {MANIFEST} cannot be read ({error})") from None
    if manifest != {"files": files} and manifest != _with_own_hash(files):  # the first: written before there was one
        raise DamagedCheckpoint(
            f"{folder} is damaged: {MANIFEST} itself has other contents than were written; the files may be whole"
        )
    for name, (num_bytes, digest) in expected.items():
        try:
            path = file_in(folder, name, folder / MANIFEST)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} is missing") from None
        except ValueError as error:  # a pipe, or a link that leads out
            raise DamagedCheckpoint(f"{folder} is damaged: {error}") from None
        if path.stat().st_size != num_bytes:
            raise DamagedCheckpoint(
                f"{folder} is damaged: {name} has {path.stat().st_size} bytes, {num_bytes} were written"
            )
        if _hash(Path(str(path))) != digest:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} has other contents than were written")
    for name in expected:
        if name.endswith(".index.json"):
            _check_index(folder, name, set(expected))


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
    newest, *older = [*_newest_first(Path(run_folder)), None]
    if newest is None:
        return None
    try:
        check_checkpoint(newest)
    except DamagedCheckpoint as damage:
        complete = next((folder for folder in older if folder is not None and _is_complete(folder)), None)
        instead = "start again" if complete is None else f"resume from {complete.name}"
        raise DamagedCheckpoint(f"{damage}; delete the folder to {instead}") from None
    return newest


def _newest_first(run_folder: Path) -> list[Path]:
    if not run_folder.is_dir():
        return []
    numbered = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in run_folder.iterdir()]
    steps = [(int(match[1]), path) for match, path in numbered if match and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def _is_complete(folder: Path) -> bool:
    try:
        check_checkpoint(folder)
    except DamagedCheckpoint:
        return False
    return True


def remove_unfinished(run_folder: str | os.PathLike) -> None:
    """Delete what a killed run left half written, or half deleted."""
    leftover = Path(run_folder) / UNFINISHED
    if leftover.exists():
        names = sorted(path.name for path in leftover.iterdir())
        shutil.rmtree(leftover)
        logger.info("removed %s with %s: a run that was killed while it saved left it", leftover, names)


def publish(folder: Path, target: Path) -> None:
    """Make a folder that all ranks have written the checkpoint, in one step; then it survives a power cut."""
    files = {}
    for path in sorted(_files(folder)):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3_128": _hash(path)}
    write_manifest(folder, files)
    sync(folder / MANIFEST)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync(path)
    if target.exists():  # of the same step, but training resumed from another
        _delete(target)
    os.rename(folder, target)
    sync(target.parent)
    _remove_if_empty(folder.parent)


def delete_old(run_folder: Path, limit: int | None, best: str | None, newest: Path | None = None) -> None:
    """Keep `limit` checkpoints, the newest and the best among them, as Trainer does; but each stays whole or goes.

    The lowest steps go first. By the files' times, as in Trainer, the newest would go after a clock was set back.

    newest: the one just written; None: that of the highest step.
    """
    checkpoints = _newest_first(run_folder)
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
    aside = checkpoint.parent / UNFINISHED / f"deleted-{checkpoint.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside)
    _remove_if_empty(aside.parent)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, files: dict[str, dict]) -> None:
    """files: {name: {"bytes": …, "xxh3_128": …}}"""
    (folder / MANIFEST).write_text(json.dumps(_with_own_hash(files), indent=1) + "\n", encoding="utf-8")


def _with_own_hash(files: dict) -> dict:
    """The manifest; its own hash lets it be checked like the files that it lists."""
    text = json.dumps(files, sort_keys=True)
    return {"files": files, "xxh3_128": xxhash.xxh3_128(text.encode()).hexdigest()}


def _check_json(file: Path) -> None:
    if not file.is_file():
        return
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(
            f"{file.parent} is damaged: {file.name} cannot be read ({error}); resume from another checkpoint"
        ) from None


@contextmanager
def _blaming(checkpoint: str | None, names: Sequence[str]) -> Iterator[None]:
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
    except Exception:  # whatever a damaged file makes a reader raise
        return False
    return True


def _not_written(target: Path, error: Exception) -> str:
    last = get_last_checkpoint(str(target.parent)) if target.parent.is_dir() else None
    there = "there is no checkpoint before it" if last is None else f"the last complete checkpoint is {last}"
    free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
    return f"{target} could not be written: {error}; {free:,} bytes are free there; make room; {there}"


@overrides_trainer
class SavesWhole(Trainer):
    """Part of a Trainer: its checkpoints are complete or not there, and a damaged one is refused.

    Trainer writes a checkpoint into _get_output_dir(trial)/checkpoint-N; meanwhile that is the _unfinished folder.
    Whatever Trainer derives from the folder's place comes after the rename: which checkpoint is the best, uploads, and
    how many to keep.
    """

    run_record: dict | None = None
    """The run's configuration: JSON for run.json in each checkpoint."""
    checked_checkpoint: str | None = None
    """One that is known to be complete, on all ranks: its files are not read again."""
    _is_saving = False
    _loaded_from: str | os.PathLike = ""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        saves = self.args.save_strategy != "no"
        with one_run(self.args, self._get_output_dir(trial)) if saves else nullcontext():
            return self._train_alone(resume_from_checkpoint, trial, *args, **kwargs)

    def _train_alone(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        if resume_from_checkpoint not in (None, False, self.checked_checkpoint):
            resume_from_checkpoint = agreed(self.args, lambda: self._checked(resume_from_checkpoint))
        if self.args.should_save:
            remove_unfinished(self._run_folder)
        self.accelerator.wait_for_everyone()
        with names_killed_workers(self.args):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _checked(self, checkpoint: str | bool | None) -> str | bool | None:
        """The checkpoint to resume from, complete."""
        if checkpoint is True and self._run_folder.is_dir():
            checkpoint = get_last_checkpoint(str(self._run_folder)) or True  # True: Trainer says that there is none
        if isinstance(checkpoint, str) and os.path.exists(os.path.join(checkpoint, MANIFEST)):
            check_checkpoint(checkpoint)
        elif isinstance(checkpoint, str):  # a plain Trainer has written it
            _check_json(Path(checkpoint) / TRAINER_STATE_NAME)
        return checkpoint

    @property
    def _run_folder(self) -> Path:
        return Path(self.args.output_dir or ".")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._loaded_from = resume_from_checkpoint
        with _blaming(resume_from_checkpoint, (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _blaming(checkpoint, (OPTIMIZER_NAME, SCHEDULER_NAME)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _blaming(checkpoint, (SCALER_NAME,)):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _blaming(checkpoint, ("rng_state.pth", f"rng_state_{self.args.process_index}.pth")):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self._loaded_from = self.state.best_model_checkpoint or ""
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks parameters, or has others: Trainer would warn, and train random ones.

        A checkpoint has parameters that are tied to each other once.
        """
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        missing, unknown = set(load_result.missing_keys) - tied, set(load_result.unexpected_keys)
        for what, names in (("lacks parameters of the model", missing), ("has parameters of another model", unknown)):
            if names:
                raise ValueError(
                    f"{self._loaded_from} {what}: {', '.join(sorted(names))}; resume with the model that it was saved "
                    "of, or start again in another output_dir"
                )

    def _get_output_dir(self, trial: Any) -> str:
        run_folder = super()._get_output_dir(trial)
        return os.path.join(run_folder, UNFINISHED) if self._is_saving else run_folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder, best = Path(self._get_output_dir(trial)), self.state.best_model_checkpoint
        target = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            self._write_checkpoint(model, trial, run_folder, target, best)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "writ" not in str(error):  # torch.save on a full disk: "… failed
                raise  # writing file …"
            raise OSError(_not_written(target, error)) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _write_checkpoint(self, model: nn.Module, trial: Any, run_folder: Path, target: Path, best: str | None) -> None:
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        folder = run_folder / UNFINISHED / target.name
        self.state.best_model_checkpoint = self._best_checkpoint(target, best)
        self._add_to_checkpoint(folder)
        self.accelerator.wait_for_everyone()  # each rank has written its part
        if self.args.should_save:
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            self._check_parts(folder)
            publish(folder, target)
            logger.info("%s is complete", target)
            delete_old(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint, target)
        self.accelerator.wait_for_everyone()

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """The best checkpoint is beside the one that training resumes from, wherever the run's folder lies now."""
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            beside = Path(resume_from_checkpoint).with_name("its name is that of its step")
            self.state.best_model_checkpoint = self._best_checkpoint(beside, self.state.best_model_checkpoint)
        return found

    def _best_checkpoint(self, target: Path, before: str | None) -> str | None:
        if not self.state.best_global_step:
            return before
        best = target.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        return str(best) if best == target or best.exists() else before

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _add_to_checkpoint(self, folder: Path) -> None:
        """Write more into a checkpoint: all ranks call it, before the manifest."""
        if self.args.should_save and self.run_record is not None:
            (folder / RUN_FILE).write_text(json.dumps(self.run_record, indent=2) + "\n", encoding="utf-8")

    def _check_parts(self, folder: Path) -> None:
        """Refuse a folder that lacks a rank's part: this rank is about to rename it."""
        if self.args.world_size == 1 or self.args.save_only_model or self.args.save_on_each_node:
            return
        for rank in range(self.args.world_size):
            if not (folder / f"rng_state_{rank}.pth").exists():
                raise OSError(
                    f"rank {rank} has not written into {folder}: not all nodes share output_dir; put it on a shared "
                    "file system, or set --save_on_each_node True"
                )
