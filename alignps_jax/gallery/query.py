"""Whom `--mode=search` searches, in which photo, and what it writes of what it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from alignps_jax.boxes import iou
from alignps_jax.files import check_outputs, write_image, write_json
from alignps_jax.inference.detector import Detector
from alignps_jax.media.photos import Image, read_photo
from alignps_jax.types import Detections, UserError

# Rows of the picture: a crowd as a query would make it unreadable; the JSON file has everybody.
MAX_PICTURE_QUERIES = 12
# Results per query in the JSON file.
MAX_RESULTS = 1000
# A box: x1, y1, x2, y2 in pixels.
Corners = Sequence[float] | Float[np.ndarray, "4"]


@dataclasses.dataclass(frozen=True)
class Query:
    """A person to search: its box in the query photo and its embedding."""

    box: Float[np.ndarray, "4"]
    embedding: Float[np.ndarray, "D"]


def is_gallery(address: str) -> bool:
    """Whether something that --mode=index made may lie there, rather than a folder of photos."""
    return "://" in address or (Path(address) / "people.lance").is_dir()


def parse_box(text: str | None) -> tuple[float, ...] | None:
    """The corners of "x1,y1,x2,y2"; None stays None.

    Raises:
      UserError: the text is not four numbers.
    """
    if text is None:
        return None
    try:
        corners = tuple(float(number) for number in text.split(","))
    except ValueError:
        corners = ()
    if len(corners) != 4 or not np.isfinite(corners).all():
        raise UserError(f"--box: found {text!r}, expected x1,y1,x2,y2 (pixels of the photo)")
    return corners


def check_box(box: Corners, name: Path, size: tuple[int, int]) -> None:
    """Raises UserError unless a part of the box lies on the photo of that height and width."""
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2 and x2 > 0 and y2 > 0 and x1 < size[1] and y1 < size[0]):
        raise UserError(
            f"--box: found {x1:g},{y1:g},{x2:g},{y2:g}, expected x1,y1,x2,y2 with x1 < x2 and "
            f"y1 < y2 on the photo {name} of {size[1]}x{size[0]} pixels"
        )


def above(detections: Detections, threshold: float) -> Detections:
    """The detections with at least that score."""
    return jax.tree.map(lambda x: x[detections.scores >= threshold], detections)


def find_queries(
    detections: Detections,
    box: Corners | None,
    threshold: float,
    name: Path,
    size: tuple[int, int],
) -> list[Query]:
    """The people to search: the one that overlaps `box` most, or everybody above the threshold."""
    if box is None:
        people = above(detections, threshold)
        if len(people.scores) == 0:
            raise UserError(
                f"{name}: found nobody with a score of {threshold:g} or more, expected somebody to "
                "search; --box says where to look, --config.eval.score_threshold how sure to be"
            )
        return [Query(b, e) for b, e in zip(people.boxes, people.embeddings, strict=True)]
    check_box(box, name, size)
    wanted = np.array(box, np.float32)
    overlap = iou(detections.boxes, wanted)
    if not (overlap > 0).any():
        corners = ",".join(f"{corner:g}" for corner in box)
        raise UserError(
            f"--box: nobody was detected inside {corners} of {name}, expected one around a person "
            "(in pixels of the photo as a viewer shows it)"
        )
    return [Query(wanted, np.asarray(detections.embeddings[int(overlap.argmax())]))]


@dataclasses.dataclass(frozen=True)
class FoundPerson:
    """One result of a search in photos: box in the photo's pixels, cosine similarity, score.

    `person` is the id in a gallery that lasts, `second` the place in a video.
    """

    image: str
    box: Float[np.ndarray, "4"]
    similarity: float
    score: float
    person: str | None = None
    second: float | None = None


@dataclasses.dataclass(frozen=True)
class QueryRanking:
    """The people found for one query box, most similar first."""

    image: str
    box: Float[np.ndarray, "4"]
    results: tuple[FoundPerson, ...]


def write_ranking_json(path: Path, rankings: Sequence[QueryRanking]) -> None:
    """Writes what `--mode=search` found: per query box a list of people, most similar first.

    Boxes are `[x1, y1, x2, y2]` in pixels of the photo as a viewer shows it (EXIF applied).

    Raises:
        UserError: the file cannot be written.
    """
    content = [
        {
            "query": {"image": ranking.image, "box": _box(ranking.box)},
            "results": [_result(found) for found in ranking.results],
        }
        for ranking in rankings
    ]
    write_json(path, content)


def _result(found: FoundPerson) -> dict[str, object]:
    known = {"person": found.person, "second": found.second}
    return {
        "image": found.image,
        "box": _box(found.box),
        "similarity": round(float(found.similarity), 6),
        "score": round(float(found.score), 6),
        **{name: value for name, value in known.items() if value is not None},
    }


def _box(values: Float[np.ndarray, "4"]) -> list[float]:
    return [round(float(value), 2) for value in values]


def print_best(rankings: Sequence[QueryRanking]) -> None:
    """The best result of each query, a line each."""
    for person in rankings:
        if person.results:
            best = person.results[0]
            corners = ", ".join(f"{x:.0f}" for x in person.box)
            name = best.image if best.second is None else f"{best.image} at {best.second:.1f} s"
            print(f"  ({corners}): best match {name}, similarity {best.similarity:.3f}")


@dataclasses.dataclass(frozen=True)
class Search:
    """One search, once all that needs no network is found to be right.

    Attributes:
      name, photo: where the query photo lies, and its pixels.
      box: of the person to search; None: everybody in the photo.
      threshold: people with a lower score do not count.
      ranking, picture: the files to write.
    """

    name: Path
    photo: Image
    box: Sequence[float] | None
    threshold: float
    ranking: Path
    picture: Path

    @classmethod
    def begin(
        cls, config: ConfigDict, query: Path, box: Sequence[float] | None, workdir: Path
    ) -> Self:
        """Reads the query photo.

        Raises:
          UserError: it cannot be read, the box is not on it, or results cannot be written.
        """
        ranking, picture = workdir / "ranking.json", workdir / "ranking.png"
        check_outputs(ranking, picture)
        photo = read_photo(query, config.data.max_pixels)
        if box is not None:
            check_box(box, query, photo.shape[:2])
        return cls(query, photo, box, config.eval.score_threshold, ranking, picture)

    def people(self, detector: Detector) -> list[Query]:
        """Whom to search; UserError if nobody is found."""
        found = detector.detect(self.photo)
        return find_queries(found, self.box, self.threshold, self.name, self.photo.shape[:2])

    def write(
        self, rankings: Sequence[QueryRanking], draw: Callable[[], Image], summary: str
    ) -> None:
        """Writes both files, and prints a summary and the best results.

        Raises:
          UserError: a file cannot be written.
        """
        write_ranking_json(self.ranking, rankings)
        write_image(self.picture, draw())
        print(summary)
        print_best(rankings)
        print(f"ranking  {self.ranking}\npicture  {self.picture}")
