"""What a gallery holds, finds, and is asked for: scenes, people, matches and filters."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
from pathlib import PurePath

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A photo, or one frame of a video.

    Attributes:
      id: stable and fit for a URL.
      path: of the photo or video, absolute, without symbolic links.
      height, width: in pixels, as a viewer shows it (EXIF orientation applied).
      taken: local time without a zone; None where unknown.
      camera: empty where unknown.
      second: place in the video; None for photos.
    """

    id: str
    path: str
    height: int
    width: int
    taken: datetime.datetime | None
    camera: str
    second: float | None


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody who was found: `box` is x1, y1, x2, y2 in pixels of the scene, `score` in [0, 1]."""

    id: str
    scene: Scene
    box: Float[np.ndarray, "4"]
    score: float


@dataclasses.dataclass(frozen=True)
class Match:
    """One result of a search; `similarity` is a cosine."""

    person: Person
    similarity: float


@dataclasses.dataclass(frozen=True)
class Filter:
    """Whom to search; by default everybody.

    Attributes:
      folder: scenes below this folder.
      cameras: scenes of these cameras, if there are any.
      after, before: scenes taken in this time, both ends included; those of unknown time are left
        out where one is given.
      min_score: people with at least this score.
      videos: True: only videos; False: only photos.
    """

    folder: str | None = None
    cameras: tuple[str, ...] = ()
    after: datetime.datetime | None = None
    before: datetime.datetime | None = None
    min_score: float | None = None
    videos: bool | None = None


@dataclasses.dataclass(frozen=True)
class FileState:
    """A file as it was read: bytes, time of change in ns since 1970, and a hash of its content."""

    size: int
    mtime: int
    hash: str


def scene_id(path: str, second: float | None) -> str:
    """24 hexadecimal digits that depend on the place alone, not on its content."""
    place = path if second is None else f"{path}\0{second:.3f}"
    return hashlib.sha256(place.encode()).hexdigest()[:24]


def person_id(scene: str, number: int) -> str:
    """The id of the person `number` of a scene, counted from 0, best score first."""
    return f"{scene}-{number}"


def folder_range(folder: str) -> tuple[str, str]:
    """The first possible path below a folder, and the first one after all of them."""
    prefix = os.path.realpath(folder).rstrip("/")
    return f"{prefix}/", f"{prefix}{chr(ord('/') + 1)}"


def folder_of(path: str) -> str:
    """The folder that a scene's file lies in."""
    return str(PurePath(path).parent)
