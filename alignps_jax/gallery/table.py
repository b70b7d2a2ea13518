"""The table of a gallery: its columns, its rows, and the filters in its language.

There is one table with a row per person, in which what is known of the scene is repeated (stored
once per run of equal values). So the people of a scene appear, change and go in one commit: no
kill leaves half of them. A scene's first row is there even if nobody was found; score, box and
embedding are null then. The primary key makes two writers of one scene a conflict, which one of
them repeats.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from alignps_jax.gallery.entries import (
    FileState,
    Filter,
    Person,
    Scene,
    folder_range,
    person_id,
)
from alignps_jax.types import Detections

PEOPLE = "people"
ABOUT = b"alignps_jax"

SCENE_COLUMNS = ("scene", "path", "height", "width", "taken", "camera", "second")
PERSON_COLUMNS = ("id", *SCENE_COLUMNS, "box", "score")

# A first row of a scene, and rows of people.
IS_SCENE, IS_PERSON = "number = 0", "score IS NOT NULL"

_LONGEST = 1e9  # seconds of a video
_ROUNDING = 0.01  # of an embedding's length; a network may compute in bfloat16

_KEY = {"lance-schema:unenforced-primary-key": "true"}


@dataclasses.dataclass(frozen=True)
class About:
    """What made a gallery.

    Attributes:
      checkpoint: content hash of the weights.
      name: where they lay, for people to read.
      test_scale: long and short side in pixels that photos were resized to.
      score_threshold: people with a lower score are left out.
      dim: length of an embedding.
      max_pixels: largest photo that is decoded.
    """

    checkpoint: str
    name: str
    test_scale: tuple[int, int]
    score_threshold: float
    dim: int
    max_pixels: int

    def __str__(self) -> str:
        long, short = self.test_scale
        return (
            f"checkpoint {self.checkpoint[:12]} ({self.name}), test scale {long}x{short}, "
            f"score threshold {self.score_threshold:g}"
        )

    @property
    def deciding(self) -> tuple[object, ...]:
        """What two detectors must agree in to be compared."""
        return self.checkpoint, self.test_scale, self.score_threshold

    @classmethod
    def of(cls, schema: pa.Schema) -> About:
        """From the schema of a table.

        Raises:
          ValueError: it is the table of something else.
        """
        try:
            stored = json.loads((schema.metadata or {})[ABOUT])
            about = cls(**{**stored, "test_scale": tuple(stored["test_scale"])})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError("its table has no description of what made it") from error
        vectors = schema.field("embedding").type if "embedding" in schema.names else None
        if not (about._is_sound() and vectors == pa.list_(pa.float32(), about.dim)):
            raise ValueError("its table has a damaged description of what made it")
        types = dict(zip(schema.names, schema.types, strict=True))
        if any(types.get(column.name) != column.type for column in _columns(about)):
            raise ValueError("its table lacks a column or has another type of it")
        return about

    def _is_sound(self) -> bool:
        """Whether all fields are what they should be, which a file need not have."""
        numbers = *self.test_scale, self.dim, self.max_pixels
        return (
            all(type(text) is str and text.isprintable() for text in (self.checkpoint, self.name))
            and len(self.test_scale) == 2
            and all(type(number) is int and 0 < number < 2**40 for number in numbers)
            and self.dim < 2**20
            and type(self.score_threshold) is float
            and 0 <= self.score_threshold <= 1
        )


@dataclasses.dataclass(frozen=True)
class IndexedScene:
    """A scene and the people found in it, to be stored.

    Attributes:
      scene: the scene.
      file: its file.
      people: of one image, best first, with at least the gallery's score.
      every: seconds between frames of the video; None for photos.
      final: whether the file is complete with it: photos, and the last frame of a video.
    """

    scene: Scene
    file: FileState
    people: Detections
    every: float | None = None
    final: bool = True


def schema(about: About) -> pa.Schema:
    """The columns of a gallery, with what made it."""
    metadata = {ABOUT: json.dumps(dataclasses.asdict(about)).encode()}
    return pa.schema(_columns(about), metadata=metadata)


def _columns(about: About) -> list[pa.Field]:
    return [
        pa.field("id", pa.string(), nullable=False, metadata=_KEY),
        pa.field("scene", pa.string(), nullable=False),
        pa.field("number", pa.int32(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mtime", pa.int64(), nullable=False),
        pa.field("hash", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("taken", pa.timestamp("us")),
        pa.field("camera", pa.string(), nullable=False),
        pa.field("second", pa.float64()),
        pa.field("every", pa.float64()),
        pa.field("final", pa.bool_(), nullable=False),
        pa.field("box", pa.list_(pa.float32(), 4)),
        pa.field("score", pa.float32()),
        pa.field("embedding", pa.list_(pa.float32(), about.dim)),
    ]


def rows(scenes: Sequence[IndexedScene], columns: pa.Schema) -> pa.Table:
    """The rows of scenes, complete."""
    dim = columns.field("embedding").type.list_size
    counts = np.array([len(one.people.scores) for one in scenes], int)
    owner = np.repeat(np.arange(len(scenes)), np.maximum(counts, 1))
    number = np.concatenate([np.arange(max(count, 1)) for count in counts])
    nobody = counts[owner] == 0

    def values(name: str, width: int) -> Float[np.ndarray, "R _width"]:
        empty = np.zeros((1, width), np.float32)
        parts = [np.asarray(getattr(one.people, name)).reshape(-1, width) for one in scenes]
        return np.concatenate([part if len(part) else empty for part in parts]).astype(np.float32)

    def vectors(name: str, width: int) -> pa.Array:
        flat = pa.array(values(name, width).ravel())
        return pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(nobody))

    per_scene: dict[str, list[Any]] = {
        **{
            name: [getattr(one.scene, "id" if name == "scene" else name) for one in scenes]
            for name in SCENE_COLUMNS
        },
        **{name: [getattr(one.file, name) for one in scenes] for name in ("size", "mtime", "hash")},
        **{name: [getattr(one, name) for one in scenes] for name in ("every", "final")},
    }
    taken = pa.array(owner)
    arrays = {
        name: pa.array(column, columns.field(name).type).take(taken)
        for name, column in per_scene.items()
    }
    arrays["id"] = pa.array(
        [
            person_id(scenes[row].scene.id, person)
            for row, person in zip(owner.tolist(), number.tolist(), strict=True)
        ]
    )
    arrays["number"] = pa.array(number, pa.int32())
    arrays["box"], arrays["embedding"] = vectors("boxes", 4), vectors("embeddings", dim)
    arrays["score"] = pa.array(values("scores", 1)[:, 0], mask=nobody)
    return pa.table([arrays[name] for name in columns.names], schema=columns)


def scene_of(row: Mapping[str, Any]) -> Scene:
    """The scene of a row (a dictionary with `SCENE_COLUMNS`); ValueError if it is damaged."""
    scene = Scene(id=row["scene"], **{name: row[name] for name in SCENE_COLUMNS if name != "scene"})
    if not (scene.height > 0 and scene.width > 0 and 0 <= (scene.second or 0) < _LONGEST):
        raise ValueError("the description of a photo is damaged")
    return scene


def person_of(row: Mapping[str, Any]) -> Person:
    """The person of a row (a dictionary with `PERSON_COLUMNS`); ValueError if it is damaged."""
    box, score = np.array(row["box"], np.float32), float(row["score"])
    if box.shape != (4,) or not np.isfinite(box).all() or not 0 <= score <= 1:
        raise ValueError("a box or score is damaged")
    return Person(row["id"], scene_of(row), box, score)


def embedding_of(row: Mapping[str, Any]) -> tuple[str, list[float]]:
    """The person's id and embedding (a dictionary with both); ValueError if it is damaged."""
    vector: list[float] = row["embedding"]
    if not are_embeddings(np.array([vector], np.float32)):
        raise ValueError("embeddings are damaged")
    return row["id"], vector


