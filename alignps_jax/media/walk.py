"""Finds photos and videos in folders, and reads them: pixels, time, camera."""

import contextlib
import dataclasses
import datetime
import fnmatch
import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import av

from alignps_jax.errors import IncompleteError, UserError
from alignps_jax.media import photos, videos

SUFFIXES = (*photos.PHOTO_SUFFIXES, *videos.VIDEO_SUFFIXES)
# What systems and programs keep beside a user's own photos; ".*" is all that is hidden.
DEFAULT_EXCLUDES: tuple[str, ...] = (".*", "@eaDir", "@Recycle", "#recycle", "#snapshot")
DEFAULT_EXCLUDES += ("$RECYCLE.BIN", "Thumbs.db", "__MACOSX", "*.photoslibrary/resources")
Origin = tuple[datetime.datetime | None, str]  # local time, camera
# Folders such as cam1 or Camera 2, and PRW's c1s1_000151.jpg.
_CAMERA = re.compile(r"/((?i:c|cam|camera)[ _-]?\d+)(?:/|s\d+_\d+)[^/]*$")
# 2024:01:31 14:25:30, IMG_20240131_142530, or a day; 1904 and 1970 are where clocks begin.
_DAY = r"(?<!\d)(?!1904|1970)(?:19|20)\d\d(\D?)\d\d\1\d\d"
_TIME = re.compile(_DAY + r"(?:\D{0,4}\d\d\D?\d\d\D?\d\d|(?!\d))")
# Where the time is looked for: in EXIF tags, metadata of videos, and names.
_CLOCKS = ("datetimeoriginal", "creationdate", "name", "folder", "datetime", "creation_time")


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A photo or video: absolute path, bytes, change in ns since 1970, path from its source."""

    path: str
    size: int
    mtime: int
    name: str

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its name."""
        return self.path.lower().endswith(videos.VIDEO_SUFFIXES)


@dataclasses.dataclass
class Walk:
    """Photos and videos; paths that cannot be read, with reasons; counts of other suffixes."""

    files: list[MediaFile] = dataclasses.field(default_factory=list)
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

    Links are followed, in each folder last. `excludes` are patterns (*, ?) of names, or of paths
    from a source, that are left out. UserError if a source is no folder, photo or video.
    """
    walk, seen = Walk(), set[str]()
    globs = (f"(?:^|/){fnmatch.translate(glob)}" for glob in excludes)
    excluded = re.compile("|".join(globs) or "(?!)")
    for source in map(os.path.abspath, sources):
        root = source if os.path.isdir(source) else os.path.dirname(source)
        if root != source and not (os.path.exists(source) and source.lower().endswith(SUFFIXES)):
            raise UserError(f"--source: found {source}, expected a folder, photo or video")
        paths = [source]
        for path in paths:  # which grow
            name, real = os.path.relpath(path, root), os.path.realpath(path)
            if real in seen or (path != source and excluded.search(f"/{name}")):
                continue
            seen.add(real)
            try:
                if os.path.isdir(path):
                    below = [os.path.join(path, child) for child in os.listdir(path)]
                    paths += sorted(below, key=lambda one: (os.path.islink(one), one))
                elif not path.lower().endswith(SUFFIXES):
                    walk.others[os.path.splitext(path)[1].lower() or "without a suffix"] += 1
                elif not os.path.isfile(path):
                    raise ValueError("found no regular file")
                else:
                    now = os.stat(path.encode())  # a ValueError if the name is no text
                    walk.files.append(MediaFile(path, now.st_size, now.st_mtime_ns, name))
            except (ValueError, OSError) as error:
                walk.skipped[path] = f"{path!r}: {getattr(error, 'strerror', error)}"
    return walk


@dataclasses.dataclass(frozen=True)
class Shot:
    """A photo or a frame of a video, RGB and upright; `error` says why there is none.

    After the frames of a video, and for a file that is known, one comes without image. `hash` is
    the SHA-256 of the file's content, `size` (height, width), `taken` local time.
    """

    file: MediaFile
    hash: str = ""
    image: photos.Image | None = None
    size: tuple[int, int] = (0, 0)
    taken: datetime.datetime | None = None
    camera: str = ""
    second: float | None = None
    final: bool = True
    error: UserError | None = None


def shots(
    file: MediaFile, every: float, max_pixels: int, known: Mapping[str, float] = {}
) -> Iterator[Callable[[], Shot]]:
    """Tasks that read a photo, or the frames of a video every so many seconds, and its end.

    A photo is decoded by the task, a frame before it. `known` has the second of the last frame that
    is known for each hash of a file, infinity where all is.
    """

    def read() -> Iterator[Shot]:
        try:
            begin = os.stat(file.path).st_mtime_ns
            with open(file.path, "rb") as content:
                photo = io.BytesIO(b"" if file.is_video else content.read())
                source = content if file.is_video else photo
                shot = Shot(file, hashlib.file_digest(source, "sha256").hexdigest())
            after = known.get(shot.hash, -1)
            if file.is_video and after < math.inf:
                for second, image, about in videos.frames(file.path, every, max_pixels, after):
                    size, moment = image.shape[:2], origin(file.path, about, second)
                    yield Shot(file, shot.hash, image, size, *moment, second, final=False)
            elif after < math.inf:
                image = photos.decode_photo(photo.getvalue(), max_pixels)
                moment = origin(file.path, photos.exif_of(photo))
                shot = Shot(file, shot.hash, image, image.shape[:2], *moment)
            if os.stat(file.path).st_mtime_ns != begin:
                raise ValueError("changes while it is read")
            yield shot
        except (ValueError, OSError, av.FFmpegError) as error:
            reason = f"{file.path}: {getattr(error, 'strerror', error)}"
            yield Shot(file, error=UserError(reason))

    if file.is_video:
        yield from (partial(dataclasses.replace, shot) for shot in read())
    else:
        yield partial(next, read())


def origin(path: str, about: Mapping[str, object], second: float = 0.0) -> Origin:
    """When and by which camera a photo, or a video's frame at a second, was taken.

    `about` holds EXIF tags or metadata: their original time, else that of the name, else a day that
    is the folder's name, else the time of a change.
    """
    said = {key.rsplit(".", 1)[-1].lower(): str(value) for key, value in about.items()}
    *_, said["folder"], said["name"] = path.split("/")
    time = next(_times(said[key] for key in _CLOCKS if key in said), None)
    # Models of most makers begin with the maker's name.
    words = re.findall("[!-~]+", f"{said.get('make', '')} {said.get('model', '')}")
    place = _CAMERA.search(path)
    camera = " ".join(dict.fromkeys(words))[:100] or (place[1] if place else "")
    return time and time + datetime.timedelta(seconds=second), camera


def _times(texts: Iterable[str]) -> Iterator[datetime.datetime]:
    for text in texts:
        for found in _TIME.finditer(text):
            with contextlib.suppress(ValueError):  # February 31
                digits = re.sub(r"\D", "", found[0]).ljust(14, "0")
                time = datetime.datetime.strptime(digits, "%Y%m%d%H%M%S")
                if text.startswith("PXL_") or text.endswith("Z"):  # of Pixel phones, videos: UTC
                    time = time.replace(tzinfo=datetime.UTC).astimezone().replace(tzinfo=None)
                yield time
