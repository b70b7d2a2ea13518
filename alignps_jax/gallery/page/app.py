"""The page as a program: its addresses, and one friendly line for everything that goes wrong."""

from __future__ import annotations

import traceback
from typing import Annotated

import h11
from fastapi import APIRouter, FastAPI, Form
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from alignps_jax.errors import UserError
from alignps_jax.gallery.page import manage, photos, searches
from alignps_jax.gallery.page.access import MAX_BODY
from alignps_jax.gallery.page.site import Site, after_reading, message, page

_LINES = {  # in place of Starlette's
    "Not Found": "There is no page with this address.",
    "Method Not Allowed": "That is not possible here.",
    "Content Too Large": f"That is too large: at most {MAX_BODY >> 20} MiB can be sent at once.",
}
_FAILED = "Something went wrong here; the server's terminal says what. Please try again."
_ABOUT = (
    "Every page is an API, too: with `Accept: application/json`, an address gives as data what its "
    "page shows, errors included. Programs send the token as `Authorization: Bearer TOKEN`."
)


router = APIRouter(include_in_schema=False)


def make_app(site: Site) -> FastAPI:
    """The page as an ASGI program."""
    app = FastAPI(title="Find people", description=_ABOUT, docs_url=None, redoc_url=None)
    app.state.site = site
    for one in (photos.router, photos.pictures, searches.router, manage.router, router):
        app.include_router(one)
    app.mount("/static", StaticFiles(packages=[("alignps_jax.gallery.page", "static")]))
    for kind in (UserError, OSError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)
    return app


@router.get("/status")
def status(request: Request) -> Response:
    return page(request, "status.html")


@router.get("/docs")
def docs(request: Request) -> Response:
    return page(request, "docs.html", api=request.app.openapi())


@router.get("/responsible-use")
def responsible_use(request: Request, next: str = "/") -> Response:
    return page(request, "responsible_use.html", following=next)


@router.post("/responsible-use")
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
        answer = message(request, error.status_code, _LINES.get(line, line))
        answer.headers.update(error.headers or {})
        return answer
    if isinstance(error, UserError | OSError):
        return message(request, 400, str(error))
    traceback.print_exception(error)
    return message(request, 500, _FAILED)
