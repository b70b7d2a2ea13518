"""The addresses of photos: uploaded ones, those of the gallery, and what is drawn on them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import html
import mimetypes
from collections.abc import Callable
from pathlib import PurePath
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, File, Form, Query, UploadFile
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from alignps_jax.boxes import area
from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import person_id
from alignps_jax.gallery.page.pictures import FULL, PERSON, PREVIEW, SMALL
from alignps_jax.gallery.page.queries import SearchRequest, resolve, uploaded_view
from alignps_jax.gallery.page.site import READ_FIRST, OfSite, page
from alignps_jax.gallery.people import FoundScene
from alignps_jax.gallery.search import person_at, person_in_box

SCENES = 48  # shown at a time
_WAIT = 2.0  # seconds: most photos are done by then, and the page is complete at once
_PLACEHOLDER = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 240 160" font-size="11" '
    'text-anchor="middle" font-family="system-ui, sans-serif"><rect width="240" height="160" '
    'fill="#59636e"/><g fill="#fff"><text x="120" y="76">{}</text><text x="120" y="94">{}</text>'
    "</g></svg>"
)

router = APIRouter()
pictures = APIRouter(include_in_schema=False)
Asked = Annotated[SearchRequest, Query()]
Place = Annotated[int, Field(ge=0, lt=2**40)]


class DrawnBox(SearchRequest):
    """A box around somebody, and the query that the person joins."""

    box: str


@router.get("/", dependencies=READ_FIRST)
def home(request: Request, site: OfSite, query: Asked, offset: Place = 0) -> Response:
    """The photos and videos of the gallery, newest first."""
    cards = site.gallery.scenes(SCENES + 1, offset, query.where)
    following = offset + SCENES if len(cards) > SCENES else None
    values = {"cards": cards[:SCENES], "offset": offset, "following": following}
    return page(request, "home.html", query=query, **values)


@router.get("/scene/{scene_id}", dependencies=READ_FIRST)
def scene(
    request: Request, site: OfSite, scene_id: str, query: Asked, person: str = ""
) -> Response:
    """Everybody in a photo or frame; with a query and one of its results, its neighbors, too."""
    found = site.scene(scene_id)
    people = [
        _shown(number, one.id, one.box, one.score, f"/person/{one.id}.jpg", one.id == person)
        for number, one in enumerate(site.gallery.people_of(scene_id), 1)
    ]
    views = resolve(query, site.gallery, site.uploads) if person else []
    around = site.searcher.search(query, views).neighbors(person) if views else (None, None)
    values = {"scene": found, "found": people, "person": person, "views": views, "around": around}
    marked = site.marks.of(query.view)
    return page(request, "scene.html", query=query, marked=marked, **values)


@pictures.get("/scene/{scene_id}/{longest}.jpg")
def scene_picture(site: OfSite, scene_id: str, longest: int) -> Response:
    if longest not in (SMALL, 2 * SMALL, PREVIEW, FULL):
        raise HTTPException(404, "There is no such picture.")
    found = site.scene(scene_id)
    return _picture(found.path, lambda: site.pictures.scene(found, longest))


@pictures.get("/person/{person_id}.jpg")
def person_picture(site: OfSite, person_id: str, dense: bool = False) -> Response:
    person = site.person(person_id)
    tallest = PERSON * (1 + dense)
    return _picture(person.scene.path, lambda: site.pictures.person(person, tallest))


@pictures.get("/scene/{scene_id}/video")
def video(site: OfSite, scene_id: str) -> Response:
    found = site.scene(scene_id)
    if found.second is None:
        raise HTTPException(404, "This photo belongs to no video.")
    path = site.gallery.file_of(found)  # an error unless it is still what was indexed
    kind = mimetypes.guess_type(path)[0] or "video/mp4"
    return FileResponse(
        path, media_type=kind, filename=path.name, content_disposition_type="inline"
    )


@router.post("/scene/{scene_id}/box")
def box_in_scene(site: OfSite, scene_id: str, drawn: Annotated[DrawnBox, Form()]) -> Response:
    """Leads to the search for whoever is in a box of a photo, looked for there if need be."""
    found, people = site.scene(scene_id), site.gallery.people_of(scene_id)
    boxes = np.array([one.box for one in people]).reshape(-1, 4)
    row = person_in_box(boxes, _corners(drawn.box))
    if row is not None:
        return _search(drawn, people[row].id)
    upload = site.uploads.add(found.id, found.name, lambda: site.gallery.pixels(found))
    return _search(
        drawn, uploaded_view(upload.id, site.uploads.row_at(upload, _corners(drawn.box)))
    )


@router.post("/upload")
def upload(
    site: OfSite, photo: Annotated[list[UploadFile], File()], query: Annotated[str, Form()] = ""
) -> Response:
    """Takes a photo to search with and leads to its people, who may join a `query` (an address)."""
    if len(photo) > 1:
        raise UserError("Please send one photo at a time.")
    if not photo[0].filename:
        raise UserError("Please choose a photo first.")
    taken = site.uploads.upload(PurePath(photo[0].filename).name[-200:], photo[0].file.read())
    return RedirectResponse(f"/upload/{taken.id}?{query}".rstrip("?"), 303)


@router.get("/upload/{upload_id}", dependencies=READ_FIRST)
def uploaded(request: Request, site: OfSite, upload_id: str, query: Asked) -> Response:
    """Everybody in an uploaded photo."""
    upload = site.uploads.get(upload_id)
    if upload.done is not None:
        concurrent.futures.wait([upload.done], _WAIT)
    found = upload.found
    people = [] if found is None else [
        _shown(row + 1, uploaded_view(upload.id, row), found.boxes[row], found.scores[row],
               f"/upload/{upload.id}/{row}.jpg", False)
        for row in range(upload.shown)
    ]  # fmt: skip
    same = site.gallery.scenes_of(upload.hash)
    shown = {name: getattr(upload, name) for name in ("id", "name", "size", "error", "is_done")}
    has_preview = bool(upload.preview)
    values = {"found": people, "same": same, "has_preview": has_preview}
    return page(request, "upload.html", query=query, **values, **shown)


@pictures.get("/upload/{upload_id}/photo.jpg")
def uploaded_photo(site: OfSite, upload_id: str) -> Response:
    return Response(site.uploads.get(upload_id).preview, media_type="image/jpeg")


@pictures.get("/upload/{upload_id}/{row}.jpg")
def uploaded_person(site: OfSite, upload_id: str, row: Place) -> Response:
    found = site.uploads.get(upload_id).pictures.get(row)
    if found is None:
        raise HTTPException(404, "There is no such picture.")
    return Response(found, media_type="image/jpeg")


@router.post("/upload/{upload_id}/box")
def box_in_upload(site: OfSite, upload_id: str, drawn: Annotated[DrawnBox, Form()]) -> Response:
    """Leads to the search for whoever is in a box of an uploaded photo."""
    row = site.uploads.row_at(site.uploads.get(upload_id), _corners(drawn.box))
    return _search(drawn, uploaded_view(upload_id, row))


@router.post("/scene/{scene_id}/person")
def add_person(site: OfSite, scene_id: str, drawn: Annotated[DrawnBox, Form()]) -> Response:
    """Adds whoever is under a box that was drawn to the people of a photo."""
    found, box = site.scene(scene_id), _corners(drawn.box)
    person = person_at(site.uploads.detector, site.gallery.pixels(found), found.name, box)
    every = 0.0 if found.second is None else 1.0
    site.gallery.people.commit([FoundScene(found, person, every)], [])
    place = f"/scene/{scene_id}?person={person_id(scene_id, np.asarray(person.boxes[0]))}"
    return RedirectResponse(place, 303)


def _shown(
    number: int, view: str, box: Any, score: Any, picture: str, chosen: bool
) -> dict[str, Any]:
    """A person as the page of a photo shows it."""
    place = {"number": number, "view": view, "box": np.asarray(box), "score": float(score)}
    return place | {"picture": picture, "chosen": chosen, "area": float(area(box))}


def _corners(text: str) -> tuple[float, ...]:
    with contextlib.suppress(ValueError):
        x1, y1, x2, y2 = (float(corner) for corner in text.split(","))
        if -1e6 < x1 < x2 < 1e6 and -1e6 < y1 < y2 < 1e6:  # nor NaN
            return x1, y1, x2, y2
    raise UserError(f"box: found {text[:40]}, expected x1,y1,x2,y2 in pixels of the photo")


def _search(query: SearchRequest, view: str) -> Response:
    return RedirectResponse(query.address("/search", view=query.joined([view])), 303)


def _picture(path: str, draw: Callable[[], bytes]) -> Response:
    """A JPEG, or a placeholder with the name of the photo and why it cannot be shown."""
    try:
        return Response(draw(), media_type="image/jpeg")
    except (UserError, OSError) as error:
        reason = str(error).replace(f"{path}: ", "")
        lines = (html.escape(text[:40]) for text in (PurePath(path).name, reason))
        return Response(_PLACEHOLDER.format(*lines), 404, media_type="image/svg+xml")
