"""Removes people for good, and keeps them out of the next indexing: `--mode=forget`.

The list of the forgotten holds paths, hashes of contents and boxes; no embedding, by which somebody
could be found.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import unicodedata
from collections.abc import Sequence

import jax
import numpy as np

from alignps_jax.boxes import iou
from alignps_jax.errors import UserError
from alignps_jax.gallery.people import FILE, FoundScene, People
from alignps_jax.gallery.tables import Note

# A box that overlaps a forgotten one so much is the same person's.
_SAME = 0.5


@dataclasses.dataclass(frozen=True)
class Forgot:
    """What `forget` removed; `remains`: why older states with them are still there, if so."""

    people: int
    files: tuple[str, ...]
    remains: str | None


class Forgotten:
    """The list of a gallery: `paths` and `hashes` of files of which everybody is forgotten."""

    def __init__(self, people: People):
        self._people, self._notes, self._version = people, people.notes("forgotten"), -1
        self.refresh()

    def refresh(self) -> bool:
        """Reads what others have entered; says whether they have."""
        known, self._version = self._version, self._notes.version
        if known == self._version:
            return False
        found = [note.content for note in self._notes.all()]
        self._persons = [one for one in found if one["box"]]
        self.paths = {one["path"] for one in found if not one["box"]}
        self.hashes = {one["hash"] for one in found if not one["box"]}
        return True

    def without(self, found: FoundScene) -> FoundScene | None:
        """The scene without those who are to be forgotten; None: everybody in its file is."""
        scene, people = found.scene, found.people
        if scene.path in self.paths or scene.hash in self.hashes:
            return None
        for one in self._persons:
            is_there = one["second"] == scene.second
            if is_there and (one["path"] == scene.path or one["hash"] == scene.hash):
                box = np.array(one["box"], np.float32)
                others = np.asarray(iou(np.asarray(people.boxes), box)) < _SAME
                people = jax.tree.map(lambda x, others=others: x[others], people)
        return dataclasses.replace(found, people=people)

    def enforce(self) -> None:
        """Removes whoever is on the list."""
        self._people.remove(self.hashes, [one["id"] for one in self._persons])


def forget(
    people: People, photos: Sequence[str] = (), persons: Sequence[str] = (), for_good: bool = True
) -> Forgot:
    """Forgets everybody in photos or videos (paths) and their copies, and single people (ids).

    Nothing of them stays in the tables, and notes about them go; after an interruption, call it
    again. Indexing may go on meanwhile. Unless `for_good`, older states are left to the next time,
    as for somebody who is no person. UserError if the gallery does not know a photo or person.
    """
    table, known, entries, gone = people.table, Forgotten(people).paths, [], set(persons)
    for photo in photos:
        path = os.path.abspath(photo)
        spelled = [unicodedata.normalize(form, path) for form in ("NFC", "NFD")]
        files = people.scenes.rows(["path", "hash"], kind=FILE, path=[path, *spelled]).to_pylist()
        if not files and path not in known:
            raise UserError(f"--photo: found no {photo} in the gallery {people.address}")
        entries += [file | {"id": None, "second": None, "box": None} for file in files]
    columns = ["id", "path", "hash", "second", "box"]
    hashes = [entry["hash"] for entry in entries]
    gone |= set(table.rows(["id"], hash=hashes)["id"].to_pylist())
    entries += table.rows(columns, id=list(persons)).to_pylist()
    if missing := set(persons) - {entry["id"] for entry in entries}:
        raise UserError(f"--person: found no {missing.pop()!r} in the gallery {people.address}")
    people.notes("forgotten").put(
        [Note(f"{entry['id'] or entry['path']} {entry['hash']}", (), entry) for entry in entries]
    )
    people.forget_notes(gone)
    Forgotten(people).enforce()
    if people.thumbnails:
        shutil.rmtree(people.thumbnails, ignore_errors=True)
    files = tuple(sorted({entry["path"] for entry in entries}))
    return Forgot(len(gone), files, people.purge() if for_good else None)
