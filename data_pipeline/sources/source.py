"""The interface of the data sets' readers, and what these share.

A source reads the annotations of a data set from its own folder layout; it never opens a photo.
Boxes are `x1, y1, x2, y2` in pixels of the photo as stored (an EXIF orientation is ignored, here
and when decoding).
"""

from __future__ import annotations

import abc
import contextlib
import functools
import glob
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Shaped

from alignps_jax.errors import UserError, blame
from alignps_jax.types import Annotations, SearchProtocol

# Boxes are kept in float32, which holds every whole number up to this one.
LARGEST_COORDINATE = 2**24
# A person to search for: image, box and identity (in the numbering of the split).
Query = tuple[int, Any, int]
# No file has these characters in its name: control characters, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Source(abc.ABC):
    """A data set in its own layout below `root`.

    `train` and `test` hold the annotations as the published evaluation takes them: boxes of
    non-positive size are dropped, but nothing is clipped to the photo. `notes` are lines about the
    annotations that were read so far, for the user to see.

    Raises (all members):
      UserError: the folder lacks files, or a file does not hold what it should.
    """

    # Of a complete copy: photos and identities to train on, test images, queries.
    published: ClassVar[tuple[int, ...]] = ()
    # Patterns of files that every copy has, and of all annotation files, below `root`.
    required: ClassVar[tuple[str, ...]]
    annotation_patterns: ClassVar[tuple[str, ...]] = ()
    # Folders below `root` with the photos; the first one that has a photo counts.
    photo_folders: ClassVar[tuple[str, ...]]
    # The search protocols that the folder has.
    protocols: tuple[str, ...]

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self.notes: list[str] = []
        self._list_names = functools.cache(list_names)
        if missing := self.missing(self.root):
            entries = sorted(self.root.glob("*"))
            below = (f"; set --config.data.root={x}" for x in entries if not self.missing(x))
            found = ", ".join(x.name for x in entries[:12]) or "nothing"
            raise UserError(
                f"data.root={self.root}: lacks {', '.join(missing)}, found {found}"
                f"{next(below, '')} (docs/data.md shows the layouts)"
            )

    @property
    @abc.abstractmethod
    def train(self) -> Annotations:
        """The training images."""

    @property
    @abc.abstractmethod
    def test(self) -> Annotations:
        """The test images."""

    @property
    def default_protocols(self) -> tuple[str, ...]:
        """The protocols to report when nobody asks for others, the main one first."""
        return self.protocols

    @abc.abstractmethod
    def protocol(self, name: str) -> SearchProtocol:
        """One of `protocols`, over the images of `test`."""

    def image_path(self, name: str) -> Path:
        """The photo of that name, or where it should be; links are followed.

        A name that differs in case or in the composition of Unicode characters is found, too.
        """
        places = self._places(name)
        found = (find_alike(self.root, place, self._list_names) for place in places)
        return next((path for path in found if path), self.root / places[0])

    def annotation_files(self) -> list[str]:
        """All files that the annotations are read from, in an order of their own, below `root`."""
        patterns = self.annotation_patterns
        found = (glob.glob(pattern, root_dir=self.root, recursive=True) for pattern in patterns)
        return [name for names in found for name in sorted(names)]

    def photo_size(self, name: str) -> tuple[int, int] | None:
        """The (height, width) that the annotations give for a photo; None: they do not say."""
        del name
        return None

    @classmethod
    def missing(cls, root: Path) -> list[str]:
        """The required files that a folder lacks."""
        return [pattern for pattern in cls.required if not any(root.glob(pattern))]

    def _places(self, name: str) -> list[str]:
        """Where a photo may be, below `root`."""
        return [str(PurePosixPath(folder, name)) for folder in self.photo_folders]

    def _note(self, count: int, what: str) -> None:
        if count:
            self.notes.append(f"{self.root}: {count:,} {what}")


def list_names(folder: Path) -> dict[str, list[str]]:
    """The entries of a folder, by their names in one case and Unicode composition."""
    names: dict[str, list[str]] = defaultdict(list)
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        names[_folded(name)].append(name)
    return names


def find_alike(
    folder: Path, name: str, list_names: Callable[[Path], dict[str, list[str]]] = list_names
) -> Path | None:
    """The path below `folder`, as written or alike; None if there is none, or several."""
    for part in PurePosixPath(name).parts:
        alike = list_names(folder).get(_folded(part), [])
        if part not in alike and len(alike) != 1:
            return None
        folder /= part if part in alike else alike[0]
    return folder


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Names the file in errors about its content, and what lies there in place of it."""
    with blame(path):
        try:
            yield
        except ValueError as error:
            raise ValueError(stand_in(path) or str(error)) from error


def stand_in(path: Path) -> str | None:
    """What lies in place of a file that was never downloaded; None: something else."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not the file itself; download it again"
    return None


