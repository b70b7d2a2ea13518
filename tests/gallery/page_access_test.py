"""Whom the page lets in, what it shows, and what it never does."""

from __future__ import annotations

import concurrent.futures
import contextlib
import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import h11
import httpx
import pytest

from alignps_jax.errors import UserError
from alignps_jax.gallery.page import access
from alignps_jax.gallery.page.access import Door, addresses
from alignps_jax.gallery.page.app import serve
from alignps_jax.gallery.page.uploads import MAX_WAITING
from tests.gallery.page_server import (
    PUBLIC,
    READ,
    Visitor,
    closed,
    everybody,
    line_of,
    painted_site,
    running,
)
from tests.gallery.painted import RED, ColorDetector, encoded, painted, scenes_of
from tests.places import ROOT, free_port, heed_signals


def test_the_text_about_responsible_use_comes_first_and_once(site):
    client = Visitor(site)
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
    for place in ("//evil.example", "https://evil.example", "/\\evil.example", "/\nx", ""):
        answer = client.post("/responsible-use", data={"next": place})
        assert answer.headers["location"] == "/"


@pytest.mark.parametrize(
    ("public_url", "host", "status"),
    [
        (None, "LOCALHOST:81", 200),
        (None, "[::1]:80", 200),
        (None, "", 400),
        (None, PUBLIC, 400),
        (None, "localhost, evil.example", 400),
        (f"https://{PUBLIC.upper()}/", PUBLIC, 200),
        (f"https://{PUBLIC}", "127.0.0.1:8000", 200),  # a proxy may keep its own
    ],
)
def test_the_names_of_a_server(site, public_url, host, status):
    client = Visitor(site, Door.of("127.0.0.1", 8000, None, public_url))
    assert client.get("/", headers={"Host": host}).status_code == status


def test_where_it_listens_and_how_it_is_called(site):
    everywhere = Door.of("0.0.0.0", 80, None, None)
    name = socket.gethostname()
    assert {"127.0.0.1", name, f"{name}.local"} <= {*everywhere.hosts}
    assert not {"0.0.0.0", "::"} & {*addresses("0.0.0.0"), *addresses("::")}
    for wrong in (PUBLIC, "ftp://a.b", "https://a.b/page", "https://"):
        with pytest.raises(UserError, match="--public_url"):
            Door.of("127.0.0.1", 80, None, wrong)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99999):
            with pytest.raises((OSError, UserError)):
                serve(site.gallery, "127.0.0.1", port)


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        # Behind a proxy that speaks TLS, whatever Host it hands on.
        ({"Sec-Fetch-Site": "same-origin", "Origin": f"https://{PUBLIC}"}, True),
        ({"Origin": f"https://{PUBLIC}"}, True),
        ({"Origin": "http://localhost"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://localhost:81"}, False),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "same-site"}, False),
        ({}, False),
    ],
)
def test_only_own_pages_change_anything(site, headers, is_own):
    client = Visitor(site, Door.of("127.0.0.1", 80, None, f"https://{PUBLIC}"))
    del client.headers["Origin"]
    answer = client.post("/responsible-use", data={"next": "/"}, headers=headers)
    assert answer.status_code == (303 if is_own else 403)
    for path in ("/upload", "/mark", "/scene/x/box"):
        assert (client.post(path, headers=headers).status_code != 403) is is_own