def are_embeddings(vectors: Float[np.ndarray, "N D"]) -> bool:
    """Whether all have length one, or none at all, as the network gives them."""
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(vectors, axis=1)
    return bool(((lengths == 0) | (abs(lengths - 1) <= _ROUNDING)).all())


def where_sql(where: Filter, *conditions: str) -> str:
    """A filter, and other conditions, in the table's language."""
    found = list(conditions)
    if where.folder is not None:
        low, high = folder_range(where.folder)
        found.append(f"path >= {quoted(low)} AND path < {quoted(high)}")
    if where.cameras:
        found.append(one_of("camera", where.cameras))
    if where.after is not None:
        found.append(f"taken >= {_time(where.after)}")
    if where.before is not None:
        found.append(f"taken <= {_time(where.before)}")
    if where.min_score is not None:
        found.append(f"score >= CAST({where.min_score!r} AS FLOAT)")
    if where.videos is not None:
        found.append(f"second IS {'NOT ' if where.videos else ''}NULL")
    return " AND ".join(f"({condition})" for condition in found) or "true"


def one_of(column: str, texts: Iterable[str]) -> str:
    """The condition that a column holds one of these."""
    return f"{column} IN ({', '.join(map(quoted, texts))})"


def quoted(text: str) -> str:
    """A text in the table's language."""
    return "'" + text.replace("'", "''") + "'"


def _time(time: datetime.datetime) -> str:
    return f"TIMESTAMP '{time.replace(tzinfo=None).isoformat(' ', 'microseconds')}'"
