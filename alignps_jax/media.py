"""Files into pixels: photos, videos, and the folders that hold them."""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import itertools
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import PIL.Image
import pillow_heif
from jaxtyping import UInt8
from PIL.ExifTags import IFD, TAGS

from alignps_jax.errors import IncompleteError, UserError, blame

Image = UInt8[np.ndarray, "_H _W 3"]  # the sizes of several in one signature need not agree
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")  # EPS runs programs
_TURNS = [PIL.Image.Transpose(max(0, n)) for n in (-1, -1, 0, 3, 1, 5, 4, 6, 2)]  # by orientation
pillow_heif.register_heif_opener()
_formats = PIL.Image.registered_extensions().items()
PHOTO_SUFFIXES = tuple(suffix for suffix, name in _formats if name in (*_FORMATS, "MPO"))
PIL.Image.MAX_IMAGE_PIXELS = None  # `max_pixels` says it
warnings.filterwarnings("ignore", module=r"PIL\.")

VIDEO_SUFFIXES: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm")
VIDEO_SUFFIXES += (".avi", ".mts", ".m2ts", ".m2t", ".ts", ".mpg", ".mpeg", ".vob", ".mod", ".wmv")
VIDEO_SUFFIXES += (".asf", ".flv", ".f4v", ".ogv", ".mxf", ".dv")
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,mxf,dv"  # playlists read files
_EXACT = 0.0005  # seconds between time stamps that count as the same
Frames = Iterator[tuple[float, Image, dict[str, str]]]  # second, RGB, metadata of the video

# What systems and programs keep beside a user's own photos; ".*" is all that is hidden.
DEFAULT_EXCLUDES: tuple[str, ...] = (".*", "@eaDir", "@Recycle", "#recycle", "#snapshot")
DEFAULT_EXCLUDES += ("$RECYCLE.BIN", "Thumbs.db", "__MACOSX", "*.photoslibrary/resources")
# Folders such as cam1 or Camera 2, and PRW's c1s1_000151.jpg.
_CAMERA = re.compile(r"/((?i:c|cam|camera)[ _-]?\d+)(?:/|s\d+_\d+)[^/]*$")
# 2024:01:31 14:25:30, IMG_20240131_142530, or a day; 1904 and 1970 are where clocks begin.
_DAY = r"(?<!\d)(?!1904|1970)(?:19|20)\d\d(\D?)\d\d\1\d\d"
_TIME = re.compile(_DAY + r"(?:\D{0,4}\d\d\D?\d\d\D?\d\d|(?!\d))")
# Where the time is looked for in EXIF tags, metadata of videos, and the path, the best one last.
_CLOCKS = ("creation_time", "datetime", "folder", "name", "creationdate", "datetimeoriginal")


def read_photo(path: str | Path, max_pixels: int, side: int = 0, at: float | None = None) -> Image:
    """A photo, upright, or the frame of a video `at` a second that `frames` gave; UserError."""
    with blame(path):
        if at is None:
            return decode_photo(Path(path).read_bytes(), max_pixels, side=side)
        for second, image, _ in frames(str(path), _EXACT, max_pixels, at - 2 * _EXACT):
            if abs(second - at) < _EXACT:
                return image
        raise ValueError(f"found no frame at {at:.3f} s")


def decode_photo(data: bytes, max_pixels: int, upright: bool = True, side: int = 0) -> Image:
    """The pixels of a photo, RGB on white, `upright` by its EXIF orientation or as stored.

    Of an animation it is the first frame. With a `side` it may be smaller, but no side shorter: a
    JPEG in a tenth of the time. ValueError if it is no photo, damaged, or too large.
    """
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data.rpartition(b"\xff\xda")[2]:
        # A JPEG without end is complete if other bytes in place of the end change no pixel.
        rest = data.rstrip(b"\0") if data.endswith(bytes(8)) else data  # of a download that was cut
        ends = (rest.rstrip(b"\xff") + fill + b"\xff\xd9" for fill in (b"", b"\xaa" * 64))
        pixels, other = (decode_photo(one, max_pixels, upright, side) for one in ends)
        if not np.array_equal(pixels, other):
            raise ValueError(f"found a truncated JPEG ({len(data)} bytes)")
        return pixels
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"found {image.width}x{image.height} pixels, most is {max_pixels:,}")
        if side:
            image.draft("RGB", (side, side))
        is_turned = image.format == "TIFF"  # when Pillow loads it
        turn = exif_of(io.BytesIO(data))["Orientation"] if upright != is_turned else 1
        turn = {6: 8, 8: 6}.get(turn, turn) if is_turned else turn
        rgb = _rgb(image)
        return np.array(rgb.transpose(_TURNS[turn]) if turn > 1 else rgb)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # formats fail in many ways
        raise ValueError(f"cannot be decoded ({len(data)} bytes), expected a photo") from error


