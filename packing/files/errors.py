"""What errors say in one way everywhere: what the user may have meant.

--max-sequnce-length      ; did you mean --max-sequence-length?
column 'inputs_ids'       ; did you mean 'input_ids'?
folder 'tokenizd/train'   ; did you mean 'tokenized/train'?
"""

from __future__ import annotations

import difflib
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
