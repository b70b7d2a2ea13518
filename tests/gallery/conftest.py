"""Galleries: an empty one for each test, and the painted one with its page for each file."""

import importlib.util

import pytest

if all(map(importlib.util.find_spec, ("fastapi", "lancedb"))):
    from alignps_jax.gallery.gallery import Gallery
    from tests.gallery.page_server import Visitor, painted_site
    from tests.gallery.painted import Finder
else:  # without the extra gallery
    collect_ignore_glob = ["*_test.py"]


@pytest.fixture
def gallery(tmp_path):
    return Gallery.open(tmp_path / "people.lance", Finder(), create=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def site(folder):
    return painted_site(folder)


@pytest.fixture
def client(site):
    return Visitor(site)
