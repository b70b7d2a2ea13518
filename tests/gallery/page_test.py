"""The page by its requests: what it shows, whom it lets in, and what it makes of nonsense."""

from __future__ import annotations

import concurrent.futures
import html
import json
import os
import random
import re
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra gallery is missing: make setup")
pytest.importorskip("lancedb", reason="the extra gallery is missing: make setup")

import httpx

from alignps_jax.gallery.page.app import make_app
from alignps_jax.gallery.page.finder import MAX_WAITING, Finder
from alignps_jax.gallery.page.security import LOOPBACK, Door, is_loopback, own_names
from tests.gallery.page_server import READ, painted_site, running, visitor
from tests.gallery.painted import BLUE, GREEN, RED, SIZE, ColorDetector, encoded, painted
from tests.places import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def site(folder):
    return painted_site(folder)


@pytest.fixture
def client(site):
    return visitor(site)


def upload(client, photo, name="query.png", **fields):
    return client.post("/upload", files={"photo": (name, photo)}, data=fields)


def uploaded(client, photo):
    """The address of an uploaded photo whose people were found."""
    answer = upload(client, photo)
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


def people(page):
    """The searches that a page of a photo offers."""
    found = re.findall(r'<a href="(/search\?[^"]*)" aria-label', page.text)
    return [html.unescape(address) for address in found]


def results(page):
    """Similarity and person of each result of a page."""
    found = re.findall(r'id="result-([^"]+)".*?<strong>(-?[\d.]+)</strong>', page.text, re.DOTALL)
    return [(float(similarity), person) for person, similarity in found]


def color_of(site, person):
    """The color that was painted there."""
    found = site.gallery.person(person)
    x1, y1, x2, y2 = found.box.astype(int)
    return tuple(int(v) for v in site.gallery.pixels(found.scene)[(y1 + y2) // 2, (x1 + x2) // 2])


def line_of(answer):
    """The one line that an error page shows."""
    (line,) = re.findall(r'<p class="empty" role="alert">(.*?)</p>', answer.text, re.DOTALL)
    return html.unescape(line)


def test_from_a_photo_to_its_people_to_their_results(client, site):
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10)), (GREEN, (90, 40))))))
    assert "Found 2 people" in page.text
    assert len(people(page)) == 2
    colors = {}
    for address in people(page):
        found = results(client.get(address))
        assert len(found) == 9  # everybody
        assert found == sorted(found, key=lambda one: -one[0])
        same = {color_of(site, person) for similarity, person in found if similarity == 1}
        (color,) = same
        colors[color] = sum(similarity == 1 for similarity, _ in found)
    assert colors == {RED: 4, GREEN: 3}


def test_a_result_leads_to_its_scene_and_to_a_search_from_there(client, site):
    page = client.get(uploaded(client, encoded(painted((BLUE, (10, 10))))))
    (best, *_), query = results(client.get(people(page)[0])), people(page)[0]
    assert best[0] == 1
    person = site.gallery.person(best[1])
    scene = client.get(f"/scene/{person.scene.id}", params={"person": person.id})
    assert scene.text.count('class="chosen"') == 2  # in the photo and in the list
    assert "c d.png" in scene.text
    again = client.get("/search", params={"view": person.id})
    assert person.id not in [one for _, one in results(again)]  # not the query itself
    assert "Searched 9 people" in again.text
    assert query.startswith("/search?view=up.")


