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

from alignps_jax.files import Image
from alignps_jax.gallery.entries import Person, Scene
from alignps_jax.gallery.store import Gallery

PREVIEW = 1600  # longer side of a complete scene, pixels
SMALL = 320  # longer side of a scene in a list, pixels; twice that for dense screens
PERSON = 288  # height of an enlarged person, pixels; twice that for dense screens
_CACHED = 96 << 20  # bytes of finished pictures
_DECODED = 128 << 20  # bytes of decoded scenes: the people of one scene follow one another
_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 80]
_AROUND = 0.1  # of a person's height and width


def _encoded(image: Image) -> bytes:
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), _QUALITY)[1].tobytes()


def _resized(image: Image, factor: float) -> Image:
    height, width = image.shape[:2]
    size = max(1, round(width * factor)), max(1, round(height * factor))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, size, interpolation=how)


def jpeg(image: Image, longest: int) -> bytes:
    """A JPEG file of the picture, whose longer side has at most so many pixels.

    It holds nothing but pixels: other data of the photo's file, such as where it was taken, are
    left out.
    """
    factor = longest / max(image.shape[:2])
    return _encoded(_resized(image, factor) if factor < 1 else image)


def person_picture(image: Image, box: Float[np.ndarray, "4"], tallest: int = PERSON) -> bytes:
    """A JPEG file of a person, enlarged; what lies around the box is darker.

    It is two thirds as wide as high, unless the box is wider or the photo narrower.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in box)
    tall = max(y2 - y1, 1.0) * (1 + _AROUND)
    wide = max((x2 - x1) * (1 + _AROUND), tall * 2 / 3)
    left, right = _within((x1 + x2) / 2, wide, width)
    top, bottom = _within((y1 + y2) / 2, tall, height)
    part = image[top:bottom, left:right]
    factor = tallest / max(part.shape[:2])
    bright = _resized(part, factor)
    dark = bright // 2
    inside = np.clip(np.array([x1 - left, y1 - top, x2 - left, y2 - top]) * factor, 0, None)
    a, b, c, d = inside.round().astype(int)
    dark[b:d, a:c] = bright[b:d, a:c]
    return _encoded(dark)


def _within(middle: float, length: float, limit: int) -> tuple[int, int]:
    """Begin and end of so many pixels around a place, moved into the photo as far as they fit."""
    size = int(np.clip(round(length), 1, limit))
    begin = int(np.clip(round(middle - length / 2), 0, limit - size))
    return begin, begin + size


class Pictures:
    """The pictures of a gallery: JPEG files, each made once."""

    def __init__(self, gallery: Gallery):
        self._gallery = gallery
        self._made: LRUCache[Hashable, bytes] = LRUCache(_CACHED, getsizeof=len)
        self._decoded: LRUCache[Hashable, Image] = LRUCache(_DECODED, getsizeof=lambda x: x.nbytes)
        self._lock = threading.Lock()
        # Decoding takes memory and a core, and a page asks for many pictures at once.
        self._room = threading.Semaphore(max(1, min(4, os.cpu_count() or 1)))

    def person(self, person: Person, tallest: int) -> bytes:
        """An enlarged person; UserError or OSError if the scene is gone or changed."""
        key = "person", person.id, tallest, _version(person.scene)
        return self._make(
            key, lambda: person_picture(self.pixels(person.scene), person.box, tallest)
        )

    def scene(self, scene: Scene, longest: int) -> bytes:
        """A complete scene of at most that length; errors as above."""
        key = "scene", scene.id, longest, _version(scene)
        return self._make(key, lambda: jpeg(self.pixels(scene), longest))

    def _make(self, key: Hashable, draw: Callable[[], bytes]) -> bytes:
        with self._room:
            with self._lock:
                made = self._made.get(key)
            if made is None:
                made = draw()
                with self._lock:
                    self._made[key] = made
        return made

    def pixels(self, scene: Scene) -> Image:
        """A scene, decoded once for all its people."""
        key = scene.id, _version(scene)
        with self._lock:
            image = self._decoded.get(key)
        if image is None:
            image = self._gallery.pixels(scene)
            if image.nbytes <= _DECODED // 4:
                with self._lock:
                    self._decoded[key] = image
        return image


def decoded(data: bytes) -> Image:
    """The pixels of a JPEG file that `jpeg` made."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image


def _version(scene: Scene) -> tuple[int, int]:
    """Changes when the file does; what is shown belongs to the file that is there."""
    try:
        about = os.stat(scene.path)
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size
