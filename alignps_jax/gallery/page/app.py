"""The page as a program: its addresses, and one friendly line for everything that goes wrong."""

from __future__ import annotations

import traceback
from http import HTTPStatus
from typing import Annotated

import h11
from fastapi import FastAPI, Form
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from alignps_jax.errors import UserError
from alignps_jax.gallery.page import photos, searches
from alignps_jax.gallery.page.marks import Marks, marks_file
from alignps_jax.gallery.page.pictures import Pictures
from alignps_jax.gallery.page.results import Searcher
from alignps_jax.gallery.page.site import Overview, Site, after_reading, message, page
from alignps_jax.gallery.page.uploads import Uploads
from alignps_jax.gallery.store import Gallery
from alignps_jax.inference.detector import Detector

_LINES = {
    404: "There is no page with this address.",
    405: "That is not possible here.",
    413: "That is too large.",
}


def make_site(gallery: Gallery, detector: Detector) -> Site:
    """Everything that the page needs."""
    return Site(
        gallery=gallery,
        uploads=Uploads(detector),
        pictures=Pictures(gallery),
        searcher=Searcher(gallery),
        marks=Marks(marks_file(gallery.address)),
        overview=Overview(gallery),
    )


def make_app(site: Site) -> FastAPI:
    """The page as an ASGI program."""
    app = FastAPI(openapi_url=None)
    app.state.site = site
    app.include_router(photos.router)
    app.include_router(searches.router)
    static = StaticFiles(packages=[("alignps_jax.gallery.page", "static")])
    app.mount("/static", static)
    app.add_api_route("/status", status)
    app.add_api_route("/responsible-use", responsible_use)
    app.add_api_route("/responsible-use", has_read, methods=["POST"])
    for kind in (UserError, OSError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)
    return app


def status(request: Request) -> Response:
    return page(request, "status.html")


def responsible_use(request: Request, next: str = "/") -> Response:
    return page(request, "responsible_use.html", following=next)


def has_read(next: Annotated[str, Form()] = "/") -> Response:
    return after_reading(next)


async def failed(request: Request, error: Exception) -> Response:
    """Every error becomes a line; what nobody expected is printed for whoever runs the server."""
    if isinstance(error, ClientDisconnect | h11.ProtocolError):
        return Response(status_code=400)  # nobody reads it
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return message(request, 400, f"{first['loc'][-1]}: {first['msg']}")
    if isinstance(error, HTTPException):
        if error.status_code < 400:
            return Response(status_code=error.status_code, headers=error.headers)
        line = str(error.detail)
        if line in (HTTPStatus(error.status_code).phrase, "Content Too Large"):  # not our words
            line = _LINES.get(error.status_code, line)
        answer = message(request, error.status_code, line)
        answer.headers.update(error.headers or {})
        return answer
    if isinstance(error, UserError | OSError):
        return message(request, 400, str(error))
    traceback.print_exception(error)
    line = "Something went wrong here; the server's terminal says what. Please try again."
    return message(request, 500, line)
