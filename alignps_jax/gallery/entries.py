"""Value types of a gallery: scenes, people, matches, filters, and what detectors can share one."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A photo, or one frame of a video.

    `id` depends on `hash` (SHA-256 of the file) and `second` (None for photos) alone, so that
    renamed and copied files keep it; `path` is that of the first one. Height and width are those
    that a viewer shows, `taken` is local time; None and "" where unknown.
    """

    id: str
    path: str
    height: int
    width: int
    taken: datetime.datetime | None
    camera: str
    second: float | None
    hash: str

    @property
    def name(self) -> str:
        """The file's name, of a video with the time in it."""
        name = PurePath(self.path).name
        return name if self.second is None else f"{name} at {self.second:.1f} s"


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody who was found: `box` is x1, y1, x2, y2 in pixels of the scene, `score` in [0, 1]."""

    id: str
    scene: Scene
    box: Float[np.ndarray, "4"]
    score: float


@dataclasses.dataclass(frozen=True)
class Match:
    """One result of a search; `similarity` is a cosine.

    `probability`: that it is the person searched; None without a calibration. `paths`: all files
    with this content, the scene's own first.
    """

    person: Person
    similarity: float
    probability: float | None = None
    paths: tuple[str, ...] = ()


@dataclasses.dataclass
class Entry:
    """A result: a person in a photo, or in neighboring seconds of a video, best one first."""

    match: Match
    members: list[Match]

    @property
    def seconds(self) -> tuple[float, float] | None:
        """First and last second in the video; None for a photo."""
        found = [one.person.scene.second for one in self.members]
        seconds = [second for second in found if second is not None]
        return (min(seconds), max(seconds)) if seconds else None


@dataclasses.dataclass(frozen=True)
class Filter:
    """Whom to search; by default everybody.

    That is, scenes below an absolute path, of some cameras, taken in a time (both ends included;
    without those of unknown time), people with at least a score, photos or videos alone.
    """

    folder: str | None = None
    cameras: tuple[str, ...] = ()
    after: datetime.datetime | None = None
    before: datetime.datetime | None = None
    min_score: float | None = None
    kind: Literal["photo", "video"] | None = None

    def __post_init__(self) -> None:
        for name in ("after", "before"):
            time = getattr(self, name)
            if time is not None and time.tzinfo is not None:
                object.__setattr__(self, name, time.astimezone().replace(tzinfo=None))
        if self.min_score is not None:
            object.__setattr__(self, "min_score", float(self.min_score))

    def condition(self, field: Callable[[str], Any], copied: Sequence[str] = ()) -> list[Any]:
        """What a row must fulfil, the score aside, as expressions of LanceDB or PyArrow (`field`).

        `copied`: contents of which one of several files lies in the folder.
        """
        found = []
        if self.folder is not None:
            inside = (field("path") >= self.below[0]) & (field("path") < self.below[1])
            found.append(inside | field("hash").isin(list(copied)) if copied else inside)
        if self.cameras:
            found.append(field("camera").isin(list(self.cameras)))
        if self.after is not None:
            found.append(field("taken") >= self.after)
        if self.before is not None:
            found.append(field("taken") <= self.before)
        if self.kind is not None:
            found.append(field("every") > 0 if self.kind == "video" else field("every") == 0)
        return found

    @property
    def below(self) -> tuple[str, str]:
        """The first possible path below the folder, and the first one behind them."""
        prefix = os.path.normpath(self.folder or "/").rstrip("/")
        return f"{prefix}/", f"{prefix}{chr(ord('/') + 1)}"


@dataclasses.dataclass(frozen=True)
class GalleryInfo:
    """The detector that made a gallery.

    `checkpoint` is a hash of the weights, `name` where they lay; photos of at most `max_pixels` are
    resized to `test_scale` (long and short side); embeddings have `dim` numbers.
    """

    checkpoint: str
    name: str
    test_scale: tuple[int, int]
    score_threshold: float
    dim: int
    max_pixels: int

    def __str__(self) -> str:
        long, short = self.test_scale
        return (
            f"checkpoint {self.checkpoint[:12]} ({self.name}), test scale {long}x{short}, "
            f"score threshold {self.score_threshold:g}"
        )

    @property
    def compatibility(self) -> tuple[object, ...]:
        """The fields in which two detectors must agree for their embeddings to be compared."""
        return self.checkpoint, self.test_scale, self.score_threshold


def content_hash(data: bytes) -> str:
    """The hash by which a gallery knows the content of a file."""
    return hashlib.sha256(data).hexdigest()


def scene_id(content: str, second: float | None) -> str:
    """24 hexadecimal digits that depend on the file's hash and the second alone."""
    return content_hash(f"{content} {second}".encode())[:24]


def person_id(scene: str, box: Float[np.ndarray, "4"]) -> str:
    """The scene's id and the box in whole pixels."""
    return f"{scene}-{'x'.join(map(str, np.rint(box).astype(int).tolist()))}"
