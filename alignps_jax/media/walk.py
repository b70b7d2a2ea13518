"""Finds photos and videos in folders, and reads them: pixels, time, camera."""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import av

from alignps_jax.errors import IncompleteError, UserError
from alignps_jax.media.photos import PHOTO_SUFFIXES, Image, decode_photo, exif_of
from alignps_jax.media.videos import VIDEO_SUFFIXES, frames, is_video

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


@dataclasses.dataclass
class Walk:
    """Photos and videos by absolute path; why others cannot be read; counts of other suffixes."""

    files: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # bytes, mtime_ns
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    others: Counter[str] = dataclasses.field(default_factory=Counter)

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


def media_files(sources: Iterable[str], excludes: Sequence[str] = DEFAULT_EXCLUDES) -> Walk:
    """The photos and videos of folders and all below them, or single ones, each once.

    Links are followed, in each folder last. `excludes`: patterns (*, ?) of names, or of paths from
    a source, that are left out.
    """
    walk, seen = Walk(), set[str]()
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
                    walk.others[suffix or "without a suffix"] += 1
                else:
                    found = os.stat(path.encode())  # a ValueError if the name is no text
                    if not os.path.isfile(path):
                        raise ValueError("found no regular file")
                    walk.files[path] = found.st_size, found.st_mtime_ns
            except (ValueError, OSError) as error:
                walk.skipped[path] = f"{path!r}: {getattr(error, 'strerror', error)}"
    return walk


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
    """Tasks that read a photo, or the frames of a video every so many seconds, and its end.

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
