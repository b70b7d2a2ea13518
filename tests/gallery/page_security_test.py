"""Whom the page lets in, what it shows, and what it never does."""

from __future__ import annotations

import html
import os
import re
import socket

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra gallery is missing: make setup")
pytest.importorskip("lancedb", reason="the extra gallery is missing: make setup")


from alignps_jax.gallery.page.security import LOOPBACK, is_loopback, own_names
from tests.gallery.page_server import (
    line_of,
    painted_site,
    upload,
    uploaded,
    visitor,
)
from tests.gallery.painted import RED, SIZE, ColorDetector, encoded, painted, scenes_of
from tests.places import ROOT


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
    scene = site.gallery.scenes(1)[0].scene
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
    a, b = (s for s in scenes_of(site) if s.path.endswith(("yard/a.png", "yard/b.png")))
    os.unlink(a.path)
    with open(b.path, "ab") as file:
        file.write(b"more")
    for scene, line in ((a, "cannot be read"), (b, "has changed since it was indexed")):
        person = site.gallery.people_of(scene.id)[0]
        for path in (f"/scene/{scene.id}/photo.jpg", f"/person/{person.id}.jpg"):
            answer = client.get(path)
            assert answer.status_code == 400
            assert line in line_of(answer)


def test_pictures_hold_pixels_and_nothing_else(client, site):
    scene = site.gallery.scenes(1)[0].scene
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
