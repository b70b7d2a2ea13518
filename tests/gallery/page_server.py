"""The page of a painted gallery, in this process or as a server on a port of this machine."""

from __future__ import annotations

import contextlib
import html
import json
import re
import socket
import subprocess
import sys
import threading

import uvicorn
from starlette.testclient import TestClient

from alignps_jax.gallery.page.access import Door, ImpatientProtocol, guarded
from alignps_jax.gallery.page.app import make_app
from alignps_jax.gallery.page.site import Site
from tests.gallery.painted import ColorDetector, gallery_of, write_photos
from tests.places import ROOT, heed_signals

READ = {"alignps_responsible_use": "read"}
OWN = {"Origin": "http://localhost"}


def painted_site(folder, detector=None):
    """What serves eight photos with nine people, who are colored rectangles."""
    detector = detector or ColorDetector()
    photos = folder / "photos"
    if not photos.exists():
        write_photos(photos)
    gallery = gallery_of(photos, folder / "people.lance", detector)
    return Site(gallery)


def closed(site, door=None):
    """The page behind its door."""
    return guarded(make_app(site), door or Door())


def visitor(site, door=None):
    """A browser that has read the text and whose forms come from the page."""
    return TestClient(
        closed(site, door),
        "http://localhost",
        raise_server_exceptions=False,
        cookies=READ,
        headers=OWN,
        follow_redirects=False,
    )


@contextlib.contextmanager
def running(app):
    """Serves in a thread; gives the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="critical", http=ImpatientProtocol, ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


SERVE = """
import json, sys
from alignps_jax.gallery.page.app import serve
from tests.gallery.page_server import painted_site
from pathlib import Path
gallery = painted_site(Path(sys.argv[1])).gallery
gallery.detector.delay = float(sys.argv[2])
serve(gallery, **json.loads(sys.argv[3]))
"""


@contextlib.contextmanager
def server_process(folder, delay=0.0, host="127.0.0.1", **options):
    """A server of its own; gives the process and the addresses that it prints."""
    options = json.dumps({"host": host, "port": 0} | options)
    command = [sys.executable, "-W", "ignore", "-c", SERVE, str(folder), str(delay), options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, preexec_fn=heed_signals, **pipes)
    try:
        addresses = []
        for line in process.stdout:
            addresses += re.findall(r"^page +(.*)", line)
            if addresses and ("//127." in addresses[-1] or "https:" in addresses[-1]):
                break
        yield process, addresses
    finally:
        process.kill()
        process.communicate()


def upload(client, photo, name="query.png", **fields):
    return client.post("/upload", files={"photo": (name, photo)}, data=fields)


def uploaded(client, photo):
    """The address of an uploaded photo whose people were found."""
    answer = upload(client, photo)
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


def people(page):
    """The searches that a page of a photo offers."""
    found = re.findall(r'<a href="(/search\?[^"]*)" tabindex', page.text)
    return [html.unescape(address) for address in found]


def results(page):
    """Similarity and person of each result of a page."""
    found = re.findall(r'id="result-([^"]+)".*?<strong>(-?[\d.]+)</strong>', page.text, re.DOTALL)
    return [(float(similarity), person) for person, similarity in found]


def color_of(site, person):
    """The color that was painted there."""
    found = site.gallery.memory().person(person)
    x1, y1, x2, y2 = found.box.astype(int)
    return tuple(int(v) for v in site.gallery.pixels(found.scene)[(y1 + y2) // 2, (x1 + x2) // 2])


def line_of(answer):
    """The one line that an error page shows."""
    (line,) = re.findall(r'<p class="empty" role="alert">(.*?)</p>', answer.text, re.DOTALL)
    return html.unescape(line)