def test_the_token_comes_first(site):
    secret = "s3cret-" + "x" * 36
    client = Visitor(site, Door(token=secret, port=8000, origin=f"https://{PUBLIC}"))
    for path in ("/", "/?token=", "/?token=wrong", "/static/page.css", "/person/x.jpg"):
        answer = client.get(path)
        assert answer.status_code == 401
        assert answer.headers["connection"] == "close"
    assert client.post("/upload").status_code == 401
    for value in ("", secret[:-1], f"{secret}x", "\u00fc"):
        line = f"alignps_token_8000={value}".encode("latin-1")
        assert client.get("/", headers={"Cookie": line}).status_code == 401
    answer = client.get(f"/search?view=a&token={secret}&camera=x")
    assert (answer.status_code, answer.headers["location"]) == (303, "/search?view=a&camera=x")
    for part in ("httponly", "samesite=lax", "secure"):
        assert part in answer.headers["set-cookie"].lower()
    away = client.get(f"http://localhost//evil.example/?token={secret}")
    assert away.headers["location"].startswith("/evil")
    # Cookies of other servers of this host, and of other programs, harm nothing.
    own = f"alignps_token_8000={secret}; alignps_responsible_use=read"
    for other in ("", 'prefs={"a":1}; ', "alignps_token_8001=other; ", "a=\x80; ;;=; "):
        client.cookies.clear()
        line = {"Cookie": f"{other}{own}".encode("latin-1")}
        assert client.get("/", headers=line).status_code == 200
        foreign = line | {"Origin": "http://evil.example"}
        assert client.post("/upload", headers=foreign).status_code == 403
    key = {"Authorization": f"Bearer {secret}", "Origin": ""}
    assert client.post("/responsible-use", data={"next": "/"}, headers=key).status_code == 303


def test_every_answer_is_closed(client, site):
    scene = scenes_of(site)[0]
    name = '"><img src=x onerror=alert(1)>.png'
    photo = client.upload(encoded(painted()), name).headers["location"]
    pages = "/", f"/scene/{scene.id}", "/marks", "/responsible-use", photo
    for path in (*pages, "/nothing", f"/scene/{scene.id}/320.jpg", "/search?kind=x"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert client.head(path).status_code == answer.status_code
        if path in pages:  # nothing needs more than that, and names are text
            script = r"<script(?! src)|<style|\sstyle=|\son[a-z]+=|javascript:|<b>&|<img src=x"
            assert not re.search(script, answer.text.replace(html.escape(name), ""))
            assert set(re.findall(r'(?:src|href|action)="(https?:|//)', answer.text)) == set()
    script = client.get("/static/page.js")
    assert script.headers["content-encoding"] == "gzip"
    known = {"If-None-Match": script.headers["etag"]}
    assert client.get("/static/page.js", headers=known).status_code == 304


def test_a_photo_that_changed_or_went_is_a_placeholder_that_says_so(tmp_path):
    site = painted_site(tmp_path)
    gone, changed = everybody(site)[:2]
    os.unlink(gone.scene.path)
    Path(changed.scene.path).write_bytes(b"more")
    for person, line in ((gone, gone.scene.name), (changed, "has changed since it was indexed")):
        for path in (f"/scene/{person.scene.id}/1600.jpg", f"/person/{person.id}.jpg"):
            answer = Visitor(site).get(path)
            assert (answer.status_code, answer.headers["content-type"]) == (404, "image/svg+xml")
            assert line in answer.text


def test_too_much_is_refused_in_one_line(site, monkeypatch):
    monkeypatch.setattr("alignps_jax.gallery.page.access.MAX_BODY", 100_000)
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    body = (b"x" * 1000 for _ in range(300))
    answer = Visitor(site).post("/mark", content=body, headers=headers)
    assert answer.status_code == 413
    assert "Too Large" in line_of(answer)


def test_an_error_that_nobody_expected_shows_no_trace(tmp_path, capfd):
    class Broken(ColorDetector):
        def detect(self, image):
            if image.shape[:2] == (50, 60):
                raise RuntimeError("secret detail")
            return super().detect(image)

    client = Visitor(painted_site(tmp_path, Broken()))
    page = client.get(client.uploaded(encoded(painted(size=(50, 60)))))
    assert "the network failed on this photo" in page.text
    assert "secret" not in page.text
    assert "secret detail" in capfd.readouterr().err
    assert client.query()  # the thread that detects lives on


def test_whoever_sends_slowly_keeps_nobody_out(site, monkeypatch):
    monkeypatch.setattr(access, "PATIENCE", {h11.IDLE: 1, h11.SEND_BODY: 2})
    post = ["POST /mark HTTP/1.1", "Host: localhost", "Content-Length: 9"]
    with running(closed(site)) as port:
        start = time.monotonic()
        opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        for number, connection in enumerate(opened):
            connection.settimeout(20)
            lines = [*post, f"Origin: http://localhost:{port}", ""] if number % 2 else post[:2]
            connection.sendall("\r\n".join([*lines, ""]).encode())
        for connection in opened:
            while connection.recv(1 << 16):
                pass
            connection.close()
        assert 0.9 < time.monotonic() - start < 10
        assert httpx.get(f"http://127.0.0.1:{port}/", cookies=READ).status_code == 200


def test_more_photos_than_may_wait_are_sent_away(tmp_path):
    """Fifty come at once while the network is compiled: twenty photos, and searches meanwhile."""
    site, gate = painted_site(tmp_path), threading.Event()
    site.photos.warm_up(gate.wait)  # nothing else goes on before the gate opens
    view = everybody(site)[0].id

    def send(number):
        with httpx.Client(base_url=base, headers={"Origin": base}, cookies=READ) as client:
            if number >= 20:
                return client.get("/search", params={"view": view}, timeout=120)
            photo = encoded(painted((RED, (10 + number, 10))))
            return client.post("/upload", files={"photo": ("a.png", photo)})

    with running(closed(site)) as port, concurrent.futures.ThreadPoolExecutor(50) as pool:
        base = f"http://127.0.0.1:{port}"
        try:
            answers = list(pool.map(send, range(50)))
        finally:
            gate.set()
        taken = [one.headers["location"] for one in answers[:20] if one.status_code == 303]
        assert len(taken) == MAX_WAITING - 1
        assert [one.status_code for one in answers[:20]].count(503) == 20 - len(taken)
        assert {one.status_code for one in answers[20:]} == {200}
        assert "Found 1 person" in httpx.get(f"{base}{taken[-1]}", cookies=READ).text


NONSENSE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"POST /mark HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"HEAD /mark HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n--b--\r\n\r\n",
    b"GET /\0%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X" * 90_000,
)


