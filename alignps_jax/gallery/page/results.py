"""The results of a query: ranked, as far as they are likely; and where and when they were seen."""

from __future__ import annotations

import dataclasses
import datetime
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from cachetools import LRUCache
from jaxtyping import Float

from alignps_jax.evaluation.calibration import LIMIT
from alignps_jax.gallery.entries import Entry, Match
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.queries import SearchRequest, View
from alignps_jax.gallery.search import join_seconds

MAX_MATCHES = 1000
PAGE = 24  # entries that are shown at a time; it divides into rows of 2, 3, 4, 6 and 8
_REMEMBERED = 32  # queries whose results are kept for whoever scrolls
_MOST_COLUMNS = 30  # of a timeline
_STEPS = [datetime.timedelta(hours=hours) for hours in (1, 3, 6, 24, 72, 168, 720, 2160, 8760)]


@dataclasses.dataclass(frozen=True)
class Results:
    """What a query found.

    Attributes:
      entries: in the order of the query; those that are likely enough.
      hidden: the number of people that are less likely.
      least: the similarity below which people are hidden.
      searched: the number of people who passed the filter.
      recall: None: the search was exact; else the share of the best ones that it finds.
      seconds: how long it took.
      version: of the gallery.
    """

    entries: Sequence[Entry]
    hidden: int
    least: float
    searched: int
    recall: float | None
    seconds: float
    version: int

    def neighbors(self, person: str) -> tuple[Entry | None, Entry | None]:
        """The entries before and after the one of a person."""
        places = [n for n, one in enumerate(self.entries) if one.match.person.id == person]
        if not places:
            return None, None
        around = [None, *self.entries, None]
        return around[places[0]], around[places[0] + 2]


class Searcher:
    """Searches, and remembers the latest results for whoever scrolls on."""

    def __init__(self, gallery: Gallery):
        self._gallery = gallery
        self._latest: LRUCache[SearchRequest, Results] = LRUCache(_REMEMBERED)
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Has the gallery read, and the search compiled."""
        width = self._gallery.info.dim
        self._gallery.search(np.full(width, width**-0.5, np.float32), MAX_MATCHES)

    def search(self, query: SearchRequest, views: Sequence[View]) -> Results:
        """The people that are most similar to the views, in other photos than these."""
        with self._lock:
            known = self._latest.get(query)
        version = self._gallery.version
        if known is not None and known.version == version:
            return known
        begin = time.perf_counter()
        matches = ranked(self._gallery, query, views)
        took = time.perf_counter() - begin
        least = limit(query, matches)
        shown = [match for match in matches if match.similarity >= least]
        results = Results(
            entries=_sorted(join_seconds(shown), query.sort),
            hidden=len(matches) - len(shown),
            least=least,
            searched=self._gallery.searched(query.where),
            recall=self._gallery.recall,
            seconds=took,
            version=version,
        )
        with self._lock:
            self._latest[query] = results
        return results


def limit(query: SearchRequest, matches: Sequence[Match]) -> float:
    """The similarity at which results end: as asked for, else while they are likely enough."""
    if query.similarity is not None:
        return query.similarity
    known = [(one.similarity, one.probability) for one in matches if one.probability is not None]
    return max((similar + 1e-6 for similar, likely in known if likely < LIMIT), default=-1.0)


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
    """The people of other photos, best first; of several similarities to one the best counts."""
    own = {view.photo for view in views}
    best: dict[str, Match] = {}
    some = MAX_MATCHES + 10 * len(own)
    for matches in gallery.search_many(combined(query, views), some, query.where):
        for match in matches:
            scene = match.person.scene
            known = best.setdefault(match.person.id, match)
            if match.similarity > known.similarity:
                best[match.person.id] = match
            if scene.id in own or scene.hash[:24] in own:
                del best[match.person.id]
    return sorted(best.values(), key=lambda match: -match.similarity)[:MAX_MATCHES]


def _sorted(entries: list[Entry], by: str) -> list[Entry]:
    """By similarity, or by time, newest first, or so for each camera."""
    if by == "similarity":
        return entries
    never = datetime.datetime.min
    entries.sort(key=lambda one: one.match.person.scene.taken or never, reverse=True)
    if by == "camera":
        entries.sort(key=lambda one: one.match.person.scene.camera)
    return entries


@dataclasses.dataclass(frozen=True)
class Timeline:
    """How many results each camera has in each stretch of time; unknown times are left out.

    Attributes:
      starts: of the columns.
      step: length of a column.
      rows: for each camera the counts.
    """

    starts: Sequence[datetime.datetime]
    step: datetime.timedelta
    rows: Mapping[str, Sequence[int]]


def timeline(entries: Sequence[Entry]) -> Timeline | None:
    """Where and when the results were seen; None where there is nothing to tell apart."""
    scenes = [entry.match.person.scene for entry in entries]
    seen = [(scene.camera, scene.taken) for scene in scenes if scene.taken is not None]
    if len(set(seen)) < 2:
        return None
    day = min(taken for _, taken in seen).replace(hour=0, minute=0, second=0, microsecond=0)
    last = max(taken for _, taken in seen)
    step = next((step for step in _STEPS if (last - day) / step < _MOST_COLUMNS), _STEPS[-1])
    counts = Counter((camera, (taken - day) // step) for camera, taken in seen)
    columns = range(min(column for _, column in counts), max(column for _, column in counts) + 1)
    rows = {
        camera: [counts[camera, column] for column in columns]
        for camera in sorted({camera for camera, _ in seen})
    }
    return Timeline([day + column * step for column in columns], step, rows)
