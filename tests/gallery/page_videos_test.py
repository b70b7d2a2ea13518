"""Videos on the page: neighboring seconds are one result, and it plays from there."""

from __future__ import annotations

import os
import shutil

import cv2
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra gallery is missing: make setup")
pytest.importorskip("lancedb", reason="the extra gallery is missing: make setup")

from alignps_jax.gallery.entries import Match, Person, Scene
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.results import grouped
from alignps_jax.gallery.page.serve import make_site
from tests.gallery.page_server import visitor
from tests.gallery.painted import (
    GREEN,
    RED,
    SIZE,
    ColorDetector,
    commit,
    indexed,
    painted,
    scenes_of,
)

SECONDS, RATE = 8, 5


def frame_at(second):
    """Red walks for all the time; green stands there from second 4 on."""
    people = [(RED, (10 + 20 * int(second), 100))]
    return painted(*people, *([(GREEN, (250, 20))] if second >= 4 else []))


def write_walk(path):
    """A video that browsers play."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"vp09"), RATE, SIZE[::-1])
    assert writer.isOpened()
    for number in range(SECONDS * RATE):
        writer.write(cv2.cvtColor(frame_at(number / RATE), cv2.COLOR_RGB2BGR))
    writer.release()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    detector, path = ColorDetector(), folder / "walk.mp4"
    write_walk(path)
    gallery = Gallery.open(folder / "people.lance", detector, create=True)
    scenes = [
        indexed(path, frame_at(second), detector, second=float(second), every=1.0)
        for second in range(SECONDS)
    ]
    commit(gallery, scenes)
    return make_site(gallery, detector, folder / "marks.json")


def person_in(scene, color_box):
    return next(p for p in scene if abs(p.box[0] - color_box) < 5)


def test_neighboring_seconds_are_one_entry_with_its_span(site):
    client = visitor(site)
    scenes = scenes_of(site)
    assert len(scenes) == SECONDS
    first = next(s for s in scenes if s.second == 0)
    (red,) = site.gallery.people_of(first.id)
    page = client.get("/search", params={"view": red.id})
    assert page.text.count('class="card"') == 2
    assert "0:01–0:07 (7 frames)" in page.text  # red, but for the query itself
    assert "0:04–0:07 (4 frames)" in page.text  # green


def test_a_result_plays_from_its_second_by_ranges(site):
    client = visitor(site)
    scene = next(s for s in scenes_of(site) if s.second == 5)
    page = client.get(f"/scene/{scene.id}").text
    assert f'src="/scene/{scene.id}/video#t=5.000"' in page
    with open(scene.path, "rb") as file:
        whole = file.read()
    place = f"/scene/{scene.id}/video"
    answer = client.get(place)
    assert answer.content == whole
    assert answer.headers["content-type"] == "video/mp4"
    part = client.get(place, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole)}"
    assert client.get(place, headers={"Range": "bytes=99999999-"}).status_code == 416
    assert client.get(place, headers={"Range": "nonsense"}).status_code in (200, 400)


def test_a_video_that_was_replaced_is_not_served(site, tmp_path):
    detector, path = ColorDetector(), tmp_path / "walk.mp4"
    write_walk(path)
    gallery = Gallery.open(tmp_path / "people.lance", detector, create=True)
    commit(gallery, [indexed(path, frame_at(0), detector, second=0.0, every=1.0)])
    client = visitor(make_site(gallery, detector, tmp_path / "marks.json"))
    scene = gallery.scenes(9)[0].scene
    assert client.get(f"/scene/{scene.id}/video").status_code == 200
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path.unlink()
    os.symlink(secret, path)
    answer = client.get(f"/scene/{scene.id}/video")
    assert answer.status_code == 400
    assert "secret" not in answer.text


def match(second, box, similarity=0.5, path="a.mp4", number=0):
    scene = Scene(f"{path}{second}", path, 480, 640, None, "", second, path)
    person = Person(f"{path}{second}-{number}", scene, np.array(box, np.float32), 0.9)
    return Match(person, similarity)


STANDING = (100, 100, 140, 200)


@pytest.mark.parametrize(
    ("matches", "sizes"),
    [
        ([], []),
        ([match(None, STANDING)], [1]),
        ([match(None, STANDING)] * 2, [1, 1]),  # photos are never put together
        ([match(1, STANDING), match(2, STANDING), match(3, STANDING)], [3]),
        ([match(1, STANDING), match(3, STANDING)], [2]),
        ([match(1, STANDING), match(4, STANDING)], [1, 1]),  # too long
        ([match(1, STANDING), match(2, STANDING, path="b.mp4")], [1, 1]),
        ([match(1, STANDING), match(1, (150, 100, 190, 200), number=1)], [1, 1]),  # two people
        ([match(1, STANDING), match(2, (400, 100, 440, 200))], [1, 1]),  # too far
        ([match(1, STANDING), match(2, (100, 100, 120, 140))], [1, 1]),  # too small
        ([match(5, STANDING), match(1, STANDING), match(3, STANDING)], [2, 1]),
        ([match(0.5, STANDING), match(1.0, STANDING), match(-0.0, STANDING)], [3]),
    ],
)
def test_what_is_put_together(matches, sizes):
    entries = grouped(matches)
    assert [len(entry.people) for entry in entries] == sizes
    everybody = [person.id for entry in entries for person in entry.people]
    assert sorted(everybody) == sorted(one.person.id for one in matches)
    # The best one stands for its entry, and what comes later changes no earlier entry's place.
    for count in range(len(matches)):
        earlier = [entry.match for entry in grouped(matches[:count])]
        assert [entry.match for entry in entries][: len(earlier)] == earlier


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium: apt-get install chromium"
)
def test_a_browser_plays_from_there(site):
    pytest.importorskip("playwright", reason="playwright is missing: make setup")
    from playwright.sync_api import expect, sync_playwright

    from alignps_jax.gallery.page.app import make_app
    from alignps_jax.gallery.page.security import LOOPBACK, Door
    from tests.gallery.browser_test import CHROMIUM, FLAGS
    from tests.gallery.page_server import running

    scene = next(s for s in scenes_of(site) if s.second == 5)
    with running(make_app(site, Door(LOOPBACK))) as port, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(base_url=f"http://127.0.0.1:{port}")
        page.goto(f"/scene/{scene.id}")
        page.get_by_role("button", name="I have read this").click()
        expect(page.locator("video")).to_have_js_property("currentTime", 5)
        expect(page.locator("video")).to_have_js_property("error", None)
        browser.close()
