"""Finds photos and videos in folders, and reads them: pixels, time, camera."""

import collections
import dataclasses
import datetime
import fnmatch
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

from PIL.ExifTags import IFD, Base

from alignps_jax.errors import IncompleteError, UserError, blame
from alignps_jax.media import photos, videos

SUFFIXES = (*photos.PHOTO_SUFFIXES, *videos.VIDEO_SUFFIXES)
# What systems and programs keep beside a user's own photos; ".*" is all that is hidden.
DEFAULT_EXCLUDES: tuple[str, ...] = (".*", "@eaDir", "@Recycle", "#recycle", "#snapshot")
DEFAULT_EXCLUDES += ("$RECYCLE.BIN", "Thumbs.db", "__MACOSX", "*.photoslibrary/resources")

# PRW's c1s1_000151.jpg, and folders such as cam1 or Camera 2.
_PRW, _CAMERA_FOLDER = re.compile(r"(c\d+)s\d+_\d+"), re.compile(r"(?i:c|cam|camera)[ _-]?\d+")
# IMG_20240131_142530.jpg, 2024-01-31 14.25.30.jpg, and folders such as 2024-01-31.
_DAY = r"(?<!\d)((?:19|20)\d\d)([-_.]?)(\d\d)\2(\d\d)"
_TIME = re.compile(_DAY + r"(?:[-_ T.]|at)+(\d\d)[-_.:hH]?(\d\d)[-_.:mM]?(\d\d)")
_DATE = re.compile(_DAY + r"(?!\d)()()()")

Origin = tuple[datetime.datetime | None, str]  # local time, camera


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A photo or video: absolute path, bytes, change in ns since 1970, path from its source.

    Links are not resolved.
    """

    path: str
    size: int
    mtime: int
    name: str = ""

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its name."""
        return self.path.lower().endswith(videos.VIDEO_SUFFIXES)


@dataclasses.dataclass
class Walk:
    """Photos and videos; paths that cannot be read, with reasons; counts of other suffixes."""

    files: list[MediaFile] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    others: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def report(self) -> None:
        """Lists what was not read; UserError if that is all, IncompleteError if it is skipped."""
        if self.others:
            counts = (f"{count:,} {suffix}" for suffix, count in self.others.most_common())
            print("not looked at:", ", ".join(counts))
        if self.skipped:
            print("skipped:", *map(UserError, self.skipped.values()), sep="\n  ")
        if not self.files:
            raise UserError("--source: found no photo or video")
        if self.skipped:
            raise IncompleteError(f"--source: skipped {len(self.skipped):,} files (listed above)")


def media_files(sources: Iterable[str], excludes: Sequence[str] = DEFAULT_EXCLUDES) -> Walk:
    """The photos and videos of folders and all below them, or single ones, each once.

    Links are followed; a file has its own name rather than that of a link to it. `excludes` are
    patterns (*, ?) of names, or of paths from a source, that are left out. UserError if a source
    does not exist or is a file of another type.
    """
    walk, seen = Walk(), set[tuple[int, int]]()
    for source in map(os.path.abspath, sources):
        if os.path.isdir(source):
            for path in _below(source, excludes, seen, walk.skipped):
                _add(walk, path, os.path.relpath(path, source), seen)
        elif os.path.exists(source) and source.lower().endswith(SUFFIXES):
            _add(walk, source, os.path.basename(source), seen)
        else:
            raise UserError(f"--source: found {source}, expected a folder, photo or video")
    return walk


def _below(
    source: str, excludes: Sequence[str], seen: set[tuple[int, int]], skipped: dict[str, str]
) -> Iterator[str]:
    """The paths of all files: in each folder links last, and folders behind links at the end."""

    def kept(path: str) -> bool:
        inside = path[len(source) :]
        forms = os.path.basename(path), inside, inside[1:], f"{inside}/"
        return not any(fnmatch.fnmatch(form, glob) for glob in excludes for form in forms)

    def cannot_list(error: OSError) -> None:
        skipped[error.filename] = str(error)

    folders = [source]
    for folder in folders:
        for here, below, names in os.walk(folder, onerror=cannot_list):
            if not _is_new(os.stat(here), seen):
                below.clear()
                continue
            join = partial(os.path.join, here)
            below[:] = sorted(name for name in below if kept(join(name)))
            folders += filter(os.path.islink, map(join, below))
            yield from sorted(filter(kept, map(join, sorted(names))), key=os.path.islink)


def _add(walk: Walk, path: str, name: str, seen: set[tuple[int, int]]) -> None:
    if not path.lower().endswith(SUFFIXES):
        walk.others[os.path.splitext(path)[1].lower() or "without a suffix"] += 1
        return
    try:
        with blame(path):
            if os.fsencode(name) != name.encode(errors="replace"):
                raise ValueError("found a name that is no text, expected UTF-8")
            state = photos.regular(path)
    except (UserError, OSError) as error:
        walk.skipped[path] = str(error)
    else:
        if _is_new(state, seen):
            walk.files.append(MediaFile(path, state.st_size, state.st_mtime_ns, name))


