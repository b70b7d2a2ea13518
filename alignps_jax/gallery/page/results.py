"""Queries as an address says them, and their results: ranked; where and when they were seen."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from operator import attrgetter
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlencode

import numpy as np
from cachetools import LRUCache, cachedmethod
from jaxtyping import Float
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NaiveDatetime, ValidationError
from starlette.datastructures import ImmutableMultiDict

from alignps_jax.gallery.entries import Entry, Filter, Match
from alignps_jax.gallery.page.uploads import Photos
from alignps_jax.gallery.search import join_seconds, likely

MAX_VIEWS = 24
MAX_MATCHES = 1000
PAGE = 24  # entries that are shown at a time; it divides into rows of 2, 3, 4, 6 and 8
_REMEMBERED = 32  # queries whose results are kept for whoever scrolls
_MOST_COLUMNS = 30  # of a timeline
_STEPS = [datetime.timedelta(hours=hours) for hours in (1, 3, 6, 24, 72, 168, 720, 2160, 8760)]
_FIRST, _LAST = datetime.datetime(1800, 1, 1), datetime.datetime(3000, 1, 1)

# An empty field of a form says nothing.
_optional = BeforeValidator(lambda value: value or None)
_Time = Annotated[Annotated[NaiveDatetime, Field(ge=_FIRST, le=_LAST)] | None, _optional]
_Share = Annotated[Annotated[float, Field(ge=-1, le=1)] | None, _optional]
_Several = Annotated[
    tuple[str, ...], BeforeValidator(lambda values: tuple(dict.fromkeys(filter(None, values))))
]


class SearchRequest(BaseModel):
    """Whom to search (`view`: ids of people), where, and how to show the results.

    By "best" it searches with each view, and the best similarity of a result counts. `score` is the
    detector's; results end below `similarity`, by default where they are not likely any more.
    """

    model_config = ConfigDict(frozen=True)

    view: Annotated[_Several, Field(max_length=MAX_VIEWS)] = ()
    combine: Literal["mean", "best"] = "mean"
    folder: str = ""
    camera: _Several = ()
    after: _Time = None
    before: _Time = None
    score: _Share = None
    kind: Literal["", "photo", "video"] = ""
    similarity: _Share = None
    sort: Literal["similarity", "time", "camera"] = "similarity"

    @classmethod
    def lenient(cls, params: ImmutableMultiDict[str, Any]) -> Self:
        """The query of an address or a form, without the fields that are wrong."""
        several = {name: params.getlist(name) for name in ("view", "camera")}
        found = {**params, **several}
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            wrong = {one["loc"][0] for one in error.errors()}
            return cls.model_validate({k: v for k, v in found.items() if k not in wrong})

    @property
    def where(self) -> Filter:
        """The filter."""
        times = self.after, self.before
        return Filter(self.folder or None, self.camera, *times, self.score, self.kind or None)

    @property
    def is_filtered(self) -> bool:
        return self.where != Filter()

    def pairs(self, **changes: Any) -> list[tuple[str, str]]:
        """Names and values as they stand in the address; `changes` replaces or adds fields."""
        default = SearchRequest().model_dump(mode="json")
        values = self.model_dump(mode="json", include=set(default))
        values = {k: v for k, v in values.items() if v != default[k]} | changes
        return [
            (name, str(value))
            for name, found in values.items()
            for value in (found if isinstance(found, list | tuple) else [found])
            if value not in ("", None)
        ]

    def address(self, page: str, **changes: Any) -> str:
        """The address of a page with this query; `changes` as in `pairs`."""
        pairs = self.pairs(**changes)
        return f"{page}?{urlencode(pairs)}" if pairs else page

    def joined(self, views: Iterable[str], without: str = "") -> list[str]:
        """The views and some more, the newest ones if they are too many."""
        known = dict.fromkeys([*self.view, *views])
        return [view for view in known if view != without][-MAX_VIEWS:]

    def unfiltered(self) -> SearchRequest:
        """The same views, searched among everybody."""
        return SearchRequest(view=self.view, combine=self.combine, sort=self.sort)


@dataclasses.dataclass(frozen=True)
class Results:
    """The likely results among `searched` people; below the similarity `least`, some are hidden."""

    entries: Sequence[Entry]
    hidden: int
    least: float
    searched: int
    recall: float | None

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
        return query, self._gallery.memory().version

    @cachedmethod(attrgetter("_latest"), _key, attrgetter("_lock"))
    def search(self, query: SearchRequest) -> Results:
        """The people that are most similar to the views, in other photos than these."""
        matches = self._ranked(query)
        least = query.similarity
        if least is None:  # cut at the first unlikely match
            unlikely = matches[len(likely(matches)) :]
            least = unlikely[0].similarity + 1e-6 if unlikely else -1.0
        shown = [match for match in matches if match.similarity >= least]
        entries, hidden = _sorted(join_seconds(shown), query.sort), len(matches) - len(shown)
        memory = self._gallery.memory()
        return Results(entries, hidden, least, memory.count(query.where), memory.recall)

    def embeddings(self, query: SearchRequest) -> Float[np.ndarray, "Q D"]:
        """What to search with: one embedding, or one for each view."""
        embeddings = self._photos.embeddings(query.view)
        if query.combine == "best":
            return embeddings
        mean = embeddings.mean(axis=0, keepdims=True)
        return mean / max(np.linalg.norm(mean), 1e-6)  # of opposite ones it has no length

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
    never = datetime.datetime.min
    if by != "similarity":
        entries.sort(key=lambda one: one.match.person.scene.taken or never, reverse=True)
    if by == "camera":
        entries.sort(key=lambda one: one.match.person.scene.camera)
    return entries


def timeline(entries: Sequence[Entry]) -> dict[str, Any]:
    """Counts of results for each camera (`rows`) and `step` of time; {} if all are the same."""
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
