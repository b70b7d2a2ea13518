"""The addresses of photos: uploaded ones, those of the gallery, and what is drawn on them."""

from __future__ import annotations

import asyncio
import html
import mimetypes
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Form, Query
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from alignps_jax.boxes import iou
from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Scene
from alignps_jax.gallery.page.access import MAX_BODY
from alignps_jax.gallery.page.pictures import PERSON, PREVIEW, SMALL
from alignps_jax.gallery.page.queries import SearchRequest, corners, uploaded_view
from alignps_jax.gallery.page.site import READ_FIRST, OfSite, Site, file_name, page
from alignps_jax.gallery.page.uploads import Upload

SCENES = 48  # shown at a time
_WAIT = 2.0  # seconds: most photos are done by then, and the page is complete at once
_NOBODY = "Nobody was found in this box; please go back and draw it around somebody."
_PLACEHOLDER = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 240 160" font-size="11" '
    'text-anchor="middle" font-family="system-ui, sans-serif"><rect width="240" height="160" '
    'fill="#59636e"/><g fill="#fff"><text x="120" y="76">{}</text><text x="120" y="94">{}</text>'
    "</g></svg>"
)

router = APIRouter()
Asked = Annotated[SearchRequest, Query()]
Offset = Annotated[int, Field(ge=0, lt=2**40)]


class DrawnBox(SearchRequest):
    """A box around somebody, and the query that the person joins."""

    box: str


class _InMemory(MultiPartParser):
    """Keeps what is uploaded in memory, where other parsers write large files to the disk."""

    spool_max_size = MAX_BODY


@router.get("/", dependencies=READ_FIRST)
def home(request: Request, site: OfSite, query: Asked, offset: Offset = 0) -> Response:
    return page(request, "home.html", query=query, **_scenes_from(site, query, offset))


@router.get("/scenes")
def more_scenes(request: Request, site: OfSite, query: Asked, offset: Offset) -> Response:
    return page(request, "scenes.html", query=query, **_scenes_from(site, query, offset))


@router.get("/scene/{scene_id}", dependencies=READ_FIRST)
def scene(
    request: Request, site: OfSite, scene_id: str, query: Asked, person: str = ""
) -> Response:
    found = site.scene(scene_id)
    people = [
        {
            "number": number,
            "view": one.id,
            "box": one.box,
            "score": one.score,
            "picture": f"/person/{one.id}.jpg",
            "chosen": one.id == person,
        }
        for number, one in enumerate(site.gallery.people(scene_id), 1)
    ]
    values = {"scene": found, "found": people, "is_result": bool(person)}
    return page(request, "scene.html", query=query, **values)


@router.get("/scene/{scene_id}/{longest}.jpg")
def scene_picture(site: OfSite, scene_id: str, longest: int) -> Response:
    if longest not in (SMALL, 2 * SMALL, PREVIEW):
        raise HTTPException(404, "There is no such picture.")
    found = site.scene(scene_id)
    return _picture(found.path, lambda: site.pictures.scene(found, longest))


@router.get("/person/{person_id}.jpg")
def person_picture(site: OfSite, person_id: str, dense: bool = False) -> Response:
    person = site.person(person_id)
    tallest = PERSON * (1 + dense)
    return _picture(person.scene.path, lambda: site.pictures.person(person, tallest))


@router.get("/scene/{scene_id}/video")
def video(site: OfSite, scene_id: str) -> Response:
    found = site.scene(scene_id)
    if found.second is None:
        raise HTTPException(404, "This photo belongs to no video.")
    site.pictures.scene(found, SMALL)  # UserError unless the file is still what was indexed
    kind, name = mimetypes.guess_type(found.path)[0] or "video/mp4", file_name(found.path)
    return FileResponse(
        found.path, media_type=kind, filename=name, content_disposition_type="inline"
    )


@router.post("/scene/{scene_id}/box")
def box_in_scene(site: OfSite, scene_id: str, drawn: Annotated[DrawnBox, Form()]) -> Response:
    """The search for whoever the gallery has in a box of a scene, else in the scene itself."""
    found = site.scene(scene_id)
    people = site.gallery.people(scene_id)
    row = _best(np.array([one.box for one in people]), corners(drawn.box))
    if row is not None:
        view = people[row].id
        return RedirectResponse(drawn.address("/search", view=drawn.with_view(view)), 303)
    upload = site.uploads.add(found.id, file_name(found.path), lambda: site.gallery.pixels(found))
    return RedirectResponse(drawn.address(f"/upload/{upload.id}", box=drawn.box), 303)


