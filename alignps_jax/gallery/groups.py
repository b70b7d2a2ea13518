"""Groups: the people of a gallery who are likely the same person, and what users say about them."""

from __future__ import annotations

import dataclasses
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import NOT_CALIBRATED
from alignps_jax.files import write_json
from alignps_jax.gallery.entries import Filter, Person
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.people import People
from alignps_jax.gallery.tables import Note
from alignps_jax.nearest import power_of_two_from, top_k

PER_DAY = "groups hold for a day, as re-identification sees clothes (--across_days joins days)"
_PROBABILITY = 0.5
# Neighbors of a person, itself one of them, and people in one search for them.
_NEIGHBORS, _ROWS = 16, 1024
_APART = 1e6  # a distance


@dataclasses.dataclass(frozen=True)
class Group:
    """People (ids, the most typical first) who are taken for one person.

    Attributes:
      name: empty until a user gives one.
      day: such as 2024-05-01; empty where unknown, or across days.
      by_hand: named, merged or split by a user: its people stay together, and others join them.
    """

    id: str
    name: str
    day: str
    by_hand: bool
    people: tuple[str, ...]


class Groups:
    """The groups of a gallery: a note about each person, which goes when the person is forgotten.

    A group that does not exist (any more) is a UserError.
    """

    def __init__(self, people: People):
        self.notes = people.notes("groups")
        self._known, self._version = dict[str, Group](), -1

    def all(self) -> list[Group]:
        """All groups, those with a name first, then by size."""
        if (version := self.notes.version) != self._version:
            members = defaultdict[str, list[Note]](list)
            for note in self.notes.all():
                members[note.content["id"]].append(note)
            self._known = {
                group: Group(**notes[0].content, people=tuple(note.id for note in notes))
                for group, notes in members.items()
            }
            self._version = version
        return sorted(self._known.values(), key=lambda one: (not one.name, -len(one.people)))

    def of(self, person: str) -> Group | None:
        """The group of a person."""
        return next((group for group in self.all() if person in group.people), None)

    def rename(self, group: str, name: str) -> Group:
        """Names a group."""
        return self._by_hand(self._find(group), name=name)

    def merge(self, groups: Sequence[str]) -> Group:
        """Makes one of several groups: the first, by the first name that there is."""
        found = [self._find(group) for group in dict.fromkeys(groups)]
        name = next((group.name for group in found if group.name), "")
        day = found[0].day if len({group.day for group in found}) == 1 else ""
        people = tuple(person for group in found for person in group.people)
        return self._by_hand(found[0], name=name, day=day, people=people)

    def split(self, group: str, people: Sequence[str]) -> Group:
        """Makes a group, without a name, of some people of another one."""
        found = self._find(group)
        rest = tuple(person for person in found.people if person not in people)
        self._by_hand(found, people=rest)
        split = tuple(person for person in found.people if person in people)
        return self._by_hand(found, id=uuid.uuid4().hex, name="", people=split)

    def _find(self, group: str) -> Group:
        self.all()
        if group not in self._known:
            raise UserError(f"found no group {group!r}; it was made anew, or forgotten")
        return self._known[group]

    def _by_hand(self, group: Group, **changes: Any) -> Group:
        changed = dataclasses.replace(group, by_hand=True, **changes)
        self.notes.put(notes_of(changed))
        return changed


def notes_of(group: Group) -> list[Note]:
    """What the gallery keeps of a group."""
    content = vars(group).copy()
    return [Note(person, (person,), content) for person in content.pop("people")]


def make_groups(gallery: Gallery, where: Filter, across_days: bool = False) -> list[Group]:
    """Groups the people who pass a filter, anew but for what was done by hand; gives all groups.

    Raises UserError if the gallery has no calibration, or is too large for memory.
    """
    memory, calibration, groups = gallery.memory(), gallery.calibration, Groups(gallery.people)
    if calibration is None or memory.embeddings is None:
        reason = "more people than fit into memory" if calibration else NOT_CALIBRATED
        raise UserError(f"--gallery: {gallery.address}: {reason}")
    everybody = memory.people(np.arange(len(memory)))
    inside, embeddings = memory.matching(where), np.asarray(memory.embeddings)
    days = defaultdict[str, list[int]](list)
    for row in np.flatnonzero(inside).tolist():
        taken = None if across_days else everybody[row].scene.taken
        days[f"{taken:%Y-%m-%d}" if taken else ""].append(row)
    known = {person: one for one in groups.all() if one.by_hand for person in one.people}
    number = {one.id: place for place, one in enumerate(known.values(), 1)}
    made: list[Note] = []
    for day, rows in days.items():
        today = [everybody[row].id for row in rows]
        fixed = np.array([number[known[one].id] if one in known else 0 for one in today])
        limit = calibration.least(_PROBABILITY, len(rows))
        for cluster in clusters(embeddings[rows], memory.scene[rows], limit, fixed):
            ids = [today[place] for place in cluster]
            group = next((known[one] for one in ids if one in known), None)
            group = group or Group(uuid.uuid4().hex, "", day, False, ())
            new = tuple(one for one in ids if one not in known)
            made += notes_of(dataclasses.replace(group, people=new))
    kept = {note.id for note in made} | {everybody[row].id for row in np.flatnonzero(~inside)}
    groups.notes.remove({note.id for note in groups.notes.all()} - known.keys() - kept)
    groups.notes.put(made)
    return groups.all()


