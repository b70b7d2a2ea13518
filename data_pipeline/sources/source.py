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
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, NoReturn

import numpy as np
from jaxtyping import Float

from alignps_jax.errors import UserError
from alignps_jax.types import Annotations, SearchProtocol

# Boxes are kept in float32, which holds every whole number up to this one.
LARGEST_COORDINATE = 2**24
# A person to search for: image, box and identity (in the numbering of the split).
Query = tuple[int, Any, int]
# Somebody in an image: its name, box and identity (a number or text, or None).
Person = tuple[str, np.ndarray, Any]


class Known(dict[Any, Any]):
    """A dict for names in files: one that it does not hold is a ValueError."""

    def __missing__(self, key: object) -> NoReturn:
        known = ", ".join(map(str, self))
        raise ValueError(f"{str(key)[:120]!r} is not among {known[:200]}")


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

    def protocol(self, name: str) -> SearchProtocol:
        """One of `protocols`, over the images of `test`."""
        protocol = self._search(name)
        if not protocol.gallery:
            raise UserError(
                f"{self.root}: nobody to search for: {name} has no other photo of anybody"
            )
        return protocol

    def _search(self, name: str) -> SearchProtocol:
        """A protocol, of the queries that have a target."""
        return search_everywhere(name, self.test, self._queries(), name == "cross_camera")

    def _queries(self) -> Sequence[Query] | None:
        """Who is searched; None: everybody."""
        return None

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
    try:
        yield
    except (ValueError, RecursionError) as error:  # JSON may be nested too deeply
        raise UserError(f"{path}: {stand_in(path) or error}") from error


def stand_in(path: Path) -> str | None:
    """What lies in place of a file that was never downloaded; None: something else."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not the file itself; download it again"
    return None


def corners(xywh: Sequence[Any] | np.ndarray) -> Float[np.ndarray, "*n 4"]:
    """x1, y1, x2, y2 from x, y, w, h; ValueError if these are not finite, or in no photo."""
    values = np.asarray(xywh if np.size(xywh) else np.zeros((0, 4)), np.float64)
    sound = np.abs(values) <= LARGEST_COORDINATE  # NaN is not
    if not sound.all():
        raise ValueError(f"has the coordinate {values[~sound][0]}, which is in no photo")
    return np.concatenate([values[..., :2], values[..., :2] + values[..., 2:]], axis=-1)


def image_index(names: Sequence[str]) -> dict[str, int]:
    """The position of each image name; ValueError for a bad name, or one that occurs twice."""
    index = Known()
    for position, name in enumerate(names):
        check_name(name)
        if index.setdefault(name, position) != position:
            raise ValueError(f"has two images of the same name, {name}")
    return index


def check_name(name: str) -> None:
    """Raises ValueError for an image name that may leave the folder, or that no file can have."""
    path = PureWindowsPath(name)  # takes / and \, a drive or a leading slash is its anchor
    if not path.name or path.anchor or ".." in path.parts or "\0" in name:
        raise ValueError(f"names the image {name[:120]!r}; expected a file inside the data set")


def annotate(
    cameras: Mapping[str, int], people: Collection[Person]
) -> tuple[Annotations, dict[Any, int]]:
    """The images (their names, each with its camera) with people whose boxes have an area.

    Returns the number of each identity, too: 0, 1, ... in their order; None is nobody's number.
    """
    known = {identity for _, _, identity in people} - {None}
    ordered = sorted(known, key=lambda identity: (isinstance(identity, str), identity))
    number = Known({identity: new for new, identity in enumerate(ordered)})
    rows: dict[str, tuple[list[np.ndarray], list[int]]] = {name: ([], []) for name in cameras}
    for image, box, identity in people:
        if (box[2:] > box[:2]).all():
            rows[image][0].append(box)
            rows[image][1].append(number.get(identity, -1))
    boxes = tuple(np.array(boxes, np.float32).reshape(-1, 4) for boxes, _ in rows.values())
    numbered = tuple(np.array(numbers, np.int32) for _, numbers in rows.values())
    labeled = tuple(numbers >= 0 for numbers in numbered)
    camera = np.array([*cameras.values()], np.int32)
    return Annotations(tuple(rows), boxes, numbered, labeled, camera), number


def search_everywhere(
    name: str, test: Annotations, queries: Sequence[Query] | None, other_cameras: bool = False
) -> SearchProtocol:
    """Each query searches all images but its own; images that hold the identity are targets.

    With `other_cameras` it searches those of other cameras. Queries without a target are left out.
    Galleries are in the order of the split, and kept once for all queries that share one. Where an
    image holds the person twice, the first box counts (as published). Without `queries` every
    identity is asked for, by its first box.
    """
    seen: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for image, mask in enumerate(test.labeled):
        for identity, box in zip(test.identity[image][mask], test.boxes[image][mask], strict=True):
            seen[int(identity)].setdefault(image, box)
    if queries is None:
        queries = [(*next(iter(shown.items())), person) for person, shown in seen.items()]
    place = test.camera if other_cameras else np.arange(len(test.names))
    elsewhere = functools.cache(lambda own: np.flatnonzero(place != own).astype(np.int32))
    kept = [
        (image, box, targets)
        for image, box, person in queries
        if (targets := {at: b for at, b in seen[person].items() if place[at] != place[image]})
    ]
    return SearchProtocol(
        name=name,
        query_image=np.array([image for image, _, _ in kept], np.int32),
        query_box=np.array([box for _, box, _ in kept], np.float32).reshape(-1, 4),
        gallery=tuple(elsewhere(int(place[image])) for image, _, _ in kept),
        target_images=tuple(np.array(list(targets), np.int32) for _, _, targets in kept),
        target_boxes=tuple(np.array(list(targets.values())) for _, _, targets in kept),
    )