def test_views_are_combined_by_their_mean_or_their_best(client, site):
    everybody = [p for s in site.gallery.scenes(99) for p in site.gallery.people(s.id)]
    of = {color: [p for p in everybody if color_of(site, p.id) == color] for color in (RED, GREEN)}
    views = [of[RED][0].id, of[GREEN][0].id]
    embeddings = site.gallery.embeddings([p.id for p in everybody])
    queries = site.gallery.embeddings(views)
    mean = queries.mean(0) / np.linalg.norm(queries.mean(0))
    expected = {"mean": embeddings @ mean, "best": (embeddings @ queries.T).max(1)}
    for combine, similarity in expected.items():
        found = client.get("/search", params={"view": views, "combine": combine})
        oracle = {p.id: s for p, s in zip(everybody, similarity, strict=True) if p.id not in views}
        assert {person: s for s, person in results(found)} == pytest.approx(oracle, abs=2e-3)
        assert f"by the {combine} of the views" in found.text
    found = client.get("/search", params={"view": views, "combine": "worst"})
    assert found.status_code == 400
    assert "mean or best" in line_of(found)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"camera": "yard"}, 5),
        ({"camera": ["yard", "gate"]}, 9),
        ({"folder": "{photos}/gate"}, 4),
        ({"folder": "{photos}"}, 9),
        ({"after": "2026-05-01T05:00:00"}, 5),
        ({"before": "2026-05-01T04:30:00", "camera": "gate"}, 4),
        ({"score": "0.95"}, 0),
        ({"kind": "videos"}, 0),
        ({"kind": "photos"}, 9),
    ],
)
def test_filters_are_in_the_address(client, site, folder, fields, count):
    fields = {
        name: value.format(photos=(folder / "photos").resolve()) if name == "folder" else value
        for name, value in fields.items()
    }
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10))))))
    query = httpx.URL(people(page)[0])
    found = client.get(query.copy_merge_params(fields))
    assert len(results(found)) == count
    if not count:
        assert "Nobody passes this filter" in found.text
    # Whatever leads on keeps the filter.
    for address in re.findall(r'href="(/search\?view=[^"]+)">Search from here', found.text):
        kept = httpx.URL(html.unescape(address)).params
        for name, value in fields.items():
            assert kept.get_list(name) == ([value] if isinstance(value, str) else value)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"folder": "/etc"}, "no photos of the gallery"),
        ({"folder": "../../etc"}, "no photos of the gallery"),
        ({"folder": "a\0b"}, "no photos of the gallery"),
        ({"after": "yesterday"}, "no date and time"),
        ({"after": "2026-05-01T00:00+01:00"}, "no date and time"),
        ({"before": "0001-01-01"}, "no date and time"),
        ({"score": "nan"}, "number from 0 to 1"),
        ({"score": "1e9"}, "number from 0 to 1"),
        ({"kind": "paintings"}, "photos or videos"),
        ({"view": ["x"] * 2 + [str(n) for n in range(13)]}, "12 views"),
        ({"view": "up.000000000000000000000000.0"}, "does not have this photo any more"),
        ({"view": "nobody' OR 1=1 --"}, "not in the gallery"),
    ],
)
def test_a_wrong_address_is_one_line(client, fields, line):
    answer = client.get("/search", params=fields)
    assert answer.status_code == 400
    assert line in line_of(answer)


def test_results_come_page_by_page(client, site, monkeypatch, tmp_path):
    view = site.gallery.people(next(s.id for s in site.gallery.scenes(9) if "a.png" in s.path))[0]
    whole = results(client.get("/search", params={"view": view.id}))
    rest = client.get("/results", params={"view": view.id, "offset": 3})
    assert results(rest) == whole[3:]
    assert "<html" not in rest.text
    for offset in (-1, 10**9):
        assert client.get("/results", params={"view": view.id, "offset": offset}).status_code == 400
    assert client.get("/results", params={"view": view.id, "offset": "x"}).status_code == 400


def test_friendly_lines_for_photos_that_are_none(client):
    good = encoded(painted((RED, (10, 10))))
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 20_000, 20_000) + b"\x08\x02\0\0\0"
    for photo, line in (
        (b"", "choose a photo first"),
        (b"not a photo", "this is not a photo"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "this is not a photo"),
        (huge, "20000x20000 pixels are too many"),
    ):
        answer = upload(client, photo)
        assert answer.status_code == 400
        assert line in line_of(answer)
    answer = client.get(uploaded(client, good[: len(good) // 2]))
    assert "cannot be decoded" in answer.text
    assert "Choose another photo" in answer.text
    page = client.get(uploaded(client, encoded(painted())))
    assert "Nobody was found in this photo" in page.text
    assert client.post("/upload", data={"photo": "text"}).status_code == 400
    assert client.post("/upload", content=b"{}").status_code == 415
    broken = {"Content-Type": "multipart/form-data"}
    assert client.post("/upload", content=b"x", headers=broken).status_code == 400
    many = [("photo", ("a.png", good))] * 2
    assert client.post("/upload", files=many).status_code == 400


def test_an_empty_gallery_says_so(tmp_path):
    (tmp_path / "photos").mkdir()
    client = visitor(painted_site(tmp_path))
    assert "The gallery is empty" in client.get("/").text
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10))))))
    assert "The gallery is empty" in client.get(people(page)[0]).text


