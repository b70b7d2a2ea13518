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
from typing import Any

from PIL.ExifTags import IFD, Base

from alignps_jax.errors import IncompleteError, UserError, blame
from alignps_jax.media import photos, videos

SUFFIXES = (*photos.PHOTO_SUFFIXES, *videos.VIDEO_SUFFIXES)
# What systems and programs keep beside a user's own photos; ".*" is all that is hidden.
DEFAULT_EXCLUDES: tuple[str, ...] = (".*", "@eaDir", "@Recycle", "#recycle", "#snapshot")
DEFAULT_EXCLUDES += ("$RECYCLE.BIN", "Thumbs.db", "__MACOSX", "*.photoslibrary/resources")

# Folders such as cam1 or Camera 2, and PRW's c1s1_000151.jpg.
_CAMERA = re.compile(r"/((?i:c|cam|camera)[ _-]?\d+)/[^/]*$|/(c\d+)s\d+_\d+[^/]*$")
# IMG_20240131_142530.jpg, 2024-01-31 14.25.30.jpg, and folders such as 2024-01-31.
_DAY = r"(?<!\d)((?:19|20)\d\d)([-_.]?)(\d\d)\2(\d\d)"
_TIME = re.compile(_DAY + r"(?:(?:[-_ T.]|at)+(\d\d)[-_.:hH]?(\d\d)[-_.:mM]?(\d\d)|(?!\d))")

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
            reasons = (str(UserError(why)).replace("\n", "\\n") for why in self.skipped.values())
            print("skipped:", *reasons, sep="\n  ")
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

    def is_new(state: os.stat_result) -> bool:
        place, count = (state.st_dev, state.st_ino), len(seen)
        seen.add(place)
        return len(seen) > count or not state.st_ino  # which some file systems lack

    for source in map(os.path.abspath, sources):
        root = source if os.path.isdir(source) else os.path.dirname(source)
        if root != source and not (os.path.exists(source) and source.lower().endswith(SUFFIXES)):
            raise UserError(f"--source: found {source}, expected a folder, photo or video")
        for path in _below(root, excludes, is_new, walk) if root == source else [source]:
            if not path.lower().endswith(SUFFIXES):
                walk.others[os.path.splitext(path)[1].lower() or "without a suffix"] += 1
                continue
            try:
                with blame(path):
                    if os.fsencode(path) != path.encode(errors="replace"):
                        raise ValueError("found a name that is no text, expected UTF-8")
                    state = photos.regular(path)
            except (UserError, OSError) as error:
                walk.skipped[path] = str(error)
                continue
            if is_new(state):
                name = os.path.relpath(path, root)
                walk.files.append(MediaFile(path, state.st_size, state.st_mtime_ns, name))
    return walk


def _below(
    root: str, excludes: Sequence[str], is_new: Callable[[os.stat_result], bool], walk: Walk
) -> Iterator[str]:
    """The paths of all files: in each folder links last, and folders behind links at the end."""

    def kept(path: str) -> bool:
        inside = path[len(root) :]
        forms = os.path.basename(path), inside, inside[1:], f"{inside}/"
        return not any(fnmatch.fnmatch(form, glob) for glob in excludes for form in forms)

    def skip(error: OSError) -> None:
        walk.skipped[error.filename] = str(error)

    folders = [root]
    for folder in folders:
        for here, below, names in os.walk(folder, onerror=skip):
            join = partial(os.path.join, here)
            below[:] = sorted(filter(lambda name: kept(join(name)), below))
            if not is_new(os.stat(here)):
                below.clear()
                continue
            folders += filter(os.path.islink, map(join, below))
            yield from sorted(filter(kept, map(join, sorted(names))), key=os.path.islink)


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
            file = _as_it_is(file)
            with open(file.path, "rb") as content:
                shot = Shot(file, hashlib.file_digest(content, "sha256").hexdigest())
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
                taken, camera = _origin_of_photo(file.path, data, max_pixels)
                shot = Shot(file, shot.hash, image, image.shape[:2], taken, camera)
            if _as_it_is(file) != file:
                raise ValueError("changes while it is read")
        yield shot
    except (UserError, OSError) as error:
        yield Shot(file, shot.hash, error=UserError(str(error)))


def _as_it_is(file: MediaFile) -> MediaFile:
    state = photos.regular(file.path)
    return dataclasses.replace(file, size=state.st_size, mtime=state.st_mtime_ns)


def _origin_of_photo(path: str, data: bytes, max_pixels: int) -> Origin:
    try:
        exif = photos.opened(data, max_pixels).getexif()
        original, changed = (
            exif.get_ifd(IFD.Exif).get(Base.DateTimeOriginal),
            exif.get(Base.DateTime),
        )
        return origin(path, original, changed, exif.get(Base.Make), exif.get(Base.Model))
    except Exception:  # EXIF data may be damaged in any way where the photo is not
        return origin(path)


def _origin_of_video(path: str) -> Origin:
    with videos.opened(path) as (container, _):
        about = {key.rsplit(".", 1)[-1]: text for key, text in container.metadata.items()}
    original = str(about.get("creationdate"))[:19]  # Apple's, in local time; its zone follows
    return origin(path, original, about.get("creation_time"), about.get("make"), about.get("model"))


def origin(
    path: str, original: Any = None, changed: Any = None, make: Any = None, model: Any = None
) -> Origin:
    """When and by which camera a photo was taken or a video begun; None and "" if unknown.

    The original time of the metadata comes first, then that of the name or the day of the folder
    (PXL_... of Pixel phones is UTC), then the time of a change.
    """
    folder, name = path.split("/")[-2:]
    named, zone = _TIME.search(name) or _TIME.search(folder), "Z" * name.startswith("PXL_")
    parts = [part or "00" for part in named.group(1, 3, 4, 5, 6, 7)] if named else [""] * 6
    taken = _time(original) or _time("{}-{}-{} {}:{}:{}".format(*parts) + zone) or _time(changed)
    make, model = ("".join(filter(str.isprintable, str(t or ""))).strip() for t in (make, model))
    # "NIKON CORPORATION", "NIKON D90": models of most makers begin with their name.
    known = make and model.lower().startswith(make.split()[0].lower())
    camera, place = (model if known else f"{make} {model}".strip())[:100], _CAMERA.search(path)
    return taken, camera or (place[1] or place[2] if place else "")


def _time(text: object) -> datetime.datetime | None:
    """The local time of "2024:01:31 14:25:30", as EXIF has it, or "2024-01-31T19:25:30Z"."""
    text = str(text).strip(" \0")
    try:
        time = datetime.datetime.fromisoformat(text[:10].replace(":", "-") + text[10:])
    except ValueError:
        return None
    if text.startswith(("1904-01-01", "1970-01-01")):  # with which clocks begin
        return None
    return time.astimezone().replace(tzinfo=None) if time.tzinfo else time
