"""Person search data sets in COCO-style JSON, as annotation tools write it."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np

from alignps_jax.types import Annotations
from data_pipeline.prepared import listed
from data_pipeline.sources.source import (
    Person,
    Query,
    Source,
    annotate,
    check_name,
    corners,
    find_alike,
    reading,
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
_NOBODY = re.compile(r"|none|null|nan|<na>|unknown|-\d+(\.\d+)?", re.IGNORECASE)

_Id = int | float | str


class _Image(msgspec.Struct):
    id: _Id
    file_name: str
    width: int | None = None
    height: int | None = None


class _Category(msgspec.Struct):
    id: _Id
    name: _Id | None = None
    supercategory: Any = None


class _Identity(msgspec.Struct, kw_only=True):
    person_id: _Id | None = None
    track_id: _Id | None = None


class _Annotation(_Identity, kw_only=True):
    image_id: _Id
    bbox: tuple[float, float, float, float]
    category_id: _Id | None = None
    iscrowd: bool | float | None = None
    attributes: _Identity | list[Any] | None = None


class _Records(msgspec.Struct):
    images: list[Any]
    annotations: list[Any]
    categories: list[_Category] | None = None


class CocoPersonSearchSource(Source):
    """Reads a folder with `train.json` and `test.json`, or `_FILES` (docs/data.md).

    Photos are in `photo_folders`; where there is a folder `images/train`, or the file is in
    `train`, names are relative to that. Identities are numbered 0, 1, ... within each split. Each
    annotation of `query.json` (optional) asks for one person, who is in another test image. Without
    it every identity that is in at least two test images is asked for once, by its first box.

    Records that cannot be used are left out; `notes` lists them, and says what else looks wrong.

    Protocol: `all` (every test image but the query's own, in the order of `test.json`).
    """

    photo_folders = ("images", "", "data", "images/default")
    protocols = ("all",)

    @classmethod
    def missing(cls, root: Path) -> list[str]:
        return [f"{split}.json" for split in ("train", "test") if not _locate(root, split)[0]]

    @functools.cached_property
    def train(self) -> Annotations:
        self.notes += self._files["train"].notes()
        return self._files["train"].annotations[0]

    @functools.cached_property
    def test(self) -> Annotations:
        self.notes += self._files["test"].notes()
        shared = self._files["train"].sizes.keys() & self._files["test"].sizes.keys()
        self._note(len(shared), "photos are in both splits, train and test")
        return self._files["test"].annotations[0]

    def _queries(self) -> list[Query] | None:
        path = self.root / "query.json"
        if not path.is_file():
            return None
        test = self._files["test"]
        asked, number = _File(path, test.folder), test.annotations[1]
        index = {image: position for position, image in enumerate(test.sizes)}
        shown = {(person, image) for image, _, person in test.people}
        images = Counter(person for person, _ in shown if person is not None)
        queries = []
        for image, box, person in asked.people:
            if image in index and images[person] > ((person, image) in shown):
                queries.append((index[image], box, number[person]))
            else:
                asked.bad.append(f"{person!r} of {image!r} is in no other test image")
        self.notes += asked.notes()
        return queries

    def annotation_files(self) -> list[str]:
        located = [_locate(self.root, split)[0] for split in ("train", "test")]
        files = [path for path in (*located, self.root / "query.json") if path and path.is_file()]
        return [str(path.relative_to(self.root)) for path in files]

    def photo_size(self, name: str) -> tuple[int, int] | None:
        return self._files["train"].sizes.get(name) or self._files["test"].sizes.get(name)

    @functools.cached_property
    def _files(self) -> dict[str, _File]:
        places = {split: _locate(self.root, split) for split in ("train", "test")}
        return {split: _File(path, folder) for split, (path, folder) in places.items() if path}

    def _places(self, name: str) -> list[str]:
        """As the tools put photos; the first folder of a name may be there by mistake."""
        first, _, rest = name.partition("/")
        places = [PurePosixPath(folder, name) for folder in self.photo_folders]
        places += [PurePosixPath(first, folder, rest) for folder in self.photo_folders if rest]
        if first.lower() in ("images", "train", "test"):
            places += [PurePosixPath(folder, rest) for folder in self.photo_folders]
        return [str(place) for place in places]


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
        self.people: list[Person] = []
        self.bad: list[str] = []
        self._names: dict[str, str] = {}
        self._left_out: Counter[str] = Counter()
        with reading(path):
            # `json` reads byte-order marks, UTF-16, and the NaN of Python and pandas.
            content = json.loads(path.read_bytes(), parse_constant=lambda _: None)
            records = msgspec.convert(content, _Records, strict=False)
            self._people, self._others = _categories(records.categories or [])
            self._each("images", records.images, self._take_image)
            self._each("annotations", records.annotations, self._take_person)
            if not self.sizes or (records.annotations and not self.people):
                raise ValueError(f"holds nothing that can be used{listed(self.bad)}")

    @functools.cached_property
    def annotations(self) -> tuple[Annotations, dict[Any, int]]:
        """The images with their people, and the number of each identity."""
        return annotate(dict.fromkeys(self.sizes, 0), self.people)

    def notes(self) -> list[str]:
        """Lines about what is not used, and what looks wrong."""
        lines = [f"{len(self.bad):,} records cannot be used:{listed(self.bad)}"] if self.bad else []
        if self._left_out:
            parts = [f"{count:,} {what}" for what, count in self._left_out.items()]
            lines.append(f"left out {', '.join(parts)}")
        sizes = [self.sizes[image] or (np.inf, np.inf) for image, _, _ in self.people]
        limits = np.array(sizes).reshape(-1, 2)[:, ::-1]
        boxes = np.array([box for _, box, _ in self.people]).reshape(-1, 4)
        leaving = (boxes[:, 2:] > 1.1 * limits).any(axis=1).sum()
        if leaving > 0.1 * len(boxes):
            share = f"{leaving / len(boxes):.0%} of the boxes leave their photo"
            lines.append(f"{share}; is bbox x, y, width, height?")
        if tiny := (boxes[:, 2:] - boxes[:, :2] <= 1).all(axis=1).sum():
            lines.append(f"{tiny:,} boxes are within a pixel; are they fractions of the photo?")
        if self.people and all(person is None for _, _, person in self.people):
            lines.append("nobody has an identity (person_id or track_id, there or in attributes)")
        return [f"{self.path}: {line}" for line in lines]

    def _each(self, what: str, records: list[Any], take: Callable[[Any], None]) -> None:
        for number, record in enumerate(records):
            try:
                take(record)
            except ValueError as error:
                self.bad.append(f"{what}[{number}]: {error}")

    def _take_image(self, record: Any) -> None:
        image = msgspec.convert(record, _Image, strict=False)
        name = str(PurePosixPath(image.file_name.replace("\\", "/")))
        check_name(name)
        if self.folder and not name.startswith(f"{self.folder}/"):
            name = f"{self.folder}/{name}"
        key = _key(image.id)
        if key in self._names or name in self.sizes:
            self._names[key] = ""
            raise ValueError(f"has the id {key} or the name {name!r} of another image")
        self._names[key] = name
        height, width = image.height, image.width
        self.sizes[name] = (height, width) if height and width else None

    def _take_person(self, record: Any) -> None:
        person = msgspec.convert(record, _Annotation, strict=False)
        image = self._names.get(_key(person.image_id))
        if not image:
            raise ValueError(f"image_id {person.image_id!r} is none of the usable images")
        box = corners(person.bbox).astype(np.float32)
        category = _key(person.category_id)
        if person.iscrowd:
            self._left_out["crowd regions"] += 1
        elif category in self._others:
            self._left_out[f"boxes of {self._others[category][:40]!r}"] += 1
        elif (box[2:] <= box[:2]).any():
            self._left_out["boxes without area"] += 1
        else:
            identity = _identity(person, self._people.get(category))
            self.people.append((image, box, identity))


def _key(value: _Id | None) -> str:
    """The text of an id, which is the same for 7, 7.0 and "7"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().removesuffix(".0")


def _categories(rows: Iterable[_Category]) -> tuple[dict[str, str | None], dict[str, str]]:
    """By id, the people among the categories with the identity that the name gives; the others.

    Where no category is one of people, all of them are.
    """
    people: dict[str, str | None] = {}
    others: dict[str, str] = {}
    for row in rows:
        name = str(row.name).strip()
        if named := _PERSON.fullmatch(name):
            people[_key(row.id)] = named[1]
        elif row.supercategory in _Identity.__struct_fields__:
            people[_key(row.id)] = name
        else:
            others[_key(row.id)] = name
    return people, others if people else {}


def _identity(person: _Annotation, by_category: str | None) -> int | str | None:
    inside = person.attributes if isinstance(person.attributes, _Identity) else _Identity()
    found = (person.person_id, inside.person_id, person.track_id, inside.track_id, by_category)
    key = _key(next((value for value in found if value is not None), None))
    if _NOBODY.fullmatch(key):
        return None
    return int(key) if key.isdecimal() else key


def _locate(root: Path, split: str) -> tuple[Path | None, str]:
    """The file of a split, and its folder, as in `images/train/a.jpg` or `train/a.jpg`."""
    paths = (find_alike(root, pattern.format(split)) for pattern in _FILES)
    path = next((path for path in paths if path), None)
    if path and path.parent != root and path.relative_to(root).parts[0].lower() == split:
        return path, path.relative_to(root).parts[0]
    own = find_alike(root, f"images/{split}")
    return path, own.name if own else ""
