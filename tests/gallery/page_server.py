"""The page of a painted gallery, in this process or as a server on a port of this machine."""

from __future__ import annotations

import contextlib
import html
import re
import socket
import subprocess
import threading

import cv2
import httpx
import numpy as np
import uvicorn
from starlette.testclient import TestClient

from alignps_jax.evaluation.calibration import Calibration
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.access import Door, ImpatientProtocol, guarded
from alignps_jax.gallery.page.app import make_app
from alignps_jax.gallery.page.site import Site
from tests.gallery.painted import (
    GREEN,
    RED,
    SIZE,
    ColorDetector,
    commit,
    encoded,
    gallery_of,
    indexed,
    paint_photos,
    painted,
    scenes_of,
)
from tests.places import free_port

READ = {"alignps_responsible_use": "read"}
PUBLIC = "photos.example.org"
RED_PHOTO = encoded(painted((RED, (10, 10))))


def painted_site(folder, detector=None):
    """What serves eight photos with nine people, who are colored rectangles."""
    detector = detector or ColorDetector()
    photos = folder / "photos"
    if not photos.exists():
        paint_photos(photos)
    gallery = gallery_of(photos, folder / "people.lance", detector)
    return Site(gallery)


def video_site(folder):
    """Serves a video of 8 seconds: red walks, green stands there from second 4 on."""

    def frame(second):
        red = RED, (10 + 20 * int(second), 100)
        return painted(red, *([(GREEN, (250, 20))] if second >= 4 else []))

    detector, path = ColorDetector(), folder / "walk.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"vp09"), 5, SIZE[::-1])
    assert writer.isOpened()
    for number in range(8 * 5):
        writer.write(cv2.cvtColor(frame(number / 5), cv2.COLOR_RGB2BGR))
    writer.release()
    gallery = Gallery.open(folder / "people.lance", detector, create=True)
    seconds = map(float, range(8))
    commit(gallery, [indexed(path, frame(x), detector, second=x) for x in seconds])
    return Site(gallery)


def calibration(power):
    """The probability is a power of the similarity."""
    curve = np.linspace(0, 0.99, 50)
    return Calibration("a set", 9, curve, curve**power, curve, curve, curve)


def closed(site, door=None):
    """The page behind its door."""
    return guarded(make_app(site), door or Door())


class Visitor(TestClient):
    """A browser that has read the text and whose forms come from the page."""

    def __init__(self, site, door=None):
        settings = {"cookies": READ, "follow_redirects": False, "raise_server_exceptions": False}
        super().__init__(closed(site, door), "http://localhost", **settings)
        self.headers["Origin"] = "http://localhost"

    def upload(self, photo=RED_PHOTO, name="query.png"):
        return self.post("/upload", files={"photo": (name, photo)})

    def uploaded(self, photo=RED_PHOTO):
        """The address of an uploaded photo."""
        return self.upload(photo).headers["location"]

    def query(self, photo=RED_PHOTO):
        """The address of the search for somebody of an uploaded photo."""
        return httpx.URL(people(self.get(self.uploaded(photo)))[0])


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


NGINX = """
master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_max_body_size 70m; proxy_temp_path {folder}/proxy;
  client_body_temp_path {folder}/body; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{tls} ssl; ssl_certificate {folder}/cert; ssl_certificate_key {folder}/key;
    location / {{ proxy_pass http://127.0.0.1:{port}; }}
  }}
}}
"""


@contextlib.contextmanager
def behind_nginx(site, folder):
    """Serves with a token behind a proxy that speaks TLS; gives the address that lets one in."""
    tls = free_port()
    public, config = f"https://{PUBLIC}:{tls}", folder / "nginx.conf"
    files = ["-keyout", folder / "key", "-out", folder / "cert", "-subj", f"/CN={PUBLIC}"]
    make = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec"]
    curve = ["-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run([*make, *curve, *files], check=True, capture_output=True)
    with running(closed(site, Door.of("127.0.0.1", tls, "secret", public))) as port:
        config.write_text(NGINX.format(folder=folder, tls=tls, port=port))
        nginx = ["nginx", "-c", config, "-p", folder, "-e", folder / "error.log"]
        subprocess.run(nginx, check=True)  # it listens before it goes into the background
        try:
            yield f"{public}/?token=secret"
        finally:
            subprocess.run([*nginx, "-s", "stop"], check=True)


def people(page):
    """The searches that a page of a photo offers."""
    found = re.findall(r'<a href="(/search\?[^"]*)" tabindex', page.text)
    return [html.unescape(address) for address in found]


def everybody(site):
    """All people of a gallery."""
    return [one for scene in scenes_of(site) for one in site.gallery.memory().people_of(scene.id)]


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
