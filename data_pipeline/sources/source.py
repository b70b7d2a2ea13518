"""What the data sets' readers share: the interface, file checks, a search over all images.

A source reads the annotations of a data set from its own folder layout; it never opens an image.
Boxes are `x1, y1, x2, y2` in pixels of the photo as stored (an EXIF orientation is ignored, here
and when decoding).
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.sources.mat_structs import read_variable

# Boxes are kept in float32, which holds every whole number up to this one.
LARGEST_COORDINATE = 2**24

_LISTED_ENTRIES = 12
_LONGEST_NAME = 1024
_LONGEST_QUOTE = 120
# Control characters, line ends, and halves of surrogate pairs, which no file name can hold.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Counts:
    """The size of a data set: photos, identities with a label, and queries of a protocol."""

    train_images: int
    train_identities: int
    test_images: int
    queries: int


class Source(abc.ABC):
    """A data set in its own layout below `root`.

    `train` and `test` hold the annotations as the published evaluation takes them: boxes of
    non-positive size are dropped, but nothing is clipped to the photo.

    Raises (all members):
      UserError: the folder lacks files, or a file does not hold what it should.
    """

    title: ClassVar[str]
    # The size of the published data set, None where there is none.
    published: ClassVar[Counts | None] = None
    # What to say when a folder differs from `published`.
    remark: ClassVar[str] = ""
    # Annotation files that every copy of the data set has, and the layout to show when they miss.
    required: ClassVar[tuple[str, ...]]
    layout: ClassVar[str]
    # Folders below `root` with the photos; the first one that has a photo counts.
    photo_folders: ClassVar[tuple[str, ...]]

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self._check_layout()

    @property
    @abc.abstractmethod
    def train(self) -> Annotations:
        """The training images."""

    @property
    @abc.abstractmethod
    def test(self) -> Annotations:
        """The test images."""

    @property
    @abc.abstractmethod
    def protocols(self) -> tuple[str, ...]:
        """Names of the search protocols that the folder has."""

    @property
    @abc.abstractmethod
    def default_protocols(self) -> tuple[str, ...]:
        """The protocols to report when nobody asks for others, the main one first."""

    @abc.abstractmethod
    def protocol(self, name: str) -> SearchProtocol:
        """One of `protocols`, over the images of `test`."""

    def image_path(self, name: str) -> Path:
        """Where the photo of that name should be.

        Raises:
          UserError: a link leads out of the folder of the photos (which may itself be one).
        """
        folders = [self.root / folder for folder in self.photo_folders]
        try:
            present = [folder for folder in folders if (folder / name).is_file()]
            folder = (present or folders)[0]
            path, target = folder / name, (folder / name).resolve()
            inside = target.is_relative_to(folder.resolve())
        except (OSError, RuntimeError) as error:  # too long a name, a circle of links
            raise UserError(
                f"{folders[0] / name}: cannot be found ({error}); expected a photo"
            ) from error
        if not inside:
            raise UserError(f"{path}: is a link to {target}; expected a photo inside {folder}")
        return path

    def photo_size(self, name: str) -> tuple[int, int] | None:
        """The (height, width) that the annotations give for a photo; None: they do not say."""
        del name
        return None

    def _check_layout(self) -> None:
        missing = [path for path in self.required if not (self.root / path).is_file()]
        if not missing:
            return
        if len(missing) <= len(self.required) // 2:
            raise UserError(
                f"{self.root / missing[0]}: no such file; expected it as part of {self.title}"
            )
        raise UserError(
            f"data.root={self.root}: not a {self.title} folder; expected"
            f"{self.layout.rstrip()}\nbut found {self._found()}"
        )

    def _found(self) -> str:
        if not self.root.is_dir():
            return "nothing there"
        entries = sorted(self.root.iterdir())
        for entry in entries:
            if all((entry / path).is_file() for path in self.required):
                return f"the data set in {entry}: set --config.data.root={entry}"
        names = [entry.name + "/" * entry.is_dir() for entry in entries]
        if len(names) > _LISTED_ENTRIES:
            names = [*names[:_LISTED_ENTRIES], f"and {len(names) - _LISTED_ENTRIES} more"]
        return ", ".join(names) if names else "an empty folder"


@contextlib.contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turns what goes wrong while a file is taken apart into a UserError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected {expected}") from error
    except (OSError, ValueError, LookupError, RecursionError) as error:
        found = quoted(str(error))
        if type(error) is not ValueError:  # ours are sentences
            found = f"cannot be read ({type(error).__name__}: {found})"
        raise UserError(f"{path}: {found}; expected {expected}") from error


def quoted(content: str) -> str:
    """Something from a file for a message: on one line, without control characters, not long."""
    line = _UNPRINTABLE.sub("?", content)
    return line if len(line) <= _LONGEST_QUOTE else f"{line[:_LONGEST_QUOTE]}..."


def mat_variable(path: Path, names: Sequence[str]) -> bytes:
    """The first of the variables `names` that a MATLAB file holds, for `mat_structs`.

    Raises:
      UserError: there is no such file or variable, or the file is damaged.
    """
    with reading(path, f"a MATLAB file (version 5) with the variable {' or '.join(names)}"):
        return read_variable(path, names)


def check_pixels(values: Shaped[np.ndarray, "*n"]) -> None:
    """Raises ValueError for coordinates that are not finite, or larger than any photo's."""
    # NaN is not below anything; the smallest integers have no absolute value of their own type.
    sound = np.abs(values.astype(np.float64)) <= LARGEST_COORDINATE
    if not sound.all():
        raise ValueError(
            f"found the coordinate {values[~sound].flat[0]}, beyond {LARGEST_COORDINATE} pixels"
        )


