"""The page in a real browser: from a photo to results, marks and downloads, and on a phone."""

from __future__ import annotations

import json
import re
import shutil

import pytest

pytest.importorskip("fastapi", reason="the extra gallery is missing: make setup")
pytest.importorskip("lancedb", reason="the extra gallery is missing: make setup")
pytest.importorskip("playwright", reason="playwright is missing: make setup")

from playwright.sync_api import expect, sync_playwright

from alignps_jax.gallery.page.results import PAGE
from tests.gallery.page_server import closed, painted_site, running
from tests.gallery.painted import GREEN, RED, ColorDetector, encoded, painted

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(site):
    with running(closed(site)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def visit(chromium, address):
    """Opens the page in a new window, past the text; what goes wrong in it fails the test."""
    troubles, contexts = [], []

    def open_page(**settings):
        context = chromium.new_context(base_url=address, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda line: line.type == "error" and troubles.append(line.text))
        page.on("request", lambda one: one.url.startswith(address) or troubles.append(one.url))
        page.goto("/")
        expect(page.get_by_role("heading", name="Responsible use")).to_be_visible()
        page.get_by_role("button", name="I have read this").click()
        expect(page.get_by_role("heading", name="Who do you look for?")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def photo(*people, name="query.png"):
    return {"name": name, "mimeType": "image/png", "buffer": encoded(painted(*people))}


def search_red(page):
    """Uploads a photo of red and green and clicks on red."""
    page.get_by_label("Drop, paste or choose a photo").set_input_files(
        photo((RED, (40, 60)), (GREEN, (200, 90)))
    )
    expect(page.get_by_text("Found 2 people")).to_be_visible()
    # In the photo itself, 40 + 15 to the right and 60 + 40 down of 320 x 240.
    frame = page.locator(".photo svg").bounding_box()
    scale = frame["height"] / 240
    left = frame["x"] + (frame["width"] - 320 * scale) / 2
    page.mouse.click(left + 55 * scale, frame["y"] + 100 * scale)
    expect(page.get_by_role("heading", name="Results")).to_be_visible()


def similarities(page):
    return [float(text) for text in page.locator(".results strong").all_inner_texts()]


def test_upload_click_filter_and_back(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    search_red(page)
    assert similarities(page)[:4] == [1, 1, 1, 1]
    assert similarities(page)[4] < 0.9
    everybody, query = page.url, page.url.partition("view=")[2]
    page.locator("summary", has_text="Filter").click()
    page.get_by_label("yard", exact=True).check()
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_text("who passed the filter")).to_be_visible()
    assert "camera=yard" in page.url
    assert query in page.url
    assert similarities(page)[:2] == [1, 1]
    assert len(similarities(page)) == 5
    # The address alone gives the same results to somebody else who is let in.
    again = page.context.new_page()
    again.goto(page.url)
    assert similarities(again) == similarities(page)
    page.go_back()
    page.wait_for_url(everybody)
    assert len(similarities(page)) == 9
    page.go_back()
    expect(page.get_by_text("Found 2 people")).to_be_visible()


def test_a_result_shows_its_scene_and_is_searched_from(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    search_red(page)
    page.locator(".results .picture").first.click()
    expect(page.locator(".photo a.chosen")).to_have_count(1)
    page.get_by_role("link", name="Back to the results").click()
    page.get_by_role("link", name="Search from here").first.click()
    expect(page.locator(".views li")).to_have_count(1)
    assert "view=up." not in page.url
    assert similarities(page)[:3] == [1, 1, 1]  # without itself


def test_views_are_combined(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    search_red(page)
    page.get_by_role("link", name="Add to query").nth(4).click()  # not red
    expect(page.locator(".views li")).to_have_count(2)
    expect(page.get_by_text("by the mean of the views")).to_be_visible()
    mean = similarities(page)
    page.get_by_label("Combine the 2 views by").select_option("best")
    expect(page.get_by_text("by the best of the views")).to_be_visible()
    assert similarities(page)[:4] == [1, 1, 1, 1]
    assert max(mean) < 1
    # A third one, of another photo.
    page.get_by_text("Add another view of this person").click()
    page.get_by_label("Drop, paste or choose another photo").set_input_files(photo((RED, (9, 9))))
    expect(page.get_by_text("joins the 2 views")).to_be_visible()
    page.get_by_role("list").get_by_role("link").first.click()
    expect(page.locator(".views li")).to_have_count(3)
    page.get_by_role("link", name="Remove view 2").click()
    expect(page.locator(".views li")).to_have_count(2)


def test_marks_are_set_without_leaving_and_downloaded(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    search_red(page)
    place = page.url
    cards = page.locator(".results .card")
    for number, name in ((0, "Right"), (1, "Right"), (8, "Wrong")):
        cards.nth(number).get_by_role("button", name=name).click()
        button = cards.nth(number).get_by_role("button", name=name)
        expect(button).to_have_attribute("aria-pressed", "true")
    cards.nth(1).get_by_role("button", name="Wrong").click()
    expect(cards.nth(1).get_by_role("button", name="Right")).to_have_attribute(
        "aria-pressed", "false"
    )
    cards.nth(1).get_by_role("button", name="Right").click()
    expect(cards.nth(1).get_by_role("button", name="Right")).to_have_attribute(
        "aria-pressed", "true"
    )
    assert page.url == place
    page.reload()
    expect(page.locator('[aria-pressed="true"]')).to_have_count(3)
    for name, kind in (("CSV", "marks.csv"), ("COCO JSON", "test.json"), ("query.json",) * 2):
        with page.expect_download() as waiting:
            page.get_by_role("link", name=name, exact=True).click()
        assert waiting.value.suggested_filename == kind
        data = waiting.value.path().read_text()
        if kind == "marks.csv":
            said = sorted(line[-5:] for line in data.splitlines()[1:])
            assert said == ["right", "right", "wrong"]
        else:
            assert len(json.loads(data)["annotations"]) == (3 if kind == "test.json" else 1)
    page.get_by_role("link", name="all marks").click()
    expect(page.get_by_text("2 right, 1 wrong")).to_be_visible()
    page.get_by_role("button", name="Remove these marks").click()
    expect(page.get_by_text("Nothing is marked yet")).to_be_visible()


def test_a_box_is_dragged_around_somebody(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    page.get_by_role("link", name="a.png", exact=True).click()  # red at 20, 60, green at 200, 90
    frame = page.locator(".photo svg").bounding_box()
    scale = frame["height"] / 240
    left = frame["x"] + (frame["width"] - 320 * scale) / 2
    page.mouse.move(left + 190 * scale, frame["y"] + 80 * scale)
    page.mouse.down()
    page.mouse.move(left + 210 * scale, frame["y"] + 120 * scale, steps=4)
    page.mouse.move(left + 240 * scale, frame["y"] + 180 * scale, steps=4)
    page.mouse.up()
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
    assert similarities(page)[:2] == [1, 1]  # the two other photos of green
    assert len(similarities(page)) == 8


def test_photos_are_dropped_and_pasted(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    for event, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.goto("/")
        data = list(encoded(painted((RED, (40, 60)))))
        page.evaluate(
            """([event, holder, data]) => {
              const files = new DataTransfer();
              files.items.add(new File([new Uint8Array(data)], "sent.png", {type: "image/png"}));
              const Kind = event === "drop" ? DragEvent : ClipboardEvent;
              document.body.dispatchEvent(
                new Kind(event, {bubbles: true, cancelable: true, [holder]: files}));
            }""",
            [event, holder, data],
        )
        expect(page.get_by_text("Found 1 person")).to_be_visible()
        expect(page.get_by_role("heading", name="sent.png")).to_be_visible()


def test_friendly_lines(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    page.get_by_label("Drop, paste or choose a photo").set_input_files(photo())
    expect(page.get_by_text("Nobody was found in this photo")).to_be_visible()
    page.goto("/")
    half = photo((RED, (9, 9)))
    half["buffer"] = half["buffer"][:200]
    page.get_by_label("Drop, paste or choose a photo").set_input_files(half)
    expect(page.get_by_role("alert").filter(has_text="cannot be decoded")).to_be_visible()


def test_a_phone(visit):
    page = visit(
        viewport={"width": 360, "height": 740},
        has_touch=True,
        is_mobile=True,
        color_scheme="dark",
    )

    def fits():
        return page.evaluate("document.documentElement.scrollWidth") <= 360

    assert fits()
    page.get_by_label("Drop, paste or choose a photo").set_input_files(
        photo((RED, (40, 60)), (GREEN, (200, 90)))
    )
    page.get_by_role("link", name="1: 0.90").tap()
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
    assert fits()
    page.locator("summary", has_text="Filter").tap()
    assert fits()
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background))) < 60  # dark
    page.locator(".results .picture").first.tap()
    expect(page.get_by_role("link", name="Back to the results")).to_be_visible()
    assert fits()
    # By touch a box is drawn after the switch, else a finger scrolls.
    page.get_by_role("button", name="Draw a box").tap()
    expect(page.locator(".photo.drawing svg")).to_have_css("touch-action", "none")


def test_by_keyboard_alone(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    names = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "(e => ({name: e.innerText || e.labels?.[0]?.innerText || e.ariaLabel || '',"
            " outline: getComputedStyle(e).outlineStyle}))(document.activeElement)"
        )
        names.append(focused["name"].strip().partition("\n")[0])
        assert names[-1]  # a screen reader has something to say
        assert focused["outline"] != "none"
        if names[-1] == "a.png":
            break
    assert names[0] == "To the content"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="a.png")).to_be_visible()
    for image in page.locator("img").all():
        assert image.get_attribute("alt") is not None
    page.locator(".people a").nth(1).focus()
    expect(page.locator(".photo a.hover")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Results")).to_be_visible()


def test_more_results_come_while_scrolling(chromium, tmp_path):
    folder = tmp_path / "photos" / "crowd"
    folder.mkdir(parents=True)
    for number in range(PAGE // 2):
        people = [(RED, (10 + 50 * column, 20)) for column in range(5)]
        (folder / f"{number:02d}.png").write_bytes(encoded(painted(*people)))
    site = painted_site(tmp_path)
    count = PAGE // 2 * 5
    with running(closed(site)) as port:
        context = chromium.new_context(base_url=f"http://127.0.0.1:{port}")
        page = context.new_page()
        page.goto("/")
        page.get_by_role("button", name="I have read this").click()
        page.get_by_label("Drop, paste or choose a photo").set_input_files(photo((RED, (9, 9))))
        page.get_by_role("list").get_by_role("link").first.click()
        cards = page.locator(".results .card")
        expect(cards).to_have_count(PAGE)
        while cards.count() < count:
            before = cards.count()
            page.mouse.wheel(0, 100_000)
            expect(cards).not_to_have_count(before)
        expect(page.locator(".more")).to_have_count(0)
        assert len({card.get_attribute("id") for card in cards.all()}) == count
        context.close()


def test_a_long_first_query_shows_what_goes_on(chromium, tmp_path):
    detector = ColorDetector()
    site = painted_site(tmp_path, detector)
    detector.delay = 4.0
    with running(closed(site)) as port:
        context = chromium.new_context(base_url=f"http://127.0.0.1:{port}")
        page = context.new_page()
        page.goto("/")
        page.get_by_role("button", name="I have read this").click()
        page.get_by_label("Drop, paste or choose a photo").set_input_files(photo((RED, (9, 9))))
        waiting = page.locator("#found").get_by_text("Preparing the network for landscape photos")
        expect(waiting).to_be_visible()
        expect(page.get_by_text("Found 1 person")).to_be_visible(timeout=20_000)
        context.close()
