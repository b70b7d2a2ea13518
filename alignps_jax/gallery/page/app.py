"""The page as a program, and `--mode=serve`; one friendly line for everything that goes wrong."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import h11
import uvicorn
from fastapi import APIRouter, FastAPI, Form
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

from alignps_jax.errors import UserError
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page import photos, searches
from alignps_jax.gallery.page.access import YEAR, Door, ImpatientProtocol, addresses, guarded
from alignps_jax.gallery.page.site import READ_COOKIE, Site, message, page

_FAILED = "Something went wrong here; the server's terminal says what. Please try again."
_ABOUT = "With `Accept: application/json`, every address gives as data what its page shows."

router = APIRouter(include_in_schema=False)


def make_app(site: Site) -> FastAPI:
    """The page as an ASGI program."""
    app = FastAPI(title="Find people", description=_ABOUT, docs_url=None, redoc_url=None)
    app.state.site = site
    for one in (photos.router, searches.router, router):
        app.include_router(one)
    app.mount("/static", StaticFiles(packages=[("alignps_jax.gallery.page", "static")]))
    for kind in (UserError, OSError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)
    return app


@router.get("/status")
def status(request: Request) -> Response:
    return page(request, "status.html")


@router.get("/responsible-use")
def responsible_use(request: Request, next: str = "/") -> Response:
    return page(request, "responsible_use.html", following=next)


@router.post("/responsible-use")
def has_read(next: Annotated[str, Form()] = "/") -> Response:
    """On to the page that was asked for, and not again through the text."""
    is_ours = next.startswith("/") and next[1:2] not in ("/", "\\") and next.isprintable()
    response = RedirectResponse(next if is_ours else "/", 303)
    response.set_cookie(READ_COOKIE, "read", YEAR, httponly=True)
    return response


async def failed(request: Request, error: Exception) -> Response:
    """Every error becomes a line; what nobody expected is printed for whoever runs the server."""
    if isinstance(error, ClientDisconnect | h11.ProtocolError):
        return Response(status_code=400)  # nobody reads it
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return message(request, 400, f"{first['loc'][-1]}: {first['msg']}")
    if isinstance(error, HTTPException):
        answer = message(request, error.status_code, str(error.detail))
        answer.headers.update(error.headers or {})
        return answer
    if isinstance(error, UserError | OSError):
        return message(request, 400, str(error))
    traceback.print_exception(error)
    return message(request, 500, _FAILED)


def serve(
    gallery: Gallery,
    host: str,
    port: int,
    public_url: str | None = None,
    no_token: bool = False,
    sources: Sequence[str] = (),
    watch: bool = False,
) -> None:
    """Serves the page of a gallery until a signal comes; UserError, OSError if it cannot listen.

    Port 0 is a free one; `public_url` is what visitors call the server; `sources` are folders that
    can be indexed from the page, and are at once with `watch`.
    """
    if not 0 <= port < 65536:
        raise UserError(f"--port: found {port}, expected 0 to 65535")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        port, token = listener.getsockname()[1], None if no_token else secrets.token_urlsafe(32)
        door, site = Door.of(host, port, token, public_url), Site(gallery, sources)
        people, scenes = gallery.people.table.count(), gallery.people.scenes.count()
        print(f"gallery  {people:,} people in {scenes:,} photos and frames")
        names = [f"[{name}]" if ":" in name else name for name in addresses(host)]
        for place in [door.origin] if door.origin else [f"http://{name}:{port}" for name in names]:
            print(f"page     {place}/{f'?token={token}' if token else ''}", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)  # uvicorn hands both on when it has stopped
        site.photos.warm_up(site.searcher.warm_up)
        if watch:
            site.library.watch()
        config = uvicorn.Config(
            guarded(make_app(site), door),
            http=ImpatientProtocol,
            ws="none",
            lifespan="off",
            log_level="critical",  # the page itself prints what nobody expected
            access_log=False,  # it would have the token
            limit_concurrency=500,  # more are told to come back
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,  # seconds for requests under way
        )
        uvicorn.Server(config).run(sockets=[listener])


def _leave(number: int, _: object) -> NoReturn:
    """Ends at once: a thread that compiles a program can neither be ended nor waited for."""
    sys.stdout.flush()
    os._exit(128 + number)
