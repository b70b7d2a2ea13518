"""The addresses of photos: uploaded ones, those of the gallery, and what is drawn on them."""

from __future__ import annotations

import asyncio
import mimetypes
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends
from jaxtyping import Float
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response

from alignps_jax.boxes import iou
from alignps_jax.gallery.entries import Scene
from alignps_jax.gallery.page.finder import Upload
from alignps_jax.gallery.page.pictures import PREVIEW, SMALL
from alignps_jax.gallery.page.queries import Query, parse_box, parse_query, uploaded_view
from alignps_jax.gallery.page.security import MAX_BODY
from alignps_jax.gallery.page.site import (
    NotThereError,
    Site,
    file_name,
    fragment,
    page,
    query_of,
    read_first,
)
from alignps_jax.types import UserError

SCENES = 48  # shown at a time
_PATIENCE = 120.0  # seconds for a form to arrive
_RECEIVED = 8  # photos that arrive at a time, because they are in memory; others wait
_WAIT = 2.0  # seconds: most photos are done by then, and the page is complete at once


class _InMemory(MultiPartParser):
    """Keeps what is uploaded in memory, where other parsers write large files to the disk."""

    spool_max_size = MAX_BODY


async def form_of(request: Request) -> FormData:
    """The form of a request, in memory; HTTPException if it is none or comes too slowly."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(_PATIENCE):
            if kind == "multipart/form-data":
                stream = request.stream()
                return await _InMemory(
                    request.headers, stream, max_files=1, max_fields=100, max_part_size=1 << 16
                ).parse()
            if kind == "application/x-www-form-urlencoded":
                return await request.form(max_files=0, max_fields=100)
    except MultiPartException as error:
        raise HTTPException(400, "The form arrived damaged; please send it again.") from error
    except TimeoutError as error:
        raise HTTPException(408, "The form took too long to arrive.") from error
    raise HTTPException(415, "Expected a form.")


def pairs_of(form: FormData) -> list[tuple[str, str]]:
    """The fields of a form that are text."""
    return [(name, value) for name, value in form.multi_items() if isinstance(value, str)]


def photo_routes(site: Site) -> APIRouter:
    """The pages that show photos, and the pictures in them."""
    router = APIRouter()

    @router.get("/", dependencies=[Depends(read_first)])
    def home(request: Request) -> Response:
        query = query_of(request)
        values = scenes_from(site, query, 0)
        return page(site, "home.html", query=query, **values)

    @router.get("/scenes")
    def more_scenes(request: Request, offset: int = 0) -> Response:
        query = query_of(request)
        return fragment("scenes.html", query=query, **scenes_from(site, query, offset))

    @router.get("/scene/{scene_id}", dependencies=[Depends(read_first)])
    def scene(request: Request, scene_id: str, person: str = "") -> Response:
        query, found = query_of(request), site.scene(scene_id)
        return page(
            site,
            "scene.html",
            query=query,
            scene=found,
            found=people_of(site, found, person),
            is_result=bool(person),
            can_play=found.second is not None,
        )

    @router.get("/scene/{scene_id}/{size}.jpg")
    def scene_picture(scene_id: str, size: str) -> Response:
        lengths = {"photo": PREVIEW, "small": SMALL}
        if size not in lengths:
            raise NotThereError("There is no such picture.")
        return picture(site.pictures.scene(site.scene(scene_id), lengths[size]))

    @router.get("/scene/{scene_id}/video")
    def video(scene_id: str) -> Response:
        found = site.scene(scene_id)
        if found.second is None:
            raise NotThereError("This photo belongs to no video.")
        site.pictures.scene(found, SMALL)  # UserError unless the file is still what was indexed
        kind = mimetypes.guess_type(found.path)[0] or "video/mp4"
        return FileResponse(found.path, media_type=kind, content_disposition_type="inline")

    @router.get("/person/{person_id}.jpg")
    def person_picture(person_id: str) -> Response:
        return picture(site.pictures.person(site.person(person_id)))

    @router.post("/scene/{scene_id}/box")
    async def box_in_scene(request: Request, scene_id: str) -> Response:
        pairs = pairs_of(await form_of(request))
        query, box = parse_query(pairs), parse_box(dict(pairs).get("box", ""))
        return await run_in_threadpool(searched_box, site, scene_id, query, box)

    add_upload_routes(router, site)
    return router


def add_upload_routes(router: APIRouter, site: Site) -> None:
    """The addresses of photos that somebody searches with."""
    receiving = asyncio.Semaphore(_RECEIVED)

    @router.post("/upload")
    async def upload(request: Request) -> Response:
        async with receiving:
            return await received(request)

    async def received(request: Request) -> Response:
        form = await form_of(request)
        photo = form.get("photo")
        if not isinstance(photo, UploadFile) or not photo.size:
            raise UserError("Please choose a photo first.")
        name = file_name((photo.filename or "")[-200:]) or "photo"
        data = await photo.read()
        taken = await run_in_threadpool(site.finder.upload, name, data)
        query = parse_query(pairs_of(form))
        return RedirectResponse(query.address(f"/upload/{taken.id}"), 303)

    @router.get("/upload/{upload_id}", dependencies=[Depends(read_first)])
    async def uploaded(request: Request, upload_id: str, box: str = "") -> Response:
        query, found = query_of(request), upload_of(site, upload_id)
        await done(found, _WAIT)
        if box and found.found is not None:
            return boxed(query, found, parse_box(box))
        values = upload_values(site, query, found, box)
        return await run_in_threadpool(page, site, "upload.html", 200, **values)

    @router.get("/upload/{upload_id}/people")
    async def uploaded_people(request: Request, upload_id: str, box: str = "") -> Response:
        query, found = query_of(request), upload_of(site, upload_id)
        await done(found, _WAIT)
        if box and found.found is not None:
            place = boxed(query, found, parse_box(box)).headers["location"]
            return Response(headers={"HX-Redirect": place})
        return fragment("upload_people.html", **upload_values(site, query, found, box))

    @router.get("/upload/{upload_id}/{picture_name}.jpg")
    def upload_picture(upload_id: str, picture_name: str) -> Response:
        found = upload_of(site, upload_id)
        if picture_name == "photo" and found.preview:
            return picture(found.preview)
        if picture_name.isascii() and picture_name.isdecimal() and len(picture_name) < 6:
            try:
                return picture(site.finder.picture(found, int(picture_name)))
            except KeyError:
                pass
        raise NotThereError("There is no such picture.")

    @router.post("/upload/{upload_id}/box")
    async def box_in_upload(request: Request, upload_id: str) -> Response:
        pairs = pairs_of(await form_of(request))
        query, box = parse_query(pairs), parse_box(dict(pairs).get("box", ""))
        return boxed(query, upload_of(site, upload_id), box)


def picture(data: bytes) -> Response:
    """A JPEG that the browser may keep for a while."""
    return Response(
        data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=600"}
    )


def scenes_from(site: Site, query: Query, offset: int) -> dict[str, Any]:
    """Scenes of the gallery from a place on, and where the next ones begin."""
    if not 0 <= offset < 2**40:
        raise UserError("The place in the list is out of range.")
    where = site.overview.checked(query.where)
    found = [card.scene for card in site.gallery.scenes(SCENES + 1, offset, where)]
    following = offset + SCENES if len(found) > SCENES else None
    return {
        "shown": found[:SCENES],
        "following": following,
    }


def people_of(site: Site, scene: Scene, chosen: str) -> list[dict[str, Any]]:
    """Everybody in a scene as its page shows them; one of them is chosen."""
    return [
        {
            "number": number,
            "view": person.id,
            "box": person.box,
            "score": person.score,
            "picture": f"/person/{person.id}.jpg",
            "chosen": person.id == chosen,
        }
        for number, person in enumerate(site.gallery.people_of(scene.id), 1)
    ]


def upload_of(site: Site, upload_id: str) -> Upload:
    """An uploaded photo; NotThereError."""
    found = site.finder.get(upload_id)
    if found is None:
        raise NotThereError("The server does not have this photo any more; please choose it again.")
    return found


async def done(upload: Upload, seconds: float) -> None:
    """Waits until a photo is done, but no longer than that."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not upload.is_done and loop.time() < end:
        await asyncio.sleep(0.01)


