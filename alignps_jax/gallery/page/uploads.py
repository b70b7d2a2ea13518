"""Photos that somebody searches with, beside those of the gallery, and pictures of all of them.

All of it in memory alone, so that nobody who is forgotten remains in a folder.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import attrgetter
from typing import Any

import cv2
import numpy as np
from cachetools import LRUCache, cachedmethod
from jaxtyping import Float
from starlette.exceptions import HTTPException

from alignps_jax.drawing.pictures import fitted
from alignps_jax.errors import UserError, blame
from alignps_jax.gallery.entries import Person, Scene, content_hash, person_id, scene_id
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.search import wanted_people
from alignps_jax.media import Image, decode_photo, is_video
from alignps_jax.types import Detections

MAX_WAITING = 16  # photos
_KEPT = 256 << 20  # bytes of photos, the latest ones
_BESIDES = 1 << 18  # bytes that a photo counts besides its file
_MOST_PEOPLE = 10_000  # of uploaded photos, the latest ones


@dataclasses.dataclass(frozen=True)
class Upload:
    """An uploaded photo, and its people when they are found."""

    scene: Scene
    data: bytes
    people: Future[list[Person]]


class Photos:
    """Photos and people, of a gallery or uploaded; who is gone is an HTTPException (404)."""

    def __init__(self, gallery: Gallery):
        self.gallery, self.detector = gallery, gallery.own_detector()
        self._pool = ThreadPoolExecutor(1, "uploads")
        self._uploads: LRUCache[str, Upload] = LRUCache(_KEPT, lambda x: len(x.data) + _BESIDES)
        # Of uploaded photos, and those whom a drawn box found, with their embeddings.
        self._people: LRUCache[str, tuple[Person, Float[np.ndarray, "D"]]] = LRUCache(_MOST_PEOPLE)
        self._lock, self._decoding = threading.Lock(), threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._warm, self._since = self._submit(lambda: None), 0.0

    def upload(self, name: str, data: bytes) -> Scene:
        """Takes a photo, whose people are detected later; UserError, HTTPException (503)."""
        if is_video(name):
            raise UserError(f"{name}: this is a video. Save a frame with the person as a photo.")
        content = content_hash(data)
        identity = scene_id(content, None)
        upload = self.uploaded(identity)
        is_kept = upload and not (upload.people.done() and upload.people.exception())
        known = upload.scene if upload and is_kept else self.gallery.memory().scene_of(identity)
        if known is not None:
            return known
        with self._decoding, blame(name):  # one at a time, for the memory
            if len(self._pending) >= MAX_WAITING:
                line = "Too many photos wait for the network; please try again in a minute."
                raise HTTPException(503, line, {"Retry-After": "60"})
            height, width = decode_photo(data, self.detector.config.data.max_pixels).shape[:2]
            scene = Scene(identity, name, height, width, None, "", None, content)
            upload = Upload(scene, data, self._submit(self._find, scene, data))
        with self._lock:
            self._uploads[identity] = upload
        return scene

    def uploaded(self, identity: str) -> Upload | None:
        """An uploaded photo that is still kept, and then longer."""
        with self._lock:
            return self._uploads.get(identity)

    def scene(self, identity: str) -> Scene:
        """A photo or frame."""
        upload = self.uploaded(identity)
        scene = upload.scene if upload else self.gallery.memory().scene_of(identity)
        if scene is None:
            raise HTTPException(404, "This photo is not here any more; please choose it again.")
        return scene

    def people_of(self, scene: Scene) -> list[Person]:
        """The people of a photo, best first; UserError if the network failed on it."""
        if (upload := self.uploaded(scene.id)) is None:
            return self.gallery.memory().people_of(scene.id)
        return upload.people.result() if upload.people.done() else []

    def person(self, identity: str) -> Person:
        """A person."""
        with self._lock:
            own, _ = self._people.get(identity, (None, None))
        person = self.gallery.memory().person(identity) or own
        if person is None:
            raise HTTPException(404, "This person is not here any more, or never was.")
        return person

    def drop(self, people: Sequence[str]) -> None:
        """Keeps nothing in memory of people (ids) whom a drawn box found."""
        with self._lock:
            for one in people:
                self._people.pop(one, None)

    def embeddings(self, people: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """The embeddings of people (ids)."""
        with self._lock:
            own = {one: self._people[one][1] for one in people if one in self._people}
        others = [one for one in people if one not in own]
        found = own | dict(zip(others, self.gallery.embeddings(others), strict=True))
        return np.array([found[one] for one in people], np.float32)

    def pixels(self, scene: Scene, side: int = 0) -> Image:
        """A photo or frame, RGB; errors as of `Gallery.pixels`."""
        if (upload := self.uploaded(scene.id)) is None:
            return self.gallery.pixels(scene, side)
        return decode_photo(upload.data, self.detector.config.data.max_pixels)

    def person_at(self, scene: Scene, box: tuple[float, ...]) -> tuple[Person, Detections]:
        """The person in a drawn box, looked for there; UserError if nobody is."""
        work = self._submit(lambda: wanted_people(self.detector, self.pixels(scene), box))
        found: Detections = work.result()
        (person,) = self._keep(scene, found)
        return person, found

    def warm_up(self, prepare: Callable[[], object]) -> None:
        """Compiles the programs for photos of both orientations, and does `prepare`."""
        long, short = self.detector.config.data.test_scale

        def work() -> None:
            self.detector.detect(np.zeros((short, long, 3), np.uint8))
            prepare()
            self.detector.detect(np.zeros((long, short, 3), np.uint8))

        self._warm, self._since = self._submit(work), time.monotonic()

    def status(self) -> dict[str, Any]:
        """How many photos wait, and for how long the network has been compiled (0: it is)."""
        seconds = 0 if self._warm.done() else time.monotonic() - self._since
        return {"waiting": len(self._pending), "seconds": seconds}

    def _submit(self, work: Callable[..., Any], *values: object) -> Future[Any]:
        future = self._pool.submit(work, *values)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def _find(self, scene: Scene, data: bytes) -> list[Person]:
        try:
            image = decode_photo(data, self.detector.config.data.max_pixels)
            found = self._keep(scene, self.detector.detect(image))
        except Exception as error:  # the next photo may be better
            traceback.print_exception(error)
            line = f"{scene.path}: the network failed on this photo; the server's log says why."
            raise UserError(line) from None
        return [one for one in found if one.score >= self.gallery.info.score_threshold]

    def _keep(self, scene: Scene, found: Detections) -> list[Person]:
        boxes, scores = np.asarray(found.boxes), np.asarray(found.scores).tolist()
        people = [
            Person(person_id(scene.id, box), scene, box, score)
            for box, score in zip(boxes, scores, strict=True)
        ]
        with self._lock:
            for person, embedding in zip(people, np.asarray(found.embeddings), strict=True):
                self._people[person.id] = person, embedding
        return people


PREVIEW = 1600  # longer side of a complete scene, pixels
SMALL = 320  # longer side of a scene in a list, pixels; twice that for dense screens
FULL = 8192  # longer side of a scene at full size, pixels
PERSON = 288  # height of an enlarged person, pixels; twice that for dense screens
_CACHED = 96 << 20  # bytes of finished pictures
_DECODED = 128 << 20  # bytes of decoded scenes: the people of one scene follow one another
_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 75]
_AROUND = 1.1  # of a person's height and width are shown


def _encoded(image: Image) -> bytes:
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), _QUALITY)[1].tobytes()


def jpeg(image: Image, longest: int) -> bytes:
    """A JPEG file without metadata, its longer side limited in pixels."""
    return _encoded(image if max(image.shape) <= longest else fitted(image, longest, longest)[0])


def person_picture(image: Image, box: Float[np.ndarray, "4"], tallest: int = PERSON) -> bytes:
    """A JPEG file of a person, enlarged, two thirds as wide as high; darker around the box."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in box)
    tall = max(y2 - y1, 1.0) * _AROUND
    left, right = _within((x1 + x2) / 2, max((x2 - x1) * _AROUND, tall * 2 / 3), width)
    top, bottom = _within((y1 + y2) / 2, tall, height)
    bright, factor = fitted(image[top:bottom, left:right], tallest, tallest)
    corners = np.array([x1 - left, y1 - top, x2 - left, y2 - top]) * factor
    a, b, c, d = np.clip(corners.round().astype(int), 0, None)
    dark = bright // 2
    dark[b:d, a:c] = bright[b:d, a:c]
    return _encoded(dark)


