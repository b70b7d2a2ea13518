"""Removes people for good: `--mode=forget`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from alignps_jax.gallery.claims import Claims
from alignps_jax.gallery.database import committing, reading
from alignps_jax.gallery.entries import Scene
from alignps_jax.gallery.forgotten import Forgotten, is_same
from alignps_jax.gallery.store import Gallery
from alignps_jax.gallery.table import (
    IS_PERSON,
    PERSON_COLUMNS,
    one_of,
    person_of,
    quoted,
    scene_of,
)
from alignps_jax.gallery.writing import purge, remove
from alignps_jax.types import UserError


def forget(gallery: Gallery, photo: str | None, person: str | None) -> None:
    """Forgets everybody in a photo or video, or a person, and says so; raises as below."""
    if person is not None:
        scene = forget_person(gallery, person)
        print(f"forgot {person} of {scene.path}")
    elif photo is not None:
        print(f"forgot {forget_photo(gallery, photo):,} people of {photo}")
    print(f"gallery  {gallery.address}: {gallery.num_people:,} people")


def forget_photo(gallery: Gallery, photo: str | Path) -> int:
    """Forgets everybody in a photo or video, and keeps its people out from now on.

    That goes for the file's path and for copies of its content. Nothing of them stays in the
    gallery's folder: everything is written anew and older states are deleted. After an
    interruption, call it again.

    Args:
      gallery: which process must write to meanwhile.
      photo: its path; the file need not be there any more.

    Returns:
      How many people were removed.

    Raises:
      UserError: the gallery does not know it, another process is indexing, or the gallery cannot
        be written.
    """
    _check_alone(gallery)
    path = os.path.realpath(photo)
    forgotten = Forgotten(gallery)
    forgotten.refresh()
    rows = _rows(gallery, f"path = {quoted(path)}")
    if not rows and path not in forgotten.files():
        raise UserError(f"--photo: found no {photo} in the gallery {gallery.address}, expected one")
    if rows and path not in forgotten.files():
        forgotten.add(scene_of(rows[0]), rows[0]["hash"], None)
        forgotten.refresh()
    condition = f"path = {quoted(path)} OR {one_of('hash', forgotten.contents(path))}"
    count = sum(row["score"] is not None for row in _rows(gallery, condition))
    remove(gallery, condition)
    purge(gallery)
    return count


def forget_person(gallery: Gallery, identity: str) -> Scene:
    """Forgets a person of one scene, as `forget_photo` does; returns the scene.

    Raises:
      UserError: there is no such person, another process is indexing, or the gallery cannot be
        written.
    """
    _check_alone(gallery)
    rows = _rows(gallery, f"id = {quoted(identity)} AND {IS_PERSON}")
    if not rows:
        raise UserError(
            f"--person: found no {identity!r} in the gallery {gallery.address}, expected the id of "
            "a person that a search gave"
        )
    person, hashed = person_of(rows[0]), rows[0]["hash"]
    Forgotten(gallery).add(person.scene, hashed, person.box.tolist())
    for row in _rows(gallery, f"hash = {quoted(hashed)} AND {IS_PERSON}"):
        other = person_of(row)
        if other.scene.second == person.scene.second and is_same(other.box, person.box):
            _remove_person(gallery, other.id)
    purge(gallery)
    return person.scene


def _remove_person(gallery: Gallery, identity: str) -> None:
    """Makes the first person of a scene nobody, since it stands for the scene; removes others."""
    nobody = {name: "NULL" for name in ("box", "score", "embedding")}

    def commit() -> None:
        gallery.table.checkout_latest()
        gallery.table.update(where=f"id = {quoted(identity)} AND number = 0", values_sql=nobody)

    committing(gallery.address, commit)
    remove(gallery, f"id = {quoted(identity)} AND number <> 0")


def _rows(gallery: Gallery, condition: str) -> list[dict[str, Any]]:
    with reading(gallery.address):
        gallery.table.checkout_latest()
        query = gallery.table.search().where(condition).select([*PERSON_COLUMNS, "hash"])
        found: list[dict[str, Any]] = query.to_arrow().to_pylist()
        return found


def _check_alone(gallery: Gallery) -> None:
    others = Claims(gallery).others()
    if others:
        raise UserError(
            f"--gallery: found {others[0]} indexing {gallery.address}, expected nobody to write "
            "to it while people are forgotten; stop that first"
        )
