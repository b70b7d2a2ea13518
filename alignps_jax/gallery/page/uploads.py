"""Photos that somebody searches with, beside those of the gallery: both are asked for alike.

Uploaded photos are detected one at a time and kept in memory for a while. Their ids, and those of
their people, come from the content, so that a photo that is uploaded again has the same.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePath
from typing import Any

import numpy as np
from cachetools import LRUCache
from jaxtyping import Float
from starlette.exceptions import HTTPException

from alignps_jax.errors import UserError, blame
from alignps_jax.gallery.entries import Person, Scene, content_hash, person_id, scene_id
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.search import person_at
from alignps_jax.media.photos import Image, decode_photo
from alignps_jax.media.videos import VIDEO_SUFFIXES
from alignps_jax.types import Detections

MAX_WAITING = 16  # photos
_KEPT = 256 << 20  # bytes of photos, the latest ones
_SMALLEST = 1 << 20  # bytes that a photo counts at least
_MOST_PEOPLE = 10_000  # of uploaded photos, the latest ones


@dataclasses.dataclass(frozen=True)
class Upload:
    """An uploaded photo, and its people when they are found."""

    scene: Scene
    data: bytes
    people: Future[list[Person]]


class Photos:
    """The photos and people of a gallery, and those that were uploaded.

    What is not known, or not any more, is an HTTPException (404).
    """

    def __init__(self, gallery: Gallery):
        self.gallery, self.detector = gallery, gallery.own_detector()
        self._pool = ThreadPoolExecutor(1, "uploads")
        self._uploads: LRUCache[str, Upload] = LRUCache(
            _KEPT, lambda x: max(len(x.data), _SMALLEST)
        )
        # Of uploaded photos, and those whom a drawn box found, with their embeddings.
        self._people: LRUCache[str, tuple[Person, Float[np.ndarray, "D"]]] = LRUCache(_MOST_PEOPLE)
        self._lock, self._decoding = threading.Lock(), threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._warm, self._since = self._submit(lambda: None), 0.0

    def upload(self, name: str, data: bytes) -> Scene:
        """Takes the file of a photo, whose people are detected later.

        Raises UserError if it is none, HTTPException (503) if too many wait.
        """
        if not data:
            raise UserError(f"{name}: this file is empty.")
        if PurePath(name).suffix.lower() in VIDEO_SUFFIXES:
            raise UserError(f"{name}: this is a video. Save a frame with the person as a photo.")
        content = content_hash(data)
        identity = scene_id(content, None)
        upload = self.uploaded(identity)
        is_kept = upload and not (upload.people.done() and upload.people.exception())
        known = upload.scene if upload and is_kept else self.gallery.scene(identity)
        if known is not None:
            return known
        if len(self._pending) >= MAX_WAITING:
            line = "Too many photos wait for the network; please try again in a minute."
            raise HTTPException(503, line, {"Retry-After": "60"})
        with self._decoding, blame(name):  # one at a time, for the memory
            height, width = decode_photo(data, self.gallery.info.max_pixels).shape[:2]
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
        scene = upload.scene if upload else self.gallery.scene(identity)
        if scene is None:
            raise HTTPException(404, "This photo is not here any more; please choose it again.")
        return scene

    def people_of(self, scene: Scene) -> list[Person]:
        """The people of a photo, best first; UserError if the network failed on it."""
        if (upload := self.uploaded(scene.id)) is None:
            return self.gallery.people_of(scene.id)
        return upload.people.result() if upload.people.done() else []

    def person(self, identity: str) -> Person:
        """A person."""
        with self._lock:
            own, _ = self._people.get(identity, (None, None))
        person = self.gallery.person(identity) or own
        if person is None:
            raise HTTPException(404, "This person is not here any more, or never was.")
        return person

    def embeddings(self, people: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """The embeddings of people (ids)."""
        with self._lock:
            own = {one: self._people[one][1] for one in people if one in self._people}
        others = [one for one in people if one not in own]
        found = own | dict(zip(others, self.gallery.embeddings(others), strict=True))
        return np.array([found[one] for one in people], np.float32)

    def pixels(self, scene: Scene, side: int | None = None) -> Image:
        """A photo or frame, RGB; errors as of `Gallery.pixels`."""
        if (upload := self.uploaded(scene.id)) is None:
            return self.gallery.pixels(scene, side)
        return decode_photo(upload.data, self.gallery.info.max_pixels)

    def person_at(self, scene: Scene, box: tuple[float, ...]) -> tuple[Person, Detections]:
        """The person in a drawn box, looked for there; UserError if nobody is."""
        work = self._submit(lambda: person_at(self.detector, self.pixels(scene), scene.name, box))
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
            image = decode_photo(data, self.gallery.info.max_pixels)
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
