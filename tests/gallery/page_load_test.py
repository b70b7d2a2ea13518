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
from starlette.exceptions import HTTPException

from alignps_jax.gallery.page.uploads import MAX_WAITING, Photos
from tests.gallery.page_server import READ, closed, painted_site, running
from tests.gallery.painted import RED, encoded, painted, scenes_of


def test_fifty_at_once(tmp_path):
    site = painted_site(tmp_path)
    site.photos.detector.delay = 0.1
    photo = encoded(painted((RED, (10, 10))))
    person = next(p for s in scenes_of(site) for p in site.gallery.memory().people_of(s.id))

    def send(number):
        with httpx.Client(
            base_url=base, headers={"Origin": base}, cookies=READ, timeout=120
        ) as client:
            if number % 2:
                return client.get("/search", params={"view": person.id}).status_code
            files = {"photo": (f"{number}.png", photo)}
            answer = client.post("/upload", files=files, follow_redirects=True)
            return answer.status_code

    with running(closed(site)) as port:
        base = f"http://127.0.0.1:{port}"
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            codes = list(pool.map(send, range(50)))
    assert codes[1::2] == [200] * 25
    assert set(codes[::2]) <= {200, 503}
    assert codes[::2].count(200) >= MAX_WAITING


def test_more_photos_than_may_wait_are_sent_away(tmp_path):
    gate = threading.Event()
    uploads = Photos(painted_site(tmp_path).gallery)
    uploads.warm_up(gate.wait)  # nothing else goes on before the gate opens
    photos = [encoded(painted((RED, (10 + number, 10)))) for number in range(MAX_WAITING)]
    try:
        taken = [uploads.upload("a.png", photo) for photo in photos[: MAX_WAITING - 2]]
        assert uploads.upload("again.png", photos[0]) == taken[0]
        with pytest.raises(HTTPException, match="503"):
            [uploads.upload("b.png", photo) for photo in photos]
        assert uploads.status()["seconds"] > 0
    finally:
        gate.set()
    kept = [uploads.uploaded(one.id) for one in taken]
    assert all(len(one.people.result(20)) == 1 for one in kept)


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


ODD = ("nan", "1e999", "-1", "2" * 400, "../x", "0-0", "%00", "\0", "\ufffe", "10,20,60,140", "//x")
FIELDS = ("view", "combine", "camera", "after", "score", "offset", "kind", "person", "sort", "next")


@pytest.mark.parametrize("value", ODD)
def test_odd_values(client, site, value):
    everybody = [
        one for scene in scenes_of(site) for one in site.gallery.memory().people_of(scene.id)
    ]
    view, scene, place = everybody[0].id, everybody[0].scene.id, quote(value, safe="")
    for path in ("/", "/search", f"/scene/{place}", f"/scene/{scene}", "/marks", "/results.zip"):
        for name in FIELDS:
            answer = client.get(path, params={"view": view} | {name: value})
            assert answer.status_code < 500
            assert not answer.headers.get("location", "/").startswith(("//", "http"))
    for path in (
        "/mark",
        f"/scene/{scene}/box",
        f"/scene/{scene}/person",
        "/people",
        "/marks/undo",
    ):
        for name in ("view", "person", "mark", "box", "change", "undo"):
            form = {"view": view, "person": view, "mark": "right", "box": "1,2,3,4"}
            assert client.post(path, data=form | {name: value}).status_code < 500


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
