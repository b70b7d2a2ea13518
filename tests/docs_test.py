"""What the pages say is there: links, functions, imports; and the notebook runs."""

import importlib
import os
import re

import pytest

from tests.places import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)[^)]*\)")


def test_links_lead_to_files():
    links = [(page, path) for page in PAGES for _, path in LINK.findall(page.read_text())]
    assert len(links) > 20
    assert [(page.name, path) for page, path in links if not (page.parent / path).exists()] == []


def test_functions_that_the_readme_links_to_are_in_those_files():
    links = LINK.findall((ROOT / "README.md").read_text())
    names = [x for x in links if x[1][-3:] == ".py" and re.match(r"`\w+`$", x[0])]
    assert len(names) > 10
    for name, path in ((quoted[1:-1], path) for quoted, path in names):
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        assert hasattr(module, name), f"README.md: {name} is not in {path}"


def test_imports_of_the_readme_work():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    imports = [line for block in blocks for line in block.splitlines() if "import " in line]
    assert imports
    exec("\n".join(imports))


def test_the_notebook_runs(monkeypatch):
    reason = "nbclient is missing: pip install -r requirements.lock"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    stored = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(stored), "docs/tour.ipynb: clear the outputs before it is committed"

    # One device, as a reader has; code is still compiled quickly instead of well.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    monkeypatch.setenv("XLA_FLAGS", flags)
    executed = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "docs")}}
    ).execute()

    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert re.search(r"[1-9]\d* people, embeddings of 32 numbers", printed)
    assert "the query among" in printed