def image_index(
    names: Sequence[str], path: Path, what: str = "two images of the same name"
) -> dict[str, int]:
    """Position of each image name.

    Raises:
      UserError: a name occurs twice, or is not the name of a file inside a folder.
    """
    for name in names:
        if not _stays_inside(name):
            raise UserError(
                f"{path}: names the image {quoted(name)!r}; expected a file name that stays inside "
                "the folder, without control characters"
            )
    index = {name: position for position, name in enumerate(names)}
    if len(index) < len(names):
        twice = next(name for position, name in enumerate(names) if index[name] != position)
        raise UserError(f"{path}: {what}, {twice}; expected each once")
    return index


def _stays_inside(name: str) -> bool:
    path = PurePath(name)
    fits = 0 < len(name) <= _LONGEST_NAME and not _UNPRINTABLE.search(name)
    return fits and not path.is_absolute() and ".." not in path.parts


def contiguous(
    identity: Sequence[Int[np.ndarray, "_"]], labeled: Sequence[Bool[np.ndarray, "_"]]
) -> tuple[tuple[Int[np.ndarray, "_"], ...], dict[int, int]]:
    """Renumbers labeled identities 0, 1, ... in the order of their numbers.

    Returns the new identities (-1 where not labeled) and the mapping from old to new.
    """
    used = [ids[mask] for ids, mask in zip(identity, labeled, strict=True)]
    known = np.unique(np.concatenate([np.zeros(0, np.int64), *used]))
    renumbered = tuple(
        np.where(mask, np.searchsorted(known, ids), -1).astype(np.int32)
        for ids, mask in zip(identity, labeled, strict=True)
    )
    return renumbered, {int(old): new for new, old in enumerate(known)}


@dataclasses.dataclass(frozen=True)
class Queries:
    """Q people to search for: image, box and identity of each (in the numbering of `test`)."""

    image: Int[np.ndarray, "Q"]
    box: Float[np.ndarray, "Q 4"]
    identity: Int[np.ndarray, "Q"]


def search_everywhere(
    name: str,
    test: Annotations,
    queries: Queries,
    galleries: Mapping[int, Int[np.ndarray, "N"]],
) -> tuple[SearchProtocol, Bool[np.ndarray, "Q"]]:
    """Each query searches the gallery of its image; images that hold the identity are targets.

    `galleries` maps the image of a query to the images that it searches, in ascending order; a
    gallery that is shared is kept once. Where an image holds the person twice, the first box
    counts (as published).

    Returns the protocol of the queries that have a target, and which these are.
    """
    images, boxes = _appearances(test)
    targets = []
    for image, identity in zip(queries.image, queries.identity, strict=True):
        rows = np.isin(images[int(identity)], galleries[int(image)])
        targets.append((images[int(identity)][rows], boxes[int(identity)][rows]))
    answered = np.array([len(found) > 0 for found, _ in targets], bool)
    kept = np.flatnonzero(answered)
    protocol = SearchProtocol(
        name=name,
        query_image=queries.image[kept].astype(np.int32),
        query_box=queries.box[kept].astype(np.float32),
        gallery=tuple(galleries[int(queries.image[q])] for q in kept),
        target_images=tuple(targets[q][0] for q in kept),
        target_boxes=tuple(targets[q][1] for q in kept),
    )
    return protocol, answered


def all_but(num_images: int, images: Int[np.ndarray, "Q"]) -> dict[int, Int[np.ndarray, "_N"]]:
    """For each of `images` all `num_images` images but itself."""
    everything = np.arange(num_images, dtype=np.int32)
    return {int(image): np.delete(everything, int(image)) for image in np.unique(images)}


def _appearances(
    test: Annotations,
) -> tuple[list[Int[np.ndarray, "_T"]], list[Float[np.ndarray, "_T 4"]]]:
    """Images of each identity in ascending order, and its first box in each."""
    images: list[list[int]] = [[] for _ in range(test.num_identities)]
    boxes: list[list[np.ndarray]] = [[] for _ in images]
    for image, labeled in enumerate(test.labeled):
        for row in np.flatnonzero(labeled):
            identity = int(test.identity[image][row])
            if image not in images[identity][-1:]:
                images[identity].append(image)
                boxes[identity].append(test.boxes[image][row])
    return (
        [np.array(rows, np.int32) for rows in images],
        [np.array(rows, np.float32).reshape(-1, 4) for rows in boxes],
    )