def test_nonsense_ends_a_connection_and_nothing_else(site, caplog):
    with running(closed(site)) as port:
        for sent in NONSENSE:
            answer = b""
            with (
                contextlib.suppress(OSError),  # it may hang up before all is sent
                socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
            ):
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 4") or not answer
        assert httpx.get(f"http://127.0.0.1:{port}/", cookies=READ).status_code == 200
    assert caplog.text == ""


SERVE = """
import json, sys
from pathlib import Path
from alignps_jax.gallery.page.app import serve
from tests.gallery.page_server import painted_site
gallery = painted_site(Path(sys.argv[1])).gallery
gallery.detector.delay = 600.0
serve(gallery, **json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("number", "code", "options", "last"),
    [
        (signal.SIGINT, 130, {"host": "0.0.0.0"}, "http://127.0.0.1:"),
        (signal.SIGTERM, 143, {"no_token": True, "public_url": f"https://{PUBLIC}"}, "https://"),
    ],
)
def test_it_prints_its_addresses_and_ends_on_a_signal(tmp_path, number, code, options, last):
    """It compiles, somebody sends a photo and does not finish, somebody waits."""
    port, pipes = free_port(), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    given = json.dumps({"host": "127.0.0.1", "port": port} | options)
    command = [sys.executable, "-W", "ignore", "-c", SERVE, tmp_path, given]
    process = subprocess.Popen(command, cwd=ROOT, text=True, preexec_fn=heed_signals, **pipes)
    try:
        places = []
        for line in process.stdout:
            places += re.findall(r"^page +(.*)", line)
            if places and places[-1].startswith(last):
                break
        if "public_url" in options:
            assert places == [f"https://{PUBLIC}/"]
        else:
            assert all(len(httpx.URL(place).params["token"]) >= 40 for place in places)
            assert all(httpx.get(place).status_code == 303 for place in places)
        with socket.create_connection(("127.0.0.1", port)) as slow:
            lines = ["POST /upload HTTP/1.1", f"Host: localhost:{port}", "Content-Length: 900"]
            lines += ["Sec-Fetch-Site: same-origin"]
            lines += ["Content-Type: multipart/form-data; boundary=x", "", "--x\r\n"]
            slow.sendall("\r\n".join(lines).encode())
            time.sleep(0.3)
            process.send_signal(number)
            assert process.wait(timeout=30) == code
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
