"""Galleries: an empty one for each test, and the painted one with its page for each file."""

import pytest

from alignps_jax.gallery.gallery import Gallery
from tests.gallery.page_server import painted_site, visitor
from tests.gallery.painted import Finder


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
    return visitor(site)
