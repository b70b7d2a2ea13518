"""Reads what is to be indexed: shots of files as scenes of the gallery."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from alignps_jax.gallery.entries import FileState, Scene, scene_id
from alignps_jax.inference.many import Photo
from alignps_jax.media.photos import read_photo
from alignps_jax.media.videos import frame_at
from alignps_jax.media.walk import MediaFile, Shot, shots
from alignps_jax.types import UserError


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
        yield from (partial(_scene, task, None) for task in shots(file, every, max_pixels))
        return
    last: Shot | None = None
    for task in shots(file, every, max_pixels):
        shot = task()
        if last is not None and (shot.error is not None or last.second not in known or shot.final):
            last = dataclasses.replace(last, final=shot.final and shot.error is None)
            yield partial(_scene, partial(dataclasses.replace, last), every)
        last = shot
    if last is not None and last.error is not None:
        yield partial(_scene, partial(dataclasses.replace, last), every)


def _scene(task: Callable[[], Shot], every: float | None) -> Photo[SceneRead]:
    shot = task()
    if shot.error is not None:
        return Photo(SceneRead(shot.file, every=every), error=shot.error)
    path, state = shot.file.path, FileState(shot.file.size, shot.file.mtime, shot.hash)
    identity = scene_id(path, shot.second)
    scene = Scene(identity, path, *shot.size, shot.taken, shot.camera, shot.second)
    return Photo(SceneRead(shot.file, scene, state, every, shot.final), shot.image)


def scene_pixels(scene: Scene, file: FileState, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """The photo or the frame of a scene, RGB, if its file is still the one that was indexed.

    Raises:
      UserError: it is not, or cannot be read.
    """
    try:
        state = os.stat(scene.path)
        if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime):
            raise UserError(
                f"{scene.path}: has changed since it was indexed; run --mode=index again"
            )
        if scene.second is None:
            return read_photo(Path(scene.path), max_pixels)
        return frame_at(scene.path, scene.second, max_pixels)
    except OSError as error:
        raise UserError(f"{scene.path}: cannot be read ({error.strerror})") from error
