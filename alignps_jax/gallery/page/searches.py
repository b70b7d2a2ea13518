"""The addresses of searches: results, marks, and what can be downloaded."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Form
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from alignps_jax.errors import UserError
from alignps_jax.evaluation.calibration import NOBODY, NOT_CALIBRATED
from alignps_jax.gallery.page.marks import Marked, identities, photos_as_zip
from alignps_jax.gallery.page.photos import Asked, Place
from alignps_jax.gallery.page.queries import MAX_VIEWS, SearchRequest
from alignps_jax.gallery.page.results import PAGE, timeline
from alignps_jax.gallery.page.site import READ_FIRST, OfSite, page

DOWNLOADS: dict[str, tuple[str, Callable[[Marked], bytes]]] = {
    "marks.csv": ("text/csv", Marked.as_csv),
    "test.json": ("application/json", Marked.as_coco),
    "query.json": ("application/json", Marked.as_query),
}

router = APIRouter()


class MarkForm(SearchRequest):
    """What somebody says of results of a query, or what else to do with them."""

    person: Annotated[list[str], Form()]
    mark: Literal["right", "wrong", "none", "search"]


@router.get("/search", dependencies=READ_FIRST)
def search(
    request: Request, site: OfSite, query: Asked, offset: Place = 0, shown: Place = PAGE
) -> Response:
    """The people who are most similar to the views of a query, from `offset` to `shown`."""
    if not query.view:
        return RedirectResponse(query.address("/"), 303)
    found = site.searcher.search(query)
    marks = site.marks.about(query.view)
    right = [mark.person for mark in marks if mark.right]
    return page(
        request,
        "search.html",
        query=query,
        views=[site.photos.person(view) for view in query.view],
        found=found,
        entries=found.entries[offset : max(shown, offset + PAGE)],
        following=shown if shown < len(found.entries) else None,
        marked={mark.person: mark.right for mark in marks},
        refined=query.joined(right) if set(right) - {*query.view} else [],
        timeline=timeline(found.entries),
        lines={"nobody": NOBODY, "uncalibrated": NOT_CALIBRATED},
        is_calibrated=site.gallery.calibration is not None,
        PAGE=PAGE,
    )


@router.post("/mark")
def mark(request: Request, site: OfSite, form: Annotated[MarkForm, Form()]) -> Response:
    """Says of results that they are right or wrong, or searches with them, too."""
    people = [site.photos.person(one).id for one in form.person]
    if form.mark == "search":
        return RedirectResponse(form.address("/search", view=form.joined(people)), 303)
    if not form.view:
        raise UserError("There is no query to which this result belongs.")
    views = [site.photos.person(view) for view in form.view]
    similarity = site.searcher.embeddings(form) @ site.photos.embeddings(people).T
    best = [round(float(value), 4) for value in similarity.max(axis=0)]
    right = {"right": True, "wrong": False}.get(form.mark)
    site.marks.set(views, dict(zip(people, best, strict=True)), right)
    if request.headers.get("hx-request") != "true":
        return RedirectResponse(form.address("/search") + f"#result-{people[0]}", 303)
    marked = {one.person: one.right for one in site.marks.about(form.view)}
    return page(request, "mark.html", query=form, person_id=people[0], marked=marked)


@router.get("/marks", dependencies=READ_FIRST)
def marks(request: Request, site: OfSite, undo: str = "") -> Response:
    """Every person with marks."""
    everything = site.marks.all()
    people = []
    for same in identities(everything):
        own = [one for one in everything if one.view in same]
        views = tuple(dict.fromkeys(one.view for one in own))[-MAX_VIEWS:]
        here = tuple(one for one in views if site.gallery.person(one))
        name = next((one.name for one in own if one.name), "")
        right = len({one.person for one in own if one.right})
        wrong = len({one.person for one in own if not one.right})
        queries = {"query": SearchRequest(view=here), "all": SearchRequest(view=views)}
        people.append({**queries, "name": name, "right": right, "wrong": wrong})
    left_out = Marked(site.gallery, everything).left_out
    values = {"marked": people, "left_out": left_out, "undo": undo if undo in site.removed else ""}
    return page(request, "marks.html", **values)


@router.post("/marks/forget")
def forget(site: OfSite, query: Annotated[SearchRequest, Form()]) -> Response:
    """Removes the marks of a person."""
    identity = secrets.token_urlsafe(9)
    site.removed[identity] = site.marks.remove(query.view)
    return RedirectResponse(f"/marks?undo={identity}", 303)


@router.post("/marks/undo")
def undo(site: OfSite, undo: Annotated[str, Form()]) -> Response:
    """Brings marks back that were just removed."""
    site.marks.restore(site.removed.pop(undo, []))
    return RedirectResponse("/marks", 303)


@router.get("/marks/{name}")
def download(site: OfSite, name: str, query: Asked) -> Response:
    """The marks of a person, or all, as marks.csv, test.json (COCO) or query.json."""
    if name not in DOWNLOADS:
        raise HTTPException(404, f"There is no such download; there are {', '.join(DOWNLOADS)}.")
    chosen = site.marks.about(query.view) if query.view else site.marks.all()
    if not chosen:
        raise UserError("Nothing is marked yet; say of a result that it is right or wrong first.")
    kind, write = DOWNLOADS[name]
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(write(Marked(site.gallery, chosen)), media_type=kind, headers=headers)


@router.get("/results.zip")
def results_as_zip(site: OfSite, query: Asked) -> Response:
    """The photos of the results, with their boxes as JSON."""
    entries = site.searcher.search(query).entries if query.view else []
    headers = {"Content-Disposition": 'attachment; filename="results.zip"'}
    parts = photos_as_zip(site.gallery, entries)
    return StreamingResponse(parts, media_type="application/zip", headers=headers)
