"""Searches a photo's people in a gallery that lasts: `--mode=search --gallery=people.lance`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from alignps_jax.devices import use_compilation_cache
from alignps_jax.drawing.pictures import Result, grid_picture, picture_row
from alignps_jax.files import Image
from alignps_jax.gallery.entries import Match, Scene
from alignps_jax.gallery.query import (
    MAX_PICTURE_QUERIES,
    MAX_RESULTS,
    FoundPerson,
    Query,
    QueryRanking,
    Search,
)
from alignps_jax.gallery.store import Gallery
from alignps_jax.inference.detector import Detector
from alignps_jax.types import UserError


def search_gallery(
    checkpoint: Path,
    config: ConfigDict,
    query: Path,
    box: Sequence[float] | None,
    gallery: Gallery,
    workdir: Path,
) -> None:
    """Searches the person in `box` of a photo, or everybody in it, in a gallery that lasts.

    Writes `ranking.json` and `ranking.png` to `workdir`. People of the query photo itself are left
    out.

    Raises:
      UserError: the query photo cannot be read, nobody is found in it or its box, another
        checkpoint made the gallery, or the results cannot be written.
    """
    search = Search.begin(config, query, box, workdir)
    use_compilation_cache()
    detector = Detector.from_checkpoint(checkpoint, config)
    gallery.check_detector(detector)
    queries = search.people(detector)
    start = time.perf_counter()
    matches = _others(gallery, queries, query)
    seconds = time.perf_counter() - start
    rankings = [
        QueryRanking(query.name, one.box, tuple(map(_found, found)))
        for one, found in zip(queries, matches, strict=True)
    ]
    shown = zip(rankings, matches[:MAX_PICTURE_QUERIES], strict=False)
    rows = (_row(gallery, search.photo, one, found) for one, found in shown)
    search.write(
        rankings,
        lambda: grid_picture(rows),
        f"searched {len(queries)} of {query.name} among {gallery.num_people:,} people in "
        f"{gallery.num_scenes:,} scenes of {gallery.address} in {seconds:.2f} s",
    )


def _others(gallery: Gallery, queries: Sequence[Query], photo: Path) -> list[list[Match]]:
    """The first results of each query that are not of the query photo itself."""
    own = os.path.realpath(photo)
    embeddings = np.stack([query.embedding for query in queries])
    found = gallery.search(embeddings, 2 * MAX_RESULTS)
    return [
        [match for match in matches if match.person.scene.path != own][:MAX_RESULTS]
        for matches in found
    ]


def _found(match: Match) -> FoundPerson:
    person = match.person
    return FoundPerson(
        person.scene.path,
        person.box,
        match.similarity,
        person.score,
        person=person.id,
        second=person.scene.second,
    )


def _row(
    gallery: Gallery, photo: Image, ranking: QueryRanking, matches: Sequence[Match]
) -> list[Image]:
    return picture_row("query", photo, ranking.image, ranking.box, _drawn(gallery, matches))


def _drawn(gallery: Gallery, matches: Sequence[Match]) -> Iterator[Result]:
    """The results whose photos are still there."""
    for match in matches:
        scene = match.person.scene
        try:
            image = gallery.pixels(scene)
        except UserError as error:
            print(f"note: {error}; not in the picture")
            continue
        yield Result(image, _title(scene), match.person.box, match.similarity)


def _title(scene: Scene) -> str:
    name = Path(scene.path).name
    return name if scene.second is None else f"{name} at {scene.second:.1f} s"
