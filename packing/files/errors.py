"""What errors say in one way everywhere: where a source is wrong, which whole numbers may be, what the user meant.

split 'train': row 3      has length 0: its input_ids are empty; filter such rows out before packing
num_proc=0                must be a whole number, at least 1
--max-sequnce-length      ; did you mean --max-sequence-length?
column 'inputs_ids'       ; did you mean 'input_ids'?
folder 'tokenizd/train'   ; did you mean 'tokenized/train'?
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "\ufdd0"  # a noncharacter of Unicode: no text has it, and repr() escapes it


class Option(str):
    """An option that an error names: a str as Python has it, with `flag` as the command has it.

    Option("overlong", "drop")    overlong='drop'    --overlong drop
    Option("pad_token_id")        pad_token_id       --pad-token-id

    In an f-string it is both, between marks: an OptionError made of the f-string prints one of them.
    """

    flag: str

    def __new__(cls, name: str, *value: object) -> Option:
        option = super().__new__(cls, "=".join([name, *map(repr, value)]))
        option.flag = " ".join([f"--{name.replace('_', '-')}", *map(str, value)])
        return option

    def __format__(self, spec: str) -> str:
        return f"{MARK}{self!s}{MARK}{self.flag}{MARK}"


class OptionError(ValueError):
    """An error that names options, in the words of its reader.

    OptionError(f"{Option('num_proc', 0)} must be at least 1")    str()           num_proc=0 must be at least 1
                                                                  in_command()    --num-proc 0 must be at least 1
    """

    def marked(self) -> str:
        """The sentence with both spellings of each option, for a larger OptionError."""
        return self.args[0]

    def __str__(self) -> str:
        return self._spelled(0)

    def in_command(self) -> str:
        """The sentence for someone who types options."""
        return self._spelled(1)

    def _spelled(self, which: int) -> str:
        parts = self.marked().split(MARK)  # text, Python's, the command's, text, …
        return "".join(part for i, part in enumerate(parts) if i % 3 in (0, 1 + which))


def marked(error: BaseException) -> str:
    """What an error says, for an OptionError that says more."""
    return error.marked() if isinstance(error, OptionError) else str(error)


def said_in_command(error: BaseException) -> str:
    """What a command prints of an error: its sentence, and its notes, say how to resume."""
    said = error.in_command() if isinstance(error, OptionError) else str(error)
    return "; ".join([said, *notes(error)])


def notes(error: BaseException) -> list[str]:
    """What was added to an error on its way."""
    return getattr(error, "__notes__", [])


class SourceError(OptionError):
    """A fault of a source: where it is, what it is, and the cure. str() says all of it in one sentence.

        SourceError("has 9 values, and input_ids has 8", column="tags", row=3, split="train", cure="make them alike")
        split 'train': column 'tags' in row 3 has 9 values, and input_ids has 8; make them alike

    what: the end of a sentence about the place: the file, the column and the row, as far as they are given.
    unit: what `row` counts, say lines of a text file.

    Who knows more about the place says it later: split, and hint, how to find the row.
    """

    hint = ""

    def __init__(
        self,
        what: str,
        *,
        cure: str = "",
        file: object = None,
        split: str = "",
        column: str | None = None,
        row: int | None = None,
        unit: str = "row",
    ):
        super().__init__(what)
        self.what, self.cure, self.split, self.column, self.unit = what, cure, split, column, unit
        self.file = None if file is None else str(file)
        self.row = None if row is None else int(row)

    def marked(self) -> str:
        places = [] if self.column is None else [f"column {self.column!r}"]
        places += [] if self.row is None else [f"{self.unit} {self.row}"]
        split, cure = f"split {self.split!r}: " if self.split else "", f"; {self.cure}" if self.cure else ""
        place = [part for part in (repr(self.file) if self.file else "", " in ".join(places)) if part]
        return split + " ".join([*place, self.what]) + cure + (f" ({self.hint})" if self.hint else "")

    def __reduce__(self) -> tuple:  # between processes, with all that is known
        return _remake, (type(self), self.what, self.__dict__)


def _remake(kind: type[SourceError], what: str, known: dict) -> SourceError:
    error = kind.__new__(kind, what)
    error.__dict__.update(known)
    return error


@contextmanager
def in_split(name: str) -> Iterator[None]:
    """An error that comes from here names this split; "" is a source without splits."""
    try:
        yield
    except SourceError as error:
        error.split = name
        raise
    except ValueError as error:
        if name:
            error.add_note(f"this was split {name!r}")
        raise


def suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message: "; did you mean …?" with the known name nearest to `name`; `otherwise` if none is near.

    An option (--seed) is written as it is, any other name in quotes.
    """
    near = _nearest(name, known, 1)
    if not near:
        return otherwise
    return f"; did you mean {near[0] if near[0].startswith('--') else repr(near[0])}?"


def check_known(name: str, value: object, choices: Iterable[str], more: str = "") -> None:
    """Raise ValueError for a value that is not among the choices. more: what else may be given.

    check_known("packer", "optimel", PACKERS)  ->  unknown packer 'optimel'; did you mean 'optimal'?; choose from …
    """
    if value not in (known := list(choices)):
        near = suggestion(str(value), known)
        raise ValueError(f"unknown {name} {value!r}{near}; choose from {', '.join(known)}{more}")


def path_suggestion(name: object, *, only_folders: bool = False) -> str:
    """The same for a path that does not exist: the nearest one that does; "" for a URL."""
    near = None if "://" in str(name) else near_path(str(name), only_folders=only_folders)
    return "" if near is None else f"; did you mean {str(near)!r}?"


def near_path(name: str, *, only_folders: bool = False) -> Path | None:
    """An existing path that differs from `name` by a few letters, in its first part that does not exist."""
    path = Path(name).expanduser()
    missing = next((part for part in reversed([path, *path.parents]) if not part.exists()), None)
    if missing is None or not missing.parent.is_dir():
        return None
    for near in _nearest(missing.name, (entry.name for entry in missing.parent.iterdir()), 3):
        found = missing.parent / near / path.relative_to(missing)
        if found.is_dir() or (found.exists() and not only_folders):
            return found
    return None


def _nearest(name: str, known: Iterable[str], most: int) -> list[str]:
    """Up to `most` known names that look like `name`, in any case of letters; the nearest one first."""
    spellings = {spelling.casefold(): spelling for spelling in sorted(known)}
    return [spellings[near] for near in difflib.get_close_matches(name.casefold(), spellings, most)]


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None, cure: str = "") -> int:
    """The value as an int. Raises ValueError for what is no whole number in least..most; None: no upper limit.

    cure: what follows the limit in the error, with its own comma or colon.

    whole_number("num_proc", 0)  ->  num_proc=0 must be a whole number, at least 1
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"{_power(least)} to {_power(most)}"
        raise OptionError(f"{Option(name, value)} must be a whole number, {limit}{cure}")
    return int(value)


def _power(limit: int) -> str:
    """How a limit reads best: 9 -> "9", 65536 -> "65,536", 2**64 - 1 -> "2**64 - 1", -(2**63) -> "-(2**63)"."""
    if limit < 0:
        return f"-({_power(-limit)})"
    for size, rest in ((limit, ""), (limit + 1, " - 1")):
        if size >= 2**31 and size & (size - 1) == 0:
            return f"2**{size.bit_length() - 1}{rest}"
    return f"{limit:,}"
