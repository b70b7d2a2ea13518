"""A query as an address says it: views of one person, how to combine them, where to look.

Such an address can be kept and shared. Views of people of the gallery stay valid as long as the
gallery has them; views of an uploaded photo as long as the server keeps the photo.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlencode

import numpy as np
from fastapi import HTTPException
from jaxtyping import Float
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NaiveDatetime,
    ValidationError,
)
from starlette.datastructures import FormData, QueryParams

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Filter, Person
from alignps_jax.gallery.page.uploads import Uploads
from alignps_jax.gallery.store import Gallery

MAX_VIEWS = 12
_UPLOADED = re.compile(r"up\.([0-9a-f]{24})\.(\d{1,4})")
_EVERYBODY = Filter()
_FIRST, _LAST = datetime.datetime(1800, 1, 1), datetime.datetime(3000, 1, 1)

# An empty field of a form says nothing.
_optional = BeforeValidator(lambda value: value or None)
_Time = Annotated[Annotated[NaiveDatetime, Field(ge=_FIRST, le=_LAST)] | None, _optional]
_Share = Annotated[Annotated[float, Field(ge=0, le=1)] | None, _optional]
_several = BeforeValidator(lambda values: tuple(dict.fromkeys(filter(None, values))))


class SearchRequest(BaseModel):
    """What an address asks for.

    Attributes:
      view: ids of people, in the order in which they were added.
      combine: "mean" searches with the mean of their embeddings; "best" with each, and of each
        result the best similarity counts.
      folder, camera, after, before, score, kind: who is searched; `score` is the detector's.
    """

    model_config = ConfigDict(frozen=True)

    view: Annotated[tuple[str, ...], _several, Field(max_length=MAX_VIEWS)] = ()
    combine: Literal["mean", "best"] = "mean"
    folder: str = ""
    camera: Annotated[tuple[str, ...], _several] = ()
    after: _Time = None
    before: _Time = None
    score: _Share = None
    kind: Literal["", "photos", "videos"] = ""

    @classmethod
    def lenient(cls, params: QueryParams | FormData) -> Self:
        """The query of an address, without the fields that are wrong."""
        found: dict[str, Any] = {
            name: params.getlist(name) if name in ("view", "camera") else value
            for name, value in params.items()
        }
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            wrong = {one["loc"][0] for one in error.errors()}
            return cls.model_validate({k: v for k, v in found.items() if k not in wrong})

    @property
    def where(self) -> Filter:
        return Filter(
            folder=self.folder or None,
            cameras=self.camera,
            after=self.after,
            before=self.before,
            min_score=self.score,
            videos={"": None, "photos": False, "videos": True}[self.kind],
        )

    @property
    def is_filtered(self) -> bool:
        return self.where != _EVERYBODY

    def pairs(self, **changes: Any) -> list[tuple[str, str]]:
        """Names and values as they stand in the address; `changes` replaces or adds fields."""
        values = self.model_dump(mode="json", include=set(SearchRequest.model_fields))
        default = SearchRequest().model_dump(mode="json")
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

    def with_view(self, view: str) -> list[str]:
        """The views and this one."""
        return [*self.without_view(view), view]

    def without_view(self, view: str) -> list[str]:
        """The views but this one."""
        return [known for known in self.view if known != view]

    def anew(self) -> SearchRequest:
        """A query without views that searches the same people."""
        return self.model_copy(update={"view": ()})

    def unfiltered(self) -> SearchRequest:
        """The same views, searched among everybody."""
        return SearchRequest(view=self.view, combine=self.combine)


def corners(text: str) -> Float[np.ndarray, "4"]:
    """The corners of "x1,y1,x2,y2", in pixels; UserError if it is no box."""
    try:
        box = np.array([float(number) for number in text.split(",")], np.float32)
    except ValueError:
        box = np.zeros(0, np.float32)
    if box.shape != (4,) or not (np.abs(box) < 1e6).all() or not (box[:2] < box[2:]).all():
        raise UserError(f"box: found {text[:40]!r}, expected x1,y1,x2,y2 in pixels")
    return box


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


def uploaded_view(upload_id: str, row: int) -> str:
    """The id of a person of an uploaded photo."""
    return f"up.{upload_id}.{row}"


def resolve(query: SearchRequest, gallery: Gallery, uploads: Uploads) -> list[View]:
    """The views of a query; HTTPException (404) where one is not known, or not any more."""
    return [
        _of_upload(view, uploaded, uploads)
        if (uploaded := _UPLOADED.fullmatch(view))
        else _of_gallery(view, gallery)
        for view in query.view
    ]


def _of_upload(view: str, uploaded: re.Match[str], uploads: Uploads) -> View:
    upload, row = uploads.get(uploaded[1]), int(uploaded[2])
    if upload.found is None or row >= len(upload.found.scores):
        raise HTTPException(404, "Nobody was found at this place of the photo.")
    page = f"/upload/{upload.id}"
    picture = f"{page}/{row}.jpg"
    box, embedding = (np.asarray(x[row]) for x in (upload.found.boxes, upload.found.embeddings))
    return View(view, upload.name, page, picture, box, embedding, None)


def _of_gallery(view: str, gallery: Gallery) -> View:
    person = gallery.person(view)
    if person is None:
        raise HTTPException(404, "This person is not in the gallery, or not any more.")
    page, picture = f"/scene/{person.scene.id}?person={view}", f"/person/{view}.jpg"
    (embedding,) = gallery.embeddings([view])
    return View(view, person.scene.path, page, picture, person.box, embedding, person)
