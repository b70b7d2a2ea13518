"""The addresses of searches, marks and downloads; of groups, forgetting and indexing."""

from __future__ import annotations

import mimetypes
import secrets
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Form
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Filter
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.groups import Group, make_groups
from alignps_jax.gallery.page.marks import Marked, identities, photos_as_zip
from alignps_jax.gallery.page.photos import Asked, Place, Text
from alignps_jax.gallery.page.results import MAX_VIEWS, PAGE, SearchRequest, timeline
from alignps_jax.gallery.page.site import READ_FIRST, OfSite, Site, page

GROUPS = 60  # shown at a time
_WRITERS = {"marks.csv": Marked.as_csv, "test.json": Marked.as_coco, "query.json": Marked.as_query}

router = APIRouter()
Several = Annotated[Sequence[str], Form()]
What = Annotated[Literal["forget", "nobody"], Form()]
Change = Annotated[Literal["make", "merge", "name", "split"], Form()]


class MarkForm(SearchRequest):
    """What somebody says of results of a query, or what else to do with them."""

    person: Annotated[list[str], Form()]
    mark: Literal["right", "wrong", "none", "search"]


@router.get("/search", dependencies=READ_FIRST)
def search(
    request: Request,
    site: OfSite,
    query: Asked,
    offset: Place = 0,
    shown: Place = PAGE,
    refined: bool = False,
) -> Response:
    """Who is most similar to the views, or all right results, from `offset` to `shown`."""
    if not query.view:
        return RedirectResponse(query.address("/"), 303)
    marked = {mark.person: mark.right for mark in site.marks.about(query.view)}
    if refined:
        right = [person for person, is_right in marked.items() if is_right]
        return RedirectResponse(query.address("/search", view=query.joined(right)), 303)
    found = site.searcher.search(query)
    views = [site.photos.person(view) for view in query.view]
    values = {"query": query, "views": views, "found": found, "timeline": timeline(found.entries)}
    values["entries"] = found.entries[offset : max(shown, offset + PAGE)]
    values["following"] = shown if shown < len(found.entries) else None
    return page(request, "search.html", marked=marked, PAGE=PAGE, **values)


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
    everything, people = site.marks.all(), []
    for same in identities(everything):
        own = [one for one in everything if one.view in same]
        views = tuple(dict.fromkeys(one.view for one in own))[-MAX_VIEWS:]
        here = tuple(site.gallery.memory().named(views))
        name = next((one.name for one in own if one.name), "")
        right, wrong = (len({x.person for x in own if x.right is said}) for said in (True, False))
        queries = {"query": SearchRequest(view=here), "all": SearchRequest(view=views)}
        people.append({**queries, "name": name, "right": right, "wrong": wrong})
    left_out = Marked(site.gallery, everything).left_out
    values = {"marked": people, "left_out": left_out, "undo": undo if undo in site.removed else ""}
    return page(request, "marks.html", **values)


@router.post("/marks/forget")
def forget_marks(site: OfSite, query: Annotated[SearchRequest, Form()]) -> Response:
    """Removes the marks of a person."""
    identity = secrets.token_urlsafe(9)
    site.removed[identity] = site.marks.remove(query.view)
    return RedirectResponse(f"/marks?undo={identity}", 303)


@router.post("/marks/undo")
def undo(site: OfSite, undo: Text) -> Response:
    """Brings marks back that were just removed."""
    site.marks.put(site.removed.pop(undo, []))
    return RedirectResponse("/marks", 303)


@router.get("/marks/{name}")
def download(
    site: OfSite, name: Literal["marks.csv", "test.json", "query.json"], query: Asked
) -> Response:
    """The marks of a person, or all; test.json is COCO."""
    chosen = site.marks.about(query.view) if query.view else site.marks.all()
    content, kind = _WRITERS[name](Marked(site.gallery, chosen)), mimetypes.guess_type(name)[0]
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=kind, headers=headers)


@router.get("/results.zip")
def results_as_zip(site: OfSite, query: Asked) -> Response:
    """The photos of the results, with their boxes as JSON."""
    entries = site.searcher.search(query).entries if query.view else []
    headers = {"Content-Disposition": 'attachment; filename="results.zip"'}
    parts = photos_as_zip(site.gallery, entries)
    return StreamingResponse(parts, media_type="application/zip", headers=headers)


@router.get("/people", dependencies=READ_FIRST)
def people(request: Request, site: OfSite, offset: Place = 0) -> Response:
    """The groups of people who look the same: named ones first, then the largest."""
    groups = site.groups.all()
    following = offset + GROUPS if offset + GROUPS < len(groups) else None
    values = {"groups": groups[offset : offset + GROUPS], "following": following}
    return page(request, "people.html", **values)


@router.post("/people")
def change_groups(site: OfSite, change: Change, person: Several = ()) -> Response:
    """Makes the groups anew, or one of the groups of several people."""
    if change == "make":
        site.library.start(lambda: make_groups(site.gallery, Filter()))
        return RedirectResponse("/library", 303)
    if len(person) < 2:
        raise UserError("Choose two groups or more that show the same person.")
    merged = site.groups.put([one for each in person for one in _group(site, each).people])
    return RedirectResponse(f"/people/{merged.people[0]}", 303)


@router.get("/people/{person_id}", dependencies=READ_FIRST)
def group(request: Request, site: OfSite, person_id: str) -> Response:
    """Everybody in the group of a person."""
    found = _group(site, person_id)
    members = [*site.gallery.memory().named(found.people).values()]
    query = SearchRequest(view=tuple(found.people[:MAX_VIEWS]))
    return page(request, "group.html", group=found, members=members, query=query)


@router.post("/people/{person_id}")
def change_group(
    site: OfSite, person_id: str, change: Change, name: Text = "", person: Several = ()
) -> Response:
    """Names the group of a person, or takes people out of it who are somebody else."""
    found = _group(site, person_id)
    if change == "name":
        site.groups.put(found.people, name.strip()[:100])
    elif person:
        site.groups.put([one for one in found.people if one in person], "")
        person_id = next((one for one in found.people if one not in person), person_id)
    return RedirectResponse(f"/people/{person_id}", 303)


def _group(site: Site, person_id: str) -> Group:
    found = site.groups.by_person().get(site.photos.person(person_id).id)
    if found is None:
        raise UserError("This person is in no group.")
    return found


@router.post("/forget")
def forget_people(
    request: Request, site: OfSite, person: Several, what: What = "forget"
) -> Response:
    """Forgets people for good, or removes what is no person; both stay away when indexed again."""
    site.removed.clear()
    site.photos.drop(person)
    done = forget(site.gallery.people, persons=person, for_good=what == "forget")
    return page(request, "forgot.html", done=done, what=what)


@router.get("/library", dependencies=READ_FIRST)
def library(request: Request, site: OfSite) -> Response:
    """The folders that are indexed, what was indexed, and what was left out and why."""
    shown, done = site.library, {}
    if shown.done:
        walk, done = shown.done.walk, vars(shown.done) | {"walk": None}
        done |= {"found": len(walk.files), "skipped": walk.skipped, "others": dict(walk.others)}
    values = {"sources": shown.sources, "is_running": shown.is_running, "error": shown.error}
    return page(request, "library.html", done=done, **values)


@router.post("/library")
def start(site: OfSite) -> Response:
    """Indexes what is new in the folders that the server was given."""
    if site.library.sources:
        site.library.start(site.library.index)
    return RedirectResponse("/library", 303)
