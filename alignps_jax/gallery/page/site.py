"""What all parts of the page share: the gallery, the detector, the templates."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import jinja2
from fastapi import Depends
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.templating import Jinja2Templates

from alignps_jax.boxes import area
from alignps_jax.gallery.entries import Person, Scene
from alignps_jax.gallery.page.access import MAX_BODY, YEAR
from alignps_jax.gallery.page.marks import Marks
from alignps_jax.gallery.page.pictures import Pictures
from alignps_jax.gallery.page.queries import SearchRequest
from alignps_jax.gallery.page.results import Searcher
from alignps_jax.gallery.page.uploads import Uploads
from alignps_jax.gallery.store import Gallery

_READ_COOKIE = "alignps_responsible_use"
# The overview is read anew after so many times what reading took, and so many seconds at least.
_RARELY, _LEAST = 20.0, 2.0


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
        """Numbers of people and scenes, the choices of a filter, and what is wrong if it is."""
        with self._lock:
            if time.monotonic() >= self._next:
                self._next = float("inf")  # until it is read
                threading.Thread(target=self._read, name="overview", daemon=True).start()
            return self._known

    def _read(self) -> None:
        begin = time.monotonic()
        try:
            known = {
                "people": self._gallery.num_people,
                "scenes": self._gallery.num_scenes,
                "cameras": self._gallery.cameras(),
                "folders": self._gallery.folders(),
                "trouble": "",
            }
        except Exception as error:  # a disk that is not mounted comes back
            known = {"people": 0, "scenes": 0, "cameras": [], "folders": []} | self._known
            known["trouble"] = str(error)
        end = time.monotonic()
        with self._lock:
            self._known = known
            self._next = end + max(_LEAST, _RARELY * (end - begin))


@dataclasses.dataclass(frozen=True)
class Site:
    """A gallery with what searches it."""

    gallery: Gallery
    uploads: Uploads
    pictures: Pictures
    searcher: Searcher
    marks: Marks
    overview: Overview

    def scene(self, scene_id: str) -> Scene:
        """A scene of the gallery; HTTPException (404)."""
        scene = self.gallery.scene(scene_id)
        if scene is None:
            raise HTTPException(404, "This photo is not in the gallery, or not any more.")
        return scene

    def person(self, person_id: str) -> Person:
        """A person of the gallery; HTTPException (404)."""
        person = self.gallery.person(person_id)
        if person is None:
            raise HTTPException(404, "This person is not in the gallery, or not any more.")
        return person

    def warm_up(self) -> None:
        """Compiles what the first visitor would else wait for; returns at once."""
        self.uploads.warm_up(self.searcher.warm_up)


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


def _read_first(request: Request) -> None:
    """Leads to the text about responsible use unless this browser has seen it."""
    if request.cookies.get(_READ_COOKIE) != "read":
        query = f"?{request.url.query}" if request.url.query else ""
        following = quote(f"{request.url.path}{query}", safe="")
        raise HTTPException(303, headers={"Location": f"/responsible-use?next={following}"})


OfSite = Annotated[Site, Depends(_site)]
READ_FIRST = [Depends(_read_first)]


def after_reading(following: str) -> Response:
    """On to the page that was asked for, and not again through the text."""
    parts = urlsplit(following)
    is_ours = following.startswith("/") and not following.startswith(("//", "/\\"))
    safe = is_ours and not parts.scheme and not parts.netloc and following.isprintable()
    response = RedirectResponse(following if safe else "/", 303)
    response.set_cookie(_READ_COOKIE, "read", YEAR, httponly=True)
    return response


def clock(seconds: float) -> str:
    """Such as 1:02:05, or 0:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def file_name(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def largest_first(people: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """People by the area of their boxes, for the small ones to be drawn last and stay in reach."""
    return sorted(people, key=lambda one: -float(area(one["box"])))


_TEMPLATES = Jinja2Templates(
    env=jinja2.Environment(
        loader=jinja2.PackageLoader("alignps_jax.gallery.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ),
    context_processors=[
        lambda request: {
            **_site(request).overview.values(),
            "progress": _site(request).uploads.status(),
        }
    ],
)
_TEMPLATES.env.filters |= {
    "clock": clock,
    "file_name": file_name,
    "largest_first": largest_first,
}
_TEMPLATES.env.globals |= {"MAX_BODY": MAX_BODY}


def page(request: Request, template: str, **values: Any) -> HTMLResponse:
    """A page, or a part of one for HTMX to put in its place."""
    return _TEMPLATES.TemplateResponse(request, template, values)


def message(request: Request, status: int, line: str) -> Response:
    """One friendly line: a page of its own that leads back, or what HTMX shows as a notice."""
    if request.headers.get("hx-request") == "true":
        return PlainTextResponse(line, status)
    query = SearchRequest.lenient(request.query_params)
    back = urlsplit(request.headers.get("referer", ""))
    place = "/" + f"{back.path}?{back.query}".lstrip("/\\").rstrip("?") if back.path else ""
    answer = page(request, "message.html", line=line, query=query, back=place)
    answer.status_code = status
    return answer
