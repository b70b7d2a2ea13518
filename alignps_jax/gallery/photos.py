"""Person search in a folder of one's own photos."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from alignps_jax.boxes import iou
from alignps_jax.checkpoint.store import chosen_by
from alignps_jax.devices import own_cache, use_compilation_cache
from alignps_jax.drawing.rankings import PictureRow, Result, picture_row, ranking_picture
from alignps_jax.files import Image, check_outputs, read_image, write_image, write_json
from alignps_jax.gallery.nearest import top_k
from alignps_jax.inference.detector import Detector
from alignps_jax.progress import progress
from alignps_jax.types import Detections, IncompleteError, UserError


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


PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# Rows of the picture: a crowd as a query would make it unreadable; the JSON file has everybody.
# A box: x1, y1, x2, y2 in pixels.
Corners = Sequence[float] | Float[np.ndarray, "4"]
MAX_PICTURE_QUERIES = 12
# Results per query in the JSON file.
MAX_RESULTS = 1000


@dataclasses.dataclass(frozen=True)
class Query:
    """A person to search: its box in the query photo and its embedding."""

    box: Float[np.ndarray, "4"]
    embedding: Float[np.ndarray, "D"]


def search_photos(
    checkpoint: Path,
    config: ConfigDict,
    query: Path,
    box: Sequence[float] | None,
    gallery: Path,
    workdir: Path,
) -> None:
    """Searches the person in `box` of a photo, or everybody in it, in a folder of photos.

    Writes `ranking.json` and `ranking.png` to `workdir`. `config` is what to use the checkpoint
    with, mostly its own.

    Raises:
      UserError: the query photo or no photo of the gallery can be read, nobody is found in the
        query photo or its box, or the results cannot be written.
      IncompleteError: all is done, but some photos of the gallery could not be read.
    """
    ranking, picture = workdir / "ranking.json", workdir / "ranking.png"
    check_outputs(ranking, picture)
    max_pixels, threshold = config.data.max_pixels, config.eval.score_threshold
    photo = read_image(query, max_pixels)
    if box is not None:
        check_box(box, query, photo.shape[:2])
    photos = gallery_photos(gallery, query)
    use_compilation_cache(own_cache())
    detector = Detector.from_checkpoint(checkpoint, config)
    print(f"checkpoint: step {detector.step} of {checkpoint}, chosen by {chosen_by(checkpoint)}")
    queries = find_queries(detector.detect(photo), box, threshold, query, photo.shape[:2])
    reader, shown = GalleryReader(), progress(photos, desc="search", unit="photo")
    found = {
        path: above(detector.detect(image), threshold)
        for path, image in reader.read(shown, max_pixels)
    }
    rankings = rank(queries, query, found)
    write_ranking_json(ranking, rankings)
    write_image(picture, draw_rankings(rankings[:MAX_PICTURE_QUERIES], gallery, photo, max_pixels))
    people = sum(len(detections.scores) for detections in found.values())
    print(
        f"searched {len(queries)} of {query.name} among {people} people (scores >= "
        f"{threshold:g}) in {len(found)} photos of {gallery}"
    )
    print_best(rankings)
    print(f"ranking  {ranking}\npicture  {picture}")
    reader.finish()


def print_best(rankings: Sequence[QueryRanking]) -> None:
    """The best result of each query, a line each."""
    for person in rankings:
        if person.results:
            best = person.results[0]
            corners = ", ".join(f"{x:.0f}" for x in person.box)
            name = best.image if best.second is None else f"{best.image} at {best.second:.1f} s"
            print(f"  ({corners}): best match {name}, similarity {best.similarity:.3f}")


class GalleryReader:
    """Reads the photos of a gallery; one that cannot be read costs nothing but itself.

    Attributes:
      skipped: why each photo that could not be read could not, in a line.
    """

    def __init__(self) -> None:
        self.skipped: dict[Path, str] = {}
        self._read: set[Path] = set()

    def read(self, photos: Iterable[Path], max_pixels: int) -> Iterator[tuple[Path, Image]]:
        """The photos that can be read and have no more pixels than that, each with its pixels.

        Raises:
          UserError: there is none.
        """
        for path in photos:
            try:
                image = read_image(path, max_pixels)
            except UserError as error:
                self.skipped[path] = str(error)
                continue
            self._read.add(path)
            yield path, image
        if self.skipped and not self._read:
            first = next(iter(self.skipped.values()))
            raise UserError(
                f"--gallery: found no photo that can be read among {len(self.skipped):,}, expected "
                f"at least one; the first: {first}"
            )

    def finish(self) -> None:
        """Lists the photos that were skipped; to be called when all results are written.

        Raises:
          IncompleteError: there are any.
        """
        if not self.skipped:
            return
        print("skipped:")
        for reason in self.skipped.values():
            print(f"  {reason}")
        raise IncompleteError(
            f"--gallery: skipped {len(self.skipped):,} of "
            f"{len(self._read.union(self.skipped)):,} photos, which are listed above; the results "
            "are complete without them"
        )


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


def gallery_photos(gallery: Path, query: Path) -> list[Path]:
    """The photos of a folder, by name, without the query photo itself."""
    try:
        names = sorted(os.listdir(gallery))
    except OSError as error:
        raise UserError(
            f"--gallery: found {gallery}, which cannot be read ({error.strerror}), expected a "
            "gallery that --mode=index made, or a folder of photos"
        ) from error
    itself = os.path.realpath(query)
    photos = [
        gallery / name
        for name in names
        if Path(name).suffix.lower() in PHOTO_SUFFIXES
        and os.path.realpath(gallery / name) != itself
    ]
    if not photos:
        raise UserError(
            f"--gallery: found no photos in {gallery}, expected {', '.join(PHOTO_SUFFIXES)} files "
            "besides the query"
        )
    return photos


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


def rank(
    queries: Sequence[Query],
    photo: Path,
    found: Mapping[Path, Detections],
    max_results: int = MAX_RESULTS,
) -> list[QueryRanking]:
    """For each query the `max_results` people of the gallery that are most similar, best first."""
    people = [
        (path.name, box, float(score))
        for path, detections in found.items()
        for box, score in zip(detections.boxes, detections.scores, strict=True)
    ]
    if not people:
        return [QueryRanking(photo.name, query.box, ()) for query in queries]
    nearest = jax.device_get(
        top_k(
            np.stack([query.embedding for query in queries]),
            np.concatenate([detections.embeddings for detections in found.values()]),
            min(len(people), max_results),
        )
    )
    rankings = []
    for query, rows, similarities in zip(queries, nearest.index, nearest.similarity, strict=True):
        results = []
        for row, similarity in zip(rows, similarities, strict=True):
            name, box, score = people[row]
            results.append(FoundPerson(name, box, float(similarity), score))
        rankings.append(QueryRanking(photo.name, query.box, tuple(results)))
    return rankings


def draw_rankings(
    rankings: Sequence[QueryRanking],
    gallery: Path,
    photo: Image,
    max_pixels: int,
) -> Image:
    """The queries and their first results."""
    return ranking_picture(
        photos_row(ranking, gallery, photo, "query", max_pixels) for ranking in rankings
    )


def photos_row(
    ranking: QueryRanking,
    gallery: Path,
    photo: Image,
    title: str,
    max_pixels: int,
) -> PictureRow:
    """A query in its photo, below a title, and its first results in those of a folder."""
    results = (
        Result(read_image(gallery / one.image, max_pixels), one.image, one.box, one.similarity)
        for one in ranking.results
    )
    return picture_row(title, photo, ranking.image, ranking.box, results)
