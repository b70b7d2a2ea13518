"""What changes a gallery from its page: boxes, forgetting, groups, indexing; in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Filter
from alignps_jax.gallery.groups import make_groups
from alignps_jax.gallery.page.site import Site
from tests.gallery import browser_test
from tests.gallery.browser_test import arrived, drag, expect, open_tool, similarities
from tests.gallery.page_server import Visitor, calibration, everybody, painted_site
from tests.gallery.painted import GREEN, ColorDetector, encoded, painted

pytestmark = browser_test.pytestmark
chromium, visit = browser_test.chromium, browser_test.visit  # fixtures


@pytest.fixture
def own(tmp_path):
    """The eight photos, to be changed."""
    gallery = painted_site(tmp_path).gallery
    gallery.calibration = calibration(4)
    return Site(gallery, [str(tmp_path / "photos")])


def test_boxes_are_searched_and_drawn_anew_and_people_forgotten_and_added(visit, own):
    page = visit(own)
    page.get_by_role("link", name="a.png", exact=True).click()  # red at 20, 60, green at 200, 90
    arrived(page.get_by_role("heading", name="a.png"))
    drag(page, (196, 84), (234, 174))
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
    assert similarities(page)[:2] == [1, 1]  # the two other photos of green, and nobody of a.png
    # The box of red in b.png, at 120, 80, is drawn anew. Name and marks stay.
    found = {one.scene.name: one for one in everybody(own)}
    old, other = found["b.png"], found["ä.png"]
    make_groups(own.gallery, Filter())
    own.groups.put([old.id, other.id], "Ada")
    own.marks.set([old], {other.id: 0.5}, right=True)
    own.marks.set([other], {old.id: 0.5}, right=False)
    place = f"/scene/{old.scene.id}"
    page.goto(place)
    page.get_by_label("or keep it as").select_option("the box of 1")
    drag(page, (124, 84), (148, 199))
    page.wait_for_url(re.compile("person="))
    (new,) = own.gallery.memory().people_of(old.scene.id)
    assert new.box.tolist() == pytest.approx([124, 84, 148, 199], abs=2)
    assert own.groups.by_person()[new.id].name == "Ada"
    marks = {(one.view, one.person, one.right) for one in own.marks.all()}
    assert marks == {(new.id, other.id, True), (other.id, new.id, False)}
    again = {"person": old.id, "box": "124,84,148,199"}
    assert Visitor(own).post(f"{place}/person", data=again).status_code == 404
    # Forgetting takes the marks along, those as well that an undo would bring back.
    own.removed["undo"] = own.marks.all()
    open_tool(page, "Forget or correct")
    page.get_by_role("button", name="Forget for good").click()
    expect(page.get_by_text("1 person removed")).to_be_visible()
    expect(page.get_by_text("yard/b.png")).to_be_visible()
    assert not own.marks.all()
    assert not own.removed
    # Who was missed is added, and then is no person: nothing of it stays.
    page.goto(place)
    page.get_by_label("type its corners").fill("116,76,154,164")
    page.get_by_role("button", name="Save the box").click()
    page.wait_for_url(re.compile("person="))
    (added,) = own.gallery.memory().people_of(old.scene.id)
    open_tool(page, "Forget or correct")
    page.get_by_role("button", name="This is not a person").click()
    expect(page.get_by_text("1 person removed")).to_be_visible()
    assert Visitor(own).get(f"/person/{added.id}.jpg").status_code == 404


def test_people_are_grouped_named_split_and_merged(visit, own):
    page = visit(own)

    def groups():
        page.get_by_role("link", name="People", exact=True).click()
        return page.locator(".card")

    expect(groups()).to_have_count(0)
    page.get_by_role("button", name="Group people").click()
    expect(page.get_by_role("button", name="Index what is new")).to_be_visible()
    expect(groups()).to_have_count(2)
    groups().filter(has_text="4 sightings").get_by_role("link").click()
    page.get_by_label("Name").fill("<Ada>")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("heading", name="All photos of <Ada>")).to_be_visible()
    page.get_by_label("Select").first.check()
    page.get_by_role("button", name="somebody else").click()
    expect(page.locator(".card")).to_have_count(3)
    expect(groups()).to_have_count(3)
    for text in ("<Ada>", "1 sighting"):
        page.locator(".card", has_text=text).get_by_label("Select").check()
    page.get_by_role("button", name="are the same person").click()
    expect(page.get_by_role("heading", name="All photos of <Ada>")).to_be_visible()
    expect(page.locator(".card")).to_have_count(4)


def test_folders_are_indexed(visit, own, monkeypatch):
    def busy(*_):
        raise UserError("the network is busy")

    monkeypatch.setattr(ColorDetector, "detect_batch", busy)
    monkeypatch.setattr(ColorDetector, "rows", 1, raising=False)
    photos = Path(own.library.sources[0])
    late = photos / "late.png"
    late.write_bytes(encoded(painted((GREEN, (9, 9)))))
    page = visit(own)
    page.get_by_role("link", name="Indexing").click()
    page.get_by_role("button", name="Index what is new").click()
    expect(page.get_by_role("main").get_by_role("alert")).to_have_text("the network is busy")
    late.unlink()
    (photos / "notes.xmp").write_text("x")
    (photos / "half.png").write_bytes(b"half")
    page.get_by_role("button", name="Index what is new").click()
    expect(page.get_by_text("Not looked at: 1 .xmp")).to_be_visible()
    expect(page.get_by_text("half.png")).to_be_visible()
