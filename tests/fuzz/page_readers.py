"""What browsers, and whoever is none, send to the page of a gallery.

A file is a request as it comes over the network, but for the boundary of its forms, which the
header names. What the server refuses before the page sees it (uvicorn's parser) is passed over.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from alignps_jax.types import UserError
from tests.fuzz.mutations import damage, damage_image, damage_text
from tests.fuzz.runner import Reader

_HAS_EXTRA = importlib.util.find_spec("fastapi") is not None
_MAX_PIXELS = 1_000_000
_HEADERS = (
    "Host: localhost",
    "Origin: http://localhost",
    "Cookie: alignps_responsible_use=read",
)
_FORM = "Content-Type: application/x-www-form-urlencoded"
_UPLOAD = "Content-Type: multipart/form-data; boundary=fuzz"
_PAGES = (
    *("/", "/marks", "/marks/marks.csv", "/marks/test.json", "/marks/query.json", "/status"),
    *("/responsible-use?next=/marks", "/static/page.css", "/scenes?offset=0&kind=photos"),
    "/search?view=PERSON&combine=best&camera=gate&after=2026-05-01T00:00&score=0.5",
    *("/results?view=PERSON&offset=0", "/scene/SCENE?person=PERSON", "/scene/SCENE/small.jpg"),
    "/person/PERSON.jpg",
)
_FORMS = {
    "/mark": "view=PERSON&person=OTHER&mark=right",
    "/responsible-use": "next=/marks",
    "/scene/SCENE/box": "box=10,20,60,140&view=PERSON",
    "/marks/forget": "view=PERSON",
}
_METHOD = re.compile(rb"[A-Z]{1,20}")
_TARGET = re.compile(rb"/[\x21-\x7e]*")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_UNFIT = re.compile(rb"[\0-\x08\x0a-\x1f\x7f]")


def _requests(folder: Path) -> Sequence[Path]:
    from tests.gallery.page_server import painted_site
    from tests.gallery.painted import BLUE, RED, encoded, painted

    site = painted_site(folder / "site")
    people = [found[0] for one in site.gallery.scenes(9) if (found := site.gallery.people(one.id))]
    ids = {"SCENE": people[0].scene.id, "PERSON": people[0].id, "OTHER": people[1].id}
    requests: list[tuple[str, Sequence[str], bytes]]
    requests = [(f"POST {page}", (_FORM,), form.encode()) for page, form in _FORMS.items()]
    # Between marking something and forgetting that.
    requests[-1:-1] = [(f"GET {page}", (), b"") for page in _PAGES]
    photo = painted((RED, (20, 60)), (BLUE, (90, 60)), size=(150, 160))
    for suffix in (".jpg", ".png", ".bmp", ".webp", ".tif"):
        part = f'--fuzz\r\nContent-Disposition: form-data; name="photo"; filename="q{suffix}"\r\n'
        field = '\r\n--fuzz\r\nContent-Disposition: form-data; name="camera"\r\n\r\ngate'
        body = f"{part}\r\n".encode() + encoded(photo, suffix) + f"{field}\r\n--fuzz--\r\n".encode()
        requests.append(("POST /upload", (_UPLOAD,), body))
    folder = folder / "requests"
    folder.mkdir()
    for number, (line, headers, body) in enumerate(requests):
        head = "\n".join([line, *_HEADERS, *headers])
        content = head.encode() + b"\n\n" + body
        for word, identity in ids.items():
            content = content.replace(word.encode(), identity.encode())
        (folder / f"{number:02}.request").write_bytes(content)
    return sorted(folder.iterdir())


@functools.cache
def _page(folder: Path) -> Any:
    """The page, once in each process that reads."""
    from alignps_jax.gallery.page.app import make_app
    from alignps_jax.gallery.page.security import LOOPBACK, Door
    from alignps_jax.gallery.page.serve import make_site
    from alignps_jax.gallery.store import Gallery
    from tests.gallery.painted import ColorDetector

    detector = ColorDetector()
    detector.config = detector.config.copy_and_resolve_references()
    detector.config.data.max_pixels = _MAX_PIXELS
    gallery = Gallery.open(folder / "site" / "people.lance")
    marks = folder / "people.marks.json"
    marks.unlink(missing_ok=True)
    return make_app(make_site(gallery, detector, marks), Door(LOOPBACK))


def _answered(folder: Path, path: Path) -> list[tuple[int, bytes]]:
    """The answers to a request, and to those that its answer leads to."""
    head, _, body = path.read_bytes().partition(b"\n\n")
    line, *headers = head.split(b"\n")
    method, _, target = line.partition(b" ")
    answers = []
    for _ in range(3):
        status, found, content = asyncio.run(_ask(_page(folder), method, target, headers, body))
        answers.append((status, content))
        if status != 303:
            break
        place = dict(found)[b"location"]
        assert place.startswith(b"/"), "leads away from the page"
        assert not place.startswith(b"//"), "leads away from the page"
        method, target, body = b"GET", place, b""
    if answers[-1][0] >= 400:
        raise UserError(f"{path}: refused with {answers[-1][0]}")
    return answers


async def _ask(
    app: Any, method: bytes, target: bytes, lines: Sequence[bytes], body: bytes
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """What the program answers; UserError for what no server would hand to it."""
    headers = [_header(line) for line in lines]
    if not (_METHOD.fullmatch(method) and _TARGET.fullmatch(target)):
        raise UserError("not a request")
    raw, _, query = target.partition(b"?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method.decode(),
        "scheme": "http",
        "path": unquote(raw.decode()),
        "raw_path": raw,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[dict[str, Any]] = []
    over = asyncio.Event()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await over.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    over.set()
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], sent[0]["headers"], content


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    if not _NAME.fullmatch(name) or _UNFIT.search(value):
        raise UserError("not a header")
    return name.lower(), value.strip()


def _check_answers(answers: list[tuple[int, bytes]]) -> None:
    for status, content in answers:
        assert 200 <= status < 400, "a status that is none"
        assert b"the network failed on this photo" not in content, "an error while detecting"


def damage_request(rng: random.Random, data: bytes) -> bytes:
    """Changes of words, of a photo that is sent, or of bytes."""
    at = data.find(b"\r\n\r\n") + 4
    if at >= 4 and rng.random() < 0.5:
        return data[:at] + damage_image(rng, data[at:])
    if rng.random() < 0.5:
        return damage(rng, data)
    head, _, body = data.partition(b"\n\n")
    for separators in (b"=&", b"/?", b",."):
        if rng.random() < 0.5:
            # Values of a query, parts of a path and corners of a box as words of a text.
            words = rng.choice(separators).to_bytes(1, "big")
            head, body = (
                _words_changed(rng, part, words) if rng.random() < 0.7 else part
                for part in (head, body)
            )
    return head + b"\n\n" + body


def _words_changed(rng: random.Random, data: bytes, separator: bytes) -> bytes:
    if separator not in data:
        return data
    swap = bytes.maketrans(separator + b" ", b" " + separator)
    return damage_text(rng, data.translate(swap)).translate(swap)


PAGE_READERS: dict[str, Reader] = {
    # The page's threads, and those of LanceDB, take room but no memory.
    "page": Reader(
        build=_requests,
        read=_answered,
        check=_check_answers,
        damage=damage_request,
        seconds=30.0,
        memory=16 << 30,
    ),
}
if not _HAS_EXTRA:
    PAGE_READERS.clear()
