"""What all parts of the page share: the gallery, the detector, the templates."""

from __future__ import annotations

import dataclasses
import mimetypes
import re
import threading
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any
from urllib.parse import urlencode, urlsplit

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from alignps_jax.boxes import area
from alignps_jax.gallery.entries import Filter, Person, Scene
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.finder import Finder
from alignps_jax.gallery.page.marks import Marks
from alignps_jax.gallery.page.pictures import Pictures
from alignps_jax.gallery.page.queries import Query, parse_query
from alignps_jax.gallery.page.results import Searcher, summary
from alignps_jax.gallery.page.security import MAX_BODY
from alignps_jax.types import UserError

_READ_COOKIE = "alignps_responsible_use"
_YEAR = 365 * 24 * 3600  # seconds
# Read anew after so many times what it took, and so many seconds at least.
_RARELY, _LEAST = 20.0, 2.0
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_HERE = resources.files("alignps_jax.gallery.page")


class NotReadError(Exception):
    """The text about responsible use comes first."""


class NotThereError(Exception):
    """Nothing has that address (any more); the text says what is missing, in a line."""


class Overview:
    """How much a gallery has, and its cameras and folders, read anew from time to time.

    Among millions of photos that takes seconds, so pages show what was read last.
    """

    def __init__(self, gallery: Gallery):
        self._gallery = gallery
        self._known: dict[str, Any] = {}
        self._next = 0.0
        self._lock = threading.Lock()
        self._read()

    def values(self) -> dict[str, Any]:
        """Numbers of people and scenes, and the choices of a filter."""
        with self._lock:
            if time.monotonic() >= self._next:
                self._next = float("inf")  # until it is read
                threading.Thread(target=self._read, name="overview", daemon=True).start()
            return self._known

    def _read(self) -> None:
        begin = end = time.monotonic()
        try:
            known = {
                "people": self._gallery.num_people,
                "scenes": self._gallery.num_scenes,
                "cameras": self._gallery.cameras(),
                "folders": self._gallery.folders(),
            }
            end = time.monotonic()
            with self._lock:
                self._known = known
        finally:
            with self._lock:
                self._next = end + max(_LEAST, _RARELY * (end - begin))

    def checked(self, where: Filter) -> Filter:
        """The filter itself, if its folder holds photos of the gallery.

        No other name may come near the disk. Raises UserError.
        """
        folder = where.folder
        if folder is not None:
            below = folder.rstrip("/") + "/"
            folders = self.values()["folders"]
            if not any(known == folder or known.startswith(below) for known in folders):
                raise UserError("This folder holds no photos of the gallery.")
        return where


@dataclasses.dataclass(frozen=True)
class Site:
    """A gallery with what searches it."""

    gallery: Gallery
    finder: Finder
    pictures: Pictures
    searcher: Searcher
    marks: Marks
    overview: Overview

    def scene(self, scene_id: str) -> Scene:
        """A scene of the gallery, whatever the address says; NotThereError."""
        scene = self.gallery.scene(scene_id) if _ID.fullmatch(scene_id) else None
        if scene is None:
            raise NotThereError("This photo is not in the gallery, or not any more.")
        return scene

    def person(self, person_id: str) -> Person:
        """A person of the gallery, whatever the address says; NotThereError."""
        person = self.gallery.person(person_id) if _ID.fullmatch(person_id) else None
        if person is None:
            raise NotThereError("This person is not in the gallery, or not any more.")
        return person


def query_of(request: Request) -> Query:
    """The query of the address; UserError if a value is not one."""
    return parse_query(request.query_params.multi_items())


def text_of(value: object) -> str:
    """A name as a page can have it: names of files need not be text."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def clock(seconds: float) -> str:
    """Such as 1:02:05, or 0:07."""
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02d}" if whole >= 3600 else f"{whole // 60}"
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{minutes}:{whole % 60:02d}"


def span(first: float, last: float) -> str:
    """Such as 0:07, or 0:07–0:12."""
    begin, end = clock(first), clock(last)
    return begin if begin == end else f"{begin}–{end}"


def file_name(path: str) -> str:
    """The last part of a path."""
    return text_of(path.replace("\\", "/").rstrip("/").rpartition("/")[2])


def largest_first(people: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """People by the area of their boxes, for the small ones to be drawn last and stay in reach."""
    return sorted(people, key=lambda one: -float(area(one["box"])))


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FunctionLoader(lambda name: (_HERE / "templates" / name).read_text("utf-8")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "text": text_of,
    "clock": clock,
    "summary": summary,
    "largest_first": largest_first,
    "file_name": file_name,
}
_TEMPLATES.globals |= {"span": span, "MAX_BODY": MAX_BODY}


def fragment(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A part of a page, for HTMX to put in its place."""
    return HTMLResponse(_TEMPLATES.get_template(template).render(**values), status)


def page(site: Site, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A complete page."""
    return fragment(template, status, **(common(site) | values))


def common(site: Site) -> dict[str, Any]:
    """What every page shows."""
    return {**site.overview.values(), "progress": site.finder.status()}


def read_first(request: Request) -> None:
    """Raises NotReadError unless this browser has seen the text about responsible use."""
    if request.cookies.get(_READ_COOKIE) != "read":
        raise NotReadError


def to_the_text(request: Request) -> Response:
    """To the text about responsible use, and from there to the page that was asked for."""
    query = f"?{request.url.query}" if request.url.query else ""
    following = urlencode({"next": f"{request.url.path}{query}"})
    return RedirectResponse(f"/responsible-use?{following}", 303)


def after_reading(following: str) -> Response:
    """On to the page that was asked for, and not again through the text."""
    parts = urlsplit(following)
    is_ours = following.startswith("/") and not following.startswith(("//", "/\\"))
    safe = is_ours and not parts.scheme and not parts.netloc and following.isprintable()
    response = RedirectResponse(following if safe else "/", 303)
    response.set_cookie(_READ_COOKIE, "read", max_age=_YEAR, httponly=True, samesite="lax")
    return response


def message(request: Request, site: Site, status: int, line: str) -> Response:
    """One friendly line: a page of its own, or what HTMX shows beside what it replaced."""
    if request.headers.get("hx-request") == "true":
        return HTMLResponse(_TEMPLATES.from_string("{{ line|text }}").render(line=line), status)
    return page(site, "message.html", status, line=line)


def static_files() -> dict[str, tuple[bytes, str]]:
    """The content and the type of every file that pages load, by name."""
    return {
        entry.name: (
            entry.read_bytes(),
            mimetypes.guess_type(entry.name)[0] or "application/octet-stream",
        )
        for entry in (_HERE / "static").iterdir()
        if entry.is_file()
    }
