"""The house: small folders and files, one name for one thing, imports that only look down, folders with a map.

Nothing is imported: sources are parsed. A module is named as it is imported, a room is a folder.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("packing", "collate", "bert_pretrain")
MOST_FILES, MOST_LINES = 15, 450
MANY_FILES = {"bert_pretrain/attention/heads"}  # one mechanism a file
CATALOGUES = {
    "packing.packers": "packing.packers.table",
    "bert_pretrain.attention.heads": "bert_pretrain.attention.table",
}
"""Rooms of which a table names the files: to add one touches the file and the table, and no map."""

FLOORS = {
    "packing": [
        "numba_tools draws files",
        "histogram",
        "text",
        "packers.open_packs packers.filling packers.pricing packers.nnls packers.linear_program",
        "bounds",
        "plan",
        "packers",
        "assignment balance",
        "cohorts",
        "options",
        "source",
        "store",
        "dataset epochs stream unpack",
        "verify report",
        "command",
        "cli",
    ],
    "collate": [
        "views vocabulary columns device.host",
        "length_groups chunks",
        "layout",
        "losses device",
        "isolation",
        "probe isolate",
        "heads",
        "collator rows masking mask_rows words",
        "training",
    ],
    "bert_pretrain": [
        "attention.options moving",
        "attention.head",
        "attention.parts",
        "attention.heads",
        "attention",
        "block.branches block.placements block.norms block.initial",
        "block.reversible",
        "block.streams block.feed_forwards",
        "block.options",
        "block",
        "model",
        "objective stand_in options places",
        "prepare train",
        "cli",
    ],
}
"""From the ground up: rooms, and modules that stand alone. A module imports from its own room and from lower floors."""

OPEN: dict[str, dict[str, str]] = {}
"""{rule: {what still breaks it: who mends it}}"""

MEANT = {
    "upward": {"collate.collator -> collate.training.plain_trainer": "collator.callback() imports it when called"},
}
"""{rule: {what breaks it on purpose: why}}"""


@cache
def modules() -> dict[str, Path]:
    """{"packing.files": packing/files/__init__.py, "packing.files.paths": …}"""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


@cache
def rooms() -> list[Path]:
    return sorted({file.parent for file in modules().values()})


def is_for_types(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(node: ast.AST) -> list[str]:
    """What a node imports wherever it stands, except for types only: names of modules, or of what is in them."""
    if is_for_types(node):
        return [name for other in node.orelse for name in imported(other)]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, f"line {node.lineno}: a relative import"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for child in ast.iter_child_nodes(node) for name in imported(child)]


@cache
def imports() -> dict[str, set[str]]:
    """{module: modules of ours that it imports}"""
    found: dict[str, set[str]] = defaultdict(set)
    for name in modules():
        if name in PACKAGES:  # its names load when first used
            continue
        for target in imported(parsed(name)):
            while target and target not in modules():
                target = target.rpartition(".")[0]
            if target and target != name:
                found[name].add(target)
    return found


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    """The arrows that lie on a circle: a -> b -> c -> b gives {"b -> c", "c -> b"}"""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for target in graph.get(waiting.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        return seen

    reach = {name: reached(name) for name in graph}
    return {f"{a} -> {b}" for a in graph for b in graph[a] if a in reach.get(b, ())}


def test_circles_are_found():
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b -> c", "c -> b"}


def check(kind: str, found: set[str]) -> None:
    known = OPEN.get(kind, {}).keys() | MEANT.get(kind, {}).keys()
    assert found == known, "\n".join(
        [kind, *(f"new: {each}" for each in sorted(found - known)), *sorted(known - found)]
    )


def test_a_folder_has_few_files():
    counts = {str(room.relative_to(ROOT)): len(list(room.glob("*.py"))) for room in rooms()}
    check("folder", {name for name, n in counts.items() if n > MOST_FILES and name not in MANY_FILES})


def test_a_file_has_few_lines():
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules().items()}
    check("lines", {name for name, n in lines.items() if n > MOST_LINES})


def test_a_name_is_defined_once():
    homes = defaultdict(list)
    for name in modules():
        for node in parsed(name).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    homes = {name: list(dict.fromkeys(where)) for name, where in homes.items()}  # overloads stand in one module
    check("name", {f"{name}: {' '.join(where)}" for name, where in homes.items() if len(where) > 1 and name != "main"})


def constants(name: str) -> dict[str, str]:
    """{"PADDING": "0"}: UPPER_CASE names that a module assigns, and their values as they are written."""
    found = {}
    for node in parsed(name).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = zip(target.elts, node.value.elts, strict=True) if both else [(target, node.value)]  # type: ignore
            found |= {ast.unparse(a): ast.unparse(b) for a, b in pairs if ast.unparse(a).isupper()}
    return found


def test_a_constant_that_others_import_has_one_meaning():
    """Names in `from … import NAME`: two modules may not give one such name other values."""
    meanings: dict[str, set[str]] = defaultdict(set)
    for name in modules():
        for constant, value in constants(name).items():
            meanings[constant].add(value)
    taken = {target.rpartition(".")[2] for name in modules() for target in imported(parsed(name))}
    check("constant", {constant for constant, values in meanings.items() if len(values) > 1 and constant in taken})


def test_no_circle_of_modules():
    check("circle", in_circles(imports()))


def place(name: str) -> tuple[str, int]:
    """The room of a module and its floor; -1 where FLOORS does not name it."""
    package, _, inside = name.partition(".")
    floors = {room: number for number, row in enumerate(FLOORS[package]) for room in row.split()}
    while inside and inside not in floors:
        inside = inside.rpartition(".")[0]
    return f"{package}.{inside}", floors.get(inside, -1)


def test_floors_name_modules_that_exist():
    rooms = {f"{package}.{room}" for package, rows in FLOORS.items() for row in rows for room in row.split()}
    assert rooms <= modules().keys()


def test_each_module_is_on_a_floor():
    check("no floor", {name for name in modules() if name not in PACKAGES and place(name)[1] < 0})


def looks_up(name: str, target: str) -> bool:
    """Into a later package, onto a higher floor, or to the own package's front door, which opens on all floors."""
    package, other = (PACKAGES.index(module.partition(".")[0]) for module in (name, target))
    if package != other:
        return other > package
    return target in PACKAGES or place(target)[1] > place(name)[1]


