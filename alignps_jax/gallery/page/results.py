"""The results of a query: ranked, with what a video shows in neighboring seconds as one entry."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence

import numpy as np
from cachetools import LRUCache
from jaxtyping import Float

from alignps_jax.gallery.entries import Match, Person
from alignps_jax.gallery.page.queries import SearchRequest, View
from alignps_jax.gallery.store import Gallery

MAX_MATCHES = 1000
PAGE = 24  # entries that are shown at a time; it divides into rows of 2, 3, 4, 6 and 8
_NEIGHBORS = 2  # seconds
_REMEMBERED = 32  # queries whose results are kept for whoever scrolls


@dataclasses.dataclass
class Entry:
    """A result: a person in a photo, or in a stretch of a video.

    Attributes:
      match: the most similar one.
      people: all that were put together here.
    """

    match: Match
    people: list[Person]

    @property
    def seconds(self) -> tuple[float, float] | None:
        """First and last second in the video; None for a photo."""
        seconds = [one.scene.second for one in self.people if one.scene.second is not None]
        return (min(seconds), max(seconds)) if seconds else None


def _can_walk(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"], seconds: float) -> bool:
    """Whether a person can get from box to box: as tall, and its own height away in a second."""
    tall_a, tall_b = a[3] - a[1], b[3] - b[1]
    distance = np.hypot(*((a[:2] + a[2:]) - (b[:2] + b[2:])) / 2)
    tall, small = max(tall_a, tall_b), min(tall_a, tall_b)
    return bool(tall <= 1.5 * small and distance <= tall * max(seconds, 0.5))


@dataclasses.dataclass(frozen=True)
class Results:
    """What a query found.

    Attributes:
      entries: best first.
      matches: how many people they are; never more than MAX_MATCHES.
      searched: how many people passed the filter; None where that is not known.
      seconds: how long it took.
    """

    entries: Sequence[Entry]
    matches: int
    searched: int | None
    seconds: float


def summary(found: Results, query: SearchRequest, views: Sequence[View], people: int) -> str:
    """Who was searched and how long it took, in a line.

    Args:
      people: how many the gallery has.
    """
    if found.searched is None:
        whom = f"those of {people:,} people who pass the filter"
    else:
        one = "person" if found.searched == 1 else "people"
        passing = " who passed the filter" if query.is_filtered else ""
        whom = f"{found.searched:,} {one}{passing}"
    shown = f"; these are the {MAX_MATCHES:,} most similar" if found.matches >= MAX_MATCHES else ""
    how = f", by the {query.combine} of the views" if len(views) > 1 else ""
    seconds = found.seconds
    took = f"{seconds:.2f} s" if seconds >= 0.1 else f"{max(1, round(1000 * seconds))} ms"
    return f"Searched {whom} in {took}{how}{shown}."


class Searcher:
    """Searches, and remembers the latest results for whoever scrolls on."""

    def __init__(self, gallery: Gallery):
        self._gallery = gallery
        self._latest: LRUCache[SearchRequest, Results] = LRUCache(_REMEMBERED)
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Has the gallery read, and the search compiled."""
        if self._gallery.num_people:
            width = self._gallery.about.dim
            self._gallery.search(np.full((1, width), width**-0.5, np.float32), MAX_MATCHES)

    def search(self, query: SearchRequest, views: Sequence[View]) -> Results:
        """The people that are most similar to the views, without the views themselves."""
        begin = time.perf_counter()
        matches = ranked(self._gallery, query, views)
        took = time.perf_counter() - begin
        searched = self._count(query)
        results = Results(grouped(matches), len(matches), searched, took)
        with self._lock:
            self._latest[query] = results
        return results

    def _count(self, query: SearchRequest) -> int | None:
        memory = self._gallery.memory()
        if memory is not None:
            return int(memory.matching(query.where).sum()) if query.is_filtered else len(memory)
        return None if query.is_filtered else self._gallery.num_people

    def latest(self, query: SearchRequest, views: Sequence[View]) -> Results:
        """The remembered results, else those of another search."""
        with self._lock:
            known = self._latest.get(query)
        return known if known is not None else self.search(query, views)


def combined(query: SearchRequest, views: Sequence[View]) -> Float[np.ndarray, "Q D"]:
    """What to search with: one embedding, or one for each view."""
    embeddings = np.stack([view.embedding for view in views]).astype(np.float32)
    if query.combine == "best":
        return embeddings
    mean = embeddings.mean(axis=0, keepdims=True)
    length = np.linalg.norm(mean)
    # Opposite ones have no mean direction.
    return mean / length if length > 1e-6 else embeddings[:1]


def ranked(gallery: Gallery, query: SearchRequest, views: Sequence[View]) -> list[Match]:
    """The people of the gallery, best first, each once; of several similarities the best counts."""
    own = {view.id for view in views}
    best: dict[str, Match] = {}
    for matches in gallery.search(combined(query, views), MAX_MATCHES + len(own), query.where):
        for match in matches:
            known = best.get(match.person.id)
            if known is None or match.similarity > known.similarity:
                best[match.person.id] = match
    found = [match for match in best.values() if match.person.id not in own]
    return sorted(found, key=lambda match: -match.similarity)[:MAX_MATCHES]


def grouped(matches: Sequence[Match]) -> list[Entry]:
    """The matches, those of neighboring seconds of a video as one entry, at the best one's place.

    A person joins an entry that shows somebody as tall, at most two seconds away, near enough to
    walk there; whoever stands in the same frame is somebody else. An entry takes what comes later
    in the ranking, so the order of entries never depends on it.
    """
    entries: list[Entry] = []
    # Who was seen in each second of each video: the number of the entry, the person, and when.
    around: dict[tuple[str, int], list[tuple[int, Person, float]]] = {}
    for match in matches:
        person = match.person
        second = person.scene.second
        if second is None:
            entries.append(Entry(match, [person]))
            continue
        near = {
            number
            for turn in range(-_NEIGHBORS, _NEIGHBORS + 1)
            for number, known, when in around.get((person.scene.path, int(second) + turn), ())
            if 0 < abs(when - second) <= _NEIGHBORS
            and _can_walk(known.box, person.box, abs(when - second))
            and all(one.scene.second != second for one in entries[number].people)
        }
        number = min(near, default=len(entries))
        if number == len(entries):
            entries.append(Entry(match, []))
        entries[number].people.append(person)
        around.setdefault((person.scene.path, int(second)), []).append((number, person, second))
    return entries