def check_pixels(values: Shaped[np.ndarray, "*n"]) -> None:
    """Raises ValueError for coordinates that are not finite, or larger than any photo's."""
    # NaN is not below anything; the smallest integers have no absolute value of their own type.
    sound = np.abs(values.astype(np.float64)) <= LARGEST_COORDINATE
    if not sound.all():
        raise ValueError(f"has the coordinate {values[~sound].flat[0]}, which is in no photo")


def check_name(name: str) -> None:
    """Raises ValueError for an image name that may leave the folder, or that no file can have."""
    path = PureWindowsPath(name)  # takes / and \, a drive or a leading slash is its anchor
    possible = not _UNPRINTABLE.search(name) and all(len(p.encode()) < 256 for p in path.parts)
    if not path.name or path.anchor or ".." in path.parts or not possible:
        raise ValueError(f"names the image {name[:120]!r}; expected a file inside the data set")


def image_index(names: Sequence[str]) -> dict[str, int]:
    """The position of each image name; ValueError for a bad name, or one that occurs twice."""
    index: dict[str, int] = {}
    for position, name in enumerate(names):
        check_name(name)
        if index.setdefault(name, position) != position:
            raise ValueError(f"has two images of the same name, {name}")
    return index


def annotate(
    names: Sequence[str],
    boxes: Sequence[Any],
    identity: Sequence[Sequence[Any]],
    camera: Sequence[int] | None = None,
) -> tuple[Annotations, dict[Any, int]]:
    """The images with the boxes of each that have an area, and the new number of each identity.

    The identity of a box is a number or text, or None; these are numbered 0, 1, ... in order.
    """
    known = {person for row in identity for person in row} - {None}
    ordered = sorted(known, key=lambda person: (isinstance(person, str), person))
    number = {person: new for new, person in enumerate(ordered)}
    corners = [np.array(rows, np.float32).reshape(-1, 4) for rows in boxes]
    numbered = [np.array([number.get(person, -1) for person in row], np.int32) for row in identity]
    sound = [(rows[:, 2:] > rows[:, :2]).all(axis=1) for rows in corners]
    kept = tuple(row[keep] for row, keep in zip(numbered, sound, strict=True))
    annotations = Annotations(
        names=tuple(names),
        boxes=tuple(rows[keep] for rows, keep in zip(corners, sound, strict=True)),
        identity=kept,
        labeled=tuple(row >= 0 for row in kept),
        camera=np.array(camera or [0] * len(names), np.int32),
    )
    return annotations, number


def search_everywhere(
    name: str, test: Annotations, queries: Sequence[Query], *, other_cameras: bool = False
) -> tuple[SearchProtocol, Bool[np.ndarray, "Q"]]:
    """Each query searches all images but its own; images that hold the identity are targets.

    With `other_cameras` it searches those of other cameras. Galleries are in the order of the
    split, and kept once for all queries that share one. Where an image holds the person twice, the
    first box counts (as published).

    Returns the protocol of the queries that have a target, and which these are.
    """
    seen: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for image, mask in enumerate(test.labeled):
        for identity, box in zip(test.identity[image][mask], test.boxes[image][mask], strict=True):
            seen[int(identity)].setdefault(image, box)
    place = test.camera if other_cameras else np.arange(len(test.names))
    elsewhere = functools.cache(lambda own: np.flatnonzero(place != own).astype(np.int32))
    targets = [
        {other: box for other, box in seen[person].items() if place[other] != place[image]}
        for image, _, person in queries
    ]
    answered = np.array([bool(found) for found in targets], bool)
    kept = np.flatnonzero(answered).tolist()
    images = [queries[query][0] for query in kept]
    protocol = SearchProtocol(
        name=name,
        query_image=np.array(images, np.int32),
        query_box=np.array([queries[query][1] for query in kept], np.float32).reshape(-1, 4),
        gallery=tuple(elsewhere(int(place[image])) for image in images),
        target_images=tuple(np.array(list(targets[query]), np.int32) for query in kept),
        target_boxes=tuple(np.array(list(targets[query].values())) for query in kept),
    )
    return protocol, answered
