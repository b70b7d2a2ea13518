"""The results of a query: ranked, as far as they are likely; and where and when they were seen."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import threading
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
from cachetools import LRUCache, cachedmethod
from jaxtyping import Float

from alignps_jax.gallery.entries import Entry, Match
from alignps_jax.gallery.page.queries import SearchRequest
from alignps_jax.gallery.page.uploads import Photos
from alignps_jax.gallery.search import join_seconds, likely

MAX_MATCHES = 1000
PAGE = 24  # entries that are shown at a time; it divides into rows of 2, 3, 4, 6 and 8
_REMEMBERED = 32  # queries whose results are kept for whoever scrolls
_MOST_COLUMNS = 30  # of a timeline
_STEPS = [datetime.timedelta(hours=hours) for hours in (1, 3, 6, 24, 72, 168, 720, 2160, 8760)]


@dataclasses.dataclass(frozen=True)
class Results:
    """The likely results of a query in its order, and how many people are `hidden` below `least`.

    `searched` people passed the filter; `recall` is that of `Gallery`.
    """

    entries: Sequence[Entry]
    hidden: int
    least: float
    searched: int
    recall: float | None
    seconds: float

    def neighbors(self, person: str) -> tuple[Entry | None, Entry | None]:
        """The entries before and after the one of a person."""
        around = [None, *self.entries, None]
        for before, entry, after in zip(around, self.entries, around[2:], strict=False):
            if entry.match.person.id == person:
                return before, after
        return None, None


class Searcher:
    """Searches, and remembers the latest results for whoever scrolls on."""

    def __init__(self, photos: Photos):
        self._photos, self._gallery = photos, photos.gallery
        self._latest: LRUCache[Hashable, Results] = LRUCache(_REMEMBERED)
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Has the gallery read, and the search compiled."""
        width = self._gallery.info.dim
        self._gallery.search(np.full(width, width**-0.5, np.float32), MAX_MATCHES)

    def _key(self, query: SearchRequest) -> Hashable:
        return query, self._gallery.version

    @cachedmethod(attrgetter("_latest"), _key, attrgetter("_lock"))
    def search(self, query: SearchRequest) -> Results:
        """The people that are most similar to the views, in other photos than these."""
        begin = time.perf_counter()
        matches = self._ranked(query)
        seconds = time.perf_counter() - begin
        least = query.similarity
        if least is None:  # the first one that is not likely, and everybody after it
            unlikely = matches[len(likely(matches)) :]
            least = unlikely[0].similarity + 1e-6 if unlikely else -1.0
        shown = [match for match in matches if match.similarity >= least]
        entries, hidden = _sorted(join_seconds(shown), query.sort), len(matches) - len(shown)
        searched, recall = self._gallery.searched(query.where), self._gallery.recall
        return Results(entries, hidden, least, searched, recall, seconds)

    def embeddings(self, query: SearchRequest) -> Float[np.ndarray, "Q D"]:
        """What to search with: one embedding, or one for each view."""
        embeddings = self._photos.embeddings(query.view)
        if query.combine == "best":
            return embeddings
        mean = embeddings.mean(axis=0, keepdims=True)
        length = np.linalg.norm(mean)
        # Opposite ones have no mean direction.
        return mean / length if length > 1e-6 else embeddings[:1]

    def _ranked(self, query: SearchRequest) -> list[Match]:
        """Of several similarities to a person the best counts."""
        own = {self._photos.person(view).scene.id for view in query.view}
        some = MAX_MATCHES + 10 * len(own)
        each = self._gallery.search_many(self.embeddings(query), some, query.where)
        best: dict[str, Match] = {}
        for match in sorted(itertools.chain(*each), key=lambda match: -match.similarity):
            if match.person.scene.id not in own:
                best.setdefault(match.person.id, match)
        return self._gallery.judged([*best.values()][:MAX_MATCHES], query.where)


def _sorted(entries: list[Entry], by: str) -> list[Entry]:
    """By similarity, or by time, newest first, or so for each camera."""
    if by == "similarity":
        return entries
    never = datetime.datetime.min
    entries.sort(key=lambda one: one.match.person.scene.taken or never, reverse=True)
    if by == "camera":
        entries.sort(key=lambda one: one.match.person.scene.camera)
    return entries


def timeline(entries: Sequence[Entry]) -> dict[str, Any]:
    """How many results each camera has (`rows`) in stretches of time: their `starts` and `step`.

    Unknown times are left out; {} where there is nothing to tell apart.
    """
    scenes = [entry.match.person.scene for entry in entries]
    seen = [(scene.camera, scene.taken) for scene in scenes if scene.taken is not None]
    if len(set(seen)) < 2:
        return {}
    day = min(taken for _, taken in seen).replace(hour=0, minute=0, second=0, microsecond=0)
    last = max(taken for _, taken in seen)
    step = next((step for step in _STEPS if (last - day) / step < _MOST_COLUMNS), _STEPS[-1])
    counts = Counter((camera, (taken - day) // step) for camera, taken in seen)
    columns = range(min(column for _, column in counts), max(column for _, column in counts) + 1)
    cameras = sorted({camera for camera, _ in seen})
    rows = {camera: [counts[camera, column] for column in columns] for camera in cameras}
    return {"starts": [day + column * step for column in columns], "step": step, "rows": rows}
