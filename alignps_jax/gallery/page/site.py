"""What all parts of the page share: the gallery, the detector, the templates."""

from __future__ import annotations

import datetime
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Annotated, Any, cast
from urllib.parse import quote, urlsplit

import jinja2
import numpy as np
from cachetools import LRUCache
from fastapi import Depends
from fastapi.encoders import jsonable_encoder
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.templating import Jinja2Templates

from alignps_jax.boxes import area
from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import NOBODY, NOT_CALIBRATED, words
from alignps_jax.gallery.gallery import Gallery, PeopleInMemory
from alignps_jax.gallery.groups import Groups
from alignps_jax.gallery.index import Indexed, index, watch
from alignps_jax.gallery.page.access import MAX_BODY
from alignps_jax.gallery.page.marks import Mark, Marks
from alignps_jax.gallery.page.results import Searcher, SearchRequest
from alignps_jax.gallery.page.uploads import Photos, Pictures

READ_COOKIE = "alignps_responsible_use"
_MAX_FOLDERS = 300  # that a filter offers; others can be typed


class Library:
    """Changes a gallery in a thread; no address ever becomes one of the folders, `sources`."""

    def __init__(self, gallery: Gallery, sources: Sequence[str]):
        self._gallery, self.sources = gallery, [*sources]
        self.done: Indexed | None = None
        self.error, self.is_running = "", False

    def index(self) -> None:
        """Indexes what is new."""
        index(self._gallery, self.sources, begun=lambda done: setattr(self, "done", done))

    def watch(self) -> None:
        """Indexes new files now, and added files from then on."""
        if self.sources:
            work = lambda: self.run(self.index), self.sources
            threading.Thread(target=watch, args=work, daemon=True).start()

    def start(self, work: Callable[[], object]) -> None:
        """Starts a job on the gallery, unless another one is running."""
        if not self.is_running:
            threading.Thread(target=self.run, args=(work,), daemon=True).start()

    def run(self, work: Callable[[], object]) -> None:
        """Does some work on the gallery."""
        self.error, self.is_running = "", True
        try:
            work()
        except (UserError, OSError) as error:
            self.error = str(error)
        except Exception as error:
            self.error = "This failed; the server's terminal says why."
            traceback.print_exception(error)
        finally:
            self.is_running = False


class Site:
    """A gallery with what searches it, and what every page shows of it."""

    def __init__(self, gallery: Gallery, sources: Sequence[str] = ()):
        self.gallery = gallery
        self.photos = Photos(gallery)
        self.pictures, self.searcher = Pictures(self.photos), Searcher(self.photos)
        self.marks = Marks(gallery.people)
        self.removed: LRUCache[str, list[Mark]] = LRUCache(100)  # marks that can come back
        self.groups = Groups(gallery.people)
        self.library = Library(gallery, sources)
        self._memory: PeopleInMemory | None = None
        self._overview: dict[str, Any] = {"people": 0, "scenes": 0, "cameras": [], "folders": []}

    def shown(self) -> dict[str, Any]:
        """What every page shows: numbers, the choices of a filter, what is wrong if it is."""
        trouble = ""
        try:
            memory = self.gallery.memory()
            if memory is not self._memory:
                self._memory, self._overview = memory, _overview(memory)
        except (UserError, OSError) as error:  # a disk that is not mounted comes back
            trouble = str(error)
        is_calibrated, progress = self.gallery.calibration is not None, self.photos.status()
        about = {"trouble": trouble, "is_calibrated": is_calibrated, "progress": progress}
        return self._overview | about


def _overview(memory: PeopleInMemory) -> dict[str, Any]:
    cameras, paths = (memory.scenes[key].unique().to_pylist() for key in ("camera", "path"))
    folders = {str(folder) for path in paths for folder in PurePath(path).parents}
    shortest = sorted(folders, key=lambda folder: (len(folder), folder))[:_MAX_FOLDERS]
    choices = {"cameras": sorted(filter(None, cameras)), "folders": shortest}
    return {"people": len(memory), "scenes": len(memory.scenes), **choices}


def _site(request: Request) -> Site:
    return cast(Site, request.app.state.site)


def _read_first(request: Request) -> None:
    """Leads to the text about responsible use unless this browser has seen it."""
    if not _wants_json(request) and request.cookies.get(READ_COOKIE) != "read":
        following = quote(str(request.url.replace(scheme="", netloc="")), safe="")
        raise HTTPException(303, headers={"Location": f"/responsible-use?next={following}"})


OfSite = Annotated[Site, Depends(_site)]
READ_FIRST = [Depends(_read_first)]

_TEMPLATES = Jinja2Templates(
    env=jinja2.Environment(
        loader=jinja2.PackageLoader("alignps_jax.gallery.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ),
    context_processors=[lambda request: _site(request).shown()],
)
_TEMPLATES.env.filters["clock"] = lambda seconds: str(datetime.timedelta(seconds=round(seconds)))
_TEMPLATES.env.filters["largest"] = lambda some: sorted(some, key=lambda x: -float(area(x.box)))
_TEMPLATES.env.filters["words"] = words
_TEMPLATES.env.globals |= {"MAX_BODY": MAX_BODY, "NOBODY": NOBODY, "NOT_CALIBRATED": NOT_CALIBRATED}


def _wants_json(request: Request) -> bool:
    return request.headers.get("accept", "").startswith("application/json")


def page(request: Request, template: str, **values: Any) -> Response:
    """A page, or the values that it shows as JSON for a program that accepts that."""
    if _wants_json(request):
        plain = {np.ndarray: lambda x: x.tolist(), bytes: lambda _: None}
        return JSONResponse(jsonable_encoder(values, custom_encoder=plain))
    return _TEMPLATES.TemplateResponse(request, template, values)


def message(request: Request, status: int, line: str) -> Response:
    """One friendly line: a page of its own that leads back, or what HTMX shows as a notice."""
    if request.headers.get("hx-request") == "true":
        return PlainTextResponse(line, status)
    if _wants_json(request):
        return JSONResponse({"error": line}, status)
    query = SearchRequest.lenient(request.query_params)
    back = urlsplit(request.headers.get("referer", ""))
    place = "/" + f"{back.path}?{back.query}".lstrip("/\\").rstrip("?") if back.path else ""
    answer = page(request, "message.html", line=line, query=query, back=place)
    answer.status_code = status
    return answer
