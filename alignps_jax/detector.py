"""Person search in one's own photos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from alignps_jax.checkpoint import load_config, load_weights
from alignps_jax.model import build_model, weights_template
from alignps_jax.report import FoundPerson, QueryRanking, write_ranking_json
from alignps_jax.train_step import PredictStep
from alignps_jax.types import Detections, UserError, Weights
from alignps_jax.visualize import (
    Panel,
    RankingRow,
    ranking_picture,
    read_image,
    result_caption,
    write_image,
)
from data_pipeline.pipeline import single_image_batch

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# Rows of the picture: a crowd as a query would make it unreadable; the JSON file has everybody.
MAX_PICTURE_QUERIES = 12


class Detector:
    """Finds the people of a photo and gives each an embedding.

    Attributes:
      config: the configuration of the checkpoint.
    """

    def __init__(self, config: ConfigDict, weights: Weights):
        self.config = config
        self._weights = weights
        self._predict = jax.jit(PredictStep(build_model(config), config.eval))

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Self:
        """Loads the best checkpoint of a workdir, or one step's folder.

        Raises:
          UserError: there is none, or it is damaged.
        """
        config = load_config(Path(path))
        return cls(config, load_weights(Path(path), weights_template(build_model(config))))

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> Detections:
        """All detections of an RGB photo by the released code's inference rule, best first.

        Callers filter by score. The photo is resized to the test scale of the configuration.

        Returns:
          Detections [K], all valid: boxes x1, y1, x2, y2 in the photo's own pixels, scores in
          [0, 1], embeddings of length one.

        Raises:
          UserError: the image is not an RGB uint8 array.
        """
        batch = single_image_batch(image, self.config.data)
        found = jax.device_get(self._predict(self._weights.params, self._weights.frozen, batch))
        valid = found.valid[0]
        return jax.tree.map(lambda x: x[0][valid], found)


@dataclasses.dataclass(frozen=True)
class Query:
    """A person to search: its box in the query photo and its embedding."""

    box: Float[np.ndarray, "4"]
    embedding: Float[np.ndarray, "D"]


def search_photos(
    checkpoint: Path,
    query: Path,
    box: Sequence[float] | None,
    gallery: Path,
    workdir: Path,
) -> None:
    """Searches the person in `box` of a photo, or everybody in it, in a folder of photos.

    Writes `ranking.json` and `ranking.png` to `workdir`.

    Raises:
      UserError: a file cannot be read, or nobody is found in the query photo or its box.
    """
    detector = Detector.from_checkpoint(checkpoint)
    threshold = detector.config.eval.score_threshold
    photo = read_image(query)
    photos = gallery_photos(gallery, query)
    queries = find_queries(detector.detect(photo), box, threshold, query, photo.shape[:2])
    found = {
        path: above(detector.detect(read_image(path)), threshold)
        for path in tqdm(photos, desc="search", unit="photo", dynamic_ncols=True)
    }
    rankings = [rank(person, query, found) for person in queries]
    workdir.mkdir(parents=True, exist_ok=True)
    ranking, picture = workdir / "ranking.json", workdir / "ranking.png"
    write_ranking_json(ranking, rankings)
    write_image(picture, draw_rankings(rankings[:MAX_PICTURE_QUERIES], gallery, photo))
    people = sum(len(detections.scores) for detections in found.values())
    print(
        f"searched {len(queries)} of {query.name} among {people} people (scores >= "
        f"{threshold:g}) in {len(photos)} photos of {gallery}"
    )
    for person in rankings:
        if person.results:
            best = person.results[0]
            corners = ", ".join(f"{x:.0f}" for x in person.box)
            print(f"  ({corners}): best match {best.image}, similarity {best.similarity:.3f}")
    print(f"ranking  {ranking}\npicture  {picture}")


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


def gallery_photos(gallery: Path, query: Path) -> list[Path]:
    """The photos of a folder, by name, without the query photo itself."""
    if not gallery.is_dir():
        raise UserError(f"--gallery: {gallery} is not a folder")
    photos = [
        path
        for path in sorted(gallery.iterdir())
        if path.suffix.lower() in PHOTO_SUFFIXES and path.resolve() != query.resolve()
    ]
    if not photos:
        raise UserError(
            f"--gallery: found no photos in {gallery}, expected {', '.join(PHOTO_SUFFIXES)} files"
        )
    return photos


def above(detections: Detections, threshold: float) -> Detections:
    """The detections with at least that score."""
    return jax.tree.map(lambda x: x[detections.scores >= threshold], detections)


def find_queries(
    detections: Detections,
    box: Sequence[float] | None,
    threshold: float,
    name: Path,
    size: tuple[int, int],
) -> list[Query]:
    """The people to search: the one that overlaps `box` most, or everybody above the threshold."""
    if box is None:
        people = above(detections, threshold)
        if len(people.scores) == 0:
            raise UserError(f"{name}: found nobody with a score of {threshold:g} or more")
        return [Query(b, e) for b, e in zip(people.boxes, people.embeddings, strict=True)]
    x1, y1, x2, y2 = box
    if not (x1 < x2 and y1 < y2 and x2 > 0 and y2 > 0 and x1 < size[1] and y1 < size[0]):
        raise UserError(
            f"--box: found {x1:g},{y1:g},{x2:g},{y2:g}, expected x1,y1,x2,y2 with x1 < x2 and "
            f"y1 < y2 on the photo {name} of {size[1]}x{size[0]} pixels"
        )
    low = np.maximum(detections.boxes[:, :2], (x1, y1))
    high = np.minimum(detections.boxes[:, 2:], (x2, y2))
    shared = np.maximum(high - low, 0).prod(axis=1)
    areas = (detections.boxes[:, 2:] - detections.boxes[:, :2]).prod(axis=1)
    overlap = shared / (areas + (x2 - x1) * (y2 - y1) - shared)
    if not (overlap > 0).any():
        raise UserError(f"--box: nobody was detected inside {x1:g},{y1:g},{x2:g},{y2:g} of {name}")
    return [Query(np.array(box, np.float32), detections.embeddings[int(overlap.argmax())])]


def rank(person: Query, photo: Path, found: dict[Path, Detections]) -> QueryRanking:
    """Everybody found in the gallery, most similar to the person first."""
    people = [
        FoundPerson(path.name, box, float(embedding @ person.embedding), float(score))
        for path, detections in found.items()
        for box, score, embedding in zip(
            detections.boxes, detections.scores, detections.embeddings, strict=True
        )
    ]
    people.sort(key=lambda one: -one.similarity)
    return QueryRanking(photo.name, person.box, tuple(people))


def draw_rankings(
    rankings: Sequence[QueryRanking], gallery: Path, photo: UInt8[np.ndarray, "H W 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The queries and their best results."""
    rows = (
        RankingRow(
            Panel(photo, ranking.box, f"query\n{ranking.image}"),
            tuple(
                Panel(
                    read_image(gallery / one.image),
                    one.box,
                    result_caption(number, one.similarity, one.image),
                )
                for number, one in enumerate(ranking.results[:5], start=1)
            ),
        )
        for ranking in rankings
    )
    return ranking_picture(rows, max_results=5)