def test_a_box_finds_who_is_in_it(client, site):
    small = painted((RED, (10, 10)))
    small[150:180, 200:215] = GREEN  # found with a score that is not shown
    place = uploaded(client, encoded(small))
    assert len(people(client.get(place))) == 1
    answer = client.post(f"{place}/box", data={"box": "190,140,230,190"})
    assert answer.status_code == 303
    found = client.get(answer.headers["location"])
    assert color_of(site, results(found)[0][1]) == GREEN
    picture = client.get(re.findall(r'<img src="(/upload/[^"]+\.jpg)"', found.text)[0])
    assert picture.headers["content-type"] == "image/jpeg"
    nobody = client.post(f"{place}/box", data={"box": "100,10,110,20"})
    assert "Nobody was found in this box" in line_of(nobody)
    for box in ("", "1,2,3", "a,b,c,d", "nan,1,2,3", "9,9,1,1", "1e30,1,1e31,9"):
        assert client.post(f"{place}/box", data={"box": box}).status_code == 400


def test_a_box_in_a_photo_of_the_gallery(client, site):
    scene = next(s for s in site.gallery.scenes(9) if s.path.endswith("yard/a.png"))
    green = client.post(f"/scene/{scene.id}/box", data={"box": "195,80,240,170"})
    assert color_of(site, results(client.get(green.headers["location"]))[0][1]) == GREEN
    # Nobody of the gallery is there, so the photo is searched once more, and in vain.
    empty = client.post(f"/scene/{scene.id}/box", data={"box": "100,10,110,20"})
    assert "Nobody was found in this box" in line_of(client.get(empty.headers["location"]))


def test_marks_are_kept_and_downloaded(folder, client, site):
    page = client.get(uploaded(client, encoded(painted((RED, (10, 10))))))
    query = httpx.URL(people(page)[0]).params
    ranked = [person for _, person in results(client.get("/search", params=query))]
    right, wrong = ranked[:2], ranked[5]
    for person, mark in (
        (right[0], "right"),
        (right[1], "wrong"),
        (right[1], "right"),
        (wrong, "wrong"),
        (ranked[7], "right"),
        (ranked[7], "none"),
    ):
        answer = client.post("/mark", data={"view": query["view"], "person": person, "mark": mark})
        assert answer.status_code == 303
    lines = client.get("/marks/marks.csv", params=query).text.splitlines()
    assert len(lines) == 4
    assert [line.rpartition(",")[2] for line in lines[1:]] == ["right", "right", "wrong"]
    coco = client.get("/marks/test.json", params=query)
    assert "attachment" in coco.headers["content-disposition"]
    assert [one["person_id"] for one in coco.json()["annotations"]] == [0, 0, -1]
    assert len(client.get("/marks/query.json", params=query).json()["annotations"]) == 1
    # Another server finds them again.
    again = visitor(painted_site(folder))
    assert again.get("/marks/marks.csv", params=query).text.splitlines() == lines
    assert "2 right, 1 wrong" in again.get("/marks").text
    assert again.post("/marks/forget", data={"view": query["view"]}).status_code == 303
    assert "Nothing is marked yet" in again.get("/marks").text
    assert again.get("/marks/marks.csv").status_code == 400
    for fields in ({"mark": "maybe"}, {"person": "x"}, {"view": ""}):
        data = {"view": query["view"], "person": right[0], "mark": "right"} | fields
        assert client.post("/mark", data=data).status_code in (400, 404)
    assert client.get("/marks/passwd").status_code == 400


def test_the_text_about_responsible_use_comes_first_and_once(site):
    client = visitor(site)
    client.cookies.clear()
    answer = client.get("/search?view=a&camera=gate")
    assert answer.status_code == 303
    text = client.get(answer.headers["location"])
    shown = html.unescape(re.search(r'<p id="text">(.*?)</p>', text.text, re.DOTALL)[1])
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"## Responsible use\n(.*?)\n## ", readme, re.DOTALL)[1]
    assert shown.split() == section.split()
    place = html.unescape(re.search(r'name="next" value="([^"]*)"', text.text)[1])
    answer = client.post("/responsible-use", data={"next": place})
    assert answer.headers["location"] == "/search?view=a&camera=gate"
    assert client.get("/").status_code == 200
    for place in ("//evil.example", "https://evil.example", "/\\evil.example", "evil", "/\nx", ""):
        answer = client.post("/responsible-use", data={"next": place})
        assert answer.headers["location"] == "/"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "localhost@evil.example",
        "",
        "127.0.0.1.evil.example",
        "localhost, evil.example",
        "[::2]",
        "localhost:99999999",
        "l\u00f6",
    ],
)
def test_a_foreign_host_is_refused(client, host):
    answer = client.get("/", headers={"Host": host.encode()})
    assert answer.status_code == 421


