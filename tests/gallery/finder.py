"""Indexing without a network, in processes that may be killed."""

import time
from pathlib import Path
from typing import Any

import jax
import lancedb
import numpy as np

from alignps_jax.gallery import index as indexing
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.index import Indexed, index
from alignps_jax.inference.detector import Detector
from alignps_jax.types import Batch, Detections
from tests.gallery.networks import network_config, write_photos
from tests.gallery.painted import detections
from tests.media.clips import write_clip

MOST = 5
FILES = 25
indexing.COMMIT_SECONDS = 0.05


class Finder(Detector):
    """Finds up to four people, by the colors of a photo: always the same in the same pixels.

    `looked` counts the photos, each takes some `seconds`; `data` are fields of config.data.
    """

    config, name, folder, rows = network_config(), "a finder, step 1", None, 2

    def __init__(self, fingerprint: str = "f" * 64, seconds: float = 0.0, **data: Any):
        self.fingerprint, self.seconds, self.looked = fingerprint, seconds, 0
        self.config = self.config.copy_and_resolve_references()
        with self.config.unlocked():
            self.config.data.update(data)

    def detect_batch(self, batch: Batch) -> Detections:
        time.sleep(self.seconds)
        self.looked += int(np.sum(batch.valid_image))
        found = [self.find(np.asarray(image)) for image in batch.image]
        return jax.tree.map(lambda *parts: np.stack(parts)[None], *found)

    def find(self, image: np.ndarray) -> Detections:
        seed = int(image.astype(np.int64).sum())
        rng = np.random.default_rng(seed)
        corner = rng.uniform(0, 50, (MOST, 2))
        boxes = np.hstack([corner, corner + rng.uniform(5, 40, (MOST, 2))])
        scores = np.sort(rng.uniform(0.2, 1, MOST))[::-1]
        found = detections(boxes, scores, rng.normal(size=(MOST, 16)))
        found.valid[:] = np.arange(MOST) < seed % MOST
        return found


def write_files(folder: Path) -> str:
    """So many photos, one of them a video."""
    write_photos(folder, [f"{number % 3}/{number}.jpg" for number in range(FILES - 1)])
    write_clip(folder / "video.mp4", [number / 5 for number in range(30)])
    return str(folder)


def run(address: str, source: str, seconds: float = 0.0) -> Indexed:
    """Indexes a folder, committing all the time."""
    gallery = Gallery.open(address, Finder(seconds=seconds), create=True)
    return index(gallery, [source], every=0.4)


def content(address: str) -> dict[str, str]:
    """All of a gallery: the rows of each key."""
    database = lancedb.connect(address)
    tables = [database.open_table(name).search() for name in ("people", "scenes", "files")]
    rows = [row for table in tables for row in table.to_list()]
    found = {row.get("id") or row["path"]: str(row) for row in rows}
    assert len(found) == len(rows), "somebody is there twice"
    return found


def stored_bytes(address: str) -> bytes:
    """All that lies in a gallery's folder, hidden files included."""
    return b"".join(path.read_bytes() for path in Path(address).rglob("*") if path.is_file())
