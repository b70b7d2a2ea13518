"""A query as an address says it: views of one person, how to combine them, where to look.

Such an address can be kept and shared. Views of people of the gallery stay valid as long as the
gallery has them; views of an uploaded photo as long as the server keeps the photo.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlencode

import numpy as np
from jaxtyping import Float

from alignps_jax.gallery.entries import Filter, Person
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.gallery.page.finder import Finder
from alignps_jax.types import UserError

MAX_VIEWS = 12
MEAN, BEST = "mean", "best"
_UPLOADED = re.compile(r"up\.([0-9a-f]{24})\.(\d{1,4})")
_FIELDS = ("view", "combine", "folder", "camera", "after", "before", "score", "kind")
_KINDS: dict[str, Any] = {"": None, "photos": "photo", "videos": "video"}

_EVERYBODY = Filter()
Pairs = Sequence[tuple[str, str]]


def uploaded_view(upload_id: str, row: int) -> str:
    """The id of a person of an uploaded photo."""
    return f"up.{upload_id}.{row}"


@dataclasses.dataclass(frozen=True)
class View:
    """A person of the query.

    Attributes:
      id: as the address has it.
      name: of the photo.
      page: address of the complete photo.
      picture: address of the enlarged person.
      box: x1, y1, x2, y2 in pixels of the photo.
      embedding: of length one.
      person: None if the photo was uploaded.
    """

    id: str
    name: str
    page: str
    picture: str
    box: Float[np.ndarray, "4"]
    embedding: Float[np.ndarray, "D"]
    person: Person | None


@dataclasses.dataclass(frozen=True)
class Query:
    """What an address asks for.

    Attributes:
      views: ids of people, in the order in which they were added.
      combine: MEAN searches with the mean of their embeddings; BEST with each, and of each result
        the best similarity counts.
      where: who is searched.
    """

    views: tuple[str, ...] = ()
    combine: str = MEAN
    where: Filter = _EVERYBODY

    def pairs(self, **changes: str | Iterable[str]) -> list[tuple[str, str]]:
        """Names and values as they stand in the address; `changes` replaces or adds fields."""
        where = self.where
        kind = next(name for name, value in _KINDS.items() if value == where.kind)
        values: dict[str, str | Iterable[str]] = {
            "view": self.views,
            "combine": self.combine if self.combine != MEAN else "",
            "folder": where.folder or "",
            "camera": where.cameras,
            "after": where.after.isoformat() if where.after else "",
            "before": where.before.isoformat() if where.before else "",
            "score": f"{where.min_score:g}" if where.min_score is not None else "",
            "kind": kind,
        } | changes
        return [
            (name, value)
            for name, found in values.items()
            for value in ([found] if isinstance(found, str) else found)
            if value
        ]

    def address(self, page: str, **changes: str | Iterable[str]) -> str:
        """The address of a page with this query; `changes` as in `pairs`."""
        pairs = self.pairs(**changes)
        # Names of files need not be text.
        return f"{page}?{urlencode(pairs, errors='surrogateescape')}" if pairs else page

    def with_view(self, view: str) -> tuple[str, ...]:
        """The views and this one."""
        return (*(known for known in self.views if known != view), view)

    def without_view(self, view: str) -> tuple[str, ...]:
        """The views but this one."""
        return tuple(known for known in self.views if known != view)

    def anew(self) -> Query:
        """A query without views that searches the same people."""
        return Query(where=self.where)

    @property
    def is_filtered(self) -> bool:
        return self.where != _EVERYBODY


def parse_query(pairs: Pairs) -> Query:
    """The query of an address; other fields than those of a query are passed over.

    Raises:
      UserError: a value is not one.
    """
    found: dict[str, list[str]] = {name: [] for name in _FIELDS}
    for name, value in pairs:
        if value and name in found:
            found[name].append(value)
    single = {name: (values or [""])[-1] for name, values in found.items()}
    views = tuple(dict.fromkeys(found["view"]))
    if len(views) > MAX_VIEWS:
        raise UserError(f"A query can have {MAX_VIEWS} views; this one has {len(views)}.")
    combine = single["combine"] or MEAN
    if combine not in (MEAN, BEST):
        raise UserError(f"Views are combined by {MEAN} or {BEST}, not by {combine[:20]!r}.")
    if single["kind"] not in _KINDS:
        raise UserError(f"The kind is photos or videos, not {single['kind'][:20]!r}.")
    where = Filter(
        folder=single["folder"] or None,
        cameras=tuple(dict.fromkeys(found["camera"])),
        after=_moment("from", single["after"]),
        before=_moment("until", single["before"]),
        min_score=_score(single["score"]),
        kind=_KINDS[single["kind"]],
    )
    return Query(views, combine, where)


def _moment(name: str, text: str) -> datetime.datetime | None:
    if not text:
        return None
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is not None or not 1800 <= moment.year <= 3000:
        raise UserError(f"{name}: {text[:30]!r} is no date and time (2026-05-31T14:00).")
    return moment


def _score(text: str) -> float | None:
    if not text:
        return None
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise UserError(f"score: {text[:20]!r} is no number from 0 to 1.")
    return score


def parse_box(text: str) -> Float[np.ndarray, "4"]:
    """The corners of "x1,y1,x2,y2", in pixels.

    Raises:
      UserError: it is no box.
    """
    try:
        corners = np.array([float(number) for number in text.split(",")], np.float32)
    except ValueError:
        corners = np.zeros(0, np.float32)
    if corners.shape != (4,) or not np.isfinite(corners).all() or np.abs(corners).max() > 1e6:
        raise UserError(f"box: {text[:40]!r} is not x1,y1,x2,y2 in pixels.")
    x1, y1, x2, y2 = corners
    if not (x1 < x2 and y1 < y2):
        raise UserError(f"box: {text[:40]!r} is empty, expected x1 < x2 and y1 < y2.")
    return corners


def resolve(query: Query, gallery: Gallery, finder: Finder) -> list[View]:
    """The views of a query.

    Raises:
      UserError: one is not, or not any more, in the gallery or among the uploaded photos.
    """
    views = []
    for view in query.views:
        uploaded = _UPLOADED.fullmatch(view)
        found = _of_upload(view, uploaded[1], int(uploaded[2]), finder) if uploaded else None
        found = found or (None if uploaded else _of_gallery(view, gallery))
        if found is None:
            raise UserError(
                "The server does not have this photo any more; please choose it again."
                if uploaded
                else "This person is not in the gallery, or not any more."
            )
        views.append(found)
    return views


def _of_upload(view: str, upload_id: str, row: int, finder: Finder) -> View | None:
    upload = finder.get(upload_id)
    if upload is None or upload.found is None or row >= len(upload.found.scores):
        return None
    page = f"/upload/{upload.id}"
    return View(
        id=view,
        name=upload.name,
        page=page,
        picture=f"{page}/{row}.jpg",
        box=np.asarray(upload.found.boxes[row]),
        embedding=np.asarray(upload.found.embeddings[row]),
        person=None,
    )


def _of_gallery(view: str, gallery: Gallery) -> View | None:
    person = gallery.person(view)
    if person is None:
        return None
    return View(
        id=view,
        name=person.scene.path,
        page=f"/scene/{person.scene.id}?person={person.id}",
        picture=f"/person/{person.id}.jpg",
        box=person.box,
        embedding=gallery.embeddings([view])[0],
        person=person,
    )
