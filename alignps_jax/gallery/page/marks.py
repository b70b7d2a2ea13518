"""Which results somebody found right or wrong; as files, too, and photos of results as a ZIP."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import time
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from alignps_jax.boxes import as_stored
from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Entry, Person
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.uploads import FULL, jpeg
from alignps_jax.gallery.people import People
from alignps_jax.media import exif_of

_COLUMNS = "identity,view,photo,second,x1,y1,x2,y2,score,similarity,mark\r\n"


@dataclasses.dataclass(frozen=True)
class Mark:
    """Whether `person` is the person of `view` (ids); `name` is the photo's of the view."""

    view: str
    person: str
    right: bool
    similarity: float
    name: str
    at: float = dataclasses.field(default_factory=time.time)
    id: str = ""


class Marks:
    """The marks of a gallery. They belong to a person, whatever views a query has of it."""

    def __init__(self, people: People):
        self.table = people.marks

    def all(self) -> list[Mark]:
        """Every mark, the oldest first."""
        return [Mark(**row) for row in self.table.rows().sort_by("at").to_pylist()]

    def about(self, views: Collection[str]) -> list[Mark]:
        """The marks of the person who is seen in some views (ids)."""
        marks = self.all()
        groups = identities(marks, [views])
        same = next((group for group in groups if not group.isdisjoint(views)), set())
        return [mark for mark in marks if mark.view in same]

    def set(self, views: Sequence[Person], people: dict[str, float], right: bool | None) -> None:
        """Says of results (similarity by id) that they are right, wrong, or nothing any more."""
        found = [(view, person) for view in views for person in people]
        if right is None:
            self.remove([view.id for view in views], people)
        else:
            self.put([Mark(x.id, one, right, people[one], x.scene.name) for x, one in found])

    def put(self, marks: Sequence[Mark]) -> None:
        """Adds marks, in place of those with the same view and person."""
        self.table.put([vars(mark) | {"id": f"{mark.view}>{mark.person}"} for mark in marks])

    def remove(self, views: Collection[str], people: Collection[str] = ()) -> list[Mark]:
        """Removes the marks of a person, all or those of some results; returns them."""
        gone = [one for one in self.about(views) if not people or one.person in people]
        self.table.delete("id", [mark.id for mark in gone])
        return gone


def rename(people: People, old: str, new: str) -> None:
    """What was said about a person (id) is said about another one, who is there instead."""
    marks, groups = people.marks, people.groups
    for table, column in ((marks, "view"), (marks, "person"), (groups, "person")):
        for row in table.rows(**{column: [old]}).to_pylist():
            table.put([row | {key: row[key].replace(old, new) for key in ("id", column)}])
        table.delete(column, [old])
    people.remove([], [old])


def identities(marks: Iterable[Mark], views: Iterable[Collection[str]] = ()) -> list[set[str]]:
    """The people told apart: ids of views and right results; `views` are one person each, too."""
    found: list[set[str]] = []
    groups = [{mark.view, mark.person} if mark.right else {mark.view} for mark in marks]
    for group in [*groups, *map(set, views)]:
        for known in [known for known in found if known & group]:
            found.remove(known)
            group |= known
        found.append(group)
    return found


class Marked:
    """Marks with people who are in the gallery and, but for `left_out`, have their photo."""

    def __init__(self, gallery: Gallery, marks: Sequence[Mark]):
        self.marks, self._identities = marks, identities(marks)
        ids = {one for mark in marks for one in (mark.view, mark.person)}
        self._people = gallery.memory().named(sorted(ids))
        photos = [one for one in self._people.values() if one.scene.second is None]
        self._photos = {one.id: one for one in photos if os.path.isfile(one.scene.path)}
        results = {mark.person for mark in marks}
        self.left_out = len(results - self._people.keys()) + len(photos) - len(self._photos)

    def as_csv(self) -> bytes:
        """A line for each mark, with the number of the identity."""
        out = io.StringIO(newline="")
        out.write(_COLUMNS)
        for mark in self.marks:
            person, view = self._people.get(mark.person), self._people.get(mark.view)
            if person is not None:
                row = [self._number(mark.view), view.scene.path if view else mark.name]
                row += [person.scene.path, person.scene.second, *person.box.tolist(), person.score]
                row += [mark.similarity, "right" if mark.right else "wrong"]
                csv.writer(out).writerow(map(_harmless, row))
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
        root = os.path.commonpath([os.path.dirname(x.scene.path) for x in self._photos.values()])
        images, annotations = dict[str, dict[str, Any]](), []
        for number, person in enumerate(people):
            scene, turn = person.scene, exif_of(person.scene.path)["Orientation"]
            boxes, size = as_stored(person.box[None], (scene.height, scene.width), turn)
            name, height, width = os.path.relpath(scene.path, root), *map(int, size)
            about = {"file_name": name, "width": width, "height": height}
            image = images.setdefault(scene.path, {"id": len(images), **about})
            x1, y1, x2, y2 = boxes[0].tolist()
            box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
            known = {"id": number, "image_id": image["id"], "category_id": 1, "iscrowd": 0}
            known |= {"bbox": box, "area": round(box[2] * box[3], 2)}
            known |= {"score": round(person.score, 6), "person_id": self._number(person.id)}
            annotations.append(known)
        content = {
            "info": {"folder": root, "left_out": self.left_out},
            "images": list(images.values()),
            "annotations": annotations,
            "categories": [{"id": 1, "name": "person"}],
        }
        return (json.dumps(content, indent=1) + "\n").encode()


def _harmless(value: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if is_formula else value


class _Sink(bytearray):
    """Takes what is written, for somebody to fetch."""

    def write(self, data: bytes) -> int:
        self.extend(data)
        return len(data)

    def flush(self) -> None:
        pass


def photos_as_zip(gallery: Gallery, entries: Sequence[Entry]) -> Iterator[bytes]:
    """The photos of results, of videos the frames; `results.json` has boxes, and who is gone."""
    sink, names, results = _Sink(), dict[str, str](), list[dict[str, object]]()
    with zipfile.ZipFile(cast(BinaryIO, sink), "w") as archive:
        for number, entry in enumerate(entries, 1):
            person, scene = entry.match.person, entry.match.person.scene
            about: dict[str, object] = {"photo": scene.path, "second": scene.second}
            results.append(about)
            try:
                path, is_photo = gallery.file_of(scene), scene.second is None
                if scene.id not in names:
                    data = path.read_bytes() if is_photo else jpeg(gallery.pixels(scene), FULL)
                    name = f"{number:04d}-{path.stem}{path.suffix if is_photo else '.jpg'}"
                    archive.writestr(name, data)
                    names[scene.id] = name
            except (UserError, OSError) as error:
                about["left_out"] = str(error)
                continue
            box = [round(corner, 1) for corner in person.box.tolist()]
            similarity, name = round(entry.match.similarity, 4), names[scene.id]
            about |= {"file": name, "box": box, "person": person.id, "similarity": similarity}
            yield bytes(sink)
            sink.clear()
        archive.writestr("results.json", json.dumps(results, indent=1))
    yield bytes(sink)
