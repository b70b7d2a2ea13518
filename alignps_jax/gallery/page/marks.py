"""Which results somebody found right or wrong, kept in a file."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from alignps_jax.files import write_json
from alignps_jax.gallery.entries import Person
from alignps_jax.types import UserError

RIGHT, WRONG, NONE = "right", "wrong", "none"
_MAX_BYTES = 256 << 20  # of a file of marks
# What reading something else than marks raises.
_DAMAGED = (
    *(ArithmeticError, AttributeError, LookupError),
    *(RecursionError, TypeError, ValueError),
)
_LARGEST = 1e9  # pixels or seconds


@dataclasses.dataclass(frozen=True)
class Sight:
    """A person in a photo or a frame, as a file of marks has it.

    Attributes:
      id: in the gallery, or of an uploaded photo.
      photo: path of the photo or video; of an uploaded photo its name alone.
      second: place in the video, None for photos.
      size: height and width of the photo in pixels as a viewer shows it; zeros if it was uploaded.
      box: x1, y1, x2, y2 in those pixels.
      score: of the detection.
      uploaded: whether the photo is not one of the gallery.
    """

    id: str
    photo: str
    second: float | None
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    score: float
    uploaded: bool = False


@dataclasses.dataclass(frozen=True)
class Mark:
    """What somebody said of a result."""

    person: Sight
    similarity: float
    right: bool


@dataclasses.dataclass
class Marked:
    """The marks of a query: its views, and what was said of its results, by person."""

    views: tuple[Sight, ...]
    marks: dict[str, Mark] = dataclasses.field(default_factory=dict)

    def count(self, right: bool) -> int:
        """How many results are right, or wrong."""
        return sum(mark.right == right for mark in self.marks.values())


def sight_of(person: Person) -> Sight:
    """A person of the gallery."""
    scene = person.scene
    return Sight(
        id=person.id,
        photo=scene.path,
        second=scene.second,
        size=(scene.height, scene.width),
        box=corners(person.box),
        score=round(float(person.score), 6),
    )


def corners(box: Float[np.ndarray, "4"]) -> tuple[float, float, float, float]:
    """The box as JSON has it, to a hundredth of a pixel."""
    x1, y1, x2, y2 = (round(float(value), 2) for value in box)
    return x1, y1, x2, y2


def marks_file(address: str) -> Path:
    """Where the marks of a gallery are: people.marks.json beside people.lance."""
    place = address.rstrip("/")
    path = Path(place.rpartition("/")[2]) if "://" in place else Path(place)
    return path.with_name(f"{path.stem}.marks.json")


class Marks:
    """The marks of all queries, in a JSON file that is complete at any time.

    Args:
      file: made with the first mark.

    Raises:
      UserError: the file is there and is none of ours.
    """

    def __init__(self, file: Path):
        self.file = file
        self._lock = threading.Lock()
        self._queries = _read(file)

    def of(self, views: Sequence[str]) -> Marked | None:
        """The marks of the query with these views; None if there are none."""
        return self._queries.get(_key(views))

    def all(self) -> list[Marked]:
        """Every query with marks."""
        with self._lock:
            return list(self._queries.values())

    def set(self, views: Sequence[Sight], person: Sight, similarity: float, mark: str) -> None:
        """Says of a result that it is RIGHT, WRONG, or NONE: nothing is said any more.

        Raises:
          UserError: the file cannot be written; then nothing changes.
        """
        key = _key([view.id for view in views])
        with self._lock:
            known = self._queries.get(key, Marked(tuple(views)))
            marks = {name: one for name, one in known.marks.items() if name != person.id}
            if mark != NONE:
                marks[person.id] = Mark(person, round(similarity, 6), mark == RIGHT)
            self._write({**self._queries, key: Marked(known.views, marks)})

    def forget(self, views: Sequence[str]) -> None:
        """Removes the marks of a query; raises as `set`."""
        with self._lock:
            key = _key(views)
            self._write({name: one for name, one in self._queries.items() if name != key})

    def _write(self, queries: dict[str, Marked]) -> None:
        queries = {key: marked for key, marked in queries.items() if marked.marks}
        content = [
            {
                "views": [dataclasses.asdict(view) for view in marked.views],
                "marks": [dataclasses.asdict(mark) for mark in marked.marks.values()],
            }
            for marked in queries.values()
        ]
        write_json(self.file, {"queries": content})
        self._queries = queries


def _key(views: Iterable[str]) -> str:
    return " ".join(sorted(views))


def _read(file: Path) -> dict[str, Marked]:
    expected = "expected the marks of the page (--mode=serve), or nothing there"
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise UserError(f"{file}: found more than {_MAX_BYTES:,} bytes; {expected}")
        content = json.loads(file.read_bytes())
        queries = {}
        for entry in content["queries"]:
            views = tuple(_sight(view) for view in entry["views"])
            marks = [
                Mark(_sight(one["person"]), _finite(one["similarity"]), bool(one["right"]))
                for one in entry["marks"]
            ]
            if not views:
                raise ValueError("marks of no query")
            key = _key([view.id for view in views])
            queries[key] = Marked(views, {mark.person.id: mark for mark in marks})
        return queries
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {expected}") from error
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(f"{file}: found no marks in it; {expected}") from error


def _sight(record: Mapping[str, Any]) -> Sight:
    x1, y1, x2, y2 = map(_finite, record["box"])
    height, width = (int(_finite(side)) for side in record["size"])
    photo, uploaded = str(record["photo"]), bool(record["uploaded"])
    if not (uploaded or os.path.isabs(photo)):
        raise ValueError("a photo without its folder")
    return Sight(
        id=str(record["id"]),
        photo=photo,
        second=None if record["second"] is None else _finite(record["second"]),
        size=(height, width),
        box=(x1, y1, x2, y2),
        score=_finite(record["score"]),
        uploaded=uploaded,
    )


def _finite(value: Any) -> float:
    number = float(value)
    if not abs(number) < _LARGEST:  # NaN is less than nothing
        raise ValueError("a number out of range")
    return number
