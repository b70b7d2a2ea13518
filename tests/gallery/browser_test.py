"""The page in a real browser, behind a real proxy: each way through it to what one came for."""

from __future__ import annotations

import contextlib
import re
import shutil

import pytest

pytest.importorskip("playwright", reason="playwright is missing: make setup")

from playwright.sync_api import expect, sync_playwright

from alignps_jax.gallery.page.results import PAGE
from tests.gallery.page_server import PUBLIC, Visitor, behind_nginx, painted_site, video_site
from tests.gallery.painted import GREEN, RED, encoded, painted, scenes_of

CHROMIUM = shutil.which("chromium")
HAS_BOTH = CHROMIUM and shutil.which("nginx")
pytestmark = pytest.mark.skipif(not HAS_BOTH, reason="apt-get install chromium nginx-light")

OPEN = ["--no-sandbox", "--disable-gpu", "--ignore-certificate-errors"]
FLAGS = [*OPEN, f"--host-resolver-rules=MAP {PUBLIC} 127.0.0.1"]
WIDE = {"viewport": {"width": 1200, "height": 900}}
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
CHOOSE = "Drop, paste or choose a photo"
expect.set_options(timeout=30_000)  # ms, on a busy machine


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path_factory):
    """Opens the page in a new window, past the text; what goes wrong in it fails the test."""
    troubles = []
    with contextlib.ExitStack() as stack:

        def open_page(site, **settings):
            folder = tmp_path_factory.mktemp("nginx")
            address = stack.enter_context(behind_nginx(site, folder))
            base = address.partition("/?")[0]
            window = chromium.new_context(base_url=base, **settings or WIDE)
            page = stack.enter_context(window).new_page()
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on("console", lambda line: line.type == "error" and troubles.append(line.text))
            page.on("request", lambda one: one.url.startswith(base) or troubles.append(one.url))
            page.goto(address)
            page.get_by_role("button", name="I have read this").click()
            arrived(page.get_by_role("heading", name="Who are you looking for?"))
            return page

        yield open_page
    assert troubles == []


