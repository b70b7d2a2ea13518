"""Pictures of what a network finds and sees in photos."""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterator
from operator import attrgetter, itemgetter
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from alignps_jax.drawing import pictures
from alignps_jax.figures.plots import rendered
from alignps_jax.figures.request import FigureRequest, Pictures
from alignps_jax.gallery.search import wanted_people
from alignps_jax.inference import location_maps
from alignps_jax.inference.detector import Detector
from alignps_jax.inference.location_maps import LocationMaps
from alignps_jax.inference.many import above
from alignps_jax.media import Image
from alignps_jax.types import Detections, UserError

# Lateral convolutions whose sampling points are shown (Paper, Fig. 5).
LATERAL_LEVELS = (3, 4)
# Of the locations, told apart from each other and from the green of people's centers; more
# locations would hide each other.
COLORS = ("magenta", "cyan", "darkorange", "yellow", "mediumpurple", "red")
MAX_SCENES, _PER_ROW = 11, 3  # with the query, four rows
# Largest width and height of a photo in a picture, alone and among others.
_LARGE, _SMALL = (1400, 900), (560, 420)
_DPI = 100


def _found(detector: Detector, photo: Image) -> Detections:
    """The detections with the least score that counts, or more."""
    return above(detector.detect(photo), detector.config.eval.score_threshold)


def sampling_points(request: FigureRequest) -> Pictures:
    """Where the neck's deformable convolutions look (Paper, Fig. 5).

    They look from the center of the box, without one from those of the best detections.
    """
    detector = request.detector()
    name, photo = request.query_photo(detector)
    centers = _centers(np.asarray(_found(detector, photo).boxes))
    chosen = centers[: len(COLORS)] if request.box is None else _centers(np.array([request.box]))
    if len(chosen) == 0:
        raise UserError(f"{name}: found nobody, expected somebody, or --box around the place")
    figure = sampling_points_figure(detector.maps(photo), photo, chosen, centers)
    yield f"sampling_points-{Path(name).stem}", figure


def _centers(boxes: Float[np.ndarray, "K 4"]) -> Float[np.ndarray, "K 2"]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def sampling_points_figure(
    maps: LocationMaps,
    photo: Image,
    chosen: Float[np.ndarray, "N 2"],
    centers: Float[np.ndarray, "K 2"],
) -> Figure:
    """A panel per lateral convolution with the sampling points of the locations next to `chosen`.

    Each location has a color of its own and a ring; the centers of people are green.
    """
    height, width = photo.shape[:2]
    canvas, _ = pictures.fitted(photo, *_LARGE)
    rows, columns = (1, 2) if height > width else (2, 1)
    size = columns * canvas.shape[1] / _DPI, rows * (canvas.shape[0] / _DPI + 0.5)
    figure = Figure(size, dpi=_DPI, layout="constrained")
    for axes, level in zip(figure.subplots(rows, columns), LATERAL_LEVELS, strict=True):
        axes.imshow(canvas, extent=(0, width, height, 0))
        for xy, color in zip(chosen, COLORS, strict=False):
            location = location_maps.nearest_location(maps, xy)
            points = location_maps.sampling_points(maps, location, level)
            axes.scatter(*points.T, 45, color, edgecolors="black")
            ring = {"linewidths": 4, "path_effects": [withStroke(linewidth=7, foreground="black")]}
            place = location_maps.location_xy(maps, location)
            axes.scatter(*place, 400, "none", edgecolors=color, **ring)
        axes.scatter(*centers.T, 60, "limegreen", edgecolors="black")
        title = f"lateral C{level} + output (rings: locations, green: centers of people)"
        axes.set(xlim=(0, width), ylim=(height, 0), title=title)
        axes.set_axis_off()
    return figure


