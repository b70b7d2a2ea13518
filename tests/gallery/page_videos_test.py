"""Videos on the page: neighboring seconds are one result, and it plays from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import pytest

from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.site import Site
from tests.gallery.page_server import closed, running, visitor
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
        indexed(path, frame_at(second), detector, second=float(second)) for second in range(SECONDS)
    ]
    commit(gallery, scenes)
    return Site(gallery)


def test_neighboring_seconds_are_one_entry_with_its_span(site):
    client = visitor(site)
    scenes = scenes_of(site)
    assert len(scenes) == SECONDS
    first = next(s for s in scenes if s.second == 0)
    (red,) = site.gallery.memory().people_of(first.id)
    page = client.get("/search", params={"view": red.id})
    assert "0:00:01–0:00:07 (7 frames)" in page.text  # but for the query itself
    assert client.get("/").text.count('class="card"') == 1  # one card per video


def test_a_result_plays_from_its_second_by_ranges(site):
    client = visitor(site)
    scene = next(s for s in scenes_of(site) if s.second == 5)
    page = client.get(f"/scene/{scene.id}").text
    assert f'src="/scene/{scene.id}/video#t=5.000"' in page
    place, whole = f"/scene/{scene.id}/video", Path(scene.path).read_bytes()
    answer = client.get(place)
    assert answer.content == whole
    assert answer.headers["content-type"] == "video/mp4"
    part = client.get(place, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole[100:200])


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium: apt-get install chromium"
)
def test_a_browser_plays_from_there(site):
    pytest.importorskip("playwright", reason="playwright is missing: make setup")
    from playwright.sync_api import expect, sync_playwright

    from tests.gallery.browser_test import CHROMIUM, FLAGS

    scene = next(s for s in scenes_of(site) if s.second == 5)
    with running(closed(site)) as port, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(base_url=f"http://127.0.0.1:{port}")
        page.goto(f"/scene/{scene.id}")
        page.get_by_role("button", name="I have read this").click()
        expect(page.locator("video")).to_have_js_property("currentTime", 5)
        expect(page.locator("video")).to_have_js_property("error", None)
        browser.close()


def test_a_video_that_changed_is_not_served(site):
    scene = scenes_of(site)[0]
    with open(scene.path, "ab") as file:
        file.write(b"secret")
    answer = visitor(site).get(f"/scene/{scene.id}/video")
    assert answer.status_code == 400
    assert "has changed" in answer.text
    assert "secret" not in answer.text
