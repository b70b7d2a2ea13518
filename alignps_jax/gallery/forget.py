"""Removes people for good, and keeps them out of the next indexing: `--mode=forget`.

The list of the forgotten holds paths, hashes of contents and boxes; no embedding, by which somebody
could be found.
"""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from alignps_jax.boxes import iou
from alignps_jax.errors import UserError
from alignps_jax.gallery.people import FoundScene, People

# A box that overlaps a forgotten one so much is the same person's.
_SAME = 0.5


@dataclasses.dataclass(frozen=True)
class Forgot:
    """What `forget` removed; `remains`: why older states with them are still there, if so."""

    people: int
    files: tuple[str, ...]
    remains: str | None


class Forgotten:
    """Who was forgotten in a gallery; `hashes` are of files in which everybody was."""

    def __init__(self, people: People):
        self._people, self._all = people, list[Any]()
        self.refresh()

    def refresh(self) -> bool:
        """Reads what others have entered; says whether they have."""
        known, self._all = self._all, self._people.forgotten.rows().to_pylist()
        self.hashes = {one["hash"] for one in self._all if not one["person"]}
        return known != self._all

    def without(self, found: FoundScene) -> FoundScene | None:
        """The scene without those who are to be forgotten; None: everybody in its file is."""
        scene, people = found.scene, found.people
        for one in self._all:
            if one["path"] != scene.path and one["hash"] != scene.hash:
                continue
            if not one["person"]:
                return None
            if one["second"] == scene.second:
                box = np.array(one["box"], np.float32)
                others = np.asarray(iou(np.asarray(people.boxes), box)) < _SAME
                people = jax.tree.map(lambda x, others=others: x[others], people)
        return dataclasses.replace(found, people=people)

    def enforce(self) -> None:
        """Removes everybody on the list."""
        self._people.remove(self.hashes, {one["person"] for one in self._all} - {""})


def forget(
    people: People, photos: Sequence[str] = (), persons: Sequence[str] = (), for_good: bool = True
) -> Forgot:
    """Forgets everybody in photos or videos (paths) and their copies, and single people (ids).

    Nothing of them stays in the tables; after an interruption, call it again. Indexing may go on
    meanwhile. `for_good`: everything is written anew and older states are deleted; otherwise that
    is left to the next time, as for somebody who is no person. UserError if it knows one not.
    """
    contents = set[str]()
    for photo in photos:
        path = os.path.abspath(photo)
        spelled = [path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]
        if not (files := people.files.rows(["hash"], path=spelled)["hash"].to_pylist()):
            raise UserError(f"--photo: found no {photo} in the gallery {people.address}")
        contents.update(files)
    found = people.table.rows(["id", "hash", "second", "box"], id=persons).to_pylist()
    found += [{"id": "", "hash": content, "second": None, "box": None} for content in contents]
    files = people.files.rows(["path", "hash"], hash={one["hash"] for one in found}).to_pylist()
    entries = [
        {**one, **file, "person": one["id"], "id": f"{file['path']} {file['hash']} {one['id']}"}
        for file in files
        for one in found
        if one["hash"] == file["hash"]
    ]
    if missing := set(persons) - {one["person"] for one in entries}:
        raise UserError(f"--person: found no {missing.pop()!r} in the gallery {people.address}")
    gone = {*persons, *people.table.rows(["id"], hash=contents)["id"].to_pylist()}
    people.forgotten.put(entries)
    people.groups.delete("person", gone)
    people.marks.delete("person", gone)
    people.marks.delete("view", gone)
    people.remove(contents, persons)
    people.forgotten.put(entries)  # for servers that have read them meanwhile: see Gallery.memory
    paths = tuple(sorted({one["path"] for one in entries}))
    return Forgot(len(gone), paths, people.purge() if for_good else None)
