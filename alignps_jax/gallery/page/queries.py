"""A query as an address says it: views of one person, how to combine them, where to look.

Such an address can be kept and shared. Views of people of the gallery stay valid as long as the
gallery has them; views of an uploaded photo as long as the server keeps the photo.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlencode

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NaiveDatetime, ValidationError
from starlette.datastructures import ImmutableMultiDict

from alignps_jax.gallery.entries import Filter

MAX_VIEWS = 24
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

    By "mean" it searches with the mean of the views, by "best" with each, and the best similarity
    of a result counts. `score` is the detector's; results end below `similarity`, by default where
    they are not likely any more.
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
