"""What a query costs on the page of a large gallery, beyond the detection itself.

python -m tests.benchmark.page --checkpoint=runs/demo --photo=photo.jpg --people=1000000

The gallery is simulated (`tests/benchmark/gallery.py`), the photo and the detector are real. Prints
a table for docs/page.md.
"""

from __future__ import annotations

import argparse
import html
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from starlette.testclient import TestClient

from alignps_jax.devices import use_compilation_cache
from alignps_jax.files import read_image
from alignps_jax.gallery.page.app import make_app
from alignps_jax.gallery.page.security import LOOPBACK, Door
from alignps_jax.gallery.page.serve import make_site
from alignps_jax.gallery.page.site import Site
from alignps_jax.gallery.store import Gallery
from alignps_jax.gallery.writing import commit_scenes, tidy
from alignps_jax.inference.detector import Detector
from tests.benchmark.gallery import block

READ = {"alignps_responsible_use": "read"}
OWN = {"Origin": "http://localhost"}


def simulated_gallery(address: Path, detector: Detector, people: int) -> Gallery:
    """At least so many people, as if the detector had found them."""
    gallery = Gallery.open(address, create_for=detector)
    number = 0
    while gallery.num_people < people:
        commit_scenes(gallery, block(number, detector.config.model.channels))
        number += 1
    tidy(gallery)
    return gallery


def warm_up(site: Site) -> None:
    """Waits until the network is compiled and the gallery is in memory, as the server does."""
    site.finder.warm_up(site.searcher.warm_up)
    quiet = 0
    while quiet < 10:  # the work is handed over from one thread to the next
        status = site.finder.status()
        quiet = 0 if status.first or status.waiting else quiet + 1
        time.sleep(0.1)


def query(client: TestClient, photo: Path) -> tuple[float, float, str]:
    """Seconds of the upload with the people found, of the results, and what these say."""
    start = time.perf_counter()
    answer = client.post("/upload", files={"photo": (photo.name, photo.read_bytes())})
    found = time.perf_counter()
    link = re.search(r'<a href="(/search\?[^"]*)" aria-label', answer.text)
    assert link, "nobody was found in the photo"
    results = client.get(html.unescape(link[1]))
    end = time.perf_counter()
    said = re.search(r"Searched[^<.]*", results.text)
    assert said, results.status_code
    return found - start, end - found, said[0].strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row per query."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--people", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=5)
    arguments = parser.parse_args(argv)
    use_compilation_cache()
    detector = Detector.from_checkpoint(arguments.checkpoint)
    image = read_image(arguments.photo, detector.config.data.max_pixels)
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder) / "people.lance"
        gallery = simulated_gallery(address, detector, arguments.people)
        site = make_site(gallery, detector, Path(folder) / "people.marks.json")
        client = TestClient(
            make_app(site, Door(LOOPBACK)), "http://localhost", cookies=READ, headers=OWN
        )
        warm_up(site)
        print("| detector, s | upload and people, s | results, s | beyond detection, s | page |")
        print("|---:|---:|---:|---:|---|")
        for _ in range(arguments.queries):
            start = time.perf_counter()
            detector.detect(image)
            alone = time.perf_counter() - start
            upload, results, said = query(client, arguments.photo)
            beyond = upload + results - alone
            print(f"| {alone:.2f} | {upload:.2f} | {results:.2f} | {beyond:.2f} | {said} |")


if __name__ == "__main__":
    main()