def test_no_import_looks_up():
    found = {
        f"{name} -> {target}" for name, targets in imports().items() for target in targets if looks_up(name, target)
    }
    check("upward", found)


def test_no_circle_of_rooms():
    """Where no import looks up, rooms of one floor are left."""
    graph: dict[str, set[str]] = defaultdict(set)
    for name, targets in imports().items():
        graph[place(name)[0]] |= {place(target)[0] for target in targets if not looks_up(name, target)}
    graph = {room: targets - {room} for room, targets in graph.items()}
    check("circle of rooms", in_circles(graph))


def is_logic(node: ast.stmt) -> bool:
    """Anything but a docstring, imports and __all__."""
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets] != ["__all__"]
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return not (isinstance(node, ast.Import | ast.ImportFrom) or is_docstring or is_for_types(node))


def test_a_folder_has_a_map_and_no_logic():
    logic, unnamed = set(), set()
    for room in rooms():
        name = ".".join(room.relative_to(ROOT).parts)
        in_table = imports()[CATALOGUES[name]] if name in CATALOGUES else set()
        map_ = ast.get_docstring(parsed(name)) or ""
        inside = {m for m in modules() if m.rpartition(".")[0] == name} - in_table
        unnamed |= {module for module in inside if not is_on(map_, module.rpartition(".")[2])}
        if name not in PACKAGES and any(is_logic(node) for node in parsed(name).body):
            logic.add(name)
    check("map", unnamed)
    check("logic", logic)


def is_on(map_: str, part: str) -> bool:
    """A line of the map begins with the part: `paths     a path or a URL`, or `gather, batch    …`, or `parts/ …`."""
    heads = [line.strip().split("  ")[0] for line in map_.splitlines()]
    return any(part in head.replace("/", "").replace(",", " ").split() for head in heads)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("packing", "torch transformers datasets numba"),
        ("packing.cli", "torch transformers datasets numba"),
        ("packing.dataset", "torch transformers"),
        ("collate", "transformers"),
        ("bert_pretrain", "torch transformers datasets"),
        ("bert_pretrain.cli", "torch transformers"),
    ],
)
def test_imports_are_light(module, heavy):
    code = f"import sys, {module}; print(*sys.modules.keys() & set({heavy.split()}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []
