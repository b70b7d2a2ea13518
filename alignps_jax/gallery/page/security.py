"""What a request must be before the page looks at it, and what every answer says.

The server listens on this machine alone unless it is told otherwise, but a browser carries the
requests of any site to it. So the name in the Host header must be one of ours (a foreign name that
is made to point here, "DNS rebinding", is not), and what changes anything must come from a page of
ours. Beyond this machine, a secret token comes first.
"""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import re
import socket
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

import psutil
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 64 << 20  # bytes; the largest photos of cameras have some 50 MB
# A browser shows an answer only after it has sent everything, so so much is read and thrown away.
_DRAINED = 4 * MAX_BODY
TOKEN_COOKIE = "alignps_token"
_YEAR = 365 * 24 * 3600  # seconds
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::\d{1,5})?")
_METHODS = ("GET", "POST")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src "
        "'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer, a browser hides the origin of our forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@dataclasses.dataclass(frozen=True)
class Door:
    """Who may come in.

    Attributes:
      names: what the server may be called in the Host header, in lower case.
      token: what a visitor must know; None where only this machine can connect.
      max_body: the largest request, in bytes.
    """

    names: frozenset[str]
    token: str | None = None
    max_body: int = MAX_BODY


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def own_names(host: str) -> frozenset[str]:
    """How a server that listens on `host` may be called: itself, and this machine's names."""
    names = LOOPBACK | {host.strip("[]").lower()}
    if is_loopback(host):
        return names
    addresses = {
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    return names | addresses | {socket.gethostname().lower(), socket.getfqdn().lower()}


class Guard:
    """Lets a request through to `app`, or answers it with one line; adds headers to all answers."""

    def __init__(self, app: ASGIApp, door: Door):
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry; everything but HTTP is left alone or refused."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "private, no-cache")
            await send(message)

        answer = self._answer(scope)
        body = _BoundedBody(receive, self._door.max_body)
        if answer is None and body.too_large(Headers(scope=scope).get("content-length")):
            await body.drain()
            answer = _line(413, body.message)
        if answer is not None:
            return await answer(scope, receive, send_with_headers)
        await self._app(scope, body.receive, send_with_headers)
        return None

    def _answer(self, scope: Scope) -> Response | None:
        """The answer to a request that may not pass."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None or found[1].strip("[]").lower() not in self._door.names:
            return _line(421, "This server does not answer to that name.")
        if scope["method"] not in _METHODS:
            return _line(405, "Only GET and POST are possible here.")
        refused = self._without_token(scope, headers)
        if refused is None and scope["method"] == "POST" and not _is_own(scope, headers):
            return _line(403, "Only the forms of this page itself can do that.")
        return refused

    def _without_token(self, scope: Scope, headers: Headers) -> Response | None:
        token = self._door.token
        if token is None:
            return None
        if scope["method"] == "GET":
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            rest = [(name, value) for name, value in query if name != "token"]
            if len(rest) < len(query) and _equal(dict(query)["token"], token):
                place = _own_path(scope["path"])
                response = RedirectResponse(f"{place}?{urlencode(rest)}".rstrip("?"), 303)
                response.set_cookie(
                    TOKEN_COOKIE, token, max_age=_YEAR, httponly=True, samesite="lax"
                )
                return response
        if _equal(cookie(headers, TOKEN_COOKIE), token):
            return None
        return _line(401, "This page opens with the address that its server printed (?token=...).")


def cookie(headers: Headers, name: str) -> str:
    """The value of a cookie; empty where there is none."""
    jar: SimpleCookie = SimpleCookie()
    for line in headers.getlist("cookie"):
        try:
            jar.load(line)
        except CookieError:
            continue
    return jar[name].value if name in jar else ""


def _own_path(path: str) -> str:
    """The path as it is sent in a header: on this server, whatever was typed."""
    return urlsplit(f"http://x/{path.lstrip('/')}").path if path.isascii() else "/"


def _equal(found: str, secret: str) -> bool:
    """Compares in a time that does not depend on where they differ."""
    return hmac.compare_digest(found.encode("utf-8", "replace"), secret.encode())


def _is_own(scope: Scope, headers: Headers) -> bool:
    """Whether a page of this server sent the request, as every browser says of its forms."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site is not None and site != "same-origin":
        return False
    if origin is not None:
        return origin.lower() == f"{scope.get('scheme', 'http')}://{headers['host']}".lower()
    return site is not None


def _line(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status)


class _BoundedBody:
    """Passes a body on up to so many bytes.

    What is larger is read to its end, for the browser to listen, and forgotten.
    """

    def __init__(self, receive: Receive, limit: int):
        self._receive = receive
        self._limit = limit
        self._bytes = 0
        self.message = f"That is too large: at most {limit >> 20} MiB can be sent at once."

    def too_large(self, declared: str | None) -> bool:
        return declared is not None and declared.isdecimal() and int(declared) > self._limit

    async def receive(self) -> Message:
        """ASGI's `receive`; raises HTTPException (413) where the body is larger than that."""
        message = await self._receive()
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._limit:
            if message.get("more_body"):
                await self.drain()
            raise HTTPException(413, self.message)
        return message

    async def drain(self) -> None:
        while self._bytes <= _DRAINED:
            message = await self._receive()
            self._bytes += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return