def exif_of(file: str | Path | IO[bytes]) -> dict[str, Any]:
    """The EXIF tags of a photo by their names; an Orientation from 1 (as stored) to 8 always."""
    image, tags = PIL.Image.open(file, formats=_FORMATS), dict[str, Any]()
    with contextlib.suppress(Exception):  # EXIF data are damaged where the photo is not
        exif = image.getexif()
        tags = {TAGS.get(tag, ""): said for tag, said in {**exif, **exif.get_ifd(IFD.Exif)}.items()}
    return tags if tags.get("Orientation") in range(1, 9) else tags | {"Orientation": 1}


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image of any format as RGB: 16 bits by their range, floats from 0 to 1 or their most."""
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
        most = 65535 if image.mode.startswith("I;16") else max(1, values.max())
        image = PIL.Image.fromarray(np.round(values * (255 / most)).astype(np.uint8))
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


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
        found = _decoded(container.demux(stream))
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


def _decoded(packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
    for packet in packets:
        with contextlib.suppress(av.InvalidDataError):  # one that is damaged is passed over
            yield from packet.decode()


class Walk:
    """The photos and videos of folders and all below them, or single ones, each once.

    Links are followed, in each folder last. `excludes`: patterns (*, ?) of names, or of paths from
    a source, that are left out. `skipped`: why others cannot be read; `others`: counts of suffixes.
    """

    def __init__(self, sources: Iterable[str], excludes: Sequence[str] = DEFAULT_EXCLUDES):
        self.files = dict[str, tuple[int, int]]()  # bytes, mtime_ns by absolute path
        self.skipped, self.others, seen = dict[str, str](), Counter[str](), set[str]()
        patterns = [start + glob for glob in excludes for start in ("", "*/")]
        for source in map(os.path.abspath, sources):
            paths = [source]
            for path in paths:  # which grow
                name, real = path.removeprefix(source), os.path.realpath(path)
                if real in seen or any(fnmatchcase(name, pattern) for pattern in patterns):
                    continue
                seen.add(real)
                suffix = os.path.splitext(path)[1].lower()
                try:
                    if os.path.isdir(path):
                        below = [os.path.join(path, child) for child in os.listdir(path)]
                        paths += sorted(below, key=lambda one: (os.path.islink(one), one))
                    elif path != source and suffix not in (*PHOTO_SUFFIXES, *VIDEO_SUFFIXES):
                        self.others[suffix or "without a suffix"] += 1
                    else:
                        found = os.stat(path.encode())  # a ValueError if the name is no text
                        if not os.path.isfile(path):
                            raise ValueError("found no regular file")
                        self.files[path] = found.st_size, found.st_mtime_ns
                except (ValueError, OSError) as error:
                    self.skipped[path] = f"{path!r}: {getattr(error, 'strerror', error)}"

    def report(self) -> None:
        """Lists what was not read; UserError if that is all, IncompleteError if it is skipped."""
        if self.others:
            counts = (f"{count:,} {suffix}" for suffix, count in self.others.most_common())
            print("not looked at:", ", ".join(counts))
        for reason in self.skipped.values():
            print("skipped", reason)
        if not self.files:
            raise UserError("--source: found no photo or video")
        if self.skipped:
            raise IncompleteError(f"files skipped: {len(self.skipped):,} (listed above)")


@dataclasses.dataclass(frozen=True)
class Shot:
    """A photo or a frame of a video, RGB and upright; `error` says why there is none.

    Without `second` it is the last one of its file, after the frames of a video and of a file that
    is known without an image. `hash` is the SHA-256 of the content, `size` (height, width).
    """

    path: str
    hash: str = ""
    image: Image | None = None
    size: tuple[int, int] = (0, 0)
    taken: datetime.datetime | None = None
    camera: str = ""
    second: float | None = None
    error: UserError | None = None


def shots(
    path: str, every: float, max_pixels: int, known: Mapping[str, float] = {}
) -> Iterator[Callable[[], Shot]]:
    """Tasks that read a photo, or a video's frames at intervals of `every` seconds, and its end.

    A photo is decoded by the task, a frame before it. `known` has the second of the last frame that
    is known for each hash of a file, infinity where all is.
    """

    def read() -> Iterator[Shot]:
        found: Iterable[tuple[float | None, Image, Mapping[str, object]]] = ()
        try:
            with open(path, "rb") as content:
                data = io.BytesIO(b"" if is_video(path) else content.read())
                source = content if is_video(path) else data
                digest = hashlib.file_digest(source, "sha256").hexdigest()
            after = known.get(digest, -1)
            if is_video(path) and after < math.inf:
                found = frames(path, every, max_pixels, after)
            elif after < math.inf:
                found = [(None, decode_photo(data.getvalue(), max_pixels), exif_of(data))]
            for second, image, about in found:
                taken, camera = origin(path, about)
                taken = taken and taken + datetime.timedelta(seconds=second or 0)
                yield Shot(path, digest, image, image.shape[:2], taken, camera, second)
            yield Shot(path, digest)
        except (ValueError, OSError, av.FFmpegError) as error:
            yield Shot(path, error=UserError(f"{path}: {getattr(error, 'strerror', error)}"))

    if is_video(path):
        yield from (lambda shot=shot: shot for shot in read())
    else:
        yield read().__next__


def origin(path: str, about: Mapping[str, object]) -> tuple[datetime.datetime | None, str]:
    """Local time and camera of a photo or a video's begin; `about` has EXIF tags or metadata."""
    said = {key.rsplit(".", 1)[-1].lower(): str(value) for key, value in about.items()}
    *_, said["folder"], said["name"] = path.split("/")
    taken = None
    for text in (said.get(key, "") for key in _CLOCKS):
        if found := _TIME.search(text):
            digits = re.sub(r"\D", "", found[0]).ljust(14, "0")
            with contextlib.suppress(ValueError):  # February 31
                taken = datetime.datetime.strptime(digits, "%Y%m%d%H%M%S")
                if text.startswith("PXL_") or text.endswith("Z"):  # of Pixel phones, videos: UTC
                    taken = taken.replace(tzinfo=datetime.UTC).astimezone().replace(tzinfo=None)
    # Models of most makers begin with the maker's name.
    words = re.findall("[!-~]+", f"{said.get('make', '')} {said.get('model', '')}")
    return taken, " ".join(dict.fromkeys(words or _CAMERA.findall(path)))[:100]
