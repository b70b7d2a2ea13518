"""Who is to be forgotten: what keeps them out of the next indexing, and nothing more.

The list holds paths, hashes of contents and boxes; no embedding, by which somebody could be found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from alignps_jax.boxes import iou
from alignps_jax.gallery.database import committing, open_or_create, reading, table_names
from alignps_jax.gallery.entries import Scene
from alignps_jax.gallery.store import Gallery
from alignps_jax.gallery.table import IndexedScene

FORGOTTEN = "forgotten"
# A box that overlaps a forgotten one so much is the same person's.
_SAME = 0.5

_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("hash", pa.string(), nullable=False),
        pa.field("second", pa.float64()),
        pa.field("box", pa.list_(pa.float32(), 4)),  # null: everybody in the file
    ]
)


def is_same(
    boxes: Float[np.ndarray, "*N 4"], forgotten: Float[np.ndarray, "4"]
) -> Bool[np.ndarray, "*N"]:
    """Whether people in such boxes are the one who was forgotten in that box of the scene."""
    return np.asarray(iou(boxes, forgotten) >= _SAME)


class Forgotten:
    """The list of a gallery, kept up to date."""

    def __init__(self, gallery: Gallery):
        self._gallery = gallery
        self._table: Any = None
        self._version = -1
        self._rows: list[dict[str, Any]] = []

    def add(self, scene: Scene, hashed: str, box: Sequence[float] | None) -> None:
        """Enters a person of a scene, or (without a box) everybody in its file.

        Raises:
          UserError: the gallery cannot be written.
        """
        address, database = self._gallery.address, self._gallery.database
        table = open_or_create(address, database, FORGOTTEN, _SCHEMA)
        second = scene.second if box is not None else None
        row = {"path": scene.path, "hash": hashed, "second": second, "box": box}
        committing(address, lambda: table.add(pa.Table.from_pylist([row], _SCHEMA)))

    def refresh(self) -> None:
        """Reads what others have entered."""
        with reading(self._gallery.address):
            if self._table is None:
                if FORGOTTEN not in table_names(self._gallery.database):
                    return
                self._table = self._gallery.database.open_table(FORGOTTEN)
            self._table.checkout_latest()
            if self._table.version != self._version:
                self._rows = self._table.search().to_arrow().to_pylist()
                self._version = self._table.version

    def files(self) -> set[str]:
        """The paths of files in which everybody is to be forgotten."""
        return {row["path"] for row in self._rows if row["box"] is None}

    def contents(self, path: str) -> set[str]:
        """The hashes of the contents that a file had when everybody in it was to be forgotten."""
        return {row["hash"] for row in self._rows if row["path"] == path and row["box"] is None}

    def without(self, scenes: Sequence[IndexedScene]) -> list[IndexedScene]:
        """The scenes without those who are to be forgotten."""
        self.refresh()
        if not self._rows:
            return list(scenes)
        return [one for scene in scenes if (one := self._of(scene)) is not None]

    def _of(self, one: IndexedScene) -> IndexedScene | None:
        rows = [
            row
            for row in self._rows
            if one.scene.path == row["path"] or one.file.hash == row["hash"]
        ]
        if any(row["box"] is None for row in rows):
            return None
        people = one.people
        for row in rows:
            if row["second"] == one.scene.second:
                others = ~is_same(np.asarray(people.boxes), np.array(row["box"], np.float32))
                people = jax.tree.map(lambda x, others=others: x[others], people)
        return dataclasses.replace(one, people=people)
