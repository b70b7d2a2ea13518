"""Which results somebody found right or wrong: notes of the gallery, one per view and result."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from alignps_jax.gallery.entries import Person
from alignps_jax.gallery.people import People
from alignps_jax.gallery.tables import Note


@dataclasses.dataclass(frozen=True)
class Mark:
    """Whether `person` is the person of `view` (ids); `name` is the photo's of the view."""

    view: str
    person: str
    right: bool
    similarity: float
    name: str


class Marks:
    """The marks of a gallery. They belong to a person, whatever views a query has of it."""

    def __init__(self, people: People):
        self._notes = people.notes("marks")
        self._known: tuple[int, list[Mark]] = -1, []

    def all(self) -> list[Mark]:
        """Every mark, the oldest first."""
        version = self._notes.version
        if self._known[0] != version:
            said = [(note.people, note.content) for note in self._notes.all()]
            self._known = version, [Mark(of[0], of[1], **content) for of, content in said]
        return self._known[1]

    def about(self, views: Collection[str]) -> list[Mark]:
        """The marks of the person who is seen in some views (ids)."""
        groups = identities(self.all(), [views])
        same = next((group for group in groups if not group.isdisjoint(views)), set())
        return [mark for mark in self.all() if mark.view in same]

    def set(self, views: Sequence[Person], people: dict[str, float], right: bool | None) -> None:
        """Says of results (similarity by id) that they are right, wrong, or nothing any more."""
        if right is None:
            self.remove([view.id for view in views], people)
            return
        notes = []
        for view in views:
            for person, similarity in people.items():
                content = {"right": right, "similarity": similarity, "name": view.scene.name}
                notes.append(Note(f"{view.id}>{person}", (view.id, person), content))
        self._notes.put(notes)

    def remove(self, views: Collection[str], people: Collection[str] = ()) -> list[Note]:
        """Removes the marks of a person, all or those of some results; returns the notes."""
        gone = [one for one in self.about(views) if not people or one.person in people]
        return self._notes.remove([f"{mark.view}>{mark.person}" for mark in gone])

    def restore(self, notes: Sequence[Note]) -> None:
        """Undoes `remove`."""
        self._notes.put(notes)


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
