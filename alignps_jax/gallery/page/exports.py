"""Marks as data: a table, and the JSON files of a data set."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from alignps_jax.boxes import as_stored
from alignps_jax.gallery.page.marks import RIGHT, WRONG, Marked, Sight
from alignps_jax.media.photos import orientation_of
from alignps_jax.types import UserError

CSV_HEADER = (
    *("query", "query_photo", "query_second", "query_x1", "query_y1", "query_x2", "query_y2"),
    *("photo", "second", "x1", "y1", "x2", "y2", "score", "similarity", "mark"),
)


def as_csv(queries: Sequence[Marked]) -> bytes:
    """A line for each mark, with the number of the query, from 0, and its first view."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(CSV_HEADER)
    for number, marked in enumerate(queries):
        view = marked.views[0]
        for mark in marked.marks.values():
            person, said = mark.person, RIGHT if mark.right else WRONG
            row = (number, view.photo, view.second, *view.box, person.photo, person.second)
            writer.writerow((*row, *person.box, person.score, mark.similarity, said))
    return out.getvalue().encode("utf-8", "surrogateescape")


def identities(queries: Sequence[Marked]) -> dict[str, int]:
    """The number of each person's identity, from 0, in the order of the queries.

    A query and its right results are one identity; queries that share a view or a right result
    are the same one.
    """
    groups: list[dict[str, None]] = []
    for marked in queries:
        right = [mark.person.id for mark in marked.marks.values() if mark.right]
        group = dict.fromkeys([*(view.id for view in marked.views), *right])
        shared = [known for known in groups if known.keys() & group.keys()]
        for known in shared[1:]:
            groups.remove(known)
            shared[0].update(known)
        if shared:
            shared[0].update(group)
        else:
            groups.append(group)
    return {person: number for number, group in enumerate(groups) for person in group}


def as_coco(queries: Sequence[Marked]) -> bytes:
    """COCO JSON, which the data set reader takes as `test.json`: photos, and people in them.

    Raises:
      UserError: a photo is gone, or nothing that is marked lies in a photo.
    """
    people = {
        sight.id: sight
        for marked in queries
        for sight in (*marked.views, *(mark.person for mark in marked.marks.values()))
        if _in_photo(sight)
    }
    return _coco(people.values(), identities(queries))


def as_query(queries: Sequence[Marked]) -> bytes:
    """COCO JSON, which the data set reader takes as `query.json`: who is asked for.

    For each identity its first view, or its first right result where the views were uploaded.

    Raises:
      UserError: a photo is gone, or no identity is in two photos.
    """
    number = identities(queries)
    sights: dict[int, dict[str, Sight]] = {}
    for marked in queries:
        right = [mark.person for mark in marked.marks.values() if mark.right]
        for sight in (*marked.views, *right):
            if _in_photo(sight):
                sights.setdefault(number[sight.id], {})[sight.id] = sight
    asked = [
        next(iter(people.values()))
        for people in sights.values()
        if len({sight.photo for sight in people.values()}) > 1
    ]
    if not asked:
        raise UserError(
            "A query.json needs a person in two photos of the gallery; please mark right results "
            "in other photos first."
        )
    everybody = [sight for people in sights.values() for sight in people.values()]
    return _coco(asked, number, of=[*everybody, *_wrong(queries)])


def _wrong(queries: Sequence[Marked]) -> list[Sight]:
    people = [mark.person for marked in queries for mark in marked.marks.values()]
    return [person for person in people if _in_photo(person)]


def _in_photo(sight: Sight) -> bool:
    """Whether a data set of photos can have it."""
    return not sight.uploaded and sight.second is None


def _coco(
    people: Iterable[Sight], number: Mapping[str, int], of: Iterable[Sight] | None = None
) -> bytes:
    """Photos and people; names of photos are relative to the folder that holds those of `of`."""
    people = list(people)
    if not people:
        raise UserError("Nothing in a photo of the gallery is marked yet.")
    folders = {os.path.dirname(sight.photo) for sight in (of or people)}
    root = os.path.commonpath(folders)
    photos = {path: index for index, path in enumerate(dict.fromkeys(s.photo for s in people))}
    turns = {path: _turn(path) for path in photos}
    images, annotations = [], []
    sizes = {sight.photo: sight.size for sight in people}
    for path, index in photos.items():
        height, width = sizes[path][::-1] if turns[path] > 4 else sizes[path]
        name = os.path.relpath(path, root)
        images.append({"id": index, "file_name": name, "width": width, "height": height})
    for index, sight in enumerate(people):
        boxes, _ = as_stored(np.array([sight.box], float), sight.size, turns[sight.photo])
        x1, y1, x2, y2 = boxes[0].tolist()
        bbox = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
        annotations.append(
            {
                "id": index,
                "image_id": photos[sight.photo],
                "category_id": 1,
                "bbox": bbox,
                "area": round(bbox[2] * bbox[3], 2),
                "iscrowd": 0,
                "score": sight.score,
                "person_id": number.get(sight.id, -1),
            }
        )
    content = {
        "info": {"description": "people marked in a gallery", "folder": root},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _turn(path: str) -> int:
    try:
        return orientation_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read any more ({error.strerror})") from error
