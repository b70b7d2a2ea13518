"""Who may come in: the server's names, the token, whose forms count; and headers of all answers.

A browser carries the requests of any site to this server: the Host header must be a name of ours
(against DNS rebinding), and what changes anything must come from a page of ours.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import socket
from typing import Any, Self
from urllib.parse import urlsplit

import h11
import psutil
from starlette.datastructures import MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from alignps_jax.errors import UserError

MAX_BODY = 64 << 20  # bytes; the largest photos of cameras have some 50 MB
YEAR = 365 * 24 * 3600  # seconds
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
# Time limits of every client for the head and the body of a request, in seconds.
PATIENCE = {h11.IDLE: 10, h11.SEND_BODY: 120}

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src "
        "'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, a browser hides the origin of our forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclasses.dataclass(frozen=True)
class Door:
    """Who may come in: by one of the names `hosts`, with the token unless it is None.

    `origin` is such as https://photos.example.org where a proxy speaks for the server. The port
    names the cookie, since browsers share cookies between ports.
    """

    hosts: tuple[str, ...] = _LOOPBACK
    token: str | None = None
    origin: str | None = None
    port: int = 80

    @classmethod
    def of(cls, host: str, port: int, token: str | None, public_url: str | None) -> Self:
        """The door of a server that listens there; UserError if the public URL is none."""
        name = socket.gethostname()
        names = {*_LOOPBACK, *addresses(host), name, f"{name}.local", socket.getfqdn()}
        if public_url is None:
            return cls(tuple(names), token, None, port)
        parts = urlsplit(public_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            raise UserError(f"--public_url: found {public_url}, expected https://name")
        origin = f"{parts.scheme}://{parts.netloc}".lower()
        return cls((*names, parts.hostname), token, origin, port)


def addresses(host: str) -> list[str]:
    """Where a server that listens on `host` can be reached, this machine's own address last."""
    if host not in ("0.0.0.0", "::"):
        return [host]
    own = [one for some in psutil.net_if_addrs().values() for one in some]
    found = [one.address for one in own if one.family == socket.AF_INET]
    return sorted(found, key=lambda address: address.startswith("127."))


def guarded(app: ASGIApp, door: Door) -> ASGIApp:
    """The page behind its door."""
    inner = GZipMiddleware(RequestBodyLimitMiddleware(app, MAX_BODY))

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        answer = _refusal(Request(scope), door) if scope["type"] == "http" else None
        await (answer or inner)(scope, receive, send)

    trusted = TrustedHostMiddleware(checked, door.hosts, www_redirect=False)

    async def closed(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                # Whatever shows people does not stay in a browser's folder.
                is_static = scope["path"].startswith("/static/")
                headers["Cache-Control"] = "no-cache" if is_static else "no-store"
            await send(message)

        if scope.get("method") == "HEAD":  # the server leaves out the body
            scope = {**scope, "method": "GET"}
        await trusted(scope, receive, send_with_headers)

    return closed


def _refusal(request: Request, door: Door) -> Response | None:
    """The answer to a request that may not pass, or the one that takes a token in."""
    if door.token is not None:
        cookie = f"alignps_token_{door.port}"
        _, _, bearer = request.headers.get("authorization", "").partition("Bearer ")
        if _equal(bearer, door.token):
            return None  # no browser sends it on behalf of another site
        if request.method == "GET" and _equal(request.query_params.get("token", ""), door.token):
            url = request.url.remove_query_params("token")
            place = "/" + url.path.lstrip("/\\")  # on this server, whatever was typed
            response = RedirectResponse(f"{place}?{url.query}".rstrip("?"), 303)
            secure = (door.origin or "").startswith("https")
            response.set_cookie(cookie, door.token, YEAR, httponly=True, secure=secure)
            return response
        if not _equal(request.cookies.get(cookie, ""), door.token):
            return _line(401, "This page opens with the address that its server printed (?token=).")
    if request.method != "GET" and not _is_own(request, door):
        return _line(403, "Only the forms of this page itself can do that.")
    return None


def _is_own(request: Request, door: Door) -> bool:
    """Whether a page of this server sent the request, as browsers say of forms and scripts."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        return site == "same-origin"
    if origin is None:  # no browser of these years
        return request.headers.get("accept", "").startswith("application/json")
    return origin.lower() in (door.origin, f"{request.url.scheme}://{request.headers['host']}")


def _equal(found: str, secret: str) -> bool:
    """Compares in a time that does not depend on where they differ."""
    return hmac.compare_digest(found.encode("utf-8", "replace"), secret.encode())


def _line(status: int, text: str) -> Response:
    # A stranger's connection must not stay, whatever else it would send.
    return PlainTextResponse(f"{text}\n", status, {"Connection": "close"})


class ImpatientProtocol(H11Protocol):
    """HTTP that hangs up on whoever does not send a request's head, or body, in time."""

    _phase: Any = None
    _deadline: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch(self.conn.their_state)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # nonsense after a request that is being answered
            self.transport.close()
        self._watch(self.conn.their_state)

    def _watch(self, phase: Any) -> None:
        if phase is not self._phase:
            self._phase, seconds = phase, PATIENCE.get(phase)
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = seconds and self.loop.call_later(seconds, self.transport.close)
