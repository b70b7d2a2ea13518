"""The addresses that change a gallery: forgetting, and indexing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Form
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from alignps_jax.gallery.forget import forget
from alignps_jax.gallery.page.site import READ_FIRST, OfSite, page

router = APIRouter()
Several = Annotated[Sequence[str], Form()]


@router.post("/forget")
def forget_people(
    request: Request,
    site: OfSite,
    person: Several,
    what: Annotated[Literal["forget", "nobody"], Form()] = "forget",
) -> Response:
    """Forgets people for good, or removes what is no person; both stay away when indexed again."""
    done = forget(site.gallery.people, persons=person, for_good=what == "forget")
    return page(request, "forgot.html", done=done, what=what)


@router.get("/library", dependencies=READ_FIRST)
def library(request: Request, site: OfSite) -> Response:
    """The folders that are indexed, what was indexed, and what was left out and why."""
    shown = site.library
    values = {"sources": shown.sources, "done": shown.done, "error": shown.error}
    return page(request, "library.html", is_running=shown.is_running, **values)


@router.post("/library")
def start(site: OfSite) -> Response:
    """Indexes what is new in the folders that the server was given."""
    site.library.start()
    return RedirectResponse("/library", 303)