@router.post("/upload")
async def upload(request: Request, site: OfSite) -> Response:
    with site.uploads.room(int(request.headers.get("content-length", MAX_BODY))):
        form = await _form_of(request)
        photos = [one for one in form.getlist("photo") if isinstance(one, UploadFile)]
        if not photos or not photos[0].filename:
            raise UserError("Please choose a photo first.")
        data = await photos[0].read()
    name = file_name((photos[0].filename or "")[-200:])
    if not data:
        raise UserError(f"{name}: this file is empty.")
    taken = await run_in_threadpool(site.uploads.upload, name, data)
    query = SearchRequest.lenient(form)
    return RedirectResponse(query.address(f"/upload/{taken.id}"), 303)


async def _form_of(request: Request) -> FormData:
    """The form of a request, in memory; HTTPException if it is none."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, "Expected a form.")
    try:
        return await _InMemory(request.headers, request.stream(), max_files=1).parse()
    except MultiPartException as error:
        line = "Please send one photo at a time." if "Too many files" in error.message else (
            "The form arrived damaged; please send it again."
        )  # fmt: skip
        raise HTTPException(400, line) from error


@router.get("/upload/{upload_id}", dependencies=READ_FIRST)
async def uploaded(
    request: Request, site: OfSite, upload_id: str, query: Asked, box: str = ""
) -> Response:
    found = site.uploads.get(upload_id)
    await _done(found)
    if box and found.found is not None:
        return _boxed(query, found, box)
    return page(request, "upload.html", **_upload_values(query, found, box))


@router.get("/upload/{upload_id}/people")
async def uploaded_people(
    request: Request, site: OfSite, upload_id: str, query: Asked, box: str = ""
) -> Response:
    found = site.uploads.get(upload_id)
    await _done(found)
    if box and found.found is not None:
        return Response(headers={"HX-Redirect": _boxed(query, found, box).headers["location"]})
    return page(request, "upload_people.html", **_upload_values(query, found, box))


@router.get("/upload/{upload_id}/photo.jpg")
def uploaded_photo(site: OfSite, upload_id: str) -> Response:
    return Response(site.uploads.get(upload_id).preview, media_type="image/jpeg")


@router.get("/upload/{upload_id}/{row}.jpg")
def uploaded_person(site: OfSite, upload_id: str, row: Offset) -> Response:
    return Response(site.uploads.get(upload_id).picture(row), media_type="image/jpeg")


@router.post("/upload/{upload_id}/box")
def box_in_upload(site: OfSite, upload_id: str, drawn: Annotated[DrawnBox, Form()]) -> Response:
    return _boxed(drawn, site.uploads.get(upload_id), drawn.box)


def _picture(path: str, draw: Callable[[], bytes]) -> Response:
    """A JPEG, or a placeholder with the name of the photo and why it cannot be shown."""
    try:
        return Response(draw(), media_type="image/jpeg")
    except (UserError, OSError) as error:
        reason = str(error).replace(f"{path}: ", "")
        lines = (html.escape(text[:40]) for text in (file_name(path), reason))
        return Response(_PLACEHOLDER.format(*lines), 404, media_type="image/svg+xml")


def _scenes_from(site: Site, query: SearchRequest, offset: int) -> dict[str, Any]:
    """Scenes of the gallery from a place on, and where the next ones begin."""
    found: list[Scene] = site.gallery.scenes(SCENES + 1, offset, query.where)
    following = offset + SCENES if len(found) > SCENES else None
    return {"shown": found[:SCENES], "following": following}


async def _done(upload: Upload) -> None:
    """Waits until a photo is done, but not for long."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _WAIT
    while not upload.is_done and loop.time() < end:
        await asyncio.sleep(0.01)


def _upload_values(query: SearchRequest, upload: Upload, box: str) -> dict[str, Any]:
    """What the page of an uploaded photo shows."""
    found = upload.found
    people = [] if found is None else [
        {
            "number": row + 1,
            "view": uploaded_view(upload.id, row),
            "box": found.boxes[row],
            "score": float(found.scores[row]),
            "picture": f"/upload/{upload.id}/{row}.jpg",
            "chosen": False,
        }
        for row in range(upload.shown)
    ]  # fmt: skip
    return {"query": query, "upload": upload, "found": people, "box": box}


def _best(boxes: np.ndarray, box: np.ndarray) -> int | None:
    """The row of the box that is nearly the same; None where none is."""
    overlap = iou(boxes.reshape(-1, 4), box)
    return int(overlap.argmax()) if overlap.size and overlap.max() >= 0.3 else None


def _boxed(query: SearchRequest, upload: Upload, box: str) -> Response:
    """The search for whoever is in the box of an uploaded photo; UserError if nobody is."""
    if upload.found is None:
        raise UserError(upload.error or "The photo is not searched yet; please wait a moment.")
    row = _best(np.asarray(upload.found.boxes), corners(box))
    if row is None:
        raise UserError(_NOBODY)
    view = uploaded_view(upload.id, row)
    return RedirectResponse(query.address("/search", view=query.with_view(view)), 303)
