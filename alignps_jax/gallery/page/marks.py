"""Which results somebody found right or wrong: notes of the gallery, one per view and result."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.queries import View
from alignps_jax.gallery.tables import Note


@dataclasses.dataclass(frozen=True)
class Mark:
    """Whether `person` is the person of `view` (ids); `name` is the photo's of an uploaded view."""

    view: str
    person: str
    right: bool
    similarity: float
    name: str


class Marks:
    """The marks of a gallery. They belong to a person, whatever views a query has of it."""

    def __init__(self, gallery: Gallery):
        self._gallery = gallery
        self._known: tuple[int, list[Mark]] = -1, []

    def all(self) -> list[Mark]:
        """Every mark, the oldest first."""
        notes = self._gallery.people.notes("marks")
        version = notes.version
        if self._known[0] != version:
            self._known = version, [_mark(note) for note in notes.all()]
        return self._known[1]

    def of(self, views: Collection[str]) -> dict[str, bool]:
        """What was said of results of the person of these views, by the results' ids."""
        same = next((one for one in identities(self.all(), [views]) if one & {*views}), set())
        return {mark.person: mark.right for mark in self.all() if mark.view in same}

    def set(
        self, views: Sequence[View], people: Sequence[tuple[str, float]], right: bool | None
    ) -> list[Note]:
        """Says of results (ids and similarities) that they are right, wrong, or nothing any more.

        Returns the notes that went.
        """
        notes = self._gallery.people.notes("marks")
        marks = [
            Mark(view.id, person, bool(right), similarity, "" if view.person else view.name)
            for view in views
            for person, similarity in people
        ]
        if right is not None:
            notes.put([_note(mark) for mark in marks])
            return []
        return self.remove([view.id for view in views], [person for person, _ in people])

    def remove(self, views: Collection[str], people: Collection[str] = ()) -> list[Note]:
        """Removes the marks of a person, or those about some people; returns them for `restore`."""
        same = next((one for one in identities(self.all(), [views]) if one & {*views}), set())
        gone = {
            f"{mark.view}>{mark.person}"
            for mark in self.all()
            if mark.view in same and (not people or mark.person in people)
        }
        return self._gallery.people.notes("marks").remove(gone)

    def restore(self, notes: Sequence[Note]) -> None:
        """Undoes `remove`."""
        self._gallery.people.notes("marks").put(notes)


def _mark(note: Note) -> Mark:
    view, person = note.people
    return Mark(view, person, **note.content)


def _note(mark: Mark) -> Note:
    content = dataclasses.asdict(mark)
    people = content.pop("view"), content.pop("person")
    return Note(f"{mark.view}>{mark.person}", people, content)


def identities(marks: Iterable[Mark], views: Iterable[Collection[str]] = ()) -> list[set[str]]:
    """The people who were told apart, each as the ids of its views and right results.

    `views`: ids that are the same person besides.
    """
    found: list[set[str]] = []
    groups = [{mark.view, mark.person} if mark.right else {mark.view} for mark in marks]
    for group in [*groups, *map(set, views)]:
        for known in [known for known in found if known & group]:
            found.remove(known)
            group |= known
        found.append(group)
    return found
