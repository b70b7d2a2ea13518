"""Value types of a gallery: scenes, people, matches, filters, and what detectors can share one."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import operator
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A photo, or one frame of a video, upright.

    `id` comes from `hash` (SHA-256 of the file) and `second` (None for photos) alone; `path` is the
    first file with that content, `copies` are others. `taken` is local time. Unknown: None, or "".
    """

    id: str
    path: str
    height: int
    width: int
    taken: datetime.datetime | None
    camera: str
    second: float | None
    hash: str
    copies: Sequence[str] = dataclasses.field(default=(), compare=False)

    @property
    def kind(self) -> Literal["photo", "video"]:
        return "photo" if self.second is None else "video"

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
    """A result: a cosine `similarity`, and how likely it is the person (None: not calibrated)."""

    person: Person
    similarity: float
    probability: float | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """All files with this content."""
        return (self.person.scene.path, *self.person.scene.copies)


@dataclasses.dataclass
class Entry:
    """A result: a person in a photo, or in neighboring seconds of a video, best one first."""

    match: Match
    members: list[Match]

    @property
    def seconds(self) -> tuple[float, float] | None:
        """First and last second in the video; None for a photo."""
        found = [x for one in self.members if (x := one.person.scene.second) is not None]
        return (min(found), max(found)) if found else None


@dataclasses.dataclass(frozen=True)
class Filter:
    """Whom to search; by default everybody.

    Scenes below the absolute path `folder`, of one of the `cameras`, taken from `after` to `before`
    (both included, local time without a zone; unknown times are left out), of a `kind`; people with
    at least `min_score`, or scenes with one.
    """

    folder: str | None = None
    cameras: tuple[str, ...] = ()
    after: datetime.datetime | None = None
    before: datetime.datetime | None = None
    min_score: float | None = None
    kind: Literal["photo", "video"] | None = None

    def condition(self, field: Callable[[str], Any], contents: Any) -> Any:
        """What a row must fulfil, as an expression of LanceDB or PyArrow.

        `field` is LanceDB's `col` or PyArrow's; `contents` are the hashes of files in the folder.
        """
        least = -1 if self.min_score is None else self.min_score
        found = [field("score") >= float(np.float32(least))]
        if self.folder is not None:
            found.append(field("hash").isin(contents))
        if self.cameras:
            found.append(field("camera").isin(self.cameras))
        for time, is_within in ((self.after, operator.ge), (self.before, operator.le)):
            if time is not None:
                found.append(is_within(field("taken"), time.astimezone().replace(tzinfo=None)))
        if self.kind is not None:
            found.append(field("kind") == self.kind)
        return functools.reduce(operator.and_, found)


@dataclasses.dataclass(frozen=True)
class GalleryInfo:
    """The detector that made a gallery; equal ones give embeddings that can be compared.

    `checkpoint` is a hash of the weights, `name` where they lay, `dim` an embedding's length.
    """

    checkpoint: str
    name: str = dataclasses.field(compare=False)
    test_scale: str
    score_threshold: float
    dim: int

    def __str__(self) -> str:
        about = {**vars(self), "checkpoint": self.checkpoint[:12]}
        return ", ".join(f"{name} {value}" for name, value in about.items())


def content_hash(data: bytes) -> str:
    """The hash by which a gallery knows the content of a file."""
    return hashlib.sha256(data).hexdigest()


def scene_id(content: str, second: float | None) -> str:
    """24 hexadecimal digits that depend on the file's hash and the second alone."""
    return content_hash(f"{content} {second}".encode())[:24]


def person_id(scene: str, box: Float[np.ndarray, "4"]) -> str:
    """The scene's id and the box in whole pixels."""
    return f"{scene}-{'x'.join(map(str, np.rint(box).astype(int).tolist()))}"
