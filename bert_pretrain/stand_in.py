"""A dataclass read from its source, where importing it takes ten seconds: fields, defaults, choices and help.

    stand_in("transformers.training_args", "TrainingArguments")  ->  a dataclass with the same fields, and nothing else

So --help and errors about options answer at once. A run imports the real class.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import field, make_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, Literal


def stand_in(module: str, class_name: str) -> type | None:
    """A dataclass with the fields of another one; None where its source does not name them all."""
    file = _file(module)
    if file is None:
        return None  # importing it gives the error
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = _class(tree, class_name)
    if found is None or found.bases:
        return None
    known = {"Any": Any, "Literal": Literal} | _constants(found)
    members = []
    for line in found.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            kind = _evaluated(line.annotation, known | _enums(line.annotation, tree, file), str | None)
            members.append((line.target.id, kind, _field(line.value, known)))
    return make_dataclass(class_name, members, kw_only=True)


def _file(module: str) -> Path | None:
    """The file of a module, without importing it: only its package is looked up."""
    package, _, inside = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / f"{inside.replace('.', '/')}.py"


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _constants(found: ast.ClassDef) -> dict[str, Any]:
    """Values that the body of the class names, unless it gives one of them another value under an `if`."""
    lines = [node for node in ast.walk(found) if isinstance(node, ast.Assign)]
    names = [ast.unparse(line.targets[0]) for line in lines]
    values = {name: _evaluated(line.value, {}, None) for name, line in zip(names, lines, strict=True)}
    return {name: value for name, value in values.items() if value is not None and names.count(name) == 1}


def _enums(annotation: ast.expr, tree: ast.Module, file: Path) -> dict[str, type]:
    """The enumerations that an annotation names, from this module or from those beside it that it imports."""
    enums: dict[str, Any] = {}
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name) and (found := _find_enum(node.id, tree, file)):
            pairs = [(ast.unparse(line.targets[0]), ast.literal_eval(line.value)) for line in found]
            enums[node.id] = Enum(node.id, pairs, type=str)
    return enums


def _find_enum(name: str, tree: ast.Module, file: Path) -> list[ast.Assign]:
    """The members of an enumeration; [] where no such one is found."""
    for other in (tree, *_imported_from(name, tree, file)):
        if found := _class(other, name):
            lines = [line for line in found.body if isinstance(line, ast.Assign)]
            return [line for line in lines if isinstance(getattr(line.value, "value", None), str)]
    return []


def _imported_from(name: str, tree: ast.Module, file: Path) -> Iterator[ast.Module]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in (alias.name for alias in node.names):
            beside = file.parent / f"{(node.module or '').replace('.', '/')}.py"
            if beside.exists():
                yield ast.parse(beside.read_text(encoding="utf-8"))


def _field(value: ast.expr | None, known: dict[str, Any]) -> Any:
    """field(default=…, metadata={…}), as far as the source tells; an unknown default becomes None."""
    if not isinstance(value, ast.Call):
        return field() if value is None else field(default=_evaluated(value, known, None))
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    metadata = given.get("metadata")
    about = {}
    if isinstance(metadata, ast.Dict):
        pairs = zip(metadata.keys, metadata.values, strict=True)
        about = {ast.literal_eval(key): _evaluated(what, known, None) for key, what in pairs if key is not None}
    about = {key: what for key, what in about.items() if what is not None}
    if "default_factory" in given:
        return field(default_factory=_evaluated(given["default_factory"], known, NoneType), metadata=about)
    if "default" not in given:
        return field(metadata=about)
    return field(default=_evaluated(given["default"], known, None), metadata=about)


def _evaluated(node: ast.expr, known: dict[str, Any], otherwise: Any) -> Any:
    """The value of an expression; `otherwise` where it uses names that are not known."""
    try:
        return eval(compile(ast.Expression(node), "", "eval"), {"__builtins__": BUILTINS}, known)
    except (NameError, TypeError, AttributeError):
        return otherwise


BUILTINS = {kind.__name__: kind for kind in (str, int, float, bool, list, dict)}
