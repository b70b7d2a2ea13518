"""Pictures of what a network finds and sees in photos."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from alignps_jax.drawing.canvas import (
    BLUE,
    YELLOW,
    captioned,
    draw_box,
    draw_detections,
    draw_heat,
    draw_point_clouds,
    fitted,
    grid_picture,
    heat_scale,
)
from alignps_jax.drawing.rankings import ranking_picture
from alignps_jax.gallery.photos import GalleryReader, gallery_photos, photos_row, rank
from alignps_jax.gallery.query import Query, above, check_box, find_queries
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.location_maps import (
    location_xy,
    nearest_location,
    sampling_points,
    similarity_map,
)
from alignps_jax.log import progress
from alignps_jax.media.photos import Image, read_photo
from alignps_jax.types import UserError

# Lateral convolutions whose sampling points are shown (Paper, Fig. 5).
LATERAL_LEVELS = (3, 4)
# More would hide each other.
MAX_LOCATIONS = 6
# Scenes beside the query: with it, four rows of three.
MAX_SCENES = 11
# Largest width and height of a photo in a picture, alone and among others.
_LARGE = (1400, 900)
_SMALL = (560, 420)
_SCENES_PER_ROW = 3
_SCALE_WIDTH = 400


def sampling_points_picture(
    detector: Detector, path: Path, photo: Image, box: Sequence[float] | None
) -> Image:
    """Where the neck's deformable convolutions look from some locations (Paper, Fig. 5).

    The locations are the center of `box`, without one those of the detections with the best scores;
    each has a color of its own. The centers of all detections are green.

    Raises:
      UserError: nobody is found and there is no box, the box is beyond the photo, or the network
        lacks one of the deformable convolutions.
    """
    threshold = detector.config.eval.score_threshold
    centers = _centers(np.asarray(above(detector.detect(photo), threshold).boxes))
    chosen = centers[:MAX_LOCATIONS]
    if box is not None:
        check_box(box, path, photo.shape[:2])
        height, width = photo.shape[:2]
        visible = np.clip(np.array(box), 0, (width, height, width, height))
        chosen = _centers(visible[None])
    if len(chosen) == 0:
        raise UserError(
            f"{path}: found nobody with a score of {threshold:g} or more; expected somebody, or "
            "--box=x1,y1,x2,y2 around the place to draw"
        )
    maps = detector.maps(photo)
    locations = [nearest_location(maps, xy) for xy in chosen]
    origins = [location_xy(maps, location) for location in locations]
    canvas, _ = fitted(photo, *_LARGE)
    factor = np.array(canvas.shape[1::-1]) / photo.shape[1::-1]
    panels = []
    for letter, level in zip("ab", LATERAL_LEVELS, strict=True):
        points = [sampling_points(maps, location, level) for location in locations]
        drawn = draw_point_clouds(
            canvas,
            [cloud[np.isfinite(cloud[:, 0])] * factor for cloud in points],
            [origin * factor for origin in origins],
            centers * factor,
        )
        title = f"({letter}) lateral C{level} + output"
        legend = "rings: locations, green: centers of people"
        panels.append(captioned(drawn, f"{title}\n{legend}", 2))
    portrait = photo.shape[0] > photo.shape[1]
    return grid_picture([panels] if portrait else [[panel] for panel in panels])


def _centers(boxes: Float[np.ndarray, "K 4"]) -> Float[np.ndarray, "K 2"]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def detections_picture(detector: Detector, path: Path, photo: Image) -> Image:
    """A photo with everybody found in it, and how many that are."""
    threshold = detector.config.eval.score_threshold
    found = above(detector.detect(photo), threshold)
    canvas, factor = fitted(photo, *_LARGE)
    drawn = draw_detections(canvas, np.asarray(found.boxes) * factor, np.asarray(found.scores))
    number = f"{len(found.scores)} found with a score of {threshold:g} or more"
    return grid_picture([[captioned(drawn, f"{path.name}\n{number}", 2)]])


@dataclasses.dataclass(frozen=True)
class HeatScene:
    """A photo below its heat map; `best` is the highest similarity of a person in it.

    The caption has two lines. A photo without people has -1 as its best similarity.
    """

    picture: Image
    caption: str
    best: float


def similarity_picture(
    detector: Detector,
    path: Path,
    photo: Image,
    box: Sequence[float] | None,
    scenes: Sequence[Path],
    reader: GalleryReader,
) -> Image:
    """How similar the embedding of every location of some photos is to the query's.

    The query is the person in `box`, without one the detection with the best score. It has a yellow
    box, the most similar person of each scene a blue one. Of many scenes those with the most
    similar people are shown, best first.

    Raises:
      UserError: no scene can be read, or nobody is found in the query photo or its box.
    """
    threshold = detector.config.eval.score_threshold
    query = find_queries(detector.detect(photo), box, threshold, path, photo.shape[:2])[0]
    picture, factor = _heat(detector, photo, query, _SMALL if scenes else _LARGE)
    draw_box(picture, query.box * factor, YELLOW, 2)
    cells = [captioned(picture, f"query\n{path.name}", 2)]
    for scene in most_similar_scenes(detector, query, scenes, reader):
        cells.append(captioned(scene.picture, scene.caption, 2))
    rows = [cells[i : i + _SCENES_PER_ROW] for i in range(0, len(cells), _SCENES_PER_ROW)]
    scale = captioned(heat_scale(_SCALE_WIDTH), "cosine similarity", 1)
    return grid_picture([*rows, [scale]])


def most_similar_scenes(
    detector: Detector,
    query: Query,
    scenes: Sequence[Path],
    reader: GalleryReader,
    limit: int = MAX_SCENES,
) -> list[HeatScene]:
    """Of some photos the `limit` with the most similar people, best first, each with its heat map.

    Raises:
      UserError: `reader` can read none of them.
    """
    shown = progress(scenes, desc="similarity", unit="photo", disable=not scenes)
    photos = reader.read(shown, detector.config.data.max_pixels)
    found = (_heat_scene(detector, path, photo, query) for path, photo in photos)
    return heapq.nlargest(limit, found, key=lambda scene: scene.best)


def _heat(
    detector: Detector, photo: Image, query: Query, limits: tuple[int, int]
) -> tuple[Image, float]:
    """The photo below its heat map, within `limits`, and the factor of its size."""
    canvas, factor = fitted(photo, *limits)
    return draw_heat(canvas, similarity_map(detector.maps(photo), query.embedding)), factor


def _heat_scene(detector: Detector, path: Path, photo: Image, query: Query) -> HeatScene:
    people = above(detector.detect(photo), detector.config.eval.score_threshold)
    picture, factor = _heat(detector, photo, query, _SMALL)
    if len(people.scores) == 0:
        return HeatScene(picture, f"{path.name}\nnobody found", -1.0)
    similarity = people.embeddings @ query.embedding
    person = int(similarity.argmax())
    best = float(similarity[person])
    draw_box(picture, np.asarray(people.boxes[person]) * factor, BLUE, 2)
    return HeatScene(picture, f"{path.name}\nbest match {best:.2f}", best)


def comparison_picture(
    detectors: Iterable[tuple[str, Detector]],
    path: Path,
    box: Sequence[float] | None,
    gallery: Path,
    reader: GalleryReader,
) -> Image:
    """The same query in the same photos under several networks, a row for each (Paper, Fig. 7).

    Args:
      detectors: label and network; only one at a time is held.
      path: the query photo's file.
      box: the person to search; None takes the detection with the best score of the first network.
      gallery: folder of photos.
      reader: reads them.

    Raises:
      UserError: the query or no photo of the gallery can be read, or nobody is found in the query
        photo or its box.
    """
    scenes = gallery_photos(gallery, path)
    rows = []
    for label, detector in detectors:
        threshold = detector.config.eval.score_threshold
        max_pixels = detector.config.data.max_pixels
        photo = read_photo(path, max_pixels)
        query = find_queries(detector.detect(photo), box, threshold, path, photo.shape[:2])[0]
        box = tuple(float(corner) for corner in query.box)
        found = {
            scene: above(detector.detect(image), threshold)
            for scene, image in reader.read(progress(scenes, desc=label, unit="photo"), max_pixels)
        }
        ranking = rank([query], path, found)[0]
        rows.append(photos_row(ranking, gallery, photo, label, max_pixels))
    return ranking_picture(rows)
