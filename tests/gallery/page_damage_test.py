"""What a stranger may send to the page: damaged photos and odd values are refused, not met."""

from __future__ import annotations

from urllib.parse import quote

import pytest

pytest.importorskip("fastapi", reason="the extra gallery is missing: make setup")
pytest.importorskip("lancedb", reason="the extra gallery is missing: make setup")

from hypothesis import given
from hypothesis import strategies as st

from tests.data_pipeline.sources.damaged_test import CHANGES, QUICK, damage
from tests.gallery.page_server import people, upload, uploaded
from tests.gallery.painted import BLUE, RED, encoded, painted

PHOTO = painted((RED, (20, 60)), (BLUE, (90, 60)), size=(150, 160))
ODD = st.sampled_from(["nan", "1e999", "-1", "2" * 400, "../x", "0-0", "%00", "10,20,60,140"])
VALUES = st.one_of(st.characters(codec="utf-8").map(lambda x: 3 * x), ODD)
FORMS = {"/mark": ("view", "person", "mark"), "/scene/{}/box": ("box", "view")}
PAGES = {
    "/search": ("view", "combine", "camera", "after", "score"),
    "/results": ("view", "offset"),
    "/scenes": ("offset", "kind"),
    "/scene/{}": ("person",),
    "/responsible-use": ("next",),
}


@QUICK
@given(suffix=st.sampled_from([".jpg", ".png", ".bmp", ".webp", ".tif"]), changes=CHANGES)
def test_damaged_photos(client, suffix, changes):
    answer = upload(client, damage(encoded(PHOTO, suffix), changes), f"q{suffix}")
    assert answer.status_code == 303 or 400 <= answer.status_code < 500
    if answer.status_code == 303:
        page = client.get(answer.headers["location"])
        assert page.status_code < 500
        assert "the network failed" not in page.text


@QUICK
@given(data=st.data(), place=st.sampled_from([*FORMS, *PAGES]), part=VALUES)
def test_odd_values(client, data, place, part):
    view = people(client.get(uploaded(client, encoded(PHOTO))))[0].partition("view=")[2]
    values = st.one_of(VALUES, st.just(view))
    fields = {name: data.draw(values) for name in (FORMS | PAGES)[place]}
    path = place.format(quote(part, safe=""))
    ask = {"data": fields} if place in FORMS else {"params": fields}
    answer = client.request("POST" if place in FORMS else "GET", path, **ask)
    assert answer.status_code < 500
    assert not answer.headers.get("location", "/").startswith(("//", "http"))
