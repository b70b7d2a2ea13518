"""Indexing without a network, in processes that may be killed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from alignps_jax.gallery import index as indexing
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.index import Indexed, index
from alignps_jax.inference.detector import Detector
from alignps_jax.types import Batch, Detections
from tests.gallery.networks import network_config

MOST = 5
indexing.COMMIT_SECONDS = 0.05


class Finder(Detector):
    """Finds up to four people, by the colors of a photo: always the same in the same pixels.

    `looked` counts the photos.
    """

    config = network_config()
    name = "a finder, step 1"
    folder = None
    rows = 2

    def __init__(self, fingerprint: str = "f" * 64, seconds: float = 0.0):
        self.fingerprint = fingerprint
        self.seconds = seconds
        self.looked = 0

    def detect_batch(self, batch: Batch) -> Detections:
        time.sleep(self.seconds)
        self.looked += int(np.sum(batch.size.any(axis=-1) & batch.image.any(axis=(1, 2, 3))))
        found = [self.find(np.asarray(image)) for image in batch.image]
        return Detections(*(np.stack(parts)[None] for parts in zip(*found, strict=True)))

    def detect(self, image: np.ndarray) -> Detections:
        boxes, scores, embeddings, valid = self.find(image)
        return Detections(boxes[valid], scores[valid], embeddings[valid], valid[valid])

    def find(self, image: np.ndarray) -> tuple[np.ndarray, ...]:
        seed = int(image.astype(np.int64).sum())
        rng = np.random.default_rng(seed)
        corner = rng.uniform(0, 50, (MOST, 2))
        boxes = np.hstack([corner, corner + rng.uniform(5, 40, (MOST, 2))])
        scores = np.sort(rng.uniform(0.2, 1, MOST))[::-1]
        embeddings = rng.normal(size=(MOST, 16))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        valid = np.arange(MOST) < seed % MOST
        return (*(x.astype(np.float32) for x in (boxes, scores, embeddings)), valid)


def run(address: str, source: str, seconds: float = 0.0) -> Indexed:
    """Indexes a folder, committing all the time."""
    gallery = Gallery.open(address, Finder(seconds=seconds), create=True)
    return index(gallery, [source], every=0.4)


def content(address: str) -> dict[str, tuple]:
    """All of a gallery: what the rows of each id hold."""
    people, rows = Gallery.open(address).people, []
    for table in (people.table, people.scenes, people.files):
        with table.open() as opened:
            rows += opened.search().to_arrow().to_pylist()
    found = {row.get("id") or row["path"]: tuple(map(str, row.values())) for row in rows}
    assert len(found) == len(rows), "somebody is there twice"
    return found


def stored_bytes(address: str) -> bytes:
    """All that lies in a gallery's folder, hidden files included."""
    return b"".join(path.read_bytes() for path in Path(address).rglob("*") if path.is_file())
