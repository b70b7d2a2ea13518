"""The addresses that change a gallery: groups and their names, forgetting, indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Form
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from alignps_jax.errors import UserError
from alignps_jax.gallery.entries import Filter
from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.groups import Group, make_groups
from alignps_jax.gallery.page.photos import Place
from alignps_jax.gallery.page.queries import MAX_VIEWS, SearchRequest
from alignps_jax.gallery.page.site import READ_FIRST, OfSite, Site, page

GROUPS = 60  # shown at a time

router = APIRouter()
Several = Annotated[Sequence[str], Form()]


@router.get("/people", dependencies=READ_FIRST)
def people(request: Request, site: OfSite, offset: Place = 0) -> Response:
    """The groups of people who look the same: named ones first, then the largest."""
    groups = site.groups.all()
    following = offset + GROUPS if offset + GROUPS < len(groups) else None
    values = {"groups": groups[offset : offset + GROUPS], "following": following}
    calibrated = site.gallery.calibration is not None
    return page(request, "people.html", is_calibrated=calibrated, **values)


@router.post("/people")
def change_groups(
    site: OfSite, change: Annotated[Literal["make", "merge"], Form()], person: Several = ()
) -> Response:
    """Makes the groups anew, or one of the groups of several people."""
    if change == "make":
        site.library.start(lambda: make_groups(site.gallery, Filter()))
        return RedirectResponse("/library", 303)
    if len(person) < 2:
        raise UserError("Choose two groups or more that show the same person.")
    merged = site.groups.put([member for one in person for member in _group(site, one).people])
    return RedirectResponse(f"/people/{merged.people[0]}", 303)


@router.get("/people/{person_id}", dependencies=READ_FIRST)
def group(request: Request, site: OfSite, person_id: str) -> Response:
    """Everybody in the group of a person."""
    found = _group(site, person_id)
    members = [one for one in map(site.gallery.person, found.people) if one is not None]
    query = SearchRequest(view=tuple(found.people[:MAX_VIEWS]))
    return page(request, "group.html", group=found, members=members, query=query)


@router.post("/people/{person_id}")
def change_group(
    site: OfSite,
    person_id: str,
    change: Annotated[Literal["name", "split"], Form()],
    name: Annotated[str, Form()] = "",
    person: Several = (),
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
    request: Request,
    site: OfSite,
    person: Several,
    what: Annotated[Literal["forget", "nobody"], Form()] = "forget",
) -> Response:
    """Forgets people for good, or removes what is no person; both stay away when indexed again."""
    site.removed.clear()
    done = forget(site.gallery.people, persons=person, for_good=what == "forget")
    return page(request, "forgot.html", done=done, what=what)


@router.get("/library", dependencies=READ_FIRST)
def library(request: Request, site: OfSite) -> Response:
    """The folders that are indexed, what was indexed, and what was left out and why."""
    shown, done = site.library, None
    if shown.done:
        walk = shown.done.walk
        files = {"found": len(walk.files), "skipped": walk.skipped, "others": dict(walk.others)}
        done = {**vars(shown.done), "walk": None, **files}
    values = {"sources": shown.sources, "is_running": shown.is_running, "error": shown.error}
    return page(request, "library.html", done=done, **values)


@router.post("/library")
def start(site: OfSite) -> Response:
    """Indexes what is new in the folders that the server was given."""
    if site.library.sources:
        site.library.start(site.library.index)
    return RedirectResponse("/library", 303)
