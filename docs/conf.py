"""How `make docs` renders these pages: Sphinx reads the Markdown, and the docstrings for the reference."""

from importlib import metadata

project = "dataset-packing"
release = metadata.version("dataset-packing")
copyright = "its authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3  # [text](page.md#heading) is checked
html_theme = "furo"
html_title = f"{project} {release}"

autodoc_default_options = {"members": True, "inherited-members": False}
autodoc_member_order = "alphabetical"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100


def as_drawn(app, what, name, object_, options, lines: list[str]) -> None:
    """Our docstrings are plain text with drawings: the first paragraph is prose, the rest keeps its line ends."""
    if "" not in lines:
        return
    end = lines.index("")
    rest = [f"   {line}" for line in lines[end + 1 :]]
    lines[:] = [*lines[:end], "", ".. code-block:: text", "", *rest, ""]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", as_drawn)
