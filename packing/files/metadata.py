"""Reading what programs write about data (manifest.json, state.json …), whatever it holds: a value, or ValueError.

A file is read if it is one (no pipe), has MAX_BYTES at most and nests MAX_DEPTH deep at most: whoever works on it
recursively comes to an end.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path

from packing.files.names import check_is_file

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from packing.files.paths import Place

MAX_BYTES = 1 << 30  # a manifest of five million shards, or the numbers of a hundred million rows that were too long
MAX_DEPTH = 64
MAX_WHOLE = 1 << 64  # a seed is below
LARGEST = 1e308
SHOWN = 60  # characters of a value in an error

T = typing.TypeVar("T", bound="DataclassInstance")


def read_json(path: Place) -> object:
    """The content of a JSON file, a Path or a RemotePath.

    Raises FileNotFoundError where there is none, and ValueError, which names it, for what is no such JSON."""
    if isinstance(path, Path):
        check_is_file(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{str(path)!r} has {size:,} bytes, and {MAX_BYTES:,} are read at most; make it again")
    return parse_json(path.read_bytes(), repr(str(path)))


def parse_json(text: str | bytes, what: str) -> object:
    """The value that a JSON text says. what: whose it is, for errors."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_too_deep(what)) from None
    except ValueError as error:
        raise ValueError(f"{what} is damaged: it is no JSON ({error}); make it again") from None
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(_too_deep(what))
    return value


def _too_deep(what: str) -> str:
    return f"{what} is damaged: it nests more than {MAX_DEPTH} lists or objects in each other; make it again"


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        inside = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [value for values in inside for value in values]
        if not level:
            return False
    return True


def build(cls: type[T], content: object, what: str, **names: type) -> T:
    """A dataclass from the JSON object of its fields, each of the type that it is annotated with.

    {"file": "a.arrow", "packs": 3} -> ShardRecord(file="a.arrow", packs=3)

    Numbers are whole and not negative where the annotation is int. names: types that annotations name without the
    class's module having them. Raises ValueError that names the field."""
    if not isinstance(content, dict):
        raise ValueError(f"{what} is {shown(content)}, and no object of its fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = {name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING}
    if other := sorted((required - set(content)) | (set(content) - set(fields))):
        lacks = "lacks" if other[0] in fields else "has a field"
        raise ValueError(f"{what} {lacks} {other[0]!r}")
    hints = typing.get_type_hints(cls, localns=names)
    return cls(**{name: _typed(value, hints[name], f"{what}: {name}") for name, value in content.items()})


def _typed(value: typing.Any, hint: typing.Any, what: str) -> typing.Any:
    """The value, if the annotation allows it; lists become tuples, objects dataclasses."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        (hint,) = (other for other in inner if other is not type(None))
        return _typed(value, hint, what)
    if kind is tuple and isinstance(value, list):
        if inner[0] in (int, str) and set(map(type, value)) <= {inner[0]} and _in_range(value):  # quick, of many
            return tuple(value)
        return tuple(_typed(element, inner[0], f"{what}[{i}]") for i, element in enumerate(value))
    if kind is dict and isinstance(value, dict):
        return {name: _typed(element, inner[1], f"{what}[{name!r}]") for name, element in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, what)
    if hint is int and type(value) is int and 0 <= value < MAX_WHOLE:
        return value
    if hint is float and type(value) in (int, float) and abs(value) < LARGEST:
        return value
    if hint in (str, dict, type(None)) and isinstance(value, hint):
        return value
    wanted = getattr(hint, "__name__", None) if kind is None else str(hint)
    raise ValueError(f"{what} is {shown(value)}, which is no {wanted}")


def _in_range(values: list) -> bool:
    return not values or isinstance(values[0], str) or (min(values) >= 0 and max(values) < MAX_WHOLE)


def shown(value: object) -> str:
    """A value in an error, cut short."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