def _is_new(state: os.stat_result, seen: set[tuple[int, int]]) -> bool:
    place, count = (state.st_dev, state.st_ino), len(seen)
    seen.add(place)
    return len(seen) > count


@dataclasses.dataclass(frozen=True)
class Shot:
    """A photo or a frame of a video, RGB and upright; `error` says why there is none.

    The last one of a video has no image, nor has one that is known. `file` is as it was when it
    was read, `hash` the SHA-256 of its content, `size` (height, width), `taken` local time.
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
    file: MediaFile,
    every: float,
    max_pixels: int,
    known: Callable[[str], float | None] = lambda _: None,
) -> Iterator[Callable[[], Shot]]:
    """Tasks that read a photo, or the frames of a video every so many seconds, and its end.

    A photo is decoded by the task, a frame before it. `known` gives for a file's hash the second of
    the last frame that is known, infinity if all of the file is, None if nothing is.
    """
    read = _read(file, every, max_pixels, known)
    if file.is_video:
        yield from (partial(dataclasses.replace, shot) for shot in read)
    else:
        yield partial(next, read)


def _read(
    file: MediaFile, every: float, max_pixels: int, known: Callable[[str], float | None]
) -> Iterator[Shot]:
    shot = Shot(file)
    try:
        with blame(file.path):
            shot = Shot(file := _as_it_is(file), _hash(file.path))
            after = known(shot.hash)
            if file.is_video and after != math.inf:
                began, camera = _origin_of_video(file.path)
                for second, image in videos.frames(file.path, every, max_pixels, after):
                    taken = began and began + datetime.timedelta(seconds=second)
                    size = image.shape[:2]
                    yield Shot(file, shot.hash, image, size, taken, camera, second, final=False)
            elif after is None:
                data = photos.photo_bytes(file.path, max_pixels)
                image = photos.decode_photo(data, max_pixels)
                origin = _origin_of_photo(file.path, data, max_pixels)
                shot = Shot(file, shot.hash, image, image.shape[:2], *origin)
            if _as_it_is(file) != file:
                raise ValueError("changes while it is read")
        yield shot
    except (UserError, OSError) as error:
        yield Shot(file, shot.hash, error=UserError(str(error)))


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_it_is(file: MediaFile) -> MediaFile:
    state = photos.regular(file.path)
    return dataclasses.replace(file, size=state.st_size, mtime=state.st_mtime_ns)


def _origin_of_photo(path: str, data: bytes, max_pixels: int) -> Origin:
    try:
        exif = photos.opened(data, max_pixels).getexif()
        times = exif.get_ifd(IFD.Exif).get(Base.DateTimeOriginal), exif.get(Base.DateTime)
        return origin(path, *times, exif.get(Base.Make), exif.get(Base.Model))
    except Exception:  # EXIF data may be damaged in any way where the photo is not
        return origin(path)


def _origin_of_video(path: str) -> Origin:
    with videos.opened(path) as (container, _):
        about = {key.rsplit(".", 1)[-1]: text for key, text in container.metadata.items()}
    began = str(about.get("creationdate"))[:19]  # Apple's, local; its zone follows
    return origin(path, began, about.get("creation_time"), about.get("make"), about.get("model"))


def origin(
    path: str, original: Any = "", changed: Any = "", make: Any = "", model: Any = ""
) -> Origin:
    """When and by which camera a photo was taken or a video begun; None and "" if unknown.

    The original time of its metadata comes first, then that in its name, then that of a change.
    """
    make, model = (
        "".join(filter(str.isprintable, str(text or ""))).strip() for text in (make, model)
    )
    # "NIKON CORPORATION", "NIKON D90": models of most makers begin with their name.
    known = make and model.lower().startswith(make.split()[0].lower())
    camera = (model if known else f"{make} {model}".strip())[:100]
    return _time(original) or _named_time(path) or _time(changed), camera or _named_camera(path)


def _time(text: object) -> datetime.datetime | None:
    """Of "2024:01:31 14:25:30", as EXIF has it, or "2024-01-31T14:25:30Z"."""
    text = str(text).strip(" \0")
    try:
        time = datetime.datetime.fromisoformat(text[:10].replace(":", "-") + text[10:])
    except ValueError:
        return None
    return (
        _local(time) if (time.month, time.day) != (1, 1) or time.year not in (1904, 1970) else None
    )


def _local(time: datetime.datetime) -> datetime.datetime:
    return time.astimezone().replace(tzinfo=None) if time.tzinfo else time


def _named_time(path: str) -> datetime.datetime | None:
    """The time or day in a name, or the day of the folder; PXL_... (Pixel phones) is UTC."""
    folder, name = PurePath(path).parts[-2:]
    found = _TIME.search(name) or _DATE.search(name) or _DATE.search(folder)
    if not found:
        return None
    parts = (part or "00" for part in found.group(1, 3, 4, 5, 6, 7))
    return _time("{}-{}-{} {}:{}:{}".format(*parts) + "Z" * name.startswith("PXL_"))


def _named_camera(path: str) -> str:
    folder, name = PurePath(path).parts[-2:]
    prw = _PRW.match(name)
    return folder if _CAMERA_FOLDER.fullmatch(folder) else prw[1] if prw else ""