def _within(middle: float, length: float, limit: int) -> tuple[int, int]:
    """Start and end of a span of pixels around a place, shifted to lie inside the photo."""
    size = int(np.clip(round(length), 1, limit))
    begin = int(np.clip(round(middle - length / 2), 0, limit - size))
    return begin, begin + size


class Pictures:
    """JPEG files of photos and people, each made once; errors as of `Gallery.pixels`."""

    def __init__(self, photos: Photos):
        self._photos = photos
        self._made: LRUCache[Hashable, bytes] = LRUCache(_CACHED, len)
        self._decoded: LRUCache[Hashable, Image] = LRUCache(_DECODED, lambda image: image.nbytes)
        self._lock = threading.Lock()
        # Decoding takes memory and a core, and a page asks for many pictures at once.
        self._room = threading.Semaphore(max(1, min(4, os.cpu_count() or 1)))

    @cachedmethod(attrgetter("_made"), lambda _, one, tall: (one.id, tall), attrgetter("_lock"))
    def person(self, person: Person, tallest: int) -> bytes:
        """An enlarged person."""
        return person_picture(self._pixels(person.scene), person.box, tallest)

    @cachedmethod(attrgetter("_made"), lambda _, one, long: (one.id, long), attrgetter("_lock"))
    def scene(self, scene: Scene, longest: int) -> bytes:
        """A complete scene of at most that length."""
        if longest >= PREVIEW:
            return jpeg(self._pixels(scene), longest)
        with self._room:
            return jpeg(self._photos.pixels(scene, longest), longest)

    @cachedmethod(attrgetter("_decoded"), lambda _, scene: scene.id, attrgetter("_lock"))
    def _pixels(self, scene: Scene) -> Image:
        with self._room:
            return self._photos.pixels(scene)
