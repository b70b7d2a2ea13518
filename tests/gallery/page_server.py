"""The page of a painted gallery, in this process or as a server on a port of this machine."""

from __future__ import annotations

import contextlib
import socket
import threading

import uvicorn
from starlette.testclient import TestClient

from alignps_jax.gallery.page.app import make_app
from alignps_jax.gallery.page.security import LOOPBACK, Door
from alignps_jax.gallery.page.serve import make_site
from tests.gallery.painted import ColorDetector, gallery_of, write_photos

READ = {"alignps_responsible_use": "read"}
OWN = {"Origin": "http://localhost"}


def painted_site(folder, detector=None):
    """What serves eight photos with nine people, who are colored rectangles."""
    detector = detector or ColorDetector()
    photos = folder / "photos"
    if not photos.exists():
        write_photos(photos)
    gallery = gallery_of(photos, folder / "people.lance", detector)
    return make_site(gallery, detector, folder / "people.marks.json")


def visitor(site, **door):
    """A browser that has read the text and whose forms come from the page."""
    app = make_app(site, Door(LOOPBACK, **door))
    return TestClient(
        app,
        "http://localhost",
        raise_server_exceptions=False,
        cookies=READ,
        headers=OWN,
        follow_redirects=False,
    )


@contextlib.contextmanager
def running(app, **settings):
    """Serves in a thread; gives the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="error", access_log=False, **settings)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()
