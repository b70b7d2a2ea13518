"""`--mode=serve`: the page, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

import uvicorn
from ml_collections import ConfigDict

from alignps_jax.devices import use_compilation_cache
from alignps_jax.errors import UserError
from alignps_jax.gallery.page.access import Door, ImpatientProtocol, guarded, is_loopback
from alignps_jax.gallery.page.app import make_app, make_site
from alignps_jax.gallery.store import Gallery
from alignps_jax.inference.detector import Detector

_CONNECTIONS = 500  # at a time; more are told to come back
_GRACE = 5  # seconds that requests under way have when the server stops


def serve_checkpoint(
    checkpoint: Path,
    config: ConfigDict,
    gallery: Gallery,
    host: str,
    port: int,
    public_url: str | None = None,
    no_token: bool = False,
) -> None:
    """Serves the page of a gallery, with the checkpoint that made it, until a signal comes.

    Args:
      host: where to listen.
      port: 0 takes a free one.
      public_url: what visitors call the server where a proxy, or a name, stands before it.
      no_token: lets everybody in who can connect.

    Raises:
      UserError: the checkpoint did not make the gallery, or an address is none.
    """
    use_compilation_cache()
    detector = Detector.from_checkpoint(checkpoint, config)
    gallery.check_detector(detector)
    serve_gallery(gallery, detector, host, port, public_url, no_token)


def serve_gallery(
    gallery: Gallery,
    detector: Detector,
    host: str,
    port: int,
    public_url: str | None = None,
    no_token: bool = False,
) -> None:
    """`serve_checkpoint` with a detector that is there already."""
    if not 0 <= port < 65536:
        raise UserError(f"--port: found {port}, expected 0 to 65535")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        token = None if no_token else secrets.token_urlsafe(32)
        door = Door.of(host, listener.getsockname()[1], token, public_url)
        site = make_site(gallery, detector)
        print(f"gallery  {gallery.num_people:,} people in {gallery.num_scenes:,} photos and frames")
        for address in door.addresses(host):
            print(f"page     {address}")
        if not is_loopback(host):
            print("         whoever can connect and has this address sees the photos")
        sys.stdout.flush()
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
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)  # uvicorn hands both on when it has stopped
        site.warm_up()
        uvicorn.Server(config).run(sockets=[listener])


def _leave(number: int, _: object) -> NoReturn:
    """Ends at once: a thread that compiles a program can neither be ended nor waited for."""
    sys.stdout.flush()
    os._exit(128 + number)
