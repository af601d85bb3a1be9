"""Checks of the options of attention heads. Their errors have the name, the value, the limit and the cure.

    check_integer(options, "window", 0, "0 lets a token see itself only")

    LocalOptions: window=-1 must be a whole number, at least 0; 0 lets a token see itself only

People write configs by hand, in JSON: a "64" or a True is refused here, and not some layers later.
"""

import math
from collections.abc import Iterable

from packing.files.errors import whole_number

LARGEST_SEED = 2**32 - 1
"""numpy's limit. Heads derive their own seeds from it, which must stay within 64 bits."""


def check_integer(
    options: object, name: str, least: int, cure: str, most: int | None = None, optional: bool = False
) -> None:
    """Raise ValueError for an option that is no integer within its limits. optional: None is allowed, too."""
    value = getattr(options, name)
    if value is not None or not optional:
        whole_number(f"{type(options).__name__}: {name}", value, least, most, f"; {cure}")


def check_seed(options: object) -> None:
    """Raise ValueError for an option `seed` that cannot be one."""
    check_integer(options, "seed", 0, "give another one for other draws", most=LARGEST_SEED)


def check_number(options: object, name: str, limit: str, cure: str) -> None:
    """Raise ValueError for an option that is no finite number within its limit, one of LIMITS."""
    value = getattr(options, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not LIMITS[limit](value):
        raise ValueError(f"{type(options).__name__}: {name}={value!r} must be a number {limit}; {cure}")


LIMITS = {
    "above 0": lambda value: value > 0,
    "of at least 0": lambda value: value >= 0,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0 to below 1": lambda value: 0 <= value < 1,
}
"""The limits of `check_number`."""


def check_choice(options: object, name: str, choices: Iterable[str]) -> None:
    """Raise ValueError for an option that is not among the choices."""
    value = getattr(options, name)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{type(options).__name__}: {name}={value!r} is unknown; choose from {', '.join(choices)}")
