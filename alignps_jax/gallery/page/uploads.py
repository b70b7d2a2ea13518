"""Photos that somebody searches with: detected one at a time, kept in memory for a while."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cachetools import LRUCache
from fastapi import HTTPException

from alignps_jax.errors import UserError, blame
from alignps_jax.gallery.page.access import MAX_BODY
from alignps_jax.gallery.page.pictures import PREVIEW, decoded, jpeg, person_picture
from alignps_jax.image_files import decode_photo, read_header
from alignps_jax.inference.detector import Detector
from alignps_jax.types import Detections
from data_pipeline.transforms import is_landscape

MAX_WAITING = 16  # photos
_MAX_KEPT = 64  # photos
_MAX_RECEIVED = 8 * MAX_BODY  # bytes of photos that arrive at a time, because they are in memory
_BUSY = "Too many photos wait for the network at the moment; please try again in a minute."
_GONE = "The server does not have this photo any more; please choose it again."


@dataclasses.dataclass
class Upload:
    """A photo that somebody searches with.

    Attributes:
      id: of its content, so that the same photo is found again after a restart.
      name: what its owner calls it.
      size: height and width in pixels as a viewer shows it; None until it is decoded.
      preview: JPEG for the browser; empty until the photo is decoded.
      found: everybody that was detected, best first; None until then.
      shown: how many of them have the score to be shown.
      error: what is wrong with the photo, in one line.
      pictures: of the detected people, by row.
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

    def picture(self, row: int) -> bytes:
        """JPEG of one of the detected people; HTTPException (404) if there is none of that row."""
        if row not in self.pictures:
            if self.found is None or self.size is None or row >= len(self.found.scores):
                raise HTTPException(404, "There is no such picture.")
            preview = decoded(self.preview)  # somebody with a low score, in a box that was drawn
            box = self.found.boxes[row] * (preview.shape[1] / self.size[1])
            self.pictures[row] = person_picture(preview, box)
        return self.pictures[row]


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


class Uploads:
    """Detects people in photos, in a thread of its own, one photo at a time.

    A detector compiles a program for the first landscape and one for the first portrait photo,
    which can take a minute each; `warm_up` does so beforehand.
    """

    def __init__(self, detector: Detector):
        self._detector = detector
        self._pool = ThreadPoolExecutor(1, "uploads")
        self._kept: LRUCache[str, Upload] = LRUCache(_MAX_KEPT)
        self._lock = threading.Lock()
        self._waiting = self._received = 0
        self._ready: set[bool] = set()
        self._first: tuple[str, float] | None = None

    def warm_up(self, prepare: Callable[[], object]) -> None:
        """Compiles the programs for photos of both orientations, and prepares the search.

        It returns at once; `status` says how far it is.
        """
        long, short = self._detector.config.data.test_scale

        def prepared() -> None:
            with self._preparing("the search"):
                prepare()

        def detected(height: int, width: int) -> None:
            self._detect(np.zeros((height, width, 3), np.uint8))

        self._submit(detected, short, long)
        self._submit(prepared)
        self._submit(detected, long, short)

    def status(self) -> Status:
        """What is going on at this moment."""
        name, since = self._first or (None, 0.0)
        return Status(self._waiting, name, time.monotonic() - since if name else 0.0)

    @contextlib.contextmanager
    def room(self, length: int) -> Iterator[None]:
        """Room for so many bytes that are received; HTTPException (503) if there is none."""
        with self._lock:
            if self._received + length > _MAX_RECEIVED:
                raise HTTPException(503, _BUSY, {"Retry-After": "60"})
            self._received += length
        try:
            yield
        finally:
            with self._lock:
                self._received -= length

    def upload(self, name: str, data: bytes) -> Upload:
        """Takes the file of a photo; its people are detected later.

        Raises:
          UserError: it is no photo, or has too many pixels.
          HTTPException (503): too many photos wait.
        """
        header = read_header(data)
        if header is None:
            raise UserError(f"{name}: this is not a photo (JPEG, PNG, BMP, WebP or TIFF)")
        if header.height * header.width > self._detector.config.data.max_pixels:
            raise UserError(f"{name}: {header.width}x{header.height} pixels are too many")
        digest = hashlib.sha256(data).hexdigest()[:24]
        return self.add(digest, name, lambda: decode_photo(data, header, name, upright=True))

    def add(self, digest: str, name: str, read: Callable[[], np.ndarray]) -> Upload:
        """Takes a photo that `read` gives when its turn comes; HTTPException (503)."""
        with self._lock:
            known = self._kept.get(digest)
            if known is not None and known.error is None:
                return known
            if self._waiting >= MAX_WAITING:
                raise HTTPException(503, _BUSY, {"Retry-After": "60"})
            upload = self._kept[digest] = Upload(digest, name)
        self._submit(self._find, upload, read)
        return upload

    def get(self, upload_id: str) -> Upload:
        """A photo that is still kept, and then longer; HTTPException (404) if it is not."""
        with self._lock:
            upload = self._kept.get(upload_id)
        if upload is None:
            raise HTTPException(404, _GONE)
        return upload

    def _submit(self, work: Callable[..., object], *values: object) -> None:
        def step() -> None:
            try:
                work(*values)
            except Exception as error:  # the next photo may be better
                traceback.print_exception(error)
            finally:
                with self._lock:
                    self._waiting -= 1

        with self._lock:
            self._waiting += 1
        self._pool.submit(step)

    @contextlib.contextmanager
    def _preparing(self, name: str) -> Iterator[None]:
        self._first = name, time.monotonic()
        try:
            yield
        finally:
            self._first = None

    def _find(self, upload: Upload, read: Callable[[], np.ndarray]) -> None:
        try:
            with blame(upload.name):
                image = read()
            upload.preview, upload.size = jpeg(image, PREVIEW), image.shape[:2]
            found = self._detect(image)
        except (UserError, OSError) as error:
            upload.error = str(error)
            return
        except Exception:
            upload.error = f"{upload.name}: the network failed on this photo; the server's log says"
            raise
        upload.shown = int((found.scores >= self._detector.config.eval.score_threshold).sum())
        shown = enumerate(found.boxes[: upload.shown])
        upload.pictures = {row: person_picture(image, box) for row, box in shown}
        upload.found = found

    def _detect(self, image: np.ndarray) -> Detections:
        landscape = is_landscape(image.shape[:2])
        if landscape in self._ready:
            return self._detector.detect(image)
        kind = "landscape" if landscape else "portrait"
        with self._preparing(f"the network for {kind} photos"):
            found = self._detector.detect(image)
        self._ready.add(landscape)
        return found