def test_own_hosts_are_answered(client):
    for host in ("localhost", "LOCALHOST:81", "127.0.0.1:5000", "[::1]:80"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    assert own_names("127.0.0.1") == own_names("localhost") == LOOPBACK
    assert {"0.0.0.0", "127.0.0.1", socket.gethostname().lower()} <= own_names("0.0.0.0")
    hosts = (
        "localhost",
        "127.0.0.1",
        "127.8.8.8",
        "::1",
        "[::1]",
        "0.0.0.0",
        "10.0.0.1",
        "::",
        "x",
    )
    assert [is_loopback(host) for host in hosts] == [True] * 5 + [False] * 4


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://localhost"},
        {"Origin": "http://localhost:81"},
        {"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://localhost", "Sec-Fetch-Site": "same-site"},
        {},
    ],
)
def test_only_own_pages_change_anything(site, headers):
    client = visitor(site)
    del client.headers["Origin"]
    for path in ("/upload", "/mark", "/marks/forget", "/responsible-use", "/scene/x/box"):
        assert client.post(path, data={"next": "/"}, headers=headers).status_code == 403
    own = {"Sec-Fetch-Site": "same-origin"}
    assert client.post("/responsible-use", data={"next": "/"}, headers=own).status_code == 303


def test_beyond_this_machine_a_token_comes_first(site):
    secret = "s3cret-" + "x" * 36
    client = visitor(site, token=secret)
    for path in ("/", "/?token=", "/?token=wrong", "/static/page.css", "/person/x.jpg", "/status"):
        assert client.get(path).status_code == 401
    assert client.post("/upload").status_code == 401
    for value in ("", "wrong", secret[:-1], f"{secret}x", "\u00fc"):
        line = f"alignps_token={value}".encode("latin-1")
        assert client.get("/", headers={"Cookie": line}).status_code == 401
    answer = client.get(f"/search?view=a&token={secret}&camera=x")
    assert (answer.status_code, answer.headers["location"]) == (303, "/search?view=a&camera=x")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    assert client.get("/").status_code == 200
    assert (
        client.get(f"http://localhost//evil.example/?token={secret}")
        .headers["location"]
        .startswith("/evil")
    )
    assert client.post("/upload", headers={"Origin": "http://evil.example"}).status_code == 403


def test_every_answer_is_closed(client, site):
    scene = site.gallery.scenes(1)[0]
    for path in (
        "/",
        "/nothing",
        "/static/page.js",
        f"/scene/{scene.id}/small.jpg",
        "/search?kind=x",
    ):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
    # Nothing of a page needs more than that.
    for path in ("/", f"/scene/{scene.id}", "/marks", "/responsible-use"):
        page = client.get(path).text
        assert not re.search(r"<script(?! src)|<style|\sstyle=|\son[a-z]+=|javascript:", page)
        assert set(re.findall(r'(?:src|href|action)="(https?:|//)', page)) == set()


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2f..%2fapp.py",
        "/static//etc/passwd",
        "/scene/..%2f..%2fetc%2fpasswd",
        "/scene/%2fetc%2fpasswd/photo.jpg",
        "/person/../../etc/passwd.jpg",
        "/scene/x/video",
        "/upload/../etc/passwd",
        "/person/%00.jpg",
        "/marks/..%2fx",
        "/scene/x' OR '1'='1/photo.jpg",
        "/etc/passwd",
        "/docs",
        "/openapi.json",
        "/redoc",
    ],
)
def test_no_path_leads_to_a_file(client, path):
    answer = client.get(path)
    assert answer.status_code in (400, 404)
    assert "root:" not in answer.text


def test_names_are_shown_as_text(client, site):
    page = client.get("/").text
    assert "&lt;b&gt;&amp;.png" in page
    assert "<b>&" not in page
    name = '"><img src=x onerror=alert(1)>.png'
    page = client.get(upload(client, encoded(painted()), name).headers["location"]).text
    assert "<img src=x" not in page


