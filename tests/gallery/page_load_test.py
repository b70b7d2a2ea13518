"""The page with many visitors at once, and with a thousand requests that make no sense."""

from __future__ import annotations

import concurrent.futures
import random
import re
import socket
import threading
from urllib.parse import quote

import httpx
import pytest

from alignps_jax.gallery.page.uploads import MAX_WAITING
from tests.gallery.page_server import READ, closed, everybody, painted_site, running, upload
from tests.gallery.painted import RED, encoded, painted


def test_more_photos_than_may_wait_are_sent_away(tmp_path):
    """Fifty come at once while the network is compiled: twenty photos, and searches meanwhile."""
    site, gate = painted_site(tmp_path), threading.Event()
    site.photos.warm_up(gate.wait)  # nothing else goes on before the gate opens
    view = everybody(site)[0].id

    def send(number):
        with httpx.Client(base_url=base, headers={"Origin": base}, cookies=READ) as client:
            if number >= 20:
                return client.get("/search", params={"view": view}, timeout=120)
            return upload(client, encoded(painted((RED, (10 + number, 10)))))

    with running(closed(site)) as port, concurrent.futures.ThreadPoolExecutor(50) as pool:
        base = f"http://127.0.0.1:{port}"
        try:
            answers = list(pool.map(send, range(50)))
            number, first = next(x for x in enumerate(answers) if x[1].status_code == 303)
            assert send(number).headers["location"] == first.headers["location"]
        finally:
            gate.set()
        taken = [one.headers["location"] for one in answers[:20] if one.status_code == 303]
        assert [one.status_code for one in answers[:20]].count(503) == 20 - len(taken) > 0
        assert MAX_WAITING - 2 <= len(taken) <= MAX_WAITING
        assert {one.status_code for one in answers[20:]} == {200}
        for place in taken:
            page = httpx.get(f"{base}{place}", cookies=READ, timeout=120)
            assert "Found 1 person" in page.text


PATHS = (
    *(b"/", b"/upload", b"/search?view=", b"/scene/", b"/person/x.jpg", b"/mark", b"/static/"),
    *(b"\0", b"%00", b"%ff%fe", b"../", b"?offset=-1", b"?shown=1e400", b"'", b"\xc3\x28", b"*"),
    *(b"http://evil.example/", b"?score=NaN", b"&folder=%2fetc", b"?camera=" + b"x" * 3000),
)
HEADS = (
    *(b"Host: localhost", b"Host: localhost", b"Host: evil.example", b"Host: \0", b": empty"),
    *(b"Content-Length: -1", b"Content-Length: 99999999999999", b"Content-Length: x"),
    *(b"Content-Length: 4", b"Transfer-Encoding: chunked", b"Transfer-Encoding: nonsense"),
    *(b"Content-Type: multipart/form-data; boundary=b", b"Cookie: \xff=\xfe; ;;=", b"X" * 9000),
    *(b"Content-Type: application/x-www-form-urlencoded", b"Origin: http://localhost"),
    *(b"Range: bytes=9-1,-,x", b"Expect: 100-continue", b"Sec-Fetch-Site: same-origin"),
    *(b"HX-Request: true", b"Upgrade: websocket", b"Connection: Upgrade"),
)
BODIES = b"", b"abcd", b"--b\r\n\r\n--b--", b"view=%00&mark=right&person='", b"4\r\nabcd\r\n"
METHODS = (b"GET", b"GET", b"POST", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"\xff", b"get", b"")


ODD = (
    *(
        "nan",
        "1e999",
        "-1",
        "2" * 400,
        "0-0",
        "%00",
        "\0",
        "\ufffe",
        "10,20,60,140",
        "1e30,1,1e31,9",
    ),
    *("//x", "/etc/passwd", "../../app.py", "x' OR '1'='1"),
)
FIELDS = ("view", "combine", "camera", "after", "score", "offset", "kind", "person", "sort", "next")
POSTS = ("/mark", "/scene/{}/box", "/scene/{}/person", "/people", "/marks/undo", "/forget")


@pytest.mark.parametrize("value", ODD)
def test_odd_values(client, site, value):
    person = everybody(site)[0]
    view, scene, place = person.id, person.scene.id, quote(value, safe="")
    for path in ("/", "/search", f"/scene/{scene}", "/marks", "/results.zip"):
        for name in FIELDS:
            answer = client.get(path, params={"view": view} | {name: value})
            assert answer.status_code < 500
            assert not answer.headers.get("location", "/").startswith(("//", "http"))
    for path in ("scene/{}", "scene/{}/320.jpg", "person/{}.jpg", "marks/{}", "static/{}"):
        answer = client.get("/" + path.format(place))
        assert answer.status_code in (400, 404)
    for path in POSTS:
        for name in ("view", "person", "mark", "box", "change", "undo"):
            form = {"view": view, "person": "x", "mark": "right", "box": "1,2,3,4"}
            answer = client.post(path.format(scene), data=form | {name: value})
            assert answer.status_code < 500


def malformed(rng):
    """A request that no browser sends: wrong in one or several places."""
    path = b"".join(rng.choices(PATHS, k=rng.randint(1, 3)))
    version = rng.choice([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b""])
    lines = [b" ".join([rng.choice(METHODS), path, version])]
    lines += rng.sample(HEADS, rng.randint(0, 5))
    return rng.choice([b"\r\n", b"\r\n", b"\n"]).join([*lines, b"", rng.choice(BODIES)])


def test_a_thousand_malformed_requests(site, caplog):
    rng = random.Random(16)
    codes = []
    with running(closed(site)) as port:
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
    assert {400, 403, 404, 413} <= set(codes)
    assert "Exception in ASGI application" not in caplog.text
