"""The photos and videos of a folder, and what is known of one without looking at its pixels."""

from __future__ import annotations

import dataclasses
import datetime
import io
import os
import re
from collections.abc import Iterator
from pathlib import PurePath

import PIL.Image

from alignps_jax.gallery.photos import PHOTO_SUFFIXES
from alignps_jax.types import IncompleteError, UserError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv")

# Where EXIF (2.3, section 4.6) keeps what.
_MAKE, _MODEL, _CHANGED, _EXIF, _TAKEN = 0x010F, 0x0110, 0x0132, 0x8769, 0x9003
_ORIENTATION = 0x0112

# PRW's c1s1_000151.jpg, and folders such as cam1 or Camera 2.
_PRW = re.compile(r"(c\d+)s\d+_\d+")
_CAMERA_FOLDER = re.compile(r"(?:c|cam|camera)[ _-]?\d+", re.IGNORECASE)
# IMG_20240131_142530.jpg, 2024-01-31 14.25.30.jpg, and folders such as 2024-01-31.
_DAY = r"(?<!\d)((?:19|20)\d\d)([-_.]?)(\d\d)\2(\d\d)"
_TIME = re.compile(_DAY + r"(?:[-_ T.]|at)+(\d\d)[-_.:hH]?(\d\d)[-_.:mM]?(\d\d)")
_DATE = re.compile(_DAY + r"(?!\d)")


_EVERY = re.compile(r"(\d+\.?\d*|\.\d+)(ms|s|min)?")
_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, None: 1.0}


def parse_every(text: str) -> float:
    """The seconds of "1s", "500ms" or "2min"; UserError if it is none of them."""
    found = _EVERY.fullmatch(text)
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0.001 <= seconds < 1e6:
        raise UserError(f"--every: found {text!r}, expected a time such as 1s, 500ms or 2min")
    return seconds


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A photo or video: absolute path without symbolic links, bytes, change in ns since 1970.

    `name` is the path from the source where it was found, links included.
    """

    path: str
    size: int
    mtime: int
    name: str = ""

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its name."""
        return self.path.lower().endswith(VIDEO_SUFFIXES)


def media_files(source: str, skipped: dict[str, str]) -> Iterator[MediaFile]:
    """The photos and videos of a folder and all below it, each once, or one file.

    Links are followed, those that lead in circles once only.

    Args:
      source: the folder, or a photo or video.
      skipped: gets what cannot be read, with the reason.

    Raises:
      UserError: the source does not exist or is neither.
    """
    if not os.path.exists(source):
        raise UserError(f"--source: found no {source}, expected a folder, photo or video")
    if not os.path.isdir(source) and not _is_media(source):
        raise UserError(
            f"--source: found {source}, expected a folder, or a file "
            f"({', '.join(PHOTO_SUFFIXES + VIDEO_SUFFIXES)})"
        )
    seen: set[str] = set()
    one = os.path.realpath(source), os.path.basename(source)
    for path, name in _below(source, skipped) if os.path.isdir(source) else [one]:
        if path in seen:
            continue
        seen.add(path)
        try:
            path.encode()
            state = os.stat(path)
        except UnicodeEncodeError:
            skipped[path] = f"{path}: has a name that is no text; expected UTF-8, so rename it"
        except OSError as error:
            skipped[path] = f"{path}: cannot be read ({error.strerror})"
        else:
            yield MediaFile(path, state.st_size, state.st_mtime_ns, name)


def report_skipped(skipped: dict[str, str], found: int) -> None:
    """Lists the files that could not be read; to be called when all else is done.

    Raises:
      IncompleteError: there are any.
    """
    if not skipped:
        return
    print("skipped:")
    for reason in skipped.values():
        print("  " + str(UserError(reason)).replace("\n", "\\n"))
    raise IncompleteError(
        f"--source: skipped {len(skipped):,} of {max(found, len(skipped)):,} files, which are "
        "listed above; all others are done"
    )


def _is_media(name: str) -> bool:
    return name.lower().endswith(PHOTO_SUFFIXES + VIDEO_SUFFIXES)


def _below(folder: str, skipped: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The real paths of all media files below a folder, and those from the folder; by name."""
    seen: set[str] = set()
    folders = [(os.path.realpath(folder), "")]
    while folders:
        here, above = folders.pop()
        if here in seen:
            continue
        seen.add(here)
        try:
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            skipped[here] = f"{here}: cannot be read ({error.strerror})"
            continue
        below = []
        for entry in entries:
            # A link's own path says nothing; all others are real, since `here` is.
            is_link = entry.is_symlink() and os.path.exists(entry.path)
            path = os.path.realpath(entry.path) if is_link else entry.path
            name = os.path.join(above, entry.name)
            if os.path.isdir(path):
                below.append((path, name))
            elif _is_media(entry.name):
                yield path, name
        folders.extend(reversed(below))


@dataclasses.dataclass(frozen=True)
class Origin:
    """When and by which camera something was taken; None and empty where that is unknown."""

    taken: datetime.datetime | None
    camera: str


def origin(path: str, data: bytes | None = None) -> Origin:
    """What a photo's EXIF data say, else its folder, else its name.

    Args:
      path: of the photo or video.
      data: the content of a photo.
    """
    exif = _exif(data) if data else Origin(None, "")
    return Origin(exif.taken or _named_time(path), exif.camera or _named_camera(path))


def _exif(data: bytes) -> Origin:
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            exif = image.getexif()
            taken = exif.get_ifd(_EXIF).get(_TAKEN) or exif.get(_CHANGED)
            parts = [str(exif.get(tag) or "").strip(" \0") for tag in (_MAKE, _MODEL)]
    except Exception:  # EXIF data may be damaged in any way where the photo is not
        return Origin(None, "")
    make, model = parts
    # "NIKON CORPORATION", "NIKON D90": models of most makers begin with their name.
    known = bool(make) and model.lower().startswith(make.split()[0].lower())
    camera = model if known else f"{make} {model}"
    return Origin(_exif_time(taken), _printable(camera))


def orientation(path: str) -> int:
    """The EXIF orientation of a photo, from 1 (as stored) to 8; UserError if it is gone."""
    try:
        with PIL.Image.open(path) as image:
            found = int(image.getexif().get(_ORIENTATION, 1))
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be read any more, expected the photo") from error
    except Exception:  # EXIF data may be damaged in any way where the photo is not
        return 1
    return found if found in range(1, 9) else 1


def _exif_time(text: object) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(str(text).strip(" \0"), "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None


def _printable(text: str) -> str:
    return "".join(filter(str.isprintable, text)).strip()[:100]


def _named_camera(path: str) -> str:
    folder = PurePath(path).parent.name
    if _CAMERA_FOLDER.fullmatch(folder):
        return folder
    prw = _PRW.match(PurePath(path).name)
    return prw[1] if prw else ""


def _named_time(path: str) -> datetime.datetime | None:
    name, folder = PurePath(path).name, PurePath(path).parent.name
    exact, day = _TIME.search(name), _DATE.search(name) or _DATE.search(folder)
    numbers = exact.group(1, 3, 4, 5, 6, 7) if exact else day.group(1, 3, 4) if day else None
    try:
        return datetime.datetime(*map(int, numbers)) if numbers else None  # type: ignore[arg-type]
    except ValueError:  # the 31st of February
        return None