def upload_values(site: Site, query: Query, upload: Upload, box: str) -> dict[str, Any]:
    """What the page of an uploaded photo shows."""
    found = upload.found
    people = []
    if found is not None:
        people = [
            {
                "number": row + 1,
                "view": uploaded_view(upload.id, row),
                "box": found.boxes[row],
                "score": float(found.scores[row]),
                "picture": f"/upload/{upload.id}/{row}.jpg",
                "chosen": False,
            }
            for row in range(upload.shown)
        ]
    return {
        "query": query,
        "upload": upload,
        "found": people,
        "box": box,
        "progress": site.finder.status(),
    }


def boxed(query: Query, upload: Upload, box: Float[np.ndarray, "4"]) -> Response:
    """The search for whoever is in the box of an uploaded photo.

    Raises:
      UserError: the photo is not done, or nobody is there.
    """
    if upload.found is None:
        raise UserError(upload.error or "The photo is not searched yet; please wait a moment.")
    row = upload.best_in(box)
    if row is None:
        raise UserError("Nobody was found in this box; please go back and draw it around somebody.")
    view = uploaded_view(upload.id, row)
    return RedirectResponse(query.address("/search", view=query.with_view(view)), 303)


def searched_box(site: Site, scene_id: str, query: Query, box: Float[np.ndarray, "4"]) -> Response:
    """The search for whoever is in the box of a scene.

    That is whom the gallery has there; where it has nobody, the scene is searched once more, for
    people with low scores, too.
    """
    scene = site.scene(scene_id)
    people = site.gallery.people_of(scene.id)
    if people:
        overlap = iou(np.stack([person.box for person in people]), box)
        if overlap.max() > 0:
            view = people[int(overlap.argmax())].id
            return RedirectResponse(query.address("/search", view=query.with_view(view)), 303)
    upload = site.finder.add(file_name(scene.path), lambda: site.gallery.pixels(scene))
    corners = ",".join(f"{corner:g}" for corner in box)
    return RedirectResponse(query.address(f"/upload/{upload.id}", box=corners), 303)
