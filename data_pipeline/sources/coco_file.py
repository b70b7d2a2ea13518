"""Reads one file of COCO-style JSON, as annotation tools write it."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import msgspec
import numpy as np

from alignps_jax.types import Annotations
from data_pipeline.prepared import listed
from data_pipeline.sources.source import annotate, check_name, check_pixels, reading

_PERSON = re.compile(r"(?:person|people|pedestrian|human)s?(?:[ _-]*(\d+))?", re.IGNORECASE)
_NOBODY = re.compile(r"|none|null|nan|<na>|unknown|-\d+(\.\d+)?", re.IGNORECASE)

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


class Box(NamedTuple):
    """A person: number of the annotation, name of the image, box, and who it is."""

    number: int
    image: str
    box: tuple[float, ...]
    identity: int | str | None


class CocoFile:
    """The content of a file, as far as it can be used; names are relative to `folder`.

    Attributes:
      sizes: (height, width) of each image by name, None where the file does not say.
      people: in the order of the file.
      bad: descriptions of the records that cannot be used.
    """

    def __init__(self, path: Path, folder: str):
        self.path, self.folder = path, folder
        self.sizes: dict[str, tuple[int, int] | None] = {}
        self.people: list[Box] = []
        self.bad: list[str] = []
        self._names: dict[str, str] = {}
        self._left_out: Counter[str] = Counter()
        with reading(path):
            records = _parse(path.read_bytes())
            self._people, self._others = _categories(records.categories or [])
            self._each("images", records.images, self._take_image)
            self._each("annotations", records.annotations, self._take_person)
            if not self.sizes or (records.annotations and not self.people):
                raise ValueError(f"holds nothing that can be used{listed(self.bad)}")

    @functools.cached_property
    def annotations(self) -> tuple[Annotations, dict[Any, int]]:
        """The images with their people, and the number of each identity."""
        rows: dict[str, list[Box]] = {name: [] for name in self.sizes}
        for person in self.people:
            rows[person.image].append(person)
        return annotate(
            list(rows),
            [[person.box for person in row] for row in rows.values()],
            [[person.identity for person in row] for row in rows.values()],
        )

    def first(self) -> list[Box]:
        """Every identity once, where it is in the first image."""
        order = {name: row for row, name in enumerate(self.sizes)}
        first: dict[int | str | None, Box] = {}
        for person in sorted(self.people, key=lambda person: order[person.image]):
            first.setdefault(person.identity, person)
        return list(first.values())

    def notes(self) -> list[str]:
        """Lines about what is not used, and what looks wrong."""
        lines = [f"{len(self.bad):,} records cannot be used:{listed(self.bad)}"] if self.bad else []
        if self._left_out:
            parts = [f"{count:,} {what}" for what, count in self._left_out.items()]
            lines.append(f"left out {', '.join(parts)}")
        sizes = [self.sizes[person.image] or (np.inf, np.inf) for person in self.people]
        limits = np.array(sizes).reshape(-1, 2)[:, ::-1]
        corners = np.array([person.box for person in self.people]).reshape(-1, 4)
        leaving = int((corners[:, 2:] > 1.1 * limits).any(axis=1).sum())
        if leaving > 0.1 * len(corners):
            share = f"{leaving / len(corners):.0%} of the boxes leave their photo"
            lines.append(f"{share}; is bbox x, y, width, height?")
        tiny = int((corners[:, 2:] - corners[:, :2] <= 1).all(axis=1).sum())
        if tiny:
            lines.append(f"{tiny:,} boxes are within a pixel; are they fractions of the photo?")
        if self.people and not any(person.identity is not None for person in self.people):
            lines.append("nobody has an identity (person_id or track_id, there or in attributes)")
        return [f"{self.path}: {line}" for line in lines]

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
        whole = min(height, width) >= 1 and height % 1 == width % 1 == 0
        self.sizes[name] = (int(height), int(width)) if whole else None

    def _take_person(self, number: int, record: msgspec.Raw) -> None:
        person = _read_person(record)
        image = self._names.get(_key(person.image_id))
        if not image:
            raise ValueError(f"image_id {person.image_id!r} is none of the usable images")
        check_pixels(np.array(person.bbox))
        x, y, w, h = person.bbox
        box = tuple(np.array([x, y, x + w, y + h], np.float32).tolist())
        category = _key(person.category_id)
        if person.iscrowd:
            self._left_out["crowd regions"] += 1
        elif category in self._others:
            self._left_out[f"boxes of {self._others[category][:40]!r}"] += 1
        elif box[2] <= box[0] or box[3] <= box[1]:
            self._left_out["boxes without area"] += 1
        else:
            self.people.append(
                Box(number, image, box, _identity(person, self._people.get(category)))
            )


_read_records = msgspec.json.Decoder(_Records, strict=False).decode
_read_image = msgspec.json.Decoder(_Image, strict=False).decode
_read_person = msgspec.json.Decoder(_Person, strict=False).decode


def _parse(data: bytes) -> _Records:
    try:
        return _read_records(data)
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}; expected COCO's lists `images` and `annotations`") from error
    except (msgspec.DecodeError, RecursionError):
        pass
    try:  # a byte-order mark, UTF-16, or the NaN of Python and pandas
        return _read_records(msgspec.json.encode(json.loads(data)))
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"cannot be read ({error})") from error


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


def _identity(person: _Person, by_category: str | None) -> int | str | None:
    inside = person.attributes if isinstance(person.attributes, _Identity) else _Identity()
    found = (person.person_id, inside.person_id, person.track_id, inside.track_id, by_category)
    key = _key(next((value for value in found if value is not None), None))
    if _NOBODY.fullmatch(key):
        return None
    return int(key) if key.isdecimal() else key