def write_groups(
    gallery: Gallery, where: Filter, across_days: bool, target: Path
) -> list[dict[str, object]]:
    """Makes groups (`make_groups`), writes them as JSON, prints a summary; returns the content."""
    groups, memory = make_groups(gallery, where, across_days), gallery.memory()
    people = {one.id: one for one in memory.people(np.arange(len(memory)))}
    content = [
        vars(one) | {"people": [_where(people[i]) for i in one.people if i in people]}
        for one in groups
    ]
    write_json(target, content)
    sizes = [len(group.people) for group in groups]
    print(f"{sum(sizes):,} of {len(people):,} people in {len(sizes):,} groups {sizes[:9]}")
    print(f"{'groups across days' if across_days else PER_DAY}\ngroups  {target}")
    return content


def _where(person: Person) -> dict[str, object]:
    place = {"image": person.scene.path, "second": person.scene.second}
    return {"person": person.id, **place, "box": person.box.round(2).tolist()}


def clusters(
    embeddings: Float[np.ndarray, "N D"],
    scene: Int[np.ndarray, "N"],
    limit: float,
    fixed: Int[np.ndarray, "N"],
    most: int = 8192,
) -> Iterator[Int[np.ndarray, "_"]]:
    """Rows of people with a mean similarity of at least `limit`, the most typical person first.

    People of one scene stay apart, and so do those with different numbers above 0 in `fixed`; those
    with the same one belong together. Who is alone is left out. Where more than `most` are chained
    together, the limit rises for these, up to 0.9, from where a chain counts as one person.
    """
    for rows in connected(embeddings, limit, fixed):
        own, place, name = embeddings[rows], scene[rows], fixed[rows]
        if len(rows) > most:
            many = limit < 0.9 and clusters(own, place, limit + 0.05, name, most)
            yield from (rows[one] for one in many or [slice(None)])
            continue
        # Average linkage: by single pairs, chains of people would soon connect everybody.
        distance, known = 1 - own @ own.T, np.minimum.outer(name, name) > 0
        distance[np.equal.outer(place, place) | known] = _APART
        distance[np.equal.outer(name, name) & known] = 0
        np.fill_diagonal(distance, 0)
        tree = linkage(squareform(distance, checks=False), "average")
        label = fcluster(tree, 1 - limit, "distance")
        for number in np.flatnonzero(np.bincount(label) > 1):
            members = np.flatnonzero(label == number)
            yield rows[members[np.argsort(-(own[members] @ own[members].sum(axis=0)))]]


def connected(
    embeddings: Float[np.ndarray, "N D"], limit: float, fixed: Int[np.ndarray, "N"]
) -> list[Int[np.ndarray, "_"]]:
    """Rows of people, at least two, whom near neighbors connect."""
    count = len(embeddings)
    padded = np.zeros((max(_ROWS, power_of_two_from(count)), embeddings.shape[1]), np.float32)
    padded[:count] = embeddings
    everybody, among = jax.device_put(padded), np.arange(len(padded)) < count
    known = np.flatnonzero(fixed)
    _, first, name = np.unique(fixed[known], return_index=True, return_inverse=True)
    pairs = [(known, known[first[name]])]
    for start in range(0, count, _ROWS):
        near = top_k(padded[start : start + _ROWS], everybody, _NEIGHBORS, among=among)
        row, place = np.nonzero(np.asarray(near.similarity)[: count - start] >= limit)
        pairs.append((row + start, np.asarray(near.index)[row, place]))
    one, other = map(np.concatenate, zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(one)), (one, other)), (count, count))
    part = connected_components(graph, directed=False)[1]
    order = np.argsort(part, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(part[order])) + 1)
    return [rows for rows in parts if len(rows) > 1]
