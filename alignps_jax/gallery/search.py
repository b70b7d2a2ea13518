"""Searches people of a photo: `--mode=search`."""

from __future__ import annotations

import time
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
from alignps_jax.media.photos import Image, decode_photo
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


def person_at(
    detector: Detector, photo: Image, name: object, box: Corners, found: Detections | None = None
) -> Detections:
    """The person in a box (x1, y1, x2, y2 in pixels) of an RGB photo; UserError if nobody is there.

    Looks again around the box where the whole photo (`found`) shows nobody there: a small person is
    larger then.
    """
    height, width = photo.shape[:2]
    x1, y1, x2, y2 = (float(corner) for corner in box)
    if not (x1 < x2 and y1 < y2 and x2 > 0 and y2 > 0 and x1 < width and y1 < height):
        raise UserError(
            f"--box: found {x1:g},{y1:g},{x2:g},{y2:g}, expected x1,y1,x2,y2 with x1 < x2 and "
            f"y1 < y2 on the photo {name} of {width}x{height} pixels"
        )
    found = detector.detect(photo) if found is None else found
    if (row := person_in_box(found.boxes, box)) is None:
        left, top = max(0, int(1.5 * x1 - 0.5 * x2)), max(0, int(1.5 * y1 - 0.5 * y2))
        part = photo[top : int(1.5 * y2 - 0.5 * y1) + 1, left : int(1.5 * x2 - 0.5 * x1) + 1]
        found = detector.detect(np.ascontiguousarray(part))
        moved = np.asarray(found.boxes) + np.array([left, top, left, top], np.float32)
        found = found.replace(boxes=moved)  # type: ignore[attr-defined]
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

    A match joins an entry above it that shows somebody as tall, at most two seconds away and near
    enough to walk there, if it is nearly as similar as the entry's best one; whoever stands in the
    same frame is somebody else.
    """
    entries: list[Entry] = []
    seen: dict[tuple[str, int], list[tuple[int, Match]]] = {}  # by content and second
    for match in matches:
        scene = match.person.scene
        near = [
            number
            for turn in range(-_NEIGHBORS, _NEIGHBORS + 1)
            for number, other in seen.get((scene.hash, int(scene.second or 0) + turn), ())
            if match.similarity >= _AS_SIMILAR * entries[number].match.similarity
            and _can_walk(match, other)
            and all(one.person.scene.second != scene.second for one in entries[number].members)
        ]
        number = min(near, default=len(entries))
        if number == len(entries):
            entries.append(Entry(match, []))
        entries[number].members.append(match)
        if scene.second is not None:
            seen.setdefault((scene.hash, int(scene.second)), []).append((number, match))
    return entries


def _can_walk(one: Match, other: Match) -> bool:
    """Whether a person can get from box to box: as tall, and its own height away in a second."""
    a, b = one.person.box, other.person.box
    seconds = abs((one.person.scene.second or 0) - (other.person.scene.second or 0))
    tall, small = max(a[3] - a[1], b[3] - b[1]), min(a[3] - a[1], b[3] - b[1])
    distance = np.hypot(*((a[:2] + a[2:]) - (b[:2] + b[2:])) / 2)
    return bool(
        0 < seconds <= _NEIGHBORS and tall <= 1.5 * small and distance <= tall * max(seconds, 0.5)
    )


def likely(matches: Sequence[Match], show_all: bool = False) -> list[Match]:
    """The matches that may show the person; all of them without a calibration."""
    return [
        one for one in matches if show_all or one.probability is None or one.probability >= LIMIT
    ]


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

    Writes `ranking.json` and `ranking.png` to `workdir`, and prints a summary and the best results.
    People of the query photo itself and of its copies are left out, and so are those who are not
    likely the person, unless `show_all`. Returns what the JSON file holds.
    """
    detector, max_pixels = gallery.own_detector(), gallery.info.max_pixels
    data = query.read_bytes()
    with blame(query):
        photo = decode_photo(data, max_pixels)
    people = wanted_people(detector, photo, query, box)
    own, start = content_hash(data), time.perf_counter()
    same = sum(len(gallery.people_of(scene.id)) for scene in gallery.scenes_of(own))
    rankings = [
        [match for match in matches if match.person.scene.hash != own][:most]
        for matches in gallery.search_many(people.embeddings, most + same, where)
    ]
    rankings = [likely(gallery.judged(matches, where), show_all) for matches in rankings]
    seconds = time.perf_counter() - start
    boxes = people.boxes if box is None else [np.array(box, np.float32)]
    drawn = list(zip(boxes, rankings, strict=True))[:_MAX_PICTURE_QUERIES]
    rows = (
        picture_row("query", photo, query.name, one, _drawn(gallery, found)) for one, found in drawn
    )
    content: list[dict[str, Any]] = [
        {"query": {"image": query.name, "box": _box(one)}, "results": list(map(_result, found))}
        for one, found in zip(boxes, rankings, strict=True)
    ]
    write_json(workdir / "ranking.json", content)
    write_image(workdir / "ranking.png", grid_picture(rows))
    print(
        f"searched {len(rankings)} of {query.name} among {gallery.searched(where):,} people in "
        f"{gallery.num_scenes:,} scenes in {seconds:.2f} s"
    )
    if (recall := gallery.recall) is not None:
        print(f"approximate: of the ten most similar people it finds {recall:.0%}")
    for one, found in zip(boxes, rankings, strict=True):
        said = (
            f"{len(found):,} found, first {_said(found[0])}" if found else f"{NOBODY} (--show_all)"
        )
        print(f"  ({', '.join(f'{x:.0f}' for x in one)}): {said}")
    if gallery.calibration is None:
        print(f"note: {NOT_CALIBRATED}")
    print(f"ranking  {workdir / 'ranking.json'}\npicture  {workdir / 'ranking.png'}")
    return content


def _said(match: Match) -> str:
    meaning = f": {words(match.probability)}" if match.probability is not None else ""
    return f"{match.person.scene.name}, similarity {match.similarity:.3f}{meaning}"


def _result(match: Match) -> dict[str, object]:
    person, others = match.person, list(match.paths[1:])
    known = {"second": person.scene.second, "copies": others or None}
    known |= {"probability": match.probability and round(match.probability, 6)}
    return {
        "image": person.scene.path,
        "box": _box(person.box),
        "similarity": round(match.similarity, 6),
        "score": round(person.score, 6),
        "person": person.id,
        **{name: value for name, value in known.items() if value is not None},
    }


def _box(values: Corners) -> list[float]:
    return [round(float(value), 2) for value in values]


def _drawn(gallery: Gallery, matches: Sequence[Match]) -> Iterator[Result]:
    """The results whose photos are still there."""
    for match in matches:
        scene = match.person.scene
        try:
            image = gallery.pixels(scene)
        except (UserError, OSError) as error:
            print(f"note: {error}; not in the picture")
            continue
        share = "" if match.probability is None else f", {match.probability:.0%} likely"
        yield Result(image, scene.name + share, match.person.box, match.similarity)
