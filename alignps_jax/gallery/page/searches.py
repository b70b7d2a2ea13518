"""The addresses of searches: results, marks, and what can be downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from alignps_jax.gallery.page.exports import as_coco, as_csv, as_query
from alignps_jax.gallery.page.marks import (
    NONE,
    RIGHT,
    WRONG,
    Marked,
    Sight,
    corners,
    sight_of,
)
from alignps_jax.gallery.page.photos import form_of, pairs_of
from alignps_jax.gallery.page.queries import Query, View, parse_query, resolve
from alignps_jax.gallery.page.results import MAX_MATCHES, PAGE, Results, combined
from alignps_jax.gallery.page.site import (
    Site,
    file_name,
    fragment,
    page,
    query_of,
    read_first,
    text_of,
)
from alignps_jax.types import UserError

DOWNLOADS: dict[str, tuple[str, Callable[[Sequence[Marked]], bytes]]] = {
    "marks.csv": ("text/csv", as_csv),
    "test.json": ("application/json", as_coco),
    "query.json": ("application/json", as_query),
}


def search_routes(site: Site) -> APIRouter:
    """The pages of results and of marks."""
    router = APIRouter()

    @router.get("/search", dependencies=[Depends(read_first)])
    def search(request: Request) -> Response:
        query = query_of(request)
        site.overview.checked(query.where)
        if not query.views:
            return RedirectResponse(query.address("/"), 303)
        views = resolve(query, site.gallery, site.finder)
        found = site.searcher.search(query, views)
        return page(
            site,
            "search.html",
            views=views,
            found=found,
            MAX_MATCHES=MAX_MATCHES,
            **entries_from(site, query, found, 0),
        )

    @router.get("/results")
    def more_results(request: Request, offset: int = 0) -> Response:
        query = query_of(request)
        site.overview.checked(query.where)
        views = resolve(query, site.gallery, site.finder)
        if not views or not 0 <= offset <= MAX_MATCHES:
            raise UserError("There are no such results.")
        found = site.searcher.latest(query, views)
        return fragment("results.html", **entries_from(site, query, found, offset))

    @router.post("/mark")
    async def mark(request: Request) -> Response:
        pairs = pairs_of(await form_of(request))
        query, fields = parse_query(pairs), dict(pairs)
        person, said = fields.get("person", ""), fields.get("mark", "")
        await run_in_threadpool(set_mark, site, query, person, said)
        if request.headers.get("hx-request") != "true":
            return RedirectResponse(query.address("/search"), 303)
        marked = site.marks.of(query.views)
        return fragment("mark.html", query=query, person_id=person, marked=marked)

    @router.get("/marks", dependencies=[Depends(read_first)])
    def marks(request: Request) -> Response:
        return page(site, "marks.html", queries=marked_queries(site))

    @router.post("/marks/forget")
    async def forget(request: Request) -> Response:
        query = parse_query(pairs_of(await form_of(request)))
        await run_in_threadpool(site.marks.forget, query.views)
        return RedirectResponse("/marks", 303)

    @router.get("/marks/{name}")
    def download(request: Request, name: str) -> Response:
        kind, write = DOWNLOADS.get(name, ("", None))
        if write is None:
            raise UserError(f"There is no such download; there are {', '.join(DOWNLOADS)}.")
        data = write(chosen_marks(site, query_of(request)))
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(data, media_type=kind, headers=headers)

    return router


def entries_from(site: Site, query: Query, found: Results, offset: int) -> dict[str, Any]:
    """Results from a place on, and where the next ones begin."""
    end = offset + PAGE
    return {
        "query": query,
        "entries": found.entries[offset:end],
        "following": end if end < len(found.entries) else None,
        "marked": site.marks.of(query.views),
    }


def set_mark(site: Site, query: Query, person_id: str, said: str) -> None:
    """Marks a result; UserError for what is none, or where it cannot be written."""
    if said not in (RIGHT, WRONG, NONE):
        raise UserError(f"A result is {RIGHT} or {WRONG}, not {said[:20]!r}.")
    views = resolve(query, site.gallery, site.finder)
    if not views:
        raise UserError("There is no query to which this result belongs.")
    person = site.person(person_id)
    embedding = site.gallery.embeddings([person.id])[0].astype("float32")
    similarity = float((combined(query, views) @ embedding).max())
    site.marks.set([sight_of_view(view) for view in views], sight_of(person), similarity, said)


def sight_of_view(view: View) -> Sight:
    """A view of the query as marks keep it."""
    if view.person is not None:
        return sight_of(view.person)
    return Sight(view.id, view.name, None, (0, 0), corners(view.box), 0.0, uploaded=True)


def chosen_marks(site: Site, query: Query) -> list[Marked]:
    """The marks of a query, or all of them if it has no views; UserError if there are none."""
    marked = site.marks.of(query.views) if query.views else None
    queries = [marked] if marked else [] if query.views else site.marks.all()
    if not queries:
        raise UserError("Nothing is marked yet; say of a result that it is right or wrong first.")
    return queries


def marked_queries(site: Site) -> list[dict[str, Any]]:
    """Every query with marks, as the page of marks shows it."""
    queries = []
    for marked in site.marks.all():
        first = marked.views[0]
        place = Query(tuple(view.id for view in marked.views))
        is_here = not first.uploaded and site.gallery.person(first.id) is not None
        queries.append(
            {
                "query": place,
                "name": file_name(first.photo),
                "where": text_of(first.photo),
                "picture": f"/person/{first.id}.jpg" if is_here else None,
                "right": marked.count(True),
                "wrong": marked.count(False),
            }
        )
    return queries
