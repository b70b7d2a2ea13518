"""Groups: the people of a gallery who are likely the same person, and what users say about them."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import NOT_CALIBRATED
from alignps_jax.files import write_json
from alignps_jax.gallery.entries import Filter
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.people import People
from alignps_jax.gallery.search import place
from alignps_jax.nearest import power_of_two_from, top_k

# Neighbors of a person, itself one of them, and similarities that are in memory at a time.
_NEIGHBORS, _SIMILARITIES = 16, 1 << 26


@dataclasses.dataclass(frozen=True)
class Group:
    """People (ids, the most typical first) who are taken for one person.

    `name` is empty until a user gives one; `day`, such as 2024-05-01, where unknown or across days.
    Who was put together `by_hand` stays together, and others join them.
    """

    id: str
    name: str
    day: str
    by_hand: bool
    people: list[str]


class Groups:
    """The groups of a gallery: a row for each person, gone when the person is forgotten."""

    def __init__(self, people: People):
        self.table = people.groups

    def all(self) -> list[Group]:
        """All groups, those with a name first, then by size."""
        rows = self.table.rows().sort_by("at")
        rows = rows.group_by(["id", "name", "day", "by_hand"], use_threads=False)
        found = rows.aggregate([("person", "list")]).rename_columns({"person_list": "people"})
        groups = (Group(**row) for row in found.to_pylist())
        return sorted(groups, key=lambda one: (not one.name, -len(one.people)))

    def by_person(self) -> dict[str, Group]:
        """The group of each person who is in one."""
        return {person: one for one in self.all() for person in one.people}

    def put(self, people: Iterable[str], name: str | None = None) -> Group:
        """Makes one group of people of some groups; `name`: by default the first that they have.

        Who stays behind there stays apart. UserError if all of them are in no group (any more).
        """
        rows, wanted = self.table.rows().sort_by("at").to_pylist(), set(people)
        chosen = [row for row in rows if row["person"] in wanted]
        if not chosen:
            raise UserError("found nobody of a group; it was made anew, or forgotten")
        if name is None:
            name = next((row["name"] for row in chosen if row["name"]), "")
        day, *others = {row["day"] for row in chosen}
        same = [row["person"] for row in chosen]
        made = Group(uuid.uuid4().hex, name, "" if others else day, True, same)
        before = {row["id"] for row in chosen}
        rest = [row | {"by_hand": True} for row in rows if row["id"] in before]
        self.table.put([row | vars(made) for row in chosen] + rest)  # of each person the first one
        return made


def make_groups(gallery: Gallery, where: Filter, across_days: bool = False) -> list[Group]:
    """Groups the people who pass a filter, anew but for what was done by hand; gives all groups.

    Raises UserError if the gallery has no calibration, or is too large for memory.
    """
    memory, calibration, groups = gallery.memory(), gallery.calibration, Groups(gallery.people)
    if calibration is None or memory.embeddings is None:
        reason = "more people than fit into memory" if calibration else NOT_CALIBRATED
        raise UserError(f"--gallery: {gallery.address}: {reason}")
    everybody, inside = memory.people(np.arange(len(memory))), memory.matching(where)
    embeddings = np.asarray(memory.embeddings)
    times = (None if across_days else one.scene.taken for one in everybody)
    days = np.array([f"{taken:%Y-%m-%d}" if taken else "" for taken in times])
    fixed = [one for one in groups.all() if one.by_hand]
    numbers = {person: turn for turn, one in enumerate(fixed, 1) for person in one.people}
    number = np.array([numbers.get(one.id, 0) for one in everybody], int)
    made = dict[str, Group]()
    for day in np.unique(days[inside]):
        today = np.flatnonzero(inside & (days == day))
        limit = calibration.least(0.5, len(today))
        for cluster in clusters(embeddings[today], memory.scene[today], limit, number[today]):
            found = today[cluster]
            group = [Group(uuid.uuid4().hex, "", str(day), False, []), *fixed][number[found].max()]
            made |= {everybody[row].id: group for row in found if not number[row]}
    # Users may have named some meanwhile.
    known = groups.by_person()
    kept = {person for person, one in known.items() if one.by_hand}
    outside = {everybody[row].id for row in np.flatnonzero(~inside)}
    groups.table.delete("person", known.keys() - made.keys() - kept - outside)
    new = [(person, one) for person, one in made.items() if person not in kept]
    groups.table.put([vars(one) | {"person": person, "at": time.time()} for person, one in new])
    return groups.all()


def write_groups(
    gallery: Gallery, where: Filter, across_days: bool, target: Path
) -> list[dict[str, object]]:
    """Makes groups (`make_groups`), writes them as JSON, prints a summary; returns the content."""
    groups, memory = make_groups(gallery, where, across_days), gallery.memory()
    places = {one.id: place(one) for one in memory.people(np.arange(len(memory)))}
    content = [
        vars(one) | {"people": [places[i] for i in one.people if i in places]} for one in groups
    ]
    write_json(target, content)
    count = sum(len(group.people) for group in groups)
    print(f"{count:,} of {len(places):,} people in {len(groups):,} groups\ngroups  {target}")
    if not across_days:
        print("groups hold for a day: re-identification sees clothes (--across_days joins days)")
    return content


def clusters(
    embeddings: Float[np.ndarray, "N D"],
    scene: Int[np.ndarray, "N"],
    limit: float,
    number: Int[np.ndarray, "N"],
) -> list[Int[np.ndarray, "_"]]:
    """Rows of people who are taken for one person, the most typical first; nobody alone.

    Neighbors, the most similar first, join their clusters where the mean similarity between these
    is at least `limit` and no scene is in both. Those with the same `number` above 0 are together
    from the start, those with different ones stay apart.
    """
    count = len(number)
    size = power_of_two_from(max(1024, count))  # few programs are compiled
    padded, among = np.pad(embeddings, ((0, size - count), (0, 0))), np.arange(size) < count
    near = jax.device_get(top_k(padded, padded, _NEIGHBORS, _SIMILARITIES // size, among))
    similarity = near.similarity[:count].ravel()
    order = np.argsort(-similarity, kind="stable")[: (similarity >= limit).sum()]
    pairs = np.stack([order // _NEIGHBORS, near.index.ravel()[order]], axis=1)
    cluster = [[row] for row in range(count)]
    for known in set(number.tolist()) - {0}:
        together = np.flatnonzero(number == known).tolist()
        for row in together:
            cluster[row] = together
    for pair in pairs.tolist():
        one, other = sorted((cluster[row] for row in pair), key=lambda rows: -number[rows[0]])
        if one is other or number[other[0]]:
            continue
        mean = embeddings[one].mean(axis=0) @ embeddings[other].mean(axis=0)
        if mean >= limit and set(scene[one]).isdisjoint(scene[other]):
            one += other
            for row in other:
                cluster[row] = one
    several = [np.array(one) for row, one in enumerate(cluster) if row == one[0] and one[1:]]
    return [one[np.argsort(-(embeddings[one] @ embeddings[one].sum(axis=0)))] for one in several]
