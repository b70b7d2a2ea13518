"""`--mode=serve`: the page, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import uvicorn
from ml_collections import ConfigDict

from alignps_jax.devices import use_compilation_cache
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.app import make_app
from alignps_jax.gallery.page.finder import Finder
from alignps_jax.gallery.page.marks import Marks
from alignps_jax.gallery.page.pictures import Pictures
from alignps_jax.gallery.page.results import Searcher
from alignps_jax.gallery.page.security import Door, is_loopback, own_names
from alignps_jax.gallery.page.site import Overview, Site
from alignps_jax.inference.detector import Detector
from alignps_jax.types import UserError

HOST, PORT = "127.0.0.1", 8000
_CONNECTIONS = 200  # at a time; more are told to come back
_PATIENCE = 5  # seconds that requests under way have when the server stops


def serve_gallery(
    gallery: Gallery, detector: Detector, marks: Path, host: str = HOST, port: int = PORT
) -> None:
    """Serves the page of a gallery until a signal comes.

    Args:
      gallery: made by that detector.
      detector: for the photos that are uploaded.
      marks: the file that keeps which results are right.
      host: where to listen; beyond this machine, visitors need the token that is printed.
      port: 0 takes a free one.

    Raises:
      UserError: it cannot listen there, or the file of marks is none.
    """
    token = None if is_loopback(host) else secrets.token_urlsafe(32)
    with contextlib.closing(_listen(host, port)) as listener:
        site = make_site(gallery, detector, marks)
        door = Door(own_names(host), token)
        site.finder.warm_up(site.searcher.warm_up)
        print(f"gallery  {gallery.num_people:,} people in {gallery.num_scenes:,} photos and frames")
        print(f"marks    {marks}")
        print(f"page     {_address(host, listener.getsockname()[1], token)}", flush=True)
        if token:
            print("         whoever has this address sees the photos; it is not encrypted")
        config = uvicorn.Config(
            make_app(site, door),
            access_log=False,  # it would have the token
            log_level="warning",
            limit_concurrency=_CONNECTIONS,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_PATIENCE,
        )
        with _exit_code_of_sigterm():
            uvicorn.Server(config).run(sockets=[listener])


def serve_checkpoint(
    checkpoint: Path, config: ConfigDict, gallery: Gallery, host: str, port: int
) -> None:
    """Serves a gallery with the checkpoint that made it; arguments and errors as above.

    Marks are kept beside the gallery; those of one that lies elsewhere (s3://...) in the current
    folder.
    """
    use_compilation_cache()
    detector = Detector.from_checkpoint(checkpoint, config)
    gallery.check_detector(detector)
    serve_gallery(gallery, detector, marks_file(gallery.address), host, port)


def marks_file(address: str) -> Path:
    """Where the marks of a gallery are: people.marks.json beside people.lance."""
    place = address.rstrip("/")
    path = Path(place.rpartition("/")[2]) if "://" in place else Path(place)
    return path.with_name(f"{path.stem}.marks.json")


def make_site(gallery: Gallery, detector: Detector, marks: Path) -> Site:
    """Everything that the page needs; UserError if the file of marks is none."""
    return Site(
        gallery=gallery,
        finder=Finder(detector),
        pictures=Pictures(gallery),
        searcher=Searcher(gallery),
        marks=Marks(marks),
        overview=Overview(gallery),
    )


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise UserError(f"--port: found {port}, expected 0 to 65535")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host, --port: cannot listen on {host}:{port} ({reason}), expected an address of "
            "this machine and a port that is free (0 takes one)"
        ) from error
    return listener


def _address(host: str, port: int, token: str | None) -> str:
    """What to type in a browser."""
    name = host.strip("[]")
    if name in ("0.0.0.0", "::"):
        name = socket.getfqdn()
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/{f'?token={token}' if token else ''}"


@contextlib.contextmanager
def _exit_code_of_sigterm() -> Iterator[None]:
    """Leaves with code 143 after SIGTERM, which uvicorn hands on when all requests are answered."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