def test_a_photo_that_changed_or_went_is_not_shown(tmp_path):
    site = painted_site(tmp_path)
    client = visitor(site)
    a, b = (s for s in site.gallery.scenes(9) if s.path.endswith(("yard/a.png", "yard/b.png")))
    os.unlink(a.path)
    with open(b.path, "ab") as file:
        file.write(b"more")
    for scene, line in ((a, "cannot be read"), (b, "has changed since it was indexed")):
        person = site.gallery.people(scene.id)[0]
        for path in (f"/scene/{scene.id}/photo.jpg", f"/person/{person.id}.jpg"):
            answer = client.get(path)
            assert answer.status_code == 400
            assert line in line_of(answer)


def test_pictures_hold_pixels_and_nothing_else(client, site):
    scene = site.gallery.scenes(1)[0]
    for path in (f"/scene/{scene.id}/photo.jpg", f"/scene/{scene.id}/small.jpg"):
        data = client.get(path).content
        assert data.startswith(b"\xff\xd8")
        assert b"Exif" not in data


def test_too_much_is_refused_in_one_line(site):
    client = visitor(site, max_body=100_000)
    big = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    assert upload(client, encoded(big)).status_code == 413

    def endless():
        for _ in range(300):
            yield b"x" * 1000

    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client.post("/mark", content=endless(), headers=headers)
    assert answer.status_code == 413
    assert "too large" in answer.text
    assert upload(client, encoded(painted((RED, (10, 10))))).status_code == 303


class Counting(ColorDetector):
    """Knows how many photos it saw at once."""

    def __init__(self, delay):
        super().__init__(delay)
        self.now = self.most = 0
        self.lock = threading.Lock()

    def detect(self, image):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return super().detect(image)
        finally:
            with self.lock:
                self.now -= 1


def test_fifty_at_once(tmp_path):
    detector = Counting(0.0)
    site = painted_site(tmp_path, detector)
    detector.delay = 0.1
    photo = encoded(painted((RED, (10, 10))))
    person = next(p for s in site.gallery.scenes(9) for p in site.gallery.people(s.id))
    detector.most = 0

    def send(number):
        with httpx.Client(
            base_url=base, headers={"Origin": base}, cookies=READ, timeout=120
        ) as client:
            if number % 2:
                return client.get("/search", params={"view": person.id}).status_code
            files = {"photo": (f"{number}.png", photo)}
            answer = client.post("/upload", files=files, follow_redirects=True)
            return answer.status_code

    with running(make_app(site, Door(LOOPBACK))) as port:
        base = f"http://127.0.0.1:{port}"
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            codes = list(pool.map(send, range(50)))
    assert codes[1::2] == [200] * 25
    assert set(codes[::2]) <= {200, 503}
    assert codes[::2].count(200) >= MAX_WAITING
    assert detector.most == 1


def test_more_photos_than_may_wait_are_sent_away():
    gate = threading.Event()
    detector = ColorDetector()
    finder = Finder(detector, waiting=2, kept=2)
    finder.warm_up(gate.wait)  # nothing else goes on before the gate opens
    photo = encoded(painted((RED, (10, 10))))
    answers = []
    for number in range(6):
        try:
            answers.append(finder.upload(f"{number}.png", photo))
        except Exception as error:
            answers.append(type(error).__name__)
        time.sleep(0.05)
    gate.set()
    taken = [one for one in answers if not isinstance(one, str)]
    assert answers.count("BusyError") >= 2
    end = time.monotonic() + 20
    while not all(one.is_done for one in taken) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(one.shown == 1 for one in taken)
    assert finder.get(taken[-1].id) is taken[-1]


