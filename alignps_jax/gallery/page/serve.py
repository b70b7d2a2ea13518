"""`--mode=serve`: the page, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

import uvicorn

from alignps_jax.errors import UserError
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.access import Door, ImpatientProtocol, addresses, guarded
from alignps_jax.gallery.page.app import make_app
from alignps_jax.gallery.page.site import Site

_CONNECTIONS = 500  # at a time; more are told to come back
_GRACE = 5  # seconds that requests under way have when the server stops


def serve(
    gallery: Gallery,
    host: str,
    port: int,
    public_url: str | None = None,
    no_token: bool = False,
    sources: Sequence[str] = (),
    watch: bool = False,
) -> None:
    """Serves the page of a gallery until a signal comes.

    Args:
      gallery: with the detector that made it.
      host, port: where to listen; port 0 is a free one.
      public_url: what visitors call the server where a proxy, or a name, stands before it.
      no_token: lets everybody in who can connect.
      sources: folders that can be indexed from the page.
      watch: indexes what is in them, and whatever is added.

    Raises:
      UserError, OSError: it cannot listen there, or an address is none.
    """
    if not 0 <= port < 65536:
        raise UserError(f"--port: found {port}, expected 0 to 65535")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        port, token = listener.getsockname()[1], None if no_token else secrets.token_urlsafe(32)
        door, site = Door.of(host, port, token, public_url), Site(gallery, sources)
        print(f"gallery  {gallery.num_people:,} people in {gallery.num_scenes:,} photos and frames")
        named = [
            f"http://{f'[{name}]' if ':' in name else name}:{port}" for name in addresses(host)
        ]
        for address in [door.origin] if door.origin else named:
            print(f"page     {address}/{f'?token={token}' if token else ''}", flush=True)
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
            limit_concurrency=_CONNECTIONS,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _leave(number: int, _: object) -> NoReturn:
    """Ends at once: a thread that compiles a program can neither be ended nor waited for."""
    sys.stdout.flush()
    os._exit(128 + number)
