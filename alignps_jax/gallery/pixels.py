"""Photos and frames of videos as pixels."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from alignps_jax.files import read_image
from alignps_jax.gallery.entries import FileState, Scene
from alignps_jax.types import UserError

# What is wrong with a video is said in our own words, once.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def scene_pixels(scene: Scene, file: FileState, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """The photo or the frame of a scene, RGB, if its file is still the one that was indexed.

    Raises:
      UserError: it is not, or cannot be read.
    """
    try:
        state = os.stat(scene.path)
    except OSError as error:
        raise UserError(f"{scene.path}: cannot be read ({error.strerror})") from error
    if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime):
        raise UserError(f"{scene.path}: has changed since it was indexed; run --mode=index again")
    if scene.second is None:
        return read_image(Path(scene.path), max_pixels)
    with open_video(scene.path, max_pixels) as video:
        frame = video.frame_at(scene.second)
    if frame is None:
        raise UserError(f"{scene.path}: has no frame at {scene.second:.2f} s that can be decoded")
    return frame


class Video:
    """An open video.

    Attributes:
      rate: frames per second.
      count: how many frames there should be; 0 where that is unknown.
    """

    def __init__(self, capture: cv2.VideoCapture, rate: float):
        self._capture = capture
        self.rate = rate
        self.count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.position = 0

    def skip(self) -> bool:
        """Goes on by a frame; False at the end."""
        found = bool(self._capture.grab())
        self.position += found
        return found

    def decoded(self) -> UInt8[np.ndarray, "H W 3"] | None:
        """The frame that was gone to, RGB; None if it is damaged."""
        found, frame = self._capture.retrieve()
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) if found and frame is not None else None

    def frame_at(self, second: float) -> UInt8[np.ndarray, "H W 3"] | None:
        """The frame at a second, if there is one."""
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, round(second * self.rate))
        return self.decoded() if self.skip() else None


@contextlib.contextmanager
def open_video(path: str, max_pixels: int) -> Iterator[Video]:
    """Opens a video.

    Raises:
      UserError: it is none that can be decoded, or too large.
    """
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    try:
        if not capture.isOpened():
            raise UserError(f"{path}: cannot be decoded; expected a video (MP4, AVI, MOV, MKV)")
        rate = capture.get(cv2.CAP_PROP_FPS)
        width, height = (
            int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        if not (math.isfinite(rate) and 0 < rate <= 10_000):
            raise UserError(f"{path}: has {rate} frames per second; expected a number above 0")
        if width * height > max_pixels:
            raise UserError(
                f"{path}: has {width}x{height} pixels; expected at most {max_pixels:,} in all "
                "(data.max_pixels)"
            )
        yield Video(capture, rate)
    finally:
        capture.release()
