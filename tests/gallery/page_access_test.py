"""Whom the page lets in, what it shows, and what it never does."""

from __future__ import annotations

import contextlib
import html
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import h11
import httpx
import numpy as np
import pytest

from alignps_jax.errors import UserError
from alignps_jax.gallery.page import access
from alignps_jax.gallery.page.access import Door, addresses
from alignps_jax.gallery.page.app import serve
from tests.gallery.page_server import (
    READ,
    closed,
    line_of,
    painted_site,
    people,
    results,
    running,
    server_process,
    upload,
    uploaded,
    visitor,
)
from tests.gallery.painted import RED, SIZE, ColorDetector, encoded, painted, scenes_of
from tests.places import ROOT

READ_COOKIE = "alignps_responsible_use=read"


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
        *("evil.example", "evil.example:80", "localhost.evil.example", "localhost@evil.example"),
        *("", "127.0.0.1.evil.example", "localhost, evil.example", "[::2]", "l\u00f6"),
    ],
)
def test_a_foreign_host_is_refused(client, host):
    assert client.get("/", headers={"Host": host.encode()}).status_code == 400


def test_the_names_of_a_server(site):
    client = visitor(site)
    for host in ("localhost", "LOCALHOST:81", "127.0.0.1:5000", "[::1]:80"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    everywhere = Door.of("0.0.0.0", 80, None, None)
    assert {"127.0.0.1", socket.gethostname(), f"{socket.gethostname()}.local"} <= {
        *everywhere.hosts
    }
    assert not {"0.0.0.0", "::"} & {*addresses("0.0.0.0"), *addresses("::")}
    assert addresses("0.0.0.0")[-1] == "127.0.0.1"
    named = Door.of("127.0.0.1", 8000, "T", "https://Photos.example.org/")
    assert named.origin == "https://photos.example.org"
    client = visitor(site, named)
    for host in ("photos.example.org", "127.0.0.1:8000"):  # a proxy may keep its own
        answer = client.get("/?token=T", headers={"Host": host})
        assert answer.status_code == 303
        assert "secure" in answer.headers["set-cookie"].lower()
    for wrong in ("photos.example.org", "ftp://a.b", "https://a.b/page", "https://"):
        with pytest.raises(UserError, match="--public_url"):
            Door.of("127.0.0.1", 80, None, wrong)


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, True),
        # Behind a proxy that speaks TLS, whatever Host it hands on.
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://photos.example.org"}, True),
        ({"Origin": "https://photos.example.org"}, True),
        ({"Origin": "http://localhost"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "https://localhost"}, False),
        ({"Origin": "http://localhost:81"}, False),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "same-site"}, False),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "none"}, False),
        ({}, False),
    ],
)
def test_only_own_pages_change_anything(site, headers, is_own):
    client = visitor(site, Door.of("127.0.0.1", 80, None, "https://photos.example.org"))
    del client.headers["Origin"]
    answer = client.post("/responsible-use", data={"next": "/"}, headers=headers)
    assert answer.status_code == (303 if is_own else 403)
    for path in ("/upload", "/mark", "/marks/forget", "/scene/x/box"):
        assert (client.post(path, headers=headers).status_code != 403) is is_own


def test_the_token_comes_first(site):
    secret = "s3cret-" + "x" * 36
    client = visitor(site, Door(token=secret, port=8000))
    for path in ("/", "/?token=", "/?token=wrong", "/static/page.css", "/person/x.jpg", "/status"):
        answer = client.get(path)
        assert answer.status_code == 401
        assert answer.headers["connection"] == "close"
    assert client.post("/upload").status_code == 401
    for value in ("", "wrong", secret[:-1], f"{secret}x", "\u00fc"):
        line = f"alignps_token_8000={value}".encode("latin-1")
        assert client.get("/", headers={"Cookie": line}).status_code == 401
    answer = client.get(f"/search?view=a&token={secret}&camera=x")
    assert (answer.status_code, answer.headers["location"]) == (303, "/search?view=a&camera=x")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert client.get("/").status_code == 200
    away = client.get(f"http://localhost//evil.example/?token={secret}")
    assert away.headers["location"].startswith("/evil")
    assert client.post("/upload", headers={"Origin": "http://evil.example"}).status_code == 403
    # Cookies of other servers of this host, and of other programs, harm nothing.
    for other in ('prefs={"a":1}; ', "alignps_token_8001=other; ", "a=\x80; ;;=; "):
        line = f"{other}alignps_token_8000={secret}; {READ_COOKIE}".encode("latin-1")
        stranger = visitor(site, Door(token=secret, port=8000))
        stranger.cookies.clear()
        assert stranger.get("/", headers={"Cookie": line}).status_code == 200
    script = visitor(site, Door(token=secret))
    del script.headers["Origin"]
    key = {"Authorization": f"Bearer {secret}"}
    assert script.post("/responsible-use", data={"next": "/"}, headers=key).status_code == 303


