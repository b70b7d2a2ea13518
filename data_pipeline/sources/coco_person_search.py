"""Person search data sets in COCO-style JSON, the form of AlignPS's released annotations."""

from __future__ import annotations

import functools
import json
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignps_jax.errors import known_name
from alignps_jax.types import Annotations, SearchProtocol, UserError
from data_pipeline.prepared import PersonSearchBuilder
from data_pipeline.sources.source import (
    LARGEST_COORDINATE,
    Queries,
    Source,
    all_but,
    contiguous,
    image_index,
    quoted,
    reading,
    search_everywhere,
)

_EXPECTED = "JSON with the lists `images` and `annotations`"
# Some two million annotations; what JSON holds takes many times its size in memory.
_MAX_BYTES = 256 << 20
_Record = Mapping[str, Any]


class CocoPersonSearchSource(Source):
    """Reads a folder of COCO-style annotations.

    `train.json` and `test.json` are objects with two lists (whatever else they hold, as
    `categories`, is not looked at; every annotation is a person):

    - `images`: `id` (any whole number, unique), `file_name`, `width`, `height` of the photo as
      stored. The photo, JPEG or PNG, is `<root>/images/<file_name>`, or `<root>/<file_name>`
      where that does not exist; a name or a link that leaves the folder is refused.
    - `annotations`: `image_id`, `bbox` (`x, y, w, h` in pixels, corner first) and `person_id`, a
      whole number; a negative one is a person without identity. In `train.json` it is the row of
      the lookup table: identities are numbered from 0, gaps are allowed, and no number may reach
      the number of annotations. In `test.json` any numbers will do (they are renumbered).

    `query.json`, optional, has the same form: each annotation asks for one person; its image is
    named as in `test.json`, its `person_id` occurs there in at least one other image. Without it
    every identity that is in at least two test images is asked for once, by its first box.

    Protocol: `all` (every test image but the query's own, in the order of `test.json`).

    Sizes and boxes refer to the pixels as stored. Where an EXIF orientation turns a photo by 90
    degrees and the annotations refer to the turned one, its size gives that away and is an error.
    By 180 degrees, or mirrored, the size stays the same: nothing can notice that such boxes are in
    the wrong place. Turn such photos for good before annotating them (`jpegtran`, `exiftran -a`).
    """

    title = "COCO-style person search"
    required = ("train.json", "test.json")
    layout = """
  images/...
  train.json
  test.json
  query.json (optional)
"""
    photo_folders = ("images", "")
    protocols = ("all",)
    default_protocols = ("all",)

    @functools.cached_property
    def train(self) -> Annotations:
        split = self._train
        limit = sum(len(boxes) for boxes in split.boxes)
        if split.num_identities > limit:
            raise UserError(
                f"{self.root / 'train.json'}: identities out of range: person_id "
                f"{split.num_identities - 1} with {limit} annotations; expected identities "
                "numbered from 0"
            )
        return split

    @property
    def test(self) -> Annotations:
        return self._test[0]

    def protocol(self, name: str) -> SearchProtocol:
        known_name("config.eval.protocols", name, self.protocols)
        path = self.root / "query.json"
        given = path.is_file()
        queries = self._given_queries(path) if given else _first_appearances(self.test)
        galleries = all_but(len(self.test.names), queries.image)
        protocol, answered = search_everywhere(name, self.test, queries, galleries)
        if given and not answered.all():
            query = int(np.argmin(answered))
            raise UserError(
                f"{path}: the person of annotation {query} is in no other image of test.json; "
                "expected at least one"
            )
        if not answered.any():
            raise UserError(
                f"{self.root / 'test.json'}: no identity is in two images; expected some, or "
                "there is nobody to search for"
            )
        return protocol

    def photo_size(self, name: str) -> tuple[int, int] | None:
        return self._sizes[name]

    @functools.cached_property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        return {
            image["file_name"]: (image["height"], image["width"])
            for file in self.required
            for image in _read_json(self.root / file)[0]
        }

    @functools.cached_property
    def _train(self) -> Annotations:
        return _annotations(self.root / "train.json")

    @functools.cached_property
    def _test(self) -> tuple[Annotations, dict[int, int]]:
        """The test images and the new number of each person_id."""
        split = _annotations(self.root / "test.json")
        identity, number = contiguous(split.identity, split.labeled)
        return (
            Annotations(split.names, split.boxes, identity, split.labeled, split.camera),
            number,
        )

    def _given_queries(self, path: Path) -> Queries:
        asked = _annotations(path)
        index = image_index(self.test.names, self.root / "test.json")
        number = self._test[1]
        images, boxes, people = [], [], []
        for name, rows, ids in zip(asked.names, asked.boxes, asked.identity, strict=True):
            if name not in index:
                raise UserError(f"{path}: has the image {quoted(name)}; expected one of test.json")
            for box, person in zip(rows, ids, strict=True):
                if int(person) not in number:
                    raise UserError(
                        f"{path}: asks in {name} for person_id {person}; expected an identity of "
                        "test.json"
                    )
                images.append(index[name])
                boxes.append(box)
                people.append(number[int(person)])
        return _queries(images, boxes, people)


