"""What errors say in one way everywhere: which whole numbers may be, and what the user may have meant.

num_proc=0                must be a whole number, at least 1
--max-sequnce-length      ; did you mean --max-sequence-length?
column 'inputs_ids'       ; did you mean 'input_ids'?
folder 'tokenizd/train'   ; did you mean 'tokenized/train'?
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable
from pathlib import Path


def suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message: "; did you mean …?" with the known name nearest to `name`; `otherwise` if none is near.

    An option (--seed) is written as it is, any other name in quotes.
    """
    near = _nearest(name, known, 1)
    if not near:
        return otherwise
    return f"; did you mean {near[0] if near[0].startswith('--') else repr(near[0])}?"


def path_suggestion(name: str, *, only_folders: bool = False) -> str:
    """The same for a path that does not exist: the nearest one that does, or ""."""
    near = near_path(name, only_folders=only_folders)
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


def whole_number(name: str, value: object, least: int = 1, most: int | None = None, cure: str = "") -> int:
    """The value as an int. Raises ValueError for what is no whole number in least..most; None: no upper limit.

    cure: what follows the limit in the error, with its own comma or colon.

    whole_number("num_proc", 0)  ->  num_proc=0 must be a whole number, at least 1
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"{_power(least)} to {_power(most)}"
        raise ValueError(f"{name}={value!r} must be a whole number, {limit}{cure}")
    return int(value)


def _power(limit: int) -> str:
    """How a limit reads best: 9 -> "9", 65536 -> "65,536", 2**64 - 1 -> "2**64 - 1", -(2**63) -> "-(2**63)"."""
    if limit < 0:
        return f"-({_power(-limit)})"
    for size, rest in ((limit, ""), (limit + 1, " - 1")):
        if size >= 2**31 and size & (size - 1) == 0:
            return f"2**{size.bit_length() - 1}{rest}"
    return f"{limit:,}"
