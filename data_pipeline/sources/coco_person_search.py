"""Person search data sets in COCO-style JSON, as annotation tools write it."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import msgspec
import numpy as np

from alignps_jax.choices import known_name
from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.prepared import PersonSearchBuilder
from data_pipeline.sources.source import (
    LARGEST_COORDINATE,
    Folders,
    Queries,
    Source,
    all_but,
    annotate,
    check_name,
    reading,
    search_everywhere,
)

# The file of a split: by hand or CVAT; CVAT, Roboflow, Label Studio, FiftyOne.
_FILES = (
    "{}.json",
    "annotations/instances_{}.json",
    "{}/annotations/instances_default.json",
    "{}/_annotations.coco.json",
    "{}/result.json",
    "{}/labels.json",
)
_PERSON = re.compile(r"(?:person|people|pedestrian|human)s?(?:[ _-]*(\d+))?", re.IGNORECASE)
_NOBODY = re.compile(r"|none|null|nan|<na>|-\d+(\.\d+)?", re.IGNORECASE)
_LISTED = 10

_Id = int | float | str


class _Image(msgspec.Struct):
    id: _Id
    file_name: str
    width: float | None = None
    height: float | None = None


class _Category(msgspec.Struct):
    id: _Id
    name: _Id | None = None
    supercategory: Any = None


class _Identity(msgspec.Struct, kw_only=True):
    person_id: _Id | None = None
    track_id: _Id | None = None


class _Person(_Identity, kw_only=True):
    image_id: _Id
    bbox: tuple[float, float, float, float]
    category_id: _Id | None = None
    iscrowd: bool | int | float | None = None
    attributes: _Identity | list[Any] | None = None


class _Records(msgspec.Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[_Category] | None = None


class CocoPersonSearchSource(Source):
    """Reads a folder of COCO-style annotations.

    `train.json` and `test.json` (or `_FILES`, as tools write them) are objects with two lists:

    - `images`: `id`, `file_name`, and `width`, `height` of the photo as stored. The photo is
      `images/<file_name>`, or where the tools put it. Where there is a folder `images/train`, or
      the file is in `train`, names are relative to that.
    - `annotations`: `image_id`, `bbox` (`x, y, w, h` in pixels, corner first) and the identity:
      `person_id` or `track_id`, there or in `attributes`, any number or text. A person without it,
      or with a negative number, has no identity. Annotations of other `categories` than people and
      those with `iscrowd` are left out. A category that is named `person 17`, or whose
      supercategory is `person_id`, is an identity.

    Identities are numbered 0, 1, ... within each split. `query.json`, optional, has the same form:
    each annotation asks for one person, who is in at least one other image of `test.json`. Without
    it every identity that is in at least two test images is asked for once, by its first box.

    Records that cannot be used are left out; `notes` lists them, and says what else looks wrong.

    Protocol: `all` (every test image but the query's own, in the order of `test.json`).
    """

    title = "COCO-style person search"
    required = ("train.json", "test.json")
    layout = """
  images/...
  train.json
  test.json
  query.json (optional)
  (or what CVAT, Roboflow, Label Studio or FiftyOne exported: docs/data.md)
"""
    photo_folders = ("images", "", "data", "images/default")
    protocols = ("all",)
    default_protocols = ("all",)

    @classmethod
    def missing(cls, root: Path) -> list[str]:
        return [f"{split}.json" for split in ("train", "test") if not _locate(root, split)[0]]

    @functools.cached_property
    def train(self) -> Annotations:
        return self._train.annotations[0]

    @functools.cached_property
    def test(self) -> Annotations:
        self._note_shared(list(self._train.sizes), list(self._test.sizes))
        return self._test.annotations[0]

    def protocol(self, name: str) -> SearchProtocol:
        known_name("config.eval.protocols", name, self.protocols)
        path = self.root / "query.json"
        asked = _File(path, self._test.folder) if path.is_file() else None
        number, index = (
            self._test.annotations[1],
            {name: i for i, name in enumerate(self.test.names)},
        )
        people = [
            person
            for person in (asked.people if asked else self._test.first())
            if person.image in index and person.identity in number
        ]
        queries = Queries.of((index[p.image], p.box, number[p.identity]) for p in people)
        galleries = all_but(len(index), queries.image)
        protocol, answered = search_everywhere(name, self.test, queries, galleries)
        if asked:
            found = {people[query].number for query in np.flatnonzero(answered)}
            asked.bad += [
                f"annotations[{person.number}]: {person.identity!r} is in no other test image"
                for person in asked.people
                if person.number not in found
            ]
            self.notes += asked.notes()
        if not answered.any():
            raise UserError(
                f"{self._test.path}: no identity that is asked for is in two images; expected "
                "some, or there is nobody to search for"
            )
        return protocol

    def photo_size(self, name: str) -> tuple[int, int] | None:
        return self._train.sizes.get(name) or self._test.sizes.get(name)

    @functools.cached_property
    def _train(self) -> _File:
        return self._read("train")

    @functools.cached_property
    def _test(self) -> _File:
        return self._read("test")

    def _read(self, split: str) -> _File:
        path, folder = _locate(self.root, split)
        file = _File(path or self.root / f"{split}.json", folder)
        self.notes += file.notes()
        return file

    def _places(self, name: str) -> list[str]:
        """As the tools put photos; the first folder of a name may be there by mistake."""
        first, _, rest = name.partition("/")
        places = [PurePosixPath(folder, name) for folder in self.photo_folders]
        places += [PurePosixPath(first, folder, rest) for folder in self.photo_folders if rest]
        if first.lower() in ("images", "train", "test"):
            places += [PurePosixPath(folder, rest) for folder in self.photo_folders]
        return [str(place) for place in places]


class CocoPersonSearch(PersonSearchBuilder):
    """A person search data set in COCO-style JSON."""

    source_class = CocoPersonSearchSource


class _Box(NamedTuple):
    """A person: number of the annotation, name of the image, box, and who it is."""

    number: int
    image: str
    box: tuple[float, ...]
    identity: int | str | None


class _File:
    """The content of a file, as far as it can be used; names are relative to `folder`.

    Attributes:
      sizes: (height, width) of each image by name, None where the file does not say.
      people: in the order of the file.
      bad: descriptions of the records that cannot be used.
    """

    def __init__(self, path: Path, folder: str):
        self.path, self.folder = path, folder
        self.sizes: dict[str, tuple[int, int] | None] = {}
        self.people: list[_Box] = []
        self.bad: list[str] = []
        self._names: dict[str, str] = {}
        self._left_out: Counter[str] = Counter()
        with reading(path):
            records = _parse(path.read_bytes())
            self._categories = {_key(row.id): row for row in records.categories or []}
            self._only_people = not any(map(_is_person, self._categories.values()))
            self._each("images", records.images, self._take_image)
            self._each("annotations", records.annotations, self._take_person)
            if not self.sizes or (records.annotations and not self.people):
                raise ValueError(f"holds nothing that can be used{self._listed()}")

    @functools.cached_property
    def annotations(self) -> tuple[Annotations, dict[int | str, int]]:
        """The images with their people, and the number of each identity."""
        rows: dict[str, list[_Box]] = {name: [] for name in self.sizes}
        for person in self.people:
            rows[person.image].append(person)
        return annotate(
            list(rows),
            [[person.box for person in row] for row in rows.values()],
            [[person.identity for person in row] for row in rows.values()],
        )

    def first(self) -> list[_Box]:
        """Every identity once, where it is in the first image."""
        order = {name: row for row, name in enumerate(self.sizes)}
        first: dict[int | str | None, _Box] = {}
        for person in sorted(self.people, key=lambda person: order[person.image]):
            first.setdefault(person.identity, person)
        return list(first.values())

    def notes(self) -> list[str]:
        """Lines about what is not used, and what looks wrong."""
        lines = [f"{len(self.bad):,} records cannot be used:{self._listed()}"] if self.bad else []
        if self._left_out:
            parts = [f"{count:,} {what}" for what, count in self._left_out.items()]
            lines.append(f"left out {', '.join(parts)}")
        sizes = [self.sizes[person.image] or (np.inf, np.inf) for person in self.people]
        limits = np.array(sizes).reshape(-1, 2)[:, ::-1]
        corners = np.array([person.box for person in self.people]).reshape(-1, 4)
        leaving = (corners[:, 2:] > 1.1 * limits).any(axis=1)
        if leaving.sum() > 0.1 * len(leaving):
            share = f"{leaving.mean():.0%} of the boxes leave their photo"
            lines.append(f"{share}; is bbox x, y, width, height?")
        tiny = (corners[:, 2:] - corners[:, :2] <= 1).all(axis=1).sum()
        if tiny:
            lines.append(f"{tiny:,} boxes are within a pixel; are they fractions of the photo?")
        if self.people and not any(person.identity is not None for person in self.people):
            lines.append("nobody has an identity (person_id or track_id, there or in attributes)")
        return [f"{self.path}: {line}" for line in lines]

    def _listed(self) -> str:
        more = [f"and {len(self.bad) - _LISTED} more"] if len(self.bad) > _LISTED else []
        return "".join(f"\n  {line}" for line in [*self.bad[:_LISTED], *more])

    def _each(
        self, what: str, records: Sequence[msgspec.Raw], take: Callable[[int, msgspec.Raw], None]
    ) -> None:
        for number, record in enumerate(records):
            try:
                take(number, record)
            except (ValueError, RecursionError) as error:
                self.bad.append(f"{what}[{number}]: {error}")

    def _take_image(self, number: int, record: msgspec.Raw) -> None:
        image = _read_image(record)
        name = str(PurePosixPath(image.file_name.replace("\\", "/")))
        check_name(name)
        if self.folder and not name.startswith(f"{self.folder}/"):
            name = f"{self.folder}/{name}"
        key = _key(image.id)
        if key in self._names or name in self.sizes:
            self._names[key] = ""
            raise ValueError(f"has the id {key} or the name {name!r} of another image")
        self._names[key] = name
        height, width = image.height or 0, image.width or 0
        whole = min(height, width) >= 1 and height.is_integer() and width.is_integer()
        self.sizes[name] = (int(height), int(width)) if whole else None

    def _take_person(self, number: int, record: msgspec.Raw) -> None:
        person = _read_person(record)
        image = self._names.get(_key(person.image_id))
        if not image:
            raise ValueError(f"image_id {person.image_id!r} is none of the usable images")
        if not all(abs(value) <= LARGEST_COORDINATE for value in person.bbox):
            raise ValueError(f"bbox {person.bbox} is in no photo")
        x, y, w, h = person.bbox
        box = tuple(np.array([x, y, x + w, y + h], np.float32).tolist())
        category = self._categories.get(_key(person.category_id))
        if person.iscrowd:
            self._left_out["crowd regions"] += 1
        elif category and not (self._only_people or _is_person(category)):
            self._left_out[f"boxes of {str(category.name)[:40]!r}"] += 1
        elif box[2] <= box[0] or box[3] <= box[1]:
            self._left_out["boxes without area"] += 1
        else:
            self.people.append(_Box(number, image, box, _identity(person, category)))


_read_records = msgspec.json.Decoder(_Records, strict=False).decode
_read_image = msgspec.json.Decoder(_Image, strict=False).decode
_read_person = msgspec.json.Decoder(_Person, strict=False).decode


def _parse(data: bytes) -> _Records:
    try:
        return _read_records(data)
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}; expected COCO's lists `images` and `annotations`") from error
    except RecursionError as error:
        raise ValueError("nests too deep") from error
    except msgspec.DecodeError:  # a byte-order mark, UTF-16, or the NaN of Python and pandas
        return _read_records(msgspec.json.encode(json.loads(data)))


def _locate(root: Path, split: str) -> tuple[Path | None, str]:
    """The file of a split, and its folder, as in `images/train/a.jpg` or `train/a.jpg`."""
    folders = Folders()
    paths = (folders.find(root, pattern.format(split)) for pattern in _FILES)
    path = next((path for path in paths if path), None)
    if path and path.parent != root and path.relative_to(root).parts[0].lower() == split:
        return path, path.relative_to(root).parts[0]
    own = folders.find(root, f"images/{split}")
    return path, own.name if own else ""


def _key(value: _Id | None) -> str:
    """The text of an id, which is the same for 7, 7.0 and "7"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().removesuffix(".0")


def _is_person(category: _Category) -> bool:
    named = _PERSON.fullmatch(str(category.name).strip())
    return bool(named) or category.supercategory in ("person_id", "track_id")


def _identity(person: _Person, category: _Category | None) -> int | str | None:
    attributes = person.attributes if isinstance(person.attributes, _Identity) else _Identity()
    found = [person.person_id, attributes.person_id, person.track_id, attributes.track_id]
    if category and _is_person(category):
        named = _PERSON.fullmatch(str(category.name).strip())
        found.append(named[1] if named else category.name)
    key = _key(next((value for value in found if value is not None), None))
    if _NOBODY.fullmatch(key):
        return None
    return int(key) if key.isdecimal() else key