class CocoPersonSearch(PersonSearchBuilder):
    """A person search data set in COCO-style JSON."""

    source_class = CocoPersonSearchSource


def _queries(images: Sequence[int], boxes: Sequence[np.ndarray], people: Sequence[int]) -> Queries:
    return Queries(
        image=np.array(images, np.int32),
        box=np.array(boxes, np.float32).reshape(-1, 4),
        identity=np.array(people, np.int32),
    )


def _first_appearances(test: Annotations) -> Queries:
    """Every identity once, where it is seen first."""
    first: dict[int, tuple[int, np.ndarray]] = {}
    for image, labeled in enumerate(test.labeled):
        for row in np.flatnonzero(labeled):
            first.setdefault(int(test.identity[image][row]), (image, test.boxes[image][row]))
    people = sorted(first)
    return _queries([first[p][0] for p in people], [first[p][1] for p in people], people)


def _annotations(path: Path) -> Annotations:
    """The images of one file with their people; identities as the file numbers them, else -1."""
    images, people = _read_json(path)
    names = tuple(image["file_name"] for image in images)
    image_index(names, path)
    position = {image["id"]: row for row, image in enumerate(images)}
    if len(position) < len(images):
        raise UserError(f"{path}: two images have the same id; expected each id once")
    boxes: list[list[np.ndarray]] = [[] for _ in images]
    identity: list[list[int]] = [[] for _ in images]
    for number, person in enumerate(people):
        row = position.get(person["image_id"])
        if row is None:
            raise UserError(
                f"{path}: annotations[{number}] has image_id {person['image_id']}; expected the "
                "id of one of the images"
            )
        x, y, w, h = person["bbox"]
        x1, y1, x2, y2 = corners = np.array([x, y, x + w, y + h], np.float32)
        if x2 > x1 and y2 > y1:
            boxes[row].append(corners)
            identity[row].append(max(person["person_id"], -1))
    ids = tuple(np.array(row, np.int32) for row in identity)
    return Annotations(
        names=names,
        boxes=tuple(np.array(row, np.float32).reshape(-1, 4) for row in boxes),
        identity=ids,
        labeled=tuple(row >= 0 for row in ids),
        camera=np.zeros(len(names), np.int32),
    )


def _read_json(path: Path) -> tuple[list[_Record], list[_Record]]:
    """The images and the annotations of a file, each with the fields that we need, in range."""
    with reading(path, _EXPECTED), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_BYTES:
            raise UserError(f"{path}: has {size:,} bytes; expected at most {_MAX_BYTES:,}")
        content = json.loads(file.read(size).decode())
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected {_EXPECTED}")
    records = []
    for key, fields in (("images", _IMAGE_FIELDS), ("annotations", _PERSON_FIELDS)):
        rows = content.get(key)
        if not isinstance(rows, list):
            raise UserError(f"{path}: has no list {key!r}; expected {_EXPECTED}")
        for number, row in enumerate(rows):
            for field, (sound, expected) in fields.items():
                value = row.get(field) if isinstance(row, dict) else None
                if not sound(value):
                    raise UserError(
                        f"{path}: {key}[{number}].{field} is {quoted(reprlib.repr(value))}; "
                        f"expected {expected}"
                    )
        records.append(rows)
    return records[0], records[1]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _is_coordinate(value: object) -> bool:
    # NaN is not between anything. A number of 400 digits is compared without becoming a float.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST_COORDINATE <= value <= LARGEST_COORDINATE


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_coordinate, value))


_WHOLE = (_is_whole, "a whole number")
_SIDE = (lambda value: _is_whole(value) and value > 0, "a positive whole number")
_IMAGE_FIELDS = {
    "id": _WHOLE,
    "file_name": (lambda value: isinstance(value, str) and value != "", "a file name"),
    "width": _SIDE,
    "height": _SIDE,
}
_PERSON_FIELDS = {
    "image_id": _WHOLE,
    "bbox": (_is_box, f"the four numbers x, y, w, h, none beyond {LARGEST_COORDINATE}"),
    "person_id": (
        _is_whole,
        "a whole number (identities out of range: 0-based, negative: no identity)",
    ),
}
