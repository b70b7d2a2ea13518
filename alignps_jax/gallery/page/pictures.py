"""Pictures for the browser: people enlarged, and complete scenes, made once and kept in memory.

In memory alone, so that nobody who is removed from a gallery remains in a folder of pictures.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable

import cv2
import numpy as np
from cachetools import LRUCache
from jaxtyping import Float

from alignps_jax.gallery.entries import Person, Scene
from alignps_jax.gallery.page.uploads import Photos
from alignps_jax.media.photos import Image

PREVIEW = 1600  # longer side of a complete scene, pixels
SMALL = 320  # longer side of a scene in a list, pixels; twice that for dense screens
FULL = 8192  # longer side of a scene at full size, pixels
PERSON = 288  # height of an enlarged person, pixels; twice that for dense screens
_CACHED = 96 << 20  # bytes of finished pictures
_DECODED = 128 << 20  # bytes of decoded scenes: the people of one scene follow one another
_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 80]
_AROUND = 1.1  # of a person's height and width are shown


def _encoded(image: Image) -> bytes:
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), _QUALITY)[1].tobytes()


def _resized(image: Image, factor: float) -> Image:
    height, width = image.shape[:2]
    size = max(1, round(width * factor)), max(1, round(height * factor))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, size, interpolation=how)


def jpeg(image: Image, longest: int) -> bytes:
    """A JPEG file, whose longer side has at most so many pixels, with nothing but the pixels."""
    factor = longest / max(image.shape[:2])
    return _encoded(_resized(image, factor) if factor < 1 else image)


def person_picture(image: Image, box: Float[np.ndarray, "4"], tallest: int = PERSON) -> bytes:
    """A JPEG file of a person, enlarged; what lies around the box is darker.

    It is two thirds as wide as high, unless the box is wider or the photo narrower.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in box)
    tall = max(y2 - y1, 1.0) * _AROUND
    left, right = _within((x1 + x2) / 2, max((x2 - x1) * _AROUND, tall * 2 / 3), width)
    top, bottom = _within((y1 + y2) / 2, tall, height)
    factor = tallest / max(bottom - top, right - left)
    bright = _resized(image[top:bottom, left:right], factor)
    corners = np.array([x1 - left, y1 - top, x2 - left, y2 - top]) * factor
    a, b, c, d = np.clip(corners.round().astype(int), 0, None)
    dark = bright // 2
    dark[b:d, a:c] = bright[b:d, a:c]
    return _encoded(dark)


def _within(middle: float, length: float, limit: int) -> tuple[int, int]:
    """Begin and end of so many pixels around a place, moved into the photo as far as they fit."""
    size = int(np.clip(round(length), 1, limit))
    begin = int(np.clip(round(middle - length / 2), 0, limit - size))
    return begin, begin + size


class Pictures:
    """JPEG files of photos and people, each made once; errors as of `Gallery.pixels`."""

    def __init__(self, photos: Photos):
        self._photos = photos
        self._made: LRUCache[Hashable, bytes] = LRUCache(_CACHED, len)
        self._decoded: LRUCache[str, Image] = LRUCache(_DECODED, lambda image: image.nbytes)
        self._lock = threading.Lock()
        # Decoding takes memory and a core, and a page asks for many pictures at once.
        self._room = threading.Semaphore(max(1, min(4, os.cpu_count() or 1)))

    def person(self, person: Person, tallest: int) -> bytes:
        """An enlarged person."""
        key = person.id, tallest
        return self._make(
            key, lambda: person_picture(self._pixels(person.scene), person.box, tallest)
        )

    def scene(self, scene: Scene, longest: int) -> bytes:
        """A complete scene of at most that length."""
        return self._make((scene.id, longest), lambda: self._scene(scene, longest))

    def _scene(self, scene: Scene, longest: int) -> bytes:
        is_small = longest < PREVIEW
        image = self._photos.pixels(scene, longest) if is_small else self._pixels(scene)
        return jpeg(image, longest)

    def _make(self, key: Hashable, draw: Callable[[], bytes]) -> bytes:
        with self._room:
            with self._lock:
                made = self._made.get(key)
            if made is None:
                made = draw()
                with self._lock:
                    self._made[key] = made
        return made

    def _pixels(self, scene: Scene) -> Image:
        with self._lock:
            image = self._decoded.get(scene.id)
        if image is None:
            image = self._photos.pixels(scene)
            if image.nbytes <= _DECODED // 4:
                with self._lock:
                    self._decoded[scene.id] = image
        return image
