"""Python values -> an Arrow array that holds them unchanged, or an error that names the first value that would change.

pyarrow itself takes 0.5 for an integer type as 0, a datetime for a date without its time, a bool for a number, bytes
for text, and a dict without the keys that a struct does not name.

    [5, 0.5]     int64                 refused: 0.5
    [5, 0.5]     float64               [5.0, 0.5], equal in value
    [{"a": 1}]   struct<a, b>          [{"a": 1, "b": None}]
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from itertools import chain
from operator import is_not
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from packing.source.token_column import is_list

REFUSALS = (pa.ArrowException, TypeError, ValueError, OverflowError)  # UnicodeError is a ValueError

# Arrow type -> Python types of values that it holds unchanged, or that pyarrow refuses by itself.
ALWAYS_HELD = (
    (pa.types.is_integer, (int, np.integer)),
    (pa.types.is_float64, (float, np.float32, np.float16, int, np.integer)),
    (pa.types.is_floating, (int, np.integer)),
    (pa.types.is_boolean, (bool, np.bool_)),
    (pa.types.is_string, (str,)),
    (pa.types.is_large_string, (str,)),
    (pa.types.is_binary, (bytes, bytearray)),
    (pa.types.is_large_binary, (bytes, bytearray)),
)
BOOLEANS = (bool, np.bool_)
NO_LISTS = (str, bytes, bytearray, memoryview, dict)  # Arrow takes some for lists of numbers


class NotHeldError(ValueError):
    """row: of the first value that is not held unchanged. wanted: the type that was asked for; None: any."""

    def __init__(self, row: int, value: object, wanted: pa.DataType | None, why: str):
        self.row, self.value, self.wanted = row, value, wanted
        super().__init__(why)


def exact_array(values: Sequence, type_: pa.DataType | None = None, *, rounds: bool = False) -> pa.Array:
    """The values as an Arrow array. type_: None infers one. Raises NotHeldError.

    rounds: whether a float may be rounded to a narrower type of floats, where somebody has chosen that type.

    Tensors, and arrays of any number of dimensions, are the lists or the number that they hold.
    """
    try:
        array = pa.array(values, type_)
    except REFUSALS as error:
        plain = [_plain(value) for value in values]
        if any(map(is_not, plain, values)):
            return exact_array(plain, type_, rounds=rounds)
        row = next((i for i in range(len(values)) if not _converts(values[i : i + 1], type_)), None)
        if row is None:  # each value by itself has a type, but they have no common one
            row = next(i for i in range(len(values)) if not _converts(values[: i + 1], type_))
        raise NotHeldError(row, values[row], type_, str(error)) from None
    if not _is_held(values, array, rounds):
        row = next(i for i in range(len(values)) if not _is_held(values[i : i + 1], array.slice(i, 1), rounds))
        why = f"{array.type} would hold {_short(array[row].as_py())} instead of {_short(values[row])}"
        raise NotHeldError(row, values[row], type_, why)
    return array


def _plain(value: Any) -> Any:
    """A tensor, or an array, as lists of numbers, in lists and fields, too; what holds none is itself."""
    if isinstance(value, list | tuple):
        plain = [_plain(each) for each in value]
        return plain if any(map(is_not, plain, value)) else value
    if isinstance(value, dict):
        fields = {name: _plain(each) for name, each in value.items()}
        return fields if any(map(is_not, fields.values(), value.values())) else value
    is_array = hasattr(value, "__array__") and hasattr(value, "tolist") and not isinstance(value, np.generic)
    return value.tolist() if is_array else value


def _converts(values: Sequence, type_: pa.DataType | None) -> bool:
    try:
        pa.array(values, type_)
    except REFUSALS:
        return False
    return True


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_held(values: Sequence, array: pa.Array, rounds: bool) -> bool:
    kinds = set(map(type, values)) - {type(None)}
    if _by_kind(kinds, array.type):
        return True
    if rounds and pa.types.is_floating(array.type) and all(issubclass(kind, float | np.floating) for kind in kinds):
        return not pc.any(pc.is_inf(array)).as_py() or all(map(_is_rounded, values, array.to_pylist()))
    if is_list(array.type):
        lists = [value for value in values if value is not None]
        if len(lists) != len(array) - array.null_count or any(isinstance(each, NO_LISTS) for each in lists):
            return False
        inner = list(chain.from_iterable(each.tolist() if isinstance(each, np.ndarray) else each for each in lists))
        flat = array.flatten()
        return len(inner) == len(flat) and _is_held(inner, flat, rounds)
    if pa.types.is_struct(array.type):
        return _fields_are_held([value for value in values if value is not None], array.drop_null(), rounds)
    return all(_same(value, held, rounds) for value, held in zip(values, array.to_pylist(), strict=True))


def _by_kind(kinds: set[type], type_: pa.DataType) -> bool:
    """Whether Python types alone say that all values are held."""
    if any(issubclass(kind, BOOLEANS) for kind in kinds) and not pa.types.is_boolean(type_):
        return False
    held = next((held for is_kind, held in ALWAYS_HELD if is_kind(type_)), ())
    return all(issubclass(kind, held) for kind in kinds)


def _fields_are_held(rows: list, structs: pa.StructArray, rounds: bool) -> bool:
    """A row may lack a field, which is null then, but it has no other."""
    names = [field.name for field in structs.type]
    if len(rows) != len(structs) or not all(isinstance(row, dict) and row.keys() <= {*names} for row in rows):
        return False
    fields = zip(names, structs.flatten(), strict=True)
    return all(_is_held([row.get(name) for row in rows], field, rounds) for name, field in fields)


def _same(value: Any, held: Any, rounds: bool) -> bool:
    """Whether a value is what Arrow gives back: equal, and not a bool for a number, or a date for a time."""
    if held is None:
        return value is None or type(value).__name__ in ("NaTType", "NAType")
    if isinstance(value, np.generic):
        try:
            value = pa.scalar(value).as_py()
        except REFUSALS:  # a number of more bits, say, or a time that Python has not
            return False
    for kind in (bool, str, bytes, datetime.datetime):
        if isinstance(value, kind) != isinstance(held, kind):
            return False
    if isinstance(value, float) and isinstance(held, float) and rounds:
        return _is_rounded(value, held)
    return bool(value == held) or (value != value and held != held)  # nan is nan


def _is_rounded(value: float | None, held: float | None) -> bool:
    """Whether a float of fewer bits is the nearest one: infinity is that of infinity alone."""
    return held is None or value is None or math.isinf(held) <= math.isinf(value)
