"""Reads what is to be indexed: photos in threads, videos frame by frame."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from alignps_jax.gallery.entries import FileState, Scene, scene_id
from alignps_jax.gallery.pixels import Video, open_video
from alignps_jax.gallery.sources import MediaFile, Origin, origin
from alignps_jax.image_files import decode_photo, read_photo
from alignps_jax.inference.many import Photo
from alignps_jax.types import UserError

# How often a file that changes meanwhile is read again.
_TRIES = 3
# Missing at the end of a video, where the number of frames is an estimate.
_MISSING_FRAMES, _MISSING_SHARE = 2, 0.02


@dataclasses.dataclass(frozen=True)
class SceneRead:
    """What was read of a file.

    Attributes:
      file: as it was found.
      scene: None where it could not be read.
      state: of the file, when it was read.
      every: seconds between frames; None for photos.
      final: whether nothing follows of this file.
    """

    file: MediaFile
    scene: Scene | None = None
    state: FileState | None = None
    every: float | None = None
    final: bool = True


# Reads a photo or frame.
Task = Callable[[], Photo[SceneRead]]


def read_scene(file: MediaFile, max_pixels: int) -> Photo[SceneRead]:
    """A photo, or why it cannot be read."""
    try:
        state, scene, image = _read_unchanged(file.path, max_pixels)
    except UserError as error:
        return Photo(SceneRead(file), error=error)
    return Photo(SceneRead(file, scene, state), image)


def _read_unchanged(
    path: str, max_pixels: int
) -> tuple[FileState, Scene, UInt8[np.ndarray, "H W 3"]]:
    for _ in range(_TRIES):
        before = _state(path)
        data, header = read_photo(Path(path), max_pixels)
        if _state(path) == before:
            image = decode_photo(data, header, path, upright=True)
            file = FileState(*before, hashlib.sha256(data).hexdigest())
            return file, _scene(path, image, origin(path, data)), image
    raise UserError(f"{path}: changes while it is read; expected a photo that stays as it is")


def _state(path: str) -> tuple[int, int]:
    try:
        state = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return state.st_size, state.st_mtime_ns


def _scene(
    path: str, image: UInt8[np.ndarray, "H W 3"], known: Origin, second: float | None = None
) -> Scene:
    height, width = image.shape[:2]
    taken = known.taken
    if taken is not None and second is not None:
        taken += datetime.timedelta(seconds=second)
    return Scene(scene_id(path, second), path, height, width, taken, known.camera, second)


def file_tasks(
    file: MediaFile, every: float, max_pixels: int, known: Collection[float] = ()
) -> Iterator[Task]:
    """A photo, or the frames of a video at an interval in seconds, or why it cannot be read.

    Args:
      file: the photo or video.
      every: seconds between frames.
      max_pixels: of a photo or frame.
      known: seconds of frames to leave out.
    """
    if not file.is_video:
        yield partial(read_scene, file, max_pixels)
        return
    last: SceneRead | None = None
    image = None
    try:
        before = _state(file.path)
        state = FileState(*before, _file_hash(file.path))
        with open_video(file.path, max_pixels) as video:
            about = origin(file.path)
            for second, frame in _frames(file.path, video, every, known):
                if last is not None:
                    yield _given(last, image)
                scene = _scene(file.path, frame, about, second)
                last, image = SceneRead(file, scene, state, every, final=False), frame
            _check_end(file.path, video)
        if _state(file.path) != before:
            raise UserError(f"{file.path}: changes while it is read; index it again later")
    except UserError as error:
        if last is not None:
            yield _given(last, image)
        yield partial(Photo, SceneRead(file, every=every), error=error)
        return
    if last is not None:
        yield _given(dataclasses.replace(last, final=True), image)


def _given(read: SceneRead, image: UInt8[np.ndarray, "H W 3"] | None) -> Task:
    return partial(Photo, read, image)


def _frames(
    path: str, video: Video, every: float, known: Collection[float]
) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """(second, pixels) of every frame that is wanted; the last one of those even if it is known."""
    pending: tuple[float, UInt8[np.ndarray, "H W 3"]] | None = None
    turn = 0
    while video.skip():
        if video.position - 1 < round(turn * every * video.rate):
            continue
        turn += 1
        second = (video.position - 1) / video.rate
        frame = video.decoded()
        if frame is None:
            raise UserError(f"{path}: cannot be decoded at {second:.2f} s")
        if pending is not None and pending[0] not in known:
            yield pending
        pending = second, frame
    if pending is not None:
        yield pending


def _check_end(path: str, video: Video) -> None:
    missing = video.count - video.position
    if video.position == 0 or missing > max(_MISSING_FRAMES, _MISSING_SHARE * video.count):
        raise UserError(
            f"{path}: ends after {video.position} frames; expected {max(1, video.count)}"
        )


def _file_hash(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
