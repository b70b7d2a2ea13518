"""Pictures for the browser: people enlarged, and complete scenes, made once and kept in memory.

In memory alone, so that nobody who is removed from a gallery remains in a folder of pictures.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from operator import attrgetter

import cv2
import numpy as np
from cachetools import LRUCache, cachedmethod
from jaxtyping import Float

from alignps_jax.drawing.pictures import fitted
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


def jpeg(image: Image, longest: int) -> bytes:
    """A JPEG file, whose longer side has at most so many pixels, with nothing but the pixels."""
    return _encoded(image if max(image.shape) <= longest else fitted(image, longest, longest)[0])


def person_picture(image: Image, box: Float[np.ndarray, "4"], tallest: int = PERSON) -> bytes:
    """A JPEG file of a person, enlarged; what lies around the box is darker.

    It is two thirds as wide as high, unless the box is wider or the photo narrower.
    """
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
    """Begin and end of so many pixels around a place, moved into the photo as far as they fit."""
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
