"""The painted gallery and a visitor to its page, made anew for each file of tests."""

import importlib.util

import pytest

if not all(map(importlib.util.find_spec, ("fastapi", "lancedb"))):  # the extra gallery
    collect_ignore_glob = ["page_*test.py", "browser_*test.py"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def site(folder):
    # Imported here: other tests of this folder do without the extra gallery.
    from tests.gallery.page_server import painted_site

    return painted_site(folder)


@pytest.fixture
def client(site):
    from tests.gallery.page_server import Visitor

    return Visitor(site)
