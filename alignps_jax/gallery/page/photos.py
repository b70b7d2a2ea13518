"""The addresses of photos, in a gallery or uploaded, and of what is drawn on them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import html
import mimetypes
from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated

import numpy as np
from fastapi import APIRouter, File, Form, Query, UploadFile
from pydantic import BeforeValidator, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import person_id
from alignps_jax.gallery.page.marks import rename
from alignps_jax.gallery.page.results import SearchRequest
from alignps_jax.gallery.page.site import READ_FIRST, OfSite, page
from alignps_jax.gallery.page.uploads import FULL, PERSON, PREVIEW, SMALL
from alignps_jax.gallery.people import FoundScene
from alignps_jax.gallery.search import person_in_box

SCENES = 48  # shown at a time
_WAIT = 2.0  # seconds: most photos are done by then, and the page is complete at once
_PLACEHOLDER = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 240 160" font-size="11" '
    'text-anchor="middle" font-family="system-ui, sans-serif"><rect width="240" height="160" '
    'fill="#59636e"/><g fill="#fff"><text x="120" y="76">{}</text><text x="120" y="94">{}</text>'
    "</g></svg>"
)

router = APIRouter()
Text = Annotated[str, Form()]
Asked = Annotated[SearchRequest, Query()]
Place = Annotated[int, Field(ge=0, lt=2**40)]
_Corner = Annotated[float, Field(ge=-1e6, le=1e6)]  # pixels of the photo, and not NaN


class DrawnBox(SearchRequest):
    """A box around somebody, and the query that the person joins; whose box it replaces."""

    box: Annotated[
        tuple[_Corner, _Corner, _Corner, _Corner],
        BeforeValidator(lambda sent: sent[0].split(",")),
    ]
    person: str = ""


Drawn = Annotated[DrawnBox, Form()]


@router.get("/", dependencies=READ_FIRST)
def home(request: Request, site: OfSite, query: Asked, offset: Place = 0) -> Response:
    """The photos and videos of the gallery, newest first."""
    cards = site.gallery.memory().cards(SCENES + 1, offset, query.where)
    following = offset + SCENES if len(cards) > SCENES else None
    return page(request, "home.html", query=query, cards=cards[:SCENES], following=following)


@router.post("/upload")
def upload(site: OfSite, photo: Annotated[list[UploadFile], File()], query: Text = "") -> Response:
    """Takes a photo to search with and leads to its people, who may join a `query` (an address)."""
    if len(photo) > 1:
        raise UserError("Please send one photo at a time.")
    name = PurePath(photo[0].filename or "photo").name[-200:]
    taken = site.photos.upload(name, photo[0].file.read())
    return RedirectResponse(f"/scene/{taken.id}?{query}".rstrip("?"), 303)


@router.get("/scene/{scene_id}", dependencies=READ_FIRST)
def scene(
    request: Request, site: OfSite, scene_id: str, query: Asked, person: str = ""
) -> Response:
    """Everybody in a photo or frame; with a query and one of its results, its neighbors, too."""
    uploaded = site.photos.uploaded(scene_id)
    if uploaded:
        concurrent.futures.wait([uploaded.people], _WAIT)
    found = site.photos.scene(scene_id)
    is_result = bool(person and query.view)
    around = site.searcher.search(query).neighbors(person) if is_result else (None, None)
    marked = {mark.person: mark.right for mark in site.marks.about(query.view)}
    values = {"query": query, "person": person, "is_result": is_result, "around": around}
    values |= {"scene": found, "found": site.photos.people_of(found), "marked": marked}
    values["uploaded"] = uploaded and {"is_done": uploaded.people.done()}
    return page(request, "scene.html", **values)


@router.post("/scene/{scene_id}/box")
def box(site: OfSite, scene_id: str, drawn: Drawn) -> Response:
    """Leads to the search for whoever is in a box of a photo, looked for there if need be."""
    found = site.photos.scene(scene_id)
    people = site.photos.people_of(found)
    row = person_in_box(np.array([one.box for one in people]).reshape(-1, 4), drawn.box)
    person = site.photos.person_at(found, drawn.box)[0] if row is None else people[row]
    return RedirectResponse(drawn.address("/search", view=drawn.joined([person.id])), 303)


@router.post("/scene/{scene_id}/person")
def add_person(site: OfSite, scene_id: str, drawn: Drawn) -> Response:
    """Adds the person in a drawn box to a photo, or replaces the box of `person` by it."""
    memory, people, old = site.gallery.memory(), site.gallery.people, drawn.person
    found, known = memory.scene_of(scene_id), memory.people_of(scene_id)
    if found is None or old not in ("", *(one.id for one in known)):
        raise HTTPException(404, "This photo or person is not in the gallery any more.")
    box = np.clip(drawn.box, 0, [found.width, found.height] * 2).astype(np.float32)
    person, detected = site.photos.person_at(found, tuple(box.tolist()))
    new = person.id
    if old:  # the network's own boxes are what is wrong
        detected, new = dataclasses.replace(detected, boxes=box[None]), person_id(scene_id, box)
    people.commit([FoundScene(found, detected)], [])
    if old not in ("", new):
        rename(people, old, new)
    return RedirectResponse(f"/scene/{scene_id}?person={new}", 303)


@router.get("/scene/{scene_id}/{longest}.jpg", include_in_schema=False)
def scene_picture(site: OfSite, scene_id: str, longest: int) -> Response:
    if longest not in (SMALL, 2 * SMALL, PREVIEW, FULL):
        raise HTTPException(404, "There is no such picture.")
    found = site.photos.scene(scene_id)
    return _picture(found.path, lambda: site.pictures.scene(found, longest))


@router.get("/person/{person_id}.jpg", include_in_schema=False)
def person_picture(site: OfSite, person_id: str, dense: bool = False) -> Response:
    person = site.photos.person(person_id)
    return _picture(person.scene.path, lambda: site.pictures.person(person, PERSON * (1 + dense)))


@router.get("/scene/{scene_id}/video", include_in_schema=False)
def video(site: OfSite, scene_id: str) -> Response:
    found = site.photos.scene(scene_id)
    if found.second is None:
        raise HTTPException(404, "This photo belongs to no video.")
    path = site.gallery.file_of(found)  # an error unless it is still what was indexed
    kind = mimetypes.guess_type(path)[0] or "video/mp4"
    return FileResponse(
        path, media_type=kind, filename=path.name, content_disposition_type="inline"
    )


def _picture(path: str, draw: Callable[[], bytes]) -> Response:
    """A JPEG, or a placeholder with the name of the photo and why it cannot be shown."""
    try:
        return Response(draw(), media_type="image/jpeg")
    except (UserError, OSError) as error:
        reason = str(error).replace(f"{path}: ", "")
        lines = (html.escape(text[:40]) for text in (PurePath(path).name, reason))
        return Response(_PLACEHOLDER.format(*lines), 404, media_type="image/svg+xml")
