"""Frames of videos, each known by its own time stamp in the container."""

import contextlib
import math
from collections.abc import Iterator

import av
import numpy as np
from av.stream import Disposition

from alignps_jax.errors import blame
from alignps_jax.media.photos import Image, check_size, regular

VIDEO_SUFFIXES: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm")
VIDEO_SUFFIXES += (".avi", ".mts", ".m2ts", ".m2t", ".ts", ".mpg", ".mpeg", ".vob", ".mod", ".wmv")
VIDEO_SUFFIXES += (".asf", ".flv", ".f4v", ".ogv", ".mxf", ".dv")
# No playlists, which read other files.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,mxf,dv"
_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
_EXACT = 0.0005  # seconds between time stamps that count as the same
# Seconds before a frame at which to begin to decode, until a key frame comes before it.
_BEFORE = (0.0, 3.0, 20.0, math.inf)


def frames(
    path: str, every: float, max_pixels: int, after: float | None = None
) -> Iterator[tuple[float, Image]]:
    """(second, pixels) of the first frame at or after each multiple of `every` seconds.

    The second counts from the start of the container; `after` that of a frame that is known, only
    those behind it are given. ValueError if it is no video, too large, or damaged from here on.
    """
    due = -math.inf if after is None else _next(after, every)
    for second, frame in _from_key_frame(path, max_pixels, after):
        if second >= due - _EXACT:
            yield second, _upright(frame, max_pixels)
            due = _next(second, every)


def frame_at(path: str, second: float, max_pixels: int) -> Image:
    """The frame that `frames` gave with a second; UserError if there is none."""
    with blame(path):
        for found, frame in _from_key_frame(path, max_pixels, second):
            if abs(found - second) < _EXACT:
                return _upright(frame, max_pixels)
            if found > second:
                break
        raise ValueError(f"found no frame at {second:.3f} s")


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A video and its first stream that is no cover; ValueError if it cannot be decoded."""
    regular(path)
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & _PICTURES]
            if not streams or not streams[0].codec_context:
                raise ValueError("found no video stream of a known codec")
            yield container, streams[0]
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # of a disk
            raise
        raise ValueError(f"cannot be decoded ({error.strerror}), expected a video") from error


def _next(second: float, every: float) -> float:
    return (math.floor((second + _EXACT) / every) + 1) * every


def _from_key_frame(
    path: str, max_pixels: int, second: float | None
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(second, frame) to the end of a video, from a key frame at or before `second` on."""
    for begin in [second - before for before in _BEFORE] if second else [-math.inf]:
        with opened(path) as (container, stream):
            check_size(stream.width, stream.height, max_pixels)
            decoded = _decoded(container, stream, begin)
            first = next(decoded, (math.inf, None))
            if first[0] <= (second or 0) + _EXACT or begin == -math.inf:
                if first[1] is None:
                    raise ValueError(f"found no frame that can be decoded ({stream.codec.name})")
                yield first
                yield from decoded
                return


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, begin: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(second, frame), from about `begin` on; damaged packets are passed over."""
    stream.thread_type = "AUTO"
    start = (container.start_time or 0) / av.time_base
    # The time stamps of MPEG program streams are made up as they are decoded.
    if jumped := begin > 0 and container.format.name != "mpeg":
        with contextlib.suppress(av.FFmpegError):  # then all is decoded
            container.seek(int((begin + start) * av.time_base))
    for packet in container.demux(stream):
        with contextlib.suppress(av.InvalidDataError):
            for frame in packet.decode():
                # Until the first key frame, parts of what is shown were jumped over.
                jumped = jumped and not frame.key_frame
                if frame.time is not None and not jumped:
                    yield round(frame.time - start, 6), frame


def _upright(frame: av.VideoFrame, max_pixels: int) -> Image:
    check_size(frame.width, frame.height, max_pixels)
    turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return np.ascontiguousarray(turned)