def test_every_answer_is_closed(client, site):
    scene = scenes_of(site)[0]
    picture = f"/scene/{scene.id}/320.jpg"
    for path in ("/", "/nothing", "/static/page.js", picture, "/search?kind=x"):
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
        "/static/%2e%2e/app.py",
        "/static/..%2f..%2fapp.py",
        "/static//etc/passwd",
        "/scene/%2fetc%2fpasswd/320.jpg",
        "/person/../../etc/passwd.jpg",
        "/person/%00.jpg",
        "/marks/..%2fx",
        "/scene/x' OR '1'='1/320.jpg",
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


def test_a_photo_that_changed_or_went_is_a_placeholder_that_says_so(tmp_path):
    site = painted_site(tmp_path)
    client = visitor(site)
    found = {scene.name: scene for scene in scenes_of(site)}
    a, b = found["a.png"], found["b.png"]
    os.unlink(a.path)
    with open(b.path, "ab") as file:
        file.write(b"more")
    for scene, line in ((a, "a.png"), (b, "has changed since it was indexed")):
        person = site.gallery.memory().people_of(scene.id)[0]
        for path in (f"/scene/{scene.id}/1600.jpg", f"/person/{person.id}.jpg"):
            answer = client.get(path)
            assert answer.status_code == 404
            assert answer.headers["content-type"] == "image/svg+xml"
            assert line in answer.text


def test_too_much_is_refused_in_one_line(site, monkeypatch):
    monkeypatch.setattr("alignps_jax.gallery.page.access.MAX_BODY", 100_000)
    client = visitor(site)
    big = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    assert upload(client, encoded(big)).status_code == 413
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = client.post("/mark", content=(b"x" * 1000 for _ in range(300)), headers=headers)
    assert answer.status_code == 413
    assert "Too Large" in line_of(answer)
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


def heads(answer):
    """Names and values of the answer to raw bytes."""
    return answer.partition(b"\r\n\r\n")[0].lower()


def ask(port, *lines, wait=5):
    """What the server sends to raw lines until it hangs up or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = b""
        with contextlib.suppress(TimeoutError):
            while part := connection.recv(1 << 16):
                answer += part
    return answer


def test_raw_requests(site):
    cookie = f"Cookie: {READ_COOKIE}"
    with running(closed(site)) as port:
        head = ask(port, "HEAD / HTTP/1.1", "Host: localhost", cookie, "Connection: close")
        assert head.startswith(b"HTTP/1.1 200")
        assert head.partition(b"\r\n\r\n")[2] == b""  # no body
        get = ["Host: localhost", cookie, "Accept-Encoding: gzip", "Connection: close"]
        assert b"content-encoding: gzip" in heads(ask(port, "GET / HTTP/1.1", *get))
        script = heads(ask(port, "GET /static/page.js HTTP/1.1", *get))
        etag = re.search(rb'etag: ("[^"]+")', script)[1].decode()
        assert b"cache-control: no-cache" in script
        assert b"cache-control: no-store" in heads(ask(port, "GET / HTTP/1.1", *get))
        known = ask(port, "GET /static/page.js HTTP/1.1", *get, f"If-None-Match: {etag}")
        assert known.startswith(b"HTTP/1.1 304")
        twice = ask(port, "GET / HTTP/1.1", "Host: localhost", "Host: evil.example")
        assert twice.startswith(b"HTTP/1.1 400")


def test_whoever_sends_slowly_keeps_nobody_out(site, monkeypatch):
    monkeypatch.setattr(access, "_PATIENCE", {h11.IDLE: 1, h11.SEND_BODY: 2})
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


def test_two_servers_of_this_machine_ask_for_their_tokens(tmp_path):
    with server_process(tmp_path) as (_, (one,)), server_process(tmp_path) as (_, (two,)):
        assert len(httpx.URL(one).params["token"]) >= 40
        assert httpx.get(httpx.URL(one).copy_with(query=None)).status_code == 401
        with httpx.Client(cookies=READ, follow_redirects=True) as client:
            for address in (one, two, one, two):
                assert client.get(address).status_code == 200
            for address in (one, two):  # with the cookies of both
                assert client.get(httpx.URL(address).copy_with(query=None)).status_code == 200


def test_all_addresses_are_printed_and_one_opens_here(tmp_path):
    with server_process(tmp_path, host="0.0.0.0") as (_, addresses):
        assert any("//127.0.0.1:" in address for address in addresses)
        assert not any("0.0.0.0" in address for address in addresses)
        for address in addresses:
            assert httpx.get(address).status_code == 303
    with server_process(tmp_path, no_token=True) as (_, (address,)):
        assert "token" not in address
        assert httpx.get(address, cookies=READ).status_code == 200


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_ends_on_a_signal_whatever_it_does(tmp_path, number, code):
    """It compiles, somebody sends a photo and does not finish, somebody waits."""
    with server_process(tmp_path, delay=600.0, no_token=True) as (process, (address,)):
        assert httpx.get(address, cookies=READ).status_code == 200
        port = httpx.URL(address).port
        with socket.create_connection(("127.0.0.1", port)) as slow:
            lines = ["POST /upload HTTP/1.1", f"Host: localhost:{port}", "Content-Length: 900"]
            lines += [
                "Sec-Fetch-Site: same-origin",
                "Content-Type: multipart/form-data; boundary=x",
            ]
            slow.sendall("\r\n".join([*lines, "", "--x\r\n"]).encode())
            time.sleep(0.3)
            process.send_signal(number)
            assert process.wait(timeout=30) == code
        assert process.stderr.read() == ""


def test_a_place_where_it_cannot_listen_is_an_error(site):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = [("127.0.0.1", taken.getsockname()[1]), ("203.0.113.7", 0), ("no.such.invalid", 0)]
        for host, port in [*places, ("127.0.0.1", 99999), ("127.0.0.1", -1)]:
            with pytest.raises((OSError, UserError)):
                serve(site.gallery, host, port)


NGINX = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_max_body_size 70m; client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u;
  scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{tls} ssl; ssl_certificate {folder}/cert.pem;
    ssl_certificate_key {folder}/key.pem;
    location / {{ proxy_pass http://127.0.0.1:{port}; {host} }}
  }}
}}
"""


@pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx: apt-get install nginx-light")
@pytest.mark.parametrize("host", ["", "proxy_set_header Host photos.example.org;"])
def test_behind_a_proxy_that_speaks_tls_all_forms_work(tmp_path, host):
    subject = ["-subj", "/CN=photos.example.org", "-keyout", "key.pem", "-out", "cert.pem"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        tls = free.getsockname()[1]
    public = "https://photos.example.org"
    with server_process(tmp_path, public_url=public) as (process, (address,)):
        found = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True).stdout
        port = re.search(rf"127\.0\.0\.1:(\d+) .*pid={process.pid},", found)[1]
        config = tmp_path / "nginx.conf"
        config.write_text(NGINX.format(folder=tmp_path, tls=tls, port=port, host=host))
        proxy = subprocess.Popen(["nginx", "-c", config, "-p", tmp_path], stderr=subprocess.PIPE)
        try:
            browser = httpx.Client(verify=False, base_url=f"https://127.0.0.1:{tls}", timeout=30)
            browser.headers.update({"Origin": public, "Sec-Fetch-Site": "same-origin"})
            for _ in range(50):
                with contextlib.suppress(httpx.ConnectError):
                    browser.get("/")
                    break
                time.sleep(0.1)
            entered = browser.get(f"/?{httpx.URL(address).query.decode()}")
            assert entered.status_code == 303
            name, value = entered.headers["set-cookie"].partition(";")[0].split("=")
            browser.cookies.set(name, value)
            read = browser.post("/responsible-use", data={"next": "/"})
            assert read.headers["location"] == "/"
            browser.cookies.set("alignps_responsible_use", "read")
            place = uploaded(browser, encoded(painted((RED, (10, 10)))))
            page = browser.get(place)
            assert "Found 1 person" in page.text
            found = browser.get(people(page)[0])
            person = results(found)[0][1]
            assert browser.post(f"{place}/box", data={"box": "9,9,41,91"}).status_code == 303
            view = httpx.URL(people(page)[0]).params["view"]
            for form in ({"person": person, "mark": "right"}, {"person": person, "mark": "none"}):
                assert browser.post("/mark", data={"view": view} | form).status_code == 303
            assert browser.post("/marks/forget", data={"view": view}).status_code == 303
            foreign = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
            assert browser.post("/mark", headers=foreign).status_code == 403
        finally:
            proxy.terminate()
            proxy.wait()
