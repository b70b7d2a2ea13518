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


@dataclasses.dataclass
class Upload:
    """An uploaded photo; `people` is None until they are found, `error` says what is wrong."""

    scene: Scene
    data: bytes
    people: list[Person] | None = None
    error: str = ""
    done: Future[None] | None = None


class Photos:
    """The photos and people of a gallery, and those that were uploaded."""

    def __init__(self, gallery: Gallery):
        self.gallery, self.detector = gallery, gallery.own_detector()
        self._pool = ThreadPoolExecutor(1, "uploads")
        self._uploads: LRUCache[str, Upload] = LRUCache(
            _KEPT, lambda x: max(len(x.data), _SMALLEST)
        )
        # Of uploaded photos, and those whom a drawn box found, with their embeddings.
        self._people: LRUCache[str, tuple[Person, Float[np.ndarray, "D"]]] = LRUCache(_MOST_PEOPLE)
        self._lock = threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._warm, self._since = self._submit(lambda: None), 0.0

    def upload(self, name: str, data: bytes) -> Scene:
        """Takes the file of a photo, whose people are detected later.

        Raises UserError if it is empty or a video, HTTPException (503) if too many wait.
        """
        if not data:
            raise UserError(f"{name}: this file is empty.")
        if PurePath(name).suffix.lower() in VIDEO_SUFFIXES:
            raise UserError(f"{name}: this is a video. Save a frame with the person as a photo.")
        content = content_hash(data)
        identity = scene_id(content, None)
        known = self.gallery.scene(identity)
        if known is not None:
            return known
        with self._lock:
            upload = self._uploads.get(identity)
            if upload is None or upload.error:
                if len(self._pending) >= MAX_WAITING:
                    line = "Too many photos wait for the network; please try again in a minute."
                    raise HTTPException(503, line, {"Retry-After": "60"})
                scene = Scene(identity, name, 0, 0, None, "", None, content)
                upload = self._uploads[identity] = Upload(scene, data)
                upload.done = self._submit(self._find, upload)
        return upload.scene

    def uploaded(self, identity: str) -> Upload | None:
        """An uploaded photo that is still kept, and then longer."""
        with self._lock:
            return self._uploads.get(identity)

    def scene(self, identity: str) -> Scene:
        """A photo or frame; HTTPException (404) if it is not known, or not any more."""
        upload = self.uploaded(identity)
        scene = upload.scene if upload else self.gallery.scene(identity)
        if scene is None:
            raise HTTPException(404, "This photo is not here any more; please choose it again.")
        return scene

    def people_of(self, scene: Scene) -> list[Person]:
        """The people of a photo, best first."""
        upload = self.uploaded(scene.id)
        return upload.people or [] if upload else self.gallery.people_of(scene.id)

    def person(self, identity: str) -> Person:
        """A person; HTTPException (404) if it is not known, or not any more."""
        person = self.gallery.person(identity)
        if person is None:
            with self._lock:
                person, _ = self._people.get(identity, (None, None))
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
        upload = self.uploaded(scene.id)
        if upload is None:
            return self.gallery.pixels(scene, side)
        return decode_photo(upload.data, self.gallery.info.max_pixels)

    def person_at(self, scene: Scene, box: tuple[float, ...]) -> tuple[Person, Detections]:
        """The person in a drawn box, looked for there; UserError if nobody is."""
        work = self._submit(lambda: person_at(self.detector, self.pixels(scene), scene.name, box))
        found: Detections = work.result()
        (person,) = self._keep(scene, found)
        return person, found

    def _keep(self, scene: Scene, found: Detections) -> list[Person]:
        boxes, embeddings = np.asarray(found.boxes), np.asarray(found.embeddings)
        people = [
            Person(person_id(scene.id, box), scene, box, float(score))
            for box, score in zip(boxes, np.asarray(found.scores), strict=True)
        ]
        with self._lock:
            for person, embedding in zip(people, embeddings, strict=True):
                self._people[person.id] = person, embedding
        return people

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

    def _find(self, upload: Upload) -> None:
        name = upload.scene.path
        try:
            with blame(name):
                image = decode_photo(upload.data, self.gallery.info.max_pixels)
            height, width = image.shape[:2]
            upload.scene = dataclasses.replace(upload.scene, height=height, width=width)
            found = self._keep(upload.scene, self.detector.detect(image))
            threshold = self.gallery.info.score_threshold
            upload.people = [person for person in found if person.score >= threshold]
        except (UserError, OSError) as error:
            upload.error = str(error)
        except Exception as error:  # the next photo may be better
            upload.error = f"{name}: the network failed on this photo; the server's log says"
            traceback.print_exception(error)
