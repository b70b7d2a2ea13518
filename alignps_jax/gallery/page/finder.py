"""Photos that somebody searches with: detected one at a time, kept in memory for a while."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import secrets
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from alignps_jax.boxes import iou
from alignps_jax.errors import blame
from alignps_jax.gallery.page.pictures import PREVIEW, decoded, jpeg, person_picture
from alignps_jax.inference.detector import Detector
from alignps_jax.media.photos import Image, decode_photo
from alignps_jax.types import Detections, UserError
from data_pipeline.transforms import is_landscape

_Made = TypeVar("_Made")

MAX_WAITING = 16  # photos
MAX_KEPT = 64  # photos


class BusyError(Exception):
    """Too many photos wait already."""


@dataclasses.dataclass
class Upload:
    """A photo that somebody searches with.

    Attributes:
      id: random, so that nobody guesses it.
      name: what its owner calls it.
      size: height and width in pixels as a viewer shows it; None until it is decoded.
      preview: JPEG for the browser; empty until the photo is decoded.
      found: everybody that was detected, best first; None until then.
      shown: how many of them have the score to be shown.
      error: what is wrong with the photo, in one line.
    """

    id: str
    name: str
    size: tuple[int, int] | None = None
    preview: bytes = b""
    found: Detections | None = None
    shown: int = 0
    error: str | None = None
    pictures: dict[int, bytes] = dataclasses.field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.found is not None or self.error is not None

    def best_in(self, box: Float[np.ndarray, "4"]) -> int | None:
        """The row of the detection that overlaps the box most; None where none does."""
        if self.found is None or not len(self.found.scores):
            return None
        overlap = iou(self.found.boxes, box)
        return int(overlap.argmax()) if overlap.max() > 0 else None


@dataclasses.dataclass(frozen=True)
class Status:
    """What the thread that detects is doing.

    Attributes:
      waiting: how many photos wait.
      first: what is being prepared for the first time, which takes long; None where nothing is.
      seconds: for how long.
    """

    waiting: int
    first: str | None
    seconds: float


class Finder:
    """Detects people in photos, in a thread of its own, one photo at a time.

    A detector compiles a program for the first landscape and one for the first portrait photo,
    which can take a minute each; `warm_up` does so beforehand.

    Args:
      detector: whose configuration bounds the pixels of a photo and the scores that are shown.
      waiting: how many photos may wait.
      kept: how many photos are kept, the latest ones.
    """

    def __init__(self, detector: Detector, waiting: int = MAX_WAITING, kept: int = MAX_KEPT):
        self._detector = detector
        self._kept = kept
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._jobs: queue.Queue[Callable[[], object]] = queue.Queue(waiting)
        self._lock = threading.Lock()
        self._ready: set[bool] = set()
        self._first: tuple[str, float] | None = None
        # A daemon: the compiler cannot be interrupted, and nothing is lost with it.
        threading.Thread(target=self._work, name="finder", daemon=True).start()

    @property
    def max_pixels(self) -> int:
        return self._detector.config.data.max_pixels

    def warm_up(self, prepare: Callable[[], object]) -> None:
        """Compiles the programs for photos of both orientations, and prepares the search.

        It returns at once; `status` says how far it is.
        """
        long, short = self._detector.config.data.test_scale
        landscape, portrait = (
            np.zeros((*size, 3), np.uint8) for size in ((short, long), (long, short))
        )
        self._one_by_one(
            [
                lambda: self._detect(landscape),
                lambda: self._prepare("the search", prepare),
                lambda: self._detect(portrait),
            ]
        )

    def _one_by_one(self, steps: Sequence[Callable[[], object]]) -> None:
        """Does the steps, each after the photos that wait by then."""

        def step() -> None:
            try:
                steps[0]()
            finally:
                self._one_by_one(steps[1:])

        # Where there is no room, there are photos enough to compile for.
        with contextlib.suppress(queue.Full):
            if steps:
                self._jobs.put_nowait(step)

    def _prepare(self, name: str, prepare: Callable[[], _Made]) -> _Made:
        self._first = name, time.monotonic()
        try:
            return prepare()
        finally:
            self._first = None

    def status(self) -> Status:
        """What is going on at this moment."""
        name, since = self._first or (None, 0.0)
        seconds = time.monotonic() - since if name else 0.0
        return Status(self._jobs.qsize(), name, seconds)

    def upload(self, name: str, data: bytes) -> Upload:
        """Takes the file of a photo; it is decoded and detected later.

        Raises:
          UserError: it is no photo, or has too many pixels.
          BusyError: too many photos wait.
        """
        with blame(name):
            decode_photo(data, self.max_pixels, side=8)
        return self.add(name, lambda: self._decode(name, data))

    def _decode(self, name: str, data: bytes) -> Image:
        with blame(name):
            return decode_photo(data, self.max_pixels)

    def add(self, name: str, read: Callable[[], Image]) -> Upload:
        """Takes a photo that `read` gives when its turn comes; raises BusyError."""
        upload = Upload(secrets.token_hex(12), name)
        try:
            self._jobs.put_nowait(lambda: self._find(upload, read))
        except queue.Full:
            raise BusyError from None
        with self._lock:
            self._uploads[upload.id] = upload
            while len(self._uploads) > self._kept:
                self._uploads.popitem(last=False)
        return upload

    def get(self, upload_id: str) -> Upload | None:
        """A photo that is still kept; it is then kept longer."""
        with self._lock:
            if upload_id in self._uploads:
                self._uploads.move_to_end(upload_id)
            return self._uploads.get(upload_id)

    def picture(self, upload: Upload, row: int) -> bytes:
        """JPEG of one of the detected people; KeyError if there is none of that row."""
        if row in upload.pictures:
            return upload.pictures[row]
        if upload.found is None or upload.size is None or not 0 <= row < len(upload.found.scores):
            raise KeyError(row)
        # One with a low score, around whom somebody drew a box.
        preview = decoded(upload.preview)
        box = upload.found.boxes[row] * (preview.shape[1] / upload.size[1])
        return upload.pictures.setdefault(row, person_picture(preview, box))

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception:  # the next photo may be better
                traceback.print_exc(file=sys.stderr)

    def _find(self, upload: Upload, read: Callable[[], Image]) -> None:
        try:
            image = read()
            upload.preview = jpeg(image, PREVIEW)
            upload.size = image.shape[:2]
            found = self._detect(image)
        except UserError as error:
            upload.error = str(error)
            return
        except Exception:
            upload.error = f"{upload.name}: the network failed on this photo; the server's log says"
            raise
        upload.shown = int((found.scores >= self._detector.config.eval.score_threshold).sum())
        shown = found.boxes[: upload.shown]
        upload.pictures = {row: person_picture(image, box) for row, box in enumerate(shown)}
        upload.found = found

    def _detect(self, image: Image) -> Detections:
        landscape = is_landscape(image.shape[:2])
        if landscape in self._ready:
            return self._detector.detect(image)
        kind = "landscape" if landscape else "portrait"
        found = self._prepare(
            f"the network for {kind} photos", lambda: self._detector.detect(image)
        )
        self._ready.add(landscape)
        return found
