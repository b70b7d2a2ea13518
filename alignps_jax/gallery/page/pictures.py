"""Pictures for the browser: people enlarged, and complete scenes, made once and kept in memory.

In memory alone, so that nobody who is removed from a gallery remains in a folder of pictures.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float

from alignps_jax.gallery.entries import Person, Scene
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.media.photos import Image

PREVIEW = 1600  # longer side of a complete scene, pixels
SMALL = 320  # longer side of a scene in a list, pixels
PERSON = 288  # height of an enlarged person, pixels
_CACHED = 96 << 20  # bytes of finished pictures
_DECODED = 128 << 20  # bytes of decoded scenes: the people of one scene follow one another
_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 85]


def jpeg(image: Image, longest: int) -> bytes:
    """A JPEG file of the picture, whose longer side has at most so many pixels.

    It holds nothing but pixels: other data of the photo's file, such as where it was taken, are
    left out.
    """
    height, width = image.shape[:2]
    factor = longest / max(height, width)
    if factor < 1:
        size = max(1, round(width * factor)), max(1, round(height * factor))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), _QUALITY)[1].tobytes()


def person_picture(image: Image, box: Float[np.ndarray, "4"]) -> bytes:
    """A JPEG file of a person, enlarged, with a little around the box.

    It is two thirds as wide as high, unless the box is wider or the photo narrower.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in box)
    tall = max(y2 - y1, 1.0) * 1.1
    wide = max((x2 - x1) * 1.1, tall * 2 / 3)
    left, right = _within((x1 + x2) / 2, wide, width)
    top, bottom = _within((y1 + y2) / 2, tall, height)
    part = image[top:bottom, left:right]
    factor = PERSON / max(part.shape[:2])
    size = max(1, round(part.shape[1] * factor)), max(1, round(part.shape[0] * factor))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    part = cv2.resize(part, size, interpolation=how)
    return cv2.imencode(".jpg", cv2.cvtColor(part, cv2.COLOR_RGB2BGR), _QUALITY)[1].tobytes()


def _within(middle: float, length: float, limit: int) -> tuple[int, int]:
    """Begin and end of so many pixels around a place, moved into the photo as far as they fit."""
    size = int(np.clip(round(length), 1, limit))
    begin = int(np.clip(round(middle - length / 2), 0, limit - size))
    return begin, begin + size


class Kept:
    """The things asked for last, up to so many bytes in all."""

    def __init__(self, limit: int):
        self._limit = limit
        self._bytes = 0
        self._items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: Hashable, item: Any, size: int) -> None:
        with self._lock:
            self._bytes += size - self._items.pop(key, (None, 0))[1]
            self._items[key] = item, size
            while self._bytes > self._limit and len(self._items) > 1:
                self._bytes -= self._items.popitem(last=False)[1][1]


class Pictures:
    """The pictures of a gallery: JPEG files, each made once.

    Args:
      gallery: whose scenes are shown.
    """

    def __init__(self, gallery: Gallery):
        self._gallery = gallery
        self._made, self._decoded = Kept(_CACHED), Kept(_DECODED)
        # Decoding takes memory and a core, and a page asks for many pictures at once.
        self._room = threading.Semaphore(max(1, min(4, os.cpu_count() or 1)))

    def person(self, person: Person) -> bytes:
        """An enlarged person; UserError if the scene is gone or changed."""
        key = "person", person.id, person.box.tobytes(), _version(person.scene)
        return self._make(key, person.scene, lambda image: person_picture(image, person.box))

    def scene(self, scene: Scene, longest: int) -> bytes:
        """A complete scene of at most that length; UserError if it is gone or changed."""
        key = "scene", scene.id, longest, _version(scene)
        return self._make(key, scene, lambda image: jpeg(image, longest))

    def _make(self, key: Hashable, scene: Scene, draw: Callable[[Image], bytes]) -> bytes:
        made = self._made.get(key)
        if made is not None:
            return made
        with self._room:
            made = self._made.get(key)
            if made is None:
                made = draw(self._pixels(scene))
                self._made.put(key, made, len(made))
        return made

    def _pixels(self, scene: Scene) -> Image:
        key = scene.id, _version(scene)
        image = self._decoded.get(key)
        if image is None:
            image = self._gallery.pixels(scene)
            if image.nbytes <= _DECODED // 4:
                self._decoded.put(key, image, image.nbytes)
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
