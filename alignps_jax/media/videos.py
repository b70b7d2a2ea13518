"""Frames of videos, each known by its own time stamp in the container."""

import itertools
import math
from collections.abc import Iterator

import av
import numpy as np

from alignps_jax.errors import blame
from alignps_jax.media.photos import Image

VIDEO_SUFFIXES: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm")
VIDEO_SUFFIXES += (".avi", ".mts", ".m2ts", ".m2t", ".ts", ".mpg", ".mpeg", ".vob", ".mod", ".wmv")
VIDEO_SUFFIXES += (".asf", ".flv", ".f4v", ".ogv", ".mxf", ".dv")
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,mxf,dv"  # playlists read files
_EXACT = 0.0005  # seconds between time stamps that count as the same
Frames = Iterator[tuple[float, Image, dict[str, str]]]  # second, RGB, metadata of the video


def is_video(path: str) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def frames(path: str, every: float, max_pixels: int, after: float = -1, back: float = 0) -> Frames:
    """The first frames at or after each multiple of `every` seconds from the container's start.

    Only those behind `after`, the second of a known one, from a key frame on that is looked for
    `back` seconds before it, then earlier. ValueError, av.FFmpegError if it is no sound video.
    """
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream) or not stream.codec_context:
            raise ValueError("found no video stream of a known codec")
        if stream.width * stream.height > max_pixels:
            raise ValueError(f"found {stream.width}x{stream.height} pixels, most is {max_pixels:,}")
        stream.thread_type = "AUTO"
        start = (container.start_time or 0) / av.time_base
        # The time stamps of MPEG program streams are made up as they are decoded.
        jumped = after > back and container.format.name != "mpeg"
        if jumped:
            container.seek(int((after - back + start) * av.time_base))
        found = itertools.chain.from_iterable(map(_decoded, container.demux(stream)))
        # Until the first key frame, parts of what is shown were jumped over.
        shown = itertools.dropwhile(lambda frame: jumped and not frame.key_frame, found)
        timed = ((round(one.time - start, 6), one) for one in shown if one.time is not None)
        first = next(timed, (math.inf, None))
        if jumped and first[0] > after + _EXACT:
            yield from frames(path, every, max_pixels, after, 2 * back + 3)
            return
        if first[1] is None:
            raise ValueError(f"found no frame that can be decoded ({stream.codec.name})")
        for second, frame in itertools.chain([first], timed):
            if math.floor((second + _EXACT) / every) > math.floor((after + _EXACT) / every):
                turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield second, np.ascontiguousarray(turned), container.metadata
                after = second


def frame_at(path: str, second: float, max_pixels: int) -> Image:
    """The frame that `frames` gave with a second; UserError if there is none."""
    with blame(path):
        for found, image, _ in frames(path, _EXACT, max_pixels, second - 2 * _EXACT):
            if abs(found - second) < _EXACT:
                return image
        raise ValueError(f"found no frame at {second:.3f} s")


def _decoded(packet: av.Packet) -> list[av.VideoFrame]:
    try:
        return packet.decode()
    except av.InvalidDataError:  # one that is damaged is passed over
        return []
