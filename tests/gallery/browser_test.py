"""The page in a real browser: each way through it from a photo to what one came for."""

from __future__ import annotations

import json
import re
import shutil

import pytest

pytest.importorskip("playwright", reason="playwright is missing: make setup")

from playwright.sync_api import expect, sync_playwright

from alignps_jax.gallery.page.results import PAGE
from tests.gallery.page_server import closed, painted_site, running
from tests.gallery.painted import GREEN, RED, encoded, painted

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
]
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


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """More red people than fit on a page, and the eight photos."""
    folder = tmp_path_factory.mktemp("crowd")
    painted_site(folder / "few")
    photos = folder / "photos" / "crowd"
    photos.mkdir(parents=True)
    for number in range(PAGE // 3):
        people = [(RED, (10 + 50 * column, 20 + number)) for column in range(5)]
        (photos / f"{number:02d}.png").write_bytes(encoded(painted(*people)))
    return painted_site(folder)


@pytest.fixture
def visit(chromium, request):
    """Opens the page in a new window, past the text; what goes wrong in it fails the test."""
    troubles, contexts = [], []
    shown = request.getfixturevalue(getattr(request, "param", "site"))
    with running(closed(shown)) as port:
        address = f"http://127.0.0.1:{port}"

        def open_page(**settings):
            context = chromium.new_context(base_url=address, **settings)
            contexts.append(context)
            page = context.new_page()
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on("console", lambda line: line.type == "error" and troubles.append(line.text))
            page.on("request", lambda one: one.url.startswith(address) or troubles.append(one.url))
            page.goto("/")
            page.get_by_role("button", name="I have read this").click()
            arrived(page.get_by_role("heading", name="Who are you looking for?"))
            return page

        yield open_page
        for context in contexts:
            context.close()
    assert troubles == []


def arrived(shown):
    """Waits until something is shown, and the scripts of its page run: keys are lost before."""
    expect(shown).to_be_visible()
    shown.page.wait_for_load_state()


def photo(*people, name="query.png"):
    return {"name": name, "mimeType": "image/png", "buffer": encoded(painted(*people))}


def point(page, x, y):
    """Where a pixel of a painted photo is in the window."""
    frame = page.locator(".photo svg").bounding_box()
    scale = frame["height"] / 240
    return frame["x"] + (frame["width"] - 320 * scale) / 2 + x * scale, frame["y"] + y * scale


def search_red(page):
    """Uploads a photo of red and green and clicks on red, at 40, 60."""
    page.get_by_label(CHOOSE).set_input_files(photo((RED, (40, 60)), (GREEN, (200, 90))))
    expect(page.get_by_text("Found 2 people")).to_be_visible()
    page.mouse.click(*point(page, 55, 100))
    arrived(page.get_by_role("heading", name="Results"))


def similarities(page):
    return [float(text) for text in page.locator(".results strong").all_inner_texts()]


def open_tool(page, name):
    page.locator("summary", has_text=name).click()


def test_from_a_photo_to_filtered_results_and_back(visit):
    page = visit(**WIDE)
    search_red(page)
    assert similarities(page)[:4] == [1, 1, 1, 1]
    everybody = page.url
    open_tool(page, "Filter")
    page.get_by_label("yard", exact=True).check()
    page.locator("details[open]").get_by_role("button", name="Apply").click()
    expect(page.get_by_text("who passed the filter")).to_be_visible()
    assert "camera=yard" in page.url
    assert len(similarities(page)) == 5
    # The address alone gives the same results to somebody else who is let in.
    again = page.context.new_page()
    again.goto(page.url)
    assert similarities(again) == similarities(page)
    page.go_back()
    page.wait_for_url(everybody)
    assert len(similarities(page)) == 9
    open_tool(page, "Order and limit")
    page.get_by_label("Similarity at least").fill("0.9")
    expect(page.locator("output")).to_have_text("0.90")
    page.locator("details[open]").get_by_role("button", name="Apply").click()
    expect(page.get_by_text("who are less similar are not shown")).to_be_visible()
    assert similarities(page) == [1, 1, 1, 1]
    open_tool(page, "Where and when")
    page.locator(".timeline a").first.click()
    assert "after=" in page.url
    assert 0 < len(similarities(page)) < 4


def test_views_are_added_and_combined(visit):
    page = visit(**WIDE)
    search_red(page)
    page.get_by_role("link", name="Add", exact=True).nth(4).click()  # not red
    expect(page.locator(".views li")).to_have_count(2)
    assert max(similarities(page)) < 1
    open_tool(page, "Order and limit")
    page.get_by_label("Combine the 2 views by").select_option("best")
    page.locator("details[open]").get_by_role("button", name="Apply").click()
    arrived(page.get_by_text("by the best of the views"))
    assert similarities(page)[:3] == [1, 1, 1]
    open_tool(page, "Add a view")
    page.get_by_label("another photo of the person").set_input_files(photo((RED, (9, 9))))
    expect(page.get_by_text("becomes another view")).to_be_visible()
    page.locator(".people a").first.click()
    expect(page.locator(".views li")).to_have_count(3)
    page.get_by_role("link", name="Remove view 2").click()
    expect(page.locator(".views li")).to_have_count(2)


def test_marks_by_mouse_and_keys_then_the_query_is_refined(visit):
    page = visit(**WIDE)
    search_red(page)
    place, cards = page.url, page.locator(".results .card")
    right = cards.nth(0).get_by_role("button", name="Right")
    right.click()
    expect(right).to_have_attribute("aria-pressed", "true")
    expect(right).to_be_focused()
    for key in "jr":  # the card after the one with the focus
        page.keyboard.press(key)
    expect(cards.nth(1).get_by_role("button", name="Right")).to_have_attribute(
        "aria-pressed", "true"
    )
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    for number in (7, 8):
        cards.nth(number).get_by_label("Select").check()
    page.locator("#several").get_by_role("button", name="Wrong").click()
    expect(page.locator('[aria-pressed="true"]')).to_have_count(4)
    assert page.url.partition("#")[0] == place
    page.get_by_role("link", name="Search with all right results").click()
    expect(page.locator(".views li")).to_have_count(3)
    expect(page.locator('[aria-pressed="true"]')).to_have_count(2)  # views are no results
    open_tool(page, "Download")
    for name, kind in (("table", "marks.csv"), ("COCO JSON", "test.json")):
        with page.expect_download() as waiting:
            page.get_by_role("link", name=name, exact=True).click()
        assert waiting.value.suggested_filename == kind
        data = waiting.value.path().read_text()
        assert data.count("wrong") == 2 if kind == "marks.csv" else json.loads(data)["annotations"]
    page.get_by_role("link", name="Marks", exact=True).click()
    expect(page.get_by_text("2 right, 2 wrong")).to_be_visible()
    open_tool(page, "Remove these marks")
    page.get_by_role("button", name="Remove 4 marks").click()
    expect(page.get_by_text("Nothing is marked yet")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_text("2 right, 2 wrong")).to_be_visible()


def test_the_viewer_goes_from_result_to_result(visit):
    page = visit(**WIDE)
    search_red(page)
    page.locator(".results .picture").nth(1).click()
    arrived(page.locator(".photo a.chosen"))
    second = page.url
    page.keyboard.press("j")
    expect(page).not_to_have_url(second)
    page.wait_for_load_state()
    page.keyboard.press("k")
    expect(page).to_have_url(second)
    page.wait_for_load_state()
    page.keyboard.press("w")
    expect(page.get_by_role("button", name="Wrong")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("w")
    expect(page.get_by_role("button", name="Wrong")).to_have_attribute("aria-pressed", "false")
    before = page.locator(".photo svg").bounding_box()["width"]
    page.get_by_role("link", name="Full size").click()
    expect(page.locator(".photo.zoomed image")).to_have_attribute("href", re.compile("8192"))
    assert page.locator(".photo svg").bounding_box()["width"] != before
    page.keyboard.press("Escape")
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
    assert "#result-" in page.url


def test_a_box_is_dragged_around_somebody(visit):
    page = visit(**WIDE)
    page.get_by_role("link", name="a.png", exact=True).click()  # red at 20, 60, green at 200, 90
    arrived(page.get_by_role("heading", name="a.png"))
    page.mouse.move(*point(page, 196, 84))
    page.mouse.down()
    page.mouse.move(*point(page, 210, 120), steps=4)
    page.mouse.move(*point(page, 234, 174), steps=4)
    page.mouse.up()
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
    assert similarities(page)[:2] == [1, 1]  # the two other photos of green
    assert len(similarities(page)) == 7  # nobody of the same photo


def test_photos_are_dropped_and_pasted_one_at_a_time(visit):
    page = visit(**WIDE)

    def send(event, holder, count):
        page.evaluate(
            """([event, holder, data, count]) => {
              const files = new DataTransfer();
              for (let n = 0; n < count; n += 1)
                files.items.add(new File([new Uint8Array(data)], "sent.png", {type: "image/png"}));
              const Kind = event === "drop" ? DragEvent : ClipboardEvent;
              document.body.dispatchEvent(
                new Kind(event, {bubbles: true, cancelable: true, [holder]: files}));
            }""",
            [event, holder, list(encoded(painted((RED, (40, 60))))), count],
        )

    for event, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.goto("/")
        send(event, holder, 2)
        expect(page.get_by_role("alert")).to_have_text("Please choose one photo at a time.")
        send(event, holder, 1)
        expect(page.get_by_text("Found 1 person")).to_be_visible()
        expect(page.get_by_role("heading", name="sent.png")).to_be_visible()


@pytest.mark.parametrize("visit", ["crowd"], indirect=True)
def test_results_come_while_scrolling_and_back_returns_to_the_place(visit):
    page = visit(**WIDE)
    page.get_by_label(CHOOSE).set_input_files(photo((RED, (9, 9))))
    page.locator(".people a").first.click()
    cards = page.locator(".results .card")
    expect(cards).to_have_count(PAGE)
    page.wait_for_load_state()
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


@pytest.mark.parametrize("visit", ["crowd"], indirect=True)
def test_everything_is_there_without_a_script_or_a_connection_for_a_while(visit, chromium):
    page = visit(**WIDE, java_script_enabled=False)
    page.get_by_label(CHOOSE).set_input_files(photo((RED, (9, 9))))
    page.get_by_role("button", name="Find people in it").click()
    page.locator(".people a").first.click()
    cards = page.locator(".results .card")
    expect(cards).to_have_count(PAGE)
    page.get_by_role("link", name="More results").click()
    assert cards.count() > PAGE
    cards.first.get_by_role("button", name="Right").click()
    expect(page.locator('[aria-pressed="true"]')).to_have_count(1)


def test_somebody_is_forgotten(visit):
    page = visit(**WIDE)
    page.get_by_role("link", name="f.png", exact=True).click()
    open_tool(page, "Forget or correct")
    page.get_by_label("2", exact=True).check()
    page.get_by_role("button", name="Forget for good").click()
    expect(page.get_by_text("1 person removed")).to_be_visible()
    expect(page.get_by_text("gate/f.png")).to_be_visible()


def test_a_phone(visit):
    page = visit(**PHONE, color_scheme="dark")

    def fits():
        return page.evaluate("document.documentElement.scrollWidth") <= 360

    assert fits()
    page.get_by_label(CHOOSE).set_input_files(photo((RED, (40, 60)), (GREEN, (200, 90))))
    page.locator(".people a").first.tap()
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
    page.goto(f"{page.url}&camera=yard")
    assert fits()
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


def test_by_keyboard_alone(visit):
    page = visit(**WIDE)
    names = []
    for _ in range(60):
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
    assert names[0] == "Skip to content"
    page.keyboard.press("Enter")
    arrived(page.get_by_role("heading", name="a.png"))
    for image in page.locator("img").all():
        assert image.get_attribute("alt") is not None
    page.locator(".people a").nth(1).focus()
    expect(page.locator(".photo a.hover")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Results")).to_be_visible()