@pytest.fixture
def crowd(tmp_path):
    """More red people than fit on a page."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(PAGE // 3):
        some = [(RED, (10 + 50 * column, 20 + number)) for column in range(5)]
        (photos / f"{number:02d}.png").write_bytes(encoded(painted(*some)))
    return painted_site(tmp_path)


def arrived(shown):
    """Waits until something is shown, and the scripts of its page run: keys are lost before."""
    expect(shown).to_be_visible()
    shown.page.wait_for_load_state()


def photo(*people):
    return {"name": "query.png", "mimeType": "image/png", "buffer": encoded(painted(*people))}


def drag(page, start, end):
    """Drags from one pixel of a painted photo to another one."""
    frame = page.locator(".photo svg").bounding_box()
    scale = frame["height"] / 240
    left, top = frame["x"] + (frame["width"] - 320 * scale) / 2, frame["y"]
    page.mouse.move(left + start[0] * scale, top + start[1] * scale)
    page.mouse.down()
    page.mouse.move(left + end[0] * scale, top + end[1] * scale, steps=4)
    page.mouse.up()


def search_red(page):
    """Uploads a photo of red and green and clicks on red."""
    page.get_by_label(CHOOSE).set_input_files(photo((RED, (40, 60)), (GREEN, (200, 90))))
    arrived(page.get_by_text("Found 2 people"))
    drag(page, (55, 100), (55, 100))
    arrived(page.get_by_role("heading", name="Results"))


def similarities(page):
    return [float(text) for text in page.locator(".results strong").all_inner_texts()]


def open_tool(page, name):
    page.locator("summary", has_text=name).click()


def apply(page):
    page.locator("details[open]").get_by_role("button", name="Apply").click()


def pressed(page):
    return page.locator('[aria-pressed="true"]')


def test_results_are_filtered_ordered_and_refined_by_views(visit, site):
    page = visit(site)
    search_red(page)
    assert similarities(page)[:4] == [1, 1, 1, 1]
    everybody = page.url
    open_tool(page, "Filter")
    page.get_by_label("yard", exact=True).check()
    apply(page)
    expect(page.get_by_text("who passed the filter")).to_be_visible()
    assert len(similarities(page)) == 5
    page.go_back()
    page.wait_for_url(everybody)
    open_tool(page, "Order and limit")
    page.get_by_label("Similarity at least").fill("0.9")
    expect(page.locator("output")).to_have_text("0.90")
    apply(page)
    expect(page.get_by_text("who are less similar are not shown")).to_be_visible()
    assert similarities(page) == [1, 1, 1, 1]
    open_tool(page, "Where and when")
    page.locator(".timeline a").first.click()
    assert "after=" in page.url
    assert 0 < len(similarities(page)) < 4
    page.goto(everybody)
    page.get_by_role("link", name="Add", exact=True).nth(4).click()  # not red
    expect(page.locator(".views li")).to_have_count(2)
    assert max(similarities(page)) < 1
    open_tool(page, "Add a view")
    page.get_by_label("another photo of the person").set_input_files(photo((RED, (9, 9))))
    expect(page.get_by_text("becomes another view")).to_be_visible()
    page.locator(".people a").first.click()
    expect(page.locator(".views li")).to_have_count(3)
    page.get_by_role("link", name="Remove view 2").click()
    expect(page.locator(".views li")).to_have_count(2)


def test_results_are_marked_and_viewed_and_the_query_is_refined(visit, site):
    page = visit(site)
    search_red(page)
    place, cards = page.url, page.locator(".results .card")
    right = cards.nth(0).get_by_role("button", name="Right")
    right.click()
    expect(right).to_have_attribute("aria-pressed", "true")
    expect(right).to_be_focused()
    for key in "jr":  # the card after the one with the focus
        page.keyboard.press(key)
    expect(cards.nth(1).locator(".right[aria-pressed=true]")).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("link", name="Search with all right results")).to_be_visible()
    for number in (7, 8):
        cards.nth(number).get_by_label("Select").check()
    page.locator("#several").get_by_role("button", name="Wrong").click()
    expect(pressed(page)).to_have_count(4)
    assert page.url.partition("#")[0] == place
    # The viewer, from result to result and back.
    cards.nth(4).locator(".picture").click()
    arrived(page.locator(".photo a.chosen"))
    fifth = page.url
    page.keyboard.press("j")
    expect(page).not_to_have_url(fifth)
    page.wait_for_load_state()
    page.keyboard.press("k")
    expect(page).to_have_url(fifth)
    page.wait_for_load_state()
    for count in (1, 0):
        page.keyboard.press("w")
        expect(pressed(page)).to_have_count(count)
    before = page.locator(".photo svg").bounding_box()["width"]
    page.get_by_role("link", name="Full size").click()
    expect(page.locator(".photo.zoomed image")).to_have_attribute("href", re.compile("8192"))
    assert page.locator(".photo svg").bounding_box()["width"] != before
    page.keyboard.press("Escape")
    arrived(page.get_by_role("heading", name="Results"))
    assert "#result-" in page.url
    page.get_by_role("link", name="Search with all right results").click()
    expect(page.locator(".views li")).to_have_count(3)
    expect(pressed(page)).to_have_count(2)  # views are no results
    open_tool(page, "Download")
    with page.expect_download() as waiting:
        page.get_by_role("link", name="COCO JSON", exact=True).click()
    assert waiting.value.suggested_filename == "test.json"
    page.get_by_role("link", name="Marks", exact=True).click()
    expect(page.get_by_text("2 right, 2 wrong")).to_be_visible()
    open_tool(page, "Remove these marks")
    page.get_by_role("button", name="Remove 4 marks").click()
    expect(page.get_by_text("Nothing is marked yet")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_text("2 right, 2 wrong")).to_be_visible()


def test_a_video_plays_from_the_second_of_a_result(visit, tmp_path):
    shown = video_site(tmp_path)
    page = visit(shown)
    expect(page.locator(".card")).to_have_count(1)  # one for all frames
    page.get_by_role("link", name="walk.mp4").click()
    page.locator(".people a").first.click()
    expect(page.get_by_text("0:00:01–0:00:07 (7 frames)")).to_be_visible()  # but for the query
    page.locator(".results .picture").first.click()
    video = page.locator("video")
    expect(video).not_to_have_js_property("currentTime", 0)
    start = video.evaluate("video => video.currentTime")
    video.evaluate("video => { video.muted = true; return video.play(); }")
    later = "start => document.querySelector('video').currentTime > start"
    page.wait_for_function(later, arg=start)
    expect(video).to_have_js_property("error", None)
    # What is there now is not what was indexed.
    scene = scenes_of(shown)[0]
    with open(scene.path, "ab") as file:
        file.write(b"secret")
    answer = Visitor(shown).get(f"/scene/{scene.id}/video")
    assert (answer.status_code, b"secret" in answer.content) == (400, False)


def test_photos_are_dropped_and_pasted_one_at_a_time(visit, site):
    page = visit(site)
    script = """([event, holder, data, count]) => {
        const files = new DataTransfer();
        for (let n = 0; n < count; n += 1)
            files.items.add(new File([new Uint8Array(data)], "sent.png", {type: "image/png"}));
        const Kind = event === "drop" ? DragEvent : ClipboardEvent;
        document.body.dispatchEvent(
            new Kind(event, {bubbles: true, cancelable: true, [holder]: files}));
    }"""
    sent = list(encoded(painted((RED, (40, 60)))))
    for event, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.goto("/")
        page.evaluate(script, [event, holder, sent, 2])
        expect(page.get_by_role("alert")).to_have_text("Please choose one photo at a time.")
        page.evaluate(script, [event, holder, sent, 1])
        expect(page.get_by_text("Found 1 person")).to_be_visible()
        expect(page.get_by_role("heading", name="sent.png")).to_be_visible()


def test_more_results_come_while_scrolling_and_without_a_script(visit, crowd):
    page = visit(crowd)
    page.get_by_label(CHOOSE).set_input_files(photo((RED, (9, 9))))
    page.locator(".people a").first.click()
    cards = page.locator(".results .card")
    expect(cards).to_have_count(PAGE)
    page.mouse.wheel(0, 100_000)
    expect(cards).not_to_have_count(PAGE)
    count = cards.count()
    assert len({card.get_attribute("id") for card in cards.all()}) == count
    last = cards.nth(count - 1)
    last.locator(".picture").click()
    expect(page.get_by_role("link", name="Back to the results")).to_be_visible()
    page.go_back()
    expect(cards).to_have_count(count)
    expect(last).to_be_in_viewport()
    page = visit(crowd, java_script_enabled=False)
    page.get_by_label(CHOOSE).set_input_files(photo((RED, (9, 9))))
    page.get_by_role("button", name="Find people in it").click()
    page.locator(".people a").first.click()
    page.get_by_role("link", name="More results").click()
    cards = page.locator(".results .card")
    assert cards.count() > PAGE
    cards.first.get_by_role("button", name="Right").click()
    expect(pressed(page)).to_have_count(1)


def test_a_phone(visit, site):
    page = visit(site, **PHONE, color_scheme="dark")

    def fits():
        return page.evaluate("document.documentElement.scrollWidth") <= 360

    assert fits()
    page.get_by_label(CHOOSE).set_input_files(photo((RED, (40, 60)), (GREEN, (200, 90))))
    page.locator(".people a").first.tap()
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
    page.goto(f"{page.url}&camera=yard")
    assert page.locator(".results .card").first.bounding_box()["y"] < 700  # with a filter
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background))) < 60  # dark
    for tool in ("Filter", "Order and limit", "Add a view"):
        page.locator("summary", has_text=tool).tap()
        assert fits()
    page.locator(".results .picture").first.tap()
    expect(page.get_by_role("link", name="Back to the results")).to_be_visible()
    assert fits()
    # By touch a box is drawn after the switch, else a finger scrolls.
    page.get_by_role("button", name="Draw a box").tap()
    expect(page.locator(".photo.drawing svg")).to_have_css("touch-action", "none")


def test_by_keyboard_alone(visit, site):
    page = visit(site)
    names = []
    while "a.png" not in names:
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "(e => ({name: e.innerText || e.labels?.[0]?.innerText || e.ariaLabel || '',"
            " outline: getComputedStyle(e).outlineStyle}))(document.activeElement)"
        )
        names.append(focused["name"].strip().partition("\n")[0])
        assert names[-1]  # a screen reader has something to say
        assert focused["outline"] != "none"
    assert names[0] == "Skip to content"
    page.keyboard.press("Enter")
    arrived(page.get_by_role("heading", name="a.png"))
    for image in page.locator("img").all():
        assert image.get_attribute("alt") is not None
    page.locator(".people a").nth(1).focus()
    expect(page.locator(".photo a.hover")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
