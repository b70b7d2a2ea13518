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
from alignps_jax.gallery.entries import Entry, Filter, Match, Person, content_hash, scene_id
from alignps_jax.gallery.gallery import Corners, Gallery
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.many import above
from alignps_jax.media import Image, decode_photo
from alignps_jax.types import AnyArray, Detections

# A person in neighboring seconds of a video: time, and share of the best one's similarity.
_NEIGHBORS, _AS_SIMILAR = 2, 0.6

Box = Corners | None  # None: everybody


def person_in_box(boxes: Float[AnyArray, "N 4"], box: Corners) -> int | None:
    """The person whom a drawn box overlaps most, and enough; None where nobody is."""
    overlap = np.asarray(iou(np.asarray(boxes), np.array(box, np.float32)))
    return int(overlap.argmax()) if len(overlap) and overlap.max() >= 0.3 else None


def wanted_people(detector: Detector, photo: Image, box: Box) -> Detections:
    """The person in a box of an RGB photo, or everybody in it.

    Looks again around the box if the whole photo shows nobody there: a small person is larger then.
    UserError if nobody is there.
    """
    if box is None:
        threshold = detector.config.eval.score_threshold
        if len((people := above(detector.detect(photo), threshold)).scores):
            return people
        raise UserError(
            f"found nobody with a score of {threshold:g} or more, expected somebody to search; "
            "--box says where to look, --config.eval.score_threshold how sure to be"
        )
    corners = np.array(box, np.float32).reshape(2, 2)
    around = corners + (corners[1] - corners[0]) * np.array([[-0.5], [0.5]])
    whole = np.array([(0, 0), photo.shape[1::-1]])
    for start, end in whole, np.maximum(around, 0).astype(int):
        part = photo[start[1] : end[1], start[0] : end[0]]
        if part.size:
            found = detector.detect(np.ascontiguousarray(part))
            boxes = np.asarray(found.boxes) + np.tile(start, 2).astype(np.float32)
            found = dataclasses.replace(found, boxes=boxes)
            if (row := person_in_box(found.boxes, box)) is not None:
                return jax.tree.map(lambda x, row=row: np.asarray(x)[row : row + 1], found)
    raise UserError("--box: nobody was found at {:g},{:g},{:g},{:g}".format(*box))


def join_seconds(matches: Sequence[Match]) -> list[Entry]:
    """The matches, those of one person in neighboring seconds of a video as one entry.

    A match joins an entry that is not much more similar and shows somebody as tall at most two
    seconds away, near enough to walk there, and nobody in the same frame.
    """
    entries: list[Entry] = []
    seen = defaultdict[tuple[str, int], list[tuple[int, Match]]](list)  # by content and second
    for match in matches:
        scene, second = match.person.scene, int(match.person.scene.second or 0)
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
    box: Box,
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
        photo = decode_photo(data, gallery.own_detector().config.data.max_pixels)
    people, memory = wanted_people(gallery.own_detector(), photo, box), gallery.memory()
    own = content_hash(data)
    same = len(memory.people_of(scene_id(own, None)))
    content, rows = list[dict[str, Any]](), list[list[Image]]()
    among = f"{memory.count(where):,} people in {len(memory.scenes):,} scenes"
    print(f"searched {len(people.boxes)} of {query.name} among {among}")
    results = gallery.search_many(people.embeddings, most + same, where)
    for one, matches in zip(np.asarray(people.boxes), results, strict=True):
        others = [match for match in matches if match.person.scene.hash != own][:most]
        found = gallery.judged(others, where)
        found = found if show_all else likely(found)
        corners = np.asarray(one, float).round(2).tolist()
        asked = {"image": query.name, "box": corners}
        content.append({"query": asked, "results": [_result(match) for match in found]})
        if len(rows) < 12:  # more could not be read in a picture
            rows.append(picture_row("query", photo, query.name, one, _drawn(gallery, found)))
        said = [f"{len(found):,} found" if found else f"{NOBODY} (--show_all)"]
        for best in found[:1]:
            said += [f"first {best.person.scene.name}", f"similarity {best.similarity:.3f}"]
            said += [words(best.probability)] if best.probability is not None else []
        print(f"  {corners}:", ", ".join(said))
    if (recall := memory.recall) is not None:
        print(f"approximate: of the ten most similar people it finds {recall:.0%}")
    if gallery.calibration is None:
        print(f"note: {NOT_CALIBRATED}")
    write_json(workdir / "ranking.json", content)
    write_image(workdir / "ranking.png", grid_picture(rows))
    print(f"ranking  {workdir / 'ranking.json'}\npicture  {workdir / 'ranking.png'}")
    return content


def place(person: Person) -> dict[str, object]:
    """Who and where a person is, as JSON files say it."""
    scene, box = person.scene, np.asarray(person.box, float).round(2).tolist()
    return {"person": person.id, "image": scene.path, "second": scene.second, "box": box}


def _result(match: Match) -> dict[str, object]:
    return {
        **place(match.person),
        "copies": match.paths[1:],
        "score": round(match.person.score, 6),
        "similarity": round(match.similarity, 6),
        "probability": match.probability and round(match.probability, 6),
    }


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
