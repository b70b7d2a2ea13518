"""The painted gallery and a visitor to its page, made anew for each file of tests."""

import pytest

from tests.gallery.page_server import painted_site, visitor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def site(folder):
    return painted_site(folder)


@pytest.fixture
def client(site):
    return visitor(site)