def malformed(rng):
    """A request that no browser sends: wrong in one or several places."""
    words = [
        b"/",
        b"/upload",
        b"/search?view=",
        b"/scene/",
        b"/person/x.jpg",
        b"/mark",
        b"/static/",
        b"\0",
        b"%00",
        b"%ff%fe",
        b"../",
        b"?offset=-1",
        b"&offset=1e400",
        b"?view=up.",
        b"'",
        b"\xc3\x28",
        b"*",
        b"http://evil.example/",
        b"?score=NaN",
        b"&folder=%2fetc",
        b"&after=0000",
        b"?camera=" + b"x" * 3000,
    ]
    heads = [
        b"Host: localhost",
        b"Host: localhost",
        b"Host: localhost",
        b"Host: evil.example",
        b"Host: \0",
        b"Content-Length: -1",
        b"Content-Length: 99999999999999",
        b"Content-Length: x",
        b"Content-Length: 4",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: nonsense",
        b"Content-Type: multipart/form-data",
        b"Content-Type: multipart/form-data; boundary=" + b"b" * 200,
        b"Cookie: \xff=\xfe; ;;=",
        b"Content-Type: application/x-www-form-urlencoded",
        b"Origin: http://localhost",
        b"Origin: \xff",
        b"Range: bytes=9-1,-,x",
        b"Expect: 100-continue",
        b"Sec-Fetch-Site: same-origin",
        b": empty",
        b"X" * 9000,
        b"HX-Request: true",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b'If-None-Match: "',
    ]
    bodies = [
        b"",
        b"abcd",
        b"--b\r\n\r\n--b--",
        rng.randbytes(50),
        b"view=%00&mark=right&person='",
        b"4\r\nabcd\r\n0\r\n\r\n",
        b"zz\r\n",
        zlib.compress(b"x"),
    ]
    method = rng.choice(
        [b"GET", b"GET", b"POST", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"\xff", b"get", b""]
    )
    path = b"".join(rng.choices(words, k=rng.randint(1, 3)))
    version = rng.choice([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b""])
    lines = [b" ".join([method, path, version]), *rng.sample(heads, rng.randint(0, 5))]
    return rng.choice([b"\r\n", b"\r\n", b"\n"]).join([*lines, b"", rng.choice(bodies)])


def test_a_thousand_malformed_requests(site, caplog):
    rng = random.Random(16)
    codes = []
    with running(make_app(site, Door(LOOPBACK)), timeout_keep_alive=1) as port:
        for _ in range(1000):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(malformed(rng))
                connection.shutdown(socket.SHUT_WR)
                answer = b""
                try:
                    while part := connection.recv(1 << 16):
                        answer += part
                except ConnectionResetError:  # closed while we were still sending
                    pass
            assert b"Traceback" not in answer
            assert b"site-packages" not in answer
            found = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
            codes.append(int(found[1]) if found else 0)
        assert 500 not in codes
        assert httpx.get(f"http://127.0.0.1:{port}/", cookies=READ).status_code == 200
    assert {400, 403, 404, 405, 421} <= set(codes)
    assert "Exception in ASGI application" not in caplog.text


def test_an_error_that_nobody_expected_shows_no_trace(tmp_path, capfd):
    class Broken(ColorDetector):
        def detect(self, image):
            if image.shape[:2] == (50, 60):
                raise RuntimeError("secret detail")
            return super().detect(image)

    site = painted_site(tmp_path, Broken())
    client = visitor(site)
    page = client.get(uploaded(client, encoded(painted(size=(50, 60)))))
    assert "the network failed on this photo" in page.text
    assert "secret" not in page.text
    assert "secret detail" in capfd.readouterr().err
    # The thread that detects lives on.
    assert "Found 1 person" in client.get(uploaded(client, encoded(painted((RED, (9, 9)))))).text


def test_the_status_says_what_goes_on():
    finder = Finder(ColorDetector())
    gate, entered = threading.Event(), threading.Event()

    def wait():
        entered.set()
        gate.wait()

    finder.warm_up(wait)
    assert entered.wait(20)
    status = finder.status()
    assert status.first == "the search"
    assert status.seconds >= 0
    gate.set()
    end = time.monotonic() + 20
    while (finder.status().first or finder.status().waiting) and time.monotonic() < end:
        time.sleep(0.01)
    assert finder.status().first is None


def test_marks_that_are_none_are_refused(tmp_path):
    from alignps_jax.gallery.page.marks import Marks
    from alignps_jax.types import UserError

    for text in (
        "",
        "[]",
        "{}",
        '{"queries": [{}]}',
        '{"queries": 3}',
        json.dumps(
            {"queries": [{"views": [], "marks": [{"person": {}, "similarity": 1, "right": True}]}]}
        ),
    ):
        file = tmp_path / "marks.json"
        file.write_text(text)
        with pytest.raises(UserError, match=r"marks\.json: found no marks in it"):
            Marks(file)
