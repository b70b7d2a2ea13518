"""Sphinx settings of `make docs`: these pages, and an API reference from the docstrings.

Nothing here needs a network or a list of modules that someone has to keep up to date.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYTHONPATH"] = str(ROOT)  # the notebook runs in a process of its own

PACKAGES = ("alignps_jax", "configs", "data_pipeline")
# Pages that are files of the root.
PAGES = {"README.md": "/index.md", "CHANGELOG.md": "/changelog.md"}

project = "AlignPS in JAX"
html_title = project
html_theme = "furo"
html_show_copyright = False
extensions = [
    "myst_nb",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "api/*/modules.rst"]
# Tables of `--mode=reproduce` begin with a heading of the second level; a short name in an
# annotation may belong to two classes.
suppress_warnings = ["myst.header", "ref.python"]
default_role = "code"  # `name` in a docstring is code

apidoc_modules = [
    {
        "path": str(ROOT / package),
        "destination": f"api/{package}",
        "separate_modules": True,
        "module_first": True,
    }
    for package in PACKAGES
]
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
maximum_signature_line_length = 90

myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"  # progress bars

_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def _target(path: str) -> str:
    """Where a page below docs/ finds a file of the repository: its API page if it has one."""
    path, sharp, heading = path.partition("#")
    file = (ROOT / path).resolve().relative_to(ROOT)
    if file.suffix == ".py" and file.parts[0] in PACKAGES:
        return f"/api/{file.parts[0]}/{'.'.join(file.with_suffix('').parts)}.rst"
    if str(file) in PAGES:
        return PAGES[str(file)] + sharp + heading
    page = f"/{file.relative_to('docs')}" if file.parts[0] == "docs" else f"/../{file}"
    return page + sharp + heading


def _read_page(_: object, page: str, source: list[str]) -> None:
    """The first page begins with the README; links to the code lead to the API reference."""
    if page.startswith("api/"):
        return
    folder = (Path("docs") / page).parent
    if page == "index":
        source[0] = (ROOT / "README.md").read_text() + source[0]
        folder = Path()
    elif page == "changelog":
        source[0] = (ROOT / "CHANGELOG.md").read_text()
        folder = Path()
    source[0] = _LINK.sub(lambda link: f"]({_target(str(folder / link[1]))})", source[0])


def _read_docstring(*event: Any) -> None:
    """Docstrings are plain text: what reStructuredText would take amiss is said in its way.

    A formula, which stands indented below an empty line, becomes a literal block, and a letter may
    follow a name in backquotes.
    """
    lines = event[-1]
    text = re.sub(r"(`[^`\n]+`)(?=\w)", r"\1\\ ", "\n".join(lines))
    text = re.sub(r"(?m)^(\S.*)\n\n(?= {4}\S)", r"\1\n\n::\n\n", text)
    lines[:] = text.split("\n")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _read_page)
    app.connect("autodoc-process-docstring", _read_docstring, priority=100)  # before napoleon
