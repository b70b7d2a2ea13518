"""The page as a program: its addresses, and one friendly line for everything that goes wrong."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from alignps_jax.gallery.page.finder import BusyError
from alignps_jax.gallery.page.photos import form_of, pairs_of, photo_routes
from alignps_jax.gallery.page.searches import search_routes
from alignps_jax.gallery.page.security import Door, Guard
from alignps_jax.gallery.page.site import (
    NotReadError,
    NotThereError,
    Site,
    after_reading,
    common,
    fragment,
    message,
    page,
    static_files,
    to_the_text,
)
from alignps_jax.types import UserError

_BUSY = "Too many photos wait for the network at the moment; please try again in a minute."
_FAILED = "Something went wrong here; the server's terminal says what. Please try again."


def make_app(site: Site, door: Door) -> ASGIApp:
    """The page as an ASGI program, behind its guard."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(photo_routes(site))
    app.include_router(search_routes(site))
    _add_common_routes(app, site)
    _add_errors(app, site)
    return Guard(app, door)


def _add_common_routes(app: FastAPI, site: Site) -> None:
    files = static_files()

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in files:
            raise NotThereError("There is no such file.")
        data, kind = files[name]
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=600"})

    @app.get("/status")
    def status() -> Response:
        return fragment("status.html", **common(site))

    @app.get("/responsible-use")
    def responsible_use(request: Request) -> Response:
        following = request.query_params.get("next", "")
        return page(site, "responsible_use.html", following=following)

    @app.post("/responsible-use")
    async def has_read(request: Request) -> Response:
        return after_reading(dict(pairs_of(await form_of(request))).get("next", "/"))


def _add_errors(app: FastAPI, site: Site) -> None:
    """Every error becomes a line; what nobody expected is printed for whoever runs the server."""

    @app.exception_handler(UserError)
    def bad_input(request: Request, error: UserError) -> Response:
        return message(request, site, 400, str(error))

    @app.exception_handler(NotReadError)
    def not_read(request: Request, error: NotReadError) -> Response:
        return to_the_text(request)

    @app.exception_handler(NotThereError)
    def not_there(request: Request, error: NotThereError) -> Response:
        return message(request, site, 404, str(error))

    @app.exception_handler(BusyError)
    def busy(request: Request, error: BusyError) -> Response:
        answer = message(request, site, 503, _BUSY)
        answer.headers["Retry-After"] = "60"
        return answer

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        return message(request, site, 400, "This address says something that it cannot.")

    @app.exception_handler(HTTPException)
    def other(request: Request, error: HTTPException) -> Response:
        lines = {404: "There is no page with this address.", 405: "That is not possible here."}
        line = lines.get(error.status_code, str(error.detail))
        return message(request, site, error.status_code, line)

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        return message(request, site, 500, _FAILED)  # the server prints the error
