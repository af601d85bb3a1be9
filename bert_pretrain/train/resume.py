"""Which checkpoint a run resumes, and whether it is one of the same run."""

import logging
import os
from contextlib import suppress
from pathlib import Path

from transformers import TrainingArguments

from bert_pretrain.attention import ATTENTION
from bert_pretrain.train.config import AUTO
from bert_pretrain.train.run_record import CHOSEN
from collate.training.agreement import agreed
from collate.training.checkpoints import RUN_FILE, DamagedCheckpoint, check_checkpoint, last_checkpoint, newest_first
from packing.files.errors import Option, OptionError
from packing.files.metadata import read_json

logger = logging.getLogger(__name__)

CONTENTS = ("dataset", "tokenizer")
"""Parts that are compared as a whole: a missing or a new value is a difference, too."""
RESUME_OR_START = "give the old value to resume, or another output_dir to start again"


def find_checkpoint(record: dict[str, dict] | None, training: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the one asked for, or the last in output_dir; None: the run starts.

    record: of `run_record`; None on the ranks that do not look. One rank looks and reads the files, see `agreed`.
    Raises DamagedCheckpoint, and ValueError for a checkpoint, or a finished run in output_dir, of another run.
    """

    def look() -> str | None:
        assert record is not None
        folder, checkpoint = Path(str(training.output_dir)), _complete_checkpoint(training)
        if checkpoint is not None:
            _check_parts(checkpoint)
            _check_record(checkpoint, record)
        if (folder / RUN_FILE).exists():  # checkpoints may be missing
            _check_record(folder, record, "its model would be overwritten: give another output_dir, or delete this one")
        return None if checkpoint is None else os.fspath(checkpoint)

    found = agreed(training, look)
    if found is not None:
        logger.info("resuming from %s", found)
    return found


def recorded_run(training: TrainingArguments) -> dict[str, dict] | None:
    """What the run that resumes recorded, for the choices that it keeps; None: a new run.

    `find_checkpoint` checks the record later, and says what is wrong with it.
    """

    def look() -> dict[str, dict] | None:
        asked_for, output = training.resume_from_checkpoint, Path(str(training.output_dir))
        folders = [*newest_first(output), output] if asked_for is None else [Path(asked_for)]
        for folder in folders:
            if (folder / RUN_FILE).is_file():
                with suppress(ValueError):
                    return _read_record(folder / RUN_FILE)
        return None

    return agreed(training, look)


def _complete_checkpoint(training: TrainingArguments) -> Path | None:
    asked_for = training.resume_from_checkpoint
    if asked_for is None:
        return last_checkpoint(str(training.output_dir))
    if not os.path.isdir(asked_for):
        raise OptionError(
            f"{Option('resume_from_checkpoint', asked_for)} is no folder; name a checkpoint-N folder, or leave it out: "
            f"a run resumes the last one in {Option('output_dir')} by itself"
        )
    try:
        check_checkpoint(asked_for)
    except DamagedCheckpoint as damage:
        raise DamagedCheckpoint(f"{damage}; name another checkpoint-N folder") from None
    return Path(asked_for)


def _check_parts(checkpoint: Path) -> None:
    """Raise ValueError where a part is missing that Trainer would continue without."""
    names = {path.name for path in checkpoint.iterdir()}
    cure = "give it as --model to start a new run with its parameters"
    if RUN_FILE not in names:
        raise ValueError(f"{checkpoint} has no {RUN_FILE}, so bert-pretrain train did not write it; {cure}")
    if not any(name.startswith(("optimizer", "global_step")) for name in names):  # deepspeed: global_step8
        raise OptionError(
            f"{checkpoint} has no optimizer state ({Option('save_only_model', True)}), so training cannot continue as "
            f"it was; {cure}"
        )


def _check_record(folder: Path, record: dict[str, dict], cure: str = RESUME_OR_START) -> None:
    saved = _read_record(folder / RUN_FILE)
    for part, values in record.items():
        if part == CHOSEN:
            continue
        if part in CONTENTS and part not in saved:
            raise OptionError(
                f"{folder}/{RUN_FILE} does not say what its {part} held: an earlier version wrote it; start again in "
                f"another {Option('output_dir')}, with --model to continue from its parameters"
            )
        before = saved.get(part, {})
        names = {**values, **before} if part in CONTENTS else values
        default = {} if part in CONTENTS else values  # an older version lacks newer options
        pairs = {name: (before.get(name, default.get(name)), values.get(name)) for name in names}
        _check_part(folder, part, {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}, record, cure)


def _read_record(file: Path) -> dict[str, dict]:
    try:
        saved = read_json(file)
        if isinstance(saved, dict) and all(isinstance(part, dict) for part in saved.values()):
            return saved
        found = "it is no record of a run"
    except ValueError as error:
        found = str(error)
    raise ValueError(f"{file} is damaged ({found}); delete it if its folder may be overwritten, or choose another")


def _check_part(folder: Path, part: str, changed: dict[str, tuple], record: dict[str, dict], cure: str) -> None:
    """changed: {name: (before, now)}."""
    if part == "best" and not record["best"]["load_best_model_at_end"]:
        return
    is_option = part not in (*CONTENTS, "model")
    for name, (before, now) in changed.items():
        if part == "versions":
            logger.warning("%s was trained with %s %s, now it is %s: numbers may differ", folder, name, before, now)
        elif name == "attention" and _attend_alike(before, now, record["config"]["attention_probs_dropout_prob"]):
            logger.info("attention: %s was trained with %s, now it is %s: the same function", folder, before, now)
        else:
            given = Option(name, before) if is_option else f"{part} {name}={before!r}"
            raise OptionError(f"{folder} was trained with {given}, now it is {now!r}; {cure}")


def _attend_alike(before: str, now: str, dropout: float | None) -> bool:
    """ "local, varlen", "local, auto" -> True: heads of full attention differ in rounding alone.

    Earlier versions recorded what "auto" chose. Where no dropout is given, it depends on the head's name.
    """
    full = {AUTO} | {name for name, head in ATTENTION.items() if getattr(head, "is_full", False)}
    heads = [[name.strip() for name in names.split(",")] for names in (before, now)]
    old, new = (["full" if name in full else name for name in names] for names in heads)
    return dropout is not None and old == new
