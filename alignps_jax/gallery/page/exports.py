"""Marks as data, a table or the JSON files of a data set; and photos with their boxes as a ZIP."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

import numpy as np

from alignps_jax.boxes import as_stored
from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Entry, Person
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.marks import Mark, identities
from alignps_jax.gallery.page.pictures import jpeg
from alignps_jax.media.photos import orientation_of

CSV_HEADER = [
    "identity",
    "view",
    "photo",
    "second",
    "x1",
    "y1",
    "x2",
    "y2",
    "score",
    "similarity",
    "mark",
]
_HUGE = 1 << 16  # pixels


class Marked:
    """Marks with the people of the gallery that they are about.

    Attributes:
      left_out: the number of people who are not in the gallery any more, or whose photo is gone.
    """

    def __init__(self, gallery: Gallery, marks: Sequence[Mark]):
        self.marks = marks
        ids = {one for mark in marks for one in (mark.view, mark.person)}
        known = {identity: gallery.person(identity) for identity in sorted(ids)}
        self._people = {identity: person for identity, person in known.items() if person}
        photos = {one.id: one for one in self._people.values() if one.scene.second is None}
        self._photos = {k: one for k, one in photos.items() if os.path.isfile(one.scene.path)}
        results = {mark.person for mark in marks}
        self.left_out = len(results - self._people.keys()) + len(photos) - len(self._photos)
        self._identities = identities(marks)

    def as_csv(self) -> bytes:
        """A line for each mark, with the number of the identity."""
        out = io.StringIO(newline="")
        writer = csv.writer(out)
        writer.writerow(CSV_HEADER)
        for mark in self.marks:
            person, view = self._people.get(mark.person), self._people.get(mark.view)
            if person is None:
                continue
            row = [self._number(mark.view), view.scene.path if view else mark.name]
            row += [person.scene.path, person.scene.second, *person.box.tolist(), person.score]
            row += [mark.similarity, "right" if mark.right else "wrong"]
            writer.writerow(map(_harmless, row))
        return out.getvalue().encode()

    def as_coco(self) -> bytes:
        """The photos and everybody who is marked, as `test.json` of a data set."""
        return self._coco(list(self._photos.values()))

    def as_query(self) -> bytes:
        """Who is asked for, as `query.json`: one person of each identity that is in two photos."""
        asked = []
        for same in self._identities:
            ids = [k for mark in self.marks for k in (mark.view, mark.person) if k in same]
            found = [self._photos[k] for k in ids if k in self._photos]
            if len({person.scene.path for person in found}) > 1:
                asked.append(found[0])
        return self._coco(asked)

    def _number(self, identity: str) -> int:
        return next((n for n, same in enumerate(self._identities) if identity in same), -1)

    def _coco(self, people: Sequence[Person]) -> bytes:
        """Boxes are those of the pixels as stored; names are relative to `info.folder`."""
        if not people:
            raise UserError(
                "Nothing to write: a test.json needs a mark in a photo, a query.json a right "
                "result in another photo."
            )
        scenes = {one.scene.path: one.scene for one in people}
        folders = {os.path.dirname(one.scene.path) for one in self._photos.values()}
        root, paths = os.path.commonpath(folders), list(scenes)
        images, annotations = [], []
        turns = {path: orientation_of(path) for path in paths}
        for number, path in enumerate(paths):
            height, width = (scenes[path].height, scenes[path].width)[:: 1 - 2 * (turns[path] > 4)]
            name = os.path.relpath(path, root)
            images.append({"id": number, "file_name": name, "width": width, "height": height})
        for number, person in enumerate(people):
            scene = person.scene
            box = np.array([person.box], float)
            (corners,), _ = as_stored(box, (scene.height, scene.width), turns[scene.path])
            x1, y1, x2, y2 = (round(float(corner), 2) for corner in corners)
            annotations.append(
                {
                    "id": number,
                    "image_id": paths.index(scene.path),
                    "category_id": 1,
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "area": round((x2 - x1) * (y2 - y1), 2),
                    "iscrowd": 0,
                    "score": round(float(person.score), 6),
                    "person_id": self._number(person.id),
                }
            )
        content = {
            "info": {"folder": root, "left_out": self.left_out},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "person"}],
        }
        return (json.dumps(content, indent=1) + "\n").encode()


def _harmless(value: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if is_formula else value


class _Sink(list[bytes]):
    """Takes what is written, for somebody to fetch."""

    def write(self, data: bytes) -> int:
        self.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass


def photos_as_zip(gallery: Gallery, entries: Sequence[Entry]) -> Iterator[bytes]:
    """The photos of results (of videos the frame), with boxes and similarities in `results.json`.

    Photos that are gone are left out, and said there.
    """
    sink, names = _Sink(), dict[str, str]()
    results: list[dict[str, object]] = []
    with zipfile.ZipFile(cast(BinaryIO, sink), "w") as archive:
        for number, entry in enumerate(entries, 1):
            person, scene = entry.match.person, entry.match.person.scene
            about = {"photo": scene.path, "second": scene.second}
            try:
                path, is_photo = gallery.file_of(scene), scene.second is None
                if scene.id not in names:
                    name = f"{number:04d}-{path.stem}{path.suffix if is_photo else '.jpg'}"
                    data = path.read_bytes() if is_photo else jpeg(gallery.pixels(scene), _HUGE)
                    archive.writestr(name, data)
                    names[scene.id] = name
            except (UserError, OSError) as error:
                results.append({**about, "left_out": str(error)})
                continue
            yield from sink
            sink.clear()
            box = [round(corner, 1) for corner in person.box.tolist()]
            found = {"file": names[scene.id], "box": box, "person": person.id}
            results.append({**about, **found, "similarity": round(entry.match.similarity, 4)})
        archive.writestr("results.json", json.dumps(results, indent=1))
    yield from sink
