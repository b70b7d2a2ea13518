"""Photos of people who are colored rectangles, and a detector that finds exactly those."""

from __future__ import annotations

import dataclasses
import datetime
import time
from pathlib import Path

import cv2
import numpy as np

from alignps_jax.files import write_image
from alignps_jax.gallery.entries import Scene, content_hash, scene_id
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.people import FileState, FoundScene
from alignps_jax.inference.detector import Detector
from alignps_jax.media import read_photo
from alignps_jax.types import Detections
from configs import tiny

RED, GREEN, BLUE, PINK = (230, 40, 40), (40, 200, 60), (50, 70, 230), (240, 60, 200)
SIZE = (240, 320)  # height, width of a photo


def painted(*people, size=SIZE):
    """A gray photo; each person is a color and the place of a corner, 30 wide and 80 high."""
    photo = np.full((*size, 3), 120, np.uint8)
    for color, (x, y) in people:
        photo[y : y + 80, x : x + 30] = color
    return photo


def encoded(photo, suffix=".png"):
    """The content of a file."""
    return cv2.imencode(suffix, cv2.cvtColor(photo, cv2.COLOR_RGB2BGR))[1].tobytes()


class ColorDetector(Detector):
    """Finds everything that is colorful; the embedding is the color's direction, the score 0.9.

    What is smaller than 30x80 pixels has a score below what is shown. `delay` is in seconds.
    """

    name = "colors, step 7"
    folder = None
    step = 7
    fingerprint = "c0105" * 8

    def __init__(self, delay=0.0):
        self.config = tiny.get_config().lock()
        self.delay = delay

    def detect(self, image):
        time.sleep(self.delay)
        spread = image.max(axis=2).astype(int) - image.min(axis=2)
        count, label = cv2.connectedComponents((spread > 80).astype(np.uint8))
        boxes, scores, embeddings = [], [], []
        for number in range(1, count):
            y, x = np.nonzero(label == number)
            if len(x) < 100:
                continue
            boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
            scores.append(0.9 if len(x) > 2000 else 0.05)
            color = image[label == number].mean(axis=0) - 120.0
            embedding = np.zeros(self.config.model.channels)
            embedding[:3] = color / np.linalg.norm(color)
            embeddings.append(embedding)
        order = np.argsort(scores)[::-1]
        return Detections(
            np.array(boxes, np.float32).reshape(-1, 4)[order],
            np.array(scores, np.float32)[order],
            np.array(embeddings, np.float32).reshape(-1, self.config.model.channels)[order],
            np.ones(len(scores), bool),
        )


def write_photos(folder: Path) -> None:
    """Eight photos: red is in four of them, green in three, blue and pink in one each."""
    photos = {
        "yard/a.png": painted((RED, (20, 60)), (GREEN, (200, 90))),
        "yard/b.png": painted((RED, (120, 80))),
        "yard/c d.png": painted((GREEN, (60, 20)), (BLUE, (250, 100))),
        "gate/ä.png": painted((RED, (200, 40))),
        "gate/e.png": painted((GREEN, (40, 40))),
        "gate/f.png": painted((PINK, (150, 100)), (RED, (30, 100))),
        "gate/nobody.png": painted(),
        "gate/<b>&.png": painted(),
    }
    for name, photo in photos.items():
        write_image(folder / name, photo)


def gallery_of(folder: Path, address: Path, detector: Detector) -> Gallery:
    """A gallery of the photos below a folder; the folder's name is the camera."""
    gallery = Gallery.open(address, detector, create=True)
    scenes = []
    for hour, path in enumerate(sorted(folder.rglob("*.png"))):
        image = read_photo(path, 10**6)
        scenes.append(indexed(path, image, detector, datetime.datetime(2026, 5, 1, hour)))
    commit(gallery, scenes)
    return gallery


def commit(gallery: Gallery, scenes: list[FoundScene]) -> None:
    """Stores scenes, and the files that they are of."""
    files = {}
    for found in scenes:
        path, about = found.scene.path, Path(found.scene.path).stat()
        files[path] = FileState(
            path, about.st_size, about.st_mtime_ns, found.scene.hash, found.every
        )
    gallery.people.commit(scenes, list(files.values()))


def indexed(path, image, detector, taken=None, second=None, every=0.0):
    """What is to be stored of a photo, or a frame."""
    content = content_hash(path.read_bytes())
    scene = Scene(
        id=scene_id(content, second),
        path=str(path),
        height=image.shape[0],
        width=image.shape[1],
        taken=taken,
        camera=path.parent.name,
        second=second,
        hash=content,
    )
    found = detector.detect(image)
    people = Detections(*(np.asarray(x)[found.scores >= 0.2] for x in dataclasses.astuple(found)))
    return FoundScene(scene, people, every)


def scenes_of(site):
    """All photos and frames of a gallery."""
    cards = site.gallery.scenes(99)
    return [scene for card in cards for scene in site.gallery.scenes_of(card.scene.hash)]