def detections(request: FigureRequest) -> Pictures:
    """Everybody found in a photo, in each photo of a folder, or in both."""
    detector = request.detector()
    query = [request.query_photo(detector)] if request.query or not request.gallery else []
    for name, photo in itertools.chain(query, request.gallery_photos(detector)):
        found = _found(detector, photo)
        canvas, factor = pictures.fitted(photo, *_LARGE)
        boxes, scores = np.asarray(found.boxes) * factor, np.asarray(found.scores)
        drawn = pictures.draw_detections(canvas, boxes, scores)
        least = detector.config.eval.score_threshold
        caption = name, f"{len(scores)} found with a score of {least:g} or more"
        picture = pictures.grid_picture([[pictures.captioned(drawn, *caption)]])
        yield f"detections-{name.replace(os.sep, '-')}", picture


def similarity(request: FigureRequest) -> Pictures:
    """Heat maps: how similar the embedding of every location of some photos is to the query's.

    The query, by default the best detection, has a yellow box, the most similar person of each
    scene a blue one. Of many scenes those with the most similar people are shown, best first.
    """
    detector = request.detector()
    name, photo = request.query_photo(detector)
    query = wanted_people(detector, photo, request.box)
    embedding = np.asarray(query.embeddings)[0]

    def cell(
        photo: Image, boxes: Float[np.ndarray, "K 4"], color: pictures.Color, *caption: str
    ) -> Image:
        canvas, factor = pictures.fitted(photo, *(_SMALL if request.gallery else _LARGE))
        canvas = tinted(canvas, location_maps.similarity_map(detector.maps(photo), embedding))
        for box in boxes:
            pictures.draw_box(canvas, box * factor, color, 2)
        return pictures.captioned(canvas, *caption)

    def scenes() -> Iterator[tuple[float, Image]]:
        for name, photo in request.gallery_photos(detector):
            people = _found(detector, photo)
            cosine = people.embeddings @ embedding
            best = np.argsort(-cosine)[:1]
            match = "".join(f"best match {x:.2f}" for x in cosine[best]) or "nobody found"
            picture = cell(photo, np.asarray(people.boxes)[best], pictures.BLUE, name, match)
            yield float(cosine.max(initial=-1)), picture

    cells = [cell(photo, np.asarray(query.boxes)[:1], pictures.YELLOW, "query", name)]
    cells += [picture for _, picture in heapq.nlargest(MAX_SCENES, scenes(), itemgetter(0))]
    rows = [cells[i : i + _PER_ROW] for i in range(0, len(cells), _PER_ROW)]
    yield f"similarity-{Path(name).stem}", pictures.grid_picture([*rows, [_scale()]])


def tinted(image: Image, heat: Float[np.ndarray, "h w"]) -> Image:
    """The image in gray, tinted by values from 0 to 1; `heat` covers it at any resolution."""
    heat = cv2.resize(np.clip(heat, 0, 1).astype(np.float32), image.shape[1::-1])
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    # Where nothing is similar the scene itself is to be seen.
    weight = 0.25 + 0.45 * heat[..., None]
    colors = 255 * colormaps["turbo"](heat)[..., :3]
    return np.round((1 - weight) * gray + weight * colors).astype(np.uint8)


def _scale() -> Image:
    """The colors of similarities."""
    figure = Figure((4, 0.6), dpi=_DPI, layout="constrained")
    colors = ScalarMappable(cmap="turbo")
    figure.colorbar(colors, figure.subplots(), orientation="horizontal", label="cosine similarity")
    return rendered(figure)


def comparison(request: FigureRequest) -> Pictures:
    """The same query in the same photos under several networks, a row for each.

    Without a box the query is the detection with the best score of the first network.
    """
    box, rows = request.box, []
    for label, detector in request.detectors():
        name, photo = request.query_photo(detector)
        query = wanted_people(detector, photo, box)
        box = box or tuple(query.boxes[0].tolist())
        people = (
            pictures.Result(scene, scene_name, one, float(cosine))
            for scene_name, scene in request.gallery_photos(detector)
            for found in [_found(detector, scene)]
            for one, cosine in zip(found.boxes, found.embeddings @ query.embeddings[0], strict=True)
        )
        best = heapq.nlargest(pictures.RESULTS_SHOWN, people, attrgetter("similarity"))
        rows.append(pictures.picture_row(label, photo, name, np.asarray(query.boxes[0]), best))
    yield f"comparison-{Path(name).stem}", pictures.grid_picture(rows)
