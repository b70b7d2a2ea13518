"""The addresses of searches: results, marks, and what can be downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from alignps_jax.errors import UserError
from alignps_jax.gallery.page.exports import as_coco, as_csv, as_query
from alignps_jax.gallery.page.marks import Marked, Sight, corners, sight_of
from alignps_jax.gallery.page.photos import Asked, Offset
from alignps_jax.gallery.page.queries import SearchRequest, View, resolve
from alignps_jax.gallery.page.results import MAX_MATCHES, PAGE, Results, combined, summary
from alignps_jax.gallery.page.site import READ_FIRST, OfSite, Site, file_name, page

DOWNLOADS: dict[str, tuple[str, Callable[[Sequence[Marked]], bytes]]] = {
    "marks.csv": ("text/csv", as_csv),
    "test.json": ("application/json", as_coco),
    "query.json": ("application/json", as_query),
}

router = APIRouter()


class MarkForm(SearchRequest):
    """What somebody says of a result of a query."""

    person: str
    mark: Literal["right", "wrong", "none"]


@router.get("/search", dependencies=READ_FIRST)
def search(request: Request, site: OfSite, query: Asked) -> Response:
    if not query.view:
        return RedirectResponse(query.address("/"), 303)
    views = resolve(query, site.gallery, site.uploads)
    found = site.searcher.search(query, views)
    values = _entries_from(site, query, found, 0)
    line = summary(found, query, views, site.overview.values()["people"])
    return page(request, "search.html", views=views, found=found, summary=line, **values)


@router.get("/results")
def more_results(request: Request, site: OfSite, query: Asked, offset: Offset) -> Response:
    views = resolve(query, site.gallery, site.uploads)
    if not views or offset > MAX_MATCHES:
        raise UserError("There are no such results.")
    found = site.searcher.latest(query, views)
    return page(request, "results.html", **_entries_from(site, query, found, offset))


@router.post("/mark")
def mark(request: Request, site: OfSite, form: Annotated[MarkForm, Form()]) -> Response:
    views = resolve(form, site.gallery, site.uploads)
    if not views:
        raise UserError("There is no query to which this result belongs.")
    person = site.person(form.person)
    embedding = site.gallery.embeddings([person.id])[0].astype("float32")
    similarity = float((combined(form, views) @ embedding).max())
    sights = [_sight_of_view(view) for view in views]
    site.marks.set(sights, sight_of(person), similarity, form.mark)
    if request.headers.get("hx-request") != "true":
        return RedirectResponse(form.address("/search") + f"#result-{person.id}", 303)
    values = {"query": form, "person_id": person.id, "marked": site.marks.of(form.view)}
    return page(request, "mark.html", **values)


@router.get("/marks", dependencies=READ_FIRST)
def marks(request: Request, site: OfSite) -> Response:
    return page(request, "marks.html", queries=_marked_queries(site))


@router.post("/marks/forget")
def forget(site: OfSite, query: Annotated[SearchRequest, Form()]) -> Response:
    site.marks.forget(query.view)
    return RedirectResponse("/marks", 303)


@router.get("/marks/{name}")
def download(site: OfSite, name: str, query: Asked) -> Response:
    if name not in DOWNLOADS:
        raise HTTPException(404, f"There is no such download; there are {', '.join(DOWNLOADS)}.")
    kind, write = DOWNLOADS[name]
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(write(_chosen_marks(site, query)), media_type=kind, headers=headers)


def _entries_from(site: Site, query: SearchRequest, found: Results, offset: int) -> dict[str, Any]:
    """Results from a place on, and where the next ones begin."""
    end = offset + PAGE
    return {
        "query": query,
        "entries": found.entries[offset:end],
        "following": end if end < len(found.entries) else None,
        "marked": site.marks.of(query.view),
    }


def _sight_of_view(view: View) -> Sight:
    """A view of the query as marks keep it."""
    if view.person is not None:
        return sight_of(view.person)
    return Sight(view.id, view.name, None, (0, 0), corners(view.box), 0.0, uploaded=True)


def _chosen_marks(site: Site, query: SearchRequest) -> list[Marked]:
    """The marks of a query, or all of them if it has no views; UserError if there are none."""
    marked = site.marks.of(query.view) if query.view else None
    queries = [marked] if marked else [] if query.view else site.marks.all()
    if not queries:
        raise UserError("Nothing is marked yet; say of a result that it is right or wrong first.")
    return queries


def _marked_queries(site: Site) -> list[dict[str, Any]]:
    """Every query with marks, as the page of marks shows it."""
    queries = []
    for marked in site.marks.all():
        first = marked.views[0]
        is_here = not first.uploaded and site.gallery.person(first.id) is not None
        queries.append(
            {
                "query": SearchRequest(view=tuple(view.id for view in marked.views)),
                "name": file_name(first.photo),
                "where": first.photo,
                "picture": f"/person/{first.id}.jpg" if is_here else None,
                "right": marked.count(True),
                "wrong": marked.count(False),
            }
        )
    return queries
