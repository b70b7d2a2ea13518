"""Searches people of a photo: `--mode=search`."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from alignps_jax.boxes import iou
from alignps_jax.drawing.pictures import Result, grid_picture, picture_row
from alignps_jax.errors import UserError, blame
from alignps_jax.evaluation.calibration import LIMIT, NOBODY, NOT_CALIBRATED, words
from alignps_jax.files import write_image, write_json
from alignps_jax.gallery.entries import Entry, Filter, Match, content_hash
from alignps_jax.gallery.gallery import Gallery
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import above
from alignps_jax.media import Image, decode_photo
from alignps_jax.types import AnyArray, Detections

# Rows of the picture: a crowd as a query would make it unreadable; the JSON file has everybody.
_MAX_PICTURE_QUERIES = 12
# A box is around a person with such an overlap.
_UNDER = 0.3
# A person in neighboring seconds of a video: time, and share of the best one's similarity.
_NEIGHBORS, _AS_SIMILAR = 2, 0.6

Corners = Sequence[float] | Float[np.ndarray, "4"]


def person_in_box(boxes: Float[AnyArray, "N 4"], box: Corners) -> int | None:
    """The person whom a drawn box means; None where nobody is."""
    overlap = np.asarray(iou(np.asarray(boxes), np.array(box, np.float32)))
    return int(overlap.argmax()) if len(overlap) and overlap.max() >= _UNDER else None


def person_at(detector: Detector, photo: Image, name: object, box: Corners) -> Detections:
    """The person in a box (x1, y1, x2, y2 in pixels) of an RGB photo; UserError if nobody is there.

    Looks again around the box if the whole photo shows nobody there: a small person is larger then.
    """
    x1, y1, x2, y2 = (float(corner) for corner in box)
    found = detector.detect(photo)
    if (row := person_in_box(found.boxes, box)) is None:
        left, top = max(0, int(1.5 * x1 - 0.5 * x2)), max(0, int(1.5 * y1 - 0.5 * y2))
        part = photo[top : int(1.5 * y2 - 0.5 * y1) + 1, left : int(1.5 * x2 - 0.5 * x1) + 1]
        if part.size:
            found = detector.detect(np.ascontiguousarray(part))
            moved = np.asarray(found.boxes) + np.array([left, top, left, top], np.float32)
            found = dataclasses.replace(found, boxes=moved)
            row = person_in_box(found.boxes, box)
    if row is None:
        raise UserError(f"--box: nobody was found at {x1:g},{y1:g},{x2:g},{y2:g} of {name}")
    return jax.tree.map(lambda x: np.asarray(x)[row : row + 1], found)


def wanted_people(
    detector: Detector, photo: Image, name: object, box: Corners | None
) -> Detections:
    """The person in a box of a photo, or everybody in it; UserError if nobody is there."""
    if box is not None:
        return person_at(detector, photo, name, box)
    threshold = detector.config.eval.score_threshold
    people = above(detector.detect(photo), threshold)
    if len(people.scores) == 0:
        raise UserError(
            f"{name}: found nobody with a score of {threshold:g} or more, expected somebody to "
            "search; --box says where to look, --config.eval.score_threshold how sure to be"
        )
    return people


def join_seconds(matches: Sequence[Match]) -> list[Entry]:
    """The matches, those of one person in neighboring seconds of a video as one entry.

    A match joins an entry that is not much more similar and shows somebody as tall at most two
    seconds away, near enough to walk there, and nobody in the same frame.
    """
    entries: list[Entry] = []
    seen = defaultdict[tuple[str, int], list[tuple[int, Match]]](list)  # by content and second
    for match in matches:
        scene = match.person.scene
        second = int(scene.second or 0)
        near = [
            number
            for turn in range(second - _NEIGHBORS, second + _NEIGHBORS + 1)
            for number, other in seen[scene.hash, turn]
            if match.similarity >= _AS_SIMILAR * entries[number].match.similarity
            and _can_walk(match, other)
            and all(one.person.scene.second != scene.second for one in entries[number].members)
        ]
        number = min(near, default=len(entries))
        entries += [] if near else [Entry(match, [])]
        entries[number].members.append(match)
        seen[scene.hash, second].append((number, match))
    return entries


def _can_walk(one: Match, other: Match) -> bool:
    """Whether a person can get from box to box: as tall, and its own height away in a second."""
    a, b = one.person.box, other.person.box
    seconds = abs((one.person.scene.second or 0) - (other.person.scene.second or 0))
    small, tall = sorted([a[3] - a[1], b[3] - b[1]])
    near = np.hypot(*(a[:2] + a[2:] - b[:2] - b[2:])) / 2 <= tall * max(seconds, 0.5)
    return bool(0 < seconds <= _NEIGHBORS and tall <= 1.5 * small and near)


def likely(matches: Sequence[Match]) -> list[Match]:
    """The matches that may show the person; all of them without a calibration."""
    return [one for one in matches if one.probability is None or one.probability >= LIMIT]


def search_photo(
    gallery: Gallery,
    query: Path,
    box: Corners | None,
    where: Filter,
    most: int,
    workdir: Path,
    show_all: bool = False,
) -> list[dict[str, Any]]:
    """Searches the person in `box` of a photo, or everybody in it, for `most` results each.

    Writes `ranking.json` and `ranking.png` to `workdir`, and prints a summary. People of the query
    photo and its copies are left out, and so are those who are not likely the person, unless
    `show_all`. Returns what the JSON file holds.
    """
    data = query.read_bytes()
    with blame(query):
        photo = decode_photo(data, gallery.info.max_pixels)
    people = wanted_people(gallery.own_detector(), photo, query, box)
    own = content_hash(data)
    same = sum(len(gallery.people_of(scene.id)) for scene in gallery.scenes_of(own))
    boxes = people.boxes if box is None else [np.array(box, np.float32)]
    content, rows = list[dict[str, Any]](), list[list[Image]]()
    among = f"{gallery.searched(where):,} people in {gallery.num_scenes:,} scenes"
    print(f"searched {len(boxes)} of {query.name} among {among}")
    results = gallery.search_many(people.embeddings, most + same, where)
    for one, matches in zip(boxes, results, strict=True):
        others = [match for match in matches if match.person.scene.hash != own][:most]
        found = gallery.judged(others, where)
        found = found if show_all else likely(found)
        asked = {"image": query.name, "box": _box(one)}
        content.append({"query": asked, "results": [_result(match) for match in found]})
        if len(rows) < _MAX_PICTURE_QUERIES:
            rows.append(picture_row("query", photo, query.name, one, _drawn(gallery, found)))
        first = f", first {_said(found[0])}" if found else f": {NOBODY} (--show_all)"
        print(f"  {_box(one)}: {len(found):,} found{first}")
    if (recall := gallery.recall) is not None:
        print(f"approximate: of the ten most similar people it finds {recall:.0%}")
    if gallery.calibration is None:
        print(f"note: {NOT_CALIBRATED}")
    write_json(workdir / "ranking.json", content)
    write_image(workdir / "ranking.png", grid_picture(rows))
    print(f"ranking  {workdir / 'ranking.json'}\npicture  {workdir / 'ranking.png'}")
    return content


def _said(match: Match) -> str:
    meaning = f": {words(match.probability)}" if match.probability is not None else ""
    return f"{match.person.scene.name}, similarity {match.similarity:.3f}{meaning}"


def _result(match: Match) -> dict[str, object]:
    person = match.person
    return {
        "image": person.scene.path,
        "copies": match.paths[1:],
        "second": person.scene.second,
        "person": person.id,
        "box": _box(person.box),
        "score": round(person.score, 6),
        "similarity": round(match.similarity, 6),
        "probability": match.probability and round(match.probability, 6),
    }


def _box(values: Corners) -> list[float]:
    rounded: list[float] = np.asarray(values, float).round(2).tolist()
    return rounded


def _drawn(gallery: Gallery, matches: Sequence[Match]) -> Iterator[Result]:
    """The results whose photos are still there."""
    for match in matches:
        scene = match.person.scene
        share = "" if match.probability is None else f", {match.probability:.0%} likely"
        try:
            image = gallery.pixels(scene)
            yield Result(image, scene.name + share, match.person.box, match.similarity)
        except (UserError, OSError) as error:
            print(f"note: {error}; not in the picture")
