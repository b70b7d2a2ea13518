"""Photos that somebody searches with: detected one at a time, kept in memory for a while."""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from cachetools import LRUCache
from starlette.exceptions import HTTPException

from alignps_jax.errors import UserError, blame
from alignps_jax.gallery.entries import content_hash
from alignps_jax.gallery.page.pictures import PREVIEW, jpeg, person_picture
from alignps_jax.gallery.search import person_at, person_in_box
from alignps_jax.inference.detector import Detector
from alignps_jax.media.photos import Image, decode_photo
from alignps_jax.media.videos import VIDEO_SUFFIXES
from alignps_jax.types import Detections
from data_pipeline.transforms import is_landscape

MAX_WAITING = 16  # photos
_KEPT = 256 << 20  # bytes of photos, the latest ones
_SMALLEST = 4 << 20  # bytes that a photo counts at least, with its pictures
_BUSY = "Too many photos wait for the network at the moment; please try again in a minute."


@dataclasses.dataclass
class Upload:
    """A photo that somebody searches with.

    Attributes:
      hash: of its content; the id is its beginning, so the same photo is found after a restart.
      name: what its owner calls it.
      read: gives its pixels.
      length: of its file in bytes.
      size: height and width in pixels as a viewer shows it; None until it is decoded.
      preview: JPEG for the browser; empty until the photo is decoded.
      found: everybody that was detected, best first, and whom boxes found; None until then.
      shown: how many of them have the score to be shown.
      pictures: JPEGs of people, by their row.
      error: what is wrong with the photo, in one line.
      done: ends when the people are found.
    """

    hash: str
    name: str
    read: Callable[[], Image]
    length: int
    size: tuple[int, int] | None = None
    preview: bytes = b""
    found: Detections | None = None
    shown: int = 0
    pictures: dict[int, bytes] = dataclasses.field(default_factory=dict)
    error: str | None = None
    done: Future[None] | None = None

    @property
    def id(self) -> str:
        return self.hash[:24]

    @property
    def is_done(self) -> bool:
        return self.found is not None or self.error is not None


class Uploads:
    """Detects people in photos, in a thread of its own, one photo at a time.

    A detector compiles a program for the first landscape and one for the first portrait photo,
    which can take a minute each; `warm_up` does so beforehand.
    """

    def __init__(self, detector: Detector):
        self.detector = detector
        self._pool = ThreadPoolExecutor(1, "uploads")
        self._kept: LRUCache[str, Upload] = LRUCache(_KEPT, lambda one: max(one.length, _SMALLEST))
        self._lock = threading.Lock()
        self._waiting = 0
        self._ready: set[bool] = set()
        self._first: tuple[str, float] | None = None

    def warm_up(self, prepare: Callable[[], object]) -> None:
        """Compiles the programs for photos of both orientations; `prepare` comes between them."""
        long, short = self.detector.config.data.test_scale
        self._submit(self._detect, np.zeros((short, long, 3), np.uint8))
        self._submit(self._prepared, "the search", prepare)
        self._submit(self._detect, np.zeros((long, short, 3), np.uint8))

    def status(self) -> dict[str, Any]:
        """How many photos wait, and what is prepared for the first time since how many seconds."""
        name, since = self._first or ("", time.monotonic())
        return {"waiting": self._waiting, "first": name, "seconds": time.monotonic() - since}

    def upload(self, name: str, data: bytes) -> Upload:
        """Takes the file of a photo; UserError if it is none, HTTPException (503) if busy."""
        if not data:
            raise UserError(f"{name}: this file is empty.")
        if PurePath(name).suffix.lower() in VIDEO_SUFFIXES:
            raise UserError(f"{name}: this is a video. Save a frame with the person as a photo.")
        most = self.detector.config.data.max_pixels
        return self.add(content_hash(data), name, lambda: decode_photo(data, most), len(data))

    def add(self, content: str, name: str, read: Callable[[], Image], length: int = 0) -> Upload:
        """Takes a photo that `read` gives when its turn comes; HTTPException (503) if busy."""
        with self._lock:
            known = self._kept.get(content[:24])
            if known is not None and known.error is None:
                return known
            if self._waiting >= MAX_WAITING:
                raise HTTPException(503, _BUSY, {"Retry-After": "60"})
            upload = self._kept[content[:24]] = Upload(content, name, read, length)
        upload.done = self._submit(self._find, upload)
        return upload

    def get(self, upload_id: str) -> Upload:
        """A photo that is still kept, and then longer; HTTPException (404) if it is not."""
        with self._lock:
            upload = self._kept.get(upload_id)
        if upload is None:
            line = "The server does not have this photo any more; please choose it again."
            raise HTTPException(404, line)
        return upload

    def row_at(self, upload: Upload, box: tuple[float, ...]) -> int:
        """The row of the person under a box, who is looked for there if need be.

        UserError if nobody is there.
        """
        row: int = self._submit(self._row_at, upload, box).result()
        return row

    def _row_at(self, upload: Upload, box: tuple[float, ...]) -> int:
        if upload.found is None:
            raise UserError(upload.error or "The photo is not searched yet; please wait a moment.")
        row = person_in_box(upload.found.boxes, box)
        if row is None or row not in upload.pictures:
            image = upload.read()
            if row is None:
                one, row = (
                    person_at(self.detector, image, upload.name, box),
                    len(upload.found.scores),
                )
                upload.found = jax.tree.map(lambda *x: np.concatenate(x), upload.found, one)
            upload.pictures[row] = person_picture(image, np.asarray(upload.found.boxes[row]))
        return row

    def _submit(self, work: Callable[..., Any], *values: object) -> Future[Any]:
        def step() -> Any:
            try:
                return work(*values)
            finally:
                with self._lock:
                    self._waiting -= 1

        with self._lock:
            self._waiting += 1
        return self._pool.submit(step)

    def _prepared(self, name: str, prepare: Callable[[], Any]) -> Any:
        self._first = name, time.monotonic()
        try:
            return prepare()
        finally:
            self._first = None

    def _find(self, upload: Upload) -> None:
        try:
            with blame(upload.name):
                image = upload.read()
            upload.preview, upload.size = jpeg(image, PREVIEW), image.shape[:2]
            found = self._detect(image)
            upload.shown = int((found.scores >= self.detector.config.eval.score_threshold).sum())
            shown = enumerate(np.asarray(found.boxes)[: upload.shown])
            upload.pictures = {row: person_picture(image, box) for row, box in shown}
            upload.found = found
        except (UserError, OSError) as error:
            upload.error = str(error)
        except Exception as error:  # the next photo may be better
            upload.error = f"{upload.name}: the network failed on this photo; the server's log says"
            traceback.print_exception(error)

    def _detect(self, image: Image) -> Detections:
        landscape = is_landscape(image.shape[:2])
        if landscape in self._ready:
            return self.detector.detect(image)
        name = f"the network for {'landscape' if landscape else 'portrait'} photos"
        found: Detections = self._prepared(name, lambda: self.detector.detect(image))
        self._ready.add(landscape)
        return found
