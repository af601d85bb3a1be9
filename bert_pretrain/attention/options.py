"""The options of attention heads: each field says what it may be. Errors have name, value, limit and cure.

    window: int = whole(128, 0, "0 lets a token see itself only")

    LocalOptions: window=-1 must be a whole number, at least 0; 0 lets a token see itself only

People write configs by hand, in JSON: a "64" or a True is refused here, and not some layers later.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from packing.files.errors import whole_number

LARGEST_SEED = 2**32 - 1
"""numpy's limit. Heads derive their own seeds from it, which must stay within 64 bits."""

LIMITS: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: value > 0,
    "of at least 0": lambda value: value >= 0,
    "from 0 to 1": lambda value: 0 <= value <= 1,
    "from 0 to below 1": lambda value: 0 <= value < 1,
    "between 1.01 and 2": lambda value: 1.01 < value < 2,
}
"""The limits of `number`."""


@dataclass(frozen=True)
class HeadOptions:
    """The options of a head; as it is, for heads without any. Raises ValueError for what a field may not be."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if "check" in each.metadata:
                each.metadata["check"](f"{type(self).__name__}: {each.name}", getattr(self, each.name))


def _option(default: Any, check: Callable[[str, Any], object]) -> Any:
    return field(default=default, metadata={"check": check})


def whole(default: int | None, least: int, cure: str, most: int | None = None) -> Any:
    """A field for a whole number within limits, or None if that is its default."""

    def check(name: str, value: Any) -> None:
        if value is not None or default is not None:
            whole_number(name, value, least, most, f"; {cure}")

    return _option(default, check)


def seed_option() -> Any:
    """The field `seed` of heads that draw."""
    return whole(0, 0, "give another one for other draws", LARGEST_SEED)


def number(default: float, limit: str, cure: str) -> Any:
    """A field for a finite number within its limit, one of LIMITS."""

    def check(name: str, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not LIMITS[limit](value):
            raise ValueError(f"{name}={value!r} must be a number {limit}; {cure}")

    return _option(default, check)


def choice(default: str, choices: Iterable[str]) -> Any:
    """A field for one of the choices."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(choices)}")

    return _option(default, check)
